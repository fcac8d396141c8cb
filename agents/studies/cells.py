"""One cell of a comparison: all arms under one set of conditions, at one arrival rate.

On the simulator all seeds of an arm run as one batch; on the testbed arms and seeds run one after
the other, in real time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from agents.arms.believing import Believing
from agents.arms.controllers import ArmContext, Controller, Decision, Glancing, make_arm
from agents.arms.oracle import PlanSequence, search
from agents.arms.recalibrated import Recalibrated
from agents.arms.runtime import Checkpoint
from agents.cli import transfers
from agents.studies.compare import ArmRun, best_static_cuts, run_arm, startup_intervals
from env.changing import Changing
from env.conditions import ConditionsSource
from env.grid import GridConditions
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.system import DRAIN_DEADLINES
from env.tape import Tape
from executor.profile import Profile

if TYPE_CHECKING:
    from env.system import System

__all__ = ["Cell", "make_testbed_system"]

# Arms that decide with a cost model, which `--recalibrate` corrects.
RECALIBRATED = (
    "solver",
    "predictive",
    "mpc",
    "policy-zeroed",
    "policy-greedy",
    "policy",
    "guarded",
    "policy-all",
)
DEFAULT_STARTUP_S = 20.0
TIMED_INTERVALS = 200
LEAST_CHANGES = 3  # of the conditions, in an episode where they change at a set pace


class Cell:
    """All arms under one set of conditions, at one arrival rate.

    The oracle runs last and may start from what the others played. Its decisions were made in
    advance, by nobody who could exist, so they count as taking no time.

    Args:
        args: The command's arguments: backend, seeds, intervals and so on.
        model: The system's cost model, its scenario's arrival rate being the cell's.
        arms: Their names.
        checkpoint: The trained policy, if an arm needs one.
        name: Of the conditions.
        change_every_s: Conditions change at this pace (`env.changing`), in the simulator.
        bar: Shows how far it is.

    Attributes:
        runs: What each arm did.
        decide_us: CPU time of one decision of each.
        overruns: On the testbed, the share of each node's stages that ended late.
        simulated: Of a run on the testbed, what each arm did in the simulator under the same
            conditions, with every node as fast as it was in that run; as on the nodes, the arm is
            told the profile of the start (and corrects it, with `--recalibrate`). Empty where arms
            decide per request, which no simulator here does.
        slowness: Of a run on the testbed, how many times as slow as profiled each node was.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: CostModel,
        arms: list[str],
        checkpoint: Checkpoint | None,
        name: str = "",
        change_every_s: float | None = None,
        bar: Progress | None = None,
    ) -> None:
        self.args, self.model, self.arms, self.checkpoint = args, model, arms, checkpoint
        self.fraction = model.rate_rps() / model.capacity_rps
        self.runs: dict[str, ArmRun] = {}
        self.decide_us: dict[str, float] = {}
        self.overruns: dict[str, float] = {}
        self.simulated: dict[str, ArmRun] = {}
        self.slowness: dict[str, float] = {}
        self._played: list[PlanSequence] = []
        self._change_every_s = change_every_s
        self.n_intervals: int = args.intervals or model.scenario.steps_per_episode
        if change_every_s is not None:
            least_s = LEAST_CHANGES * change_every_s
            self.n_intervals = max(self.n_intervals, ceil(least_s / model.scenario.interval_s))
        self._live = args.backend == "testbed"
        self._seeds = range(args.first_seed, args.first_seed + args.seeds)
        self.startup = self._startup()
        self._timed = min(self.n_intervals, TIMED_INTERVALS)
        self._advance: Callable[[], None] = lambda: None
        if bar is not None:
            self._show(bar, f"{name} {self.fraction:.3g} of capacity".strip())

    def _show(self, bar: Progress, name: str) -> None:
        """Let the bar follow the intervals played."""
        length = self.startup + self.n_intervals
        timed = (self.startup + self._timed) * len(set(self.arms) - {"oracle"})
        runs_per_arm = self.args.seeds * self.args.repeats if self._live else 1
        total = length * len(self.arms) * runs_per_arm + (0 if self._live else timed)
        task = bar.add_task(name, note="", total=total)
        self._advance = lambda: bar.advance(task)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; a bar is this one's."""
        return {**self.__dict__, "_advance": None}

    def _simulator(self, batch: int) -> Simulator:
        model, seed = self.model, self.args.first_seed
        conditions: ConditionsSource | None = None
        if self._change_every_s is not None:
            rate_rps = np.full(batch, model.rate_rps())
            conditions = Changing(model.scenario, rate_rps, seed, self._change_every_s)
        elif self.args.interval_s is not None:
            conditions = GridConditions(model.scenario, np.full(batch, model.rate_rps()), seed)
        return Simulator(model, batch, seed, record_requests=True, conditions=conditions)

    def conditions(self) -> Tape:
        """What the arms met; its first environment is the one of the arms' trajectories."""
        simulator = self._simulator(1 if self._live else self.args.seeds)
        simulator.reset(self.args.first_seed)
        return simulator.record(self.startup + self.n_intervals)

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
            timed = self._run(single, controller, seed, n_intervals=self._timed)
            self.decide_us[name] = 1e6 * float(np.mean(timed.decide_s))

    def _on_testbed(self) -> None:
        length_s = (self.startup + self.n_intervals) * self.model.scenario.interval_s
        scenario = self.model.scenario.replace(episode_s=length_s)
        with make_testbed_system(self.args, scenario, self.model.profile) as system:
            runs: dict[str, list[ArmRun]] = {name: [] for name in self.arms}
            again: dict[str, list[ArmRun]] = {name: [] for name in self.arms}
            slowness: list[NDArray[np.float64]] = []
            if isinstance(system, LiveSystem):
                # Until the run-out's end, as in the simulator; a node refuses what has waited for
                # half of its time.
                run_out_s = DRAIN_DEADLINES * self.model.references.deadline_s
                system.timeout_s = 2.0 * (length_s + run_out_s)
            # Arms take turns, so that what else the machine does hits all alike.
            for seed in [*self._seeds] * self.args.repeats:
                for name in self.arms:
                    arm = make_arm(name, self._context(1, seed))
                    system.model.recalibrate(self.model.profile)  # what the last arm corrected
                    controller = Recalibrated(arm, system.model) if self._corrects(name) else arm
                    if isinstance(system, LiveSystem):
                        system.glance = None
                        if self.args.per_request and isinstance(arm, Glancing):
                            system.glance = arm.glance
                    runs[name].append(self._run(system, controller, seed))
                    slowness.append(_slowness(system))
                    if not self.args.per_request:
                        again[name].append(self._simulated(arm, name, seed, slowness[-1]))
            for name in self.arms:
                self.runs[name] = ArmRun.stack(runs[name])
                if again[name]:
                    self.simulated[name] = ArmRun.stack(again[name])
                self.decide_us[name] = 1e6 * float(np.mean(self.runs[name].decide_s))
            if isinstance(system, LiveSystem):
                self.overruns = system.overrun_share()
        nodes = (node.name for node in self.model.profile.nodes)
        self.slowness = dict(zip(nodes, np.mean(slowness, axis=0).tolist(), strict=True))

    def _corrects(self, name: str) -> bool:
        """Whether an arm corrects the profile that it is told."""
        return bool(self.args.recalibrate and name in RECALIBRATED)

    def _simulated(
        self, arm: Controller, name: str, seed: int, slowness: NDArray[np.float64]
    ) -> ArmRun:
        """An arm in the simulator, told what it was told on nodes that were so slow."""
        model = self.model
        told = CostModel(model.profile, model.scenario, model.references)
        profile = model.profile.scaled(slowness.tolist())
        simulator = Simulator(
            CostModel(profile, model.scenario, model.references),
            1,
            seed,
            rate_rps=model.rate_rps(),
            record_requests=True,
        )
        return run_arm(
            simulator,
            Recalibrated(arm, told) if self._corrects(name) else Believing(arm, told),
            seed=seed,
            n_intervals=self.n_intervals,
            startup=self.startup,
        )

    def _run(
        self,
        system: System | Simulator,
        controller: Controller,
        seed: int,
        decisions: list[Decision] | None = None,
        n_intervals: int | None = None,
    ) -> ArmRun:
        return run_arm(
            system,
            controller,
            seed=seed,
            n_intervals=n_intervals or self.n_intervals,
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
            )

        return ArmContext(
            self.model, self.checkpoint, hindsight, None if self._live else self._foresight
        )

    def _foresight(self) -> PlanSequence:
        """The cheapest sequence of plans on the conditions of the comparison."""
        return search(
            self.model,
            self.conditions(),
            startup=self.startup,
            incumbents=self._played,
        )

    def _any_plan(self) -> NDArray[np.int64]:
        return self.model.table.cuts[:1]


def _slowness(system: System) -> NDArray[np.float64]:
    """How many times as slow as profiled each node was in the run that just ended, [N]."""
    if isinstance(system, LiveSystem):
        return system.slowness()
    return np.ones(system.model.profile.n_nodes)


def make_testbed_system(
    args: argparse.Namespace, scenario: Scenario, profile: Profile | None
) -> AbstractContextManager[System]:
    """The scenario's nodes as processes on this machine; profiled anew when `profile` is None."""
    from agents.nodes import open_testbed

    forms = transfers(args.transfer, len(scenario.hops), True, "")
    return open_testbed(args.model, scenario, profile, transfers=forms, isolation=args.isolation)
