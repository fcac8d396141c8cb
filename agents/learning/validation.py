"""How a policy in training is judged: by its cost over the solver's, on conditions of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Controller, Solver
from env.cost import Cost
from env.mixture import MixedConditions, Mixture
from env.predict import CostModel
from env.simulator import Simulator

__all__ = ["Judge", "mean_cost", "overall", "own_and_varied", "rank"]

F64 = NDArray[np.float64]


def mean_cost(controller: Controller, simulator: Simulator, seed: int, steps: int) -> F64:
    """Mean cost per step and environment of a controller on the conditions `seed` names, [B]."""
    model = simulator.model
    cost = Cost(model.profile, model.references, model.scenario)
    state, last = simulator.reset(seed), None
    controller.reset(model, state.batch)
    total = np.zeros(state.batch)
    for _ in range(steps):
        decision = controller.decide(state, last)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
        total += cost(last.record, simulator.n_ref)
    total += cost(simulator.drain(), simulator.n_ref)
    return total / steps


def own_and_varied(
    model: CostModel, mixture: Mixture, rates: tuple[float, float], count: int, seed: int
) -> dict[str, Simulator]:
    """What a policy trained on a mixture is judged on: the scenario's own conditions, and others.

    Args:
        model: What it decides for.
        mixture: Of the training; its varied conditions are drawn anew.
        rates: Arrival rates, as fractions of the best static plan's capacity.
        count: Environments of each kind.
        seed: Names the conditions.
    """
    spread = np.linspace(*rates, count) * model.capacity_rps
    varied = replace(mixture, own_share=0.0)
    conditions = MixedConditions(model, varied, rates, count, seed)
    return {
        "own": Simulator(model, count, seed, rate_rps=spread),
        "varied": Simulator(varied.system(model), count, seed, conditions=conditions),
    }


class Judge:
    """Compares policies with the solver on common random numbers.

    Args:
        simulators: Parts of the conditions, by name.
        seed: Names the conditions of all.
        steps: Intervals in each.
    """

    def __init__(self, simulators: Mapping[str, Simulator], seed: int, steps: int) -> None:
        self._simulators, self._seed, self._steps = dict(simulators), seed, steps
        self._solver = {
            name: mean_cost(Solver(), simulator, seed, steps)
            for name, simulator in simulators.items()
        }

    def ratios(self, controller: Controller) -> dict[str, float]:
        """Cost over the solver's in each part.

        Every environment counts the same: the mean of ratios, not the ratio of means.
        """
        return {
            name: float(np.mean(mean_cost(controller, simulator, self._seed, self._steps) / solver))
            for (name, simulator), solver in zip(
                self._simulators.items(), self._solver.values(), strict=True
            )
        }


def overall(ratios: Mapping[str, float]) -> float:
    """The one figure of several parts: their mean."""
    return float(np.mean(list(ratios.values())))


def rank(ratios: Mapping[str, float]) -> tuple[bool, float]:
    """What policies are sorted by, the best first: one that loses to the solver in any part last.

    The solver itself has 1 in every part, so what ranks behind it should not be kept.
    """
    return max(ratios.values()) > 1.0, overall(ratios)
