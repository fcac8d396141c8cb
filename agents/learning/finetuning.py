"""What a policy learns while it is deployed: small anchored steps, promoted only when better.

A lesson takes a window of intervals that the deployed policy lived through and the profile as it
was recalibrated by then. The recalibrated simulator tries several plans at many moments under the
very future that came (`agents.learning.hindsight`); a few passes over that, mixed with PPO's loss
on the live transitions, move the tuned policy, and a KL term holds it near the deployed one. It
replaces that only if, on conditions that no lesson saw before, the paired 95 % interval of their
cost ratio lies below 1; where that of the deployed one over the first lies above 1 (the profile
moved on since), the first comes back.

Nodes run the deployed policy as it decides best, without exploring, so learning costs them nothing.
Its transitions are therefore weighted with the probability that the tuned policy gives what was
done (truncated importance weights, as V-trace, arXiv 1802.01561).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from agents.arms.runtime import PolicyController, PolicyNetwork, ResidualActor
from agents.learning.hindsight import HindsightSettings, Lessons, gather_lessons
from agents.learning.policy import ResidualSolverPolicy, export_arrays
from agents.learning.training import TrainingSettings, to_checkpoint
from agents.learning.validation import mean_cost
from agents.paired import bootstrap_mean
from env.cost import References
from env.mixture import MixedConditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.profile import Profile

__all__ = ["FinetuneSettings", "Learner", "Lesson", "Window"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
HELD_OUT_SEED = 8_000_000


@dataclass(frozen=True)
class FinetuneSettings:
    """How a policy goes on learning.

    Attributes:
        window: Intervals between two lessons.
        hindsight: What is simulated per lesson, and the passes over it; `rounds` has no meaning
            here.
        kl_weight: Weight of KL(deployed policy || tuned policy).
        live_weight: Weight of the live transitions' loss.
        clip: PPO's clipping range.
        judge_envs: Held-out environments that a promotion is judged on.
        judge_steps: Intervals in each.
    """

    window: int = 20
    hindsight: HindsightSettings = field(
        default_factory=lambda: HindsightSettings(n_envs=64, intervals=30, memory=8)
    )
    kl_weight: float = 0.05
    live_weight: float = 0.1
    clip: float = 0.2
    judge_envs: int = 48
    judge_steps: int = 60

    def __post_init__(self) -> None:
        for name in ("window", "judge_envs", "judge_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Window:
    """T intervals under one policy.

    Attributes:
        observations: [T, S] what it saw.
        actions: [T] index of the plan that was run.
        rewards: [T] what came of it.
        last: [S] what it saw after the last.
    """

    observations: F32
    actions: I64
    rewards: F64
    last: F32


@dataclass(frozen=True)
class Lesson:
    """What a lesson led to.

    Attributes:
        event: "promoted", "rolled back" or "kept".
        arrays: The deployed policy's weights from now on, as the runtime takes them.
        weights: The same as `ResidualSolverPolicy.state_dict` has them.
        cost_ratio: Tuned over deployed policy: mean, low, high of the paired 95 % interval.
        losses: Of the last step.
    """

    event: str
    arrays: dict[str, F32]
    weights: dict[str, NDArray[np.generic]]
    cost_ratio: tuple[float, float, float]
    losses: dict[str, float]


class Learner:
    """Holds the first, the deployed and the tuned policy, and gives lessons.

    Args:
        policy: The policy trained in the simulator; it is not changed.
        scenario: Conditions, cost weights, arrivals of the running system.
        references: Units of the cost.
        training: Discount, rates and mixture of the simulator training.
        settings: How to tune.
        seed: Conditions and sampling.
    """

    def __init__(
        self,
        policy: ResidualSolverPolicy,
        scenario: Scenario,
        references: References,
        training: TrainingSettings,
        settings: FinetuneSettings,
        seed: int,
    ) -> None:
        self._scenario, self._references = scenario, references
        self._training, self._settings = training, settings
        self._gamma = training.gamma**scenario.interval_s
        self._seed, self._count = seed, 0
        self._shuffle = torch.Generator().manual_seed(seed)
        self._first = self._deployed = policy
        self._tune(policy)

    def _tune(self, policy: ResidualSolverPolicy) -> None:
        """Go on from a policy, with nothing remembered."""
        self._tuned = policy.clone()
        rate = self._settings.hindsight.learning_rate
        self._optimizer = torch.optim.Adam(self._tuned.parameters(), lr=rate, eps=1e-5)
        self._lessons: list[Lessons] = []

    def learn(self, window: Window, profile: Profile) -> Lesson:
        """Give a lesson.

        Args:
            window: What the deployed policy lived through.
            profile: As recalibrated by now.
        """
        self._count += 1
        model = CostModel(profile, self._scenario, self._references)
        self._lessons.append(self._simulated(model))
        del self._lessons[: -self._settings.hindsight.memory]
        losses = self._update(self._live(window))
        ratio, event = self._ratio(model, self._tuned, self._deployed), "kept"
        if ratio[2] < 1.0:
            self._deployed, event = self._tuned.clone(), "promoted"
        elif self._deployed is not self._first:
            if self._ratio(model, self._deployed, self._first)[1] > 1.0:
                self._deployed, event = self._first, "rolled back"
                self._tune(self._first)
        weights = {k: v.detach().cpu().numpy() for k, v in self._deployed.state_dict().items()}
        return Lesson(event, export_arrays(self._deployed), weights, ratio, losses)

    def _simulated(self, model: CostModel) -> Lessons:
        """What plans would have cost at moments of the recalibrated simulator."""
        training, settings = self._training, self._settings.hindsight
        system = training.mixture.system(model)
        seed = self._seed + 1000 * self._count
        conditions = MixedConditions(model, training.mixture, training.rates, settings.n_envs, seed)
        actor = ResidualActor(system, PolicyNetwork(export_arrays(self._tuned)))
        return gather_lessons(system, actor, conditions, seed, settings)

    def _live(self, window: Window) -> tuple[torch.Tensor, ...]:
        """Observations, actions, advantages, returns and log-probabilities before the update."""
        seen, actions = torch.as_tensor(window.observations), torch.as_tensor(window.actions)
        with torch.no_grad():
            values, log_prob, _ = self._tuned.evaluate_actions(seen, actions)
            values = values.reshape(-1)
            following = self._tuned.predict_values(torch.as_tensor(window.last[None])).reshape(())
        rewards = torch.as_tensor(window.rewards, dtype=torch.float32)
        advantages, running = torch.zeros_like(rewards), torch.zeros(())
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + self._gamma * following - values[t]
            running = delta + self._gamma * self._training.gae_lambda * running
            advantages[t], following = running, values[t]
        returns = advantages + values
        # The critic is of the system trained for; on the present one it may be off by a constant.
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        return seen, actions, advantages, returns, log_prob

    def _update(self, live: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """Passes over the lessons remembered and the live transitions, near the deployed policy."""
        settings, policy = self._settings, self._tuned
        obs, plans = (
            torch.from_numpy(np.concatenate(parts))
            for parts in zip(*(x.inputs for x in self._lessons), strict=True)
        )
        advantages = torch.from_numpy(np.concatenate([x.advantages for x in self._lessons]))
        with torch.no_grad():
            anchor = _log_probabilities(self._deployed, obs)
        actor = policy.actor_parameters()
        mine = set(map(id, actor))
        parts = actor, [p for p in policy.parameters() if id(p) not in mine]
        losses: dict[str, float] = {}
        for _ in range(settings.hindsight.epochs):
            order = torch.randperm(len(obs), generator=self._shuffle)
            for index in torch.split(order, settings.hindsight.batch_size):
                now = _log_probabilities(policy, obs[index])
                tried = torch.softmax(now.gather(1, plans[index]), dim=1)
                in_hindsight = (tried * advantages[index]).sum(dim=1).mean()
                moved = anchor[index] - now
                kl = (anchor[index].exp() * moved).sum(dim=1).mean()
                on_nodes, value_loss = self._live_loss(live)
                loss = in_hindsight + settings.kl_weight * kl
                loss = loss + settings.live_weight * (on_nodes + 0.5 * value_loss)
                self._optimizer.zero_grad()
                torch.autograd.backward(loss)
                for part in parts:  # apart: the critic's errors are larger by far
                    torch.nn.utils.clip_grad_norm_(part, 0.5)
                self._optimizer.step()
                losses = {
                    "hindsight_loss": float(in_hindsight.detach()),
                    "live_loss": float(on_nodes.detach()),
                    "kl_to_deployed": float(kl.detach()),
                    "value_loss": float(value_loss.detach()),
                }
        return losses

    def _live_loss(self, live: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """PPO's clipped loss of the live transitions, and the critic's."""
        seen, actions, advantages, returns, before = live
        values, log_prob, _ = self._tuned.evaluate_actions(seen, actions)
        ratio, clip = torch.exp(log_prob - before), self._settings.clip
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        # What was done was done for certain: weighted as likely as the tuned policy does it.
        gain = torch.exp(before) * gain
        return -gain.mean(), ((values.reshape(-1) - returns) ** 2).mean()

    def _ratio(
        self, model: CostModel, one: ResidualSolverPolicy, other: ResidualSolverPolicy
    ) -> tuple[float, float, float]:
        """Cost of one policy over another's: mean and 95 % interval, on this lesson's conditions.

        Every lesson has its own: who is judged often enough on the same ones wins some day.
        """
        settings, seed = self._settings, HELD_OUT_SEED + 1000 * self._seed + self._count
        simulator = Simulator(model, settings.judge_envs, seed)
        costs = [
            mean_cost(
                PolicyController(to_checkpoint(model, policy, {})),
                simulator,
                seed,
                settings.judge_steps,
            )
            for policy in (one, other)
        ]
        interval = bootstrap_mean(costs[0] / costs[1])
        return interval["mean"], interval["low"], interval["high"]


def _log_probabilities(policy: ResidualSolverPolicy, observations: torch.Tensor) -> torch.Tensor:
    """Log-probability of every candidate, [R, A]."""
    categorical = policy.get_distribution(observations).distribution
    assert isinstance(categorical, torch.distributions.Categorical)
    return categorical.logits
