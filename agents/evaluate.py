"""Arms side by side on the same conditions: `python -m agents.evaluate --model alexnet`.

On the simulator all seeds of an arm run as one batch; on the testbed arms and seeds run one after
the other, in real time.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from agents.cli import CHECKPOINTS, Parser, model_argument, positive_int, progress, run_command
from agents.compare import (
    BATTERY_WH,
    ArmRun,
    best_static_cuts,
    run_arm,
    startup_intervals,
    summarise,
)
from agents.controllers import ARMS, ArmContext, Controller, Decision, make_arm
from agents.oracle import PlanSequence, search
from agents.report import TABLE_WIDTH, plot, table
from agents.runtime import Checkpoint
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.profile import Profile, write_atomic

if TYPE_CHECKING:
    from env.system import System

__all__ = ["main", "make_testbed_system"]

POLICY_ARMS = ("policy-zeroed", "policy")
FIRST_SEED = 9000  # far from training's
DEFAULT_STARTUP_S = 20.0
MAX_OVERRUN_SHARE = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    return run_command(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    result = _evaluate(args, console)
    for rate, part in result["by_rate"].items():
        title = f"{args.model}, {args.backend}, {rate} of capacity ({part['rate_rps']:.2f}/s)"
        console.print(table(title, part["arms"]))
        for node, share in part["overrun_share"].items():
            if share > MAX_OVERRUN_SHARE:
                console.print(
                    f"not valid: {share:.1%} of {node}'s stages ended late (at most "
                    f"{MAX_OVERRUN_SHARE:.0%}); use a quieter machine or larger node ratios",
                    markup=False,
                )
    if len(result["by_rate"]) > 1:
        console.print(table(f"{args.model}, {args.backend}, all rates", result["arms"]))
    if args.json is not None:
        write_atomic(args.json, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if args.plot is not None:
        plot(result, args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.evaluate",
        description="Compare arms on the same bandwidth, load and arrivals.",
    )
    add = parser.add_argument
    add("--model", required=True, type=model_argument, help="alexnet, vgg16 or mobilenet_v2")
    add("--backend", choices=("simulator", "testbed"), default="simulator")
    add("--scenario", type=Path, help="TOML file (default: the shipped one)")
    add(
        "--arms",
        help=f"comma-separated, of {', '.join(ARMS)}; or all (default: all but the oracle, which "
        "takes minutes)",
    )
    add("--seeds", type=positive_int, default=16, help="conditions per rate")
    add("--first-seed", type=int, default=FIRST_SEED)
    add("--repeats", type=positive_int, default=1, help="testbed only: runs of each seed")
    add("--intervals", type=positive_int, help="steady-state intervals (default: a whole episode)")
    add("--rates", help="fractions of the best static plan's capacity, e.g. 0.4,0.8,1.1")
    add(
        "--startup-s",
        type=float,
        help="seconds accounted for apart at the start (default: 20, or as long as the "
        "reference's start-up takes where it takes part)",
    )
    add("--checkpoint", type=Path, help="directory (default: checkpoints/MODEL)")
    add("--profile", type=Path, help="profile JSON (default: the checkpoint's; testbed: measured)")
    add("--json", type=Path, help="write the results here")
    add("--plot", type=Path, help="write a figure here (PNG, SVG, PDF)")
    return parser


def _evaluate(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything that was asked for; returns the results as plain numbers."""
    if args.startup_s is not None and not args.startup_s >= 0:
        raise ConfigError(f"--startup-s must be >= 0, got {args.startup_s}")
    scenario = Scenario.load(args.scenario)
    rates = _rates(args.rates)
    scenarios = [scenario.replace(capacity_fraction=f, rate_rps=0.0) for f in rates] or [scenario]
    directory = args.checkpoint or CHECKPOINTS / args.model
    arms = _arms(args.arms, directory, console)
    if "oracle" in arms and args.backend == "testbed":
        raise ConfigError("arm oracle knows the future, which only --backend simulator can tell")
    checkpoint = Checkpoint.load(directory, args.model) if set(arms) & set(POLICY_ARMS) else None
    profile = _profile(args, directory, scenario)
    by_rate: dict[str, Any] = {}
    parts: list[_Part] = []
    with progress(console) as bar:
        for at_rate in scenarios:
            part = _Part(args, CostModel(profile, at_rate), arms, checkpoint, bar)
            part.run()
            parts.append(part)
            by_rate[f"{part.fraction:.3g}"] = {
                "rate_rps": part.model.rate_rps(),
                "startup_s": part.startup * scenario.interval_s,
                "overrun_share": part.overruns,
                "arms": summarise(part.runs, part.model, part.decide_us),
            }
    pooled = {name: ArmRun.stack([p.runs[name] for p in parts]) for name in arms}
    decide_us = {name: float(np.mean([p.decide_us[name] for p in parts])) for name in arms}
    return {
        "model": args.model,
        "backend": args.backend,
        "rates": [p.fraction for p in parts],
        "scenario": str(args.scenario or "default"),
        "seeds": args.seeds,
        "repeats": args.repeats if args.backend == "testbed" else 1,
        "interval_s": scenario.interval_s,
        "intervals": parts[0].n_intervals,
        "meters": {
            "compute": "constant power x compute time: 12 W edge, 15 W fog, 31.8 W cloud",
            "full": {
                n.name: f"power model of {n.power.device}: {n.power.source}" for n in profile.nodes
            },
            "profiled_with": {n.name: n.meter for n in profile.nodes},
        },
        "units": {
            "cost": "per arrived request; 1 edge-only request, unloaded, costs the weights' sum",
            "latency_ms": "from scheduled arrival to output",
            "energy_j": "per completed request",
            "regret": "cost over the clairvoyant oracle's, pair by pair",
            "decide_us": "CPU time of one decision for one environment; the oracle's count as none",
            "profile_s": "computed: forward passes x the slowest node's profiled pass",
            "switch_ms": "by construction: every frame carries its plan, so a switch stops nothing",
            "battery_h": f"{BATTERY_WH:g} Wh at the edge's mean power, idling included",
        },
        "arms": summarise(pooled, parts[0].model, decide_us),
        "by_rate": by_rate,
    }


