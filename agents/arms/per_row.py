"""Controllers made for one running system, in a comparison of many environments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from agents.arms.controllers import Controller, Decision, Glancing
from env.cost import IntervalRecord
from env.predict import CostModel
from env.state import SystemState
from env.system import Completed, StepResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PerRow"]


class PerRow:
    """One controller of batch 1 for each environment.

    Args:
        name: The arm's name.
        make: Makes one.
    """

    def __init__(self, name: str, make: Callable[[], Controller]) -> None:
        self.name = name
        self._make = make

    def reset(self, model: CostModel, batch: int) -> None:
        """Make them anew."""
        self._rows = [self._make() for _ in range(batch)]
        for controller in self._rows:
            controller.reset(model, 1)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Ask each for its own environment."""
        decisions = []
        for b, controller in enumerate(self._rows):
            index = np.array([b])
            own = None if last is None else _row(last, index)
            decisions.append(controller.decide(state.take(index), own))
        cuts = np.concatenate([d.cuts for d in decisions])
        none = np.zeros((1, cuts.shape[1]))
        probes = [none if d.probe_bytes is None else d.probe_bytes for d in decisions]
        return Decision(cuts, np.concatenate(probes))

    def glance(self, state: SystemState) -> NDArray[np.int64]:
        """Ask each for a request in its own environment."""
        plans = []
        for b, controller in enumerate(self._rows):
            assert isinstance(controller, Glancing)
            plans.append(controller.glance(state.take(np.array([b]))))
        return np.concatenate(plans)


def _row(result: StepResult, index: NDArray[np.int64]) -> StepResult:
    """What an interval gave in one environment."""
    record = {f.name: getattr(result.record, f.name)[index] for f in fields(IntervalRecord)}
    done = result.completed
    if done is not None:
        own = done.env == index[0]
        done = Completed(**{f.name: getattr(done, f.name)[own] for f in fields(Completed)})
        done.env = np.zeros_like(done.env)
    return StepResult(result.state.take(index), IntervalRecord(**record), done)
