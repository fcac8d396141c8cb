"""A controller whose profile follows what the requests measure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Controller, Decision, Glancing
from env.predict import CostModel
from env.recalibration import Recalibration, RecalibrationSettings, Recalibrator
from env.state import SystemState
from env.system import StepResult

__all__ = ["Recalibrated"]


class Recalibrated:
    """Wraps a controller for one running system (batch 1) that records its requests.

    The cost model that the controller decides with is corrected in place by
    `env.recalibration.Recalibrator`.

    Args:
        controller: Solver, policy, or another that predicts with the cost model it is given.
        believed: What it decides with and what is corrected; at `reset` a copy of the system's
            when None.
        settings: How the estimates move.

    Attributes:
        changes: How often the profile was corrected.
    """

    def __init__(
        self,
        controller: Controller,
        believed: CostModel | None = None,
        settings: RecalibrationSettings | None = None,
    ) -> None:
        self.name = controller.name
        self._controller, self._given, self._settings = controller, believed, settings
        self.changes = 0

    @property
    def believed(self) -> Recalibration:
        """The corrections in force."""
        return self._recalibrator.believed

    @property
    def model(self) -> CostModel:
        """What the controller decides with."""
        return self._model

    def reset(self, model: CostModel, batch: int) -> None:
        """Start over on a system, from the profile that is believed now."""
        self._model = self._given or CostModel(model.profile, model.scenario, model.references)
        self._recalibrator = Recalibrator(self._model.profile, self._settings)
        self._controller.reset(self._model, batch)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Learn from what completed, then ask the controller."""
        if last is not None and last.completed is not None:
            corrected = self._recalibrator.observe(last.completed, state)
            if corrected is not None:
                self._model.recalibrate(corrected)
                self.changes += 1
        return self._controller.decide(state, last)

    def glance(self, state: SystemState) -> NDArray[np.int64]:
        """Plans for a request in this state."""
        assert isinstance(self._controller, Glancing)
        return self._controller.glance(state)
