"""Learning from hindsight: what each of several plans would have cost, from the same moment on.

Bandwidth, load and arrivals do not depend on the action, so the simulator can go back to a moment
and try several plans for one interval under the very future that came (the policy decides after
it). Their costs differ by the plan alone, and a few thousand such lessons teach more than millions
of single trials. What is learned is the mean over futures, not the plan that was best in one: the
loss is the cost that the policy's own probabilities would have paid,

    loss = mean over moments of sum over tried plans of p(plan | state) cost(plan),

with p the policy restricted to the plans that were tried. After each round the improved policy
makes the moments and the continuations of the next (approximate policy iteration; on learning in
hindsight with exogenous inputs, arXiv 2207.06272).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.arms.runtime import Actor, PolicyNetwork, ResidualActor
from agents.learning.policy import ResidualSolverPolicy, export_arrays
from env.conditions import ConditionsSource
from env.cost import Cost
from env.mixture import MixedConditions, Mixture
from env.predict import CostModel
from env.simulator import Simulator, Snapshot
from env.state import SystemState, idle_probes
from env.tape import Tape, record_conditions

__all__ = [
    "HindsightSettings",
    "Learner",
    "Lessons",
    "gather_lessons",
    "learn_from_hindsight",
    "trial_costs",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MAX_ADVANTAGE = 5.0  # in standard deviations of an environment's costs


@dataclass(frozen=True)
class HindsightSettings:
    """How lessons are gathered and learned.

    Attributes:
        rounds: Rounds of gathering and learning; 0 skips all of it.
        n_envs: Simulated environments of a round.
        intervals: Intervals that each of them lives.
        every: Intervals between two lessons.
        candidates: Plans tried per lesson.
        lookahead: Intervals a trial goes on for before what is open is run out; the plan tried
            is held for the first, then the policy decides.
        discount: Of costs to come, per second.
        explore: Share of decisions taken at random among the best eight, so that moments differ.
        memory: Rounds whose lessons are remembered.
        epochs: Passes over the lessons remembered, per round.
        batch_size: Lessons per gradient step.
        learning_rate: Adam's.
    """

    rounds: int = 24
    n_envs: int = 128
    intervals: int = 60
    every: int = 3
    candidates: int = 6
    lookahead: int = 5
    discount: float = 0.95
    explore: float = 0.1
    memory: int = 24
    epochs: int = 3
    batch_size: int = 512
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Lessons:
    """R moments and what K plans would have cost at each.

    Attributes:
        inputs: What `Actor.lesson` gives of the moments and plans, each [R, ...].
        advantages: [R, K] the plans' costs less the moment's mean, in standard deviations of the
            environment's, so that overloaded environments do not drown the others.
    """

    inputs: tuple[NDArray[Any], ...]
    advantages: F32


def trial_costs(
    model: CostModel,
    actor: Actor,
    tape: Tape,
    settings: HindsightSettings,
    snapshot: Snapshot,
    t: int,
    history: F32,
    plans: I64,
    simulate: type[Simulator] = Simulator,
) -> F64:
    """What it costs to hold each plan for one interval and to follow the policy after it.

    Args:
        model: Profile, scenario and candidate plans.
        actor: The policy.
        tape: The conditions, those to come included.
        settings: How far to go on.
        snapshot: B environments at the start of interval t.
        t: The interval.
        history: [B, HISTORY * features] what the policy has seen in each.
        plans: [B, K] indices of the plans to try.
        simulate: What kind of simulator.

    Returns:
        [B, K] discounted costs, the run-out of what is open in the end included.
    """
    cost = Cost(model.profile, model.references, model.scenario)
    owner = np.repeat(np.arange(plans.shape[0]), plans.shape[1])
    conditions = tape.play(owner, t)
    simulator = simulate(model, len(owner), 0, conditions=conditions)
    state = simulator.restore(snapshot, owner)
    history, action = history[owner], plans.reshape(-1)
    total, weight = np.zeros(len(owner)), 1.0
    for step in range(settings.lookahead):
        if step:
            history = actor.encoder.push(history, state)
            logits = actor.logits(actor.observe(history, state))
            action = _served(model, state, logits).argmax(axis=1)
        result = simulator.step(model.table.cuts[action], idle_probes(state, model.scenario))
        state = result.state
        total += weight * cost(result.record, simulator.n_ref)
        weight *= settings.discount**model.scenario.interval_s
    total += weight * cost(simulator.drain(), simulator.n_ref)
    return total.reshape(plans.shape)


def _served(model: CostModel, state: SystemState, logits: F32) -> F32:
    """Logits [B, A], -inf where a plan cannot be served, as whoever decides has them."""
    usable = model.usable(state)
    return logits if usable is None else np.where(usable, logits, np.float32(-np.inf))


def _candidates(order: I64, count: int, rng: np.random.Generator) -> I64:
    """Plans worth trying, [B, count]: two thirds the likeliest, the rest drawn from the others.

    Args:
        order: [B, A] plans from the most to the least likely.
        count: How many.
        rng: Draws.
    """
    batch, n_plans = order.shape
    count = min(count, n_plans)
    best = count - count // 3
    drawn = rng.random((batch, n_plans - best)).argsort(axis=1)[:, : count - best]
    others = np.take_along_axis(order[:, best:], drawn, axis=1)
    return np.concatenate([order[:, :best], others], axis=1)


def gather_lessons(
    model: CostModel,
    actor: Actor,
    conditions: ConditionsSource,
    seed: int,
    settings: HindsightSettings,
    simulate: type[Simulator] = Simulator,
) -> Lessons:
    """Let a policy decide in simulated environments, and try other plans at some moments.

    Args:
        model: Profile, scenario and candidate plans.
        actor: The policy.
        conditions: What B environments live through.
        seed: Draws the plans tried.
        settings: How much.
        simulate: What kind of simulator.
    """
    rng = np.random.default_rng([seed, 3])
    tape = record_conditions(conditions, settings.intervals + settings.lookahead)
    batch = tape.batch
    encoder, simulator = actor.encoder, simulate(model, batch, 0, conditions=tape.play())
    state = simulator.reset()
    history = encoder.push(encoder.new_history(batch), state)
    inputs, costs = [], []
    for t in range(settings.intervals):
        seen = actor.observe(history, state)
        logits = _served(model, state, actor.logits(seen))
        order = (-logits).argsort(axis=1, kind="stable")
        if t % settings.every == settings.every - 1:
            plans = _candidates(order, settings.candidates, rng)
            inputs.append(actor.lesson(seen, plans))
            snapshot = simulator.snapshot()
            costs.append(
                trial_costs(model, actor, tape, settings, snapshot, t, history, plans, simulate)
            )
        rank = rng.integers(0, min(8, order.shape[1]), batch)
        rank *= rng.random(batch) < settings.explore
        cuts = model.table.cuts[order[np.arange(batch), rank]]
        state = simulator.step(cuts, idle_probes(state, model.scenario)).state
        history = encoder.push(history, state)
    advantage = np.stack(costs)  # [lessons, B, K]
    advantage -= advantage.mean(axis=2, keepdims=True)
    advantage /= np.sqrt(np.mean(advantage**2, axis=(0, 2), keepdims=True)) + 1e-3
    flat = advantage.reshape(-1, advantage.shape[2])
    return Lessons(
        inputs=tuple(np.concatenate(parts) for parts in zip(*inputs, strict=True)),
        advantages=np.clip(flat, -MAX_ADVANTAGE, MAX_ADVANTAGE).astype(np.float32),
    )


class Learner:
    """Learns from all lessons so far, a few passes after every round.

    Args:
        parameters: What is learned.
        logits: (inputs of r lessons) -> [r, K] logits of the plans tried.
        settings: How it is learned.
        seed: Of the order of the lessons.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        logits: Callable[..., torch.Tensor],
        settings: HindsightSettings,
        seed: int,
    ) -> None:
        self._parameters, self._logits, self._settings = parameters, logits, settings
        self._optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=1e-5)
        self._shuffle = torch.Generator().manual_seed(seed)
        self._lessons: list[Lessons] = []

    def slow_down(self, share: float) -> None:
        """Go on with this share of the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = share * self._settings.learning_rate

    def learn(self, lessons: Lessons) -> float:
        """Add a round's lessons and pass over those remembered; returns the last loss."""
        self._lessons = [*self._lessons, lessons][-self._settings.memory :]
        inputs = [
            torch.from_numpy(np.concatenate(parts))
            for parts in zip(*(x.inputs for x in self._lessons), strict=True)
        ]
        advantages = torch.from_numpy(np.concatenate([x.advantages for x in self._lessons]))
        loss = torch.zeros(())
        for _ in range(self._settings.epochs):
            order = torch.randperm(len(advantages), generator=self._shuffle)
            for index in torch.split(order, self._settings.batch_size):
                logits = self._logits(*(part[index] for part in inputs))
                loss = (torch.softmax(logits, dim=1) * advantages[index]).sum(dim=1).mean()
                self._optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(self._parameters, 0.5)
                self._optimizer.step()
        return float(loss.detach())


