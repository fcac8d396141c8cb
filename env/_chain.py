"""What the simulator needs to know of a chain: the work of a plan, rates, delays, bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._stations import Departures, Rates, Station
from env._transfer import transfer_costs
from env.conditions import IntervalConditions, mean_delay_s
from env.predict import CostModel
from env.scenario import MAX_ONE_WAY_DELAY_S
from executor.errors import ConfigError

__all__ = ["REPLY_RATE_FLOOR", "Chain", "Delays"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# An outage serves at this rate (bytes/s), not at 0: no division by zero, and no frame notices.
RATE_FLOOR = 1e-3
APART_S = 1e-9  # frames that a falling delay brings in together keep their order
REPLY_RATE_FLOOR = 1e3  # bytes/s: a reply in an outage is late by seconds, not for ever


class Delays:
    """The hops' one-way delays over an interval, where they change.

    What a hop carries arrives in the order it was sent, as over TCP: when the delay falls, frames
    wait for the one before. (On the testbed that holds for every piece of a frame; here a frame
    counts with its end.)

    Args:
        delay_s: [B, H, K] in each of K sub-steps.
        substep_s: Length of a sub-step.
        due_s: [B, H] when the newest frame of each hop arrives, after the interval's start; kept
            up to date.
    """

    def __init__(self, delay_s: F64, substep_s: float, due_s: F64) -> None:
        self._delay_s, self._substep_s, self._due_s = delay_s, substep_s, due_s
        self._last = delay_s.shape[2] - 1

    def at(self, hop: int, env: I64, time_s: F64) -> F64:
        """Delay of what leaves `env`'s hop at `time_s`; past the interval the last one holds."""
        k = np.minimum((time_s / self._substep_s).astype(np.int64), self._last)
        delay: F64 = self._delay_s[env, hop, k]
        return delay

    def arrive(self, hop: int, left: Departures) -> F64:
        """When each departure arrives behind the hop, in the same order."""
        env = left.env
        due = left.depart_s + self.at(hop, env, left.depart_s)
        if len(env) == 0:
            return due
        first = np.flatnonzero(np.r_[True, env[1:] != env[:-1]])
        before = self._due_s[:, hop]
        due[first] = np.maximum(due[first], before[env[first]] + APART_S)
        # A running maximum in a lane per environment.
        lane = env * (float(due.max()) + 1.0)
        lane -= APART_S * np.arange(len(env))
        in_order: F64 = np.maximum.accumulate(due + lane) - lane
        before[env] = in_order  # of repeated indices the last, newest, stays
        return in_order


class Chain:
    """N nodes and H hops; stations in the order node 0, hop 0, node 1, ...

    Attributes:
        n_nodes, n_hops, n_stations, n_units: Sizes.
        overhead_s: [H] of a frame, after its transmission.
        lag_s: [H] from the end of a transmission to the arrival behind the hop, on average.
        delay_varies: Whether the delay of any hop is a process; else the averages are exact.
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
        self._transfers = transfer_costs(profile)
        self._delay_s = np.array([mean_delay_s(h) for h in scenario.hops])
        self.delay_varies = any(h.delay is not None for h in scenario.hops)
        self.overhead_s = np.array([h.frame_overhead_s for h in profile.hops])
        self.lag_s: F64 = self._delay_s + self.overhead_s
        self.probe_limit_bytes = float(
            max(self._cut_bytes.max(), scenario.probing.paper_bytes, scenario.probing.payload_bytes)
        )
        self._max_in_flight = scenario.max_in_flight

    def stations(self, batch: int, timed: bool) -> list[Station]:
        """Empty stations; hops are always timed."""
        largest = np.empty(self.n_stations)
        largest[0::2] = self._prefix_s[:, -1] + self._overhead_s
        if self._transfers is not None:
            largest[0::2] += self._transfers.most_s
        largest[1::2] = self.probe_limit_bytes
        # Admission is approximate, so leave room for more than the bound; and for a probe.
        largest *= 3 * self._max_in_flight + 2
        lag = float(self.lag_s.max())
        if self.delay_varies:
            lag = MAX_ONE_WAY_DELAY_S + float(self.overhead_s.max())
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
        if self._transfers is not None:
            self._convert(works, cuts)
        return works

    def _convert(self, works: list[F64], cuts: I64) -> None:
        """Put what the hops' transfers make of sizes and seconds into `works`."""
        assert self._transfers is not None
        size = self._transfers.hop_bytes(cuts)
        seconds, visited = self._transfers.node_s(cuts)
        for k in range(self.n_nodes):
            work = np.where(works[2 * k] >= 0.0, works[2 * k], self._overhead_s[k])
            works[2 * k] = np.where(visited[:, k], work + seconds[:, k], -1.0)
            if k < self.n_hops:
                works[2 * k + 1] = np.where(cuts[:, k] < self.n_units, size[:, k], -1.0)

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

    def return_s(
        self, rates: list[Rates], delays: Delays | None, node: int, env: I64, depart_s: F64
    ) -> F64:
        """Seconds for an output that leaves `node` at `depart_s` to come back to the edge."""
        total = np.full(len(env), self._delay_s[:node].sum() if delays is None else 0.0)
        for h in range(node):
            if delays is not None:
                total += delays.at(h, env, depart_s)
            rate = np.maximum(rates[2 * h + 1].value_at(env, depart_s), REPLY_RATE_FLOOR)
            total += self._cut_bytes[-1] / rate
        return total
