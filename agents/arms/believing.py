"""A controller that is told another system than the one it decides for."""

from __future__ import annotations

from agents.arms.controllers import Controller, Decision
from env.predict import CostModel
from env.state import SystemState
from env.system import StepResult

__all__ = ["Believing"]


class Believing:
    """A controller that decides with a cost model other than its system's.

    Args:
        controller: Who decides.
        model: What it is told, of the same chain with the same plans.
    """

    def __init__(self, controller: Controller, model: CostModel) -> None:
        self.name, self._controller, self._model = controller.name, controller, model

    def reset(self, model: CostModel, batch: int) -> None:
        """Start over."""
        self._controller.reset(self._model, batch)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """What the controller decides with what it believes."""
        return self._controller.decide(state, last)
