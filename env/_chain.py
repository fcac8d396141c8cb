"""What the simulator needs to know of a chain: the work of a plan, rates, delays, bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._stations import Rates, Station
from env.conditions import IntervalConditions, process_mean
from env.predict import CostModel
from executor.errors import ConfigError

__all__ = ["REPLY_RATE_FLOOR", "Chain"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# An outage serves at this rate (bytes/s), not at 0: no division by zero, and no frame notices.
RATE_FLOOR = 1e-3
REPLY_RATE_FLOOR = 1e3  # bytes/s: a reply in an outage is late by seconds, not for ever


class Chain:
    """N nodes and H hops; stations in the order node 0, hop 0, node 1, ...

    Attributes:
        n_nodes, n_hops, n_stations, n_units: Sizes.
        lag_s: [H] from the end of a transmission to the arrival behind the hop.
        rtt_s: [H] round-trip time of an empty frame.
        mean_load: [N] long-run means of the nodes' loads.
        profile_rate: [H] bytes/s when the profile was taken.
        probe_limit_bytes: Largest probe.
    """

    def __init__(self, model: CostModel) -> None:
        profile, scenario = model.profile, model.scenario
        self.n_nodes, self.n_hops = profile.n_nodes, len(profile.hops)
        self.n_stations = self.n_nodes + self.n_hops
        self.n_units = profile.spec.n_units
        self._prefix_s = profile.work_prefix_s()
        self._overhead_s = np.array([n.stage_overhead_s for n in profile.nodes])
        self._cut_bytes = profile.cut_bytes()
        self._delay_s = np.array([h.one_way_delay_s for h in scenario.hops])
        self.lag_s: F64 = self._delay_s + np.array([h.frame_overhead_s for h in profile.hops])
        self.rtt_s: F64 = 2.0 * self._delay_s
        self.mean_load = np.array([process_mean(n.load) for n in scenario.nodes])
        self.profile_rate = np.array([h.bytes_per_s for h in profile.hops])
        self.probe_limit_bytes = float(
            max(self._cut_bytes.max(), scenario.probing.paper_bytes, scenario.probing.payload_bytes)
        )
        self._max_in_flight = scenario.max_in_flight

    def stations(self, batch: int, timed: bool) -> list[Station]:
        """Empty stations; hops are always timed."""
        largest = np.empty(self.n_stations)
        largest[0::2] = self._prefix_s[:, -1] + self._overhead_s
        largest[1::2] = self.probe_limit_bytes
        # Admission is approximate, so leave room for more than the bound; and for a probe.
        largest *= 3 * self._max_in_flight + 2
        lag = float(self.lag_s.max())
        return [
            Station(s, batch, float(bound), lag, timed or s % 2 == 1)
            for s, bound in enumerate(largest)
        ]

    def checked(self, cuts: I64, batch: int) -> I64:
        """A copy of `cuts` as int64 [B, H].

        Raises:
            ConfigError: They are no plans, or not one per environment.
        """
        cuts = np.array(cuts, dtype=np.int64)
        if cuts.shape != (batch, self.n_hops):
            raise ConfigError(f"cuts must have shape {(batch, self.n_hops)}, got {cuts.shape}")
        falls = self.n_hops > 1 and np.any(cuts[:, 1:] < cuts[:, :-1])
        if falls or cuts[:, 0].min() < 0 or cuts[:, -1].max() > self.n_units:
            raise ConfigError(f"cuts must lie in 0..{self.n_units} and not decrease along a row")
        return cuts

    def work_of(self, cuts: I64) -> list[F64]:
        """Work of each environment's plan at each station, S x [B]; -1 where it is not visited."""
        n = self.n_units
        works: list[F64] = []
        before: I64 | int = 0
        for k in range(self.n_nodes):
            after = cuts[:, k] if k < self.n_hops else n
            seconds = self._prefix_s[k].take(after) - self._prefix_s[k].take(before)
            works.append(np.where(np.greater(after, before), seconds + self._overhead_s[k], -1.0))
            if k < self.n_hops:
                works.append(np.where(cuts[:, k] < n, self._cut_bytes.take(cuts[:, k]), -1.0))
                before = cuts[:, k]
        return works

    def rates(
        self, conditions: IntervalConditions, substep_s: float, last_s: float | None = None
    ) -> list[Rates]:
        """What each station does per second; the last sub-step lasts `last_s` if that is given."""
        rates = []
        for k in range(self.n_nodes):
            rates.append(Rates(conditions.node_speed[:, k], substep_s, last_s))
            if k < self.n_hops:
                hop = np.maximum(conditions.hop_bytes_per_s[:, k], RATE_FLOOR)
                rates.append(Rates(hop, substep_s, last_s))
        return rates

    def return_s(self, rates: list[Rates], node: int, env: I64, depart_s: F64) -> F64:
        """Seconds for an output that leaves `node` at `depart_s` to come back to the edge."""
        total = np.full(len(env), self._delay_s[:node].sum())
        for h in range(node):
            rate = np.maximum(rates[2 * h + 1].value_at(env, depart_s), REPLY_RATE_FLOOR)
            total += self._cut_bytes[-1] / rate
        return total
