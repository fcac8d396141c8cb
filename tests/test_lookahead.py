"""The policy that looks past the coming interval."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agents.arms.controllers import ArmContext, make_arm
from agents.arms.lookahead import Lookahead
from agents.arms.mpc import queues_later
from agents.arms.runtime import Checkpoint, PolicyController
from agents.cli import CHECKPOINTS
from env.predict import CostModel
from env.scenario import Scenario
from tests.test_policy import random_states

TAU = 0.05


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load(CHECKPOINTS / "alexnet", "alexnet")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> CostModel:
    return CostModel(checkpoint.profile, Scenario.load(), checkpoint.references)


def test_a_plan_is_charged_what_the_intervals_after_it_cost(model: CostModel) -> None:
    """Against the same, plan by plan and interval by interval."""
    state = random_states(model, 6, 1)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, len(model.plans))).astype(np.float32)
    ahead = Lookahead(horizon=3, tried=4, weight=0.7)
    charged = ahead.charge(model, state, logits, TAU, None)
    for b in range(6):
        likeliest = np.argsort(-logits[b], kind="stable")[:4]
        assert set(np.flatnonzero(np.isfinite(charged[b]))) == set(likeliest)
        for plan in likeliest:
            after, later = state.take(np.array([b])), 0.0
            held = np.array([plan])
            for _ in range(2):
                after = queues_later(model, after, held)
                cost = model.predict(after).cost[0]
                held, later = np.array([cost.argmin()]), later + float(cost.min())
            expected = logits[b, plan] - 0.7 / TAU * later
            assert charged[b, plan] == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("ahead", [Lookahead(weight=0.0), Lookahead(horizon=1)])
def test_without_weight_or_horizon_it_is_the_greedy_policy(
    model: CostModel, checkpoint: Checkpoint, ahead: Lookahead
) -> None:
    arms = PolicyController(checkpoint, ahead=ahead), PolicyController(checkpoint)
    for arm in arms:
        arm.reset(model, 300)
    for seed in range(3):
        state = random_states(model, 300, seed)
        ours, theirs = (arm.decide(state).cuts for arm in arms)
        np.testing.assert_array_equal(ours, theirs)


def test_it_never_picks_a_plan_through_a_node_that_is_down(
    model: CostModel, checkpoint: Checkpoint
) -> None:
    arm = make_arm("policy", ArmContext(model, checkpoint))
    arm.reset(model, 64)
    state = random_states(model, 64, 3)
    state.node_up[::2, 2] = False
    cuts = arm.decide(state).cuts
    assert (cuts[::2, 1] == model.profile.spec.n_units).all()


def test_one_environment_alone_is_decided_as_in_a_batch(
    model: CostModel, checkpoint: Checkpoint
) -> None:
    arms = [make_arm("policy", ArmContext(model, checkpoint)) for _ in range(2)]
    state = random_states(model, 40, 5)
    arms[0].reset(model, 40)
    together = arms[0].decide(state).cuts
    for b in range(40):
        arms[1].reset(model, 1)
        alone = arms[1].decide(state.take(np.array([b]))).cuts
        np.testing.assert_array_equal(alone[0], together[b])


def test_deciding_more_often_it_looks_as_far_ahead(checkpoint: Checkpoint) -> None:
    often = CostModel(
        checkpoint.profile, Scenario.load().replace(interval_s=0.2), checkpoint.references
    )
    usual = CostModel(checkpoint.profile, Scenario.load(), checkpoint.references)
    known = replace(checkpoint, metadata={"scenario": {"interval_s": 1.0}})
    state = random_states(usual, 50, 2)
    decided = []
    for model in (often, usual):
        arm = PolicyController(known, ahead=Lookahead())
        arm.reset(model, 50)
        decided.append(arm.decide(state).cuts)
    np.testing.assert_array_equal(*decided)
