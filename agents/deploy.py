"""`python -m agents.deploy`: the control loop on the edge.

Serves requests with a controller that decides the split once per interval, shows what happens in
a live table, and ends with a summary (Ctrl-C ends it early).
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch.utils.tensorboard.writer import SummaryWriter

from agents.cli import CHECKPOINTS, MODEL_HELP, Parser, model_argument, positive_float, run_command
from agents.controllers import ArmContext, Controller, Decision, make_arm
from agents.guard import GuardedController
from agents.nodes import open_cluster, open_testbed
from agents.runtime import Checkpoint
from agents.scalars import log_system
from env.cost import Cost, IntervalRecord
from env.live import LiveSystem
from env.scenario import Scenario
from env.system import StepResult
from executor.errors import ConfigError
from executor.model import model_spec
from executor.modelref import model_label
from executor.profile import write_atomic

__all__ = ["Session", "main"]

UNLIMITED_S = 7200.0
CONTROLLERS = ("policy", "solver", "paper", "static", "edge", "fog", "cloud")


class Session:
    """One deployment: the loop, and what it added up.

    Args:
        system: The running nodes.
        controller: Who decides.
    """

    def __init__(self, system: LiveSystem, controller: Controller) -> None:
        self.system, self.controller = system, controller
        model = system.model
        self.cost = Cost(model.profile, model.references, model.scenario)
        self.total = IntervalRecord.zeros(1, model.profile.n_nodes)
        self.latencies_s: list[float] = []
        self.decide_s: list[float] = []
        self.plans: list[tuple[int, ...]] = []
        self.interrupted = False

    def run(
        self, duration_s: float, seed: int, show: Callable[[Decision, StepResult], None]
    ) -> None:
        """Serve for `duration_s` seconds (0: until Ctrl-C), then finish what is open.

        Ctrl-C ends the loop after the interval; a second one interrupts at once.
        """
        system = self.system
        before = signal.getsignal(signal.SIGINT)

        def stop(*_: object) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, stop)
        try:
            state, last = system.reset(seed), None
            self.controller.reset(system.model, 1)
            while not self.interrupted and (not duration_s or system.time_s < duration_s - 1e-9):
                begun = time.perf_counter()
                decision = self.controller.decide(state, last)
                self.decide_s.append(time.perf_counter() - begun)
                self.plans.append(tuple(map(int, decision.cuts[0])))
                last = system.step(decision.cuts, decision.probe_bytes)
                state = last.state
                self._add(last)
                show(decision, last)
            self._add(system.drain_completed())
        finally:
            signal.signal(signal.SIGINT, before)

    def _add(self, result: StepResult) -> None:
        self.total.add(result.record)
        if result.completed is not None:
            done = result.completed
            ran = ~done.lost
            self.latencies_s += (done.completion_s - done.arrival_s)[ran].tolist()

    def log(self, writer: SummaryWriter, result: StepResult) -> None:
        """Write the interval's system/ and guard/ scalars."""
        step = len(self.plans)
        log_system(writer, step, result)
        cost = float(self.cost(result.record, self.system.n_ref)[0])
        writer.add_scalar("deploy/reward", -cost, step)
        if isinstance(self.controller, GuardedController):
            count = sum(self.controller.fallbacks.values())
            writer.add_scalar("guard/fallbacks", count, step)
            writer.add_scalar("guard/solver_decides", float(bool(self.controller.reason)), step)

    @property
    def switches(self) -> int:
        """How often the plan changed."""
        return sum(a != b for a, b in zip(self.plans, self.plans[1:], strict=False))

    def summary(self) -> dict[str, Any]:
        """What was served and what it cost, as plain data."""
        total, model = self.total, self.system.model
        energy, served = self.cost.energy(total), max(1, int(total.completed[0]))
        latency = np.array(self.latencies_s or [float("nan")]) * 1e3
        fallbacks: dict[str, int] = {}
        if isinstance(self.controller, GuardedController):
            fallbacks = dict(self.controller.fallbacks)
        return {
            "model": model.profile.spec.name,
            "controller": self.controller.name,
            "seconds": round(self.system.time_s, 3),
            "interval_s": model.scenario.interval_s,
            "meters": sorted({node.meter for node in model.profile.nodes}),
            "latency_ms": {
                "mean": float(latency.mean()),
                **{f"p{q}": float(np.percentile(latency, q)) for q in (50, 95, 99)},
            },
            "energy_j_per_request": {
                "full": {
                    "edge": float(energy.edge_full_j[0]) / served,
                    "total": float(energy.total_full_j[0]) / served,
                },
                "compute": {
                    "edge": float(energy.edge_compute_j[0]) / served,
                    "total": float(energy.total_compute_j[0]) / served,
                },
            },
            "cost_per_request": float(self.cost(total, np.ones(1))[0])
            / max(1, int(total.arrived[0])),
            "requests": {
                "submitted": int(total.arrived[0]),
                "completed": int(total.completed[0]),
                "lost": int(total.lost[0]),
                "late": int(total.late[0]),
            },
            "decisions": len(self.decide_s),
            "switches": self.switches,
            "decide_us": float(np.median(self.decide_s or [0.0]) * 1e6),
            "fallbacks": fallbacks,
            "interrupted": self.interrupted,
        }


