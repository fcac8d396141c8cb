"""The same conditions for every cadence: drawn on a fine grid of time, handed out by interval.

What `env.conditions.Conditions` draws depends on the interval, arrivals above all. To compare how
often a controller decides, everything is drawn in steps of `GRID_S` and joined to intervals of the
length wanted: bandwidth, load, delay and every single arrival are then the same whatever that is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from env.conditions import Conditions, IntervalConditions
from env.scenario import Scenario
from executor.errors import ConfigError

__all__ = ["GRID_S", "GridConditions"]

F64 = NDArray[np.float64]

GRID_S = 0.05


class GridConditions:
    """A source of conditions (`env.conditions.ConditionsSource`) of a scenario's intervals.

    Args:
        scenario: Its interval must be a whole number of grid steps.
        rate_rps: [B] mean arrival rates.
        seed: Everything drawn depends on this alone.

    Raises:
        ConfigError: The interval does not fit the grid.
    """

    def __init__(self, scenario: Scenario, rate_rps: F64, seed: int) -> None:
        self._steps = round(scenario.interval_s / GRID_S)
        if self._steps < 1 or abs(self._steps * GRID_S - scenario.interval_s) > 1e-9:
            raise ConfigError(
                f"an interval must be a multiple of {GRID_S:g} s, got {scenario.interval_s:g} s"
            )
        drawn = scenario.replace(interval_s=GRID_S, substep_s=GRID_S)
        self._source = Conditions(drawn, rate_rps, seed)
        self.rate_rps, self.substep_s = self._source.rate_rps, GRID_S

    def reset(self, seed: int) -> None:
        """Start again, with the conditions that `seed` names."""
        self._source.reset(seed)

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        steps = [self._source.next() for _ in range(self._steps)]
        env = np.concatenate([step.arrival_env for step in steps])
        offset = np.concatenate([k * GRID_S + s.arrival_offset_s for k, s in enumerate(steps)])
        order = np.argsort(env, kind="stable")
        return replace(
            IntervalConditions.joined(steps),
            arrival_env=env[order],
            arrival_offset_s=offset[order],
            arrival_count=np.sum([step.arrival_count for step in steps], axis=0),
        )
