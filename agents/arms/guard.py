"""The guard: the policy decides while its inputs can be trusted, the solver when they cannot.

A state machine without clocks or sockets: `GuardedController` is asked once per interval and
counts and logs every fall-back with its reason.
"""

from __future__ import annotations

import collections
import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Controller, Decision, Glancing, Solver
from env.cost import Cost
from env.predict import CostModel
from env.state import SystemState
from env.system import StepResult

__all__ = ["GuardSettings", "GuardedController"]

log = logging.getLogger(__name__)

NODE_DOWN = "node down"


@dataclass(frozen=True)
class GuardSettings:
    """When to fall back.

    Attributes:
        stale_s: A hop's bandwidth older than this cannot be trusted.
        max_rate_bytes_per_s: Above this a bandwidth is out of the range trained on.
        drift_ratio: Fall back when the mean observed cost of `window_s` exceeds this times the
            predicted one...
        window_s: ...over so many seconds of intervals with arrivals.
        hold_s: Stay with the solver for so long after the last reason, unless that was a node that
            was down.
    """

    stale_s: float = 30.0
    max_rate_bytes_per_s: float = 1.25e9
    drift_ratio: float = 3.0
    window_s: float = 10.0
    hold_s: float = 5.0


class GuardedController:
    """Wraps a policy for one running system (batch 1).

    Attributes:
        fallbacks: How often each reason was given.
        reason: Why the solver decides now; "" while the policy does.
    """

    def __init__(self, policy: Controller, settings: GuardSettings | None = None) -> None:
        self.name = f"guarded-{policy.name}"
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self.reason = ""
        self._policy, self._solver = policy, Solver()
        self._settings = settings or GuardSettings()
        self._hold = 0

    def reset(self, model: CostModel, batch: int) -> None:
        """Start over on a system."""
        self._model = model
        self._cost = Cost(model.profile, model.references, model.scenario)
        self._policy.reset(model, batch)
        self._solver.reset(model, batch)
        window, self._holds = (
            max(1, round(seconds / model.scenario.interval_s))
            for seconds in (self._settings.window_s, self._settings.hold_s)
        )
        self._predicted: collections.deque[float] = collections.deque(maxlen=window)
        self._observed: collections.deque[float] = collections.deque(maxlen=window)
        self._hold, self.reason = 0, ""
        self._pending = float("nan")

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The policy's plan, or the solver's with a reason."""
        if last is not None:
            self._observe(last)
        reason = self._check(state)
        if reason:
            if not self._hold:
                log.warning("falling back to the solver: %s", reason, extra={"reason": reason})
            self.fallbacks[reason] += 1
            # A node that is back is healthy at once; other trouble tends to come again.
            self._hold = max(self._hold, 1) if reason == NODE_DOWN else self._holds
            self.reason = reason
        elif self._hold:
            self._hold -= 1
            if not self._hold:
                log.info("back to the policy")
                self.reason = ""
        usable = _finite(state)
        wanted = self._policy.decide(usable, last)
        decision = self._solver.decide(usable, last) if self._hold else wanted
        self._expect(usable, decision)
        return decision

    def glance(self, state: SystemState) -> NDArray[np.int64]:
        """Plans for a request in this state: the solver's where that decides or the state is bad.

        Nothing is counted, and no hold begins: the interval's decision does that.
        """
        by_policy = not self._hold and not self._check(state)
        asked = self._policy if by_policy else self._solver
        assert isinstance(asked, Glancing)
        return asked.glance(_finite(state))

    def _check(self, state: SystemState) -> str:
        settings = self._settings
        if not state.node_up.all():
            return NODE_DOWN
        arrays = (state.bytes_per_s, state.rtt_s, state.node_load, state.node_backlog_s)
        if not all(np.isfinite(a).all() for a in arrays):
            return "state is not finite"
        if (state.bytes_per_s > settings.max_rate_bytes_per_s).any():
            return "bandwidth out of range"
        if (state.bandwidth_age_s > settings.stale_s).any():
            return "bandwidth stale"
        full = len(self._observed) == self._observed.maxlen
        if full and sum(self._observed) > settings.drift_ratio * sum(self._predicted):
            return "observed cost above predicted"
        return ""

    def _expect(self, state: SystemState, decision: Decision) -> None:
        match = (self._model.table.cuts == decision.cuts[0]).all(axis=1)
        per_request = self._model.predict(state).cost[0, match]
        self._pending = float(per_request[0]) if len(per_request) else float("nan")

    def _observe(self, last: StepResult) -> None:
        arrived = float(last.record.arrived[0])
        if arrived and np.isfinite(self._pending):
            self._observed.append(float(self._cost(last.record, np.ones(1))[0]))
            self._predicted.append(self._pending * arrived)


def _finite(state: SystemState) -> SystemState:
    """The state with what is not finite replaced by neutral values."""
    fill = {
        "bytes_per_s": 1e6,
        "bandwidth_age_s": 1e3,
        "rtt_s": 0.05,
        "node_load": 0.0,
        "node_backlog_s": 0.0,
        "hop_backlog_bytes": 0.0,
        "arrival_rps": 1.0,
        "in_flight": 0.0,
        "latency_ratio": 1.0,
    }
    values = {
        name: np.nan_to_num(getattr(state, name), nan=value, posinf=value, neginf=value)
        for name, value in fill.items()
    }
    return SystemState(cuts=state.cuts, node_up=state.node_up, **values)
