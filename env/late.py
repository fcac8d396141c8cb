"""The rule of late binding: for a plan, at which backlogs of its hop the fog had better cut else.

The controller fixes (i, j) once per interval. When a request's turn on the fog comes, the second
hop holds some backlog W seconds that the controller could not know; the cost of ending the fog's
stage at cut c is then a straight line in W,

    price x (own seconds on fog, hop and cloud + crossed x W) + joules + followers(W)

where followers are the seconds that a request adds to those behind it: a service of s seconds in
front of a queue of W seconds delays the lambda (W + s / 2) / (1 - lambda s) requests of a busy
period by s each. The lower envelope of these lines over c >= i is the table (`executor.late`).

The plan itself is taken as right for the backlog that its controller saw: where this closed form
would rather have had another cut at that backlog, the other line is raised to a little above the
plan's. So a table moves a cut because the backlog has moved, and never merely out of disagreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from env._transfer import transfer_costs
from env.predict import CostModel
from executor.errors import ConfigError
from executor.late import CutTable

if TYPE_CHECKING:
    from env.state import SystemState

__all__ = ["ROWS", "LateRule", "LateTables"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

ROWS = 4
MAX_UTILISATION = 0.9
MARGIN = 0.02  # share of its cost by which another cut must be better than the plan's
APART_S = 1e-6  # limits that lie closer are one


@dataclass(frozen=True)
class LateTables:
    """A table per environment: the first row whose limit is not exceeded names the fog's cut.

    Attributes:
        limit_s: [B, ROWS] largest backlog of the second hop, seconds, rising; -inf: no such row.
        cut: [B, ROWS].
    """

    limit_s: F64
    cut: I64

    def cut_tables(self, row: int) -> tuple[CutTable, ...]:
        """One environment's table as a frame carries it; () where it has none."""
        pairs = zip(self.limit_s[row].tolist(), self.cut[row].tolist(), strict=True)
        rows = tuple((limit_s, cut) for limit_s, cut in pairs if limit_s >= 0.0)
        return (CutTable(1, rows),) if rows else ()


