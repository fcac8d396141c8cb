"""One deployment: the loop that serves and decides, and what it adds up."""

from __future__ import annotations

import collections
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.tensorboard.writer import SummaryWriter

from agents.arms.controllers import Controller, Decision
from agents.arms.guard import GuardedController
from agents.learning.scalars import log_system
from agents.serving.telemetry import Telemetry
from env.cost import Cost, IntervalRecord
from env.live import LiveSystem
from env.system import StepResult

__all__ = ["Session"]

log = logging.getLogger(__name__)

# A deployment may run for months; its percentiles are of the last requests.
_KEPT_LATENCIES = 200_000
_KEPT_DECISIONS = 10_000


class Session:
    """The control loop over running nodes.

    Args:
        system: The running nodes.
        controller: Who decides.
        telemetry: Told of every interval; what metrics and the live page read.
    """

    def __init__(
        self, system: LiveSystem, controller: Controller, telemetry: Telemetry | None = None
    ) -> None:
        self.system, self.controller = system, controller
        model = system.model
        self.cost = Cost(model.profile, model.references, model.scenario)
        self._first_profile = model.profile
        self.total = IntervalRecord.zeros(1, model.profile.n_nodes)
        self.latencies_s: collections.deque[float] = collections.deque(maxlen=_KEPT_LATENCIES)
        self.decide_s: collections.deque[float] = collections.deque(maxlen=_KEPT_DECISIONS)
        self.decisions = self.switches = 0
        self.interrupted = False
        self.telemetry = telemetry or Telemetry()
        self.telemetry.begin(model, controller.name, system.rate_rps)
        self._plan: tuple[int, ...] = ()

    def run(
        self, duration_s: float, seed: int, show: Callable[[Decision, StepResult], None]
    ) -> None:
        """Serve for `duration_s` seconds (0: until told to end), then finish what is open.

        Ctrl-C or SIGTERM ends the loop after the interval; a second one interrupts at once.
        """
        system = self.system
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(*_: object) -> None:
            self.interrupted = True
            restore()

        for number in before:
            signal.signal(number, stop)
        try:
            state, last = system.reset(seed), None
            self.controller.reset(system.model, 1)
            while not self.interrupted and (not duration_s or system.time_s < duration_s - 1e-9):
                begun = time.perf_counter()
                decision = self.controller.decide(state, last)
                decide_s = time.perf_counter() - begun
                by, reason = self.decider()
                last = system.step(decision.cuts, decision.probe_bytes)
                state = last.state
                self._add(last)
                self._decided(decision, decide_s)
                self._tell(decision, decide_s, by, reason, last)
                show(decision, last)
            self.telemetry.drain()
            log.info("finishing what is open", extra={"in_flight": system.client.in_flight})
            rest = system.drain_completed()
            self._add(rest)
            self.telemetry.end(rest, self.cost)
        finally:
            restore()

    def decider(self) -> tuple[str, str]:
        """Who made the last decision, and why not the policy, if it was not."""
        if isinstance(self.controller, GuardedController):
            reason = self.controller.reason
            return ("solver", reason) if reason else ("policy", "")
        return self.controller.name, ""

    def _decided(self, decision: Decision, decide_s: float) -> None:
        plan = tuple(map(int, decision.cuts[0]))
        self.switches += bool(self.decisions) and plan != self._plan
        self.decisions += 1
        self.decide_s.append(decide_s)
        self._plan = plan

    def _tell(
        self, decision: Decision, decide_s: float, by: str, reason: str, result: StepResult
    ) -> None:
        """Hand the interval to the telemetry and the log."""
        self.telemetry.add(
            time_s=self.system.time_s,
            plan=self._plan,
            by=by,
            reason=reason,
            decide_s=decide_s,
            result=result,
            cost=self.cost,
            statuses=self.system.client.status(),
        )
        record = result.record
        done = int(record.completed[0])
        log.info(
            "interval",
            extra={
                "cuts": list(self._plan),
                "by": by,
                "reason": reason,
                "arrived": int(record.arrived[0]),
                "completed": done,
                "lost": int(record.lost[0]),
                "in_flight": int(result.state.in_flight[0]),
                "latency_mean_s": float(record.latency_sum_s[0]) / done if done else None,
            },
        )

    def _add(self, result: StepResult) -> None:
        self.total.add(result.record)
        if result.completed is not None:
            done = result.completed
            ran = ~done.lost
            self.latencies_s.extend((done.completion_s - done.arrival_s)[ran].tolist())

    def log(self, writer: SummaryWriter, result: StepResult) -> None:
        """Write the interval's system/ and guard/ scalars."""
        step = self.decisions
        log_system(writer, step, result)
        cost = float(self.cost(result.record, self.system.n_ref)[0])
        writer.add_scalar("deploy/reward", -cost, step)
        if isinstance(self.controller, GuardedController):
            count = sum(self.controller.fallbacks.values())
            writer.add_scalar("guard/fallbacks", count, step)
            writer.add_scalar("guard/solver_decides", float(bool(self.controller.reason)), step)

    def _recalibration(self) -> dict[str, Any]:
        """What the profile has become: nodes, times as slow as at first; hops, ms per frame."""
        first, now = self._first_profile, self.system.model.profile
        return {
            "node_factors": {
                a.name: round(sum(b.unit_s) / max(sum(a.unit_s), 1e-9), 4)
                for a, b in zip(first.nodes, now.nodes, strict=True)
            },
            "frame_overhead_ms": [round(1e3 * hop.frame_overhead_s, 3) for hop in now.hops],
        }

    def summary(self) -> dict[str, Any]:
        """What was served and what it cost, as plain data."""
        total, model = self.total, self.system.model
        energy, served = self.cost.energy(total), max(1, int(total.completed[0]))
        latency = np.array(self.latencies_s or [float("nan")]) * 1e3
        fallbacks: dict[str, int] = {}
        if isinstance(self.controller, GuardedController):
            fallbacks = dict(self.controller.fallbacks)
        return {
            "model": model.profile.spec.name,
            "controller": self.controller.name,
            "seconds": round(self.system.time_s, 3),
            "interval_s": model.scenario.interval_s,
            "meters": sorted({node.meter for node in model.profile.nodes}),
            "latency_ms": {
                "mean": float(latency.mean()),
                **{f"p{q}": float(np.percentile(latency, q)) for q in (50, 95, 99)},
            },
            "energy_j_per_request": {
                "full": {
                    "edge": float(energy.edge_full_j[0]) / served,
                    "total": float(energy.total_full_j[0]) / served,
                },
                "compute": {
                    "edge": float(energy.edge_compute_j[0]) / served,
                    "total": float(energy.total_compute_j[0]) / served,
                },
            },
            "cost_per_request": float(self.cost(total, np.ones(1))[0])
            / max(1, int(total.arrived[0])),
            "requests": {
                "submitted": int(total.arrived[0]),
                "completed": int(total.completed[0]),
                "lost": int(total.lost[0]),
                "late": int(total.late[0]),
            },
            "decisions": self.decisions,
            "per_request": self.system.glance is not None,
            "switches": self.switches,
            "decide_us": float(np.median(self.decide_s or [0.0]) * 1e6),
            "fallbacks": fallbacks,
            "recalibration": self._recalibration(),
            "interrupted": self.interrupted,
        }
