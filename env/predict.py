"""The closed-form prediction of what each candidate plan would cost: the queue-aware solver.

It is the solver's score, the prior of the learned policy and the expectation the guard compares
with. Queues are treated as a fluid over a short horizon, plus the stochastic wait at the plan's
slowest station.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from env._transfer import transfer_costs
from env.conditions import BYTES_PER_S_PER_MBPS, process_mean, typical_mbps
from env.cost import References
from env.scenario import Scenario
from executor.errors import ConfigError
from executor.plan import Plan, candidate_plans, constrained_plans, plan_mask
from executor.profile import Profile
from executor.recovery import MOST_PATIENCE_S, SILENT_AFTER_S

if TYPE_CHECKING:
    from env.state import SystemState

__all__ = ["CostModel", "PlanTable", "Prediction", "station_seconds", "usual_conditions"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
MAX_UTILISATION = np.float32(0.95)
CACHED_NUMBERS = 32768
LEAST_INTERVAL_S = 1.0


def station_seconds(
    node_load: F64, bytes_per_s: F64, node_backlog_s: F64, hop_backlog_bytes: F64
) -> tuple[F32, F32]:
    """Seconds that a unit of demand takes at each station, and those until its queue is empty.

    Both [S, B, 1]; stations in the order of `CostModel.demand`, the rest as in `SystemState`.
    """
    n_stations = node_load.shape[1] + bytes_per_s.shape[1]
    unit_s = np.empty((n_stations, len(node_load), 1), dtype=np.float32)
    unit_s[0::2, :, 0] = (1.0 / (1.0 - node_load)).T
    unit_s[1::2, :, 0] = (1.0 / bytes_per_s).T
    backlog_s = np.empty_like(unit_s)
    backlog_s[0::2, :, 0] = node_backlog_s.T
    backlog_s[1::2, :, 0] = hop_backlog_bytes.T
    backlog_s *= unit_s
    return unit_s, backlog_s


def usual_conditions(scenario: Scenario) -> tuple[F64, F64]:
    """Nodes' speeds (1 - load) [N] and hops' bytes/s [H] that a capacity is reckoned with."""
    speed = np.array([1.0 - process_mean(n.load, "load") for n in scenario.nodes])
    mbps = np.array([typical_mbps(h.bandwidth) for h in scenario.hops])
    return speed, mbps * BYTES_PER_S_PER_MBPS


class PlanTable:
    """What each of A plans asks of each station.

    Attributes:
        cuts: [A, H].
        work_s: [A, N] unloaded compute seconds (stage overhead and conversions included).
        convert_s: [A, N] what of that converts activations for the hops (`env._transfer`).
        runs: [A, N] whether it has units there.
        hop_bytes: [A, H], 0 where the hop is not crossed.
        crossed: [A, H] 1.0 where the hop is crossed.
    """

    def __init__(self, profile: Profile, plans: Sequence[Plan]) -> None:
        n, n_nodes = profile.spec.n_units, profile.n_nodes
        prefix, sizes = profile.work_prefix_s(), profile.cut_bytes()
        self.cuts = np.array([p.cuts for p in plans], dtype=np.int64)
        bounds = np.concatenate(
            [np.zeros((len(plans), 1), int), self.cuts, np.full((len(plans), 1), n)], axis=1
        )
        node = np.arange(n_nodes)
        work = prefix[node, bounds[:, 1:]] - prefix[node, bounds[:, :-1]]
        overhead = np.array([x.stage_overhead_s for x in profile.nodes])
        self.runs: Mask = bounds[:, 1:] > bounds[:, :-1]
        self.crossed: F64 = (self.cuts < n).astype(np.float64)
        self.convert_s: F64 = np.zeros_like(work)
        transfers = transfer_costs(profile)
        if transfers is None:
            self.work_s: F64 = work + overhead * self.runs
            self.hop_bytes: F64 = sizes[self.cuts] * self.crossed
        else:
            self.convert_s, visited = transfers.node_s(self.cuts)
            self.work_s = work + self.convert_s + overhead * visited
            self.hop_bytes = transfers.hop_bytes(self.cuts) * self.crossed


@dataclass(frozen=True)
class Prediction:
    """Per request and candidate plan, shape [B, A] each: cost, and latency in seconds."""

    cost: F32
    latency_s: F32


class CostModel:
    """Predicts the cost per request of every candidate plan from a measured state.

    Args:
        profile: The measured costs.
        scenario: Weights, interval, bounds, the constrained rule.
        references: Units of the cost; from `profile` when None.
        horizon_intervals: How far ahead queues are looked at, in intervals (of a second at least:
            who decides more often pays for a queue all the same).
        direct: The nodes' direct links, from node -> to node (`executor.plan.find_route`).

    Attributes:
        demand: [S, 1, A] what each plan asks of each station (node 0, hop 0, node 1, ...: as
            requests meet them): unloaded seconds, or bytes.
        used: [S, 1, A] 1.0 where it asks anything.
        active_cost: [A] cost of the energy it takes to compute a request.
        ahead_s: An interval, or a second where that is shorter: the step of whoever looks ahead.
        capacity_rps: What the best static plan can serve under the scenario's usual conditions.
        patience_s: [H] for how long a silent hop is waited for (`executor.recovery`).
    """

    def __init__(
        self,
        profile: Profile,
        scenario: Scenario,
        references: References | None = None,
        horizon_intervals: float = 1.5,
        direct: Mapping[int, int] | None = None,
    ) -> None:
        if profile.n_nodes != scenario.n_nodes:
            raise ConfigError(
                f"the profile has {profile.n_nodes} nodes and the scenario {scenario.n_nodes}; "
                "expected the same"
            )
        self.profile = profile
        self.scenario = scenario
        self.references = references or References.of(profile, scenario)
        plans = constrained_plans if scenario.constrained else candidate_plans
        self.plans = plans(profile.spec, profile.n_nodes)
        self.table = PlanTable(profile, self.plans)
        self._direct = dict(direct or {})
        self._usable: dict[bytes, Mask] = {}
        self.ahead_s = max(scenario.interval_s, LEAST_INTERVAL_S)
        self.horizon_s = horizon_intervals * self.ahead_s
        self._lay_out(profile)

    def recalibrate(self, profile: Profile) -> None:
        """Predict with a corrected profile from now on; plans and references stay.

        In place, so that all who decide with this model follow: solver, encoder, guard.

        Raises:
            ConfigError: The profile is of another model or number of nodes.
        """
        if profile.shape_digest() != self.profile.shape_digest():
            raise ConfigError(
                f"a correction of the profile of {self.profile.spec.name} on "
                f"{self.profile.n_nodes} nodes must keep its shape; got one of "
                f"{profile.spec.name} on {profile.n_nodes}"
            )
        self.profile, self.table = profile, PlanTable(profile, self.plans)
        self._lay_out(profile)

    def _lay_out(self, profile: Profile) -> None:
        """Constants per plan and station (node 0, hop 0, node 1, ...: as requests meet them)."""
        table, n_plans = self.table, len(self.plans)
        n_stations = profile.n_nodes + len(profile.hops)
        demand, fixed = np.zeros((2, n_stations, 1, n_plans), dtype=np.float32)
        demand[0::2, 0] = table.work_s.T
        demand[1::2, 0] = table.hop_bytes.T
        frame_s = np.array([h.frame_overhead_s for h in profile.hops])
        fixed[1::2, 0] = frame_s[:, None] * table.crossed.T
        # A floor of 1 ns keeps every division below finite where a station is not used.
        self.demand, self._fixed = demand, np.maximum(fixed, np.float32(1e-9))
        self.used = (demand > 0).astype(np.float32)
        self._crossed = np.ascontiguousarray(table.crossed.T, dtype=np.float32)
        self._reply_bytes = np.float32(profile.spec.cut_bytes[-1])
        powers = [n.power for n in profile.nodes]
        w, ref = self.scenario.weights, self.references
        edge = (w.edge_energy + w.total_energy) / ref.edge_j  # cost of a joule on the edge
        other = w.total_energy / ref.edge_j  # and elsewhere
        joule = np.array([edge] + [other] * (profile.n_nodes - 1))
        watts = joule * [p.compute_w for p in powers]
        self.active_cost = (table.work_s @ watts).astype(np.float32)
        radio = np.array([c * p.transmit_w for c, p in zip(joule, powers[:-1], strict=False)])
        self._transmit_cost = (radio[:, None] * demand[1::2, 0]).astype(np.float32)
        self._fixed_cost = self.active_cost + (radio @ self._fixed[1::2, 0]).astype(np.float32)
        self._idle_cost = np.float32(edge * powers[0].idle_w)
        self._latency_cost = np.float32(w.latency / ref.latency_s)
        self._lost_cost = np.float32(ref.lost_cost)
        # Batches are worked in pieces whose arrays stay in the processor's cache.
        self._piece = max(1, CACHED_NUMBERS // (n_stations * n_plans))
        speed, bytes_per_s = usual_conditions(self.scenario)
        self.capacity_rps = float(self.capacity_at(speed[None], bytes_per_s[None])[0])
        self.patience_s = self._patience_s(1.0 - speed, bytes_per_s)

    def _patience_s(self, node_load: F64, bytes_per_s: F64) -> F64:
        """Seconds of latency that cost what the way around each hop costs more, [H].

        The best plan in front of the hop against the best of all, both alone and under usual
        conditions. Who waits so long and goes around it then pays at most twice what would have
        been best, whenever the hop comes back (the ski rental problem).
        """
        n_hops = len(bytes_per_s)
        if self._direct:
            return np.full(n_hops, SILENT_AFTER_S)  # there is another way
        rtt_s = np.array([h.rtt_s for h in self.profile.hops])
        none = (np.zeros(n_hops + 1), np.zeros(n_hops), rtt_s, np.zeros(1), np.zeros(1))
        cost, _ = self._predict(*(x[None] for x in (node_load, bytes_per_s, *none)))
        short = np.where(self.table.crossed.T > 0, np.inf, cost).min(axis=1)
        patience_s = (short - cost.min()) / float(self._latency_cost)
        clipped: F64 = np.clip(patience_s.astype(np.float64), SILENT_AFTER_S, MOST_PATIENCE_S)
        return clipped

    def capacity_at(self, speed: F64, bytes_per_s: F64) -> F64:
        """Capacity of the best static plan, requests/s, [B], at constant conditions.

        Args:
            speed: [B, N] 1 - load.
            bytes_per_s: [B, H] bandwidth.
        """
        seconds = np.empty((len(speed), len(self.plans), len(self.demand)))
        seconds[:, :, 0::2] = self.table.work_s / speed[:, None]
        seconds[:, :, 1::2] = self.table.hop_bytes / bytes_per_s[:, None]
        capacity: F64 = 1.0 / seconds.max(axis=2).min(axis=1)
        return capacity

    def rate_rps(self) -> float:
        """The scenario's mean arrival rate, requests/s."""
        return self.scenario.rate_rps or self.scenario.capacity_fraction * self.capacity_rps

    def usable(self, state: SystemState) -> Mask | None:
        """Which plans can be served with the nodes that are up, [B, A]; None: all, everywhere.

        The one mask of every controller; the rule is `executor.plan.plan_mask`. Where no plan is
        left (the first node is down) all count as usable: none is better than another.
        """
        if state.node_up.all():
            return None
        return np.array([self._usable_row(row) for row in state.node_up])

    def _usable_row(self, node_up: Mask) -> Mask:
        key = node_up.tobytes()
        if key not in self._usable:
            down = np.flatnonzero(~node_up).tolist()
            mask = plan_mask(self.plans, self.profile.spec, down=down, direct=self._direct)
            self._usable[key] = np.array(mask if any(mask) else [True] * len(mask))
        return self._usable[key]

    def predict(self, state: SystemState) -> Prediction:
        """Predict each candidate's cost per request over the coming horizon.

        Stations hold a backlog W0 (s); under arrivals at rate x service = rho the backlog moves as
        max(0, W0 + (rho - 1) t), and its mean over the horizon is the wait there. The slowest
        station adds the M/D/1 wait rho S / (2 (1 - rho)), bounded by what can build up. What would
        overflow the in-flight bound counts as lost.
        """
        columns = (state.node_load, state.bytes_per_s, state.node_backlog_s,
                   state.hop_backlog_bytes, state.rtt_s, state.arrival_rps[:, None],
                   state.in_flight[:, None])  # fmt: skip
        if state.batch <= self._piece:
            return Prediction(*self._predict(*columns))
        pieces = [
            self._predict(*(c[i : i + self._piece] for c in columns))
            for i in range(0, state.batch, self._piece)
        ]
        return Prediction(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    def _predict(
        self,
        node_load: F64,
        bytes_per_s: F64,
        node_backlog_s: F64,
        hop_backlog_bytes: F64,
        rtt_s: F64,
        arrival_rps: F64,
        in_flight: F64,
    ) -> tuple[F32, F32]:
        """Cost and latency, [b, A], of one piece of a batch."""
        horizon = np.float32(self.horizon_s)
        rate = np.maximum(bytes_per_s, 1.0)
        unit_s, backlog_s = station_seconds(node_load, rate, node_backlog_s, hop_backlog_bytes)
        arrival = np.maximum(arrival_rps, 1e-3).astype(np.float32)

        service_s = self.demand * unit_s  # [S, b, A]
        service_s += self._fixed
        # What a station and those before it let through (numpy's accumulate is not vectorised).
        through = service_s.copy()
        for before, after in pairwise(through):
            np.maximum(before, after, out=after)
        np.reciprocal(through, out=through)
        most_rps = through[-1]
        # A station behind a saturated one sees no more than that one lets through.
        drift = service_s.copy()
        drift[0] *= arrival
        drift[1:] *= np.minimum(through[:-1], arrival)
        drift -= 1.0
        end_s = drift * horizon
        end_s += backlog_s
        emptied = (backlog_s * backlog_s * (-0.5 / horizon)) / np.minimum(drift, -1e-6)
        wait_s = np.where(end_s > 0.0, 0.5 * (end_s + backlog_s), emptied)
        wait_s *= self.used
        wait_s += service_s

        busy = np.minimum(arrival / most_rps, MAX_UTILISATION)
        latency_s = wait_s.sum(axis=0)
        # A queue that starts empty cannot reach the stationary wait at once: reflected Brownian
        # motion's mean over the horizon bounds it, 2/3 sqrt(2 / pi) sqrt(rate x horizon) services.
        stationary_s = busy / (most_rps * (2.0 - 2.0 * busy))
        latency_s += np.minimum(stationary_s, 0.53 * np.sqrt(arrival * horizon) / most_rps)
        back_s = (rtt_s + self._reply_bytes / rate).astype(np.float32)
        latency_s += back_s @ self._crossed
        cost = unit_s[1::2, :, 0].T @ self._transmit_cost  # of the bytes, and then of what is fixed
        cost += self._fixed_cost
        cost += latency_s * self._latency_cost
        union_s = -np.expm1(latency_s * -arrival) / arrival
        cost += union_s * self._idle_cost
        room = (in_flight - self.scenario.max_in_flight).astype(np.float32)
        overflow = np.maximum(arrival - most_rps, 0.0) * horizon + room
        lost = np.clip(overflow / (arrival * horizon), 0.0, 1.0)
        cost += lost * self._lost_cost
        return cost, latency_s
