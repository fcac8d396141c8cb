"""Conditions that change at a set pace: what does adapting cost where they change faster?

Bandwidth and load are drawn anew every so many seconds from what the scenario's processes give in
the long run, and held in between. So another pace changes how fast conditions move, and nothing
else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from env.conditions import BYTES_PER_S_PER_MBPS, MAX_LOAD, Conditions, IntervalConditions
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from executor.errors import ConfigError

__all__ = ["Changing"]

F64 = NDArray[np.float64]
SUBSTEP_S = 0.2  # at most so long: changes fall inside intervals


class Changing:
    """A `ConditionsSource` whose hops and nodes change every `period_s`, all at the same moments.

    Each environment begins somewhere in a period. Arrivals and delays are the scenario's.

    Args:
        scenario: Its processes' levels, noise and outages are drawn from; none may be a trace.
        rate_rps: [B] mean arrival rates.
        seed: Everything drawn depends on this alone.
        period_s: Seconds between changes, rounded to whole sub-steps of at most 0.2 s.

    Raises:
        ConfigError: The period is not positive, or a process plays a trace.
    """

    def __init__(self, scenario: Scenario, rate_rps: F64, seed: int, period_s: float) -> None:
        if not 0 < period_s < float("inf"):
            raise ConfigError(f"conditions change every so many seconds, above 0; got {period_s}")
        self._processes = [h.bandwidth for h in scenario.hops] + [n.load for n in scenario.nodes]
        if any(p.kind == "trace" for p in self._processes):
            raise ConfigError("conditions that change at a set pace cannot come from traces")
        self._n_hops = len(scenario.hops)
        substeps = int(np.ceil(scenario.interval_s / min(period_s, SUBSTEP_S) - 1e-9))
        still = scenario.replace(
            hops=tuple(HopSetup(Process(), h.one_way_delay_s) for h in scenario.hops),
            nodes=tuple(NodeSetup(n.name, n.device, n.ratio) for n in scenario.nodes),
            substep_s=scenario.interval_s / substeps,
        )
        self._arrivals = Conditions(still, rate_rps, seed)
        self.rate_rps, self.substep_s = self._arrivals.rate_rps, self._arrivals.substep_s
        self._substeps = self._arrivals.substeps
        self._hold = max(1, round(period_s / self.substep_s))
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start again, with the conditions that `seed` names."""
        self._arrivals.reset(seed)
        self._rng = np.random.default_rng([seed, 3])
        batch = len(self.rate_rps)
        self._left = self._rng.integers(1, self._hold + 1, size=batch)
        self._values = self._drawn(batch)

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        batch, h = len(self.rate_rps), self._n_hops
        steps = np.empty((batch, len(self._processes), self._substeps))
        for k in range(self._substeps):
            over = self._left == 0
            if over.any():
                self._values[over] = self._drawn(int(over.sum()))
                self._left[over] = self._hold
            self._left -= 1
            steps[:, :, k] = self._values
        return replace(
            self._arrivals.next(),
            hop_bytes_per_s=steps[:, :h] * BYTES_PER_S_PER_MBPS,
            node_speed=1.0 - np.minimum(steps[:, h:], MAX_LOAD),
        )

    def _drawn(self, count: int) -> F64:
        """Independent draws of every process, [count, processes]."""
        return np.stack([self._draw(p, count) for p in self._processes], axis=1)

    def _draw(self, process: Process, count: int) -> F64:
        value = self._rng.choice(np.array(process.levels), size=count)
        if process.kind == "constant":
            return np.full(count, process.levels[0])
        noise = process.sigma * self._rng.standard_normal(count)
        if process.log:
            value = value * np.exp(noise - 0.5 * process.sigma**2)
        else:
            value = value + noise
        out = process.outage_per_s * process.outage_s
        outage = self._rng.random(count) < out / (1.0 + out)
        value = np.where(outage, process.outage_value, value)
        clipped: F64 = np.clip(value, process.minimum, process.maximum)
        return clipped