class LateRule:
    """Derives the tables from a cost model of three nodes.

    Raises:
        ConfigError: The chain is not of three nodes.
    """

    def __init__(self, model: CostModel) -> None:
        profile, scenario, references = model.profile, model.scenario, model.references
        if profile.n_nodes != 3:
            raise ConfigError(
                f"late_binding is derived for chains of 3 nodes, this one has {profile.n_nodes}"
            )
        self._n, self._head = profile.spec.n_units, profile.spec.head_start
        self._constrained = scenario.constrained
        self._cuts = np.unique(model.table.cuts[:, 1])
        self._prefix_s, self._bytes = profile.work_prefix_s(), profile.cut_bytes()
        self._transfers = transfer_costs(profile)
        self._stage_s = [node.stage_overhead_s for node in profile.nodes]
        self._frame_s = profile.hops[1].frame_overhead_s
        weights = scenario.weights
        self._latency_cost = weights.latency / references.latency_s
        edge_j = (weights.edge_energy + weights.total_energy) / references.edge_j
        other_j = weights.total_energy / references.edge_j
        self._idle_cost = edge_j * profile.nodes[0].power.idle_w
        self._fog_cost = other_j * profile.nodes[1].power.compute_w
        self._cloud_cost = other_j * profile.nodes[2].power.compute_w
        self._transmit_cost = other_j * profile.nodes[1].power.transmit_w

    def tables(self, state: SystemState, cuts: I64) -> LateTables:
        """The tables for plans `cuts` [B, 2], chosen in `state`."""
        options, level, slope = self._lines(state, cuts)
        rows = np.arange(len(cuts))
        limit_s = np.full((len(cuts), ROWS), -np.inf)
        chosen = np.repeat(cuts[:, 1:], ROWS, axis=1)
        current = level.argmin(axis=1)
        at_s = np.zeros(len(cuts))
        open_ = cuts[:, 0] < self._n  # what the edge finishes never comes to the fog
        for k in range(ROWS):
            fall = slope[rows, current][:, None] - slope
            rise = level - level[rows, current][:, None]
            crossing = np.divide(rise, fall, out=np.full_like(rise, np.inf), where=fall > 1e-12)
            crossing[crossing <= at_s[:, None] + APART_S] = np.inf
            following = crossing.argmin(axis=1)
            until_s = crossing[rows, following]
            limit_s[open_, k] = until_s[open_]
            chosen[:, k] = options[rows, current]
            open_ = open_ & (until_s < np.inf)
            current, at_s = np.where(open_, following, current), until_s
        # A table that says but one thing, the plan's, says nothing.
        idle = (limit_s[:, 0] == np.inf) & (chosen[:, 0] == cuts[:, 1])
        limit_s[idle] = -np.inf
        return LateTables(limit_s, chosen)

    def _lines(self, state: SystemState, cuts: I64) -> tuple[I64, F64, F64]:
        """Cuts the fog may end at [B, J], and of each line its level and slope [B, J]."""
        n, start = self._n, cuts[:, :1]
        options = np.concatenate([np.tile(self._cuts, (len(cuts), 1)), cuts[:, 1:]], axis=1)
        allowed = options >= start
        if self._constrained:
            allowed &= (options > start) & (options <= self._head)
        allowed[:, -1] = True
        ends = np.maximum(options, start)
        crossed = (ends < n).astype(np.float64)
        rate = np.maximum(state.bytes_per_s[:, 1:2], 1.0)
        slow = 1.0 / (1.0 - state.node_load)
        arrival = state.arrival_rps[:, None]

        visits, size = ends > start, self._bytes[ends]
        fog_s = self._prefix_s[1][ends] - self._prefix_s[1][start]
        cloud_s = self._prefix_s[2][n] - self._prefix_s[2][ends]
        if self._transfers is not None:
            both = np.stack(np.broadcast_arrays(start, ends), axis=-1)
            converting, visited = self._transfers.node_s(both)
            fog_s, cloud_s = fog_s + converting[..., 1], cloud_s + converting[..., 2]
            visits, size = visited[..., 1], self._transfers.hop_bytes(both)[..., 1]
        fog_s = fog_s + self._stage_s[1] * visits
        cloud_s = crossed * (cloud_s + self._stage_s[2])
        hop_s = crossed * (size / rate + self._frame_s)
        back_s = state.rtt_s[:, 1:2] + self._bytes[-1] / rate
        fog_wall, cloud_wall = fog_s * slow[:, 1:2], cloud_s * slow[:, 2:]
        wait_s = state.node_backlog_s * slow
        own_s = fog_wall + hop_s + crossed * (back_s + wait_s[:, 2:]) + cloud_wall

        def share(service_s: F64) -> F64:
            """Requests delayed per second of queue in front, times the seconds each loses."""
            load = np.minimum(arrival * service_s, MAX_UTILISATION)
            delayed: F64 = arrival * service_s / (1.0 - load)
            return delayed

        followers = share(fog_wall) * (wait_s[:, 1:2] + 0.5 * fog_wall)
        followers += share(cloud_wall) * (wait_s[:, 2:] + 0.5 * cloud_wall)
        followers += share(hop_s) * 0.5 * hop_s
        # The edge idles for a request alone only where no other is outstanding.
        alone = np.exp(-arrival * own_s[:, -1:])
        price = self._latency_cost + self._idle_cost * alone
        level = price * own_s + self._latency_cost * followers
        level += self._fog_cost * fog_s + self._cloud_cost * cloud_s + self._transmit_cost * hop_s
        slope = price * crossed + self._latency_cost * share(hop_s)

        seen_s = state.hop_backlog_bytes[:, 1:2] / rate
        value = level + slope * seen_s
        own = value[:, -1:] * (1.0 + MARGIN)
        level[:, :-1] += np.maximum(own - value[:, :-1], 0.0)
        level[~allowed] = np.inf
        return options, level, slope
