"""How long a decision of the numpy runtime takes, state in, plan out.

python benchmarks/decision.py
python benchmarks/decision.py --arms policy-greedy,policy,mpc     # in turns, on the same states
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from agents.arms.controllers import ArmContext, make_arm
from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator


def main() -> None:
    """Time decisions on states from the simulator, one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["alexnet", "vgg16", "mobilenet_v2"])
    parser.add_argument("--arms", default="policy", help="the first one's plans are carried out")
    parser.add_argument("--decisions", type=int, default=5000)
    args = parser.parse_args()
    for name in args.models:
        checkpoint = Checkpoint.load(CHECKPOINTS / name, name)
        model = CostModel(checkpoint.profile, Scenario.load(), checkpoint.references)
        simulator = Simulator(model, 1, 0)
        state = simulator.reset()
        arms = {arm: make_arm(arm, ArmContext(model, checkpoint)) for arm in args.arms.split(",")}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for controller in arms.values():
            controller.reset(model, 1)
        for i in range(args.decisions):
            decisions = []
            for arm, controller in arms.items():
                begun = time.perf_counter()
                decisions.append(controller.decide(state))
                seconds[arm].append(time.perf_counter() - begun)
            if i % 20 == 0:
                decision = decisions[0]
                state = simulator.step(decision.cuts, decision.probe_bytes).state
        for arm, taken in seconds.items():
            p50, p99 = np.percentile(np.array(taken[100:]) * 1e6, [50, 99])
            print(f"{name}: {arm}, {len(model.plans)} plans, p50 {p50:.0f} us, p99 {p99:.0f} us")
    print("torch imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()
