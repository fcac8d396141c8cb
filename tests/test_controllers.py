"""The arms that need no memory: static plans and the queue-aware solver."""

from __future__ import annotations

import numpy as np
import pytest

from agents.arms.controllers import (
    ARMS,
    ArmContext,
    Solver,
    Static,
    cloud_only,
    edge_only,
    fog_only,
    make_arm,
    static_thirds,
)
from agents.arms.oracle import PlanSequence
from env.predict import CostModel
from env.scenario import Probing, Scenario
from env.simulator import Simulator
from env.state import idle_probes
from env.synthetic import synthetic_profile
from executor.errors import ConfigError
from executor.model import model_spec
from executor.plan import Plan, is_constrained


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def test_whole_model_plans_for_any_chain():
    spec = model_spec("alexnet")
    n = spec.n_units
    assert [p(spec, 2).cuts for p in (edge_only, fog_only, cloud_only)] == [(n,), (0,), (0,)]
    assert [p(spec, 3).cuts for p in (edge_only, fog_only, cloud_only)] == [(n, n), (0, n), (0, 0)]
    assert fog_only(spec, 4).cuts == (0, n, n)


def test_static_thirds_are_the_references_for_three_nodes_and_equal_shares_otherwise():
    assert static_thirds(model_spec("alexnet"), 3).cuts == (10, 14)
    assert static_thirds(model_spec("vgg16"), 3).cuts == (11, 31)
    assert static_thirds(model_spec("mobilenet_v2"), 3).cuts == (10, 19)
    spec = model_spec("alexnet")
    for n_nodes in (2, 4, 5):
        plan = static_thirds(spec, n_nodes)
        plan.check(spec.n_units, n_nodes)
        assert is_constrained(plan, spec)


def test_static_repeats_its_plan_and_checks_it(model):
    controller = Static("x", Plan((3, 14)))
    controller.reset(model, 4)
    decision = controller.decide(Simulator(model, 4, 0).reset(0), None)
    assert decision.cuts.tolist() == [[3, 14]] * 4
    assert decision.probe_bytes is None
    with pytest.raises(ConfigError, match="cuts must lie in"):
        Static("x", Plan((3, 99))).reset(model, 1)
    with pytest.raises(ConfigError, match="shape"):
        Static("x", np.zeros((3, 2), dtype=np.int64)).reset(model, 2)


def test_solver_takes_the_cheapest_prediction_and_probes_idle_hops(model):
    state = Simulator(model, 3, 0).reset(0)
    state.bytes_per_s = np.array([[1e3, 1e7], [1e8, 1e3], [1e8, 1e8]])
    state.bandwidth_age_s = np.array([[0.0, 9.0], [0.0, 0.0], [9.0, 9.0]])
    solver = Solver()
    solver.reset(model, 3)
    decision = solver.decide(state)
    cost = model.predict(state).cost
    for row, cuts in enumerate(decision.cuts.tolist()):
        chosen = [p.cuts for p in model.plans].index(tuple(cuts))
        assert cost[row, chosen] == cost[row].min()
    # An unusable first hop keeps the request on the edge; an unusable second one off the cloud.
    n = model.profile.spec.n_units
    assert decision.cuts[0].tolist() == [n, n]
    assert decision.cuts[1, 1] == n and decision.cuts[1, 0] < n
    np.testing.assert_array_equal(decision.probe_bytes, idle_probes(state, model.scenario))
    assert (decision.probe_bytes[:, 1] > 0).tolist() == [True, False, True]


def test_a_probe_takes_as_long_on_a_slow_hop_as_on_a_fast_one(model):
    state = Simulator(model, 1, 0).reset(0).take(np.zeros(5, dtype=np.int64))
    state.bytes_per_s = np.array([[1e3], [3e5], [1e6], [1e8], [1e6]]) * [1.0, 2.0]
    state.bandwidth_age_s[:] = [[9.0, 3.1], [9.0, 0.0], [9.0, 9.0], [9.0, 9.0], [2.9, 9.0]]
    probing = Probing(idle_s=3.0, transmit_s=0.02, least_bytes=4096, payload_bytes=65536)
    probes = idle_probes(state, model.scenario.replace(probing=probing))
    least, most = 4096.0, 65536.0
    assert probes.tolist() == [
        [least, least], [6e3, 0.0], [2e4, 4e4], [most, most], [0.0, 4e4],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"idle_s": 0.0}, "must be positive, got 0.0 and 0.02"),
        ({"transmit_s": -1.0}, "must be positive, got 3.0 and -1.0"),
        ({"transmit_s": float("nan")}, "must be positive"),
        ({"least_bytes": 1024}, "4096 <= least_bytes <= payload_bytes, got 1024 and 65536"),
        ({"payload_bytes": 2048}, "4096 <= least_bytes <= payload_bytes, got 4096 and 2048"),
    ],
)
def test_probing_that_measures_nothing_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Probing(**wrong)


def test_solver_avoids_a_backlogged_tier(model):
    state = Simulator(model, 2, 0).reset(0)
    state.bytes_per_s[:] = 2e7
    state.node_load[:] = 0.0
    state.arrival_rps[:] = 1.0
    solver = Solver()
    solver.reset(model, 2)
    idle = solver.decide(state).cuts[0]
    n = model.profile.spec.n_units
    bounds = np.concatenate([[0], idle, [n]])
    busiest = int(np.diff(bounds).argmax())
    assert busiest > 0
    state.node_backlog_s[1, busiest] = 20.0
    busy = np.concatenate([[0], solver.decide(state).cuts[1], [n]])
    assert busy[busiest + 1] == busy[busiest]


def test_arms_by_name(model):
    context = ArmContext(
        model,
        hindsight=lambda: model.table.cuts[:2],
        foresight=lambda: PlanSequence(model.table.cuts[None, :2]),
    )
    for name in set(ARMS) - {"policy", "policy-greedy", "policy-zeroed", "guarded"}:
        controller = make_arm(name, context)
        assert controller.name == name
        controller.reset(model, 2)
        assert controller.decide(Simulator(model, 2, 0).reset(0)).cuts.shape == (2, 2)
    with pytest.raises(ConfigError, match="unknown arm 'nope'; expected one of edge"):
        make_arm("nope", context)
    with pytest.raises(ConfigError, match=r"train\.py --model alexnet"):
        make_arm("policy", context)
    with pytest.raises(ConfigError, match="best-static needs a simulator"):
        make_arm("best-static", ArmContext(model))