class _Part:
    """All arms at one arrival rate.

    The oracle runs last and may start from what the others played. Its decisions were made in
    advance, by nobody who could exist, so they count as taking no time.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: CostModel,
        arms: list[str],
        checkpoint: Checkpoint | None,
        bar: Progress,
    ) -> None:
        self.args, self.model, self.arms, self.checkpoint = args, model, arms, checkpoint
        self.fraction = model.rate_rps() / model.capacity_rps
        self.runs: dict[str, ArmRun] = {}
        self.decide_us: dict[str, float] = {}
        self.overruns: dict[str, float] = {}
        self._played: list[PlanSequence] = []
        self.n_intervals: int = args.intervals or model.scenario.steps_per_episode
        self._live = args.backend == "testbed"
        self._seeds = range(args.first_seed, args.first_seed + args.seeds)
        self.startup = self._startup()
        length = self.startup + self.n_intervals
        tried = len(model.plans) if "best-static" in arms else 0
        timed = 0 if self._live else length * len(set(arms) - {"oracle"})
        runs_per_arm = args.seeds * args.repeats if self._live else 1
        self._bar = bar
        self._task = bar.add_task(
            f"{self.fraction:.3g} of capacity",
            note="",
            total=length * len(arms) * runs_per_arm + tried * runs_per_arm + timed,
        )

    def _advance(self) -> None:
        self._bar.advance(self._task)

    def _simulator(self, batch: int) -> Simulator:
        return Simulator(self.model, batch, self.args.first_seed, record_requests=True)

    def _startup(self) -> int:
        """Intervals accounted for apart; the reference's scheduler needs its inferences."""
        interval_s = self.model.scenario.interval_s
        if self.args.startup_s is not None:
            return int(np.ceil(self.args.startup_s / interval_s))
        least = int(np.ceil(DEFAULT_STARTUP_S / interval_s))
        if not any(name.startswith("paper") for name in self.arms):
            return least
        if self._live:
            needed = [startup_intervals(self._simulator(1), seed) for seed in self._seeds]
            return max(least, *needed)
        batch = self._simulator(self.args.seeds)
        return max(least, startup_intervals(batch, self.args.first_seed))

    def run(self) -> None:
        """Run every arm."""
        if self._live:
            self._on_testbed()
        else:
            self._on_simulator()

    def _on_simulator(self) -> None:
        seed = self.args.first_seed
        batch, single = self._simulator(self.args.seeds), self._simulator(1)
        for name in self.arms:
            controller = make_arm(name, self._context(self.args.seeds, seed))
            decisions: list[Decision] = []
            self.runs[name] = self._run(batch, controller, seed, decisions)
            self._played.append(PlanSequence.of(decisions))
            if name == "oracle":
                self.decide_us[name] = 0.0
                continue
            # One decision for one environment, not a batch's share.
            controller = make_arm(name, ArmContext(self.model, self.checkpoint, self._any_plan))
            timed = self._run(single, controller, seed)
            self.decide_us[name] = 1e6 * float(np.mean(timed.decide_s))

    def _on_testbed(self) -> None:
        length_s = (self.startup + self.n_intervals) * self.model.scenario.interval_s
        scenario = self.model.scenario.replace(episode_s=length_s)
        with make_testbed_system(self.args, scenario, self.model.profile) as system:
            for name in self.arms:
                runs = []
                for seed in [*self._seeds] * self.args.repeats:
                    controller = make_arm(name, self._context(1, seed))
                    runs.append(self._run(system, controller, seed))
                self.runs[name] = ArmRun.stack(runs)
                self.decide_us[name] = 1e6 * float(np.mean(self.runs[name].decide_s))
            if isinstance(system, LiveSystem):
                self.overruns = system.overrun_share()

    def _run(
        self,
        system: System | Simulator,
        controller: Controller,
        seed: int,
        decisions: list[Decision] | None = None,
    ) -> ArmRun:
        return run_arm(
            system,
            controller,
            seed=seed,
            n_intervals=self.n_intervals,
            startup=self.startup,
            on_interval=self._advance,
            on_decision=(lambda decision: None) if decisions is None else decisions.append,
        )

    def _context(self, batch: int, seed: int) -> ArmContext:
        def hindsight() -> NDArray[np.int64]:
            return best_static_cuts(
                self._simulator(batch),
                seed=seed,
                n_intervals=self.n_intervals,
                startup=self.startup,
                on_plan=self._advance,
            )

        return ArmContext(
            self.model, self.checkpoint, hindsight, None if self._live else self._foresight
        )

    def _foresight(self) -> PlanSequence:
        """The cheapest sequence of plans on the conditions of the comparison."""
        simulator = self._simulator(self.args.seeds)
        simulator.reset(self.args.first_seed)
        return search(
            self.model,
            simulator.record(self.startup + self.n_intervals),
            startup=self.startup,
            incumbents=self._played,
        )

    def _any_plan(self) -> NDArray[np.int64]:
        return self.model.table.cuts[:1]


