"""What `train.py` runs: profile, calibrate, train, evaluate, fine-tune, measure, keep."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.tensorboard.writer import SummaryWriter

from agents.arms.controllers import ArmContext, make_arm
from agents.arms.runtime import Checkpoint
from agents.arms.scoring import digest
from agents.cli import progress
from agents.learning.finetuning import FinetuneSettings
from agents.learning.online import finetune
from agents.learning.policy import ResidualSolverPolicy
from agents.learning.resume import FILE_NAME, ResumePoint
from agents.learning.training import TrainingSettings, to_checkpoint, train_policy
from agents.nodes import open_cluster, open_testbed
from agents.report.terminal import TABLE_WIDTH, table
from agents.studies.compare import ArmRun, run_arm, summarise
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.profile import Profile

__all__ = ["Pipeline"]

EVALUATION_SEED = 9_000_000
SIMULATOR_ARMS = ("static", "paper-1s", "solver", "policy")
LIVE_ARMS = ("static", "solver", "policy")


@dataclass
class Pipeline:
    """One training, from nodes to checkpoint.

    Attributes:
        model_name: The model, as `executor.model.build_chain` takes it.
        scenario: Nodes, hops, conditions, cost.
        training: How PPO is run.
        online_steps: Intervals of fine-tuning on the nodes (0: none).
        directory: Where the checkpoint goes.
        log_dir: Where TensorBoard's files go.
        cluster: Cluster file; None starts the testbed.
        weights: The model's weights on the testbed.
        isolation: Of the testbed, as `executor.testbed.Testbed` takes it.
        live_intervals: Intervals per arm of the short table measured on the nodes.
        resume: Go on with an interrupted training of the same settings, if there is one.
        transfers: Per hop of the testbed, the form activations cross it in; float32 if empty.
        profile: Train on this profile in the simulator alone: no nodes are started, profiled,
            fine-tuned on or measured.
        base: Arrays of the policy for all models to start from; empty to start from the solver.
    """

    model_name: str
    scenario: Scenario
    training: TrainingSettings
    online_steps: int
    directory: Path
    log_dir: Path
    cluster: Path | None = None
    weights: str = "none"
    isolation: str = "none"
    live_intervals: int = 15
    resume: bool = False
    transfers: tuple[str, ...] = ()
    profile: Profile | None = None
    base: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    def run(self) -> Checkpoint:
        """Do all of it; the checkpoint is written after training and again after fine-tuning."""
        self.console.width = max(self.console.width, TABLE_WIDTH)
        point = self._resume_point()
        if self.profile is not None:
            model = point.cost_model() or CostModel(self.profile, self.scenario)
            self._introduce(model)
            _, checkpoint = self._train(model, point)
            point.remove()
        else:
            with self._open(point) as system:
                checkpoint = self._run_on(system, point)
        self.console.print(
            f"checkpoint: {self.directory}   curves: tensorboard --logdir {self.log_dir.parent}"
        )
        return checkpoint

    def _run_on(self, system: LiveSystem, point: ResumePoint) -> Checkpoint:
        """Train for running nodes, and tune and measure on them."""
        profile = system.model.profile
        self._introduce(system.model)
        model = point.cost_model() or system.model
        if model.profile.shape_digest() != profile.shape_digest():
            raise ConfigError(
                f"{point.path} is of a training on {model.profile.n_nodes} nodes with other "
                f"units than the running ones; train without --resume"
            )
        policy, checkpoint = self._train(model, point)
        if self.online_steps:
            checkpoint = self._finetune(policy, system, checkpoint)
            checkpoint.save(self.directory, self._policy_zip())
        point.remove()
        self._measure(system, checkpoint)
        return checkpoint

    def _introduce(self, model: CostModel) -> None:
        profile, edge = model.profile, model.references
        self.console.print(
            f"{profile.spec.name} on {' - '.join(n.name for n in profile.nodes)}: edge-only "
            f"{edge.latency_s * 1e3:.0f} ms, {edge.edge_j:.2f} J; {len(model.plans)} candidate "
            f"plans; best static capacity {model.capacity_rps:.1f} requests/s"
        )
        start = "the policy for all models" if self.base else "the solver"
        self.console.print(f"training starts from {start}")

    def _resume_point(self) -> ResumePoint:
        """Where this training can be resumed; what was saved is loaded if that is wanted."""
        point = ResumePoint(
            self.directory / FILE_NAME,
            self.model_name,
            self.scenario,
            {
                "training": asdict(self.training),
                "base": digest(self.base),
                "nodes": self._nodes(),
                "weights": self.weights,
                **({"transfers": list(self.transfers)} if self.transfers else {}),
            },
        )
        if self.resume:
            found = point.load()
            after = f"resuming {point.path} after {point.steps:,} steps"
            self.console.print(after if found else f"no {point.path}: training from the start")
        return point

    def _nodes(self) -> str:
        """What is trained for; a training is only resumed for the same."""
        if self.profile is not None:
            return f"none, profile {hashlib.sha256(self.profile.to_json().encode()).hexdigest()}"
        return "testbed" if self.cluster is None else "cluster"

    @contextmanager
    def _open(self, point: ResumePoint) -> Iterator[LiveSystem]:
        resumed = point.cost_model()
        with self.console.status("starting, profiling and calibrating the nodes"):
            if self.cluster is None:
                opened = open_testbed(
                    self.model_name,
                    self.scenario,
                    profile=resumed.profile if resumed else None,
                    references=resumed.references if resumed else None,
                    weights=self.weights,
                    transfers=self.transfers,
                    isolation=self.isolation,
                )
            else:
                opened = open_cluster(self.cluster, self.model_name, self.scenario)
            system = opened.__enter__()
        try:
            yield system
        finally:
            opened.__exit__(None, None, None)

    def _train(
        self, model: CostModel, point: ResumePoint
    ) -> tuple[ResidualSolverPolicy, Checkpoint]:
        with progress(self.console) as bar:
            tasks = {
                phase: bar.add_task(f"simulator: {phase}", total=None, note="")
                for phase in ("hindsight", "PPO")
            }

            def report(phase: str, done: int, total: int, best: float) -> None:
                note = f"cost {best:.3f} x the solver's" if best < float("inf") else ""
                bar.update(tasks[phase], completed=done, total=total, note=note)

            result = train_policy(model, self.training, self.log_dir, report, point, self.base)
        self._ppo = result.ppo
        policy = result.ppo.policy
        assert isinstance(policy, ResidualSolverPolicy)
        table_, results = self._simulate(model, result.checkpoint)
        self.console.print(table_)
        metadata = {
            **result.checkpoint.metadata,
            "scenario": asdict(self.scenario),
            "simulator": results,
            "steps_per_s": round(result.steps_per_s),
        }
        checkpoint = replace(result.checkpoint, metadata=metadata)
        checkpoint.save(self.directory, self._policy_zip())
        return policy, checkpoint

    def _policy_zip(self) -> bytes:
        """SB3's form of the policy; where its curves went is of this machine, and left out."""
        buffer = io.BytesIO()
        self._ppo.save(buffer, exclude=["tensorboard_log"])
        return buffer.getvalue()

    def _simulate(self, model: CostModel, checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
        """Arms on held-out conditions of the simulator."""
        simulator = Simulator(model, 24, EVALUATION_SEED, record_requests=True)
        context = ArmContext(model, checkpoint)
        runs: dict[str, ArmRun] = {}
        with progress(self.console) as bar:
            task = bar.add_task("arms in the simulator", total=len(SIMULATOR_ARMS), note="")
            for name in SIMULATOR_ARMS:
                runs[name] = run_arm(
                    simulator,
                    make_arm(name, context),
                    seed=EVALUATION_SEED,
                    n_intervals=120,
                    startup=60,
                )
                bar.update(task, advance=1)
        arms = summarise(runs, model, {n: _decide_us(r) for n, r in runs.items()})
        title = f"simulator, held-out seeds, {self.scenario.capacity_fraction} of capacity"
        return table(title, arms), {n: a["cost"] for n, a in arms.items()}

    def _finetune(
        self, policy: ResidualSolverPolicy, system: LiveSystem, checkpoint: Checkpoint
    ) -> Checkpoint:
        settings, steps = FinetuneSettings(), self.online_steps
        writer = SummaryWriter(str(self.log_dir / "finetune"))
        try:
            with progress(self.console) as bar:
                task = bar.add_task("fine-tuning on the nodes", total=steps, note="")

                def report(step: int, reward: float) -> None:
                    bar.update(task, completed=step, note=f"reward {reward:.2f}")

                result = finetune(
                    policy,
                    system,
                    self.training,
                    settings,
                    steps,
                    self.training.seed,
                    writer,
                    report,
                )
        finally:
            writer.close()
        for number, lesson in enumerate(result.lessons, 1):
            ratio = ", ".join(f"{v:.4f}" for v in lesson.cost_ratio)
            self.console.print(
                f"lesson {number}: tuned / deployed cost (mean, low, high): {ratio}; {lesson.event}"
            )
        if result.promoted:
            self._ppo.policy.load_state_dict(result.policy.state_dict())
        metadata = {
            **checkpoint.metadata,
            "finetuning": {
                **asdict(settings),
                "steps": steps,
                "promoted": result.promoted,
                "lessons": [{"event": x.event, "cost_ratio": x.cost_ratio} for x in result.lessons],
                "live_cost": result.live_cost,
                "solver_agreement": result.solver_agreement,
            },
        }
        model = result.model if result.promoted else system.model
        return to_checkpoint(model, result.policy, metadata)

    def _measure(self, system: LiveSystem, checkpoint: Checkpoint) -> None:
        """A short table of arms on the running nodes; `agents.evaluate` gives the verdict."""
        context = ArmContext(system.model, checkpoint)
        runs: dict[str, ArmRun] = {}
        with progress(self.console) as bar:
            total = len(LIVE_ARMS) * self.live_intervals
            task = bar.add_task("arms on the nodes", total=total, note="")
            for name in LIVE_ARMS:
                bar.update(task, note=name)
                runs[name] = run_arm(
                    system,
                    make_arm(name, context),
                    seed=EVALUATION_SEED,
                    n_intervals=self.live_intervals,
                    on_interval=lambda: bar.update(task, advance=1),
                )
        arms = summarise(runs, system.model, {n: _decide_us(r) for n, r in runs.items()})
        self.console.print(
            table(f"SHORT: {self.live_intervals} intervals per arm on the running nodes", arms)
        )


def _decide_us(run: ArmRun) -> float:
    return 1e6 * float(sum(run.decide_s)) / max(1, len(run.decide_s) * run.rows)
