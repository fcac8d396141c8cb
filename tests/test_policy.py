"""The learned policy: it starts as the solver, its numpy runtime equals SB3, it can learn."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import TINY, make_model
from stable_baselines3 import PPO

from agents import train_seeds
from agents.arms.controllers import Controller, Solver
from agents.arms.runtime import Checkpoint, PolicyController, PolicyNetwork
from agents.learning.policy import ResidualSolverPolicy, export_arrays, policy_kwargs
from agents.learning.training import (
    VALIDATION_SEED,
    GroupBaselineBuffer,
    to_checkpoint,
    train_policy,
)
from agents.learning.validation import mean_cost
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder, SystemState
from env.synthetic import synthetic_profile
from env.vector import SimulatorVecEnv
from executor.errors import ConfigError
from executor.model import model_spec


@pytest.fixture(scope="module")
def model() -> CostModel:
    return make_model()


def random_states(model: CostModel, count: int, seed: int) -> SystemState:
    rng = np.random.default_rng(seed)
    n_nodes = model.profile.n_nodes
    h = n_nodes - 1
    return SystemState(
        bytes_per_s=np.exp(rng.uniform(np.log(5e4), np.log(4e7), (count, h))),
        bandwidth_age_s=rng.exponential(2.0, (count, h)),
        rtt_s=rng.uniform(1e-3, 0.1, (count, h)),
        node_load=rng.uniform(0.0, 0.9, (count, n_nodes)),
        node_backlog_s=rng.exponential(0.3, (count, n_nodes)),
        hop_backlog_bytes=rng.exponential(2e5, (count, h)),
        arrival_rps=rng.uniform(0.1, 2.0, count) * model.capacity_rps,
        in_flight=rng.integers(0, 33, count).astype(float),
        cuts=model.table.cuts[rng.integers(0, len(model.plans), count)],
        latency_ratio=np.exp(rng.normal(0.0, 1.0, count)),
    )


def test_the_policy_never_picks_a_plan_through_a_node_that_is_down(model, tmp_path):
    policy = make_policy(model, 0.5)
    arrays = export_arrays(policy)
    checkpoint = Checkpoint(model.profile, model.references, model.plans, arrays, {})
    controller = PolicyController(checkpoint)
    controller.reset(model, 64)
    state = random_states(model, 64, 3)
    state.node_up[::2, 2] = False
    cuts = controller.decide(state).cuts
    n = model.profile.spec.n_units
    assert (cuts[::2, 1] == n).all() and (cuts[1::2, 1] < n).any()


def make_policy(model: CostModel, scale: float) -> ResidualSolverPolicy:
    """A policy whose correction is random of the given size (0: as initialised)."""
    env = SimulatorVecEnv(model, 2, seed=0)
    torch.manual_seed(0)
    ppo = PPO(ResidualSolverPolicy, env, policy_kwargs=policy_kwargs(model), device="cpu")
    env.close()
    policy = ppo.policy
    assert isinstance(policy, ResidualSolverPolicy)
    for name, parameter in policy.action_net.named_parameters():
        if scale:
            torch.nn.init.normal_(parameter, std=scale)
        else:
            assert not parameter.any(), name
    return policy


def observations(model: CostModel, count: int) -> np.ndarray:
    encoder = Encoder(model)
    history = encoder.new_history(count)
    for seed in range(8):
        state = random_states(model, count, seed)
        history = encoder.push(history, state)
    return encoder.observe(history, state)


def test_untrained_policy_is_the_solver(model: CostModel) -> None:
    policy = make_policy(model, 0.0)
    controller = PolicyController(to_checkpoint(model, policy, {}))
    solver = Solver()
    state = random_states(model, 2000, 1)
    controller.reset(model, 2000)
    solver.reset(model, 2000)
    assert np.array_equal(controller.decide(state).cuts, solver.decide(state).cuts)


def test_runtime_equals_sb3_on_10000_states(model: CostModel) -> None:
    policy = make_policy(model, 0.5)
    batch = observations(model, 10_000)
    with torch.no_grad():
        expected = policy.get_distribution(torch.as_tensor(batch)).mode().numpy()
    network = PolicyNetwork(export_arrays(policy))
    assert np.array_equal(network.logits(batch).argmax(axis=1), expected)
    one_by_one = [int(network.logits(batch[i : i + 1]).argmax()) for i in range(500)]
    assert np.array_equal(one_by_one, expected[:500])
    zeroed = PolicyNetwork(export_arrays(policy), zeroed=True)
    changed = (zeroed.logits(batch).argmax(axis=1) != expected).mean()
    assert changed > 0.05  # the correction in this test is not a trivial one


def test_runtime_does_not_import_torch() -> None:
    code = (
        "import sys, agents.arms.runtime, agents.arms.guard; "
        "assert not {'torch', 'stable_baselines3'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_sb3_loads_the_shipped_policies_as_this_versions_classes() -> None:
    shipped = sorted((Path(__file__).parent.parent / "checkpoints").glob("*/policy.zip"))
    assert len(shipped) == 3
    for path in shipped:  # its pickles name classes by module: those of this tree, not moved since
        ppo = PPO.load(path, device="cpu")
        assert type(ppo.policy) is ResidualSolverPolicy
        weights = np.load(path.with_name("policy.npz"))
        exported = export_arrays(ppo.policy)
        for name, values in exported.items():
            if name in ("w3", "b3"):  # a product: another CPU adds in another order
                np.testing.assert_allclose(values, weights[name], rtol=1e-6, atol=1e-6)
            else:
                assert np.array_equal(values, weights[name]), name


def test_training_is_deterministic_and_keeps_the_best(model: CostModel, tmp_path: Path) -> None:
    results = [train_policy(model, TINY, tmp_path / str(i)) for i in range(2)]
    a, b = (r.checkpoint.arrays for r in results)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert results[0].validation == results[1].validation
    best = min(ratio for _, ratio in results[0].validation)
    kept = results[0].checkpoint.metadata["training"]["validation_cost_ratio_to_solver"]
    assert kept.keys() == {"own", "varied"}
    assert np.mean(list(kept.values())) <= max(best, 1.0)
    assert list((tmp_path / "0").rglob("events.out.tfevents.*"))
    # Groups that share a baseline must share their conditions.
    env = results[0].ppo.get_env()
    assert isinstance(env, SimulatorVecEnv)
    buffer = results[0].ppo.rollout_buffer
    assert isinstance(buffer, GroupBaselineBuffer)
    assert buffer.copies == TINY.copies
    arrivals = env.simulator.step(np.zeros((TINY.n_envs, 2), dtype=np.int64)).record.arrived
    groups = arrivals.reshape(-1, TINY.copies)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) > 1


def test_a_policy_that_loses_to_the_solver_is_not_kept(model: CostModel) -> None:
    """Learning at a rate that destroys the policy leaves the solver, or what little helps."""
    ruined = replace(TINY, hindsight=replace(TINY.hindsight, learning_rate=10.0))
    result = train_policy(model, ruined)
    assert min(ratio for _, ratio in result.validation) > 1.0, "nothing was ruined"
    training = result.checkpoint.metadata["training"]
    assert training["strength"] < 1.0
    assert max(training["validation_cost_ratio_to_solver"].values()) <= 1.0
    # The files say the same: what is kept costs on those conditions what they claim.
    assert isinstance(result.ppo.policy, ResidualSolverPolicy)
    exported = export_arrays(result.ppo.policy)
    assert all(np.array_equal(exported[k], v) for k, v in result.checkpoint.arrays.items())
    rates = np.linspace(*TINY.rates, TINY.validation_envs) * model.capacity_rps
    simulator = Simulator(model, TINY.validation_envs, VALIDATION_SEED, rate_rps=rates)
    own, solver = (
        mean_cost(arm, simulator, VALIDATION_SEED, 30)
        for arm in (PolicyController(result.checkpoint), Solver())
    )
    claimed = training["validation_cost_ratio_to_solver"]["own"]
    assert np.isclose(np.mean(own / solver), claimed)


def test_a_correction_of_no_strength_is_the_solver(model: CostModel) -> None:
    policy, state = make_policy(model, 0.5), random_states(model, 500, 1)

    def cuts(controller: Controller) -> np.ndarray:
        controller.reset(model, 500)
        return controller.decide(state).cuts

    def decided() -> np.ndarray:
        return cuts(PolicyController(to_checkpoint(model, policy, {})))

    full = decided()
    policy.strengthen(0.5)
    half = decided()
    policy.strengthen(0.0)
    solver = cuts(Solver())
    assert np.array_equal(decided(), solver)
    agreeing = [(x == solver).all(axis=1).mean() for x in (full, half)]
    assert agreeing[0] < agreeing[1] < 1.0


def test_ppo_learns_what_a_wrong_solver_misses() -> None:
    """The learning test: with a fog far slower than profiled, the correction must find out."""
    scenario = Scenario.load().replace(episode_s=30.0)
    true = synthetic_profile(model_spec("alexnet"), scenario)
    truth = CostModel(true, scenario)
    fog = true.nodes[1]
    wrong_fog = type(fog)(
        fog.name, tuple(t / 20 for t in fog.unit_s), fog.stage_overhead_s, fog.power, fog.meter
    )
    believed = CostModel(
        true.with_changes(nodes=(true.nodes[0], wrong_fog, true.nodes[2])),
        scenario,
        truth.references,
    )
    # The simulator runs the truth; only the predictions inside observations are wrong.
    env = SimulatorVecEnv(truth, 128, seed=0)
    env.encoder = Encoder(believed)
    ppo = PPO(
        ResidualSolverPolicy,
        env,
        n_steps=16,
        batch_size=512,
        n_epochs=4,
        learning_rate=2e-3,
        gamma=0.9,
        gae_lambda=0.9,
        policy_kwargs=policy_kwargs(believed),
        seed=0,
        device="cpu",
    )
    policy = ppo.policy
    assert isinstance(policy, ResidualSolverPolicy)

    def cost() -> float:
        simulator = Simulator(truth, 64, 5)
        controller = PolicyController(to_checkpoint(believed, policy, {}))

        class Believing:
            name = "policy"

            def reset(self, model: CostModel, batch: int) -> None:
                controller.reset(believed, batch)

            decide = controller.decide

        return float(mean_cost(Believing(), simulator, 5, 30).mean())

    before = cost()
    informed = float(mean_cost(Solver(), Simulator(truth, 64, 5), 5, 30).mean())
    ppo.learn(100_000)
    env.close()
    regained = (before - cost()) / (before - informed)
    assert regained > 0.5, f"regained {regained:.2f} of what the wrong profile cost"


def test_checkpoint_round_trip_and_refusals(model: CostModel, tmp_path: Path) -> None:
    checkpoint = to_checkpoint(model, make_policy(model, 0.1), {"note": 1})
    checkpoint.save(tmp_path)
    loaded = Checkpoint.load(tmp_path, "alexnet")
    assert all(np.array_equal(loaded.arrays[k], v) for k, v in checkpoint.arrays.items())
    assert loaded.references == model.references and loaded.metadata["note"] == 1
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]
    with pytest.raises(ConfigError, match="made for alexnet, not vgg16"):
        Checkpoint.load(tmp_path, "vgg16")
    other = synthetic_profile(model_spec("vgg16"), model.scenario)
    with pytest.raises(ConfigError, match="trained for alexnet with 21 units on 3 nodes"):
        loaded.check_fits(other)
    constrained = CostModel(model.profile, model.scenario.replace(constrained=True))
    with pytest.raises(ConfigError, match="chooses among 45 plans"):
        PolicyController(loaded).reset(constrained, 1)
    (tmp_path / "policy.npz").write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match="damaged"):
        Checkpoint.load(tmp_path, "alexnet")
    meta = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({k: meta[k] for k in ("model",)}))
    with pytest.raises(ConfigError, match="not readable"):
        Checkpoint.load(tmp_path, "alexnet")
    with pytest.raises(ConfigError, match=r"python train\.py --model alexnet"):
        Checkpoint.load(tmp_path / "nowhere", "alexnet")


def test_a_training_is_told_by_its_seed(
    model: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "profile.json", tmp_path / "seeds.json"
    model.profile.save(path)
    monkeypatch.setattr(train_seeds, "TrainingSettings", lambda hindsight: TINY)
    argv = ["--model", "alexnet", "--profile", str(path), "--seeds", "2", "--json", str(out)]
    assert train_seeds.main(argv) == 0
    first, second = json.loads(out.read_text())["trainings"]
    assert [first["seed"], second["seed"]] == [0, 1]
    assert first["held_out"] != second["held_out"]
    # Other conditions than those that chose the weights.
    assert first["held_out"] != first["validation"]