def describe_plan(cuts: tuple[int, ...], names: list[str], n_units: int) -> str:
    """A plan in words, e.g. `edge 0-3 | fog relays | cloud 3-21`."""
    bounds = (0, *cuts, n_units)
    parts = []
    for k, name in enumerate(names):
        if bounds[k] < bounds[k + 1]:
            parts.append(f"{name} {bounds[k]}-{bounds[k + 1]}")
        elif bounds[k] < n_units:
            parts.append(f"{name} relays")
    return " | ".join(parts)


def live_table(session: Session, decision: Decision, result: StepResult) -> Table:
    """The state of the deployment after an interval."""
    model, state, record = session.system.model, result.state, result.record
    profile = model.profile
    names = [node.name for node in profile.nodes]
    cuts = tuple(map(int, decision.cuts[0]))
    reason = getattr(session.controller, "reason", "")
    table = Table(title=f"splitpilot: {profile.spec.name}, {session.controller.name}")
    table.add_column("what")
    table.add_column("now", min_width=58)
    table.add_row("time", f"{session.system.time_s:.0f} s")
    table.add_row("split (units)", describe_plan(cuts, names, profile.spec.n_units))
    hops = [
        f"{names[h]}-{names[h + 1]} {state.bytes_per_s[0, h] * 8e-6:.1f} Mbit/s "
        f"({state.bandwidth_age_s[0, h]:.1f} s old)"
        for h in range(len(profile.hops))
    ]
    table.add_row("bandwidth", ", ".join(hops))
    queues = [f"{name} {state.node_backlog_s[0, k] * 1e3:.0f} ms" for k, name in enumerate(names)]
    table.add_row("queues", ", ".join(queues) + f", {state.in_flight[0]:.0f} in flight")
    loads = [f"{name} {state.node_load[0, k]:.0%}" for k, name in enumerate(names)]
    table.add_row("load by others", ", ".join(loads))
    done = int(record.completed[0])
    mean = f"{record.latency_sum_s[0] / done * 1e3:.0f} ms mean" if done else "none completed"
    recent = np.array(session.latencies_s[-100:] or [float("nan")]) * 1e3
    table.add_row("latency", f"{mean}; last 100: p95 {np.percentile(recent, 95):.0f} ms")
    energy = session.cost.energy(session.total)
    served = max(1, int(session.total.completed[0]))
    table.add_row(
        "energy per request",
        f"edge {energy.edge_full_j[0] / served:.2f} J, "
        f"total {energy.total_full_j[0] / served:.2f} J (power model, full)",
    )
    table.add_row(
        "requests",
        f"{session.total.arrived[0]} in, {session.total.completed[0]} done, "
        f"{session.total.lost[0]} lost, {session.total.late[0]} late",
    )
    table.add_row(
        "decisions",
        f"{len(session.plans)} ({session.switches} switches), "
        f"{np.median(session.decide_s) * 1e6:.0f} us each"
        + (f"; solver decides: {reason}" if reason else ""),
    )
    return table


