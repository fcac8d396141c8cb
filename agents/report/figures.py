"""The report's figures, as SVG text; each is drawn from results in plain numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.report.verdicts import ratio
from executor.figures import load_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "arms_figure",
    "energy_figure",
    "front_figure",
    "latency_figure",
    "pace_figure",
    "regret_figure",
    "scatter_figure",
    "trajectory_figure",
]

Arms = Mapping[str, Any]

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "splitpilot",  # the same results give the same bytes
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3c4650",
    "xtick.color": "#5a6570",
    "ytick.color": "#3c4650",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "legend.frameon": False,
}
COLOURS = {
    "edge": "#9aa5b1", "fog": "#7b8794", "cloud": "#52606d", "static": "#c9a227",
    "best-static": "#8d6a00", "paper": "#f08c5a", "paper-1s": "#d9480f",
    "paper-constrained": "#f7b899", "paper-1s-constrained": "#b5651d", "solver": "#4dabf7",
    "predictive": "#1971c2", "mpc": "#0b7285",
    "linucb": "#7048e8", "policy-zeroed": "#74c0fc", "policy-greedy": "#69db7c",
    "policy": "#2b8a3e",
    "guarded": "#0b5d2a", "policy-all": "#37b24d", "oracle": "#212529",
}  # fmt: skip
GROUPS = ("#1971c2", "#d9480f", "#2b8a3e", "#7048e8", "#c9a227", "#52606d")
NODES = ("#4dabf7", "#ffd43b", "#ff8787", "#b197fc", "#8ce99a", "#ced4da")
MARKERS = "osD^vPX*<>hp"


def _figure(**size: Any) -> Figure:
    """An empty figure.

    Raises:
        ConfigError: matplotlib is missing.
    """
    load_pyplot()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **size)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with _styled():
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()


def _styled() -> Any:
    return load_pyplot().rc_context(STYLE)


def _colour(name: str) -> str:
    return COLOURS.get(name, "#495057")


def _bars(values: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far their intervals reach to either side.

    Rounding may put a mean a hair outside the interval of equal values.
    """
    low = [max(v["mean"] - v["low"], 0.0) for v in values]
    high = [max(v["high"] - v["mean"], 0.0) for v in values]
    return [v["mean"] for v in values], [low, high]


def _log_if_wide(axis: Axes, values: Sequence[float], which: str = "x") -> None:
    """A logarithmic axis with plain numbers where values differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 6 * min(positive):
        return
    decades = np.log10(max(positive) / min(positive))
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    ruler = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ruler.set_major_locator(LogLocator(subs=subs))
    ruler.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ruler.set_minor_formatter(NullFormatter())


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def arms_figure(groups: Mapping[str, Arms], reference: str) -> str:
    """Cost per request, and against the reference and `static`, a row per arm, a colour per group.

    Args:
        groups: Label -> arms (rates, or kinds of hops).
        reference: The arm of the middle panel.
    """
    names = list(next(iter(groups.values())))
    panels: list[tuple[str, Any]] = [
        ("cost per request", lambda arms, name: arms[name]["ci95"]["cost"]),
        (f"cost / {reference}", lambda arms, name: ratio(arms, name, reference)),
    ]
    if reference != "static":
        panels.append(("cost / static", lambda arms, name: ratio(arms, name, "static")))
    with _styled():
        height = 1.1 + len(names) * max(0.3, 0.14 * len(groups))
        figure = _figure(figsize=(10.5, height))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (label, value) in zip(axes, panels, strict=True):
            everything: list[float] = []
            for k, (group, arms) in enumerate(groups.items()):
                values = [value(arms, name) for name in names]
                mean, reach = _bars(values)
                everything += mean
                rows = [
                    r + (k - (len(groups) - 1) / 2) * 0.7 / len(groups) for r in range(len(names))
                ]
                axis.errorbar(
                    mean, rows, xerr=reach, fmt="o", ms=4, capsize=2.5, lw=1.2,
                    color=GROUPS[k % len(GROUPS)], label=group,
                )  # fmt: skip
            _log_if_wide(axis, everything)
            if "/" in label:
                axis.axvline(1.0, color="#868e96", lw=1, ls="--")
            axis.set_xlabel(label)
            _name_rows(axis, names)
        if len(groups) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
        return _svg(figure)


def latency_figure(groups: Mapping[str, Arms]) -> str:
    """p50, p95 and p99 of every arm, a panel per group."""
    names = list(next(iter(groups.values())))
    with _styled():
        figure = _figure(figsize=(10.5, 1.2 + 0.3 * len(names)))
        axes = figure.subplots(1, len(groups), sharey=True, sharex=True, squeeze=False)[0]
        for axis, (group, arms) in zip(axes, groups.items(), strict=True):
            everything = []
            for row, name in enumerate(names):
                p = [arms[name]["latency_ms"][q] for q in ("p50", "p95", "p99")]
                everything += p
                axis.plot([p[0], p[2]], [row, row], color=_colour(name), lw=2.2, alpha=0.45)
                for value, marker in zip(p, "o|>", strict=True):
                    axis.plot(value, row, marker, color=_colour(name), ms=6, mew=2)
            _log_if_wide(axis, everything)
            axis.set_title(group, fontsize=10)
            _name_rows(axis, names)
        figure.supxlabel("latency, ms:  ● p50   | p95   ▶ p99", fontsize=9.5)
        return _svg(figure)


def energy_figure(arms: Arms) -> str:
    """Joules per completed request, the edge's share apart, in both accountings."""
    names = list(arms)
    with _styled():
        figure = _figure(figsize=(10.5, 1.2 + 0.3 * len(names)))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, accounting in zip(axes, ("full", "compute"), strict=True):
            edge = [arms[n]["energy_j"][accounting]["edge"] for n in names]
            total = [arms[n]["energy_j"][accounting]["total"] for n in names]
            rest = [t - e for t, e in zip(total, edge, strict=True)]
            rows = range(len(names))
            axis.barh(rows, edge, color="#4dabf7", label="edge", height=0.6)
            axis.barh(rows, rest, left=edge, color="#ced4da", label="other nodes", height=0.6)
            for row, value in enumerate(total):
                axis.text(value, row, f" {value:.2f}", va="center", fontsize=8, color="#3c4650")
            axis.set_xlim(0, 1.12 * max(total))
            axis.set_xlabel(f"J per request, {accounting}")
            _name_rows(axis, names)
        axes[1].legend(loc="lower right")
        return _svg(figure)


