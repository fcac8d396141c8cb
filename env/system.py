"""The system that an environment wraps: the simulator or real nodes, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from env.cost import IntervalRecord
from env.predict import CostModel
from env.state import SystemState

__all__ = ["ARRIVAL_SMOOTHING_S", "DRAIN_DEADLINES", "Completed", "StepResult", "System"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Time constant with which every system smooths its count of arrivals.
ARRIVAL_SMOOTHING_S = 3.0
# What this many deadlines of a run-out do not finish is lost.
DRAIN_DEADLINES = 20.0


@dataclass
class Completed:
    """The R requests that ended in an interval, one row each.

    Attributes:
        env: [R] environment.
        arrival_s: [R] scheduled arrival, absolute time of the system.
        completion_s: [R] when the output was back; NaN where lost.
        cuts: [R, H] the plan executed.
        stage_s: [R, N] wall seconds computing, 0 where skipped.
        work_s: [R, N] unloaded compute seconds, 0 where skipped.
        transmit_s: [R, H] wall seconds on the hop in service (waiting behind other frames and
            propagation excluded), 0 where not crossed.
        wait_s: [R] seconds spent behind others, at all nodes and hops together.
        lost: [R] refused or failed.
    """

    env: I64
    arrival_s: F64
    completion_s: F64
    cuts: I64
    stage_s: F64
    work_s: F64
    transmit_s: F64
    wait_s: F64
    lost: NDArray[np.bool_]


@dataclass
class StepResult:
    """What one interval gave: the state at its end, its record, its requests if recorded."""

    state: SystemState
    record: IntervalRecord
    completed: Completed | None = None


@runtime_checkable
class System(Protocol):
    """A running chain of nodes that takes one plan per interval; arrays have B = 1.

    `env.simulator.Simulator` with batch 1 is one; real nodes are another.

    Attributes:
        model: The cost model: profile, scenario, references, candidate plans.
        n_ref: [B] mean arrivals per second, the cost's unit.
    """

    model: CostModel
    n_ref: F64

    def reset(self, seed: int | None = None) -> SystemState:
        """Start an episode; None continues with fresh conditions."""

    def step(self, cuts: I64, probe_bytes: F64 | None = None) -> StepResult:
        """Run one interval under `cuts` [B, H], sending probes of `probe_bytes` [B, H] first."""

    def drain(self) -> IntervalRecord:
        """No more arrivals: run out what is open and return what that spent.

        What `DRAIN_DEADLINES` deadlines do not finish is lost, and charged for them.
        """

    def drain_completed(self) -> StepResult:
        """As `drain`, with the requests that ended and the state after it."""

    def close(self) -> None:
        """Release everything."""
