"""A model's own policy that starts from the policy for all models, its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import TINY, make_model, random_scorer
from stable_baselines3 import PPO

import train
from agents.arms.controllers import Controller, Solver
from agents.arms.policy_all import ScoringPolicy, load_base, scoring_controller
from agents.arms.runtime import (
    Checkpoint,
    PolicyController,
    PolicyNetwork,
    base_of,
    encoder_on,
)
from agents.arms.scoring import digest
from agents.cli import run_command
from agents.learning.policy import (
    ResidualSolverPolicy,
    export_arrays,
    load_policy,
    policy_kwargs,
)
from agents.learning.training import train_policy
from env.predict import CostModel
from env.simulator import Simulator
from env.state import SystemState
from env.vector import SimulatorVecEnv
from executor.errors import ConfigError


@pytest.fixture(scope="module")
def model() -> CostModel:
    return make_model()


def a_base(model: CostModel, spread: float) -> dict[str, np.ndarray]:
    """A policy for all models that scores at random."""
    return random_scorer(model, spread).arrays()


def a_policy(model: CostModel, base: dict[str, np.ndarray]) -> ResidualSolverPolicy:
    env = SimulatorVecEnv(model, 2, seed=0, encoder=encoder_on(model, base))
    torch.manual_seed(0)
    kwargs = policy_kwargs(model, 0.05, 8, base)
    ppo = PPO(ResidualSolverPolicy, env, policy_kwargs=kwargs, device="cpu")
    env.close()
    assert isinstance(ppo.policy, ResidualSolverPolicy)
    return ppo.policy


def states(model: CostModel, batch: int) -> list[SystemState]:
    simulator = Simulator(model, batch, 3, rate_rps=2.0 * model.capacity_rps)
    rng, seen = np.random.default_rng(0), [simulator.reset()]
    for _ in range(10):
        plans = model.table.cuts[rng.integers(len(model.plans), size=batch)]
        seen.append(simulator.step(plans).state)
    return seen


def decided(controller: Controller, model: CostModel, seen: list[SystemState]) -> np.ndarray:
    controller.reset(model, seen[0].batch)
    return np.stack([controller.decide(state).cuts for state in seen])


def checkpoint_of(model: CostModel, policy: ResidualSolverPolicy) -> Checkpoint:
    return Checkpoint(model.profile, model.references, model.plans, export_arrays(policy), {})


def test_untrained_it_is_its_base_and_zeroed_the_solver(model: CostModel) -> None:
    base, seen = a_base(model, 3.0), states(model, 40)
    checkpoint = checkpoint_of(model, a_policy(model, base))
    own = decided(PolicyController(checkpoint), model, seen)
    for_all = decided(scoring_controller(ScoringPolicy(base, {})), model, seen)
    solver = decided(Solver(), model, seen)
    np.testing.assert_array_equal(own, for_all)
    np.testing.assert_array_equal(
        decided(PolicyController(checkpoint, zeroed=True), model, seen), solver
    )
    assert (own != solver).any(axis=2).mean() > 0.2  # the base is not a trivial one


def test_the_runtime_decides_as_sb3_does(model: CostModel) -> None:
    base, seen = a_base(model, 0.5), states(model, 200)
    policy = a_policy(model, base)
    torch.nn.init.normal_(policy.action_net.dense.weight, std=0.5)
    encoder = encoder_on(model, base)
    history = encoder.new_history(200)
    for state in seen:
        history = encoder.push(history, state)
    batch = encoder.observe(history, seen[-1])
    with torch.no_grad():
        expected = policy.get_distribution(torch.as_tensor(batch)).mode().numpy()
    network = PolicyNetwork(export_arrays(policy))
    np.testing.assert_array_equal(network.logits(batch).argmax(axis=1), expected)
    controller = PolicyController(checkpoint_of(model, policy))
    np.testing.assert_array_equal(decided(controller, model, seen)[-1], model.table.cuts[expected])


def test_the_base_comes_along_wherever_the_policy_goes(model: CostModel, tmp_path: Path) -> None:
    base = load_base(None, model.scenario)
    result = train_policy(model, TINY, base=base)
    policy = result.ppo.policy
    assert isinstance(policy, ResidualSolverPolicy)
    assert result.checkpoint.metadata["training"]["base"] == digest(base)
    result.ppo.save(tmp_path / "policy.zip")
    result.checkpoint.save(tmp_path, (tmp_path / "policy.zip").read_bytes())
    loaded = Checkpoint.load(tmp_path, "alexnet")
    carried = {
        "checkpoint": base_of(loaded.arrays),
        "clone": policy.clone().base,
        "to learn on": load_policy(tmp_path / "policy.zip", model, loaded.arrays).base,
        "SB3": PPO.load(tmp_path / "policy.zip", device="cpu").policy.base,
    }
    for where, found in carried.items():
        assert found.keys() == base.keys(), where
        assert all(np.array_equal(found[k], base[k]) for k in base), where
    np.testing.assert_array_equal(
        decided(PolicyController(loaded), model, states(model, 20)),
        decided(PolicyController(result.checkpoint), model, states(model, 20)),
    )


def test_a_base_that_loses_to_the_solver_is_dropped(model: CostModel) -> None:
    ruined = replace(TINY, hindsight=replace(TINY.hindsight, rounds=0), steps=512)
    result = train_policy(model, replace(ruined, learning_rate=0.0), base=a_base(model, 30.0))
    training = result.checkpoint.metadata["training"]
    assert training["base"] is None and training["strength"] == 0.0
    seen = states(model, 20)
    np.testing.assert_array_equal(
        decided(PolicyController(result.checkpoint), model, seen), decided(Solver(), model, seen)
    )
    assert result.ppo.policy_kwargs["base"] == {}


def test_a_base_of_another_version_is_refused(model: CostModel) -> None:
    base = a_base(model, 0.1)
    older = checkpoint_of(model, a_policy(model, base))
    arrays = {**older.arrays, "base_view": older.arrays["base_view"][:-1]}
    with pytest.raises(ConfigError, match=r"sees \(190, 33\) numbers .* gives \(191, 33\)"):
        PolicyController(replace(older, arrays=arrays)).reset(model, 1)


def test_which_base_is_taken(model: CostModel, tmp_path: Path) -> None:
    two = model.scenario.replace(nodes=model.scenario.nodes[:2], hops=model.scenario.hops[:1])
    assert load_base("none", model.scenario) == load_base("none", two) == load_base(None, two) == {}
    shipped = load_base(None, model.scenario)
    assert digest(shipped) == digest(ScoringPolicy.load(Path("checkpoints/all")).arrays)
    with pytest.raises(ConfigError, match="3 nodes, the scenario has 2; give --base none"):
        load_base("checkpoints/all", two)
    with pytest.raises(ConfigError, match="no policy for all models"):
        load_base(str(tmp_path), model.scenario)


def test_a_base_that_is_not_there_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = "checkpoints/alexnet/profile.json"
    argv = ["--profile", profile, "--base", str(tmp_path), "--checkpoint", str(tmp_path / "out")]
    assert run_command(lambda: train.main(argv)) == 2
    error = capsys.readouterr().err
    assert "no policy for all models" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
