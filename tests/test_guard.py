"""The guard: who decides when, without clocks or sockets."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from agents.arms.controllers import Decision, Solver, Static, edge_only
from agents.arms.guard import GuardedController, GuardSettings
from env.cost import IntervalRecord
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import SystemState
from env.synthetic import synthetic_profile
from env.system import StepResult
from executor.model import model_spec

SETTINGS = GuardSettings(hold_s=3.0, window_s=4.0, stale_s=10.0)


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


@pytest.fixture
def state(model: CostModel) -> SystemState:
    return Simulator(model, 1, 0).reset()


@pytest.fixture
def guarded(model: CostModel) -> GuardedController:
    """A policy that always says edge-only, which the solver would never do on these states."""
    spec = model.profile.spec
    controller = GuardedController(Static("policy", edge_only(spec, 3)), SETTINGS)
    controller.reset(model, 1)
    return controller


def solver_plan(model: CostModel, state: SystemState) -> Decision:
    solver = Solver()
    solver.reset(model, 1)
    return solver.decide(state)


def is_policy(decision: Decision, model: CostModel) -> bool:
    return bool((decision.cuts == model.profile.spec.n_units).all())


def test_policy_decides_while_healthy(
    guarded: GuardedController, model: CostModel, state: SystemState
) -> None:
    assert is_policy(guarded.decide(state), model)
    assert not guarded.fallbacks and not guarded.reason


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("bytes_per_s", float("nan"), "state is not finite"),
        ("node_load", float("inf"), "state is not finite"),
        ("bytes_per_s", 1e12, "bandwidth out of range"),
        ("bandwidth_age_s", 11.0, "bandwidth stale"),
    ],
)
def test_falls_back_for_a_reason_and_returns(
    guarded: GuardedController, model: CostModel, state: SystemState,
    field: str, value: float, reason: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bad = np.array(getattr(state, field), copy=True)
    bad[0, 0] = value
    with caplog.at_level(logging.WARNING):
        decision = guarded.decide(dataclasses.replace(state, **{field: bad}))
    assert not is_policy(decision, model)
    assert np.isin(decision.cuts, model.table.cuts).all()
    assert guarded.reason == reason and guarded.fallbacks == {reason: 1}
    assert reason in caplog.text
    held = [is_policy(guarded.decide(state), model) for _ in range(4)]
    assert held == [False, False, True, True]
    assert guarded.reason == ""
    expected = solver_plan(model, state).cuts
    assert not (expected == model.profile.spec.n_units).all()


def test_falls_back_when_cost_drifts_above_prediction(
    guarded: GuardedController, model: CostModel, state: SystemState
) -> None:
    record = IntervalRecord.zeros(1, 3)
    record.arrived[0] = 5
    record.lost[0] = 5
    record.outstanding_s[0] = 30.0  # far above anything predicted for an unloaded system
    last = StepResult(state=state, record=record)
    state.arrival_rps = np.array([1.0])  # what the edge alone can serve
    decisions = [is_policy(guarded.decide(state, None if i == 0 else last), model)
                 for i in range(6)]  # fmt: skip
    assert decisions[0] and not decisions[-1]
    assert guarded.reason == "observed cost above predicted"


def test_no_plan_goes_through_a_node_that_is_down(
    guarded: GuardedController, model: CostModel, state: SystemState
) -> None:
    up = np.array([[True, False, True]])
    broken = dataclasses.replace(state, node_up=up)
    decision = guarded.decide(broken)
    assert guarded.reason == "node down" and guarded.fallbacks["node down"] == 1
    assert (decision.cuts == model.profile.spec.n_units).all()
    assert is_policy(guarded.decide(state), model) and guarded.reason == ""  # back at once
    stale = dataclasses.replace(state, bandwidth_age_s=np.full((1, 2), 1e3))
    guarded.decide(stale)
    guarded.decide(broken)  # cuts no hold short that had begun
    assert not is_policy(guarded.decide(state), model)
    linked = CostModel(model.profile, model.scenario, direct={0: 2})
    (usable,) = linked.usable(broken)
    assert {tuple(c) for c in linked.table.cuts[usable]} == {
        p.cuts for p in linked.plans if p.cuts[0] == p.cuts[1]
    }
    assert model.usable(state) is None
    nothing = dataclasses.replace(state, node_up=np.array([[False, True, True]]))
    assert model.usable(nothing).all()
