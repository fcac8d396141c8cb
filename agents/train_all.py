"""`python -m agents.train_all`: one policy for every model and every mix of devices.

Trains in the simulator on the profiles of the shipped checkpoints and on estimated profiles of
other torchvision models, on nodes of varying speed, under the same mixture of conditions as
`train.py`. Any command then takes it as the arm or controller `policy-all`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from agents.cli import CHECKPOINTS, Parser, positive_int, progress, run_command
from agents.learning.hindsight import HindsightSettings
from agents.learning.scoring_training import ScoringSettings, train_for_all
from env.scenario import Scenario
from env.synthetic import synthetic_model
from executor.profile import Profile

__all__ = ["main"]

MEASURED = ("alexnet", "vgg16", "mobilenet_v2")
ESTIMATED = ("resnet18", "squeezenet1_1", "googlenet", "densenet121")


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m agents.train_all", description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=positive_int, default=240, help="rounds of lessons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINTS / "all", help="where to (a folder)"
    )
    args = parser.parse_args(argv)
    console = Console()
    scenario = Scenario.load()
    measured = [Profile.load(CHECKPOINTS / name / "profile.json") for name in MEASURED]
    defaults = ScoringSettings(seed=args.seed)
    lessons: HindsightSettings = replace(defaults.hindsight, rounds=args.rounds)
    with progress(console) as bar:
        task = bar.add_task("estimating profiles", total=len(ESTIMATED), note="")
        estimated = []
        for name in ESTIMATED:
            estimated.append(synthetic_model(name, scenario))
            bar.update(task, advance=1, note=name)
        task = bar.add_task("lessons from all models", total=args.rounds, note="")

        def report(done: int, total: int, ratio: float) -> None:
            bar.update(task, completed=done, note=f"cost {ratio:.3f} x the solver's")

        policy = train_for_all(
            [*measured, *estimated],
            scenario,
            measured,
            replace(defaults, hindsight=lessons),
            report,
            lambda better: better.save(args.checkpoint),
        )
    policy.save(args.checkpoint)
    history = policy.metadata["validation_cost_ratio_to_solver"]
    console.print(
        "validation, cost over the solver's: " + ", ".join(f"{r:.3f}" for _, r in history)
    )
    console.print(f"policy: {args.checkpoint}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
