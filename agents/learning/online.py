"""A policy that goes on learning on the nodes: it decides, and a learner beside it gives lessons.

On running nodes the learner is a process of its own, at the lowest priority: a lesson takes seconds
of CPU, which requests must not wait for. A lesson takes effect when the window after it ends, so
what a run does depends little on how long lessons take.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.tensorboard.writer import SummaryWriter

from agents.arms.controllers import Decision, Solver
from agents.arms.recalibrated import Recalibrated
from agents.arms.runtime import ActorController, Checkpoint, PolicyNetwork, ResidualActor
from agents.learning.finetuning import F32, FinetuneSettings, Learner, Lesson, Window
from agents.learning.policy import ResidualSolverPolicy
from agents.learning.scalars import log_system
from agents.learning.training import TrainingSettings, to_checkpoint
from env.cost import Cost
from env.predict import CostModel
from env.state import SystemState
from env.system import StepResult, System
from executor.child import end_with_parent
from executor.profile import Profile

__all__ = [
    "BackgroundLearner",
    "FineTuned",
    "FinetuneResult",
    "InlineLearner",
    "LearnerLike",
    "finetune",
]

log = logging.getLogger(__name__)

# For the last lesson, once nothing is served any more; on a full machine it might starve.
LAST_LESSON_S = 60.0


class LearnerLike(Protocol):
    """Who gives lessons: here and now, or elsewhere."""

    def submit(self, window: Window, profile: Profile) -> Future[Lesson]:
        """Ask for a lesson."""

    def close(self) -> None:
        """Stop."""


class InlineLearner:
    """Gives lessons at once; for virtual time.

    Args:
        learner: Gives them.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def submit(self, window: Window, profile: Profile) -> Future[Lesson]:
        """The lesson, done."""
        done: Future[Lesson] = Future()
        done.set_result(self._learner.learn(window, profile))
        return done

    def close(self) -> None:
        """Nothing to stop."""


_learner: Learner | None = None  # of a learner's own process


def _begin(*args: Any) -> None:
    global _learner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that serves
    end_with_parent()
    torch.set_num_threads(1)
    _learner = Learner(*args)
    os.nice(19)  # from here on; for this begin somebody waits


def _ready() -> int:
    """This process's id, once `_begin` is over."""
    return os.getpid()


def _learn(window: Window, profile: Profile) -> Lesson:
    assert _learner is not None
    return _learner.learn(window, profile)


class BackgroundLearner:
    """Gives lessons in a process of its own, at the lowest priority; for running nodes.

    It is made once that process is ready, seconds later.

    Args:
        *args: As `agents.learning.finetuning.Learner` takes them.
    """

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # threads run here: no fork
        self._pool = ProcessPoolExecutor(1, context, _begin, args)
        self._lesson: Future[Lesson] | None = None
        # To begin takes it seconds of CPU at the usual priority: before requests come, not beside.
        try:
            self._pid = self._pool.submit(_ready).result()
        except BrokenProcessPool as error:
            log.error("no lessons, as their process ended at its start: %s", error)

    def submit(self, window: Window, profile: Profile) -> Future[Lesson]:
        """Ask for a lesson."""
        self._lesson = self._pool.submit(_learn, window, profile)
        return self._lesson

    def close(self) -> None:
        """End the process; a lesson under way is left."""
        if self._lesson is not None and not self._lesson.done():
            os.kill(self._pid, signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)


