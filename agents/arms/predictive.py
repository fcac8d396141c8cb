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

from agents.arms.controllers import Decision
from env.predict import CostModel
from env.state import SystemState, idle_probes

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["Forecast", "Forecaster", "Predictive", "PredictiveSettings"]

F64 = NDArray[np.float64]
MAX_LOAD = 0.9


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


class Forecaster:
    """Tells what the measured state will be.

    Args:
        settings: How much of the past it believes.
        interval_s: Between two states.
    """

    def __init__(self, settings: PredictiveSettings, interval_s: float) -> None:
        self._settings, self._dt_s = settings, interval_s
        self._held: F64 | None = None
        self._forecasts: tuple[Forecast, Forecast, Forecast] | None = None

    def observe(self, state: SystemState) -> None:
        """Another state, an interval after the one before."""
        settings, dt = self._settings, self._dt_s
        rate = np.maximum(state.bytes_per_s, 1.0)
        if self._held is not None:
            rate = np.maximum(rate, self._held * settings.fall**-dt)
        self._held = rate
        self._values = (
            np.log(rate),
            state.node_load,
            np.log(np.maximum(state.arrival_rps, 1e-3)),
        )
        if self._forecasts is None:
            times = settings.bandwidth_s, settings.load_s, settings.arrivals_s
            bandwidth, load, arrivals = (
                Forecast(v, s, settings.memory_s) for v, s in zip(self._values, times, strict=True)
            )
            self._forecasts = bandwidth, load, arrivals
        for forecast, value in zip(self._forecasts, self._values, strict=True):
            forecast.observe(value, dt)

    def expected(self, state: SystemState, ahead_s: float) -> SystemState:
        """The state last observed, with what is expected `ahead_s` later; queues as they are."""
        assert self._forecasts is not None
        bandwidth, load, arrivals = self._forecasts
        rate, share, rps = self._values
        return replace(
            state,
            bytes_per_s=np.exp(bandwidth.at(rate, state.bandwidth_age_s + ahead_s)),
            node_load=np.clip(load.at(share, ahead_s), 0.0, MAX_LOAD),
            arrival_rps=np.exp(arrivals.at(rps, ahead_s)),
        )


class Predictive:
    """The candidate whose predicted cost is lowest in the middle of the coming interval.

    Probes as the solver does.

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
        self._forecaster = Forecaster(self.settings, model.scenario.interval_s)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The cheapest usable candidate per environment under the forecast."""
        model = self._model
        cost = model.predict(self.forecast(state)).cost
        usable = model.usable(state)
        if usable is not None:
            cost = np.where(usable, cost, np.inf)
        best = cost.argmin(axis=1)
        return Decision(model.table.cuts[best], idle_probes(state, model.scenario))

    def forecast(self, state: SystemState) -> SystemState:
        """The state with what is expected in the middle of the coming interval."""
        self._forecaster.observe(state)
        return self._forecaster.expected(state, 0.5 * self._model.scenario.interval_s)
