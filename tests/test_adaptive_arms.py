"""The arms that learn or forecast during a run: LinUCB and the forecasting solver."""

from __future__ import annotations

import numpy as np
import pytest

from agents.arms.bandit import LinUCB
from agents.arms.controllers import Solver
from agents.arms.mpc import ModelPredictive, ModelPredictiveSettings, queues_later
from agents.arms.predictive import Forecast, Predictive, PredictiveSettings
from agents.cli import CHECKPOINTS
from agents.learning.validation import mean_cost
from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import idle_probes
from env.synthetic import synthetic_profile
from env.system import StepResult
from executor.model import model_spec
from executor.profile import Profile


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def states(model, batch, steps, seed=20_200):
    """States of a run under the solver, with what each interval returned."""
    simulator, solver = Simulator(model, batch, seed, record_requests=True), Solver()
    state, last = simulator.reset(seed), None
    solver.reset(model, batch)
    for _ in range(steps):
        yield state, last
        last = simulator.step(solver.decide(state).cuts)
        state = last.state


def test_linucb_that_neither_explores_nor_learns_is_the_solver(model):
    bandit, solver = LinUCB(alpha=0.0, ridge=1e12), Solver()
    bandit.reset(model, 3)
    solver.reset(model, 3)
    for state, last in states(model, 3, 20):
        ours, theirs = bandit.decide(state, last), solver.decide(state)
        np.testing.assert_array_equal(ours.cuts, theirs.cuts)
        np.testing.assert_array_equal(ours.probe_bytes, theirs.probe_bytes)


