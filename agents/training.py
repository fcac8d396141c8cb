"""Training in the calibrated simulator: lessons in hindsight, then PPO; the best is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam

from agents.controllers import Controller, Solver
from agents.hindsight import HindsightSettings, learn_from_hindsight
from agents.policy import ResidualSolverPolicy, export_arrays, policy_kwargs
from agents.resume import ResumePoint
from agents.runtime import Checkpoint, PolicyController
from env.cost import Cost
from env.predict import CostModel
from env.simulator import Simulator
from env.vector import SimulatorVecEnv

__all__ = ["TrainingResult", "TrainingSettings", "mean_cost", "train_policy"]

VALIDATION_SEED = 7_000_000
# (phase, done, total, best cost ratio to the solver so far)
Report = Callable[[str, int, int, float], None]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingSettings:
    """How the policy is trained.

    Attributes:
        hindsight: What is learned in hindsight before PPO.
        steps: Environment steps in all.
        n_envs: Simulated environments side by side.
        copies: Neighbouring environments that share their conditions (`GroupBaselineBuffer`).
        rollout: Steps per environment between two updates.
        batch_size: Minibatch of an update.
        epochs: Passes over a rollout.
        learning_rate: PPO's Adam's, decayed linearly to a tenth.
        gamma: Discount per second; scaled to the scenario's interval.
        gae_lambda: Generalised advantage estimation's lambda.
        entropy: Entropy bonus.
        tau: Temperature of the solver's prior.
        width: Hidden width.
        rates: Arrival rates trained on, as fractions of the best static plan's capacity.
        seed: Everything drawn depends on it.
        validate_every: Steps between two validations against the solver.
        validation_envs: Environments of a validation.
        threads: Torch threads of the updates (1.2 x faster with 2 than with 1 on 2 cores).
    """

    hindsight: HindsightSettings = field(default_factory=HindsightSettings)
    steps: int = 400_000
    n_envs: int = 256
    copies: int = 8
    rollout: int = 32
    batch_size: int = 2048
    epochs: int = 4
    learning_rate: float = 3e-4
    gamma: float = 0.9
    gae_lambda: float = 0.9
    entropy: float = 0.0
    tau: float = 0.05
    width: int = 64
    rates: tuple[float, float] = (0.3, 1.2)
    seed: int = 0
    validate_every: int = 200_000
    validation_envs: int = 192
    threads: int = 2


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        ppo: The SB3 model holding the chosen weights.
        checkpoint: The same for the runtime.
        validation: (steps, cost ratio to the solver) of each validation.
        steps_per_s: PPO's environment steps per second, updates included.
    """

    ppo: PPO
    checkpoint: Checkpoint
    validation: list[tuple[int, float]]
    steps_per_s: float


def mean_cost(controller: Controller, simulator: Simulator, seed: int, steps: int) -> F64:
    """Mean cost per step and environment of a controller on the conditions `seed` names, [B]."""
    model = simulator.model
    cost = Cost(model.profile, model.references, model.scenario)
    state, last = simulator.reset(seed), None
    controller.reset(model, state.batch)
    total = np.zeros(state.batch)
    for _ in range(steps):
        decision = controller.decide(state, last)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
        total += cost(last.record, simulator.n_ref)
    total += cost(simulator.drain(), simulator.n_ref)
    return total / steps


