"""One policy for all models: what it sees, numpy against torch, and that lessons teach it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import make_model, random_scorer

from agents.arms.controllers import Solver
from agents.arms.lookahead import Lookahead
from agents.arms.policy_all import ScoringPolicy, scoring_controller
from agents.arms.scoring import PlanEncoder, ScoringActor
from agents.learning.hindsight import HindsightSettings
from agents.learning.scoring_training import (
    Scorer,
    ScoringSettings,
    train_for_all,
)
from agents.learning.validation import mean_cost
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder, SystemState
from env.synthetic import synthetic_profile
from executor.errors import ConfigError
from executor.model import model_spec

SMALL = ScoringSettings(
    hindsight=HindsightSettings(
        rounds=4, n_envs=12, intervals=9, every=3, candidates=6, lookahead=2, batch_size=16
    ),
    width=8,
    validate_every=2,
    validation_envs=4,
    validation_intervals=10,
)


@pytest.fixture(scope="module")
def model() -> CostModel:
    return make_model()


def states(model: CostModel, batch: int, steps: int = 10) -> tuple[np.ndarray, SystemState]:
    """A busy system's history and state: random plans at twice what it can serve."""
    simulator = Simulator(model, batch, 3, rate_rps=2.0 * model.capacity_rps)
    encoder, rng = Encoder(model), np.random.default_rng(0)
    state = simulator.reset()
    history = encoder.push(encoder.new_history(batch), state)
    for _ in range(steps):
        state = simulator.step(model.table.cuts[rng.integers(len(model.plans), size=batch)]).state
        history = encoder.push(history, state)
    return history, state


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v2"])
def test_numpy_scores_as_torch_does(name: str) -> None:
    model = make_model(name)
    scorer, (history, state) = random_scorer(model, 0.5), states(model, 40)
    actor = ScoringActor(model, scorer.arrays())
    seen = actor.observe(history, state)
    every = np.tile(np.arange(len(model.plans)), (40, 1))
    with torch.no_grad():
        expected = scorer(*(torch.from_numpy(x) for x in actor.lesson(seen, every))).numpy()
    assert np.ptp(expected + seen.excess / 0.05) > 0.1, "the score must matter here"
    assert np.allclose(actor.logits(seen), expected, rtol=1e-4, atol=1e-4)


def test_untrained_it_is_the_solver(model: CostModel) -> None:
    encoder = PlanEncoder(model)
    scorer = Scorer(encoder.view_size, encoder.n_plan_features, 8, 0.05)
    controller = scoring_controller(ScoringPolicy(scorer.arrays(), {}))
    costs = []
    for arm in (controller, Solver()):
        simulator = Simulator(model, 8, 5, rate_rps=0.8 * model.capacity_rps)
        costs.append(mean_cost(arm, simulator, 5, 20))
    assert np.array_equal(costs[0], costs[1])


def test_it_looks_as_far_ahead_as_it_is_told(model: CostModel) -> None:
    policy = ScoringPolicy(random_scorer(model, 0.5).arrays(), {})
    _, state = states(model, 40)
    plans = []
    for ahead in (None, Lookahead(weight=0.0), Lookahead(weight=5.0)):
        controller = scoring_controller(policy, ahead)
        controller.reset(model, 40)
        plans.append(controller.decide(state).cuts)
    assert np.array_equal(plans[0], plans[1]), "what costs nothing must change nothing"
    assert (plans[0] != plans[2]).any(), "full queues must count"


def test_features_are_finite_and_say_what_they_claim(model: CostModel) -> None:
    history, state = states(model, 16)
    seen = PlanEncoder(model).observe(history, state)
    assert np.isfinite(seen.view).all() and np.isfinite(seen.plans).all()
    n_stations, current = 5, seen.plans[-3]
    cuts = model.table.cuts
    for b in range(16):
        same = (cuts == state.cuts[b]).all(axis=1)
        assert np.array_equal(current[b], same.astype(np.float32))
    utilisation = np.expm1(seen.plans[:n_stations])
    edge_only = int(np.flatnonzero((cuts == model.profile.spec.n_units).all(axis=1))[0])
    expected = state.arrival_rps * model.table.work_s[edge_only, 0] / (1 - state.node_load[:, 0])
    assert np.allclose(utilisation[0, :, edge_only], expected, rtol=1e-4)
    assert np.allclose(utilisation[1:, :, edge_only], 0.0), "edge-only uses nothing else"


