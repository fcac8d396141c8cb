"""Durations counted by bucket, as Prometheus wants them, without needing its library."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

__all__ = ["LATENCY_BOUNDS_S", "STAGE_BOUNDS_S", "Histogram"]

STAGE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LATENCY_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """How many durations fell at or below each bound; one thread adds.

    Attributes:
        total_s: Sum of all durations.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """Start empty; the bounds increase, and above the last there is one bucket more."""
        self.total_s = 0.0
        self._bounds_s = tuple(bounds_s)
        self._counts = [0] * (len(bounds_s) + 1)

    def add(self, *durations_s: float) -> None:
        """Count durations."""
        for duration_s in durations_s:
            self._counts[bisect_left(self._bounds_s, duration_s)] += 1
            self.total_s += duration_s

    @property
    def count(self) -> int:
        """Durations counted."""
        return sum(self._counts)

    def cumulative(self) -> Iterable[tuple[str, int]]:
        """Per bound, as text, how many were at most that; the last bound is "+Inf"."""
        so_far = 0
        labels = (*map(str, self._bounds_s), "+Inf")
        for label, count in zip(labels, self._counts, strict=True):
            so_far += count
            yield label, so_far

    def copy(self) -> Histogram:
        """The counts as they are now."""
        twin = Histogram(self._bounds_s)
        twin.total_s, twin._counts = self.total_s, list(self._counts)
        return twin
