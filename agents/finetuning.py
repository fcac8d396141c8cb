"""Fine-tuning on the running nodes: small anchored steps, promoted only when they are better.

The policy decides on the nodes while its transitions are kept. After each window the profile is
recalibrated from what the requests measured, and a few PPO steps mix the live transitions with
rollouts in the recalibrated simulator, held near the starting policy by a KL term. In the end the
tuned policy replaces the starting one only if, on held-out conditions of the recalibrated
simulator, the paired 95 % interval of their cost ratio lies below 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard.writer import SummaryWriter

from agents.compare import bootstrap_mean
from agents.controllers import Solver
from agents.nodes import rescale_nodes
from agents.policy import ResidualSolverPolicy
from agents.runtime import PolicyController
from agents.scalars import log_system
from agents.training import TrainingSettings, to_checkpoint
from agents.validation import mean_cost
from env.cost import Cost
from env.predict import CostModel
from env.simulator import Simulator
from env.state import Encoder, idle_probes
from env.system import Completed, System
from env.vector import SimulatorVecEnv

__all__ = ["FinetuneResult", "FinetuneSettings", "finetune"]

F32 = NDArray[np.float32]
HELD_OUT_SEED = 8_000_000


@dataclass(frozen=True)
class FinetuneSettings:
    """How the policy is tuned on the nodes.

    Attributes:
        steps: Intervals on the nodes.
        window: Intervals between two updates.
        sim_envs: Simulated environments mixed in per update.
        sim_steps: Steps of each.
        epochs: Passes per update.
        learning_rate: Adam's.
        kl_weight: Weight of KL(starting policy || policy).
        live_weight: Weight of a live transition against a simulated one.
        clip: PPO's clipping range.
    """

    steps: int = 60
    window: int = 20
    sim_envs: int = 64
    sim_steps: int = 32
    epochs: int = 3
    learning_rate: float = 1e-4
    kl_weight: float = 0.5
    live_weight: float = 4.0
    clip: float = 0.2


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning did.

    Attributes:
        policy: The policy to deploy: the tuned one if promoted, else the one that came in.
        promoted: Whether the tuned policy replaced the starting one.
        cost_ratio: Tuned / starting policy: mean, low, high of the paired 95 % interval.
        live_cost: Mean cost per interval on the nodes.
        solver_agreement: Share of decisions in which the solver, in shadow, chose the same plan.
        model: The recalibrated cost model.
    """

    policy: ResidualSolverPolicy
    promoted: bool
    cost_ratio: tuple[float, float, float]
    live_cost: float
    solver_agreement: float
    model: CostModel


@dataclass
class _Batch:
    """Transitions, time-major lists of arrays over environments."""

    observations: list[F32] = field(default_factory=list)
    actions: list[NDArray[np.int64]] = field(default_factory=list)
    rewards: list[NDArray[np.float64]] = field(default_factory=list)

    def tensors(
        self, policy: ResidualSolverPolicy, last: F32, gamma: float, gae_lambda: float
    ) -> tuple[torch.Tensor, ...]:
        """Observations, actions, advantages, returns and old log-probabilities, flat."""
        obs = torch.as_tensor(np.stack(self.observations))
        actions = torch.as_tensor(np.stack(self.actions))
        steps, envs = actions.shape
        with torch.no_grad():
            flat = obs.reshape(steps * envs, -1)
            values, log_prob, _ = policy.evaluate_actions(flat, actions.reshape(-1))
            values = values.reshape(steps, envs)
            following = policy.predict_values(torch.as_tensor(last)).reshape(envs)
        rewards = torch.as_tensor(np.stack(self.rewards), dtype=torch.float32)
        advantages = torch.zeros_like(rewards)
        running = torch.zeros(envs)
        for t in reversed(range(steps)):
            delta = rewards[t] + gamma * following - values[t]
            running = delta + gamma * gae_lambda * running
            advantages[t], following = running, values[t]
        returns = advantages + values
        return flat, actions.reshape(-1), advantages.reshape(-1), returns.reshape(-1), log_prob


