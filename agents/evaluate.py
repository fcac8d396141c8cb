"""Arms side by side on the same conditions: `python -m agents.evaluate --model alexnet`.

On the simulator all seeds of an arm run as one batch; on the testbed arms and seeds run one after
the other, in real time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    model_argument,
    positive_int,
    progress,
    run_command,
)
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
from env.splits import PARTS, Condition, split
from executor.errors import ConfigError
from executor.files import write_atomic
from executor.logs import add_log_arguments, configure_logging
from executor.modelref import model_label
from executor.profile import Profile

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
    configure_logging(args)
    return run_command(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    result = _evaluate(args, console)
    name = result["model"]
    for rate, part in result["by_rate"].items():
        title = f"{name}, {args.backend}, {rate} of capacity ({part['rate_rps']:.2f}/s)"
        console.print(table(title, part["arms"]))
        for node, share in part["overrun_share"].items():
            if share > MAX_OVERRUN_SHARE:
                console.print(
                    f"not valid: {share:.1%} of {node}'s stages ended late (at most "
                    f"{MAX_OVERRUN_SHARE:.0%}); use a quieter machine or larger node ratios",
                    markup=False,
                )
    if len(result["by_rate"]) > 1:
        console.print(table(f"{name}, {args.backend}, all rates", result["arms"]))
    for family, part in result.get("by_family", {}).items():
        console.print(table(f"{name}, traces of {family}, all rates", part["arms"]))
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
    add("--model", required=True, type=model_argument, help=MODEL_HELP)
    add("--backend", choices=("simulator", "testbed"), default="simulator")
    add("--scenario", type=Path, help="TOML file (default: the shipped one)")
    add(
        "--traces",
        type=Path,
        help="folder of measured traces (docs/traces.md): play a part of its split instead of the "
        "scenario's bandwidth, load, delay and arrivals",
    )
    add("--split", choices=tuple(PARTS), help="which part of --traces (default: test)")
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
    add_log_arguments(parser)
    return parser


def _evaluate(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything that was asked for; returns the results as plain numbers."""
    if args.startup_s is not None and not args.startup_s >= 0:
        raise ConfigError(f"--startup-s must be >= 0, got {args.startup_s}")
    if args.split is not None and args.traces is None:
        raise ConfigError("--split names a part of --traces DIR; give both")
    scenario = Scenario.load(args.scenario)
    rates = _rates(args.rates)
    conditions = [Condition("", "", scenario)]
    if args.traces is not None:
        conditions = [*split(args.traces, scenario).part(args.split or "test")]
    name = model_label(args.model)
    directory = args.checkpoint or CHECKPOINTS / name
    arms = _arms(args.arms, directory, console)
    if "oracle" in arms and args.backend == "testbed":
        raise ConfigError("arm oracle knows the future, which only --backend simulator can tell")
    checkpoint = Checkpoint.load(directory, name) if set(arms) & set(POLICY_ARMS) else None
    profile = _profile(args, directory, scenario)
    by_rate: dict[str, list[_Part]] = {}
    by_condition: list[list[_Part]] = []
    with progress(console) as bar:
        for condition in conditions:
            played = condition.scenario
            at_rates = [played.replace(capacity_fraction=f, rate_rps=0.0) for f in rates]
            by_condition.append([])
            for at_rate in at_rates or [played]:
                model = CostModel(profile, at_rate)
                part = _Part(args, model, arms, checkpoint, bar, condition.name)
                part.run()
                by_condition[-1].append(part)
                by_rate.setdefault(f"{part.fraction:.3g}", []).append(part)
    parts = [part for done in by_condition for part in done]
    families: dict[str, Any] = {}
    if args.traces is not None:
        families["split"] = args.split or "test"
        families["by_condition"] = {
            condition.name: {
                "family": condition.family,
                "by_rate": {f"{p.fraction:.3g}": _pooled([p]) for p in done},
                "arms": _pooled(done)["arms"],
            }
            for condition, done in zip(conditions, by_condition, strict=True)
        }
        families["by_family"] = {
            family: _pooled(
                [p for c, ps in zip(conditions, by_condition, strict=True)
                 if c.family == family for p in ps]
            )
            for family in dict.fromkeys(c.family for c in conditions)
        }  # fmt: skip
    return {
        "model": name,
        "backend": args.backend,
        "rates": [p.fraction for p in by_condition[0]],
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
        "arms": _pooled(parts)["arms"],
        "by_rate": {rate: _pooled(done) for rate, done in by_rate.items()},
        **families,
    }


def _pooled(parts: list[_Part]) -> dict[str, Any]:
    """What the arms did over all conditions of several parts."""
    names = parts[0].runs
    overruns: dict[str, float] = {}
    for part in parts:
        for node, share in part.overruns.items():
            overruns[node] = max(share, overruns.get(node, 0.0))
    return {
        "rate_rps": float(np.mean([p.model.rate_rps() for p in parts])),
        "startup_s": max(p.startup * p.model.scenario.interval_s for p in parts),
        "overrun_share": overruns,
        "arms": summarise(
            {name: ArmRun.stack([p.runs[name] for p in parts]) for name in names},
            parts[0].model,
            {name: float(np.mean([p.decide_us[name] for p in parts])) for name in names},
        ),
    }


class _Part:
    """All arms under one set of conditions, at one arrival rate.

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
        name: str = "",
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
            f"{name} {self.fraction:.3g} of capacity".strip(),
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
    if profile.spec.name != model_label(args.model):
        raise ConfigError(f"profile {path} is of {profile.spec.name}, not {args.model}")
    if profile.n_nodes != scenario.n_nodes:
        raise ConfigError(
            f"profile {path} has {profile.n_nodes} nodes, the scenario {scenario.n_nodes}"
        )
    return profile


if __name__ == "__main__":
    sys.exit(main())
