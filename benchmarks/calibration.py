"""Simulated against measured mean latency.

Plans spread over the candidates, two bandwidths, idle and at 0.7 of each plan's own capacity, the
same arrivals on both sides.

    python benchmarks/calibration.py --model alexnet
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agents.cli import MODEL_HELP, model_argument, progress
from agents.compare import run_arm
from agents.controllers import Static
from agents.nodes import calibrate, measure_profile, random_inputs, spread, start_testbed
from env.live import LiveSystem
from env.predict import CostModel, PlanTable
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from env.simulator import Simulator
from executor.plan import Plan, candidate_plans
from executor.profile import Profile

BANDWIDTHS_MBPS = (20.0, 60.0)
IDLE_FRACTION, BUSY_FRACTION = 0.1, 0.7
SEED = 42


def constant_scenario(base: Scenario, mbps: float, episode_s: float) -> Scenario:
    """`base` with every hop at `mbps`, nodes unloaded and Poisson arrivals of constant rate."""
    return base.replace(
        nodes=tuple(NodeSetup(n.name, n.device, n.ratio) for n in base.nodes),
        hops=tuple(HopSetup(Process(levels=(mbps,)), h.one_way_delay_s) for h in base.hops),
        arrivals=Process(),
        max_in_flight=64,
        episode_s=episode_s,
    )


def capacity_rps(profile: Profile, plan: Plan, mbps: float) -> float:
    """Requests/s at which the plan's slowest station saturates."""
    table = PlanTable(profile, [plan])
    seconds = max(float(table.work_s.max()), float(table.hop_bytes.max()) / (mbps * 1e6 / 8))
    return 1.0 / seconds


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="alexnet", type=model_argument, help=MODEL_HELP)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--requests", type=int, default=30, help="mean requests per cell")
    parser.add_argument("--seconds", type=float, default=12.0, help="at most, per cell")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base, console = Scenario.load(), Console()
    testbed = start_testbed(args.model, base)
    rows = []
    try:
        client = testbed.client(max_in_flight=64)
        profile = measure_profile(client)
        every = candidate_plans(profile.spec, profile.n_nodes)
        profile = calibrate(client, profile, spread(every, 8))
        plans = spread(every, args.plans)
        with progress(console) as bar:
            task = bar.add_task("plans", total=len(plans) * 4, note="")
            for mbps in BANDWIDTHS_MBPS:
                for fraction in (IDLE_FRACTION, BUSY_FRACTION):
                    for plan in plans:
                        rate = fraction * capacity_rps(profile, plan, mbps)
                        steps = int(
                            np.ceil(args.requests / max(rate, args.requests / args.seconds))
                        )
                        scenario = constant_scenario(base, mbps, float(steps))
                        model = CostModel(profile, scenario)
                        live = LiveSystem(
                            model, client, random_inputs(profile.spec.input_shape), testbed, rate
                        )
                        arm = Static("plan", plan)
                        real = run_arm(live, arm, seed=SEED, n_intervals=steps)
                        simulator = Simulator(model, 1, SEED, rate_rps=rate, record_requests=True)
                        virtual = run_arm(simulator, arm, seed=SEED, n_intervals=steps)
                        live.close()
                        rows.append(
                            {
                                "mbps": mbps,
                                "load": fraction,
                                "plan": str(plan),
                                "requests": len(real.latency_s),
                                "measured_ms": 1e3 * float(real.latency_s.mean()),
                                "simulated_ms": 1e3 * float(virtual.latency_s.mean()),
                            }
                        )
                        bar.update(task, advance=1)
        client.close()
    finally:
        testbed.close()
    table = Table(title=f"{args.model}: mean latency, simulated against measured")
    for column in (
        "Mbit/s",
        "of capacity",
        "plan",
        "requests",
        "measured ms",
        "simulated ms",
        "error",
    ):
        table.add_column(column, justify="right")
    errors = []
    for row in rows:
        error = row["simulated_ms"] / row["measured_ms"] - 1.0
        errors.append(abs(error))
        table.add_row(
            f"{row['mbps']:.0f}",
            f"{row['load']}",
            row["plan"],
            str(row["requests"]),
            f"{row['measured_ms']:.1f}",
            f"{row['simulated_ms']:.1f}",
            f"{error:+.1%}",
        )
    console.print(table)
    console.print(f"mean absolute percentage error: {np.mean(errors):.1%} over {len(rows)} cells")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "mape": float(np.mean(errors))}, indent=1))


if __name__ == "__main__":
    main()
