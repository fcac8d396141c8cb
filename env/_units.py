"""How slow each unit is on one node, from what whole stages took.

A request tells what its stage took, a sum over units; plans differ, so stages overlap. What they
say together is the most likely set of unit factors (a Gaussian prior on their logarithms: a node is
slower as a whole, and units differ a little from it), found by Gauss-Newton steps, as a stage's
logarithm is not linear in theirs. A unit that no request ran is believed to be as the node is.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from executor.profile import NodeProfile

__all__ = ["UnitFactors"]

F64 = NDArray[np.float64]
_LIMITS = (0.05, 20.0)  # a node is believed to be at most so much faster or slower
_NODE_SD = 100.0  # of the logarithm of a whole node's factor: it may be anything
_UNIT_SD = 0.4  # of a unit's beside it: memory found cold, another cache
_REQUEST_SD = 0.1  # of one request's stage
_DRIFT_PER_S = 0.01 / 60.0  # variance that an older stage gains: a tenth within a minute
_STEPS = 4


class UnitFactors:
    """The estimate for one node.

    Args:
        node: Its profile.
        window: Newest requests per stage whose median counts.
        least: With fewer of a stage they count with those of the node's other rare stages, and
            with fewer of all these not at all.
    """

    def __init__(self, node: NodeProfile, window: int, least: int) -> None:
        self._profiled_s = np.array([*node.unit_s, node.stage_overhead_s])
        self._window, self._least = window, least
        # (when it completed, log of measured over profiled work), per stage [start, stop).
        self._stages: dict[tuple[int, int], deque[tuple[float, float]]] = {}
        self._found: F64 | None = None  # until something new comes

    def add(self, at_s: float, start: int, stop: int, ratio: float) -> None:
        """Take in a request: what its stage took over what the profile says."""
        if self._profiled_s[start:stop].sum() + self._profiled_s[-1] <= 0.0:
            return  # nothing but conversions, which tell no unit
        kept = self._stages.setdefault((start, stop), deque(maxlen=self._window))
        kept.append((at_s, float(np.log(ratio))))
        self._found = None

    def forget(self, before_s: float) -> None:
        """Leave out what completed before."""
        for stage, kept in list(self._stages.items()):
            while kept and kept[0][0] < before_s:
                kept.popleft()
                self._found = None
            if not kept:
                del self._stages[stage]

    def factors(self) -> F64:
        """[n + 1] how many times as slow as profiled each unit is, and what a stage begins with."""
        if self._found is None:
            self._found = self._fit()
        return self._found

    def _fit(self) -> F64:
        mix, seen, noise = self._observed()
        profiled_s = np.zeros((len(self._stages), len(self._profiled_s)))
        for row, (start, stop) in zip(profiled_s, self._stages, strict=True):
            row[start:stop], row[-1] = self._profiled_s[start:stop], self._profiled_s[-1]
        logs = np.zeros(len(self._profiled_s))
        for _ in range(_STEPS if len(mix) else 0):
            now_s = profiled_s * np.exp(logs)
            slope = mix @ (now_s / now_s.sum(axis=1, keepdims=True))
            expected = mix @ np.log(now_s.sum(axis=1) / profiled_s.sum(axis=1))
            covariance = _NODE_SD**2 * slope.sum(axis=1) + _UNIT_SD**2 * slope.T
            off = seen - expected + slope @ logs
            logs = covariance @ np.linalg.solve(slope @ covariance + np.diag(noise), off)
        return np.clip(np.exp(logs), *_LIMITS)

    def _observed(self) -> tuple[F64, F64, F64]:
        """G groups of requests: [G, stages] each stage's share, [G] median, [G] its variance."""
        kept = [np.array(each) for each in self._stages.values()]
        counts = np.array([len(each) for each in kept], dtype=np.int64)
        rare = np.flatnonzero(counts < self._least)
        groups = [np.array([row]) for row in np.flatnonzero(counts >= self._least)]
        if counts[rare].sum() >= self._least:
            groups.append(rare)
        mix, medians = np.zeros((len(groups), len(kept))), np.zeros((len(groups), 2))
        for row, group in enumerate(groups):
            mix[row, group] = counts[group] / counts[group].sum()
            medians[row] = np.median(np.concatenate([kept[k] for k in group]), axis=0)
        at_s, seen = medians.T
        noise = _REQUEST_SD**2 / np.maximum(1, [counts[group].sum() for group in groups])
        return mix, seen, noise + _DRIFT_PER_S * (at_s.max(initial=0.0) - at_s)
