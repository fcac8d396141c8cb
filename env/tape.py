"""Recorded conditions: draw them once, play them to as many environments and as often as wanted.

A tape makes the future known: what an oracle looks ahead in, and what branches of one environment
(`Simulator.restore`) share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from env.conditions import ConditionsSource, IntervalConditions
from executor.errors import ConfigError

__all__ = ["Tape", "TapePlayer", "record_conditions"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Tape:
    """The conditions of T intervals of B environments.

    Args:
        intervals: One after the other.
        rate_rps: [B] mean arrival rates.
        substep_s: Seconds that a bandwidth or a load lasts.

    Attributes:
        batch: Number of environments B.
    """

    def __init__(
        self, intervals: Sequence[IntervalConditions], rate_rps: F64, substep_s: float
    ) -> None:
        self.intervals = tuple(intervals)
        self.rate_rps, self.substep_s = np.array(rate_rps, dtype=np.float64), substep_s
        self.batch = len(self.rate_rps)

    def __len__(self) -> int:
        """Number of intervals T."""
        return len(self.intervals)

    def play(self, index: I64 | None = None, start: int = 0) -> TapePlayer:
        """A source of conditions for a simulator.

        Args:
            index: [B'] environment b of the simulator gets this tape's environment index[b]; None
                for all, in order.
            start: The first interval played.

        Raises:
            ConfigError: No such environment or interval.
        """
        if index is not None and not (len(index) and 0 <= index.min() <= index.max() < self.batch):
            raise ConfigError(f"a tape's environments are 0..{self.batch - 1}, got {index}")
        if not 0 <= start <= len(self):
            raise ConfigError(f"a tape of {len(self)} intervals cannot start at {start}")
        return TapePlayer(self, index, start)


class TapePlayer:
    """Plays a tape's environments `index`, from interval `start` (`ConditionsSource`)."""

    def __init__(self, tape: Tape, index: I64 | None, start: int) -> None:
        self._tape, self._index, self._start = tape, index, start
        self.position = start
        self.rate_rps: F64 = tape.rate_rps if index is None else tape.rate_rps[index]
        self.substep_s = tape.substep_s

    def reset(self, seed: int) -> None:
        """Start again at `start`; a tape has no other conditions, so the seed names nothing."""
        self.position = self._start

    def next(self) -> IntervalConditions:
        """The next interval.

        Raises:
            ConfigError: The tape is over.
        """
        if self.position >= len(self._tape):
            raise ConfigError(f"the tape is over after {len(self._tape)} intervals")
        interval = self._tape.intervals[self.position]
        self.position += 1
        return interval if self._index is None else interval.take(self._index)


def record_conditions(
    conditions: ConditionsSource, n_intervals: int, first: IntervalConditions | None = None
) -> Tape:
    """The next `n_intervals` of a source; `first`, if given, was drawn from it already."""
    intervals = [] if first is None or not n_intervals else [first]
    intervals += [conditions.next() for _ in range(n_intervals - len(intervals))]
    batch = len(intervals[0].arrival_count) if intervals else len(conditions.rate_rps)
    # Shared conditions name one rate per group of environments.
    rate = np.repeat(conditions.rate_rps, batch // len(conditions.rate_rps))
    return Tape(intervals, rate, conditions.substep_s)
