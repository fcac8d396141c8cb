"""The estimator of what the profile gets wrong, and those who decide with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.arms.controllers import Solver
from agents.arms.recalibrated import Recalibrated
from env._units import UnitFactors
from env.predict import CostModel
from env.recalibration import Recalibration, RecalibrationSettings, Recalibrator
from env.scenario import Process, Scenario
from env.simulator import Simulator
from env.state import SystemState
from env.synthetic import synthetic_profile
from env.system import Completed
from executor.errors import ConfigError
from executor.model import model_spec
from executor.profile import Profile


def still(**changes: object) -> Scenario:
    """A scenario whose nodes and hops do not change."""
    scenario = Scenario.load()
    return scenario.replace(
        nodes=tuple(replace(n, load=Process("constant", (0.1,))) for n in scenario.nodes),
        hops=tuple(replace(h, bandwidth=Process("constant", (40.0,))) for h in scenario.hops),
        **changes,
    )


def changed(profile: Profile, factors: tuple[float, ...], frame_s: tuple[float, ...]) -> Profile:
    """Nodes so many times as slow, hops that take so long per frame."""
    units = tuple((factor,) * (profile.spec.n_units + 1) for factor in factors)
    return Recalibration(factors, frame_s, units).of(profile)


def wrong(profile: Profile) -> Profile:
    return changed(profile, (1.0, 0.5, 1.0), (0.012, 0.004))


@pytest.fixture(scope="module")
def truth() -> CostModel:
    scenario = still(capacity_fraction=0.6)
    profile = synthetic_profile(model_spec("alexnet"), scenario)
    # Stages that take as long to begin as a short one takes to compute.
    nodes = tuple(replace(node, stage_overhead_s=0.02) for node in profile.nodes)
    return CostModel(profile.with_changes(nodes=nodes), scenario)


def completed(truth: CostModel, plans: list[tuple[int, int]], intervals: int = 8):
    """What a simulator completes under each of the plans in turn, and its states."""
    simulator = Simulator(truth, 1, 3, record_requests=True)
    simulator.reset(3)
    for t in range(intervals):
        result = simulator.step(np.array([plans[t % len(plans)]]))
        assert result.completed is not None
        yield result.completed, result.state


def test_requests_wait_for_what_their_latency_has_beyond_service(truth: CostModel) -> None:
    """Latency is service, waits, and what the scenario and the profile say a hop takes beside."""
    hops = truth.profile.hops
    rate = 40e6 / 8
    reply_s = truth.profile.spec.cut_bytes[-1] / rate
    waited = 0
    for done, state in completed(truth, [(3, 8), (3, 14), (21, 21), (0, 0)], 24):
        crossed = done.cuts < truth.profile.spec.n_units
        beside = state.rtt_s[0] + reply_s + [h.frame_overhead_s for h in hops]
        expected = done.stage_s.sum(axis=1) + done.transmit_s.sum(axis=1) + crossed @ beside
        waits = done.completion_s - done.arrival_s - expected
        assert done.wait_s[~done.lost] == pytest.approx(waits[~done.lost], abs=1e-9)
        waited += int((done.wait_s > 0.01).sum())
    assert waited > 5


def test_finds_a_slow_node_and_long_hops(truth: CostModel) -> None:
    profile = wrong(truth.profile)
    recalibrator = Recalibrator(profile)
    found = None
    for done, state in completed(truth, [(3, 8), (3, 21)], 20):
        found = recalibrator.observe(done, state) or found
    assert found is not None
    true_s = [whole_s(truth.profile, k) for k in range(3)]
    assert [whole_s(found, k) for k in range(3)] == pytest.approx(true_s, rel=0.02)
    overhead_s = [h.frame_overhead_s for h in truth.profile.hops]
    assert [h.frame_overhead_s for h in found.hops] == pytest.approx(overhead_s, abs=1e-3)


def test_a_hop_that_no_request_crossed_alone_shares_what_is_found(truth: CostModel) -> None:
    """Requests that cross both hops show the sum only; what is not crossed stays as profiled."""
    recalibrator = Recalibrator(wrong(truth.profile))
    for done, state in completed(truth, [(3, 8)], 12):
        recalibrator.observe(done, state)
    found = recalibrator.believed.frame_overhead_s
    true_s = sum(h.frame_overhead_s for h in truth.profile.hops)
    assert sum(found) == pytest.approx(true_s, abs=1e-3)
    alone = Recalibrator(wrong(truth.profile))
    for done, state in completed(truth, [(3, 21)], 12):
        alone.observe(done, state)
    assert alone.believed.frame_overhead_s[1] == 0.004
    assert alone.believed.node_factors[2] == 1.0


def rows(factor: float, count: int, at_s: float, lost: bool = False) -> Completed:
    """Requests that ran on the fog alone for `factor` x 0.1 s, and took nothing else."""
    zeros = np.zeros(count)
    work = np.tile([0.0, factor * 0.1, 0.0], (count, 1))
    end = np.full(count, np.nan if lost else at_s)
    return Completed(
        env=np.zeros(count, dtype=np.int64), arrival_s=end - factor * 0.1, completion_s=end,
        cuts=np.tile([0, 21], (count, 1)), stage_s=work, work_s=work,
        transmit_s=np.zeros((count, 2)), wait_s=zeros, lost=np.full(count, lost),
    )  # fmt: skip


def whole_s(profile: Profile, node: int) -> float:
    """Seconds that a node takes for the model."""
    return sum(profile.nodes[node].unit_s) + profile.nodes[node].stage_overhead_s


def on_the_fog(truth: CostModel) -> tuple[Profile, SystemState]:
    """A profile whose fog takes 0.1 s for the model, and a state without round trips."""
    total = whole_s(truth.profile, 1)
    profile = changed(truth.profile, (1.0, 0.1 / total, 1.0), (0.0, 0.0))
    state = Simulator(truth, 1, 0).reset(0)
    return profile, replace(state, rtt_s=np.zeros((1, 2)), bytes_per_s=np.full((1, 2), 1e12))


def test_outliers_and_the_lost_do_not_count(truth: CostModel) -> None:
    profile, state = on_the_fog(truth)
    recalibrator = Recalibrator(profile)
    recalibrator.observe(rows(1.5, 20, 1.0), state)
    recalibrator.observe(rows(40.0, 8, 2.0), state)
    recalibrator.observe(rows(9.0, 30, 3.0, lost=True), state)
    assert recalibrator.believed.node_factors[1] == pytest.approx(1.5)


def test_too_few_change_nothing_and_old_ones_are_forgotten(truth: CostModel) -> None:
    profile, state = on_the_fog(truth)
    recalibrator = Recalibrator(profile)
    assert recalibrator.observe(rows(2.0, 4, 1.0), state) is None
    found = recalibrator.observe(rows(2.0, 1, 2.0), state)
    assert found is not None and whole_s(found, 1) == pytest.approx(0.2)
    assert recalibrator.observe(rows(2.01, 3, 3.0), state) is None  # too little to matter
    edge = rows(1.0, 1, 700.0)
    edge.cuts[:], edge.work_s[:], edge.stage_s[:] = 21, 0.0, 0.0
    back = recalibrator.observe(edge, state)
    assert back is not None and whole_s(back, 1) == pytest.approx(0.1)


@given(st.floats(0.06, 18.0), st.floats(0.06, 18.0))
def test_a_change_is_believed_after_half_a_window(
    truth: CostModel, first: float, then: float
) -> None:
    profile, state = on_the_fog(truth)
    recalibrator = Recalibrator(profile, RecalibrationSettings(window=16, step=0.0))
    recalibrator.observe(rows(first, 16, 1.0), state)
    assert recalibrator.believed.node_factors[1] == pytest.approx(first)
    recalibrator.observe(rows(then, 9, 2.0), state)
    assert recalibrator.believed.node_factors[1] == pytest.approx(then)


def took(profile: Profile, factors: np.ndarray, start: int, stop: int) -> float:
    """Measured over profiled work of a stage on the edge, its units being so slow."""
    edge = profile.nodes[0]
    unit_s = np.array(edge.unit_s[start:stop])
    slow_s = unit_s @ factors[start:stop] + factors[-1] * edge.stage_overhead_s
    return float(slow_s / (unit_s.sum() + edge.stage_overhead_s))


def test_what_one_unit_tells_is_not_believed_of_the_others(truth: CostModel) -> None:
    """The first unit takes a quarter of what was profiled, the others what was."""
    profile = truth.profile
    factors = np.where(np.arange(22) < 1, 0.25, 1.0)
    units = UnitFactors(profile.nodes[0], window=32, least=5)
    for at_s in range(32):
        units.add(float(at_s), 0, 1, took(profile, factors, 0, 1))
    first = units.factors()
    assert took(profile, first, 0, 1) == pytest.approx(took(profile, factors, 0, 1), rel=0.01)
    for at_s in range(32, 37):
        units.add(float(at_s), 0, 6, took(profile, factors, 0, 6))
    then = units.factors()
    for stop in (1, 6):
        assert took(profile, then, 0, stop) == pytest.approx(
            took(profile, factors, 0, stop), rel=0.03
        )
    # What no request ran moves towards the node's: nearer to the truth the more of it was seen.
    assert 0.25 < first[10] < then[10] < 1.1
    units.forget(100.0)
    assert (units.factors() == 1.0).all()


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 21), st.floats(-2.5, 2.5)), max_size=60)
)
def test_factors_stay_in_bounds_whatever_the_stages(
    truth: CostModel, stages: list[tuple[int, int, float]]
) -> None:
    units = UnitFactors(truth.profile.nodes[0], window=8, least=5)
    for at_s, (start, stop, log) in enumerate(stages):
        units.add(float(at_s), min(start, stop - 1), stop, float(np.exp(log)))
    found = units.factors()
    assert found.shape == (22,) and (found >= 0.05).all() and (found <= 20.0).all()
    if len(stages) < 5:
        assert (found == 1.0).all()


def test_a_stage_that_was_profiled_to_take_nothing_tells_nothing(truth: CostModel) -> None:
    node = replace(truth.profile.nodes[0], unit_s=(0.0,) + (0.1,) * 20, stage_overhead_s=0.0)
    units = UnitFactors(node, window=8, least=1)
    units.add(1.0, 0, 1, 3.0)
    assert (units.factors() == 1.0).all()
    units.add(1.0, 0, 2, 3.0)
    assert units.factors()[1] > 2.0


def test_rare_stages_count_together(truth: CostModel) -> None:
    """A node twice as slow, and never the same stage twice."""
    units = UnitFactors(truth.profile.nodes[0], window=32, least=5)
    for stop in range(3, 21):
        units.add(float(stop), 0, stop, 2.0)
    assert units.factors() == pytest.approx(2.0, rel=0.05)


def test_the_solver_decides_as_with_the_right_profile(truth: CostModel) -> None:
    """After some requests the corrected solver's plans cost what the right profile's do."""
    believed = CostModel(wrong(truth.profile), truth.scenario, truth.references)
    assert believed.predict(Simulator(truth, 1, 0).reset(0)).cost != pytest.approx(
        truth.predict(Simulator(truth, 1, 0).reset(0)).cost, rel=0.05
    )
    controller = Recalibrated(Solver(), believed)
    simulator = Simulator(truth, 1, 5, record_requests=True)
    state, last = simulator.reset(5), None
    controller.reset(truth, 1)
    for _ in range(40):
        decision = controller.decide(state, last)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
    assert controller.changes >= 1 and controller.model is believed
    used = decision.cuts[0]
    plan = int(np.flatnonzero((believed.table.cuts == used).all(axis=1))[0])
    expected = truth.predict(state).cost[0, plan]
    assert believed.predict(state).cost[0, plan] == pytest.approx(expected, rel=0.05)


def test_a_copy_of_the_systems_model_is_corrected_unless_one_is_given(truth: CostModel) -> None:
    before = truth.profile
    controller = Recalibrated(Solver())
    controller.reset(truth, 1)
    assert controller.model is not truth
    controller.model.recalibrate(wrong(before))
    assert truth.profile is before


def test_recalibrating_equals_a_model_of_the_corrected_profile(truth: CostModel) -> None:
    model = CostModel(truth.profile, truth.scenario, truth.references)
    model.recalibrate(wrong(truth.profile))
    fresh = CostModel(wrong(truth.profile), truth.scenario, truth.references)
    state = Simulator(truth, 1, 0).reset(0)
    for a, b in zip(
        (model.predict(state).cost, model.demand, model.active_cost, model.table.work_s),
        (fresh.predict(state).cost, fresh.demand, fresh.active_cost, fresh.table.work_s),
        strict=True,
    ):
        assert (a == b).all()
    assert model.capacity_rps == fresh.capacity_rps
    assert (model.demand != truth.demand).any()


def test_bad_settings_and_other_shapes_are_refused(truth: CostModel) -> None:
    with pytest.raises(ConfigError, match="least"):
        RecalibrationSettings(window=3, least=4)
    with pytest.raises(ConfigError, match="forget_s"):
        RecalibrationSettings(forget_s=0.0)
    other = synthetic_profile(model_spec("vgg16"), truth.scenario)
    with pytest.raises(ConfigError, match="vgg16"):
        truth.recalibrate(other)


def test_a_policy_trained_at_another_interval_follows_too(truth: CostModel) -> None:
    """A policy that decides more often than it was trained keeps a cost model of its own."""
    from agents.arms.runtime import ActorController, PolicyNetwork, ResidualActor

    fast = CostModel(truth.profile, truth.scenario.replace(interval_s=0.25), truth.references)
    network = PolicyNetwork(
        {"w3": np.zeros((1, len(fast.plans)), np.float32), "tau": np.full(1, 0.05, np.float32)},
        zeroed=True,
    )
    controller = ActorController("policy", lambda m: ResidualActor(m, network), trained_s=1.0)
    controller.reset(fast, 1)
    state = Simulator(fast, 1, 0).reset(0)
    controller.decide(state)
    fast.recalibrate(wrong(truth.profile))
    controller.decide(state)
    slow = CostModel(wrong(truth.profile), truth.scenario, truth.references)
    best = slow.table.cuts[slow.predict(state).cost.argmin()]
    assert (controller.decide(state).cuts[0] == best).all()


def test_deployed_solver_and_policies_recalibrate_unless_told_not_to(truth: CostModel) -> None:
    from types import SimpleNamespace

    from agents.arms.controllers import Static
    from agents.deploy import make_controller

    system = SimpleNamespace(model=truth)
    solver = make_controller("solver", system, None)
    assert isinstance(solver, Recalibrated)
    solver.reset(truth, 1)
    assert solver.model is truth  # the guard and the cut tables see the correction, too
    assert isinstance(make_controller("solver", system, None, recalibrate=False), Solver)
    assert isinstance(make_controller("edge", system, None), Static)
