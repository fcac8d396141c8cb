"""Is the clairvoyant oracle one? No arm may cost less, and twice the search may change little.

python benchmarks/oracle_width.py                      # three models, default scenario, minutes
python benchmarks/oracle_width.py --scenarios default,lan,wan,5g --rates 0.4,0.8,1.1 --json out.json
python benchmarks/oracle_width.py --models alexnet --scenarios "" --traces DIR   # validation part

In every cell (model x conditions x rate) all arms play the same conditions, then the oracle's
search is run as it is, twice as wide, and as it is but without being shown what the arms played
("alone"). What each sequence costs is measured by playing it. Per cell it prints the cost at twice
the width over that at the width, alone over the width, and the cheapest arm over the oracle:
ratios of means with paired 95 % bootstrap intervals over the conditions, and the least ratio of any
single condition. Exit code 1 where an arm costs less than the oracle in any condition, or where
twice the width changes a cell's cost by --most-change or more.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.arms.controllers import ARMS, ArmContext, Controller, Decision, make_arm
from agents.arms.oracle import Oracle, OracleSettings, PlanSequence, search
from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS, load_profile, numbers, positive_int, run_command
from agents.paired import paired_ratio
from agents.studies.compare import best_static_cuts, per_row, run_arm
from agents.studies.provenance import provenance
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.splits import split
from executor.errors import ConfigError
from executor.files import write_json

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
EQUAL = 1e-9  # relative: one sequence played twice, in batches of other sizes


@dataclass(frozen=True)
class Cell:
    """What was found in one cell; costs per request [R], one for each condition.

    Attributes:
        name: "alexnet, lan, 0.8".
        oracle, twice: Of the oracle's sequence, and of that found with twice the width.
        alone: Of what the oracle finds without being shown the arms' sequences; None if not asked.
        arms: Of the other arms.
        search_s: CPU seconds of the oracle's search, and of that twice as wide.
    """

    name: str
    oracle: F64
    twice: F64
    alone: F64 | None
    arms: dict[str, F64]
    search_s: tuple[float, float]

    def cheapest(self) -> str:
        """The arm that costs least in this cell."""
        return min(self.arms, key=lambda name: self.arms[name].mean())

    def broken(self, most_change: float) -> list[str]:
        """The bounds that do not hold here, in words."""
        words = []
        for name, costs in self.arms.items():
            below = costs < self.oracle * (1.0 - EQUAL) - 1e-12
            if below.any():
                words.append(f"{name} costs less than the oracle in {below.sum()} conditions")
        change = self.twice.mean() / self.oracle.mean() - 1.0
        if abs(change) >= most_change:
            words.append(f"twice the width changes the cost by {change:+.2%}")
        return [f"{self.name}: {text}" for text in words]

    def plain(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "oracle": float(self.oracle.mean()),
            "twice_over_width": paired_ratio(self.twice, self.oracle),
            **(
                {}
                if self.alone is None
                else {"alone_over_width": paired_ratio(self.alone, self.oracle)}
            ),
            "arms_over_oracle": {
                name: {
                    **paired_ratio(costs, self.oracle),
                    "least": float((costs / np.maximum(self.oracle, 1e-12)).min()),
                }
                for name, costs in self.arms.items()
            },
            "cost_rows": {
                "oracle": self.oracle.tolist(),
                "twice": self.twice.tolist(),
                **{name: costs.tolist() for name, costs in self.arms.items()},
            },
            "search_cpu_s": self.search_s[0],
            "search_twice_cpu_s": self.search_s[1],
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run every cell; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(words)
    args.command = " ".join(["python benchmarks/oracle_width.py", *words])
    logging.getLogger("agents.arms.guard").setLevel(logging.ERROR)  # a fall-back per environment
    return run_command(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    rates = numbers("--rates", args.rates, "fractions of capacity", "0.4,0.8", 100.0)
    if not args.startup_s >= 0:
        raise ConfigError(f"--startup-s must be >= 0, got {args.startup_s}")
    scenarios = {name: Scenario.load(name) for name in args.scenarios.split(",") if name}
    if args.traces is not None:
        scenarios |= {c.name: c.scenario for c in split(args.traces).part(args.split)}
    if not scenarios:
        raise ConfigError("give --scenarios, --traces DIR or both; there are no conditions")
    unknown = [name for name in (args.arms or "").split(",") if name and name not in ARMS]
    if unknown:
        raise ConfigError(f"unknown arm {unknown[0]!r}; expected some of {', '.join(ARMS)}")
    cells, broken = [], []
    for name in args.models.split(","):
        for label, scenario in scenarios.items():
            for fraction in rates:
                played = scenario.replace(capacity_fraction=fraction, rate_rps=0.0)
                profile = load_profile(CHECKPOINTS / name / "profile.json", name, played)
                model = CostModel(profile, played)
                cell = run_cell(f"{name}, {label}, {fraction:g}", name, model, args)
                cells.append(cell)
                broken += cell.broken(args.most_change)
                print(line(cell), flush=True)
    for text in broken:
        print(f"BROKEN {text}")
    change = [cell.twice.mean() / cell.oracle.mean() - 1.0 for cell in cells]
    print(
        f"{len(cells)} cells of {args.seeds} conditions: twice the width changes the cost by "
        f"{min(change):+.2%} to {max(change):+.2%}, {len(broken)} bounds broken"
    )
    if args.json is not None:
        made = {**provenance(None, args.command), "first_seed": args.first_seed}
        write_json(args.json, {"made": made, "cells": {c.name: c.plain() for c in cells}})
    return 1 if broken else 0


def run_cell(name: str, model_name: str, model: CostModel, args: argparse.Namespace) -> Cell:
    """All arms and the oracle on the same conditions."""
    startup = math.ceil(args.startup_s / model.scenario.interval_s)
    simulator = Simulator(model, args.seeds, args.first_seed, record_requests=True)

    def play(arm: Controller, decisions: list[Decision]) -> F64:
        run = run_arm(
            simulator, arm, seed=args.first_seed, n_intervals=args.intervals, startup=startup,
            on_decision=decisions.append,
        )  # fmt: skip
        return per_row(run, model)["cost"]

    def hindsight() -> I64:
        return best_static_cuts(
            simulator, seed=args.first_seed, n_intervals=args.intervals, startup=startup
        )

    checkpoint = Checkpoint.load(CHECKPOINTS / model_name, model_name)
    context = ArmContext(model, checkpoint, hindsight)
    names = args.arms.split(",") if args.arms else list(ARMS)
    arms, sequences = {}, []
    for arm in (n for n in names if n != "oracle"):
        decisions: list[Decision] = []
        arms[arm] = play(make_arm(arm, context), decisions)
        sequences.append(PlanSequence.of(decisions))
    simulator.reset(args.first_seed)
    tape = simulator.record(startup + args.intervals)

    def look(settings: OracleSettings, shown: list[PlanSequence]) -> tuple[F64, float]:
        began = time.process_time()
        found = search(model, tape, startup=startup, incumbents=shown, settings=settings)
        taken_s = time.process_time() - began
        return play(Oracle(found), []), taken_s

    settings = OracleSettings()
    oracle, taken_s = look(settings, sequences)
    twice, twice_s = look(settings.wider(2), sequences)
    alone = look(settings, [])[0] if args.alone else None
    return Cell(name, oracle, twice, alone, arms, (taken_s, twice_s))


def line(cell: Cell) -> str:
    """A cell in one line."""
    best = cell.cheapest()
    ratio = paired_ratio(cell.arms[best], cell.oracle)
    least = min((costs / np.maximum(cell.oracle, 1e-12)).min() for costs in cell.arms.values())
    twice = paired_ratio(cell.twice, cell.oracle)
    parts = [
        f"{cell.name:<38} cost {cell.oracle.mean():.4f}",
        f"2W/W {twice['mean']:.4f} ({twice['low']:.4f}-{twice['high']:.4f})",
        f"{best}/W {ratio['mean']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})",
        f"least of any {least:.4f}",
        f"{cell.search_s[0]:.1f} + {cell.search_s[1]:.1f} s",
    ]
    if cell.alone is not None:
        parts.insert(2, f"alone/W {paired_ratio(cell.alone, cell.oracle)['mean']:.4f}")
    return "  ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", default="alexnet,vgg16,mobilenet_v2", help="with a shipped checkpoint")
    add("--scenarios", default="default", help="TOML files or shipped names, comma-separated")
    add("--traces", type=Path, help="also on a part of these measured traces")
    add("--split", default="validation", help="which part of --traces")
    add("--rates", default="0.4,0.8,1.1", help="fractions of the best static plan's capacity")
    add("--arms", help=f"comma-separated, of {', '.join(ARMS)}; default: all")
    add("--alone", action="store_true", help="also search without the arms' sequences")
    add("--seeds", type=positive_int, default=4, help="conditions per cell")
    add("--intervals", type=positive_int, default=40, help="steady-state intervals")
    add("--startup-s", type=float, default=5.0, help="seconds before them that do not count")
    add("--first-seed", type=int, default=41000)
    add("--most-change", type=float, default=0.01, help="of the cost at twice the width")
    add("--json", type=Path, help="write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