def make_testbed_system(
    args: argparse.Namespace, scenario: Scenario, profile: Profile | None
) -> AbstractContextManager[System]:
    """The scenario's nodes as processes on this machine; profiled anew when `profile` is None."""
    from agents.nodes import open_testbed

    return open_testbed(args.model, scenario, profile)


def _rates(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--rates must be numbers like 0.4,0.8, got {text!r}") from error
    if not all(0 < r < 100 for r in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"--rates must be different fractions above 0, got {text!r}")
    return rates


def _arms(text: str | None, directory: Path, console: Console) -> list[str]:
    """The arms to run, `static` always among them: every arm is compared with it."""
    if text is None or text == "all":
        arms = [name for name in ARMS if name != "oracle" or text == "all"]
        if not (directory / "policy.npz").exists():
            console.print(f"no policy in {directory}: its arms are left out", markup=False)
            arms = [name for name in arms if name not in POLICY_ARMS]
        return arms
    arms = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in arms if name not in ARMS]
    if unknown or not arms:
        raise ConfigError(f"unknown arm {', '.join(unknown)!r}; expected some of {', '.join(ARMS)}")
    return [name for name in ARMS if name in arms or name == "static"]


def _profile(args: argparse.Namespace, directory: Path, scenario: Scenario) -> Profile:
    """The profile named; else, for the testbed, a fresh one, and for the simulator the stored."""
    if args.profile is None and args.backend == "testbed":
        with make_testbed_system(args, scenario, None) as system:
            return system.model.profile
    path = args.profile or directory / "profile.json"
    if args.profile is None and not path.exists():
        raise ConfigError(
            f"the simulator needs a profile and {path} does not exist: give --profile FILE, or "
            f"make a checkpoint with `python train.py --model {args.model}`"
        )
    profile = Profile.load(path)
    if profile.spec.name != args.model:
        raise ConfigError(f"profile {path} is of {profile.spec.name}, not {args.model}")
    if profile.n_nodes != scenario.n_nodes:
        raise ConfigError(
            f"profile {path} has {profile.n_nodes} nodes, the scenario {scenario.n_nodes}"
        )
    return profile


if __name__ == "__main__":
    sys.exit(main())
