"""`python -m agents.train_seeds`: how much a trained policy depends on the training's seed.

Trains in the simulator from a saved profile once per seed, and compares each policy with the solver
on conditions that neither trained nor chose it. No checkpoint is written.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from agents.arms.policy_all import load_base
from agents.arms.runtime import PolicyController
from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    add_base_argument,
    load_profile,
    model_argument,
    positive_int,
    progress,
    run_command,
)
from agents.learning.hindsight import HindsightSettings
from agents.learning.training import TrainingSettings, judge, train_policy
from agents.studies.workers import WORKERS_HELP, spread, workers
from env.predict import CostModel
from env.scenario import Scenario
from executor.files import write_json
from executor.modelref import model_label
from executor.profile import Profile

__all__ = ["main"]

HELD_OUT_SEED = 8_000_000
PARTS = ("own", "varied")


@dataclass(frozen=True)
class _Training:
    """One training, wherever it is done."""

    profile: Profile
    scenario: Scenario
    settings: TrainingSettings
    base: dict[str, NDArray[np.float32]]

    def run(self) -> dict[str, Any]:
        model = CostModel(self.profile, self.scenario)
        checkpoint = train_policy(model, self.settings, base=self.base).checkpoint
        training = checkpoint.metadata["training"]
        return {
            "seed": self.settings.seed,
            "strength": training["strength"],
            "validation": training["validation_cost_ratio_to_solver"],
            "held_out": judge(model, self.settings, HELD_OUT_SEED).ratios(
                PolicyController(checkpoint)
            ),
            "seconds": training["seconds"],
        }


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m agents.train_seeds", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--model", type=model_argument, default="alexnet", help=MODEL_HELP)
    add("--profile", type=Path, help="profile JSON (default: that of checkpoints/MODEL)")
    add("--scenario", type=Path, help="scenario file (default: the shipped one)")
    add("--seeds", type=positive_int, default=4, help="trainings")
    add("--first-seed", type=int, default=0)
    add_base_argument(parser)
    add("--rounds", type=positive_int, default=24, help="rounds of hindsight before PPO")
    add("--steps", type=positive_int, help="steps of PPO (default: 150,000)")
    add("--workers", default="1", metavar="N", help=WORKERS_HELP)
    add("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    count, scenario = workers(args.workers), Scenario.load(args.scenario)
    name = model_label(args.model)
    path = args.profile or CHECKPOINTS / name / "profile.json"
    profile = load_profile(path, args.model, scenario)
    settings = TrainingSettings(hindsight=HindsightSettings(rounds=args.rounds))
    if args.steps:
        settings = replace(settings, steps=args.steps)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    base = load_base(args.base, scenario)
    tasks = [_Training(profile, scenario, replace(settings, seed=s), base) for s in seeds]
    console, done = Console(), {}
    with progress(console) as bar:
        task = bar.add_task("trainings", total=len(tasks), note=f"{count} at once")
        for place, found in spread(_Training.run, tasks, count):
            done[place] = found
            bar.advance(task)
    rows = [done[place] for place in range(len(tasks))]
    console.print(_table(name, rows))
    if args.json is not None:
        write_json(args.json, {"model": name, "settings": asdict(settings), "trainings": rows})
    return 0


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{name}: cost over the solver's, by the training's seed")
    columns = [(where, part) for where in ("validation", "held_out") for part in PARTS]
    for column in ("seed", *(f"{where.replace('_', ' ')}, {part}" for where, part in columns)):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["seed"]), *(f"{row[where][part]:.3f}" for where, part in columns))
    table.add_section()
    values = np.array([[row[where][part] for where, part in columns] for row in rows])
    table.add_row("mean", *(f"{value:.3f}" for value in values.mean(axis=0)))
    if len(rows) > 1:
        spreads = values.std(axis=0, ddof=1)
        table.add_row("standard deviation", *(f"{value:.3f}" for value in spreads))
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