def learn_from_hindsight(
    policy: ResidualSolverPolicy,
    model: CostModel,
    mixture: Mixture,
    rates: tuple[float, float],
    seed: int,
    settings: HindsightSettings,
    report: Callable[[int], None] = lambda done: None,
    simulate: type[Simulator] = Simulator,
) -> list[float]:
    """Improve a policy's actor in place.

    Args:
        policy: The policy; its critic is left alone.
        model: Profile, scenario and candidate plans.
        mixture: Conditions to learn from.
        rates: Arrival rates to learn at, as fractions of the best static plan's capacity.
        seed: Everything drawn depends on it.
        settings: How much.
        report: Called after every round with the rounds done.
        simulate: What kind of simulator to learn in (`env.foretold.Foretold`: one that tells more).

    Returns:
        The last loss of each round.
    """

    def logits(observations: torch.Tensor, plans: torch.Tensor) -> torch.Tensor:
        latent = policy.mlp_extractor.forward_actor(observations)
        every: torch.Tensor = policy.action_net(latent)
        return every.gather(1, plans)

    rng = np.random.default_rng([seed, 4])
    conditions = MixedConditions(model, mixture, rates, settings.n_envs, seed)
    system = mixture.system(model)
    learner = Learner(policy.actor_parameters(), logits, settings, seed)
    losses = []
    for done in range(1, settings.rounds + 1):
        actor = ResidualActor(system, PolicyNetwork(export_arrays(policy)))
        conditions.reset(int(rng.integers(2**62)))
        drawn = int(rng.integers(2**62))
        lessons = gather_lessons(system, actor, conditions, drawn, settings, simulate)
        losses.append(learner.learn(lessons))
        report(done)
    return losses
