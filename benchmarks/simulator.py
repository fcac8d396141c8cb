"""How fast the batched simulator is on one core: `python benchmarks/simulator.py --model alexnet`.

One environment-step is one environment advanced by one interval. Plans are drawn at random from
the candidates, per environment and step. The median of the repeats is reported, and the best,
which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.cli import MODEL_HELP, model_argument
from env.conditions import Conditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder
from env.synthetic import synthetic_model
from executor.errors import ConfigError

TARGET_STEPS_PER_S = 300_000


def measure(step: Callable[[], object], batch: int, steps: int, repeats: int) -> list[float]:
    """Median and best environment-steps per second of CPU time."""
    rates = []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(steps):
            step()
        rates.append(batch * steps / (time.process_time() - began))
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="alexnet", type=model_argument, help=MODEL_HELP)
    parser.add_argument("--scenario", default=None, help="scenario TOML; the shipped one if absent")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--requests", type=float, default=5.0, help="mean requests per step")
    parser.add_argument("--steps", type=int, default=50, help="steps per repeat")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    try:
        scenario = Scenario.load(args.scenario)
        model = CostModel(synthetic_model(args.model, scenario), scenario)
        rate = args.requests / scenario.interval_s
        simulator = Simulator(model, args.batch, 0, rate_rps=rate)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    encoder, rng = Encoder(model), np.random.default_rng(0)
    plans = rng.integers(len(model.plans), size=(64, args.batch))
    cuts = [model.table.cuts[p] for p in plans]
    turn = 0
    history = encoder.new_history(args.batch)

    def core() -> object:
        nonlocal turn
        turn += 1
        return simulator.step(cuts[turn % len(cuts)])

    def observed() -> object:
        nonlocal turn, history
        turn += 1
        state = simulator.step(cuts[turn % len(cuts)]).state
        history = encoder.push(history, state)
        return encoder.observe(history, state)

    conditions = Conditions(scenario, np.full(args.batch, rate), 0)
    for _ in range(10):  # queues fill, caches warm up
        observed()
    print(
        f"{args.model}: batch {args.batch}, {args.requests:g} requests per step, "
        f"{len(model.plans)} candidate plans, interval {scenario.interval_s:g} s, one core"
    )
    for name, step in (
        ("core", core),
        ("core + observation", observed),
        ("conditions alone", conditions.next),
    ):
        rates = measure(step, args.batch, args.steps, args.repeats)
        median, best = statistics.median(rates), max(rates)
        print(
            f"  {name:20s} median {median:10,.0f} best {best:10,.0f} env-steps/s "
            f"({median / TARGET_STEPS_PER_S:.2f} / {best / TARGET_STEPS_PER_S:.2f} x the target of "
            f"{TARGET_STEPS_PER_S:,})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
