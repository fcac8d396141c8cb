"""Lessons in hindsight: trials are exact branches of one future, and what they teach helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.arms.runtime import PolicyController, PolicyNetwork, ResidualActor
from agents.learning.hindsight import (
    HindsightSettings,
    gather_lessons,
    learn_from_hindsight,
    trial_costs,
)
from agents.learning.policy import ResidualSolverPolicy, export_arrays, policy_kwargs
from agents.learning.training import to_checkpoint
from agents.learning.validation import mean_cost
from env.conditions import Conditions
from env.cost import Cost
from env.mixture import Mixture
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder, idle_probes
from env.synthetic import synthetic_profile
from env.tape import record_conditions
from env.vector import SimulatorVecEnv
from executor.model import model_spec

SMALL = HindsightSettings(
    rounds=2, n_envs=8, intervals=9, every=3, candidates=6, lookahead=3, batch_size=16
)


@pytest.fixture(scope="module")
def model() -> CostModel:
    torch.set_num_threads(1)
    scenario = Scenario.load().replace(episode_s=30.0)
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def new_policy(model: CostModel) -> ResidualSolverPolicy:
    torch.manual_seed(0)
    env = SimulatorVecEnv(model, 2, seed=0)
    return ResidualSolverPolicy(
        env.observation_space,
        spaces.Discrete(len(model.plans)),
        lambda _: 1e-3,
        **policy_kwargs(model),
    )


def test_a_trial_costs_what_living_it_costs(model: CostModel) -> None:
    """Branching at interval t equals a run from the start that takes the plan there."""
    network = PolicyNetwork(export_arrays(new_policy(model)))
    actor = ResidualActor(model, network)
    rates = np.array([0.5, 1.1]) * model.capacity_rps
    t, tried = 4, np.array([[0, 30, 44], [7, 12, 3]])
    tape = record_conditions(Conditions(model.scenario, rates, 5), t + SMALL.lookahead)
    cost = Cost(model.profile, model.references, model.scenario)

    def live(plan: np.ndarray | None) -> tuple[Simulator, np.ndarray, np.ndarray]:
        """Follow the policy, but take `plan` at t; history before t and cost from t on."""
        encoder, simulator = Encoder(model), Simulator(model, 2, 0, conditions=tape.play())
        state = simulator.reset()
        history = encoder.push(encoder.new_history(2), state)
        spent = np.zeros(2)
        for i in range(t if plan is None else t + SMALL.lookahead):
            action = network.logits(encoder.observe(history, state)).argmax(axis=1)
            if i == t:
                assert plan is not None
                action = plan
            result = simulator.step(model.table.cuts[action], idle_probes(state, model.scenario))
            if i >= t:
                weight = SMALL.discount ** (i - t)
                spent += weight * cost(result.record, simulator.n_ref)
            state = result.state
            history = encoder.push(history, state)
        if plan is not None:
            weight = SMALL.discount**SMALL.lookahead
            spent += weight * cost(simulator.drain(), simulator.n_ref)
        return simulator, history, spent

    simulator, history, _ = live(None)
    costs = trial_costs(model, actor, tape, SMALL, simulator.snapshot(), t, history, tried)
    for k in range(tried.shape[1]):
        assert np.allclose(costs[:, k], live(tried[:, k])[2], rtol=1e-9)
    assert np.ptp(costs, axis=1).min() > 0.01, "other plans must cost something else"


def test_lessons_are_centred_distinct_and_repeatable(model: CostModel) -> None:
    actor = ResidualActor(model, PolicyNetwork(export_arrays(new_policy(model))))
    rates = np.full(SMALL.n_envs, 0.8) * model.capacity_rps
    conditions = [Conditions(model.scenario, rates, 3) for _ in range(2)]
    a, b = (gather_lessons(model, actor, c, 3, SMALL) for c in conditions)
    assert a.inputs[1].shape == (24, 6) and a.inputs[0].shape[0] == 24
    assert all(len(set(row)) == 6 for row in a.inputs[1].tolist())
    assert np.allclose(a.advantages.mean(axis=1), 0.0, atol=1e-5)
    assert np.array_equal(a.inputs[1], b.inputs[1]) and np.array_equal(a.advantages, b.advantages)


def test_learning_recovers_from_a_bad_start(model: CostModel) -> None:
    """A policy that is pushed off the solver finds most of the way back."""
    policy, fraction = new_policy(model), 0.8
    simulator = Simulator(model, 24, 11, rate_rps=fraction * model.capacity_rps)

    def cost() -> float:
        controller = PolicyController(to_checkpoint(model, policy, {}))
        return float(mean_cost(controller, simulator, 11, 30).mean())

    good = cost()
    with torch.no_grad():
        policy.action_net.dense.bias.normal_(0.0, 80.0, generator=torch.Generator().manual_seed(1))
    pushed = cost()
    settings = replace(SMALL, rounds=12, n_envs=24, intervals=18, learning_rate=3e-2)
    done: list[int] = []
    losses = learn_from_hindsight(
        policy, model, Mixture(own_share=1.0), (fraction, fraction), 0, settings, done.append
    )
    assert done == list(range(1, 13)) and len(losses) == 12
    assert pushed > 1.2 * good, (pushed, good)
    assert cost() < good + 0.4 * (pushed - good), (cost(), pushed, good)
