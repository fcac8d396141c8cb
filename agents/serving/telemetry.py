"""What a deployment tells of itself: the plain data behind its metrics and its live page.

The control loop adds one interval at a time; HTTP threads read. Everything kept is bounded.
"""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.system import StepResult
from executor._counters import LATENCY_BOUNDS_S, STAGE_BOUNDS_S, Histogram
from executor._records import NodeStatus

__all__ = ["Telemetry", "Totals", "describe_plan"]

_HISTORY = 600
_EVENTS = 50
# Percentiles and energy of the live page are over the last intervals, so that they do not jump.
_WINDOW = 10
# An interval that ends so much later than it should means that the loop is stuck.
_LATE_S = 5.0


@dataclass
class Totals:
    """Counted since the start.

    Attributes:
        record: What all intervals spent.
        latency_s: Completed requests by latency.
        decide_s: Decisions by the time they took.
        decisions: Decisions by who made them and why ("" for the policy, or without a reason).
        switches: Changes of the plan.
        cost: Sum of the requests' cost; 1.1 is about one edge-only request, unloaded.
        energy_j: Joules by (scope, accounting).
    """

    record: IntervalRecord
    latency_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    decide_s: Histogram = field(default_factory=lambda: Histogram(STAGE_BOUNDS_S))
    decisions: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    switches: int = 0
    cost: float = 0.0
    energy_j: dict[tuple[str, str], float] = field(default_factory=dict)


