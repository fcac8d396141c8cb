"""The Gymnasium and Stable-Baselines3 environments over the simulator."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import env as _registered  # noqa: F401  # registers "Offloading-v0"
from env.conditions import Conditions
from env.cost import Cost
from env.offloading import OffloadingEnv
from env.predict import CostModel
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from env.simulator import Simulator
from env.state import Encoder, idle_probes
from env.synthetic import EDGE_S, UNIT_SHARES, synthetic_profile
from env.system import System
from env.vector import SimulatorVecEnv
from executor.errors import ConfigError, ProfileError
from executor.model import MODELS, model_spec
from executor.plan import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
SPEC = ModelSpec(
    name="toy",
    unit_names=("a", "b", "c", "d"),
    cut_bytes=(600_000, 200_000, 90_000, 20_000, 4_000),
    has_params=(True, True, True, True),
    head_start=3,
    static_plan=(1, 3),
)


@pytest.fixture
def model():
    scenario = Scenario.load().replace(episode_s=12.0)
    return CostModel(synthetic_profile(SPEC, scenario), scenario)


@pytest.fixture
def made(model):
    made = gymnasium.make("Offloading-v0", system=Simulator(model, 1, 0))
    yield made
    made.close()


def test_gymnasium_accepts_it(model):
    gymnasium_check_env(OffloadingEnv(Simulator(model, 1, 0)), skip_render_check=True)


def test_stable_baselines_accepts_it(model):
    sb3_check_env(OffloadingEnv(Simulator(model, 1, 0)))


def test_an_episode_is_truncated_and_charged_for_what_is_open(model, made):
    observation, info = made.reset(seed=3)
    assert observation in made.observation_space and info == {}
    core, cost = Simulator(model, 1, 0), Cost(model.profile, model.references, model.scenario)
    state = core.reset(3)
    for step in range(12):
        action = step % len(model.plans)
        observation, reward, terminated, truncated, info = made.step(action)
        result = core.step(model.table.cuts[[action]], idle_probes(state, model.scenario))
        state = result.state
        expected = cost(result.record, core.n_ref)[0]
        if step == 11:
            tail = cost(core.drain(), core.n_ref)[0]
            assert tail > 0
            expected += tail
        assert reward == pytest.approx(-expected) and info["cost"] == -reward
        assert observation in made.observation_space
        assert (terminated, truncated) == (False, step == 11)
        assert info["plan"] == model.plans[action].cuts
    with pytest.raises(ConfigError, match="reset"):
        made.unwrapped.step(0)


def test_the_docstring_s_reward_example(model):
    cost = Cost(model.profile, model.references, model.scenario)
    latency, edge_j = model.references.latency_s, model.references.edge_j
    result = Simulator(model, 1, 0).step(np.array([[4, 4]]))
    record = result.record
    record.outstanding_s[:] = record.union_s[:] = 2 * latency
    record.node_active_s[:] = [[2 * latency, 0.0, 0.0]]
    record.hop_transmit_s[:] = 0.0
    record.lost[:] = 0
    assert cost.energy(record).edge_full_j[0] == pytest.approx(2 * edge_j)
    assert cost(record, np.array([2.0]))[0] == pytest.approx(1.1)


def test_wrong_actions_are_named(made):
    made.reset(seed=0)
    with pytest.raises(ConfigError, match="action must lie"):
        made.unwrapped.step(10_000)


def test_idle_hops_are_probed(made):
    made.reset(seed=0)
    edge_only = len(made.unwrapped.model.plans) - 1
    ages = []
    for _ in range(10):
        made.step(edge_only)
        ages.append(made.unwrapped._state.bandwidth_age_s[0])
    idle = made.unwrapped.model.scenario.probing.idle_s
    assert 3.0 < np.max(ages[:4]) <= idle + 1.0
    assert np.min(ages[4:]) < 1.0


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v2"])
def test_made_by_name_and_from_files(name, tmp_path):
    made = gymnasium.make("Offloading-v0", model=name)
    observation, _ = made.reset(seed=1)
    made.unwrapped.model.profile.save(tmp_path / "p.json")
    scenario = ROOT / "env" / "scenarios" / "default.toml"
    again = gymnasium.make(
        "Offloading-v0", model=str(tmp_path / "p.json"), scenario=str(scenario), rate_rps=(1.0, 2.0)
    )
    assert again.observation_space.shape == observation.shape
    again.reset(seed=1)
    assert 1.0 <= again.unwrapped.system.n_ref[0] <= 2.0
    again.close()
    made.close()


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="model"):
        OffloadingEnv(model="lenet")
    (tmp_path / "p.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ProfileError, match=r"p\.json"):
        OffloadingEnv(model=str(tmp_path / "p.json"))
    two = Scenario(
        nodes=(NodeSetup("edge", "pi4"), NodeSetup("cloud", "server")),
        hops=(HopSetup(Process(levels=(8.0,))),),
    )
    three = Scenario.load()
    with pytest.raises(ConfigError, match="nodes"):
        CostModel(synthetic_profile(SPEC, three), two)


def test_a_simulator_is_a_system(model):
    assert isinstance(Simulator(model, 1, 0), System)


def test_importing_env_does_not_import_torch():
    code = (
        "import sys, env, env.state, env.predict, env.simulator, env.offloading, env.synthetic\n"
        "assert not {'torch', 'stable_baselines3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_vector_env_equals_the_single_one(model):
    vector = SimulatorVecEnv(model, 1, seed=5)
    observation = vector.reset()
    # Its second seed: the first built the simulator.
    seeds = np.random.default_rng(5)
    seeds.integers(2**62)
    single = OffloadingEnv(Simulator(model, 1, 0))
    rng = np.random.default_rng(0)
    for _ in range(2):
        first, _ = single.reset(seed=int(seeds.integers(2**62)))
        np.testing.assert_array_equal(observation[0], first)
        for _ in range(12):
            action = rng.integers(len(model.plans))
            observation, reward, done, infos = vector.step(np.array([action]))
            expected, single_reward, _, truncated, _ = single.step(action)
            assert reward[0] == pytest.approx(single_reward, rel=1e-6)
            assert done[0] == truncated
            seen = infos[0]["terminal_observation"] if truncated else observation[0]
            np.testing.assert_array_equal(seen, expected)
    vector.close()


def test_vector_env_starts_again_by_itself(model):
    vector = SimulatorVecEnv(model, 3, seed=0, rate_fraction=(0.3, 1.2))
    first = vector.reset()
    assert first.shape == (3, Encoder(model).size) and first.dtype == np.float32
    fraction = vector.simulator.n_ref / model.capacity_rps
    assert np.all((fraction >= 0.3) & (fraction <= 1.2)) and np.ptp(fraction) > 0
    total = np.zeros(3)
    for step in range(12):
        observation, reward, done, infos = vector.step(np.full(3, 2))
        total += reward
        assert reward.dtype == np.float32 and done.tolist() == [step == 11] * 3
        assert all(bool(info) == (step == 11) for info in infos)
    for info, r in zip(infos, total, strict=True):
        assert info["TimeLimit.truncated"] and info["episode"]["l"] == 12
        assert info["episode"]["r"] == pytest.approx(r, rel=1e-5)
    assert np.all(observation[:, Encoder(model).features : 8 * Encoder(model).features] == 0)
    assert not np.array_equal(fraction, vector.simulator.n_ref / model.capacity_rps)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [(0.5, [0.5] * 4), (lambda rng, n: 0.1 * np.arange(1, n + 1), [0.1, 0.2, 0.3, 0.4])],
)
def test_vector_env_rates(model, rates, expected):
    vector = SimulatorVecEnv(model, 4, rate_fraction=rates)
    vector.reset()
    np.testing.assert_allclose(vector.simulator.n_ref / model.capacity_rps, expected)


def test_vector_env_seeds(model):
    def first(seed):
        vector = SimulatorVecEnv(model, 2, seed=9)
        vector.seed(seed)
        vector.reset()
        return vector.step(np.zeros(2, dtype=int))[1]

    np.testing.assert_array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


def test_ppo_runs_on_the_vector_env(model):
    vector = SimulatorVecEnv(model, 8, seed=0, rate_fraction=(0.3, 1.2))
    ppo = PPO("MlpPolicy", vector, n_steps=16, batch_size=64, n_epochs=1, device="cpu", seed=0)
    ppo.learn(256)
    assert ppo.num_timesteps == 256 and len(ppo.ep_info_buffer) == 16
    assert vector.get_attr("model") == [model] * 8 and not any(vector.env_is_wrapped(object))


@pytest.mark.parametrize("name", MODELS)
def test_synthetic_profiles(name):
    scenario = Scenario.load()
    profile = synthetic_profile(model_spec(name), scenario)
    assert sum(profile.nodes[0].unit_s) == pytest.approx(EDGE_S[name])
    assert sum(profile.nodes[2].unit_s) == pytest.approx(EDGE_S[name] / 12)
    assert len(UNIT_SHARES[name]) == profile.spec.n_units
    with pytest.raises(ConfigError, match="shares"):
        synthetic_profile(model_spec(name), scenario, shares=[1.0])


def draw(scenario, rate, seed, steps):
    conditions = Conditions(scenario, rate, seed)
    return [conditions.next() for _ in range(steps)]


def test_conditions_have_the_means_they_were_asked_for():
    load = Process("markov", (0.1, 0.4, 0.7), dwell_s=4.0, sigma=0.03, log=False)
    hop = Process("markov", (10.0, 30.0, 50.0), dwell_s=4.0, sigma=0.4, correlation_s=2.0)
    scenario = Scenario(
        nodes=(NodeSetup("a", "pi4", load=load), NodeSetup("b", "server")),
        hops=(HopSetup(hop),),
        arrivals=Process("markov", (0.5, 1.5), dwell_s=3.0),
        interval_s=2.5,
    )
    drawn = draw(scenario, np.full(400, 3.0), 0, 60)
    speed = np.concatenate([c.node_speed for c in drawn], axis=2).mean(axis=(0, 2))
    np.testing.assert_allclose(1.0 - speed, [0.4, 0.0], atol=0.01)
    mbps = np.concatenate([c.hop_bytes_per_s for c in drawn], axis=2).mean(axis=(0, 2)) * 8e-6
    np.testing.assert_allclose(mbps, [30.0], rtol=0.02)
    counts = np.array([c.arrival_count for c in drawn])
    assert counts.mean() == pytest.approx(3.0 * 2.5, rel=0.03)
    for c in drawn[:5]:
        assert c.hop_bytes_per_s.shape == (400, 1, 3) and c.node_speed.shape == (400, 2, 3)
        np.testing.assert_array_equal(np.bincount(c.arrival_env, minlength=400), c.arrival_count)
        assert np.all(np.diff(c.arrival_env * 10.0 + c.arrival_offset_s) >= 0)
        assert c.arrival_offset_s.min() >= 0 and c.arrival_offset_s.max() <= 2.5
    offsets = np.concatenate([c.arrival_offset_s for c in drawn])
    assert offsets.mean() == pytest.approx(1.25, abs=0.02)


def test_outages_last_as_long_as_they_should():
    hop = Process("markov", (10.0,), outage_per_s=0.1, outage_s=3.0, outage_value=0.5)
    scenario = Scenario.load().replace(hops=(HopSetup(hop), HopSetup(hop)))
    drawn = draw(scenario, np.ones(300), 0, 200)
    mbps = np.concatenate([c.hop_bytes_per_s for c in drawn], axis=2) * 8e-6
    out = np.isclose(mbps, 0.5)
    assert np.isclose(mbps, 10.0)[~out].all()
    assert out[:, :, 50:].mean() == pytest.approx(0.25, abs=0.02)


def test_another_rate_leaves_bandwidth_and_load_as_they_were():
    scenario = Scenario.load()
    one, two = draw(scenario, np.ones(5), 4, 9), draw(scenario, np.full(5, 30.0), 4, 9)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.hop_bytes_per_s, b.hop_bytes_per_s)
        np.testing.assert_array_equal(a.node_speed, b.node_speed)


def test_conditions_play_traces(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("time_s,mbps\n" + "".join(f"{t},{t + 1}\n" for t in range(20)))
    hop = Process("trace", path=str(path), scale=2.0, minimum=5.0, jitter=False)
    constant = Process(levels=(3.0,))
    scenario = Scenario.load().replace(hops=(HopSetup(hop), HopSetup(constant)), substep_s=0.1)
    drawn = draw(scenario, np.ones(4), 0, 30)
    mbps = np.concatenate([c.hop_bytes_per_s for c in drawn], axis=2) * 8e-6
    np.testing.assert_allclose(mbps[:, 1], 3.0)
    allowed = np.maximum(2.0 * np.arange(1, 21), 5.0)
    # All but the sub-step that a sample ends in, one in ten.
    assert np.isclose(mbps[:, 0, :, None], allowed).any(axis=2).mean() >= 0.9
    np.testing.assert_allclose(mbps[:, 0, :100], mbps[:, 0, 200:])
