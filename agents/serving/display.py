"""What a deployment shows in a terminal: the live table, a line per interval, the summary."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from agents.arms.controllers import Decision
from agents.serving.session import Session
from agents.serving.telemetry import describe_plan
from env.system import StepResult

__all__ = ["live_line", "live_table", "summary_table"]


def live_table(session: Session, decision: Decision, result: StepResult) -> Table:
    """The state of the deployment after an interval."""
    model, state, record = session.system.model, result.state, result.record
    profile = model.profile
    names = [node.name for node in profile.nodes]
    cuts = tuple(map(int, decision.cuts[0]))
    reason = getattr(session.controller, "reason", "")
    table = Table(title=f"splitpilot: {profile.spec.name}, {session.controller.name}")
    table.add_column("what")
    table.add_column("now", min_width=58)
    table.add_row("time", f"{session.system.time_s:.0f} s")
    table.add_row("split (units)", describe_plan(cuts, names, profile.spec.n_units))
    hops = [
        f"{names[h]}-{names[h + 1]} {state.bytes_per_s[0, h] * 8e-6:.1f} Mbit/s "
        f"({state.bandwidth_age_s[0, h]:.1f} s old)"
        for h in range(len(profile.hops))
    ]
    table.add_row("bandwidth", ", ".join(hops))
    queues = [f"{name} {state.node_backlog_s[0, k] * 1e3:.0f} ms" for k, name in enumerate(names)]
    table.add_row("queues", ", ".join(queues) + f", {state.in_flight[0]:.0f} in flight")
    loads = [f"{name} {state.node_load[0, k]:.0%}" for k, name in enumerate(names)]
    table.add_row("load by others", ", ".join(loads))
    done = int(record.completed[0])
    mean = f"{record.latency_sum_s[0] / done * 1e3:.0f} ms mean" if done else "none completed"
    recent = np.array(list(session.latencies_s)[-100:] or [float("nan")]) * 1e3
    table.add_row("latency", f"{mean}; last 100: p95 {np.percentile(recent, 95):.0f} ms")
    energy = session.cost.energy(session.total)
    served = max(1, int(session.total.completed[0]))
    table.add_row(
        "energy per request",
        f"edge {energy.edge_full_j[0] / served:.2f} J, "
        f"total {energy.total_full_j[0] / served:.2f} J (power model, full)",
    )
    table.add_row(
        "requests",
        f"{session.total.arrived[0]} in, {session.total.completed[0]} done, "
        f"{session.total.lost[0]} lost, {session.total.late[0]} late",
    )
    table.add_row(
        "decisions",
        f"{session.decisions} ({session.switches} switches), "
        f"{np.median(session.decide_s) * 1e6:.0f} us each"
        + (f"; solver decides: {reason}" if reason else ""),
    )
    return table


def live_line(session: Session, decision: Decision, result: StepResult) -> str:
    """The same in a line, for a log."""
    model, record = session.system.model, result.record
    names = [node.name for node in model.profile.nodes]
    cuts = tuple(map(int, decision.cuts[0]))
    done = int(record.completed[0])
    latency = f"{record.latency_sum_s[0] / done * 1e3:.0f} ms" if done else "-"
    rates = "/".join(f"{r * 8e-6:.1f}" for r in result.state.bytes_per_s[0])
    return (
        f"{session.system.time_s:6.1f} s | {describe_plan(cuts, names, model.profile.spec.n_units)}"
        f" | {rates} Mbit/s | {result.state.in_flight[0]:.0f} in flight | {done} done, {latency}"
    )


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary for the terminal."""
    table = Table(title=f"{summary['model']}, {summary['controller']}: summary", show_header=False)
    latency, energy = summary["latency_ms"], summary["energy_j_per_request"]["full"]
    requests = summary["requests"]
    again = ", and one for each request" if summary["per_request"] else ""
    table.add_row("served", f"{summary['seconds']:.0f} s, {summary['decisions']} decisions{again}")
    table.add_row("requests", ", ".join(f"{v} {k}" for k, v in requests.items()))
    table.add_row("latency, ms", ", ".join(f"{k} {v:.0f}" for k, v in latency.items()))
    table.add_row(
        "energy per request", f"edge {energy['edge']:.3f} J, total {energy['total']:.3f} J (full)"
    )
    table.add_row("cost per request", f"{summary['cost_per_request']:.3f}")
    table.add_row("switches", f"{summary['switches']}")
    table.add_row("decision", f"{summary['decide_us']:.0f} us (median)")
    if summary["fallbacks"]:
        table.add_row("fall-backs", ", ".join(f"{k}: {v}" for k, v in summary["fallbacks"].items()))
    return table
