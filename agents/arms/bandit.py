"""LinUCB: a contextual bandit that learns during the run which plan costs least.

Li, Chu, Langford, Schapire, A Contextual-Bandit Approach to Personalized News Article
Recommendation (arXiv 1003.0146), with one linear model for all plans over features of the pair
(state, plan): with 36 to 190 plans and a decision per second, a model per plan (their Algorithm 1)
would not have tried each once by an episode's end. Costs are minimised: the bound is a lower one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Decision
from env.cost import Cost
from env.predict import CostModel
from env.state import SystemState, idle_probes

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["LinUCB"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MAX_COST = 5.0  # of one request, in features and in what is learnt from: an overload is no outlier


class LinUCB:
    """Chooses argmin over plans of x . theta - alpha sqrt(x' inv(A) x), per environment.

    A = ridge I + sum x x', theta = inv(A) (ridge theta_0 + sum x cost). Before it has learnt
    anything, theta_0 makes it the queue-aware solver: weight 1 on the predicted cost.

    The features of a plan, `Encoder`-like in their units: the predicted cost above the cheapest
    plan's, that of the cheapest, the seconds that a request asks of each node at its load and of
    each hop at its bandwidth (per edge-only latency), and a constant. What it learns from is the
    last interval's cost per arrived request; an interval without arrivals teaches nothing.

    Args:
        alpha: How much uncertainty is worth, in units of cost; 0 never explores.
        ridge: How firmly it holds to theta_0.
        name: The arm's name.
    """

    def __init__(self, alpha: float = 0.1, ridge: float = 30.0, name: str = "linucb") -> None:
        self.alpha, self.ridge, self.name = alpha, ridge, name

    def reset(self, model: CostModel, batch: int) -> None:
        """Forget everything that was learnt."""
        self._model = model
        self._cost = Cost(model.profile, model.references, model.scenario)
        size = 3 + len(model.profile.nodes) + len(model.profile.hops)
        prior = np.zeros(size)
        prior[:2] = 1.0
        self._inverse = np.tile(np.eye(size) / self.ridge, (batch, 1, 1))
        self._b = np.tile(self.ridge * prior, (batch, 1))
        self._chosen: F64 | None = None

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Learn from the last interval, then choose."""
        if last is not None and self._chosen is not None:
            self._learn(self._chosen, last)
        x = self._features(state)
        theta = np.einsum("bij,bj->bi", self._inverse, self._b)
        spread = np.einsum("bad,bde,bae->ba", x, self._inverse, x, optimize=True)
        bound = np.einsum("bad,bd->ba", x, theta) - self.alpha * np.sqrt(np.maximum(spread, 0.0))
        best = bound.argmin(axis=1)
        self._chosen = x[np.arange(len(x)), best]
        return Decision(self._model.table.cuts[best], idle_probes(state, self._model.scenario))

    def _features(self, state: SystemState) -> F64:
        """Of every plan, [B, A, size]."""
        table, unit_s = self._model.table, self._model.references.latency_s
        cost = self._model.predict(state).cost.astype(np.float64)
        cheapest = cost.min(axis=1, keepdims=True)
        rate = np.maximum(state.bytes_per_s, 1.0)
        node_s = table.work_s / (1.0 - state.node_load[:, None, :])
        hop_s = table.hop_bytes / rate[:, None, :]
        parts = [
            np.minimum(cost - cheapest, MAX_COST)[:, :, None],
            np.broadcast_to(np.minimum(cheapest, MAX_COST), cost.shape)[:, :, None],
            np.minimum(node_s / unit_s, MAX_COST),
            np.minimum(hop_s / unit_s, MAX_COST),
            np.ones((*cost.shape, 1)),
        ]
        return np.concatenate(parts, axis=2)

    def _learn(self, x: F64, last: StepResult) -> None:
        """Rank-one updates of inv(A) (Sherman-Morrison) and b, where requests arrived."""
        arrived = last.record.arrived
        cost = self._cost(last.record, np.maximum(arrived, 1).astype(np.float64))
        x = x * (arrived > 0)[:, None]
        gain = np.einsum("bij,bj->bi", self._inverse, x)
        scale = 1.0 + np.einsum("bi,bi->b", x, gain)
        self._inverse -= gain[:, :, None] * gain[:, None, :] / scale[:, None, None]
        self._b += x * np.minimum(cost, MAX_COST)[:, None]