def live_line(session: Session, decision: Decision, result: StepResult) -> str:
    """The same in a line, for a log."""
    model, record = session.system.model, result.record
    names = [node.name for node in model.profile.nodes]
    cuts = tuple(map(int, decision.cuts[0]))
    done = int(record.completed[0])
    latency = f"{record.latency_sum_s[0] / done * 1e3:.0f} ms" if done else "-"
    rates = "/".join(f"{r * 8e-6:.1f}" for r in result.state.bytes_per_s[0])
    return (
        f"{session.system.time_s:6.1f} s | {describe_plan(cuts, names, model.profile.spec.n_units)}"
        f" | {rates} Mbit/s | {result.state.in_flight[0]:.0f} in flight | {done} done, {latency}"
    )


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary for the terminal."""
    table = Table(title=f"{summary['model']}, {summary['controller']}: summary", show_header=False)
    latency, energy = summary["latency_ms"], summary["energy_j_per_request"]["full"]
    requests = summary["requests"]
    table.add_row("served", f"{summary['seconds']:.0f} s, {summary['decisions']} decisions")
    table.add_row("requests", ", ".join(f"{v} {k}" for k, v in requests.items()))
    table.add_row("latency, ms", ", ".join(f"{k} {v:.0f}" for k, v in latency.items()))
    table.add_row(
        "energy per request", f"edge {energy['edge']:.3f} J, total {energy['total']:.3f} J (full)"
    )
    table.add_row("cost per request", f"{summary['cost_per_request']:.3f}")
    table.add_row("switches", f"{summary['switches']}")
    table.add_row("decision", f"{summary['decide_us']:.0f} us (median)")
    if summary["fallbacks"]:
        table.add_row("fall-backs", ", ".join(f"{k}: {v}" for k, v in summary["fallbacks"].items()))
    return table


def image_inputs(
    directory: Path, shape: tuple[int, ...] = (1, 3, 224, 224)
) -> Callable[[int], Any]:
    """Images of a folder as inputs: resized, centre-cropped, ImageNet-normalised.

    Args:
        directory: The folder.
        shape: The model's input, 1 x 3 x S x S: the shorter side is resized to S * 8 / 7 (256 for
            224), the crop is S.

    Raises:
        ConfigError: No such folder, no image in it, one that cannot be read, or a model that takes
            no colour image.
    """
    crop, resized = shape[-1], round(shape[-1] * 8 / 7)
    if shape != (1, 3, crop, crop):
        raise ConfigError(f"--source: images are 1 x 3 x S x S, the model takes {shape}")
    import torch
    from PIL import Image

    suffixes = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
    if not directory.is_dir():
        raise ConfigError(f"--source: expected `random` or a folder of images, got {directory}")
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in suffixes)
    if not files:
        raise ConfigError(f"--source {directory}: no image files ({', '.join(sorted(suffixes))})")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    inputs = []
    for file in files[:256]:
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
        except OSError as error:
            raise ConfigError(f"--source: cannot read image {file}: {error}") from error
        scale = resized / min(rgb.size)
        size = (max(resized, round(rgb.width * scale)), max(resized, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)
        left, top = (rgb.width - crop) // 2, (rgb.height - crop) // 2
        pixels = np.asarray(rgb.crop((left, top, left + crop, top + crop)), dtype=np.float32)
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255.0
        inputs.append(((tensor - mean) / std).unsqueeze(0).contiguous())
    return lambda i: inputs[i % len(inputs)]


def make_controller(name: str, system: LiveSystem, checkpoint: Checkpoint | None) -> Controller:
    """A controller by its command-line name; the policy comes guarded."""
    context = ArmContext(system.model, checkpoint)
    controller = make_arm(name, context)
    return GuardedController(controller) if name == "policy" else controller


@contextmanager
def open_system(args: Any, checkpoint: Checkpoint | None) -> Iterator[LiveSystem]:
    """The cluster that was named, or the testbed."""
    # The conditions played on the testbed last as long as an episode, then stay as they are.
    scenario = Scenario.load(args.scenario).replace(episode_s=args.duration or UNLIMITED_S)
    if args.rate:
        scenario = scenario.replace(rate_rps=args.rate)
    source = (
        None
        if args.source == "random"
        else image_inputs(Path(args.source), model_spec(args.model).input_shape)
    )
    references = checkpoint.references if checkpoint else None
    if args.cluster:
        with open_cluster(args.cluster, args.model, scenario, source, references) as system:
            yield system
        return
    with open_testbed(
        args.model, scenario, references=references, weights=args.weights, source=source
    ) as system:
        yield system


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m agents.deploy", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", type=model_argument, default="alexnet", help=MODEL_HELP)
    parser.add_argument("--cluster", type=Path, help="cluster.toml; without it the testbed starts")
    parser.add_argument("--controller", choices=CONTROLLERS, default="policy")
    parser.add_argument("--source", default="random", help="`random` or a folder of images")
    parser.add_argument("--rate", type=positive_float, help="mean requests/s (default: scenario's)")
    parser.add_argument("--duration", type=positive_float, help="seconds (default: until Ctrl-C)")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--scenario", type=Path, help="scenario file (default: the shipped one)")
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/MODEL")
    parser.add_argument("--weights", default="none", help="none, DEFAULT or a file (testbed only)")
    parser.add_argument("--seed", type=int, default=0, help="conditions and arrivals")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="TensorBoard's folder")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    console = Console()
    name = model_label(args.model)
    log_dir = args.runs / f"deploy-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint = None
    if args.controller == "policy" or args.checkpoint:
        checkpoint = Checkpoint.load(args.checkpoint or CHECKPOINTS / name, name)
    with console.status("starting and profiling the nodes") as status:
        with open_system(args, checkpoint) as system:
            controller = make_controller(args.controller, system, checkpoint)
            session = Session(system, controller)
            status.stop()
            duration = args.duration or 0.0
            with SummaryWriter(str(log_dir)) as writer:
                if console.is_terminal:
                    with Live(console=console, refresh_per_second=4) as live:

                        def show(decision: Decision, result: StepResult) -> None:
                            live.update(live_table(session, decision, result))
                            session.log(writer, result)

                        session.run(duration, args.seed, show)
                else:

                    def log_line(decision: Decision, result: StepResult) -> None:
                        print(live_line(session, decision, result), flush=True)
                        session.log(writer, result)

                    session.run(duration, args.seed, log_line)
            summary = session.summary()
    console.print(summary_table(summary))
    if args.json:
        write_atomic(args.json, (json.dumps(summary, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
