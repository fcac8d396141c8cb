"""The profile, corrected by what the requests in production measure.

A profile is taken once; nodes get hot, are shared or replaced, and hops change their ways. Every
finished request says anew how long its stages and hops took. Per node, medians of measured over
profiled work, stage by stage, say how slow it and each of its units are (`env._units`); per hop,
what is left of the latencies once stages, waits, transmission and round trips are accounted for is
what a frame takes beside them. No clock and no sockets: the estimator is handed what an interval
completed.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from env._units import UnitFactors
from env.predict import PlanTable
from env.state import SystemState
from env.system import Completed
from executor.errors import ConfigError
from executor.plan import Plan
from executor.profile import Profile

__all__ = ["Recalibration", "RecalibrationSettings", "Recalibrator"]

log = logging.getLogger(__name__)

F64 = NDArray[np.float64]
PROFILE_WEIGHT = 0.1  # of the profile's overhead per frame, in requests


@dataclass(frozen=True)
class RecalibrationSettings:
    """How the estimates move.

    Attributes:
        window: Newest requests whose median counts, per stage of a node (its first and last unit)
            and per number of hops crossed; a node that changes at once is believed after half of
            them.
        least: With fewer, the profile stands.
        forget_s: Older requests do not count: who has avoided a node for so long tries it again.
        step: Least relative change of a unit that is worth a new profile.
        step_s: Least change of a hop, seconds.
    """

    window: int = 32
    least: int = 5
    forget_s: float = 600.0
    step: float = 0.02
    step_s: float = 0.0005

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.window:
            raise ConfigError(f"expected 1 <= least <= window, got {self.least}, {self.window}")
        if not (self.forget_s > 0 and self.step >= 0 and self.step_s >= 0):
            raise ConfigError("forget_s must be positive, step and step_s not negative")


@dataclass(frozen=True)
class Recalibration:
    """What is believed now, beside the profile.

    Attributes:
        node_factors: [N] how many times as slow as profiled each node is, for the whole model.
        frame_overhead_s: [H] seconds per frame beside its bytes and propagation.
        unit_factors: [N][n + 1] the same of each unit, and of what a stage takes to begin.
    """

    node_factors: tuple[float, ...]
    frame_overhead_s: tuple[float, ...]
    unit_factors: tuple[tuple[float, ...], ...]

    def of(self, profile: Profile) -> Profile:
        """The profile corrected: units and what a stage takes to begin, as both are measured."""
        hops = tuple(
            replace(hop, frame_overhead_s=overhead_s)
            for hop, overhead_s in zip(profile.hops, self.frame_overhead_s, strict=True)
        )
        nodes = tuple(
            replace(
                node.scaled(factors[-1]),
                unit_s=tuple(np.multiply(node.unit_s, factors[:-1]).tolist()),
            )
            for node, factors in zip(profile.nodes, self.unit_factors, strict=True)
        )
        return profile.with_changes(nodes=nodes, hops=hops)


class Recalibrator:
    """Corrects one running system's profile (batch 1).

    Args:
        profile: As it was taken.
        settings: How the estimates move.

    Attributes:
        believed: The corrections in force.
    """

    def __init__(self, profile: Profile, settings: RecalibrationSettings | None = None) -> None:
        self._profile, self.settings = profile, settings or RecalibrationSettings()
        self.believed = self._nothing = Recalibration(
            (1.0,) * profile.n_nodes,
            tuple(h.frame_overhead_s for h in profile.hops),
            ((1.0,) * (profile.spec.n_units + 1),) * profile.n_nodes,
        )
        kept = self.settings.window
        self._units = [UnitFactors(node, kept, self.settings.least) for node in profile.nodes]
        # (when it completed, value), per number of hops crossed.
        self._rests = [deque[tuple[float, float]](maxlen=kept) for _ in range(profile.n_nodes)]
        self._reply_bytes = float(profile.spec.cut_bytes[-1])
        self._expected: dict[tuple[int, ...], tuple[F64, int]] = {}

    def observe(self, done: Completed, state: SystemState) -> Profile | None:
        """Take what an interval completed.

        Args:
            done: Its requests; those lost say nothing.
            state: Measured at its end: round trips and bandwidths are taken from it.

        Returns:
            The corrected profile where that moved enough to matter, else None.
        """
        for r in np.flatnonzero(~done.lost):
            self._take(done, int(r), state)
        now_s = float(np.nanmax(done.completion_s, initial=-np.inf))
        for values in self._rests:
            while values and values[0][0] < now_s - self.settings.forget_s:
                values.popleft()
        for units in self._units:
            units.forget(now_s - self.settings.forget_s)
        found = self._found()
        if not self._matters(found):
            return None
        self.believed = found
        log.info(
            "profile recalibrated",
            extra={"nodes": found.node_factors, "hops_s": found.frame_overhead_s},
        )
        return found.of(self._profile)

    def _take(self, done: Completed, row: int, state: SystemState) -> None:
        cuts = tuple(map(int, done.cuts[row]))
        expected_s, crossed = self._work_of(cuts)
        bounds = (0, *cuts, self._profile.spec.n_units)
        at_s = float(done.completion_s[row])
        for k, work_s in enumerate(done.work_s[row]):
            if expected_s[k] > 0 and work_s > 0:
                self._units[k].add(at_s, bounds[k], bounds[k + 1], float(work_s / expected_s[k]))
        if not crossed:
            return
        rest_s = done.completion_s[row] - done.arrival_s[row] - done.wait_s[row]
        rest_s -= done.stage_s[row].sum() + done.transmit_s[row].sum()
        rest_s -= state.rtt_s[0, :crossed].sum()
        rest_s -= (self._reply_bytes / np.maximum(state.bytes_per_s[0, :crossed], 1.0)).sum()
        self._rests[crossed].append((at_s, float(rest_s)))

    def _work_of(self, cuts: tuple[int, ...]) -> tuple[F64, int]:
        """Profiled seconds of a plan's stages, [N], and the number of hops it crosses."""
        if cuts not in self._expected:
            table = PlanTable(self._profile, [Plan(cuts)])
            work_s = np.where(table.runs[0], table.work_s[0], 0.0)
            self._expected[cuts] = work_s, int(table.crossed[0].sum())
        return self._expected[cuts]

    def _found(self) -> Recalibration:
        factors = [units.factors() for units in self._units]
        whole = [np.array([*n.unit_s, n.stage_overhead_s]) for n in self._profile.nodes]
        return Recalibration(
            tuple(float(f @ s / s.sum()) for f, s in zip(factors, whole, strict=True)),
            self._frame_overheads_s(),
            tuple(tuple(f.tolist()) for f in factors),
        )

    def _frame_overheads_s(self) -> tuple[float, ...]:
        """Least squares over the medians; what they leave open stays as profiled.

        A request that crosses d hops crosses the first d, so each median is of a sum of d.
        """
        n_hops = len(self._nothing.frame_overhead_s)
        # The profile counts a little: it decides what no request does.
        matrix = PROFILE_WEIGHT * np.eye(n_hops)
        right = PROFILE_WEIGHT * np.array(self._nothing.frame_overhead_s)
        for crossed, rests in enumerate(self._rests):
            if len(rests) >= self.settings.least:
                matrix[:crossed, :crossed] += len(rests)
                right[:crossed] += len(rests) * np.median([v for _, v in rests])
        found, free = np.zeros(n_hops), np.ones(n_hops, dtype=bool)
        while free.any():  # not below 0: what would be is 0, and the others are found anew
            found[free] = np.linalg.solve(matrix[np.ix_(free, free)], right[free])
            if (found >= 0.0).all():
                break
            free &= found >= 0.0
            found[~free] = 0.0
        return tuple(found.tolist())

    def _matters(self, found: Recalibration) -> bool:
        now, settings = self.believed, self.settings
        moved = np.abs(np.log(np.divide(found.unit_factors, now.unit_factors)))
        moved_s = np.abs(np.subtract(found.frame_overhead_s, now.frame_overhead_s))
        return bool((moved > settings.step).any() or (moved_s > settings.step_s).any())