def test_linucb_equals_ridge_regression_on_what_it_saw(model):
    bandit, batch = LinUCB(alpha=0.3, ridge=2.0), 2
    bandit.reset(model, batch)
    simulator = Simulator(model, batch, 0, record_requests=True)
    cost = Cost(model.profile, model.references, model.scenario)
    state, last = simulator.reset(20_201), None
    rows, targets = [[] for _ in range(batch)], [[] for _ in range(batch)]
    for _ in range(25):
        x = bandit._features(state)
        decision = bandit.decide(state, last)
        chosen = [
            next(a for a, c in enumerate(model.table.cuts) if (c == decision.cuts[b]).all())
            for b in range(batch)
        ]
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
        for b in range(batch):
            if last.record.arrived[b]:
                rows[b].append(x[b, chosen[b]])
                spent = cost(last.record, np.maximum(last.record.arrived, 1).astype(float))[b]
                targets[b].append(min(spent, 5.0))
    bandit.decide(state, last)
    prior = np.zeros(x.shape[2])
    prior[:2] = 1.0
    for b in range(batch):
        a = 2.0 * np.eye(len(prior)) + np.array(rows[b]).T @ rows[b]
        theta = np.linalg.solve(a, 2.0 * prior + np.array(rows[b]).T @ targets[b])
        np.testing.assert_allclose(bandit._inverse[b] @ bandit._b[b], theta, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(bandit._inverse[b], np.linalg.inv(a), rtol=1e-6, atol=1e-9)


def test_linucb_learns_that_a_prediction_is_wrong(model):
    """The second hop costs more than predicted; nothing carries over between intervals."""
    state = Simulator(model, 2, 0).reset(0)
    predicted = model.predict(state).cost[0].astype(float)
    believed = predicted.argmin()
    hop_s = model.table.hop_bytes[:, 1] / state.bytes_per_s[0, 1]
    truth = predicted + 6.0 * hop_s / model.references.latency_s
    best = truth.min()
    assert truth[believed] > 1.2 * best
    bandit, last = LinUCB(alpha=0.3, ridge=0.05), None
    bandit.reset(model, 2)
    paid = []
    for _ in range(150):
        cuts = bandit.decide(state, last).cuts
        plan = [int(np.flatnonzero((model.table.cuts == c).all(axis=1))[0]) for c in cuts]
        record = IntervalRecord.zeros(2, 3)
        record.arrived[:] = 4
        # Latency is the only thing spent, and it costs what the truth says.
        per_s = model.scenario.weights.latency / model.references.latency_s
        record.outstanding_s[:] = 4 * truth[plan] / per_s
        last = StepResult(state, record)
        paid.append(truth[plan])
    assert np.mean(paid[-30:]) < 1.05 * best


def test_a_forecast_returns_to_the_mean_it_has_seen():
    forecast = Forecast(np.array([10.0]), return_s=2.0, memory_s=50.0)
    for _ in range(400):
        forecast.observe(np.array([4.0]), 1.0)
    assert forecast.mean == pytest.approx(4.0, abs=0.05)
    assert forecast.at(np.array([8.0]), 0.0) == pytest.approx(8.0)
    assert forecast.at(np.array([8.0]), 2.0 * np.log(2.0)) == pytest.approx(6.0, abs=0.05)
    assert forecast.at(np.array([8.0]), 1e3) == pytest.approx(4.0, abs=0.05)


def test_predictive_without_memory_is_the_solver(model):
    inf = float("inf")
    still = PredictiveSettings(fall=inf, bandwidth_s=inf, load_s=inf, arrivals_s=inf)
    arm, solver = Predictive(still), Solver()
    arm.reset(model, 3)
    solver.reset(model, 3)
    for state, _ in states(model, 3, 20):
        seen = arm.forecast(state)
        np.testing.assert_allclose(seen.bytes_per_s, np.maximum(state.bytes_per_s, 1.0))
        np.testing.assert_allclose(seen.arrival_rps, np.maximum(state.arrival_rps, 1e-3))
        np.testing.assert_array_equal(arm.decide(state).cuts, solver.decide(state).cuts)


def test_predictive_lets_a_hop_fall_by_a_factor_per_second_only(model):
    arm = Predictive(PredictiveSettings(fall=3.0, bandwidth_s=float("inf")))
    arm.reset(model, 1)
    state = Simulator(model, 1, 0).reset(0)
    state.bytes_per_s[:] = 9e6
    assert arm.forecast(state).bytes_per_s == pytest.approx(9e6)
    state.bytes_per_s = np.array([[1e3, 8e6]])
    assert arm.forecast(state).bytes_per_s == pytest.approx(np.array([[3e6, 8e6]]))
    assert arm.forecast(state).bytes_per_s == pytest.approx(np.array([[1e6, 8e6]]))
    state.bytes_per_s = np.array([[9e6, 8e6]])  # it rises at once
    assert arm.forecast(state).bytes_per_s == pytest.approx(np.array([[9e6, 8e6]]))
    np.testing.assert_array_equal(arm.decide(state).probe_bytes, idle_probes(state, model.scenario))


def test_mpc_that_looks_one_interval_ahead_is_predictive(model):
    arm, predictive = ModelPredictive(ModelPredictiveSettings(horizon=1, tried=3)), Predictive()
    arm.reset(model, 3)
    predictive.reset(model, 3)
    for state, _ in states(model, 3, 20):
        ours, theirs = arm.decide(state), predictive.decide(state)
        np.testing.assert_array_equal(ours.cuts, theirs.cuts)
        np.testing.assert_array_equal(ours.probe_bytes, theirs.probe_bytes)


def test_mpc_plays_the_queues_forward_as_fluids(model):
    """Against queues moved in a thousand small steps, no plan's stations being saturated."""
    state = Simulator(model, 1, 0).reset(0)
    n_plans = len(model.plans)
    state = state.take(np.zeros(n_plans, dtype=np.int64))
    state.node_backlog_s[:] = [0.4, 0.9, 0.05]
    state.hop_backlog_bytes[:] = [40_000.0, 2e6]
    state.arrival_rps[:] = 0.5
    arm, plans = ModelPredictive(), np.arange(n_plans)
    arm.reset(model, n_plans)
    state.in_flight[:] = 9.0
    later = queues_later(model, state, plans)
    speed, table = 1.0 - state.node_load, model.table
    nodes, hops = state.node_backlog_s.copy(), state.hop_backlog_bytes.copy()
    for _ in range(1000):
        nodes = np.maximum(nodes + 1e-3 * (0.5 * table.work_s - speed), 0.0)
        hops = np.maximum(hops + 1e-3 * (0.5 * table.hop_bytes - state.bytes_per_s), 0.0)
    # What arrives at an empty station is served at once there; here it waits for the step's end.
    np.testing.assert_allclose(later.node_backlog_s, nodes, atol=2e-3)
    np.testing.assert_allclose(later.hop_backlog_bytes, hops, rtol=2e-3, atol=2e4)
    slowest_s = np.maximum(
        (table.work_s / speed).max(axis=1), (table.hop_bytes / state.bytes_per_s).max(axis=1)
    )
    left = np.maximum(9.5 - 1.0 / slowest_s, 0.0)
    np.testing.assert_allclose(later.in_flight, left, rtol=1e-4, atol=1e-4)


def test_mpc_costs_less_than_the_solver_on_the_shipped_profile():
    scenario = Scenario.load()
    model = CostModel(Profile.load(CHECKPOINTS / "alexnet" / "profile.json"), scenario)
    simulator = Simulator(model, 24, 0, rate_rps=0.8 * model.capacity_rps)
    ours, theirs = (mean_cost(arm, simulator, 20_300, 40) for arm in (ModelPredictive(), Solver()))
    assert ours.mean() < 0.95 * theirs.mean()


@pytest.mark.parametrize("arm", [ModelPredictive(), Predictive()], ids=lambda arm: arm.name)
def test_arms_that_forecast_keep_off_a_node_that_is_down(model, arm):
    arm.reset(model, 3)
    for n, (state, _) in enumerate(states(model, 3, 12)):
        state.node_up[:] = [True, n % 2 == 0, True]
        cuts = arm.decide(state).cuts
        assert n % 2 == 0 or (cuts[:, 0] == cuts[:, 1]).all()