class FineTuned(ActorController):
    """A policy that decides and learns (batch 1).

    Args:
        checkpoint: The policy it begins with.
        learner: Gives the lessons.
        settings: How often.

    Attributes:
        lessons: Those that have taken effect.
    """

    def __init__(
        self, checkpoint: Checkpoint, learner: LearnerLike, settings: FinetuneSettings
    ) -> None:
        self._checkpoint, self._learner, self._settings = checkpoint, learner, settings
        self._network = PolicyNetwork(checkpoint.arrays)
        self.lessons: list[Lesson] = []
        trained = checkpoint.metadata.get("scenario", {}).get("interval_s")
        super().__init__(
            "policy",
            lambda model: ResidualActor(model, self._network),
            float(trained) if trained else None,
        )

    def reset(self, model: CostModel, batch: int) -> None:
        """Start a window on a system; what was learned stays."""
        self._checkpoint.check_fits(model.profile)
        super().reset(model, batch)
        self._cost = Cost(model.profile, model.references, model.scenario)
        self._n_ref = np.array([model.rate_rps()])
        self._pending: Future[Lesson] | None = None
        self._begin_window()

    def _begin_window(self) -> None:
        self._seen: list[F32] = []
        self._plans: list[int] = []
        self._rewards: list[float] = []

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The deployed policy's plan; what came of the last one is kept for the next lesson."""
        decision = super().decide(state, last)
        seen = self._actor.observe(self._history, state)[0]
        if self._seen and last is not None:
            self._live(state, last)
            if len(self._rewards) == self._settings.window:
                self._end_window(seen)
        self._seen.append(seen)
        return decision

    def _live(self, state: SystemState, last: StepResult) -> None:
        """Note which plan was in force (not always the one wanted: the guard) and its reward."""
        match = (self._model.table.cuts == state.cuts[0]).all(axis=1)
        self._plans.append(int(match.argmax()))
        self._rewards.append(-float(self._cost(last.record, self._n_ref)[0]))

    def _end_window(self, seen: F32) -> None:
        """Let the last window's lesson take effect, and ask for this one's."""
        if self._pending is not None and not self._pending.done():
            log.info("the last lesson is not over: this window is not learned from")
        else:
            self._take()
            window = Window(
                np.stack(self._seen),
                np.array(self._plans, dtype=np.int64),
                np.array(self._rewards),
                seen,
            )
            try:
                self._pending = self._learner.submit(window, self._model.profile)
            except RuntimeError as error:  # its process has ended
                log.error("no more lessons: %s", error)
        self._begin_window()

    def _take(self, timeout_s: float | None = None) -> None:
        """Decide with what the pending lesson left."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            lesson = pending.result(timeout_s)
        except concurrent.futures.TimeoutError:
            log.warning("the last lesson is left out: it was not over within %g s", timeout_s)
            return
        except Exception as error:  # learning must never keep requests from being decided
            log.error("a lesson failed: %r", error)
            return
        self.lessons.append(lesson)
        self._network.load(lesson.arrays)
        log.info("lesson: %s", lesson.event, extra={"cost_ratio": lesson.cost_ratio})

    def finish(self, timeout_s: float | None = None) -> None:
        """Let the lesson that is under way take effect, if it is over within `timeout_s`."""
        self._take(timeout_s)


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning did.

    Attributes:
        policy: The policy to deploy: the tuned one if it was promoted, else the one that came in.
        promoted: Whether the tuned policy replaced the first one in the end.
        lessons: What the lessons led to.
        live_cost: Mean cost per interval on the nodes.
        solver_agreement: Share of decisions in which the solver, in shadow, chose the same plan.
        model: The recalibrated cost model.
    """

    policy: ResidualSolverPolicy
    promoted: bool
    lessons: tuple[Lesson, ...]
    live_cost: float
    solver_agreement: float
    model: CostModel


def finetune(
    policy: ResidualSolverPolicy,
    system: System,
    training: TrainingSettings,
    settings: FinetuneSettings,
    steps: int,
    seed: int,
    writer: SummaryWriter | None = None,
    report: Callable[[int, float], None] = lambda step, reward: None,
    background: bool = True,
) -> FinetuneResult:
    """Tune a policy on running nodes.

    Args:
        policy: The policy trained in the simulator; it is not changed.
        system: The running nodes.
        training: Discount and rates of the simulator training.
        settings: How to tune.
        steps: Intervals on the nodes.
        seed: Conditions and sampling.
        writer: Gets finetune/ and system/ scalars per interval and lesson.
        report: Called after every interval with (intervals done, reward).
        background: Learn in a process of its own, as running nodes need it.
    """
    own, scenario = system.model, system.model.scenario
    settings = replace(settings, window=min(settings.window, steps))
    believed = CostModel(own.profile, scenario, own.references)
    # A copy: PPO's own holds tensors of its last pass, which go into no other process.
    args = (policy.clone(), scenario, own.references, training, settings, seed)
    learner: LearnerLike = BackgroundLearner(*args) if background else InlineLearner(Learner(*args))
    tuned = FineTuned(to_checkpoint(own, policy, {}), learner, settings)
    controller, shadow = Recalibrated(tuned, believed), Solver()
    cost = Cost(own.profile, own.references, scenario)
    costs, agreed = [], 0
    try:
        state, last = system.reset(seed), None
        controller.reset(own, 1)
        shadow.reset(believed, 1)
        for step in range(1, steps + 1):
            decision = controller.decide(state, last)
            agreed += int((shadow.glance(state) == decision.cuts).all())
            last = system.step(decision.cuts, decision.probe_bytes)
            state = last.state
            costs.append(float(cost(last.record, system.n_ref)[0]))
            if writer:
                writer.add_scalar("finetune/reward", -costs[-1], step)
                log_system(writer, step, last)
            report(step, -costs[-1])
        controller.decide(state, last)  # the last interval belongs to a window, too
        system.drain()
        tuned.finish(LAST_LESSON_S)
    finally:
        learner.close()
    deployed, lessons = policy, tuned.lessons
    for number, lesson in enumerate(lessons, 1):
        for name, value in {**lesson.losses, "cost_ratio": lesson.cost_ratio[0]}.items():
            if writer:
                writer.add_scalar(f"finetune/{name}", value, number * settings.window)
    changes = [lesson.event for lesson in lessons if lesson.event != "kept"]
    promoted = bool(changes) and changes[-1] == "promoted"
    if promoted:
        deployed = policy.clone()
        weights = {k: torch.as_tensor(v) for k, v in lessons[-1].weights.items()}
        deployed.load_state_dict(weights)
    return FinetuneResult(
        policy=deployed,
        promoted=promoted,
        lessons=tuple(lessons),
        live_cost=float(np.mean(costs)),
        solver_agreement=agreed / steps,
        model=believed,
    )
