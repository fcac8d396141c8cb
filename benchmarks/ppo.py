"""PPO end to end: environment steps per second, rollouts and updates together.

python benchmarks/ppo.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS
from agents.learning.hindsight import HindsightSettings
from agents.learning.training import TrainingSettings, train_policy
from env.predict import CostModel
from env.scenario import Scenario


def main() -> None:
    """Train briefly on each model's own profile and print the speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["alexnet", "vgg16", "mobilenet_v2"])
    parser.add_argument("--steps", type=int, default=300_000)
    args = parser.parse_args()
    for name in args.models:
        checkpoint = Checkpoint.load(CHECKPOINTS / name, name)
        model = CostModel(checkpoint.profile, Scenario.load(), checkpoint.references)
        # Validation is not part of the loop that is timed.
        settings = replace(
            TrainingSettings(),
            hindsight=HindsightSettings(rounds=0),
            steps=args.steps,
            validate_every=10**9,
        )
        result = train_policy(model, settings)
        print(f"{name}: {result.steps_per_s:,.0f} steps/s ({len(model.plans)} plans)", flush=True)


if __name__ == "__main__":
    main()
