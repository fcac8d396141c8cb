"""How much of the distance to the clairvoyant oracle is information that nobody has?

python benchmarks/information.py --model alexnet --traces DIR            # about ten minutes
python benchmarks/information.py --model alexnet --rounds 4 --seeds 2    # default scenario, short

Trains two policies alike, in hindsight alone: one sees what was measured, the other is told the
means of bandwidth, load and arrivals in the interval to come (`env.foretold`). Both then meet the
same conditions, and so do solver and oracle, which knows all that is to come. What the told one
saves on the other, over what the oracle saves on it, is the share of the gap that is staleness:
nobody can have it who decides at the interval's start. What the oracle saves beyond is the rest of
the future and what a better decision could do. Ratios of means of a cell's costs; cells count
alike; 95 % bootstrap intervals over the conditions of every cell.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.arms.controllers import Controller, Decision, Solver
from agents.arms.lookahead import Lookahead
from agents.arms.mpc import ModelPredictive
from agents.arms.oracle import Oracle, PlanSequence, search
from agents.arms.runtime import Checkpoint, PolicyController
from agents.cli import CHECKPOINTS, Parser, load_profile, numbers, positive_int, run_command
from agents.learning.hindsight import HindsightSettings, learn_from_hindsight
from agents.learning.policy import ResidualSolverPolicy, policy_kwargs
from agents.learning.training import TrainingSettings, to_checkpoint
from agents.studies.compare import per_row, run_arm
from env.foretold import Foretold
from env.offloading import observation_space
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.splits import split
from env.state import Encoder
from executor.files import write_json

F64 = NDArray[np.float64]
RESAMPLES = 2000
TOLD = " told"


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="alexnet")
    add("--traces", type=Path, help="the folder of measured traces (default: the shipped scenario)")
    add("--split", choices=("validation", "test"), default="validation")
    add("--rates", default="0.4,0.8,1.1", help="fractions of capacity")
    add("--seeds", type=positive_int, default=5, help="conditions per cell")
    add("--first-seed", type=int, default=61_000)
    add("--intervals", type=positive_int, default=20)
    add("--startup", type=int, default=10, help="intervals that do not count")
    add("--rounds", type=positive_int, default=24, help="of hindsight")
    add("--training-seed", type=int, default=0)
    add("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    scenario = Scenario.load()
    profile = load_profile(CHECKPOINTS / args.model / "profile.json", args.model, scenario)
    model = CostModel(profile, scenario)
    policies = {kind: trained(model, args, kind) for kind in (Simulator, Foretold)}
    print(f"{args.model}: both policies trained", flush=True)
    played = {"": scenario}
    if args.traces is not None:
        played = {c.name: c.scenario for c in split(args.traces, scenario).part(args.split)}
    costs: dict[str, dict[str, F64]] = {}
    for name, conditions in played.items():
        for rate in numbers("--rates", args.rates, "fractions", "0.4,0.8", 100.0):
            at_rate = conditions.replace(capacity_fraction=rate, rate_rps=0.0)
            cell = costs[f"{name} {rate:g}".strip()] = run_cell(
                CostModel(profile, at_rate), policies, args
            )
            over = ", ".join(
                f"{arm} {cost.mean() / cell['oracle'].mean():.3f}" for arm, cost in cell.items()
            )
            print(f"{name} {rate:g}: {over}", flush=True)
    summary = summarise(list(costs.values()))
    for line, (value, low, high) in summary.items():
        print(f"{line}: {value:.3f} ({low:.3f} to {high:.3f})")
    if args.json is not None:
        rows = {k: {arm: c.tolist() for arm, c in cell.items()} for k, cell in costs.items()}
        write_json(args.json, {"model": args.model, "cells": rows, "summary": summary})
    return 0


def trained(model: CostModel, args: argparse.Namespace, kind: type[Simulator]) -> Checkpoint:
    """A policy that learned in hindsight in that kind of simulator."""
    settings = TrainingSettings()
    torch.manual_seed(args.training_seed)
    policy = ResidualSolverPolicy(
        observation_space(Encoder(model)),
        spaces.Discrete(len(model.plans)),
        lambda _: 1e-4,
        **policy_kwargs(model, settings.tau, settings.width),
    )
    lessons = HindsightSettings(rounds=args.rounds)
    learn_from_hindsight(
        policy, model, settings.mixture, settings.rates, args.training_seed, lessons, simulate=kind
    )
    return to_checkpoint(model, policy, {"scenario": {"interval_s": model.scenario.interval_s}})


def run_cell(
    model: CostModel, policies: dict[type[Simulator], Checkpoint], args: argparse.Namespace
) -> dict[str, F64]:
    """Every arm's cost per request in each of a cell's conditions, [seeds]."""
    costs: dict[str, F64] = {}
    sequences: list[PlanSequence] = []
    seed, length = args.first_seed, {"n_intervals": args.intervals, "startup": args.startup}

    def run(name: str, controller: Controller, simulator: Simulator) -> None:
        decisions: list[Decision] = []
        ran = run_arm(simulator, controller, seed=seed, on_decision=decisions.append, **length)
        costs[name] = per_row(ran, model)["cost"]
        sequences.append(PlanSequence.of(decisions))

    for kind, checkpoint in policies.items():
        simulator = kind(model, args.seeds, seed, record_requests=True)
        suffix = TOLD if kind is Foretold else ""
        run("solver" + suffix, Solver(), simulator)
        run("mpc" + suffix, ModelPredictive(), simulator)
        run("greedy" + suffix, PolicyController(checkpoint), simulator)
        run("policy" + suffix, PolicyController(checkpoint, ahead=Lookahead()), simulator)
    simulator = Simulator(model, args.seeds, seed, record_requests=True)
    simulator.reset(seed)
    tape = simulator.record(args.startup + args.intervals)
    future = search(model, tape, startup=args.startup, incumbents=sequences)
    run("oracle", Oracle(future), simulator)
    return costs


def summarise(cells: list[dict[str, F64]]) -> dict[str, tuple[float, float, float]]:
    """Over all cells, with 95 % intervals: each arm over the oracle, and the shares of the gap."""
    rng = np.random.default_rng(0)
    seeds = len(cells[0]["oracle"])
    draws = [[np.arange(seeds)] * len(cells)]
    draws += [list(rng.integers(0, seeds, (len(cells), seeds))) for _ in range(RESAMPLES)]
    found: dict[str, list[float]] = {}
    for draw in draws:
        over: dict[str, float] = {}
        for arm in cells[0]:
            over[arm] = float(
                np.mean(
                    [
                        c[arm][i].mean() / max(float(c["oracle"][i].mean()), 1e-9)
                        for c, i in zip(cells, draw, strict=True)
                        if c["oracle"][i].mean() > 0
                    ]
                )
            )
        values = {f"{arm} / oracle": ratio for arm, ratio in over.items() if arm != "oracle"}
        gap = over["policy"] - 1.0
        values["share of policy's gap that the next interval explains"] = (
            over["policy"] - min(over["policy" + TOLD], over["greedy" + TOLD])
        ) / gap
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    summary = {}
    for name, v in found.items():
        low, high = np.quantile(v[1:], (0.025, 0.975))
        summary[name] = v[0], float(low), float(high)
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
