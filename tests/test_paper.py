"""The reference's scheduler: every rule against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agents.arms.controllers import static_thirds
from agents.arms.paper import Paper, PaperSettings, SplitModel, probe_splits
from env.cost import IntervalRecord
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import SystemState
from env.synthetic import synthetic_profile
from env.system import Completed, StepResult
from executor.errors import ConfigError
from executor.model import model_spec
from executor.plan import ModelSpec, Plan, is_constrained

# Ten units of equal weight 0.1, head from unit 8 on; 1000 bytes less at every cut.
TOY = ModelSpec(
    name="toy",
    unit_names=tuple(f"u{k}" for k in range(10)),
    cut_bytes=tuple(10_000 - 900 * k for k in range(11)),
    has_params=(True,) * 10,
    head_start=8,
    static_plan=(3, 6),
)
SIGMA = np.array([1.0, 0.4, 0.1])  # whole-model seconds per node in the fake measurements
# At this deadline nothing is ever late.
LOOSE = PaperSettings(deadline_s=1e9)


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(TOY, scenario, shares=[1.0] * 10), scenario)


def a_state(model: CostModel, rate=1e6, batch: int = 1) -> SystemState:
    state = Simulator(model, batch, 0).reset(0)
    return dataclasses.replace(
        state,
        bytes_per_s=np.broadcast_to(np.asarray(rate, dtype=float), (batch, 2)).copy(),
        rtt_s=np.zeros((batch, 2)),
    )


def a_result(state: SystemState, cuts, count: int = 5, sigma=SIGMA) -> StepResult:
    """`count` requests completed at `cuts`, taking sigma x share of the units on each node."""
    cuts = np.tile(np.asarray(cuts, dtype=np.int64), (count, 1))
    bounds = np.concatenate([np.zeros((count, 1)), cuts, np.full((count, 1), 10)], axis=1)
    stage_s = np.asarray(sigma) * np.diff(bounds, axis=1) / 10
    done = Completed(
        env=np.zeros(count, dtype=np.int64),
        arrival_s=np.zeros(count),
        completion_s=np.ones(count),
        cuts=cuts,
        stage_s=stage_s,
        work_s=stage_s,
        transmit_s=np.zeros((count, 2)),
        wait_s=np.zeros(count),
        lost=np.zeros(count, dtype=bool),
    )
    return StepResult(state, IntervalRecord.zeros(1, 3), done)


def feed(paper: Paper, state: SystemState, intervals: int, last=None, sigma=SIGMA):
    """Decide for some intervals, 5 requests completing in each at the plan in force."""
    decisions = []
    for _ in range(intervals):
        decision = paper.decide(state, last)
        decisions.append(decision)
        last = a_result(state, decision.cuts[0], sigma=sigma)
    return decisions, last


def started(model: CostModel, settings: PaperSettings, state: SystemState):
    """A scheduler right after its first pick, the decision, and what its interval returned."""
    paper = Paper(settings)
    paper.reset(model, 1)
    decisions, last = feed(paper, state, 20)
    assert paper.started.all()
    return paper, decisions[-1], last


def test_probe_splits_at_fifths_of_the_features():
    heavy, balanced, light = probe_splits(model_spec("alexnet"), 3)  # 14 features
    assert (heavy.cuts, balanced.cuts, light.cuts) == ((8, 11), (6, 8), (3, 6))
    for name in ("alexnet", "vgg16", "mobilenet_v2"):
        for n_nodes in (2, 3, 4):
            spec = model_spec(name)
            for plan in probe_splits(spec, n_nodes):
                plan.check(spec.n_units, n_nodes)
                assert is_constrained(plan, spec)


def test_start_up_runs_50_then_15_15_15_probes_the_hops_and_picks(model):
    paper = Paper(LOOSE)
    paper.reset(model, 1)
    decisions, _ = feed(paper, a_state(model), 20)
    heavy, balanced, light = (p.cuts for p in probe_splits(TOY, 3))
    ran = [tuple(d.cuts[0].tolist()) for d in decisions]
    assert ran[:19] == [(3, 6)] * 10 + [heavy] * 3 + [balanced] * 3 + [light] * 3
    probed = [float(d.probe_bytes.sum()) for d in decisions]
    assert probed[:19] == [0.0] * 18 + [2.0 * model.scenario.probing.paper_bytes]
    # A fast network and a fast cloud: everything there.
    assert ran[19] == (0, 0)


def test_only_what_ran_at_the_phases_split_counts(model):
    paper = Paper(LOOSE)
    paper.reset(model, 1)
    state = a_state(model)
    decisions, _ = feed(paper, state, 11)
    heavy = tuple(decisions[-1].cuts[0].tolist())
    for _ in range(10):  # stragglers of the static split
        assert tuple(paper.decide(state, a_result(state, (3, 6))).cuts[0].tolist()) == heavy


def test_fit_is_least_squares_through_the_origin(model):
    paper = Paper(LOOSE)
    paper.reset(model, 1)
    state = a_state(model)
    # Shares at (3, 6): 0.3, 0.3, 0.4; at (5, 6): 0.5, 0.1, 0.4.
    first, second = a_result(state, (3, 6), 1), a_result(state, (5, 6), 1)
    first.completed.stage_s[:] = [0.6, 0.3, 0.2]
    second.completed.stage_s[:] = [0.5, 0.2, 0.4]
    second.completed.lost[:] = False
    paper.decide(state, first)
    paper.decide(state, second)
    expected = [
        (0.6 * 0.3 + 0.5 * 0.5) / (0.3**2 + 0.5**2),
        (0.3 * 0.3 + 0.2 * 0.1) / (0.3**2 + 0.1**2),
        (0.2 * 0.4 + 0.4 * 0.4) / (0.4**2 + 0.4**2),
    ]
    np.testing.assert_allclose(paper._samples.sigma_s()[0], expected)


def test_lost_requests_do_not_enter_the_fit(model):
    paper = Paper(LOOSE)
    paper.reset(model, 1)
    state = a_state(model)
    lost = a_result(state, (3, 6), 60)
    lost.completed.lost[:] = True
    lost.completed.stage_s[:] = 0.0
    paper.decide(state, lost)
    paper.decide(state, a_result(state, (3, 6), 5))
    np.testing.assert_allclose(paper._samples.sigma_s()[0], SIGMA)
    assert paper._count[0] == 5


def test_estimate_and_score_by_hand(model):
    splits = SplitModel(model, PaperSettings(w_end=0.6, w_tot=0.2, w_lat=0.3))
    assert len(splits.cuts) == 66 and splits.allowed.all()
    sigma, rate, omega = SIGMA[None], np.array([[1e5, 2e5]]), np.array([[0.01, 0.02]])
    e = splits.estimate(sigma, rate, omega)
    at = splits.index(Plan((2, 6)))
    t = np.array([1.0 * 0.2, 0.4 * 0.4, 0.1 * 0.4])
    hops = 0.01 + 8200 / 1e5 + 0.02 + 4600 / 2e5
    assert e.latency_s[0, at] == pytest.approx(t.sum() + hops)
    assert e.edge_j[0, at] == pytest.approx(12.0 * t[0])
    assert e.total_j[0, at] == pytest.approx(12.0 * t[0] + 15.0 * t[1] + 31.8 * t[2])
    # Fog-only crosses the first hop alone; edge-only none.
    assert e.latency_s[0, splits.index(Plan((0, 10)))] == pytest.approx(0.4 + 0.01 + 10_000 / 1e5)
    assert e.latency_s[0, splits.index(Plan((10, 10)))] == pytest.approx(1.0)
    probes = [splits.index(p) for p in probe_splits(TOY, 3)]
    means = splits.probe_means(e)
    np.testing.assert_allclose(means[0, 0], e.edge_j[0, probes].mean())
    np.testing.assert_allclose(means[0, 2], e.latency_s[0, probes].mean())
    expected = (
        0.6 * e.edge_j[0, at] / means[0, 0]
        + 0.2 * e.total_j[0, at] / means[0, 1]
        + 0.3 * e.latency_s[0, at] / means[0, 2]
    )
    assert splits.score(e, means)[0, at] == pytest.approx(expected)


def test_weights_default_to_the_scenarios(model):
    ours = SplitModel(model, PaperSettings())
    w = model.scenario.weights
    same = SplitModel(
        model, PaperSettings(w_end=w.edge_energy, w_tot=w.total_energy, w_lat=w.latency)
    )
    e = ours.estimate(SIGMA[None], np.full((1, 2), 1e5), np.zeros((1, 2)))
    means = ours.probe_means(e)
    np.testing.assert_array_equal(ours.score(e, means), same.score(e, means))


def test_re_decides_after_100_completions_and_not_before(model):
    fast = a_state(model, 1e9)
    paper, pick, last = started(model, LOOSE, fast)
    slow = a_state(model, [1e2, 1e2])  # now only the edge can do it
    decisions, last = feed(paper, slow, 20, last)
    ran = [tuple(d.cuts[0].tolist()) for d in decisions]
    assert ran[:19] == [tuple(pick.cuts[0].tolist())] * 19
    assert [bool(d.probe_bytes.any()) for d in decisions] == [False] * 18 + [True, False]
    assert ran[19] == (10, 10)
    decisions, _ = feed(paper, fast, 20, last)
    assert [tuple(d.cuts[0].tolist()) for d in decisions] == [(10, 10)] * 19 + [ran[0]]


def test_every_interval_re_decides_and_probes_at_once(model):
    settings = dataclasses.replace(LOOSE, every_inferences=None)
    paper, pick, last = started(model, settings, a_state(model, 1e9))
    assert pick.probe_bytes.all()
    decision = paper.decide(a_state(model, 1e2), last)
    assert decision.cuts.tolist() == [[10, 10]] and decision.probe_bytes.all()


def test_refit_uses_the_start_up_and_the_last_window_only(model):
    state = a_state(model, 1e2)
    paper, pick, last = started(model, dataclasses.replace(LOOSE, window=20), state)
    assert pick.cuts.tolist() == [[0, 10]]
    # The fog's shares in the start-up: 50 at (3, 6), 15 at each of (5, 6), (3, 5), (2, 3).
    weight = 50 * 0.3**2 + 15 * (0.1**2 + 0.2**2 + 0.1**2)
    assert paper._samples.sigma_s()[0, 1] == pytest.approx(0.4)
    _, last = feed(paper, state, 8, last, sigma=(1.0, 3.0, 0.1))
    _, last = feed(paper, state, 4, last, sigma=(1.0, 2.0, 0.1))
    paper.decide(state, last)
    # 20 of sigma 2 at share 1; those of sigma 3 have left the window.
    expected = (weight * 0.4 + 20 * 2.0) / (weight + 20)
    assert paper._samples.sigma_s()[0, 1] == pytest.approx(expected)


@pytest.mark.parametrize(("needed", "switches"), [(0.99, True), (1.01, False)])
def test_switches_only_for_the_stated_improvement(model, needed, switches):
    before, after = a_state(model, 1e9), a_state(model, [1e6, 1e4])
    settings = dataclasses.replace(LOOSE, every_inferences=None)
    paper, pick, last = started(model, settings, before)
    splits, means = paper._splits, paper._means
    score = splits.score(splits.estimate(SIGMA[None], after.bytes_per_s, after.rtt_s), means)[0]
    running = splits.index(Plan(tuple(pick.cuts[0].tolist())))
    best = int(score.argmin())
    gain = 1.0 - score[best] / score[running]
    assert best != running and gain > 0
    paper.settings = dataclasses.replace(settings, improvement=gain * needed)
    chosen = paper.decide(after, last).cuts[0].tolist()
    assert chosen == splits.cuts[best if switches else running].tolist()


def test_improvement_is_three_percent_by_default():
    s = PaperSettings()
    assert (s.improvement, s.every_inferences, s.startup_static, s.startup_probe) == (
        0.03,
        100,
        50,
        15,
    )
    assert s.window == 100


def test_a_missed_deadline_forces_the_switch_to_a_worse_score(model):
    settings = dataclasses.replace(LOOSE, every_inferences=None)
    # Only the edge's energy counts: anything off the edge scores best, however slow.
    settings = dataclasses.replace(settings, w_end=1.0, w_tot=0.0, w_lat=0.0)
    slow = a_state(model, 5e3)
    paper, pick, last = started(model, settings, slow)
    assert pick.cuts.tolist() == [[0, 0]]  # 4.1 s
    # In time, and no worse than the static split (3, 6): 0.3 + 0.28 + 7300 / 5e3 = 2.04 s alone.
    paper._deadline_s = 2.1
    assert paper.decide(slow, last).cuts.tolist() == [[3, 10]]


def test_a_missed_deadline_with_nothing_better_falls_back_to_static(model):
    settings = dataclasses.replace(LOOSE, every_inferences=None)
    state = a_state(model)
    paper, pick, last = started(model, settings, state)
    assert pick.cuts[0].tolist() != [3, 6]
    paper._deadline_s = 1e-6
    assert paper.decide(state, last).cuts[0].tolist() == [3, 6]


def test_without_anything_better_it_stays_where_it_is(model):
    settings = dataclasses.replace(LOOSE, every_inferences=None)
    state = a_state(model)
    paper, pick, last = started(model, settings, state)
    for _ in range(3):
        decision = paper.decide(state, last)
        assert decision.cuts.tolist() == pick.cuts.tolist()
        last = a_result(state, decision.cuts[0])


def test_constrained_searches_its_own_rule_only(model):
    splits = SplitModel(model, PaperSettings(constrained=True))
    allowed = {tuple(c) for c in splits.cuts[splits.allowed].tolist()}
    assert allowed == {(i, j) for i in range(1, 8) for j in range(i + 1, 9)}


@pytest.mark.parametrize("n_nodes", [2, 3, 4])
def test_batch_of_schedulers_on_the_simulator(n_nodes):
    scenario = Scenario.load()
    nodes = (*scenario.nodes, scenario.nodes[-1])[:n_nodes]
    hops = (*scenario.hops, scenario.hops[-1])[: n_nodes - 1]
    scenario = scenario.replace(nodes=nodes, hops=hops, capacity_fraction=0.3)
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    spec = model.profile.spec
    simulator = Simulator(model, 3, 0, record_requests=True)
    for constrained in (False, True):
        paper = Paper(PaperSettings(every_inferences=None, constrained=constrained))
        state, last = simulator.reset(5), None
        paper.reset(model, 3)
        seen = set()
        assert (
            paper.decide(state, None).cuts.tolist() == [list(static_thirds(spec, n_nodes).cuts)] * 3
        )
        for _ in range(60):
            decision = paper.decide(state, last)
            seen |= {tuple(c) for c in decision.cuts.tolist()}
            last = simulator.step(decision.cuts, decision.probe_bytes)
            state = last.state
        assert paper.started.all() and len(seen) > 4
        if constrained:
            assert all(is_constrained(Plan(c), spec) for c in seen)


def test_an_environment_decides_the_same_alone_and_in_a_batch():
    scenario = Scenario.load().replace(capacity_fraction=0.2)
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    batch = 3
    simulator = Simulator(model, batch, 0, record_requests=True)
    state, last = simulator.reset(1), None
    paper, alone = Paper(), Paper()
    paper.reset(model, batch)
    alone.reset(model, 1)
    state1, last1 = _only(state, 1), None
    for _ in range(70):
        decision = paper.decide(state, last)
        assert alone.decide(state1, last1).cuts[0].tolist() == decision.cuts[1].tolist()
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
        state1 = _only(state, 1)
        keep = last.completed.env == 1
        rows = {
            f.name: getattr(last.completed, f.name)[keep]
            for f in dataclasses.fields(last.completed)
        }
        rows["env"] = np.zeros(keep.sum(), dtype=np.int64)
        last1 = StepResult(state1, last.record, Completed(**rows))
    assert paper.started.all()


def _only(state: SystemState, env: int) -> SystemState:
    return SystemState(**{k: v[env : env + 1] for k, v in vars(state).items()})


def test_bad_settings_and_missing_measurements(model):
    with pytest.raises(ConfigError, match="every_inferences must be >= 1, got 0"):
        PaperSettings(every_inferences=0)
    with pytest.raises(ConfigError, match="window must be >= 1"):
        PaperSettings(window=0)
    with pytest.raises(ConfigError, match=r"improvement must lie in 0\.\.1"):
        PaperSettings(improvement=1.5)
    paper = Paper()
    paper.reset(model, 1)
    state = a_state(model)
    with pytest.raises(ConfigError, match="record_requests=True"):
        paper.decide(state, StepResult(state, IntervalRecord.zeros(1, 3), None))
