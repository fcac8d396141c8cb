"""Training in the calibrated simulator: lessons in hindsight, then PPO; the best is kept.

Both learn from a mixture of conditions (`env.mixture`), and what is kept is chosen on another draw
of it: the weights that validate best, their correction as strong as validates best. None is kept
that loses to the solver there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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

from agents.arms.runtime import Checkpoint, PolicyController, encoder_on
from agents.arms.scoring import digest
from agents.learning.hindsight import HindsightSettings, learn_from_hindsight
from agents.learning.policy import ResidualSolverPolicy, export_arrays, policy_kwargs
from agents.learning.resume import ResumePoint
from agents.learning.validation import Judge, overall, own_and_varied, rank
from env.mixture import MixedConditions, Mixture
from env.predict import CostModel
from env.vector import SimulatorVecEnv

__all__ = ["TrainingResult", "TrainingSettings", "judge", "train_policy"]

F32 = NDArray[np.float32]
VALIDATION_SEED = 7_000_000
# (phase, done, total, best cost ratio to the solver so far)
Report = Callable[[str, int, int, float], None]


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
        mixture: Conditions trained on.
        strengths: Factors on what was learned that are tried in the end, beside 0 and 1.
        seed: Everything drawn depends on it.
        validate_every: Steps between two validations against the solver.
        validation_envs: Environments of a validation, under the scenario's own conditions and
            as many under varied ones.
        threads: Torch threads of the updates (1.2 x faster with 2 than with 1 on 2 cores).
    """

    hindsight: HindsightSettings = field(default_factory=HindsightSettings)
    steps: int = 150_000
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
    mixture: Mixture = field(default_factory=Mixture)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75)
    seed: int = 0
    validate_every: int = 75_000
    validation_envs: int = 192
    threads: int = 2


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves.

    Attributes:
        ppo: The SB3 model holding the chosen weights.
        checkpoint: The same for the runtime.
        validation: (steps, cost ratio to the solver, mean of all parts) of each validation.
        steps_per_s: PPO's environment steps per second, updates included.
    """

    ppo: PPO
    checkpoint: Checkpoint
    validation: list[tuple[int, float]]
    steps_per_s: float


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
        self.judge = judge(model, settings)
        self.history: list[tuple[int, float]] = []
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, torch.Tensor] = {}
        self._next = 0

    def validate(self) -> None:
        """Compare with the solver on common random numbers; keep the weights if they are best."""
        ratios = self._ratios()
        self.history.append((self.num_timesteps, overall(ratios)))
        self.logger.record("eval/cost_ratio_to_solver", overall(ratios))
        for part, ratio in ratios.items():
            self.logger.record(f"eval/cost_ratio_to_solver_{part}", ratio)
        if not self.best or rank(ratios) < rank(self.best):
            self.best = ratios
            self.best_weights = {k: v.clone() for k, v in self.model.policy.state_dict().items()}

    def choose(self) -> float:
        """Leave the policy with the best weights at the strength that validates best.

        Returns the strength. Should nothing be better than the solver, the policy is that: of
        strength 0, and without its base.
        """
        policy, chosen = self.model.policy, 1.0
        assert isinstance(policy, ResidualSolverPolicy)
        for strength in (*self.settings.strengths, *([0.0] if policy.base else [])):
            policy.load_state_dict(self.best_weights)
            policy.strengthen(strength)
            ratios = self._ratios()
            if rank(ratios) < rank(self.best):
                self.best, chosen = ratios, strength
        solver = dict.fromkeys(self.best, 1.0)
        if rank(solver) <= rank(self.best):
            self.best, chosen = solver, 0.0
            policy.base = self.model.policy_kwargs["base"] = {}
        policy.load_state_dict(self.best_weights)
        policy.strengthen(chosen)
        return chosen

    def _ratios(self) -> dict[str, float]:
        policy = self.model.policy
        assert isinstance(policy, ResidualSolverPolicy)
        return self.judge.ratios(PolicyController(to_checkpoint(self.cost_model, policy, {})))

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
        best = overall(self.best) if self.best else float("inf")
        self.report("PPO", self.num_timesteps, self.settings.steps, best)

    def _on_step(self) -> bool:
        return True


def judge(model: CostModel, settings: TrainingSettings, seed: int = VALIDATION_SEED) -> Judge:
    """Compares policies with the solver under the scenario's own conditions, and varied ones.

    Args:
        model: What they decide for.
        settings: How they are trained: `validation_envs` of each kind, at the `rates`.
        seed: Names the conditions; what is not the default's has chosen no weights.
    """
    simulators = own_and_varied(
        model, settings.mixture, settings.rates, settings.validation_envs, seed
    )
    return Judge(simulators, seed, min(100, model.scenario.steps_per_episode))


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
    base: Mapping[str, F32] | None = None,
) -> TrainingResult:
    """Train the residual policy and return the weights that validated best.

    Args:
        model: Profile, scenario, candidates and references.
        settings: How PPO is run.
        log_dir: Where TensorBoard's files go; None writes none.
        report: Called after every round and every rollout with the phase's name, how much of it is
            done, how much there is, and the best cost ratio to the solver so far.
        resume: Where to save what an interrupted training needs; if that was loaded, go on there.
        base: Arrays of the policy for all models to start from; none to start from the solver.
    """
    torch.manual_seed(settings.seed)
    conditions = MixedConditions(
        model, settings.mixture, settings.rates, settings.n_envs, settings.seed, settings.copies
    )
    base = base or {}
    system = settings.mixture.system(model)
    env = SimulatorVecEnv(
        system,
        settings.n_envs,
        seed=settings.seed,
        conditions=conditions,
        encoder=encoder_on(system, base),
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
        rollout_buffer_kwargs={"copies": settings.copies},
        policy_kwargs=policy_kwargs(model, settings.tau, settings.width, base),
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
            settings.mixture,
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
    strength = validation.choose()
    ended = time.monotonic()
    elapsed = ended - started + (resume.elapsed_s if resume else 0.0)
    torch.set_num_threads(1)
    policy = ppo.policy
    assert isinstance(policy, ResidualSolverPolicy)
    metadata = {
        "training": {
            **asdict(settings),
            "steps_done": ppo.num_timesteps,
            "seconds": round(elapsed, 1),
            "strength": strength,
            "base": digest(policy.base),
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
