"""The policy for all models on systems it never saw: other models, other devices, other traces.

python benchmarks/unseen_systems.py --traces DIR

Prints its cost over the queue-aware solver's (and over the model's own policy, where one is
shipped) with paired 95 % intervals over the conditions.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from agents.arms.controllers import Controller, Solver
from agents.arms.lookahead import Lookahead
from agents.arms.policy_all import ScoringPolicy, scoring_controller
from agents.arms.runtime import Checkpoint, PolicyController
from agents.cli import CHECKPOINTS
from agents.learning.validation import mean_cost
from agents.paired import paired_ratio
from env.predict import CostModel
from env.scenario import NodeSetup, Scenario
from env.simulator import Simulator
from env.splits import split
from env.synthetic import synthetic_model

TRAINED = ("alexnet", "vgg16", "mobilenet_v2")
UNSEEN = ("resnet50", "efficientnet_b0", "vit_b_16")
# Edge, fog, cloud: times slower than one core. Training saw 12, 3, 1, each times 1/2.5 to 2.5.
DEVICES = {"12-3-1": (12.0, 3.0, 1.0), "40-2-0.3": (40.0, 2.0, 0.3)}


def main() -> None:
    """Compare on every system and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="also on the test part of these traces")
    parser.add_argument("--policy", type=Path, default=CHECKPOINTS / "all")
    parser.add_argument("--seeds", type=int, default=12, help="conditions per rate")
    parser.add_argument("--intervals", type=int, default=100)
    parser.add_argument("--rates", default="0.4,0.8,1.1")
    parser.add_argument("--first-seed", type=int, default=31000)
    args = parser.parse_args()
    for_all = scoring_controller(ScoringPolicy.load(args.policy), Lookahead())
    scenarios = {"default": Scenario.load()}
    if args.traces is not None:
        parts = split(args.traces, scenarios["default"])
        scenarios |= {condition.name: condition.scenario for condition in parts.test}
    rates = np.repeat([float(r) for r in args.rates.split(",")], args.seeds)

    def compare(label: str, model: CostModel, arms: dict[str, Controller]) -> None:
        simulator = Simulator(model, len(rates), 0, rate_rps=rates * model.capacity_rps)
        costs = {
            name: mean_cost(arm, simulator, args.first_seed, args.intervals)
            for name, arm in {"policy-all": for_all, **arms}.items()
        }
        cells = [f"{label:<42}", f"policy-all {costs['policy-all'].mean():.3f}"]
        for name in arms:
            ratio = paired_ratio(costs["policy-all"], costs[name])
            cells.append(f"/ {name} {ratio['mean']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})")
        print("  ".join(cells), flush=True)

    for where, scenario in scenarios.items():
        for name in TRAINED:
            checkpoint = Checkpoint.load(CHECKPOINTS / name, name)
            model = CostModel(checkpoint.profile, scenario)
            arms: dict[str, Controller] = {
                "solver": Solver(),
                "own policy": PolicyController(checkpoint, ahead=Lookahead()),
            }
            compare(f"{name}, {where}", model, arms)
        for name in UNSEEN:
            for devices, ratios in DEVICES.items():
                nodes = zip(scenario.nodes, ratios, strict=True)
                played = scenario.replace(nodes=tuple(_with_ratio(n, r) for n, r in nodes))
                model = CostModel(synthetic_model(name, played), played)
                compare(f"{name}, {devices}, {where}", model, {"solver": Solver()})


def _with_ratio(node: NodeSetup, ratio: float) -> NodeSetup:
    return dataclasses.replace(node, ratio=ratio)


if __name__ == "__main__":
    main()
