"""Shows comparison results: a table on the terminal, a figure for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from agents.report.verdicts import ratio as cost_ratio
from executor.figures import load_pyplot, save_figure

__all__ = ["TABLE_WIDTH", "plot", "simulated_table", "table"]

TABLE_WIDTH = 146
COLUMNS = (
    "cost",
    "x static (95 %)",
    "mean ms",
    "p95",
    "p99",
    "edge J",
    "total J",
    "lost %",
    "late %",
    "switches",
)


def table(title: str, arms: dict[str, Any]) -> Table:
    """The arms side by side, one row each; costs against `static` with 95 % intervals.

    Where the oracle takes part, against the oracle too.
    """
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.padding = (0, 1, 0, 0)
    out.add_column("arm", no_wrap=True)
    for column in COLUMNS:
        out.add_column(column, justify="right", no_wrap=True)
    known = any("regret" in arm for arm in arms.values())
    if known:
        out.add_column("x oracle (95 %)", justify="right", no_wrap=True)
    for name, arm in arms.items():
        ratio = arm["versus_static"]["cost_ratio"]
        latency, energy = arm["latency_ms"], arm["energy_j"]["full"]
        requests = arm["requests"]
        submitted = max(requests["submitted"], 1)
        out.add_row(
            name,
            f"{arm['cost']:.3f}",
            _interval(ratio),
            f"{latency['mean']:.0f}",
            f"{latency['p95']:.0f}",
            f"{latency['p99']:.0f}",
            f"{energy['edge']:.3f}",
            f"{energy['total']:.3f}",
            f"{100 * requests['lost'] / submitted:.2f}",
            f"{100 * requests['late'] / submitted:.2f}",
            str(arm["switches"]),
            *([_interval(arm["regret"])] if known else []),
        )
    return out


def simulated_table(title: str, part: dict[str, Any]) -> Table:
    """What arms cost on the nodes and in the simulator under the same conditions, side by side.

    Ratios are to the solver where it took part, else to `static`.

    Args:
        title: Above it.
        part: One rate of a comparison on the testbed, `simulated` included.
    """
    arms, simulated = part["arms"], part["simulated"]["arms"]
    other = "solver" if "solver" in arms else "static"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.padding = (0, 1, 0, 0)
    out.add_column("arm", no_wrap=True)
    heads = ("cost", "simulated", f"x {other} (95 %)", "simulated (95 %)")
    for column in heads:
        out.add_column(column, justify="right", no_wrap=True)
    for name, found in simulated.items():
        ratios = ["", ""]
        if name != other:
            ratios = [_interval(r) for r in (cost_ratio(arms, name, other), found["versus"][other])]
        out.add_row(name, f"{arms[name]['cost']:.3f}", f"{found['cost']:.3f}", *ratios)
    return out


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['mean']:.3f} ({ratio['low']:.3f}..{ratio['high']:.3f})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency and energy per arm, two panels with 95 % intervals, one group per rate.

    Args:
        result: What `agents.evaluate` writes as JSON.
        path: Image file; its suffix says the format.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = load_pyplot()
    names = list(result["arms"])
    rates = list(result["by_rate"])
    panels = (
        ("latency_ms", "mean latency, ms"),
        ("energy_total_j", "energy per request, J (full)"),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, (key, label) in zip(axes, panels, strict=True):
        for k, rate in enumerate(rates):
            values = [result["by_rate"][rate]["arms"][name]["ci95"][key] for name in names]
            mean = [v["mean"] for v in values]
            # Rounding may put a mean a hair outside the interval of equal values.
            low = [max(v["mean"] - v["low"], 0.0) for v in values]
            high = [max(v["high"] - v["mean"], 0.0) for v in values]
            position = [x + (k - (len(rates) - 1) / 2) * 0.2 for x in range(len(names))]
            axis.errorbar(
                position, mean, yerr=[low, high], fmt="o", capsize=3, label=f"{rate} of capacity"
            )
        axis.set_ylabel(label)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")  # queues that overflow are orders of magnitude slower
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[0].yaxis.set_minor_formatter("{x:.0f}")
    axes[1].set_ylim(0.0, 1.1 * axes[1].get_ylim()[1])
    if len(rates) > 1:
        axes[0].legend(frameon=False)
    runs = "one run" if result["seeds"] == 1 else f"{result['seeds']} seeds, 95 % intervals"
    at = "" if len(rates) > 1 else f", {rates[0]} of capacity"
    figure.suptitle(f"{result['model']}, {result['backend']}{at}, {runs}")
    save_figure(figure, path)