def front_figure(groups: Mapping[str, Arms]) -> str:
    """Mean latency against total energy, the arms no other beats in both joined by a line."""
    names = list(next(iter(groups.values())))
    with _styled():
        figure = _figure(figsize=(10.5, 4.0))
        axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for axis, (group, arms) in zip(axes, groups.items(), strict=True):
            points = {n: arms[n]["ci95"] for n in names}
            for k, name in enumerate(names):
                x, y = points[name]["latency_ms"], points[name]["energy_total_j"]
                (xm,), xr = _bars([x])
                (ym,), yr = _bars([y])
                axis.errorbar(
                    xm, ym, xerr=xr, yerr=yr, fmt=MARKERS[k % len(MARKERS)], ms=6, lw=1,
                    color=_colour(name), label=name,
                )  # fmt: skip
            at = sorted(
                (p["latency_ms"]["mean"], p["energy_total_j"]["mean"])
                for n, p in points.items()
                if n != "oracle"
            )
            front = [p for p in at if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in at)]
            axis.plot(*zip(*front, strict=True), color="#868e96", lw=1, ls=":", zorder=0)
            _log_if_wide(axis, [p[0] for p in at])
            axis.set_title(group, fontsize=10)
            axis.set_xlabel("mean latency, ms")
        axes[0].set_ylabel("energy per request, J (full)")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8.5
        )
        return _svg(figure)


def regret_figure(families: Mapping[str, Arms]) -> str:
    """Every arm's cost over the oracle's, by family of conditions."""
    names = [n for n in next(iter(families.values())) if n != "oracle"]
    with _styled():
        figure = _figure(figsize=(10.5, 4.0))
        axis = figure.subplots()
        everything = []
        for k, name in enumerate(names):
            mean, reach = _bars([arms[name]["regret"] for arms in families.values()])
            everything += mean
            at = [x + (k - (len(names) - 1) / 2) * 0.75 / len(names) for x in range(len(families))]
            axis.errorbar(
                at, mean, yerr=reach, fmt=MARKERS[k % len(MARKERS)], ms=5, lw=1.1, capsize=2,
                color=_colour(name), label=name,
            )  # fmt: skip
        _log_if_wide(axis, everything, "y")
        axis.axhline(1.0, color="#868e96", lw=1, ls="--")
        axis.set_xticks(range(len(families)), list(families))
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("cost / oracle")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8.5)
        return _svg(figure)


