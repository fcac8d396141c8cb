"""What an interval cost: energy in both accountings and the one cost function.

The same functions judge the simulator's and the executor's records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from env.scenario import Scenario
from executor.profile import Profile

__all__ = ["Cost", "Energy", "IntervalRecord", "References"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Active watts of the reference's three machines: 12 W stated; 2.549 J / 0.170 s and 0.037 J /
# 1.164 ms from its single-device table (arXiv 2605.09623).
PAPER_EDGE_W, PAPER_FOG_W, PAPER_CLOUD_W = 12.0, 15.0, 31.8


@dataclass
class IntervalRecord:
    """What was spent in one interval, for a batch of B environments, N nodes, H hops.

    Attributes:
        outstanding_s: [B] integral over the interval of the number of requests outstanding.
        union_s: [B] seconds with at least one request outstanding.
        node_active_s: [B, N] unloaded compute seconds spent.
        node_busy_s: [B, N] wall seconds computing (longer than active on a loaded node).
        hop_transmit_s: [B, H] wall seconds transmitting, probes included.
        arrived: [B] requests that arrived.
        completed: [B] requests whose output came back.
        lost: [B] requests refused or failed.
        late: [B] completed after more than the deadline.
        latency_sum_s: [B] sum of the completed requests' latencies, from scheduled arrival.
    """

    outstanding_s: F64
    union_s: F64
    node_active_s: F64
    node_busy_s: F64
    hop_transmit_s: F64
    arrived: I64
    completed: I64
    lost: I64
    late: I64
    latency_sum_s: F64

    @classmethod
    def zeros(cls, batch: int, n_nodes: int) -> IntervalRecord:
        """An empty record."""
        return cls(
            outstanding_s=np.zeros(batch),
            union_s=np.zeros(batch),
            node_active_s=np.zeros((batch, n_nodes)),
            node_busy_s=np.zeros((batch, n_nodes)),
            hop_transmit_s=np.zeros((batch, n_nodes - 1)),
            arrived=np.zeros(batch, dtype=np.int64),
            completed=np.zeros(batch, dtype=np.int64),
            lost=np.zeros(batch, dtype=np.int64),
            late=np.zeros(batch, dtype=np.int64),
            latency_sum_s=np.zeros(batch),
        )

    def add(self, other: IntervalRecord) -> None:
        """Add another interval's spending to this one."""
        for name in self.__dataclass_fields__:
            getattr(self, name).__iadd__(getattr(other, name))


@dataclass(frozen=True)
class Energy:
    """Joules per environment, shape [B] each.

    `full`: the edge's idle watts over the time with a request outstanding, plus every node's
    active and transmit energy. `compute`: the reference's accounting, active watts x compute time.
    """

    edge_full_j: F64
    total_full_j: F64
    edge_compute_j: F64
    total_compute_j: F64


@dataclass(frozen=True)
class References:
    """What the cost is measured in: one edge-only request on the unloaded edge.

    Attributes:
        latency_s: Its latency.
        edge_j: Its full energy (edge-only: also the total).
        deadline_s: The scenario's deadline.
        lost_cost: What a lost request costs: 1.5 times what one that finishes at the deadline does.
    """

    latency_s: float
    edge_j: float
    deadline_s: float
    lost_cost: float

    @classmethod
    def of(cls, profile: Profile, scenario: Scenario) -> References:
        """From the first profile; frozen with a checkpoint."""
        edge = profile.nodes[0]
        latency = sum(edge.unit_s) + edge.stage_overhead_s
        deadline = scenario.deadline_s or scenario.deadline_factor * latency
        w = scenario.weights
        at_deadline = w.latency * deadline / latency + w.edge_energy + w.total_energy
        return cls(
            latency_s=latency,
            edge_j=(edge.power.idle_w + edge.power.compute_w) * latency,
            deadline_s=deadline,
            lost_cost=1.5 * at_deadline,
        )


class Cost:
    """The cost of an interval.

    `cost = (w_lat * outstanding_s / L_ref + w_end * E_edge / E_ref + w_tot * E_total / E_ref
    + c_lost * lost) / n_ref`, with n_ref the mean arrivals per second. By Little's law the integral
    of the number outstanding is the sum of latencies, so stalling gains nothing.

    Example: edge-only, unloaded, one request per second of 0.3 s on an edge of (3 + 3) W:
    outstanding_s 0.3 = L_ref, energy 1.8 J = E_ref, so cost = 0.3 + 0.6 + 0.2 = 1.1 per request.

    Args:
        profile: Watts of each node.
        references: Frozen units of the cost.
        scenario: Weights.
    """

    def __init__(self, profile: Profile, references: References, scenario: Scenario) -> None:
        self.references = references
        self.weights = scenario.weights
        self._idle_w = profile.nodes[0].power.idle_w
        self._compute_w = np.array([n.power.compute_w for n in profile.nodes])
        self._transmit_w = np.array([n.power.transmit_w for n in profile.nodes[:-1]])
        n = profile.n_nodes
        self._paper_w = np.array([PAPER_EDGE_W] + [PAPER_FOG_W] * (n - 2) + [PAPER_CLOUD_W])

    def energy(self, record: IntervalRecord) -> Energy:
        """Joules spent, per environment."""
        active = record.node_active_s * self._compute_w
        transmit = record.hop_transmit_s * self._transmit_w
        edge = self._idle_w * record.union_s + active[:, 0] + transmit[:, 0]
        paper = record.node_busy_s * self._paper_w
        return Energy(
            edge_full_j=edge,
            total_full_j=edge + active[:, 1:].sum(axis=1) + transmit[:, 1:].sum(axis=1),
            edge_compute_j=paper[:, 0],
            total_compute_j=paper.sum(axis=1),
        )

    def __call__(self, record: IntervalRecord, n_ref: F64) -> F64:
        """Cost per environment, shape [B]; `n_ref` [B] is the mean arrivals per second."""
        w, ref = self.weights, self.references
        energy = self.energy(record)
        total: F64 = (
            w.latency / ref.latency_s * record.outstanding_s
            + w.edge_energy / ref.edge_j * energy.edge_full_j
            + w.total_energy / ref.edge_j * energy.total_full_j
            + ref.lost_cost * record.lost
        )
        return total / n_ref
