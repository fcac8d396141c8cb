"""What the measurements say: percentiles, ratios to the floor, a table, JSON and a figure."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from executor.bench.measure import CaseResult, SystemResult
from executor.figures import load_pyplot, save_figure

__all__ = ["OURS", "facts", "plot", "summary", "table"]

OURS = "executor"
_POINTS = (50, 95, 99)


def facts() -> dict[str, Any]:
    """What the figures depend on."""
    import os

    import torch
    import zmq

    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zmq": zmq.zmq_version(),
    }


def summary(case: CaseResult) -> dict[str, Any]:
    """A case as plain data; times in seconds.

    The floor of a request is its own stages' time plus the wire's; `overhead_s` is the median of
    what was above it, request by request.
    """
    return {
        "case": case.name,
        "n_nodes": case.n_nodes,
        "plan": list(case.plan),
        "down_bytes": list(case.down_bytes),
        "output_bytes": case.output_bytes,
        "wire_s": case.wire_s,
        "systems": {name: _system(s, case.wire_s) for name, s in case.systems.items()},
        "skipped": dict(case.skipped),
    }


def _system(system: SystemResult, wire_s: float) -> dict[str, Any]:
    latency = np.array(system.latency_s)
    floor = np.array(system.stage_s) + wire_s
    values: dict[str, Any] = {"requests": len(latency), "wrong": system.wrong}
    for point in _POINTS:
        values[f"p{point}_s"] = float(np.percentile(latency, point))
        values[f"floor_p{point}_s"] = float(np.percentile(floor, point))
    values["overhead_s"] = float(np.median(latency - floor))
    for point in (50, 99):
        values[f"p{point}_over_floor"] = values[f"p{point}_s"] / values[f"floor_p{point}_s"]
    values["memory_mib"] = [round(memory, 1) for memory in system.memory_mib]
    values["throughput"] = {
        str(k): {
            "rate_rps": float(np.median(rates)),
            "of_bound": float(np.median(np.divide(rates, system.bound_rps[k]))),
        }
        for k, rates in system.rate_rps.items()
    }
    return values


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as text, a line per system."""
    lines = []
    for case in cases:
        crossings = ", ".join(f"{n / 1024:.0f}" for n in case["down_bytes"])
        lines.append(
            f"{case['case']}: plan {tuple(case['plan'])}, {crossings} KiB down, "
            f"{case['output_bytes'] / 1024:.0f} KiB back; wire {case['wire_s'] * 1e3:.2f} ms"
        )
        lines.append(
            f"  {'ms':14} {'p50':>8} {'p95':>8} {'p99':>8} {'floor':>8} {'above':>7}"
            f" {'p50/fl':>6} {'p99/fl':>6}  MiB"
        )
        for name, s in case["systems"].items():
            ms = [1e3 * s[key] for key in ("p50_s", "p95_s", "p99_s", "floor_p50_s")]
            memory = "/".join(f"{m:.0f}" for m in s["memory_mib"])
            lines.append(
                f"  {name:14} "
                + " ".join(f"{value:8.2f}" for value in ms)
                + f" {1e3 * s['overhead_s']:7.2f} {s['p50_over_floor']:6.3f}"
                + f" {s['p99_over_floor']:6.3f}  {memory}"
                + (f"  {s['wrong']} of {s['requests']} WRONG" if s["wrong"] else "")
            )
        for name, s in case["systems"].items():
            if s["throughput"]:
                rates = "; ".join(
                    f"{k} in flight {t['rate_rps']:.2f}/s ({t['of_bound']:.2f} of the bound)"
                    for k, t in s["throughput"].items()
                )
                lines.append(f"  {name:14} {rates}")
        lines += [f"  {name:14} skipped: {why}" for name, why in case["skipped"].items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Style:
    color: str
    marker: str


_STYLES = (
    _Style("#1b6ca8", "o"),
    _Style("#c1553b", "s"),
    _Style("#7a8f3c", "^"),
    _Style("#8a6bb0", "D"),
    _Style("#666666", "v"),
)


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw latency over size for the echoes, and what is above the floor for the models.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = load_pyplot()
    echoes = [case for case in cases if case["case"].startswith("echo")]
    models = [case for case in cases if not case["case"].startswith("echo")]
    names = list(dict.fromkeys(name for case in cases for name in case["systems"]))
    styles = dict(zip(names, _STYLES, strict=False))
    widths = [1.0 if echoes else 0.01, 1.3 if models else 0.01]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4), width_ratios=widths, layout="constrained"
    )
    for name in names if echoes else ():
        points = [
            (case["output_bytes"] / 1024, 1e3 * case["systems"][name]["p50_s"])
            for case in echoes
            if name in case["systems"]
        ]
        style = styles[name]
        left.plot(*zip(*points, strict=True), label=name, color=style.color, marker=style.marker)
    if echoes:
        floors = [
            (c["output_bytes"] / 1024, 1e3 * next(iter(c["systems"].values()))["floor_p50_s"])
            for c in echoes
        ]
        left.plot(*zip(*floors, strict=True), label="floor", color="black", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="tensor, KiB", ylabel="ms, median")
    left.set_title("echo through three processes and back", fontsize=10)
    left.legend(fontsize=8)
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        at = [i for i, case in enumerate(models) if name in case["systems"]]
        heights = [1e3 * models[i]["systems"][name]["overhead_s"] for i in at]
        right.bar([i + k * width for i in at], heights, width, color=styles[name].color, label=name)
    right.set_xticks([i + 0.4 - width / 2 for i in range(len(models))])
    right.set_xticklabels([case["case"].replace(", ", "\n") for case in models], fontsize=7)
    right.set(ylabel="ms above the floor, median")
    right.set_title("what it costs besides stages and wire", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
