"""Looking past the coming interval: what a plan leaves behind, for the learned policy.

The policy's logits price the coming interval: the solver's excess, corrected by what was learned.
Here its likeliest plans are played a few intervals forward in the fluid model of the queues
(`agents.mpc`), everything measured held as it is and the solver's plan following at each later
moment, and what these later intervals cost is charged to the plan that leads there (one step of
rollout, Bertsekas, "Rollout, Policy Iteration, and Distributed Reinforcement Learning", 2020).
Nothing is learned for it, and it keeps no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.arms.mpc import cost_later
from env.predict import CostModel
from env.state import SystemState

__all__ = ["Lookahead"]

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Lookahead:
    """How far a policy looks.

    Attributes:
        horizon: Intervals played forward, the coming one included.
        tried: Plans that are played forward: those of highest logit.
        weight: Of what the later intervals cost; 0 leaves the order of the logits as it is.
    """

    horizon: int = 4
    tried: int = 5
    weight: float = 0.5

    def charge(
        self, model: CostModel, state: SystemState, logits: F32, tau: float, usable: Mask | None
    ) -> F32:
        """The logits [B, A] less the later intervals' cost; -inf for plans not played forward.

        Args:
            model: Of the interval that the policy was trained with.
            state: The measured state, B environments.
            logits: [B, A], -inf where a plan cannot be used.
            tau: Units of cost per unit of logit.
            usable: `CostModel.usable` of the state.
        """
        tried = min(self.tried, logits.shape[1])
        plan = np.argsort(-logits, axis=1, kind="stable")[:, :tried]
        row = np.repeat(np.arange(state.batch), tried)
        many = state.take(row)
        later = cost_later(
            model,
            many,
            plan.reshape(-1),
            [many] * (self.horizon - 1),
            None if usable is None else usable[row],
        )
        # In the unit of the logits' prior: per request of the coming interval.
        later /= np.maximum(many.arrival_rps, 1e-3)
        charged = np.full_like(logits, -np.inf)
        kept = np.take_along_axis(logits, plan, axis=1)
        charge = (self.weight / tau * later).reshape(plan.shape).astype(logits.dtype)
        np.put_along_axis(charged, plan, kept - charge, axis=1)
        return charged