class Telemetry:
    """The newest interval, a bounded history, and totals; thread-safe.

    Attributes:
        state: `starting`, `serving`, `draining` or `ended`.
        run_id: Tells a page that the agent was started anew.
    """

    def __init__(self) -> None:
        """Nothing is known yet; `begin` says what is deployed."""
        self.state = "starting"
        self.run_id = f"{time.time():.3f}"
        self._lock = threading.Lock()
        self._about: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._totals: Totals | None = None
        self._points: collections.deque[dict[str, Any]] = collections.deque(maxlen=_HISTORY)
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_EVENTS)
        self._latencies: collections.deque[list[float]] = collections.deque(maxlen=_WINDOW)
        self._spent: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=_WINDOW)
        self._added_s = time.monotonic()

    def begin(self, model: CostModel, controller: str, rate_rps: float) -> None:
        """The nodes run and are profiled; serving starts."""
        profile, spec = model.profile, model.profile.spec
        with self._lock:
            self.state, self._added_s = "serving", time.monotonic()
            self._totals = Totals(IntervalRecord.zeros(1, profile.n_nodes))
            self._about = {
                "model": spec.name,
                "controller": controller,
                "interval_s": model.scenario.interval_s,
                "rate_rps": rate_rps,
                "deadline_s": model.references.deadline_s,
                "units": list(spec.unit_names),
                "cut_bytes": list(spec.cut_bytes),
                "nodes": [
                    {"name": n.name, "device": n.power.device, "meter": n.meter}
                    for n in profile.nodes
                ],
            }

    def add(
        self,
        *,
        time_s: float,
        plan: tuple[int, ...],
        by: str,
        reason: str,
        decide_s: float,
        result: StepResult,
        cost: Cost,
        statuses: Mapping[int, NodeStatus],
    ) -> None:
        """Take an interval.

        Args:
            time_s: The system's time at its end.
            plan: The cuts that requests of the interval carried.
            by: Who decided: `policy`, `solver`, or a controller's name.
            reason: Why the solver had to; "" where nothing was wrong.
            decide_s: Seconds the decision took.
            result: What the interval gave.
            cost: The cost function, per request.
            statuses: Every node's newest heartbeat.
        """
        now_s = time.monotonic()
        with self._lock:
            assert self._totals is not None
            previous = self._now
            if previous and tuple(previous["cuts"]) != plan:
                self._totals.switches += 1
            self._totals.decisions[by, reason] += 1
            self._totals.decide_s.add(decide_s)
            self._count(result, cost)
            state, names = result.state, [node["name"] for node in self._about["nodes"]]
            self._now = {
                "time_s": time_s,
                "cuts": list(plan),
                "split": describe_plan(plan, names, len(self._about["units"])),
                "by": by,
                "reason": reason,
                "in_flight": int(state.in_flight[0]),
                "arrival_rps": _finite(state.arrival_rps[0]),
                "nodes": [
                    _node(statuses.get(k), state.node_load[0, k], state.node_backlog_s[0, k], now_s)
                    for k in range(len(names))
                ],
                "hops": [
                    {
                        "bytes_per_s": _finite(state.bytes_per_s[0, h]),
                        "age_s": _finite(state.bandwidth_age_s[0, h]),
                        "rtt_s": _finite(state.rtt_s[0, h]),
                        "backlog_bytes": _finite(state.hop_backlog_bytes[0, h]),
                    }
                    for h in range(len(names) - 1)
                ],
            }
            self._points.append(self._point(result.record, cost))
            changed = not previous or any(previous[k] != self._now[k] for k in _DECISION)
            if changed:
                self._events.append({"time_s": time_s, **{k: self._now[k] for k in _DECISION}})
            self._added_s = now_s

    def drain(self) -> None:
        """No more requests are submitted; those open are finished."""
        self.state = "draining"

    def end(self, rest: StepResult, cost: Cost) -> None:
        """What draining gave; nothing comes after it."""
        with self._lock:
            self._count(rest, cost)
            if self._now:
                self._now["in_flight"] = 0
            self.state = "ended"

    def page(self, since: int) -> dict[str, Any]:
        """What the live page shows; of the history only the points numbered above `since`."""
        with self._lock:
            values: dict[str, Any] = {
                "run": self.run_id,
                "state": self.state,
                "about": self._about,
                "now": self._now,
                "points": [p for p in self._points if p["n"] > since],
                "events": list(self._events),
            }
            if self._totals is not None:
                record = self._totals.record
                values["totals"] = {
                    **{k: int(getattr(record, k)[0]) for k in _COUNTS},
                    "decisions": sum(self._totals.decisions.values()),
                    "switches": self._totals.switches,
                    "fallbacks": _fallbacks(self._totals),
                }
            return values

    def metrics(self) -> tuple[dict[str, Any], dict[str, Any], Totals] | None:
        """What is deployed, the newest interval, and totals that do not change; None before."""
        with self._lock:
            if self._totals is None or not self._now:
                return None
            totals = self._totals
            record = IntervalRecord.zeros(1, len(self._about["nodes"]))
            record.add(totals.record)
            twin = Totals(
                record,
                totals.latency_s.copy(),
                totals.decide_s.copy(),
                totals.decisions.copy(),
                totals.switches,
                totals.cost,
                dict(totals.energy_j),
            )
            return self._about, self._now, twin

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether all is well, and the facts."""
        with self._lock:
            status, reason = self.state, ""
            nodes = self._now.get("nodes", [])
            behind_s = time.monotonic() - self._added_s
            if status == "serving":
                late_s = behind_s - self._about["interval_s"]
                if late_s > _LATE_S:
                    status = "stuck"
                    reason = f"the last interval ended {behind_s:.1f} s ago"
                elif nodes and nodes[0]["down"]:
                    status = "next node silent"
                    reason = f"node {self._about['nodes'][0]['name']} is silent"
            facts: dict[str, Any] = {"status": status, "reason": reason}
            if self._now:
                facts |= {k: self._now[k] for k in ("time_s", "split", "in_flight")}
                facts["last_interval_ago_s"] = behind_s
                facts["decided_by"] = self._now["by"]
                facts["fallback_reason"] = self._now["reason"]
                facts["nodes"] = [
                    {"name": about["name"], **node}
                    for about, node in zip(self._about["nodes"], nodes, strict=True)
                ]
            return status == "serving", facts

    def _count(self, result: StepResult, cost: Cost) -> None:
        """Add an interval to the totals and to the windows."""
        totals, record = self._totals, result.record
        assert totals is not None
        totals.record.add(record)
        totals.cost += float(cost(record, np.ones(1))[0])
        energy = cost.energy(record)
        spent = {
            ("edge", "full"): energy.edge_full_j,
            ("total", "full"): energy.total_full_j,
            ("edge", "compute"): energy.edge_compute_j,
            ("total", "compute"): energy.total_compute_j,
        }
        for key, joules in spent.items():
            totals.energy_j[key] = totals.energy_j.get(key, 0.0) + float(joules[0])
        latencies: list[float] = []
        if result.completed is not None:
            done = result.completed
            ran = ~done.lost
            latencies = (done.completion_s - done.arrival_s)[ran].tolist()
        totals.latency_s.add(*latencies)
        self._latencies.append(latencies)
        self._spent.append(
            (
                int(record.completed[0]),
                float(energy.edge_full_j[0]),
                float(energy.total_full_j[0]),
            )
        )

    def _point(self, record: IntervalRecord, cost: Cost) -> dict[str, Any]:
        """The interval as a point of the curves."""
        assert self._totals is not None
        window = np.array([s for latencies in self._latencies for s in latencies])
        p50, p95 = np.percentile(window, (50, 95)) if len(window) else (None, None)
        completed = sum(n for n, _, _ in self._spent)
        edge, total = (sum(spent[i] for spent in self._spent) for i in (1, 2))
        arrived = int(record.arrived[0])
        return {
            "n": sum(self._totals.decisions.values()),
            "time_s": self._now["time_s"],
            "p50_s": _finite(p50),
            "p95_s": _finite(p95),
            "edge_j": edge / completed if completed else None,
            "total_j": total / completed if completed else None,
            "cost": float(cost(record, np.ones(1))[0]) / arrived if arrived else None,
            "in_flight": self._now["in_flight"],
            "bytes_per_s": [hop["bytes_per_s"] for hop in self._now["hops"]],
            "cuts": self._now["cuts"],
            "fallback": bool(self._now["reason"]),
        }


_DECISION = ("cuts", "split", "by", "reason")
_COUNTS = ("arrived", "completed", "lost", "late")


def describe_plan(cuts: Sequence[int], names: Sequence[str], n_units: int) -> str:
    """A plan in words, e.g. `edge 0-3 | fog relays | cloud 3-21`."""
    bounds = (0, *cuts, n_units)
    parts = []
    for k, name in enumerate(names):
        if bounds[k] < bounds[k + 1]:
            parts.append(f"{name} {bounds[k]}-{bounds[k + 1]}")
        elif bounds[k] < n_units:
            parts.append(f"{name} relays")
    return " | ".join(parts)


def _node(status: NodeStatus | None, load: float, backlog_s: float, now_s: float) -> dict[str, Any]:
    """A node as its last heartbeat left it."""
    heard = status is not None and math.isfinite(status.received_s)
    return {
        "load": _finite(load),
        "backlog_s": _finite(backlog_s),
        "queue_len": status.queue_len if status is not None else 0,
        "down": status.down if status is not None else True,
        "heard_ago_s": max(0.0, now_s - status.received_s) if heard and status else None,
        "refused": status.refused if status is not None else 0,
    }


def _fallbacks(totals: Totals) -> dict[str, int]:
    return {reason: n for (_, reason), n in totals.decisions.items() if reason}


def _finite(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
