"""The clairvoyant oracle: brute force where that is feasible, no arm below it, a settled search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toy_chain import toy_profile, toy_scenario

from agents.arms.branches import Branches
from agents.arms.controllers import ARMS, ArmContext, Decision, make_arm
from agents.arms.oracle import Oracle, OracleSettings, PlanSequence, search
from agents.studies.compare import per_row, run_arm
from env.conditions import Conditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from env.tape import Tape, record_conditions
from executor.errors import ConfigError
from executor.model import model_spec

SEED = 20_100


def small_model(n_plans: int) -> CostModel:
    """Two nodes, a busy slow edge and a moving hop, so that queues carry over; few plans."""
    scenario = toy_scenario(2, outage_mbps=0.5, rate_rps=5.0)
    model = CostModel(toy_profile(2), scenario)
    assert len(model.plans) >= n_plans
    spread = np.linspace(0, len(model.plans) - 1, n_plans).round().astype(int)
    model.table.cuts = model.table.cuts[spread]
    return model


def tape_of(model: CostModel, batch: int, n_intervals: int, seed: int = SEED) -> Tape:
    rate = np.full(batch, model.rate_rps())
    return record_conditions(Conditions(model.scenario, rate, seed), n_intervals)


def brute_force(model: CostModel, tape: Tape) -> np.ndarray:
    """The least cost of all A^T sequences, per environment."""
    branches, plans = Branches(model, tape), model.table.cuts
    choices = np.array(list(itertools.product(range(len(plans)), repeat=len(tape)))).T
    best = []
    for b in range(tape.batch):
        index = np.full(choices.shape[1], b)
        alone = Branches(model, Tape([c.take(index) for c in tape.intervals],
                                     tape.rate_rps[index], tape.substep_s))  # fmt: skip
        best.append(alone.total(plans[choices], 0).min())
    assert branches.total(np.repeat(plans[:1], tape.batch, 0)[None].repeat(len(tape), 0), 0).all()
    return np.array(best)


@pytest.mark.parametrize(("n_plans", "n_intervals"), [(2, 9), (3, 6), (4, 5)])
def test_it_equals_brute_force_over_all_sequences(n_plans, n_intervals):
    model = small_model(n_plans)
    tape = tape_of(model, 6, n_intervals)
    found = search(model, tape)
    cost = Branches(model, tape).total(found.cuts, 0)
    np.testing.assert_allclose(cost, brute_force(model, tape), rtol=1e-9)
    held = np.tile(model.table.cuts[0], (n_intervals, 6, 1))
    assert cost.sum() < Branches(model, tape).total(held, 0).sum()


@pytest.fixture(scope="module")
def loaded() -> CostModel:
    scenario = Scenario.load().replace(capacity_fraction=0.8)
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


QUICK = OracleSettings(width=6, finalists=2, promising=6, holds=(1, 3), lookahead=5, sweeps=2)


def test_no_arm_beats_it_in_any_condition(loaded):
    startup, steady, batch = 4, 12, 4
    simulator = Simulator(loaded, batch, 0, record_requests=True)
    runs, played = {}, []
    names = set(ARMS) - {
        "policy",
        "policy-greedy",
        "policy-zeroed",
        "guarded",
        "oracle",
        "best-static",
    }
    for name in sorted(names):
        decisions: list[Decision] = []
        arm = make_arm(name, ArmContext(loaded))
        runs[name] = run_arm(
            simulator, arm, seed=SEED, n_intervals=steady, startup=startup,
            on_decision=decisions.append,
        )  # fmt: skip
        played.append(PlanSequence.of(decisions))
    tape = tape_of(loaded, batch, startup + steady)
    found = search(loaded, tape, startup=startup, incumbents=played, settings=QUICK)
    oracle = run_arm(simulator, Oracle(found), seed=SEED, n_intervals=steady, startup=startup)
    cost = per_row(oracle, loaded)["cost"]
    best = np.min([per_row(run, loaded)["cost"] for run in runs.values()], axis=0)
    assert (cost <= best * (1.0 + 1e-9)).all()
    assert cost.mean() < 0.97 * best.mean()
    # The tape is the future that the simulator then plays: the search foresaw its cost.
    foreseen = Branches(loaded, tape).total(found.cuts, startup, found.probe_bytes)
    np.testing.assert_allclose(cost * oracle.steady.arrived, foreseen, rtol=1e-9)


def test_an_incumbent_that_cannot_be_improved_is_kept():
    model = small_model(3)
    tape = tape_of(model, 3, 5)
    best = search(model, tape)
    # A search that can hardly look finds it among worse ones.
    lazy = OracleSettings(width=1, penalties=(0.0,), finalists=1, promising=1, sweeps=0)
    worse = PlanSequence(np.tile(model.table.cuts[0], (5, 3, 1)))
    kept = search(model, tape, incumbents=[worse, best], settings=lazy)
    branches = Branches(model, tape)
    np.testing.assert_allclose(branches.total(kept.cuts, 0), branches.total(best.cuts, 0))


def test_twice_the_width_changes_its_cost_by_less_than_one_percent(loaded):
    tape = tape_of(loaded, 3, 8)
    settings = OracleSettings()
    branches = Branches(loaded, tape)
    narrow, wide = (
        branches.total(search(loaded, tape, settings=s).cuts, 0)
        for s in (settings, settings.wider(2))
    )
    assert narrow.sum() == pytest.approx(wide.sum(), rel=0.01)


def test_wrong_sizes_are_named(loaded):
    tape = tape_of(loaded, 2, 3)
    with pytest.raises(ConfigError, match=r"incumbents must have shape \(3, 2, 2\)"):
        search(loaded, tape, incumbents=[PlanSequence(np.zeros((2, 2, 2), dtype=np.int64))])
    oracle = Oracle(PlanSequence(np.zeros((1, 2, 2), dtype=np.int64)))
    with pytest.raises(ConfigError, match="looked ahead for 2 environments, got 3"):
        oracle.reset(loaded, 3)
    oracle.reset(loaded, 2)
    state = Simulator(loaded, 2, 0).reset(0)
    assert oracle.decide(state).probe_bytes is None
    with pytest.raises(ConfigError, match="only 1 intervals ahead"):
        oracle.decide(state)
    with pytest.raises(ConfigError, match="needs a simulator whose future"):
        make_arm("oracle", ArmContext(loaded))