def finetune(
    policy: ResidualSolverPolicy,
    system: System,
    training: TrainingSettings,
    settings: FinetuneSettings,
    seed: int,
    writer: SummaryWriter | None = None,
    report: Callable[[int, float], None] = lambda step, reward: None,
) -> FinetuneResult:
    """Tune a policy on running nodes.

    Args:
        policy: The policy trained in the simulator; it is not changed.
        system: The running nodes.
        training: Discount and rates of the simulator training.
        settings: How to tune.
        seed: Conditions and sampling.
        writer: Gets finetune/ and system/ scalars per interval and update.
        report: Called after every interval with (intervals done, reward).
    """
    torch.manual_seed(seed)
    start, tuned = policy, policy.clone()
    model, scenario = system.model, system.model.scenario
    encoder, cost, shadow = (
        Encoder(model),
        Cost(model.profile, model.references, scenario),
        Solver(),
    )
    optimizer = torch.optim.Adam(tuned.parameters(), lr=settings.learning_rate, eps=1e-5)
    gamma = training.gamma**scenario.interval_s
    state = system.reset(seed)
    shadow.reset(model, 1)
    history = encoder.push(encoder.new_history(1), state)
    observation = encoder.observe(history, state)
    live, done, recalibrated = _Batch(), list[Completed](), model
    costs, agreed = [], 0
    for step in range(1, settings.steps + 1):
        action = _sample(tuned, observation)
        cuts = model.table.cuts[action]
        agreed += int((shadow.decide(state, None).cuts == cuts).all())
        result = system.step(cuts, idle_probes(state, scenario))
        reward = -cost(result.record, system.n_ref)
        live.observations.append(observation)
        live.actions.append(action)
        live.rewards.append(reward)
        if result.completed is not None:
            done.append(result.completed)
        state = result.state
        history = encoder.push(history, state)
        observation = encoder.observe(history, state)
        costs.append(-float(reward[0]))
        if writer:
            writer.add_scalar("finetune/reward", float(reward[0]), step)
            log_system(writer, step, result)
        report(step, float(reward[0]))
        if step % settings.window == 0 or step == settings.steps:
            if done:
                ran = np.concatenate([~d.lost for d in done])
                plans = np.concatenate([d.cuts for d in done])[ran]
                work = np.concatenate([d.work_s for d in done])[ran]
                profile = rescale_nodes(model.profile, plans, work)
                recalibrated = CostModel(profile, scenario, model.references)
            losses = _update(
                tuned,
                start,
                optimizer,
                live,
                observation,
                recalibrated,
                settings,
                training,
                gamma,
                seed + step,
            )
            if writer:
                for name, value in losses.items():
                    writer.add_scalar(f"finetune/{name}", value, step)
            live = _Batch()
    system.drain()
    ratio = _paired_ratio(recalibrated, tuned, start)
    promoted = ratio[2] < 1.0
    if writer:
        writer.add_scalar("finetune/cost_ratio_to_start", ratio[0], settings.steps)
        writer.add_scalar("finetune/promoted", float(promoted), settings.steps)
    return FinetuneResult(
        policy=tuned if promoted else start,
        promoted=promoted,
        cost_ratio=ratio,
        live_cost=float(np.mean(costs)),
        solver_agreement=agreed / settings.steps,
        model=recalibrated,
    )


def _sample(policy: ResidualSolverPolicy, observation: F32) -> NDArray[np.int64]:
    with torch.no_grad():
        action = policy.get_distribution(torch.as_tensor(observation)).sample()
    sampled: NDArray[np.int64] = action.numpy()
    return sampled


def _update(
    policy: ResidualSolverPolicy,
    anchor: ResidualSolverPolicy,
    optimizer: torch.optim.Optimizer,
    live: _Batch,
    last: F32,
    model: CostModel,
    settings: FinetuneSettings,
    training: TrainingSettings,
    gamma: float,
    seed: int,
) -> dict[str, float]:
    """A few PPO passes over live and simulated transitions, anchored to `anchor`."""
    simulated, sim_last = _rollout(policy, model, settings, training, seed)
    parts = [
        (live.tensors(policy, last, gamma, training.gae_lambda), settings.live_weight),
        (simulated.tensors(policy, sim_last, gamma, training.gae_lambda), 1.0),
    ]
    obs, actions, advantages, returns, old = (torch.cat([p[0][i] for p in parts]) for i in range(5))
    weight = torch.cat([torch.full((len(p[0][1]),), p[1]) for p in parts])
    weight /= weight.mean()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    with torch.no_grad():
        anchor_logits = _log_probabilities(anchor, obs)
    losses: dict[str, float] = {}
    for _ in range(settings.epochs):
        for index in torch.split(torch.randperm(len(obs)), 512):
            values, log_prob, _ = policy.evaluate_actions(obs[index], actions[index])
            logits = _log_probabilities(policy, obs[index])
            ratio = torch.exp(log_prob - old[index])
            gain = torch.minimum(
                ratio * advantages[index],
                ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantages[index],
            )
            kl = (anchor_logits[index].exp() * (anchor_logits[index] - logits)).sum(dim=1)
            value_error = (values.reshape(-1) - returns[index]) ** 2
            w = weight[index]
            loss = (w * (-gain + settings.kl_weight * kl + 0.5 * value_error)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            losses = {
                "policy_loss": float(-gain.mean().detach()),
                "kl_to_start": float(kl.mean().detach()),
                "value_loss": float(value_error.mean().detach()),
            }
    return losses


def _log_probabilities(policy: ResidualSolverPolicy, observations: torch.Tensor) -> torch.Tensor:
    """Log-probability of every candidate, [R, A]."""
    categorical = policy.get_distribution(observations).distribution
    assert isinstance(categorical, torch.distributions.Categorical)
    return categorical.logits


def _rollout(
    policy: ResidualSolverPolicy,
    model: CostModel,
    settings: FinetuneSettings,
    training: TrainingSettings,
    seed: int,
) -> tuple[_Batch, F32]:
    env = SimulatorVecEnv(model, settings.sim_envs, seed=seed, rate_fraction=training.rates)
    batch, observation = _Batch(), np.asarray(env.reset(), dtype=np.float32)
    for _ in range(settings.sim_steps):
        action = _sample(policy, observation)
        batch.observations.append(observation)
        batch.actions.append(action)
        following, reward, _, _ = env.step(action)
        batch.rewards.append(np.asarray(reward))
        observation = np.asarray(following, dtype=np.float32)
    env.close()
    return batch, observation


def _paired_ratio(
    model: CostModel, tuned: ResidualSolverPolicy, start: ResidualSolverPolicy
) -> tuple[float, float, float]:
    """Cost of `tuned` over that of `start` on held-out conditions: mean and 95 % interval."""
    envs, steps = 64, min(100, model.scenario.steps_per_episode)
    simulator = Simulator(model, envs, HELD_OUT_SEED)
    costs = [
        mean_cost(
            PolicyController(to_checkpoint(model, policy, {})), simulator, HELD_OUT_SEED, steps
        )
        for policy in (tuned, start)
    ]
    interval = bootstrap_mean(costs[0] / costs[1])
    return interval["mean"], interval["low"], interval["high"]
