"""How often to decide: the same conditions at several intervals, side by side.

`python -m agents.evaluate --interval 0.05,0.2,1,10` runs every arm at each of them; here are the
reading of that list and the table that puts the results together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from agents.paired import paired_ratio
from executor.errors import ConfigError

__all__ = ["STARTUP_S", "cadence_table", "cadences", "run_each"]

STARTUP_S = 80.0  # the same for all, and long enough for the reference's start-up at 10 s
USUAL_S = 1.0


def run_each(
    intervals: Sequence[float],
    args: argparse.Namespace,
    evaluate: Callable[[argparse.Namespace], dict[str, Any]],
) -> dict[str, Any]:
    """Evaluate at each interval over the same seconds.

    Args:
        intervals: Seconds.
        args: Of the command; `intervals` in it counts the longest ones.
        evaluate: Given the command's arguments for one interval (`interval_s`).

    Returns:
        The results `by_interval`, and `cadence` (see `cadences`).

    Raises:
        ConfigError: A plot is wanted, which shows but one interval.
    """
    for option in ("plot", "report"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option} shows one interval; give one, or none, to --interval")
    results = {}
    for interval_s in intervals:
        one = argparse.Namespace(**vars(args), interval_s=interval_s)
        one.startup_s = STARTUP_S if args.startup_s is None else args.startup_s
        if args.intervals is not None:
            one.intervals = round(args.intervals * max(intervals) / interval_s)
        results[interval_s] = evaluate(one)
    return {
        "by_interval": {f"{x:g}": found for x, found in results.items()},
        "cadence": cadences(results),
    }


def cadences(results: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """Per rate and arm: its cost at each interval, and over that at the usual one.

    Args:
        results: What `agents.evaluate` found, by interval; on the same conditions.

    Returns:
        {rate: {arm: {interval: {"cost", "ratio": {mean, low, high}}}}}; ratios are of means over
        conditions, paired, to 1 s (where that is not among them, to the longest interval).
    """
    usual = USUAL_S if USUAL_S in results else max(results)
    out: dict[str, Any] = {}
    for rate, part in results[usual]["by_rate"].items():
        out[rate] = {}
        for arm, rows in part["cost_rows"].items():
            base = np.array(rows)
            found = {x: np.array(r["by_rate"][rate]["cost_rows"][arm]) for x, r in results.items()}
            out[rate][arm] = {
                f"{x:g}": {"cost": float(costs.mean()), "ratio": paired_ratio(costs, base)}
                for x, costs in found.items()
            }
    return out


def cadence_table(title: str, arms: dict[str, Any]) -> Table:
    """Arms by interval, one row per arm."""
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("arm", no_wrap=True)
    for interval in next(iter(arms.values())):
        out.add_column(f"{interval} s", justify="right", no_wrap=True)
    for name, row in arms.items():
        cells = [
            f"{cell['cost']:.3f}  x{cell['ratio']['mean']:.3f} "
            f"({cell['ratio']['low']:.3f}-{cell['ratio']['high']:.3f})"
            for cell in row.values()
        ]
        out.add_row(name, *cells)
    return out
