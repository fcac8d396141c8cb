"""The queue-aware solver with a forecast of bandwidth, load and arrivals.

A measurement is a second old when it is used and the decision holds for another second; each
quantity has meanwhile moved back towards its mean. Bandwidth and arrivals are forecast in log
space and load as it is, by first-order autoregression with the mean learnt online:
mean + phi ** age x (last - mean). An outage's measurement is not believed at once: outages are
over in about a second, so a hop's estimate falls at most by a factor per interval.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.controllers import Decision
from env.predict import CostModel
from env.state import SystemState, idle_probes

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["Forecast", "Predictive", "PredictiveSettings"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class PredictiveSettings:
    """How much of the past the forecast believes.

    Attributes:
        fall: A hop's estimate falls at most by this factor per second.
        bandwidth_s, load_s, arrivals_s: Time constant with which each returns to its mean;
            infinite holds the last value.
        memory_s: Time constant of the running means.
    """

    fall: float = 3.0
    bandwidth_s: float = 20.0
    load_s: float = 20.0
    arrivals_s: float = 20.0
    memory_s: float = 60.0


class Forecast:
    """A first-order autoregression around a running mean, for an array of series.

    Args:
        start: First value of the mean.
        return_s: Time constant with which a series returns to its mean.
        memory_s: Time constant of the mean.
    """

    def __init__(self, start: F64, return_s: float, memory_s: float) -> None:
        self.mean = start.copy()
        self._return_s, self._memory_s = return_s, memory_s
        self._seen_s = 0.0

    def observe(self, value: F64, dt_s: float) -> None:
        """Another value, `dt_s` after the one before; a plain mean until the memory is full."""
        self._seen_s = min(self._seen_s + dt_s, self._memory_s)
        # The start counts as much as a few observations.
        self.mean += (value - self.mean) * (dt_s / (self._seen_s + 5.0 * dt_s))

    def at(self, value: F64, ahead_s: F64 | float) -> F64:
        """What is expected `ahead_s` after `value` was measured."""
        expected: F64 = self.mean + np.exp(-np.asarray(ahead_s) / self._return_s) * (
            value - self.mean
        )
        return expected


class Predictive:
    """The candidate whose predicted cost is lowest under the forecast; probes as the solver does.

    Args:
        settings: Of the forecast.
        name: The arm's name.
    """

    def __init__(
        self, settings: PredictiveSettings | None = None, name: str = "predictive"
    ) -> None:
        self.settings, self.name = settings or PredictiveSettings(), name

    def reset(self, model: CostModel, batch: int) -> None:
        """Forget the past."""
        self._model = model
        self._held: F64 | None = None
        self._forecasts: tuple[Forecast, Forecast, Forecast] | None = None

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The cheapest candidate per environment under the forecast."""
        best = self._model.predict(self.forecast(state)).cost.argmin(axis=1)
        return Decision(self._model.table.cuts[best], idle_probes(state, self._model.scenario))

    def forecast(self, state: SystemState) -> SystemState:
        """The state with what is expected in the middle of the coming interval."""
        settings, dt = self.settings, self._model.scenario.interval_s
        rate = np.maximum(state.bytes_per_s, 1.0)
        if self._held is not None:
            rate = np.maximum(rate, self._held * settings.fall**-dt)
        self._held = rate
        values = np.log(rate), state.node_load, np.log(np.maximum(state.arrival_rps, 1e-3))
        if self._forecasts is None:
            times = settings.bandwidth_s, settings.load_s, settings.arrivals_s
            bandwidth, load, arrivals = (
                Forecast(v, s, settings.memory_s) for v, s in zip(values, times, strict=True)
            )
            self._forecasts = bandwidth, load, arrivals
        for forecast, value in zip(self._forecasts, values, strict=True):
            forecast.observe(value, dt)
        bandwidth, load, arrivals = self._forecasts
        half = 0.5 * dt
        return replace(
            state,
            bytes_per_s=np.exp(bandwidth.at(values[0], state.bandwidth_age_s + half)),
            node_load=np.clip(load.at(values[1], half), 0.0, 0.9),
            arrival_rps=np.exp(arrivals.at(values[2], half)),
        )
