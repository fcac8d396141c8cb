"""How much of the best other arm's distance to the clairvoyant oracle the policy closes.

python -m agents.evaluate --model alexnet --traces DIR --arms ...,oracle --json out.json
python benchmarks/gap_closed.py out.json [more.json ...]     # of one model: pooled

Costs are divided by the oracle's mean in their cell (conditions x rate), so that every cell counts
alike; where the oracle did not take part, by the solver's, and no share is told. The share closed
is (other - policy) / (other - oracle), of the means over cells; intervals are 95 % of a bootstrap
over the seeds of every cell. The other arm is the cheapest that neither learned beforehand nor
knows the future, in each cell and overall, chosen after the fact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Cell = tuple[str, str, str]  # conditions, their family, rate
OTHERS = ("paper", "paper-1s", "solver", "predictive", "mpc", "linucb")
SUBJECTS = ("policy", "policy-greedy", "policy-all", "guarded")
RESAMPLES = 4000


def main() -> None:
    """Print a table for each model: all cells, each family, and the cells lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="what `agents.evaluate --json` wrote")
    for model, rows in pooled(parser.parse_args().files).items():
        cells = {cell: in_units(costs) for cell, costs in rows.items()}
        seeds = sorted({len(costs["solver"]) for costs in rows.values()})
        print(f"{model}, {len(cells)} cells of {'/'.join(map(str, seeds))} seeds")
        families = dict.fromkeys(family for _, family, _ in cells)
        show("all", list(cells.values()))
        for family in families:
            show(family, [c for (_, f, _), c in cells.items() if f == family])
        for subject in SUBJECTS:
            lost = [
                f"{name} {rate} (to {best_other([c])}, {interval_text(ratio([c], subject))})"
                for (name, _, rate), c in cells.items()
                if subject in c and ratio([c], subject)[1] > 1.0
            ]
            won = sum(subject in c and ratio([c], subject)[2] < 1.0 for c in cells.values())
            print(f"  {subject}: better in {won} cells, lost: {'; '.join(lost) or 'none'}")


def pooled(files: list[Path]) -> dict[str, dict[Cell, dict[str, list[float]]]]:
    """By model and cell every arm's cost of each seed; of arms that all of a cell's files have.

    Files of several intervals between decisions count as a model for each.
    """
    models: dict[str, dict[Cell, dict[str, list[float]]]] = {}
    read = [json.loads(path.read_text()) for path in files]
    for result in (one for r in read for one in r.get("by_interval", {"": r}).values()):
        every = f" every {result['interval_s']:g} s" if result["interval_s"] != 1.0 else ""
        cells = models.setdefault(result["model"] + every, {})
        for name, condition in result["by_condition"].items():
            for rate, part in condition["by_rate"].items():
                cell, rows = (name, condition["family"], rate), part["cost_rows"]
                known = cells.get(cell)
                cells[cell] = (
                    rows if known is None else {a: known[a] + rows[a] for a in known if a in rows}
                )
    return models


def in_units(rows: dict[str, list[float]]) -> dict[str, F64]:
    """Per arm the costs of a cell's seeds, over the oracle's mean (without one, the solver's)."""
    unit = float(np.mean(rows["oracle" if "oracle" in rows else "solver"]))
    return {arm: np.array(costs) / unit for arm, costs in rows.items()}


def means(cells: list[dict[str, F64]], arm: str) -> F64:
    """The arm's mean over cells, [1 + RESAMPLES]: as it is, and resampled within each cell."""
    total = np.zeros(1 + RESAMPLES)
    for number, cell in enumerate(cells):
        costs = cell[arm]
        # The same draw for every arm: the comparison is paired.
        index = np.random.default_rng(number).integers(len(costs), size=(RESAMPLES, len(costs)))
        total += np.append(costs.mean(), costs[index].mean(axis=1))
    return total / len(cells)


def best_other(cells: list[dict[str, F64]]) -> str:
    """The cheapest arm that neither learned beforehand nor knows the future."""
    present = [arm for arm in OTHERS if arm in cells[0]]
    return min(present, key=lambda arm: means(cells, arm)[0])


def with_interval(values: F64) -> tuple[float, float, float]:
    """(value, low, high) of `means`-like values."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)


def ratio(cells: list[dict[str, F64]], arm: str) -> tuple[float, float, float]:
    """The arm's cost over the best other's."""
    return with_interval(means(cells, arm) / means(cells, best_other(cells)))


def closed(cells: list[dict[str, F64]], arm: str) -> tuple[float, float, float]:
    """Share of the best other's distance to the oracle that the arm closes."""
    other, oracle = means(cells, best_other(cells)), means(cells, "oracle")
    return with_interval((other - means(cells, arm)) / np.maximum(other - oracle, 1e-9))


def interval_text(value: tuple[float, float, float]) -> str:
    """A value and its interval."""
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def show(label: str, cells: list[dict[str, F64]]) -> None:
    """Every arm's cost over the oracle's, and what the policies close."""
    arms: dict[str, Any] = {arm: means(cells, arm)[0] for arm in cells[0]}
    print(f"  {label}: " + ", ".join(f"{arm} {cost:.3f}" for arm, cost in arms.items()))
    for subject in (s for s in SUBJECTS if s in arms):
        for bound in (b for b in ("oracle", "best-static") if b in arms):
            over = with_interval(means(cells, subject) / means(cells, bound))
            print(f"    {subject} / {bound} {interval_text(over)}")
        share = f", closes {interval_text(closed(cells, subject))}" if "oracle" in arms else ""
        print(f"    {subject} / {best_other(cells)} {interval_text(ratio(cells, subject))}{share}")


if __name__ == "__main__":
    main()
