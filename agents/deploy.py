"""`python -m agents.deploy`: the control loop on the edge.

Serves requests with a controller that decides the split once per interval, shows what happens in
a live table (and, if asked, a live page and metrics), and ends with a summary (Ctrl-C or SIGTERM
ends it early).
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from torch.utils.tensorboard.writer import SummaryWriter

from agents.arms.controllers import ArmContext, Controller, Decision, Glancing, make_arm
from agents.arms.guard import GuardedController
from agents.arms.policy_all import ScoringPolicy
from agents.arms.recalibrated import Recalibrated
from agents.arms.runtime import Checkpoint
from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    add_transfer_argument,
    model_argument,
    positive_float,
    run_command,
    transfers,
)
from agents.nodes import open_cluster, open_testbed
from agents.serving.dashboard import DEFAULT_PORT, dashboard_routes
from agents.serving.display import live_line, live_table, summary_table
from agents.serving.metrics import agent_routes
from agents.serving.session import Session
from agents.serving.telemetry import Telemetry
from env.live import LiveSystem
from env.scenario import Scenario
from env.system import StepResult
from executor._http import HttpServer, add_metrics_arguments, port
from executor.errors import ConfigError
from executor.files import write_atomic
from executor.images import image_input
from executor.logs import add_log_arguments, configure_logging
from executor.model import model_spec
from executor.modelref import model_label
from executor.netns import add_isolation_argument, check_isolation

__all__ = ["main"]

log = logging.getLogger("agents.deploy")  # also where it is __main__

UNLIMITED_S = 7200.0
PREDICTING = ("policy", "policy-all", "solver")  # these can also be asked for every request
CONTROLLERS = ("policy", "policy-all", "solver", "paper", "static", "edge", "fog", "cloud")


def image_inputs(
    directory: Path, shape: tuple[int, ...] = (1, 3, 224, 224)
) -> Callable[[int], Any]:
    """Images of a folder as inputs: resized, centre-cropped, ImageNet-normalised.

    Args:
        directory: The folder.
        shape: The model's input, as `executor.images.image_input` takes it.

    Raises:
        ConfigError: No such folder, no image in it, one that cannot be read, or a model that takes
            no colour image.
    """
    from PIL import Image

    suffixes = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
    if not directory.is_dir():
        raise ConfigError(f"--source: expected `random` or a folder of images, got {directory}")
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in suffixes)
    if not files:
        raise ConfigError(f"--source {directory}: no image files ({', '.join(sorted(suffixes))})")
    inputs = []
    for file in files[:256]:
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
        except OSError as error:
            raise ConfigError(f"--source: cannot read image {file}: {error}") from error
        inputs.append(image_input(rgb, shape))
    return lambda i: inputs[i % len(inputs)]


def make_controller(
    name: str, system: LiveSystem, checkpoint: Checkpoint | None, recalibrate: bool = True
) -> Controller:
    """A controller by its command-line name; policies come guarded.

    With `recalibrate` those that predict costs correct the system's cost model, which guard and
    cut tables use as well.
    """
    context = ArmContext(system.model, checkpoint)
    controller = make_arm(name, context)
    if recalibrate and name in PREDICTING:
        controller = Recalibrated(controller, system.model)
    return GuardedController(controller) if name.startswith("policy") else controller


@contextmanager
def open_system(args: Any, checkpoint: Checkpoint | None) -> Iterator[LiveSystem]:
    """The cluster that was named, or the testbed."""
    # The conditions played on the testbed last as long as an episode, then stay as they are.
    scenario = Scenario.load(args.scenario).replace(episode_s=args.duration or UNLIMITED_S)
    if args.rate:
        scenario = scenario.replace(rate_rps=args.rate)
    if args.interval:
        scenario = scenario.replace(interval_s=args.interval)
    if args.late_binding:
        scenario = scenario.replace(late_binding=True)
    source = (
        None
        if args.source == "random"
        else image_inputs(Path(args.source), model_spec(args.model).input_shape)
    )
    references = checkpoint.references if checkpoint else None
    instead = "set `transfer` in the cluster file"
    forms = transfers(args.transfer, len(scenario.hops), args.cluster is None, instead)
    check_isolation(args.isolation, testbed=not args.cluster)
    if args.cluster:
        with open_cluster(args.cluster, args.model, scenario, source, references) as system:
            yield system
        return
    with open_testbed(
        args.model,
        scenario,
        references=references,
        weights=args.weights,
        source=source,
        transfers=forms,
        isolation=args.isolation,
    ) as system:
        yield system


def _parser() -> Parser:
    parser = Parser(prog="python -m agents.deploy", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", type=model_argument, default="alexnet", help=MODEL_HELP)
    parser.add_argument("--cluster", type=Path, help="cluster.toml; without it the testbed starts")
    parser.add_argument("--controller", choices=CONTROLLERS, default="policy")
    parser.add_argument("--source", default="random", help="`random` or a folder of images")
    parser.add_argument("--rate", type=positive_float, help="mean requests/s (default: scenario's)")
    parser.add_argument("--duration", type=positive_float, help="seconds (default: until Ctrl-C)")
    parser.add_argument(
        "--interval", type=positive_float, help="seconds between decisions (default: scenario's)"
    )
    parser.add_argument(
        "--per-request",
        action=argparse.BooleanOptionalAction,
        help="decide again for every request, as it is submitted (default: policies and solver do)",
    )
    parser.add_argument(
        "--late-binding",
        action="store_true",
        help="let the fog pick its cut when a request's turn comes (docs/cadence.md)",
    )
    parser.add_argument(
        "--no-recalibration",
        action="store_true",
        help="policies and solver: keep the start-up profile, whatever the requests measure "
        "(docs/finetuning.md)",
    )
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--scenario", type=Path, help="scenario file (default: the shipped one)")
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/MODEL")
    parser.add_argument("--weights", default="none", help="none, DEFAULT or a file (testbed only)")
    add_transfer_argument(parser)
    add_isolation_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="conditions and arrivals")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="TensorBoard's folder")
    parser.add_argument(
        "--dashboard",
        nargs="?",
        type=port,
        const=DEFAULT_PORT,
        metavar="PORT",
        help=f"serve the live page (default port: {DEFAULT_PORT}; 0: any free one)",
    )
    parser.add_argument(
        "--dashboard-host", default="127.0.0.1", help="address for it (default: 127.0.0.1)"
    )
    add_metrics_arguments(parser, "off")
    add_log_arguments(parser, level="error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    configure_logging(args)
    before = signal.getsignal(signal.SIGTERM)
    # While it starts, SIGTERM is as Ctrl-C; once it serves, `Session.run` takes both.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _deploy(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _deploy(args: argparse.Namespace) -> int:
    console = Console()
    name = model_label(args.model)
    log_dir = args.runs / f"deploy-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.per_request and args.controller not in PREDICTING:
        raise ConfigError(
            f"--per-request needs --controller {', '.join(PREDICTING)}; got {args.controller}"
        )
    if args.controller == "policy-all":
        ScoringPolicy.load(CHECKPOINTS / "all")  # missing or damaged: known before nodes start
    checkpoint = None
    if args.controller == "policy" or args.checkpoint:
        checkpoint = Checkpoint.load(args.checkpoint or CHECKPOINTS / name, name)
    telemetry = Telemetry()
    with ExitStack() as stack:
        _serve_operators(args, telemetry, console, stack)
        with console.status("starting and profiling the nodes") as status:
            system = stack.enter_context(open_system(args, checkpoint))
            recalibrate = not args.no_recalibration
            controller = make_controller(args.controller, system, checkpoint, recalibrate)
            if args.controller in PREDICTING and args.per_request is not False:
                assert isinstance(controller, Glancing)
                system.glance = controller.glance
            session = Session(system, controller, telemetry)
            status.stop()
        log.info("serving", extra={"model": args.model, "controller": controller.name})
        writer = stack.enter_context(SummaryWriter(str(log_dir)))
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, refresh_per_second=4))

        def show(decision: Decision, result: StepResult) -> None:
            if live is not None:
                live.update(live_table(session, decision, result))
            else:
                print(live_line(session, decision, result), flush=True)
            session.log(writer, result)

        session.run(args.duration or 0.0, args.seed, show)
    summary = session.summary()
    log.info("ended", extra={"summary": summary})
    console.print(summary_table(summary))
    if args.json:
        write_atomic(args.json, (json.dumps(summary, indent=1) + "\n").encode())
    return 0


def _serve_operators(
    args: argparse.Namespace, telemetry: Telemetry, console: Console, stack: ExitStack
) -> None:
    """Serve metrics and the live page, where they were asked for."""
    if args.metrics_port:
        routes = agent_routes(telemetry)
        stack.enter_context(HttpServer("metrics", args.metrics_host, args.metrics_port, routes))
    if args.dashboard is not None:
        routes = dashboard_routes(telemetry)
        page = HttpServer("dashboard", args.dashboard_host, args.dashboard, routes)
        stack.enter_context(page)
        console.print(f"live page: {page.url}/", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
