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

import numpy as np
import torch
from numpy.typing import NDArray

from agents.policy import ResidualSolverPolicy, export_arrays
from agents.runtime import PolicyNetwork
from env.conditions import Conditions
from env.cost import Cost
from env.predict import CostModel
from env.simulator import Simulator, Snapshot
from env.state import Encoder, idle_probes
from env.tape import Tape, record_conditions

__all__ = [
    "HindsightSettings",
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
        epochs: Passes over all lessons so far, per round.
        batch_size: Lessons per gradient step.
        learning_rate: Adam's.
    """

    rounds: int = 20
    n_envs: int = 128
    intervals: int = 60
    every: int = 3
    candidates: int = 6
    lookahead: int = 5
    discount: float = 0.95
    explore: float = 0.1
    epochs: int = 4
    batch_size: int = 512
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Lessons:
    """R moments and what K plans would have cost at each.

    Attributes:
        observations: [R, size].
        plans: [R, K] indices of the plans tried.
        advantages: [R, K] their costs less the moment's mean, in standard deviations of the
            environment's, so that overloaded environments do not drown the others.
    """

    observations: F32
    plans: I64
    advantages: F32


def trial_costs(
    model: CostModel,
    network: PolicyNetwork,
    tape: Tape,
    settings: HindsightSettings,
    snapshot: Snapshot,
    t: int,
    history: F32,
    plans: I64,
) -> F64:
    """What it costs to hold each plan for one interval and to follow the policy after it.

    Args:
        model: Profile, scenario and candidate plans.
        network: The policy.
        tape: The conditions, those to come included.
        settings: How far to go on.
        snapshot: B environments at the start of interval t.
        t: The interval.
        history: [B, HISTORY * features] what the policy has seen in each.
        plans: [B, K] indices of the plans to try.

    Returns:
        [B, K] discounted costs, the run-out of what is open in the end included.
    """
    encoder, cost = Encoder(model), Cost(model.profile, model.references, model.scenario)
    owner = np.repeat(np.arange(plans.shape[0]), plans.shape[1])
    conditions = tape.play(owner, t)
    simulator = Simulator(model, len(owner), 0, conditions=conditions)
    state = simulator.restore(snapshot, owner)
    history, action = history[owner], plans.reshape(-1)
    total, weight = np.zeros(len(owner)), 1.0
    for step in range(settings.lookahead):
        if step:
            history = encoder.push(history, state)
            action = network.logits(encoder.observe(history, state)).argmax(axis=1)
        result = simulator.step(model.table.cuts[action], idle_probes(state, model.scenario))
        state = result.state
        total += weight * cost(result.record, simulator.n_ref)
        weight *= settings.discount**model.scenario.interval_s
    total += weight * cost(simulator.drain(), simulator.n_ref)
    return total.reshape(plans.shape)


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
    network: PolicyNetwork,
    rate_rps: F64,
    seed: int,
    settings: HindsightSettings,
) -> Lessons:
    """Let a policy decide in simulated environments, and try other plans at some moments.

    Args:
        model: Profile, scenario and candidate plans.
        network: The policy.
        rate_rps: [B] mean arrival rate of each environment.
        seed: Names the conditions and draws the plans tried.
        settings: How much.
    """
    rng = np.random.default_rng([seed, 3])
    batch = len(rate_rps)
    n_intervals = settings.intervals + settings.lookahead
    tape = record_conditions(Conditions(model.scenario, rate_rps, seed), n_intervals)
    encoder, simulator = Encoder(model), Simulator(model, batch, 0, conditions=tape.play())
    state = simulator.reset()
    history = encoder.push(encoder.new_history(batch), state)
    observations, tried, costs = [], [], []
    for t in range(settings.intervals):
        observation = encoder.observe(history, state)
        order = (-network.logits(observation)).argsort(axis=1, kind="stable")
        if t % settings.every == settings.every - 1:
            plans = _candidates(order, settings.candidates, rng)
            observations.append(observation)
            tried.append(plans)
            snapshot = simulator.snapshot()
            costs.append(trial_costs(model, network, tape, settings, snapshot, t, history, plans))
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
        observations=np.concatenate(observations),
        plans=np.concatenate(tried),
        advantages=np.clip(flat, -MAX_ADVANTAGE, MAX_ADVANTAGE).astype(np.float32),
    )


def learn_from_hindsight(
    policy: ResidualSolverPolicy,
    model: CostModel,
    rates: tuple[float, float],
    seed: int,
    settings: HindsightSettings,
    report: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Improve a policy's actor in place.

    Args:
        policy: The policy; its critic is left alone.
        model: Profile, scenario and candidate plans.
        rates: Arrival rates to learn at, as fractions of the best static plan's capacity.
        seed: Everything drawn depends on it.
        settings: How much.
        report: Called after every round with the rounds done.

    Returns:
        The last loss of each round.
    """
    rng = np.random.default_rng([seed, 4])
    shuffle = torch.Generator().manual_seed(seed)
    actor = policy.actor_parameters()
    optimizer = torch.optim.Adam(actor, lr=settings.learning_rate, eps=1e-5)
    lessons: list[Lessons] = []
    losses = []
    for done in range(1, settings.rounds + 1):
        rate = rng.uniform(*rates, settings.n_envs) * model.capacity_rps
        network = PolicyNetwork(export_arrays(policy))
        draw = int(rng.integers(2**62))
        lessons.append(gather_lessons(model, network, rate, draw, settings))
        losses.append(_learn(policy, actor, optimizer, lessons, settings, shuffle))
        report(done)
    return losses


def _learn(
    policy: ResidualSolverPolicy,
    actor: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lessons: list[Lessons],
    settings: HindsightSettings,
    shuffle: torch.Generator,
) -> float:
    """Pass over all lessons a few times; returns the last loss."""
    observations, plans, advantages = (
        torch.from_numpy(np.concatenate([getattr(x, name) for x in lessons]))
        for name in ("observations", "plans", "advantages")
    )
    loss = torch.zeros(())
    for _ in range(settings.epochs):
        order = torch.randperm(len(plans), generator=shuffle)
        for index in torch.split(order, settings.batch_size):
            latent = policy.mlp_extractor.forward_actor(observations[index])
            logits = policy.action_net(latent).gather(1, plans[index])
            loss = (torch.softmax(logits, dim=1) * advantages[index]).sum(dim=1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(actor, 0.5)
            optimizer.step()
    return float(loss.detach())