class GroupBaselineBuffer(RolloutBuffer):
    """A rollout buffer that takes the luck of the conditions out of the advantages.

    Environments come in groups of `copies` neighbours that share their conditions
    (`env.conditions.SharedConditions`); the group's mean advantage at a step is what these
    conditions did to everyone (arXiv 1807.02264). Each group is scaled to the same spread, so that
    overloaded conditions do not drown the others.
    """

    def __init__(self, *args: Any, copies: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copies = copies

    def compute_returns_and_advantage(
        self, last_values: torch.Tensor, dones: NDArray[np.bool_]
    ) -> None:
        """Generalised advantages, then the group's mean removed."""
        super().compute_returns_and_advantage(last_values, dones)
        if self.copies > 1:
            grouped = self.advantages.reshape(self.buffer_size, -1, self.copies)
            grouped = grouped - grouped.mean(axis=2, keepdims=True)
            grouped /= np.maximum(grouped.std(axis=(0, 2), keepdims=True), 1e-3)
            self.advantages = grouped.reshape(self.buffer_size, -1)


class _Validation(BaseCallback):
    """Validates against the solver on fixed seeds, keeps the best weights, reports progress."""

    def __init__(
        self,
        model: CostModel,
        settings: TrainingSettings,
        report: Report,
    ) -> None:
        super().__init__()
        self.cost_model, self.settings, self.report = model, settings, report
        low, high = settings.rates
        rates = np.linspace(low, high, settings.validation_envs) * model.capacity_rps
        self.simulator = Simulator(model, settings.validation_envs, VALIDATION_SEED, rate_rps=rates)
        self.steps = min(100, model.scenario.steps_per_episode)
        self.solver_cost = mean_cost(Solver(), self.simulator, VALIDATION_SEED, self.steps)
        self.history: list[tuple[int, float]] = []
        self.best = float("inf")
        self.best_weights: dict[str, torch.Tensor] = {}
        self._next = 0

    def validate(self) -> None:
        """Compare with the solver on common random numbers; keep the weights if they are best."""
        policy = self.model.policy
        assert isinstance(policy, ResidualSolverPolicy)
        controller = PolicyController(to_checkpoint(self.cost_model, policy, {}))
        cost = mean_cost(controller, self.simulator, VALIDATION_SEED, self.steps)
        # Each rate counts the same: the mean of ratios, not the ratio of means.
        ratio = float(np.mean(cost / self.solver_cost))
        self.history.append((self.num_timesteps, ratio))
        self.logger.record("eval/cost_ratio_to_solver", ratio)
        if ratio < self.best:
            self.best = ratio
            self.best_weights = {k: v.clone() for k, v in policy.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What an interrupted training needs of this, as plain values and tensors."""
        return {
            "history": self.history,
            "best": self.best,
            "best_weights": self.best_weights,
            "next": self._next,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.history, self.best = list(state["history"]), state["best"]
        self.best_weights, self._next = state["best_weights"], state["next"]

    def _on_training_start(self) -> None:
        self.logger.record(
            "hparams",
            HParam(
                {k: v for k, v in asdict(self.settings).items() if isinstance(v, int | float)},
                {"eval/cost_ratio_to_solver": 1.0, "rollout/reward_mean": 0.0},
            ),
            exclude=("stdout", "log", "json", "csv"),
        )

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.logger.record("rollout/reward_mean", float(buffer.rewards.mean()))
        if self.num_timesteps >= self._next:
            self._next = self.num_timesteps + self.settings.validate_every
            self.validate()
        self.report("PPO", self.num_timesteps, self.settings.steps, self.best)

    def _on_step(self) -> bool:
        return True


def to_checkpoint(
    model: CostModel, policy: ResidualSolverPolicy, metadata: dict[str, Any]
) -> Checkpoint:
    """The runtime's form of a policy."""
    return Checkpoint(
        profile=model.profile,
        references=model.references,
        plans=model.plans,
        arrays=export_arrays(policy),
        metadata=metadata,
    )


def train_policy(
    model: CostModel,
    settings: TrainingSettings,
    log_dir: Path | None = None,
    report: Report = lambda phase, done, total, best: None,
    resume: ResumePoint | None = None,
) -> TrainingResult:
    """Train the residual policy and return the weights that validated best.

    Args:
        model: Profile, scenario, candidates and references.
        settings: How PPO is run.
        log_dir: Where TensorBoard's files go; None writes none.
        report: Called after every round and every rollout with the phase's name, how much of it is
            done, how much there is, and the best cost ratio to the solver so far.
        resume: Where to save what an interrupted training needs; if that was loaded, go on there.
    """
    torch.manual_seed(settings.seed)
    env = SimulatorVecEnv(
        model,
        settings.n_envs,
        seed=settings.seed,
        rate_fraction=settings.rates,
        copies=settings.copies,
    )

    def learning_rate(remaining: float) -> float:
        return settings.learning_rate * (0.1 + 0.9 * remaining)

    ppo = PPO(
        ResidualSolverPolicy,
        env,
        n_steps=settings.rollout,
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        learning_rate=learning_rate,
        gamma=settings.gamma**model.scenario.interval_s,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.entropy,
        max_grad_norm=0.5,
        rollout_buffer_class=GroupBaselineBuffer,
        rollout_buffer_kwargs={"copies": env.copies},
        policy_kwargs=policy_kwargs(model, settings.tau, settings.width),
        seed=settings.seed,
        tensorboard_log=str(log_dir) if log_dir else None,
        device="cpu",
    )
    validation = _Validation(model, settings, report)
    started = time.monotonic()
    if resume is None or not resume.loaded:
        torch.set_num_threads(1)  # the lessons' batches are too small for two
        assert isinstance(ppo.policy, ResidualSolverPolicy)
        learn_from_hindsight(
            ppo.policy,
            model,
            settings.rates,
            settings.seed,
            settings.hindsight,
            lambda done: report("hindsight", done, settings.hindsight.rounds, float("inf")),
        )
    torch.set_num_threads(settings.threads)
    callbacks: list[BaseCallback] = [validation]
    saved = None
    if resume is not None:
        callbacks.append(resume.saver(model, env, validation.state))
        saved = resume.restore(ppo, env)
        if saved is not None:
            validation.restore(saved)
    ppo_started, steps_before = time.monotonic(), ppo.num_timesteps
    ppo.learn(
        settings.steps - steps_before,
        callback=callbacks,
        tb_log_name="simulator",
        reset_num_timesteps=saved is None,
    )
    validation.validate()
    ended = time.monotonic()
    elapsed = ended - started + (resume.elapsed_s if resume else 0.0)
    torch.set_num_threads(1)
    ppo.policy.load_state_dict(validation.best_weights)
    policy = ppo.policy
    assert isinstance(policy, ResidualSolverPolicy)
    metadata = {
        "training": {
            **asdict(settings),
            "steps_done": ppo.num_timesteps,
            "seconds": round(elapsed, 1),
            "validation_cost_ratio_to_solver": validation.best,
        }
    }
    env.close()
    return TrainingResult(
        ppo=ppo,
        checkpoint=to_checkpoint(model, policy, metadata),
        validation=validation.history,
        steps_per_s=(ppo.num_timesteps - steps_before) / (ended - ppo_started),
    )