def test_one_row_alone_is_scored_as_in_a_batch(model: CostModel) -> None:
    history, state = states(model, 6)
    actor = ScoringActor(model, random_scorer(model, 0.5).arrays())
    together = actor.logits(actor.observe(history, state))
    for b in range(6):
        fields = {k: v[b : b + 1] for k, v in vars(state).items()}
        alone = actor.logits(actor.observe(history[b : b + 1], SystemState(**fields)))
        assert np.allclose(alone[0], together[b], rtol=1e-4, atol=1e-4)


def test_lessons_from_two_models_teach_one_policy() -> None:
    models = [make_model("alexnet"), make_model("mobilenet_v2")]
    done: list[int] = []
    kept: list[ScoringPolicy] = []
    profiles = [m.profile for m in models]
    policy = train_for_all(
        profiles,
        models[0].scenario,
        profiles,
        SMALL,
        lambda i, total, ratio: done.append(i),
        kept.append,
    )
    assert done == [1, 2, 3, 4]
    assert [d for d, _ in policy.metadata["validation_cost_ratio_to_solver"]] == [2, 4]
    assert np.abs(kept[-1].arrays["w3"]).max() > 0, "nothing was learned"
    strength = np.float32(policy.metadata["strength"])
    assert np.array_equal(policy.arrays["w3"], kept[-1].arrays["w3"] * strength)
    again = train_for_all(profiles, models[0].scenario, profiles, SMALL)
    assert all(np.array_equal(policy.arrays[k], again.arrays[k]) for k in policy.arrays)


def test_one_policy_that_loses_to_the_solver_is_not_kept(model: CostModel) -> None:
    ruined = replace(SMALL, hindsight=replace(SMALL.hindsight, rounds=2, learning_rate=10.0))
    policy = train_for_all([model.profile], model.scenario, [model.profile], ruined)
    found = policy.metadata["validation_cost_ratio_to_solver"]
    assert min(ratio for _, ratio in found) > 1.0, "nothing was ruined"
    assert policy.metadata["validated"] <= 1.0 and policy.metadata["strength"] < 1.0


def test_a_node_can_be_made_slower(model: CostModel) -> None:
    slower = model.profile.scaled([2.0, 1.0, 0.5])
    ratio = slower.work_prefix_s()[:, -1] / model.profile.work_prefix_s()[:, -1]
    assert np.allclose(ratio, [2.0, 1.0, 0.5])


def test_it_is_saved_and_read_back(model: CostModel, tmp_path: Path) -> None:
    arrays = random_scorer(model, 0.5).arrays()
    ScoringPolicy(arrays, {"models": ["alexnet"]}).save(tmp_path)
    read = ScoringPolicy.load(tmp_path)
    assert read.metadata["models"] == ["alexnet"]
    assert all(np.array_equal(arrays[k], read.arrays[k]) for k in arrays)


def test_a_damaged_or_missing_policy_is_named(model: CostModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_all"):
        ScoringPolicy.load(tmp_path / "none")
    ScoringPolicy(random_scorer(model, 0.5).arrays(), {}).save(tmp_path)
    data = bytearray((tmp_path / "policy.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "policy.npz").write_bytes(data)
    with pytest.raises(ConfigError, match=r"policy\.npz is damaged"):
        ScoringPolicy.load(tmp_path)


def test_a_chain_of_two_nodes_is_refused() -> None:
    base = Scenario.load()
    scenario = replace(base, nodes=base.nodes[:2], hops=base.hops[:1])
    two = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    with pytest.raises(ConfigError, match="3 nodes, not 2"):
        PlanEncoder(two)
