"""A simulator that tells the coming interval's conditions: what is it worth to know them?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from env.conditions import ConditionsSource
from env.simulator import Simulator, Snapshot, StepResult
from env.state import SystemState
from executor.errors import ConfigError

__all__ = ["Foretold"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Foretold(Simulator):
    """As `Simulator`, but the state gives means of the interval to come, not what was measured.

    Bandwidth, load and arrivals of one interval, no more: a controller that sees them has no
    staleness left, and still does not know how long they will last. For studies; nothing that is
    deployed sees this.
    """

    def reset(self, seed: int | None = None) -> SystemState:
        """As `Simulator.reset`."""
        return self._told(super().reset(seed))

    def step(self, cuts: I64, probe_bytes: F64 | None = None) -> StepResult:
        """As `Simulator.step`."""
        result = super().step(cuts, probe_bytes)
        return replace(result, state=self._told(result.state))

    def restore(
        self, snapshot: Snapshot, index: I64, conditions: ConditionsSource | None = None
    ) -> SystemState:
        """As `Simulator.restore`."""
        return self._told(super().restore(snapshot, index, conditions))

    def _told(self, state: SystemState) -> SystemState:
        if self._coming is None:
            try:
                self._coming = self._conditions.next()
            except ConfigError:  # the end of a tape
                return state
        coming = self._coming
        return replace(
            state,
            bytes_per_s=np.maximum(coming.hop_bytes_per_s.mean(axis=2), 1.0),
            bandwidth_age_s=np.zeros_like(state.bandwidth_age_s),
            node_load=1.0 - coming.node_speed.mean(axis=2),
            arrival_rps=coming.arrival_count / self._dt_s,
        )
