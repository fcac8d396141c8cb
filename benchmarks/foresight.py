"""What is it worth to know the next seconds? The policy, told the true conditions that far ahead.

PYTHONPATH=. python benchmarks/foresight.py --model alexnet --traces DIR    # 20 minutes of a core

At every decision the plans that the solver predicts to cost least, and the policy's own, are each
played in the simulator under what really comes (bandwidth, load, every arrival) for so many
seconds, the policy deciding after the first interval; what is open then is run out under the means
of the last twelve seconds, as nobody was told more. The cheapest is taken. So what such an arm
saves on the policy is worth of information, and what the oracle saves on the longest of them is
information about later still, and search. Ratios of means of a cell; cells count alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.arms.branches import Branches
from agents.arms.controllers import Controller, Decision, Solver
from agents.arms.lookahead import Lookahead
from agents.arms.oracle import PlanSequence, search
from agents.arms.runtime import ActorController, Checkpoint, PolicyController
from agents.cli import CHECKPOINTS, Parser, numbers, positive_float, positive_int, run_command
from env.conditions import ConditionsSource
from env.cost import Cost
from env.grid import GridConditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator, Snapshot
from env.splits import split
from env.state import SystemState, idle_probes
from env.tape import Tape, record_conditions
from executor.errors import ConfigError
from executor.files import write_json

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def main(argv: list[str] | None = None) -> int:
    """Print a line per cell, then the means."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="alexnet")
    add("--traces", type=Path, required=True, help="the folder of measured traces")
    add("--split", choices=("validation", "test"), default="validation")
    add("--rates", default="0.4,0.8,1.1", help="fractions of capacity")
    add("--foresight", default="0.2,1,3,6", help="seconds told, multiples of the interval")
    add("--interval", type=positive_float, default=0.2)
    add("--seeds", type=positive_int, default=8, help="conditions per cell")
    add("--first-seed", type=int, default=63_000)
    add("--seconds", type=positive_float, default=20.0)
    add("--startup-s", type=positive_float, default=10.0)
    add("--tried", type=positive_int, default=16, help="plans played forward")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    checkpoint = Checkpoint.load(CHECKPOINTS / args.model, args.model)
    arms: dict[str, tuple[Controller, int]] = {
        "solver": (Solver(), 0),
        "policy": (PolicyController(checkpoint, ahead=Lookahead()), 0),
    }
    for told_s in numbers("--foresight", args.foresight, "seconds", "0.2,1", 60.0):
        told = round(told_s / args.interval)
        if told < 1:
            raise ConfigError(
                f"--foresight: expected {args.interval:g} s (an interval) or more, got {told_s:g}"
            )
        arms[f"told {told_s:g} s"] = PolicyController(checkpoint), told
    startup = round(args.startup_s / args.interval)
    length = startup + round(args.seconds / args.interval)
    base = Scenario.load().replace(interval_s=args.interval)
    rows = []
    for cell in split(args.traces, base).part(args.split):
        for rate in numbers("--rates", args.rates, "fractions", "0.4,0.8", 100.0):
            scenario = cell.scenario.replace(capacity_fraction=rate, rate_rps=0.0)
            model = CostModel(checkpoint.profile, scenario, checkpoint.references)
            rps = np.full(args.seeds, model.rate_rps())
            source = GridConditions(model.scenario, rps, args.first_seed)
            tape = record_conditions(source, length)
            over = over_oracle(model, tape, arms, args.tried, startup)
            rows.append({"cell": f"{cell.name} {rate:g}", **over})
            found = ", ".join(f"{arm} {ratio:.3f}" for arm, ratio in over.items())
            print(f"{args.model}, {cell.name} {rate:g}: {found}", flush=True)
    for arm in over:
        print(f"{arm}: {np.mean([row[arm] for row in rows]):.3f} x the oracle")
    if args.json is not None:
        write_json(args.json, {"model": args.model, "cells": rows})
    return 0


def over_oracle(
    model: CostModel, tape: Tape, arms: dict[str, tuple[Controller, int]], tried: int, startup: int
) -> dict[str, float]:
    """Mean cost over the oracle's on a tape, of controllers that are told so many intervals."""
    played = {
        arm: play(model, tape, controller, told, tried) for arm, (controller, told) in arms.items()
    }
    found = search(model, tape, startup=startup, incumbents=list(played.values()))
    branches = Branches(model, tape)
    least = branches.total(found.cuts, startup, found.probe_bytes).mean()
    return {
        arm: float(branches.total(sequence.cuts, startup, sequence.probe_bytes).mean() / least)
        for arm, sequence in played.items()
    }


def play(
    model: CostModel, tape: Tape, controller: Controller, told: int, tried: int
) -> PlanSequence:
    """What is decided on a tape; who is told nothing (0) does as the controller says."""
    simulator = Simulator(model, tape.batch, 0, conditions=tape.play())
    state = simulator.reset()
    controller.reset(model, tape.batch)
    decisions = []
    for t in range(len(tape)):
        decision = controller.decide(state)
        if told:
            assert isinstance(controller, ActorController)
            plans = candidates(model, state, decision.cuts, tried)
            n_ahead = min(told, len(tape) - t)
            spent = trial_costs(model, tape.play(np.repeat(np.arange(tape.batch), tried), t),
                                simulator.snapshot(), controller, plans, n_ahead)  # fmt: skip
            best = plans[np.arange(tape.batch), spent.argmin(axis=1)]
            decision = Decision(best, decision.probe_bytes)
        decisions.append(decision)
        state = simulator.step(decision.cuts, decision.probe_bytes).state
    return PlanSequence.of(decisions)


def candidates(model: CostModel, state: SystemState, own: I64, tried: int) -> I64:
    """Plans [B, tried, H]: the controller's own, and those predicted to cost least."""
    predicted, usable = model.predict(state).cost, model.usable(state)
    if usable is not None:
        predicted = np.where(usable, predicted, np.inf)
    likely: I64 = model.table.cuts[predicted.argsort(axis=1)[:, : tried - 1]]
    return np.concatenate([own[:, None], likely], axis=1)


def trial_costs(
    model: CostModel,
    conditions: ConditionsSource,
    snapshot: Snapshot,
    controller: ActorController,
    plans: I64,
    n_ahead: int,
) -> F64:
    """Costs [B, K] of each plan [B, K, H] for an interval, the controller deciding after it."""
    batch, tried = plans.shape[:2]
    owner = np.repeat(np.arange(batch), tried)
    cost = Cost(model.profile, model.references, model.scenario)
    simulator = Simulator(model, len(owner), 0, conditions=conditions)
    state = simulator.restore(snapshot, owner)
    follower = controller.take(owner)
    probes: F64 | None = idle_probes(state, model.scenario)
    cuts = plans.reshape(len(owner), -1)
    ones, spent = np.ones(len(owner)), np.zeros(len(owner))
    for k in range(n_ahead):
        if k:
            decision = follower.decide(state)
            cuts, probes = decision.cuts, decision.probe_bytes
        result = simulator.step(cuts, probes)
        state = result.state
        spent += cost(result.record, ones)
    spent += cost(simulator.drain(), ones)
    return spent.reshape(batch, tried)


if __name__ == "__main__":
    sys.exit(run_command(main))
