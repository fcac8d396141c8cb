"""Do the nodes rank the arms as the simulator does? Of runs on the testbed, on measured traces.

python -m agents.evaluate --model alexnet --backend testbed --traces DIR --rates 0.7 --seeds 3 \
    --conditions ucc5g-steady,nyumets-steady,hsdpa-x10-steady --first-seed 31000 --startup-s 5 \
    --intervals 20 --recalibrate --arms static,cloud,solver,guarded --json out.json
python benchmarks/ranking.py out.json [more.json ...]        # 25 quiet minutes a file, before that

Beside every run the simulator has played the same draw with every node as fast as it was in it.
For each pair of arms it prints the geometric mean of the draws' cost ratios, in the simulator and
on the nodes, with paired 95 % bootstrap intervals: every draw counts alike, whatever an outage in
one of them costs all arms. Draws of a model in several files count together. A pair is out of
order if the nodes rank it otherwise than the simulator, in which it lies more than 1 % apart; it
says where the nodes' interval includes 1.
Exit code 1 if any pair is out of order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.cli import run_command
from agents.paired import bootstrap_mean
from executor.errors import ConfigError

APART = 0.01
Rows = dict[str, list[float]]  # the draws' costs by arm
Cell = tuple[Rows, Rows]  # on the nodes, simulated


def main() -> int:
    """Print a line for each pair of arms, and what is out of order; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="what `agents.evaluate --json` wrote")
    files = parser.parse_args().files
    return run_command(lambda: int(not ranked(files)))


def ranked(files: Sequence[Path]) -> bool:
    """Whether nothing in the files is out of order.

    Raises:
        ConfigError: One holds no runs on the testbed's nodes on several conditions.
    """
    models: dict[str, dict[str, Cell]] = {}
    for path in files:
        model, cells = read(path)
        known = models.setdefault(model, {})
        for name, cell in cells.items():
            for rows, more in zip(known.setdefault(name, ({}, {})), cell, strict=True):
                for arm, costs in more.items():
                    rows[arm] = rows.get(arm, []) + costs
    return all([in_order(model, cells) for model, cells in models.items()])


def read(path: Path) -> tuple[str, dict[str, Cell]]:
    """Of one file, the model, and costs on the nodes and simulated, by condition and rate."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return result["model"], {
            f"{name}, {rate}": (part["cost_rows"], part["simulated"]["cost_rows"])
            for name, condition in result["by_condition"].items()
            for rate, part in condition["by_rate"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot rank {path} ({error!r}): expected what `agents.evaluate --backend testbed "
            "--traces DIR --json` wrote"
        ) from error


def in_order(model: str, cells: dict[str, Cell]) -> bool:
    """Print a model's rankings; whether nothing in them is out of order."""
    agree = total = 0
    for name, (nodes, simulated) in cells.items():
        print(f"{model}, {name}, {len(next(iter(nodes.values())))} draws: simulated / on the nodes")
        for arm in simulated:
            print(f"  {arm}: {np.mean(simulated[arm]):.3f} / {np.mean(nodes[arm]):.3f}")
        wrong = 0
        for pair in combinations(simulated, 2):
            said, found = (ratio(rows, pair) for rows in (simulated, nodes))
            out = disagree(said["mean"], found["mean"])
            wrong += out
            unsure = ", which includes 1" if found["low"] <= 1.0 <= found["high"] else ""
            print(
                f"  {pair[0]} / {pair[1]}: {interval(said)}, on the nodes {interval(found)}{unsure}"
                + (": OUT OF ORDER" if out else "")
            )
        total += 1
        agree += not wrong
    print(f"{model}: {agree} of {total} rankings agree")
    return agree == total


def ratio(rows: Rows, pair: tuple[str, str]) -> dict[str, float]:
    """Geometric mean of the first arm's costs over the second's, with its interval."""
    one, two = (np.log(rows[arm]) for arm in pair)
    return {name: float(np.exp(value)) for name, value in bootstrap_mean(one - two).items()}


def disagree(simulated: float, nodes: float) -> bool:
    """Whether the nodes order two arms otherwise than the simulator does; ratios of their costs."""
    apart = max(simulated, 1.0 / simulated) > 1.0 + APART
    return apart and (simulated < 1.0) != (nodes < 1.0)


def interval(found: dict[str, float]) -> str:
    """0.97 (0.95-0.99)."""
    return f"{found['mean']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
