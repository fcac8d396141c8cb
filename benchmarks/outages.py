"""Silent hops: what requests take on real nodes, and in the simulator under the same conditions.

python benchmarks/outages.py --model alexnet [--scenario FILE] [--plan 3,14]     # 7 quiet minutes

One hop at a time carries nothing for 4, 2, 8 and 1 s of a minute, the rest at 20 Mbit/s; two
constant plans and the solver, one decision every 0.2 s, the same arrivals on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from agents.arms.controllers import Controller, Solver, Static, cloud_only
from agents.nodes import calibrate, measure_profile, random_inputs, spread, start_testbed
from agents.studies.compare import ArmRun, run_arm
from agents.studies.sim_to_real import MAX_IN_FLIGHT, constant_scenario
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Process, Scenario
from env.simulator import Simulator
from executor.plan import Plan, candidate_plans

SILENT = ((8, 12), (20, 22), (30, 38), (45, 46))
SECONDS, STEP_S, MBPS, RATE_RPS, SEED = 60, 0.2, 20.0, 0.8, 3


def scenario_with(base: Scenario, silent_hop: int, folder: Path) -> Scenario:
    """`base` at constant conditions, but for one hop, whose trace is written into `folder`."""
    lines = [f"{t},{0.0 if any(a <= t < b for a, b in SILENT) else MBPS}" for t in range(SECONDS)]
    trace = folder / "silent.csv"
    trace.write_text("time_s,mbps\n" + "\n".join(lines) + "\n")
    constant = constant_scenario(base, MBPS, float(SECONDS))
    hops = list(constant.hops)
    bandwidth = Process("trace", path=str(trace), jitter=False)
    hops[silent_hop] = replace(hops[silent_hop], bandwidth=bandwidth)
    return constant.replace(hops=tuple(hops), interval_s=STEP_S)


def text(run: ArmRun) -> str:
    """Mean, 95th percentile and longest latency, and how many were lost."""
    s = run.latency_s
    lost = int(run.spent.lost.sum())
    return f"{s.mean():.3f} / {np.percentile(s, 95):.2f} / {s.max():.2f} s, {lost} lost"


def main() -> None:
    """Print a line per hop and arm."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--scenario", help="nodes and delays (default: default)")
    parser.add_argument("--plan", help="cuts like 3,14 (default: the middle candidate)")
    args = parser.parse_args()
    base = Scenario.load(args.scenario)
    with (
        closing(start_testbed(args.model, base)) as testbed,
        testbed.client(max_in_flight=MAX_IN_FLIGHT) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        profile = measure_profile(client)
        plans = candidate_plans(profile.spec, profile.n_nodes)
        profile = calibrate(client, profile, spread(plans, 8))
        inputs = random_inputs(profile.spec.input_shape)
        middle = plans[len(plans) // 2]
        if args.plan is not None:
            middle = Plan(tuple(map(int, args.plan.split(","))))
        for hop in range(2):
            scenario = scenario_with(base, hop, Path(folder))
            model = CostModel(profile, scenario)
            arms: list[Controller] = [
                Static(str(middle), middle),
                Static("cloud", cloud_only(profile.spec, profile.n_nodes)),
                Solver(),
            ]
            for arm in arms:
                live = LiveSystem(model, client, inputs, testbed, RATE_RPS)
                try:
                    steps = round((SECONDS - 2) / STEP_S)
                    real = run_arm(live, arm, seed=SEED, n_intervals=steps)
                finally:
                    live.close()
                simulator = Simulator(model, 1, SEED, rate_rps=RATE_RPS, record_requests=True)
                virtual = run_arm(simulator, arm, seed=SEED, n_intervals=steps)
                print(
                    f"hop {hop} silent, {arm.name}: nodes {text(real)}; simulator {text(virtual)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
