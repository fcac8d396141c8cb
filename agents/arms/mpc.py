"""Model-predictive control: plans a few intervals ahead under a forecast, and does so every time.

The solver asks which plan is cheapest if held; this asks what each of the better ones leaves
behind. Every one is played forward for a few intervals in a fluid model of the queues, under the
forecast of `agents.arms.predictive`, with the cheapest plan of each later moment following it; the
one whose intervals together cost least is taken, and all is thought over again an interval later
(receding horizon). Nothing is learned beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Decision
from agents.arms.predictive import Forecaster, PredictiveSettings
from env.predict import CostModel, station_seconds
from env.state import SystemState, idle_probes

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["ModelPredictive", "ModelPredictiveSettings", "cost_later", "queues_later"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class ModelPredictiveSettings:
    """How far it looks.

    Attributes:
        horizon: Intervals (`CostModel.ahead_s`) played forward, the coming one included.
        tried: Plans that are played forward: the cheapest by the solver's score.
        forecast: What is expected of bandwidth, load and arrivals.
    """

    horizon: int = 4
    tried: int = 8
    forecast: PredictiveSettings = field(default_factory=PredictiveSettings)


class ModelPredictive:
    """The plan that costs least over the coming intervals; probes as the solver does.

    Args:
        settings: How far it looks.
        name: The arm's name.
    """

    def __init__(self, settings: ModelPredictiveSettings | None = None, name: str = "mpc") -> None:
        self.settings, self.name = settings or ModelPredictiveSettings(), name

    def reset(self, model: CostModel, batch: int) -> None:
        """Forget the past."""
        self._model = model
        self._forecaster = Forecaster(self.settings.forecast, model.scenario.interval_s)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The best first plan per environment."""
        model, dt = self._model, self._model.ahead_s
        self._forecaster.observe(state)
        now = self._forecaster.expected(state, 0.5 * dt)
        usable = model.usable(state)
        plan, total = self._first(now, usable)
        row = np.repeat(np.arange(state.batch), plan.shape[1])
        coming = (
            self._forecaster.expected(state, (n + 0.5) * dt).take(row)
            for n in range(1, self.settings.horizon)
        )
        allowed = None if usable is None else usable[row]
        later = cost_later(model, now.take(row), plan.reshape(-1), coming, allowed)
        total += later.reshape(total.shape)
        best = plan[np.arange(state.batch), total.argmin(axis=1)]
        return Decision(model.table.cuts[best], idle_probes(state, model.scenario))

    def _first(self, now: SystemState, usable: NDArray[np.bool_] | None) -> tuple[I64, F64]:
        """Plans tried [B, K], and what the coming interval costs with each."""
        cost = self._model.predict(now).cost
        if usable is not None:
            cost = np.where(usable, cost, np.inf)
        tried = min(self.settings.tried, cost.shape[1])
        plan = np.argsort(cost, axis=1, kind="stable")[:, :tried]
        return plan, np.take_along_axis(cost, plan, axis=1) * now.arrival_rps[:, None]


def cost_later(
    model: CostModel,
    state: SystemState,
    plan: I64,
    coming: Iterable[SystemState],
    usable: NDArray[np.bool_] | None = None,
) -> F64:
    """What the intervals after one with these plans cost, [R], the solver's plan taken in each.

    Args:
        model: Predicts.
        state: R states.
        plan: [R] index of the plan held in each for the first interval, which does not count.
        coming: What is expected of all but the queues in each later interval, R states each.
        usable: [R, A] plans that can be used; None: all.
    """
    total = np.zeros(state.batch)
    for expected in coming:
        after = queues_later(model, state, plan)
        state = replace(
            expected,
            node_backlog_s=after.node_backlog_s,
            hop_backlog_bytes=after.hop_backlog_bytes,
            in_flight=after.in_flight,
        )
        cost = model.predict(state).cost
        if usable is not None:
            cost = np.where(usable, cost, np.inf)
        total += cost.min(axis=1) * state.arrival_rps
        plan = cost.argmin(axis=1)
    return total


def queues_later(model: CostModel, state: SystemState, plan: I64) -> SystemState:
    """The queues an interval later, and what is in flight, as fluids.

    Args:
        model: Its `ahead_s` is the interval's length.
        state: R states.
        plan: [R] index of the plan held in each.
    """
    dt = model.ahead_s
    unit_s, _ = station_seconds(
        state.node_load,
        np.maximum(state.bytes_per_s, 1.0),
        state.node_backlog_s,
        state.hop_backlog_bytes,
    )
    unit_s = unit_s[:, :, 0]
    demand = model.demand[:, 0, plan]  # [S, R]
    backlog = np.empty_like(demand)
    backlog[0::2], backlog[1::2] = state.node_backlog_s.T, state.hop_backlog_bytes.T
    # What a station lets through bounds what reaches those behind it.
    slowest_s = np.maximum(np.maximum.accumulate(demand * unit_s, axis=0), 1e-9)
    inflow_rps = np.tile(state.arrival_rps, (len(demand), 1))
    inflow_rps[1:] = np.minimum(inflow_rps[1:], 1.0 / slowest_s[:-1])
    backlog = np.maximum(backlog + dt * (inflow_rps * demand - 1.0 / unit_s), 0.0)
    return replace(
        state,
        node_backlog_s=backlog[0::2].T,
        hop_backlog_bytes=backlog[1::2].T,
        in_flight=np.maximum(state.in_flight + dt * (state.arrival_rps - 1.0 / slowest_s[-1]), 0.0),
    )
