"""How much of what a wrong profile costs comes back: `python -m agents.wrong_profile`.

The fog is twice as slow as its profile says and every round trip is wrong by 10 ms. Arms that are
told so, that are not, that recalibrate, and that go on learning meet the same conditions, in the
simulator (virtual time, many conditions) or on the testbed (real nodes, in real time).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from agents.arms.believing import Believing
from agents.arms.controllers import Controller, Solver
from agents.arms.per_row import PerRow
from agents.arms.recalibrated import Recalibrated
from agents.arms.runtime import Checkpoint, PolicyController
from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    load_profile,
    model_argument,
    positive_float,
    positive_int,
    run_study,
)
from agents.learning.finetuning import FinetuneSettings, Learner
from agents.learning.online import BackgroundLearner, FineTuned, InlineLearner
from agents.learning.policy import load_policy
from agents.learning.training import TrainingSettings
from agents.nodes import not_valid, open_testbed
from agents.report.terminal import TABLE_WIDTH
from agents.studies.regained import Spent, analyse, worst_window
from env.cost import Cost
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.system import System
from executor.errors import ConfigError
from executor.figures import load_pyplot, save_figure
from executor.files import write_json
from executor.modelref import model_label
from executor.profile import Profile

__all__ = ["ARMS", "Arms", "falsify", "main", "run"]

log = logging.getLogger(__name__)

ARMS = (
    "solver-right",
    "solver-wrong",
    "solver-recalibrated",
    "policy-right",
    "policy-wrong",
    "policy-recalibrated",
    "policy-tuned",
)
FAMILIES = ("solver", "policy")
FOG = 1


def falsify(profile: Profile, slower: float = 2.0, rtt_error_s: float = 0.010) -> Profile:
    """The profile as it would be wrong: the fog is `slower` x as slow as it says.

    Round trips are said to be `rtt_error_s` shorter than they are. The state shows them right
    again as soon as the hop was pinged; but calibration, which takes the round trip as known, has
    found the missing time in every frame, and so each hop's overhead per frame is that much long.
    """
    if not (slower > 0 and rtt_error_s >= 0):
        raise ConfigError(
            f"expected a factor above 0 and an error of 0 s or more, got {slower}, {rtt_error_s}"
        )
    nodes = tuple(
        node.scaled(1.0 / slower) if k == FOG else node for k, node in enumerate(profile.nodes)
    )
    hops = tuple(
        replace(
            hop,
            rtt_s=max(0.0, hop.rtt_s - rtt_error_s),
            frame_overhead_s=hop.frame_overhead_s + rtt_error_s,
        )
        for hop in profile.hops
    )
    return profile.with_changes(nodes=nodes, hops=hops)


@dataclass
class Arms:
    """Makes the arms of one run.

    Attributes:
        true: The system's cost model.
        wrong: The falsified profile.
        told_right: The policy of the right profile.
        told_wrong: The policy of the wrong one, or the same.
        settings: How the tuned arm learns.
        seed: Of learning.
        virtual: Learn at once, not in a process beside.
        policy_zip: What the learning policy begins with.
        stack: Closes what learns.
        tuned: Every learning policy that was made.
        recalibrated: Every recalibrating controller that was made, by arm.
    """

    true: CostModel
    wrong: Profile
    told_right: Checkpoint
    told_wrong: Checkpoint
    settings: FinetuneSettings
    seed: int
    virtual: bool
    policy_zip: Path
    stack: ExitStack
    tuned: list[FineTuned] = field(default_factory=list)
    recalibrated: dict[str, list[Recalibrated]] = field(default_factory=dict)

    def make(self, name: str) -> Controller:
        """The arm of that name, for any batch."""
        family, told = name.split("-")
        checkpoint = self.told_right if told == "right" else self.told_wrong
        if told in ("right", "wrong"):
            alone = Solver() if family == "solver" else PolicyController(checkpoint)
            return Believing(alone, self.true if told == "right" else self._believed())
        makers: dict[str, Callable[[], Controller]] = {
            "solver-recalibrated": Solver,
            "policy-recalibrated": lambda: PolicyController(checkpoint),
            "policy-tuned": self._learning,
        }

        def one() -> Controller:
            controller = Recalibrated(makers[name](), self._believed())
            self.recalibrated.setdefault(name, []).append(controller)
            return controller

        return PerRow(name, one)

    def _believed(self) -> CostModel:
        return CostModel(self.wrong, self.true.scenario, self.true.references)

    def _learning(self) -> Controller:
        policy = load_policy(self.policy_zip, self._believed(), self.told_wrong.arrays)
        scenario, references = self.true.scenario, self.true.references
        # Every condition learns by itself.
        seed = self.seed + len(self.tuned)
        args = (policy, scenario, references, TrainingSettings(), self.settings, seed)
        learner = InlineLearner(Learner(*args)) if self.virtual else BackgroundLearner(*args)
        self.stack.callback(learner.close)
        tuned = FineTuned(self.told_wrong, learner, self.settings)
        self.tuned.append(tuned)
        return tuned


def run(
    system: System | Simulator,
    controller: Controller,
    seed: int,
    n_intervals: int,
    on_interval: Callable[[], None] = lambda: None,
) -> Spent:
    """What an arm spends on the conditions that `seed` names.

    Args:
        system: A simulator (any batch) or running nodes, recording requests.
        controller: The arm; it is reset.
        seed: Names the conditions.
        n_intervals: How many intervals; what is open after the last is run out and not counted.
        on_interval: Called after every interval.
    """
    model = system.model
    cost = Cost(model.profile, model.references, model.scenario)
    batch = system.batch if isinstance(system, Simulator) else 1
    controller.reset(model, batch)  # before the conditions begin: who learns starts a process
    state, last = system.reset(seed), None
    ones = np.ones(batch)
    spent, arrived = [], []
    for _ in range(n_intervals):
        decision = controller.decide(state, last)
        last = system.step(decision.cuts, decision.probe_bytes)
        state = last.state
        spent.append(cost(last.record, ones))
        arrived.append(last.record.arrived.astype(np.float64))
        on_interval()
    system.drain()
    return Spent(np.array(spent), np.array(arrived), model.scenario.interval_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.wrong_profile", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m agents.wrong_profile", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--model", type=model_argument, default="alexnet", help=MODEL_HELP)
    add("--backend", choices=("simulator", "testbed"), default="simulator")
    add("--scenario", help="nodes and hops: TOML file or shipped name (default: default)")
    add("--minutes", type=positive_float, default=10.0, help="of each arm (default: 10)")
    add("--conditions", type=positive_int, default=6, help="simulator only: how many (default: 6)")
    add("--seed", type=int, default=52000, help="names the conditions (default: 52000)")
    add("--rate", type=positive_float, default=0.7, help="share of capacity (default: 0.7)")
    add("--slower", type=positive_float, default=2.0, help="the fog, than profiled (default: 2)")
    add("--rtt-ms", type=float, default=10.0, help="error of the round trips (default: 10)")
    add("--arms", default=",".join(ARMS), help=f"comma-separated, of {', '.join(ARMS)}")
    add(
        "--wrong-checkpoint",
        type=Path,
        help="policy trained on the wrong profile, by train.py --profile (default: the right one's "
        "checkpoint, which is told the wrong profile only when it decides)",
    )
    add("--checkpoint", type=Path, help="policy of the right profile (default: checkpoints/MODEL)")
    add("--window", type=positive_int, default=30, help="intervals between lessons (default: 30)")
    add(
        "--write-profile", type=Path, help="write the wrong profile here, for train.py; run nothing"
    )
    add("--json", type=Path, help="write the results here")
    add("--plot", type=Path, help="write a figure here (PNG, SVG, PDF)")
    return parser


def _main(args: argparse.Namespace) -> int:
    name, console = model_label(args.model), Console()
    console.width = max(console.width, TABLE_WIDTH)
    directory = args.checkpoint or CHECKPOINTS / name
    scenario = Scenario.load(args.scenario).replace(capacity_fraction=args.rate)
    error_s = args.rtt_ms / 1e3
    if args.write_profile is not None:
        profile = load_profile(directory / "profile.json", args.model, scenario)
        falsify(profile, args.slower, error_s).save(args.write_profile)
        console.print(f"wrong profile: {args.write_profile}", markup=False, highlight=False)
        return 0
    names = args.arms.split(",")
    unknown = [n for n in names if n not in ARMS]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"--arms: expected different ones of {', '.join(ARMS)}, got {args.arms}")
    right = Checkpoint.load(directory, name)
    wrong_directory = args.wrong_checkpoint or directory
    wrong = Checkpoint.load(wrong_directory, name)
    n_intervals = max(1, round(args.minutes * 60 / scenario.interval_s))
    scenario = scenario.replace(episode_s=n_intervals * scenario.interval_s)
    with ExitStack() as stack:
        system: LiveSystem | Simulator
        if args.backend == "testbed":
            with console.status("starting and profiling the nodes"):
                system = stack.enter_context(open_testbed(args.model, scenario))
        else:
            model = CostModel(right.profile, scenario, right.references)
            system = Simulator(model, args.conditions, args.seed, record_requests=True)
        true = system.model
        # The rate is of the right profile, whatever an arm believes.
        told = scenario.replace(rate_rps=true.rate_rps())
        arms = Arms(
            true=CostModel(true.profile, told, true.references),
            wrong=falsify(true.profile, args.slower, error_s),
            told_right=right,
            told_wrong=wrong,
            settings=FinetuneSettings(window=args.window),
            seed=args.seed,
            virtual=args.backend == "simulator",
            stack=stack,
            policy_zip=wrong_directory / "policy.zip",
        )
        spent: dict[str, Spent] = {}
        slowness: dict[str, list[float]] = {}
        for arm in names:
            log.info("arm %s", arm)
            with console.status(f"{arm}: {args.minutes:g} min"):
                spent[arm] = run(system, arms.make(arm), args.seed, n_intervals)
            if isinstance(system, LiveSystem):
                slowness[arm] = system.slowness().tolist()
        overruns = system.overrun_share() if isinstance(system, LiveSystem) else {}
    result = _result(args, name, spent, arms, overruns, slowness)
    console.print(_table(result))
    for line in not_valid(overruns):
        console.print(line, markup=False)
    if args.json is not None:
        write_json(args.json, result)
    if args.plot is not None:
        _plot(result, args.plot)
    return 0


def _result(
    args: argparse.Namespace,
    name: str,
    spent: dict[str, Spent],
    arms: Arms,
    overruns: dict[str, float],
    slowness: dict[str, list[float]],
) -> dict[str, Any]:
    """Everything as plain data; `slowness` is of running nodes, against the right profile."""
    rows: dict[str, Any] = {}
    for arm, one in spent.items():
        rows[arm] = {
            "cost": float(one.cost.sum() / one.arrived.sum()),
            "cost_by_window": one.per_request().tolist(),
        }
        if "solver-right" in spent and arm != "solver-right":
            for key, pooled in (("worst_window", False), ("worst_window_pooled", True)):
                ratio, end_s = worst_window(one, spent["solver-right"], pooled)
                rows[arm][key] = {"ratio_to_solver": ratio, "end_s": end_s}
        if arm in slowness:
            rows[arm]["slowness"] = slowness[arm]
        if arm in arms.recalibrated:
            rows[arm]["believed"] = [asdict(c.believed) for c in arms.recalibrated[arm]]
    for family in FAMILIES:
        wrong, right = f"{family}-wrong", f"{family}-right"
        mine = {arm: one for arm, one in spent.items() if arm.startswith(family)}
        if wrong in mine and right in mine:
            for arm, found in analyse(mine, wrong, right).items():
                rows[arm]["regained"] = found
    return {
        "model": name,
        "backend": args.backend,
        "command": args.command,
        "rate_rps": arms.true.rate_rps(),
        "minutes": args.minutes,
        "conditions": spent[next(iter(spent))].cost.shape[1],
        "lessons": [
            [{"event": x.event, "cost_ratio": x.cost_ratio} for x in tuned.lessons]
            for tuned in arms.tuned
        ],
        "overrun_share": overruns,
        "arms": rows,
    }


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['model']}, {result['backend']}, {result['conditions']} conditions of "
        f"{result['minutes']:g} min"
    )
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("arm", no_wrap=True)
    for column in ("cost", "worst 60 s / solver",
        "all together", "regained (95 %)", "1 min", "2", "5", "10",
                   "min. to 70 %"):  # fmt: skip
        out.add_column(column, justify="right")
    if result["backend"] == "testbed":
        out.add_column("nodes x as slow", justify="right", no_wrap=True)
    for arm, row in result["arms"].items():
        worst, found = row.get("worst_window"), row.get("regained")
        pooled = row.get("worst_window_pooled")
        cells = [f"{row['cost']:.3f}"]
        cells += [f"{x['ratio_to_solver']:.2f}" if x else "" for x in (worst, pooled)]
        if found and not arm.endswith("-wrong"):
            ci = found["ci95"]
            cells.append(_percent(found["share"]) + (f" ({_percent(ci[0])}-{_percent(ci[1])})"
                                                     if ci else ""))  # fmt: skip
            cells += [_percent(found["share_by_minute"].get(m)) for m in ("1", "2", "5", "10")]
            enough = found["minutes_to_enough"]
            cells.append("never" if enough is None else f"{enough:g}")
        if "slowness" in row:
            cells += [""] * (len(out.columns) - 2 - len(cells))
            cells.append(" / ".join(f"{x:.2f}" for x in row["slowness"]))
        out.add_row(arm, *cells)
    return out


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _plot(result: dict[str, Any], path: Path) -> None:
    """Cost per request over time, the mean of all conditions."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for arm, row in result["arms"].items():
        windows = np.mean(row["cost_by_window"], axis=1)
        told = arm.split("-")[1]
        style = {"right": "--", "wrong": ":"}.get(told, "-")
        axes.plot(np.arange(1, len(windows) + 1), windows, style, label=arm, marker=".")
    axes.set_xlabel("minutes since the start")
    axes.set_ylabel("cost per request")
    axes.set_title(f"{result['model']}, {result['backend']}: the fog slower than profiled")
    axes.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
