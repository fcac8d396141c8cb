"""Do the nodes rank the arms as the simulator does? On measured traces, one model at a time.

python benchmarks/ranking.py --traces DIR --model alexnet [--scenario FILE]     # 6 quiet minutes

Every arm meets the same draw of each condition of the test part, on the testbed and in a simulator
of its freshly calibrated profile: 5 s, then 20 s that count, at 0.7 of capacity. A draw whose best
constant plan costs 1.1 or more in the simulator is passed over: in it an outage loses most
requests, whatever is decided. Two arms are out of order if the nodes rank them otherwise than the
simulator, in which they lie more than 1 % apart. Exit code 1 if any are.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from agents.arms.controllers import ArmContext, Controller, Static, make_arm
from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS
from agents.nodes import calibrate, measure_profile, random_inputs, spread, start_testbed
from agents.studies.compare import best_static_cuts, per_row, run_arm
from agents.studies.sim_to_real import MAX_IN_FLIGHT
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.splits import split
from executor.plan import candidate_plans

STARTUP_S, STEADY_S = 5, 20
CAPACITY_FRACTION, BEARABLE, APART = 0.7, 1.1, 0.01
FIRST_SEED, MOST_SEEDS = 31_000, 200
ARMS = "static,cloud,solver,guarded"
CONDITIONS = "ucc5g-steady,nyumets-steady,hsdpa-x10-steady"


def main() -> int:
    """Print a line per condition and arm, and what is out of order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--scenario", help="nodes (default: default)")
    parser.add_argument("--arms", default=ARMS)
    parser.add_argument("--conditions", default=CONDITIONS)
    parser.add_argument("--draws", type=int, default=1, help="of each condition")
    args = parser.parse_args()
    base = Scenario.load(args.scenario)
    known = {c.name: c.scenario for c in split(args.traces, base).test}
    checkpoint = Checkpoint.load(CHECKPOINTS / args.model, args.model)
    wrong = total = 0
    with (
        closing(start_testbed(args.model, base)) as testbed,
        testbed.client(max_in_flight=MAX_IN_FLIGHT) as client,
    ):
        profile = measure_profile(client)
        plans = candidate_plans(profile.spec, profile.n_nodes)
        profile = calibrate(client, profile, spread(plans, 8))
        inputs = random_inputs(profile.spec.input_shape)
        for name in args.conditions.split(","):
            scenario = replace(known[name], capacity_fraction=CAPACITY_FRACTION, rate_rps=0.0)
            model = CostModel(profile, scenario)
            for seed in bearable(model, args.draws):
                costs: dict[str, tuple[float, float]] = {}
                for arm in args.arms.split(","):
                    live = LiveSystem(model, client, inputs, testbed, model.rate_rps())
                    try:
                        real = cost(live, made(arm, model, checkpoint), seed)
                        late = max(live.overrun_share().values())
                    finally:
                        live.close()
                    costs[arm] = cost(simulator(model), made(arm, model, checkpoint), seed), real
                    print(
                        f"{args.model}, {name}, draw {seed}, {arm}: simulator "
                        f"{costs[arm][0]:.3f}, nodes {real:.3f} (stages late {late:.1%})",
                        flush=True,
                    )
                pairs = [
                    (one, two)
                    for one, two in combinations(costs, 2)
                    if disagree(costs[one], costs[two])
                ]
                total += 1
                wrong += bool(pairs)
                found = "; ".join(f"{one} and {two}" for one, two in pairs)
                print(f"{args.model}, {name}, draw {seed}: out of order: {found or 'none'}")
    print(f"{args.model}: {total - wrong} of {total} rankings agree")
    return int(wrong > 0)


def simulator(model: CostModel) -> Simulator:
    """One environment of the model's scenario."""
    return Simulator(model, 1, FIRST_SEED, rate_rps=model.rate_rps(), record_requests=True)


def made(arm: str, model: CostModel, checkpoint: Checkpoint) -> Controller:
    """The arm."""
    return make_arm(arm, ArmContext(model, checkpoint))


def cost(system: LiveSystem | Simulator, controller: Controller, seed: int) -> float:
    """Cost per request after the start."""
    second = round(1.0 / system.model.scenario.interval_s)
    run = run_arm(
        system,
        controller,
        seed=seed,
        n_intervals=STEADY_S * second,
        startup=STARTUP_S * second,
    )
    return float(per_row(run, system.model)["cost"][0])


def bearable(model: CostModel, count: int) -> list[int]:
    """The first draws in which the best constant plan costs less than `BEARABLE`."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + MOST_SEEDS):
        n_intervals = round(STEADY_S / model.scenario.interval_s)
        startup = round(STARTUP_S / model.scenario.interval_s)
        cuts = best_static_cuts(
            simulator(model), seed=seed, n_intervals=n_intervals, startup=startup
        )
        if cost(simulator(model), Static("best-static", cuts), seed) < BEARABLE:
            found.append(seed)
        if len(found) == count:
            break
    return found


def disagree(one: tuple[float, float], two: tuple[float, float]) -> bool:
    """Whether the nodes order two arms otherwise than the simulator (first of each) does."""
    apart = abs(one[0] - two[0]) > APART * min(one[0], two[0])
    return apart and (one[0] < two[0]) != (one[1] < two[1])


if __name__ == "__main__":
    sys.exit(main())
