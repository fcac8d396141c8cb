"""What is known before the first decision: what measuring at the start would have found."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._chain import Chain
from env._outages import Outages
from env.conditions import IntervalConditions
from env.scenario import Scenario
from env.state import SystemState

__all__ = ["first_state"]

F64 = NDArray[np.float64]


def first_state(
    chain: Chain, scenario: Scenario, coming: IntervalConditions, rate_rps: F64, outages: Outages
) -> SystemState:
    """The state at time 0: empty queues, and hops and nodes as they are at that moment.

    As after `env.live.LiveSystem.reset`, which probes every hop and waits for at most
    `probing.idle_s`: of a hop that is down it then knows that it is slower than that.

    Args:
        chain: Nodes and hops.
        scenario: What a probe is.
        coming: The first interval's conditions; only their first sub-step counts.
        rate_rps: [B] arrivals expected.
        outages: Which hops are down.
    """
    batch, slowest = len(rate_rps), scenario.probing.unanswered_bytes_per_s
    return SystemState(
        bytes_per_s=np.maximum(coming.hop_bytes_per_s[:, :, 0], slowest),
        bandwidth_age_s=np.zeros((batch, chain.n_hops)),
        rtt_s=2.0 * coming.hop_delay_s[:, :, 0],
        node_load=1.0 - coming.node_speed[:, :, 0],
        node_backlog_s=np.zeros((batch, chain.n_nodes)),
        hop_backlog_bytes=np.zeros((batch, chain.n_hops)),
        arrival_rps=rate_rps.copy(),
        in_flight=np.zeros(batch),
        cuts=np.full((batch, chain.n_hops), chain.n_units, dtype=np.int64),
        latency_ratio=np.ones(batch),
        node_up=outages.node_up(),
    )
