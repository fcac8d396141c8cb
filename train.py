"""`python train.py --model alexnet`: from running nodes to a policy that decides on them.

Starts the nodes (three processes on this machine, or a cluster), profiles and calibrates them,
trains a PPO policy in the simulator made from that profile, fine-tunes it on the nodes, and leaves
the checkpoint in checkpoints/MODEL/. TensorBoard reads runs/.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from agents.arms.policy_all import load_base
from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    add_base_argument,
    add_transfer_argument,
    load_profile,
    model_argument,
    positive_int,
    run_command,
    transfers,
)
from agents.learning.hindsight import HindsightSettings
from agents.learning.training import TrainingSettings
from agents.pipeline import Pipeline
from env.scenario import Scenario
from executor.logs import add_log_arguments, configure_logging
from executor.modelref import model_label
from executor.netns import add_isolation_argument, check_isolation


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python train.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", type=model_argument, default="alexnet", help=MODEL_HELP)
    parser.add_argument("--scenario", type=Path, help="scenario file (default: the shipped one)")
    parser.add_argument("--cluster", type=Path, help="train on these nodes, not on the testbed")
    parser.add_argument(
        "--profile",
        type=Path,
        help="train on this saved profile (checkpoints/MODEL/profile.json) in the simulator alone: "
        "no nodes, no fine-tuning",
    )
    add_base_argument(parser)
    parser.add_argument("--rounds", type=int, default=24, help="rounds of hindsight before PPO")
    parser.add_argument("--steps", type=positive_int, help="steps of PPO (default: 150,000)")
    parser.add_argument("--online-steps", type=int, default=40, help="intervals on the nodes")
    parser.add_argument(
        "--live-intervals", type=positive_int, default=15, help="per arm of the closing table"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="where to (default: checkpoints/MODEL)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="TensorBoard's folder")
    parser.add_argument("--weights", default="none", help="none, DEFAULT or a file (testbed only)")
    add_transfer_argument(parser)
    add_isolation_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    add_log_arguments(parser)
    args = parser.parse_args(argv)
    configure_logging(args)
    for name in ("rounds", "online_steps"):
        if getattr(args, name) < 0:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: expected 0 or more, got {getattr(args, name)}")
    check_isolation(args.isolation, testbed=args.cluster is None)
    training = TrainingSettings(seed=args.seed, hindsight=HindsightSettings(rounds=args.rounds))
    if args.steps:
        training = replace(training, steps=args.steps)
    if args.profile is not None and args.cluster is not None:
        parser.error("--profile trains without nodes and --cluster for running ones; give one")
    scenario, instead = Scenario.load(args.scenario), "set `transfer` in the cluster file"
    if args.profile is not None:
        instead = "the profile says it"
    testbed = args.cluster is None and args.profile is None
    base = load_base(args.base, scenario)
    pipeline = Pipeline(
        model_name=args.model,
        scenario=scenario,
        transfers=transfers(args.transfer, len(scenario.hops), testbed, instead),
        training=training,
        online_steps=args.online_steps,
        directory=args.checkpoint or CHECKPOINTS / model_label(args.model),
        log_dir=args.runs / f"{model_label(args.model)}-{time.strftime('%Y%m%d-%H%M%S')}",
        cluster=args.cluster,
        weights=args.weights,
        isolation=args.isolation,
        live_intervals=args.live_intervals,
        resume=args.resume,
        profile=load_profile(args.profile, args.model, scenario) if args.profile else None,
        base=base,
    )
    pipeline.run()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
