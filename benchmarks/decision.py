"""How long a decision of the numpy runtime takes, state in, plan out.

python benchmarks/decision.py
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from agents.arms.runtime import Checkpoint, PolicyController
from agents.cli import CHECKPOINTS
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator


def main() -> None:
    """Time decisions on states from the simulator, one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["alexnet", "vgg16", "mobilenet_v2"])
    parser.add_argument("--decisions", type=int, default=5000)
    args = parser.parse_args()
    for name in args.models:
        checkpoint = Checkpoint.load(CHECKPOINTS / name, name)
        model = CostModel(checkpoint.profile, Scenario.load(), checkpoint.references)
        simulator = Simulator(model, 1, 0)
        controller = PolicyController(checkpoint)
        state = simulator.reset()
        controller.reset(model, 1)
        seconds = []
        for i in range(args.decisions):
            begun = time.perf_counter()
            decision = controller.decide(state)
            seconds.append(time.perf_counter() - begun)
            if i % 20 == 0:
                state = simulator.step(decision.cuts, decision.probe_bytes).state
        p50, p99 = np.percentile(np.array(seconds[100:]) * 1e6, [50, 99])
        print(f"{name}: {len(model.plans)} plans, p50 {p50:.0f} us, p99 {p99:.0f} us")
    print("torch imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()