def pace_figure(paces: Mapping[float, Arms], shown: Sequence[str], reference: str) -> str:
    """Cost against the reference's, by how often conditions change.

    Args:
        paces: Seconds between changes -> arms.
        shown: The arms to draw.
        reference: The arm that is 1.
    """
    with _styled():
        figure = _figure(figsize=(10.5, 3.8))
        axis = figure.subplots()
        everything = []
        for k, name in enumerate(shown):
            mean, reach = _bars([ratio(arms, name, reference) for arms in paces.values()])
            everything += mean
            axis.errorbar(
                list(paces), mean, yerr=reach, marker=MARKERS[k % len(MARKERS)], ms=5, lw=1.3,
                capsize=2, color=_colour(name), label=name,
            )  # fmt: skip
        _log_if_wide(axis, everything, "y")
        axis.axhline(1.0, color="#868e96", lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_xticks(list(paces), [f"{p:g} s" for p in paces])
        axis.minorticks_off()
        axis.set_xlabel("conditions change every")
        axis.set_ylabel(f"cost / {reference}")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8.5)
        return _svg(figure)


def trajectory_figure(
    trajectory: Mapping[str, Any], shown: Sequence[str], interval_s: float
) -> str:
    """Bandwidth, the split of each shown arm, and requests outstanding, over time."""
    nodes, units, arms = trajectory["nodes"], trajectory["units"], trajectory["arms"]
    length = len(trajectory["mbps"][0])
    time_s = interval_s * (np.arange(length) - trajectory["startup"])
    ends_s = np.append(time_s, time_s[-1] + interval_s)
    with _styled():
        figure = _figure(figsize=(10.5, 4.0 + 0.95 * len(shown)))
        above: dict[str, Any] = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "fontsize": 8.5,
        }
        heights = [2.0] + [1.0] * len(shown) + [1.6]
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        for h, row in enumerate(trajectory["mbps"]):
            label = f"{nodes[h]} - {nodes[h + 1]}"
            axes[0].stairs(
                row, ends_s, color=GROUPS[h % len(GROUPS)], label=label, lw=1.4, baseline=None
            )
        _log_if_wide(axes[0], [v for row in trajectory["mbps"] for v in row], "y")
        axes[0].set_ylabel("Mbit/s")
        axes[0].legend(**above, ncols=6)
        for axis, name in zip(axes[1:-1], shown, strict=True):
            bounds = [np.zeros(length), *map(np.array, arms[name]["cuts"]), np.full(length, units)]
            for k, node in enumerate(nodes):
                low, high = (np.append(b, b[-1]) for b in bounds[k : k + 2])
                axis.fill_between(
                    ends_s, low, high, step="post", color=NODES[k % len(NODES)], label=node, lw=0
                )
            axis.set_ylim(0, units)
            axis.set_yticks([0, units])
            axis.set_ylabel(name, rotation=0, ha="right", va="center")
            axis.grid(visible=False)
        for name in shown:
            axes[-1].stairs(
                arms[name]["in_flight"],
                ends_s,
                color=_colour(name),
                label=name,
                lw=1.2,
                baseline=None,
            )
        axes[-1].set_ylabel("outstanding")
        axes[-1].set_xlabel("s (below 0: the start, accounted for apart)")
        axes[-1].legend(**above, ncols=6)
        if shown:
            axes[1].legend(**above, ncols=6)
        for axis in axes:
            axis.axvline(0.0, color="#495057", lw=0.8, ls=":")
            axis.set_xlim(ends_s[0], ends_s[-1])
        return _svg(figure)


def scatter_figure(panels: Mapping[str, Sequence[tuple[str, bool, float, float]]]) -> str:
    """Simulated against measured, a panel each, with the diagonal and 10 % to either side.

    Args:
        panels: Label -> points: group, filled or open, measured, simulated.
    """
    with _styled():
        figure = _figure(figsize=(5.2 * len(panels) + 0.5, 4.6))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (label, points) in zip(axes, panels.items(), strict=True):
            groups = list(dict.fromkeys(p[0] for p in points))
            for k, group in enumerate(groups):
                colour = GROUPS[k % len(GROUPS)]
                for filled in (True, False):
                    some = [p for p in points if p[0] == group and p[1] is filled]
                    axis.plot(
                        [p[2] for p in some], [p[3] for p in some], "o", ms=5, color=colour,
                        mfc=colour if filled else "none", label=group if filled else None,
                    )  # fmt: skip
            values = [v for p in points for v in p[2:]] or [1.0]
            ends = np.array([min(values) / 1.15, max(values) * 1.15])
            axis.plot(ends, ends, color="#868e96", lw=1)
            axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#dee2e6", alpha=0.6, lw=0)
            for which in ("x", "y"):
                _log_if_wide(axis, values, which)
            axis.set_xlim(*ends)
            axis.set_ylim(*ends)
            axis.set_title(label, fontsize=10)
            axis.set_xlabel("measured")
            axis.set_ylabel("simulated")
            axis.legend(fontsize=8.5)
        return _svg(figure)
