"""What recalibration regains where profiles are wrong unit by unit, in the simulator.

python benchmarks/wrong_units.py                                    # half a minute on one core
python benchmarks/wrong_units.py --unit-sd 0 --node-sd 0.7          # whole nodes are wrong

Every unit of every node is as slow as profiled times a log-normal factor of its own and one of its
node. It prints the solver's cost over that of itself told the right profile, told the wrong one and
recalibrating: the geometric mean over the draws, and each draw's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.arms.believing import Believing
from agents.arms.controllers import Controller, Solver
from agents.arms.recalibrated import Recalibrated
from agents.cli import Parser, positive_int, run_command
from agents.studies.compare import per_row, run_arm
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from executor.model import model_spec
from executor.profile import Profile

RATE, STARTUP, INTERVALS = 0.7, 10, 150
FIRST_SEED = 100


def main() -> int:
    """Print a line per model; returns the exit code."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="alexnet,mobilenet_v2,vgg16")
    parser.add_argument("--unit-sd", type=float, default=0.4, help="of a unit's log factor")
    parser.add_argument("--node-sd", type=float, default=0.4, help="of a node's")
    parser.add_argument("--draws", type=positive_int, default=10)
    args = parser.parse_args()
    return run_command(lambda: regained(args))


def regained(args: argparse.Namespace) -> int:
    """Run the three arms on every draw."""
    for name in args.models.split(","):
        scenario = Scenario.load().replace(capacity_fraction=RATE)
        told = synthetic_profile(model_spec(name), scenario)
        rows = []
        for draw in range(args.draws):
            true = CostModel(slowed(told, args.unit_sd, args.node_sd, draw), scenario)
            wrong = [CostModel(told, scenario, true.references) for _ in range(2)]
            arms: list[Controller] = [
                Solver(),
                Believing(Solver(), wrong[0]),
                Recalibrated(Solver(), wrong[1]),
            ]
            rows.append([cost(true, arm, FIRST_SEED + draw) for arm in arms])
        costs = np.array(rows)
        ratios = costs[:, 1:] / costs[:, :1]
        mean = np.exp(np.log(ratios).mean(axis=0))
        print(f"{name}: wrong {mean[0]:.3f}, recalibrated {mean[1]:.3f}", ratios[:, 1].round(2))
    return 0


def slowed(profile: Profile, unit_sd: float, node_sd: float, seed: int) -> Profile:
    """The nodes as they are, of a profile that was taken wrong."""
    rng = np.random.default_rng(seed)
    nodes = []
    for node in profile.nodes:
        logs = node_sd * rng.normal() + unit_sd * rng.normal(size=len(node.unit_s))
        nodes.append(replace(node, unit_s=tuple((np.exp(logs) * node.unit_s).tolist())))
    return profile.with_changes(nodes=tuple(nodes))


def cost(true: CostModel, arm: Controller, seed: int) -> float:
    """Per request, on nodes as they are."""
    simulator = Simulator(true, 1, seed, record_requests=True)
    run = run_arm(simulator, arm, seed=seed, n_intervals=INTERVALS, startup=STARTUP)
    return float(per_row(run, true)["cost"][0])


if __name__ == "__main__":
    sys.exit(main())
