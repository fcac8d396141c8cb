"""Crowds: groups of edges that share the fog, the cloud and the hop between them.

Each edge is one environment of the simulator, with its own node, its own first hop and its own
arrivals; what lies behind the first hop exists once per group. Its queues hold the requests of all
the group's edges, in the order they came, and every edge sees them. What was measured from one
edge's frames on a shared hop is known to all, as the nodes' STATUS tells all.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from env._bandwidth import Measured
from env._stations import Departures, Rates, RequestStore, Station, sums
from env.conditions import ConditionsSource, IntervalConditions
from env.cost import IntervalRecord
from env.predict import CostModel
from env.simulator import Simulator, Snapshot, StepResult
from env.state import SystemState
from executor.errors import ConfigError

__all__ = ["CrowdConditions", "SharingSimulator"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Flow = list[tuple[I64, F64]]

FIRST_STATION = 2  # the fog; before it the edge and its hop
FIRST_HOP = FIRST_NODE = 1


class CrowdConditions:
    """Conditions in which the edges of a group meet one fog, one cloud, one hop between them.

    Args:
        source: Conditions of all edges; a group takes the shared ones of its first edge.
        edges: Edges per group; divides the number of environments.

    Raises:
        ConfigError: It does not.
    """

    def __init__(self, source: ConditionsSource, edges: int) -> None:
        self._source, self._first = source, _first_of_group(len(source.rate_rps), edges)
        self.rate_rps, self.substep_s = source.rate_rps, source.substep_s

    def reset(self, seed: int) -> None:
        """Start again, with the conditions that `seed` names."""
        self._source.reset(seed)
        self.rate_rps = self._source.rate_rps

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        drawn = self._source.next()
        return replace(
            drawn,
            hop_bytes_per_s=self._shared(drawn.hop_bytes_per_s, FIRST_HOP),
            node_speed=self._shared(drawn.node_speed, FIRST_NODE),
            hop_delay_s=self._shared(drawn.hop_delay_s, FIRST_HOP),
        )

    def _shared(self, values: F64, first: int) -> F64:
        return np.concatenate([values[:, :first], values[self._first, first:]], axis=1)


class _Seen:
    """The requests as a shared station sees them: all of a group belong to its first edge."""

    def __init__(self, store: RequestStore, first: I64) -> None:
        self.env, self.work = first.take(store.env[: store.live]), store.work


class _SharedStation(Station):
    """A station that exists once per group of edges; its queue is kept at the group's first edge.

    Args:
        one: A station of every edge's own.
        first: [B] the first edge of each one's group.
        edges: Edges per group.

    Attributes:
        own_share: [B] each edge's share of the work that departed in the last interval; equal parts
            where none did.
    """

    def __init__(self, one: Station, first: I64, edges: int) -> None:
        super().__init__(one.index, one.batch, one._work_bound * edges, 0.0, one._timed)
        self._lag_bound_s = one._lag_bound_s
        self._first, self._edges = first, edges

    def clear(self) -> None:
        """Forget every request."""
        super().clear()
        self.own_share: F64 = np.zeros(self.batch)

    def serve(self, store: RequestStore, coming: Flow, rates: Rates, dt_s: float) -> Departures:
        """As of any station. Every edge sees the backlog; time and work are shared out evenly.

        Of the departures, `env` and the sums of what departed are the first edge's.
        """
        seen = cast(RequestStore, _Seen(store, self._first))
        left = super().serve(seen, coming, rates, dt_s)
        own = sums(store.env.take(left.slot), left.work, self.batch)
        everyone = left.departed_work.take(self._first)
        part = np.full(self.batch, 1.0 / self._edges)
        self.own_share = np.divide(own, everyone, out=part, where=everyone > 0)
        left.backlog = left.backlog.take(self._first)
        left.spent = left.spent.take(self._first) / self._edges
        left.busy_s = left.busy_s.take(self._first) / self._edges
        return left


class SharingSimulator(Simulator):
    """G groups of E edges each; environments g E .. (g + 1) E - 1 are the edges of group g.

    Exact as `Simulator` is, with these readings: a shared station serves in the order of arrival
    whoever sent it; the fog's and the cloud's time and energy are charged to the group's edges in
    equal parts (so sums over a group are exact); of the probes asked of a shared hop at one moment
    one is sent, the largest; each edge bounds what is in flight of its own, and the shared queues
    have no other bound.

    Args:
        model: Profile, scenario, references, candidate plans of one edge's chain.
        edges: Edges per group E.
        conditions: Of all G E edges; it is made common to groups here.
        record_requests: As `Simulator`.

    Attributes:
        others_busy: [B, S] share of the last seconds in which each station (node 0, hop 0, node 1,
            ...) served other edges' requests; smoothed as arrivals are.

    Raises:
        ConfigError: Late binding, whose fog looks at one edge alone; or no whole groups.
    """

    def __init__(
        self,
        model: CostModel,
        edges: int,
        conditions: ConditionsSource,
        *,
        record_requests: bool = False,
    ) -> None:
        if model.scenario.late_binding:
            raise ConfigError("late binding is not simulated for edges that share a fog")
        batch = len(conditions.rate_rps)
        self.edges, self._first = edges, _first_of_group(batch, edges)
        super().__init__(
            model,
            batch,
            0,
            record_requests=record_requests,
            conditions=CrowdConditions(conditions, edges),
        )
        self._stations = [
            station if s < FIRST_STATION else _SharedStation(station, self._first, edges)
            for s, station in enumerate(self._stations)
        ]

    def step(self, cuts: I64, probe_bytes: F64 | None = None) -> StepResult:
        """As `Simulator.step`; `cuts` and `probe_bytes` have a row per edge."""
        if probe_bytes is not None:
            probe_bytes = np.array(probe_bytes, dtype=np.float64)
            shared = probe_bytes[:, FIRST_HOP:]
            most = self._grouped(shared).max(axis=1)
            shared[:] = 0.0
            shared[:: self.edges] = most
        result = super().step(cuts, probe_bytes)
        busy_s = np.empty_like(self.others_busy)
        busy_s[:, 0::2], busy_s[:, 1::2] = result.record.node_busy_s, result.record.hop_transmit_s
        for s, station in enumerate(self._stations):
            own = station.own_share if isinstance(station, _SharedStation) else 1.0
            now = busy_s[:, s] * self.edges / self._dt_s * (1.0 - own)
            self.others_busy[:, s] += self._smoothing * (now - self.others_busy[:, s])
        return result

    def reset(self, seed: int | None = None) -> SystemState:
        """As `Simulator.reset`."""
        self.others_busy = np.zeros((self.batch, self._chain.n_stations))
        return super().reset(seed)

    def restore(
        self, snapshot: Snapshot, index: I64, conditions: ConditionsSource | None = None
    ) -> SystemState:
        """Not for crowds.

        Raises:
            ConfigError: Always: an edge cannot be taken out of its group.
        """
        raise ConfigError("edges that share a fog cannot be restored from a snapshot")

    def _observe(self, conditions: IntervalConditions, cuts: I64, record: IntervalRecord) -> None:
        for hop in range(FIRST_HOP, len(self._measured)):
            self._measured[hop] = self._common(self._measured[hop])
        super()._observe(conditions, cuts, record)

    def _common(self, measured: Measured) -> Measured:
        """What a shared hop's frames measured, told to all edges of the group."""
        told = {}
        for f in fields(Measured):
            values = self._grouped(getattr(measured, f.name))
            summed = f.name in ("size_bytes", "service_s")
            told[f.name] = np.repeat(values.sum(1) if summed else values.min(1), self.edges)
        return Measured(**told)

    def _grouped(self, values: F64) -> F64:
        """Rows [B, ...] by group, [G, E, ...]."""
        return values.reshape(-1, self.edges, *values.shape[1:])


def _first_of_group(batch: int, edges: int) -> I64:
    """[B] the first environment of each one's group."""
    if edges < 1 or batch % edges:
        raise ConfigError(f"{batch} environments do not divide into groups of {edges} edges")
    return np.arange(batch) // edges * edges
