"""An interrupted training resumes and ends as if it had not been, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.learning.hindsight import HindsightSettings
from agents.learning.resume import ResumePoint
from agents.learning.training import TrainingResult, TrainingSettings, train_policy
from env.predict import CostModel
from env.scenario import Scenario
from env.synthetic import synthetic_profile
from env.vector import SimulatorVecEnv
from executor.errors import ConfigError
from executor.model import model_spec

# Episodes of 30 steps and rollouts of 16: a rollout begins in the middle of an episode.
SETTINGS = TrainingSettings(
    hindsight=HindsightSettings(rounds=1, n_envs=8, intervals=6),
    steps=4096, n_envs=32, rollout=16, batch_size=256, validation_envs=16, validate_every=1024,
    threads=1,
)  # fmt: skip
ROLLOUTS = 8
SCENARIO = Scenario.load().replace(episode_s=30.0)


class Interrupted(Exception):
    pass


def make_model() -> CostModel:
    return CostModel(synthetic_profile(model_spec("alexnet"), SCENARIO), SCENARIO)


def make_point(path: Path, settings: TrainingSettings = SETTINGS) -> ResumePoint:
    return ResumePoint(path, "alexnet", SCENARIO, {"training": asdict(settings)}, every_s=0.0)


def interrupt_after(rollouts: int):
    left = [rollouts]

    def report(phase: str, done: int, total: int, best: float) -> None:
        left[0] -= phase == "PPO"
        if left[0] < 0:
            raise Interrupted

    return report


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return {
        **result.ppo.policy.state_dict(),
        **{f"best.{k}": torch.from_numpy(v) for k, v in result.checkpoint.arrays.items()},
    }


@pytest.fixture(scope="module")
def uninterrupted() -> TrainingResult:
    return train_policy(make_model(), SETTINGS)


def assert_same(result: TrainingResult, expected: TrainingResult) -> None:
    assert result.validation == expected.validation
    assert result.ppo.num_timesteps == expected.ppo.num_timesteps
    ours, theirs = weights(result), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    moments = [r.ppo.policy.optimizer.state_dict()["state"] for r in (result, expected)]
    for ours_, theirs_ in zip(*(m.values() for m in moments), strict=True):
        assert all(torch.equal(ours_[k], theirs_[k]) for k in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("done", [0, ROLLOUTS - 1])
def test_a_resumed_training_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: TrainingResult, done: int
) -> None:
    path = tmp_path / "training.resume"
    with pytest.raises(Interrupted):
        train_policy(make_model(), SETTINGS, report=interrupt_after(done), resume=make_point(path))
    # Whatever else the process did meanwhile must not matter.
    torch.manual_seed(99)
    np.random.seed(99)
    point = make_point(path)
    assert point.load() and point.steps == done * 16 * 32
    model = point.cost_model()
    assert model is not None
    assert_same(train_policy(model, SETTINGS, resume=point), uninterrupted)


def test_an_interruption_may_itself_be_interrupted(
    tmp_path: Path, uninterrupted: TrainingResult
) -> None:
    path = tmp_path / "training.resume"
    for attempt in range(2):
        point = make_point(path)
        assert point.load() is (attempt > 0)
        with pytest.raises(Interrupted):
            train_policy(make_model(), SETTINGS, report=interrupt_after(2), resume=point)
    point = make_point(path)
    assert point.load() and 0 < point.elapsed_s < 600
    assert_same(train_policy(make_model(), SETTINGS, resume=point), uninterrupted)
    assert {p.name for p in tmp_path.iterdir()} == {"training.resume"}
    point.remove()
    assert not make_point(path).load()


CHILD = """
import sys
from pathlib import Path
from agents.learning.training import train_policy
from tests.test_resume import SETTINGS, make_model, make_point
print("on", flush=True)
train_policy(make_model(), SETTINGS, resume=make_point(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_a_training_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: TrainingResult, after_s: float
) -> None:
    """kill -9, while it saves before every rollout."""
    path = tmp_path / "training.resume"
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], cwd=root) as child:
        deadline_s = time.monotonic() + 120
        while not path.exists() and child.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.002)
        time.sleep(after_s)
        child.kill()
    point = make_point(path)
    assert point.load()
    assert_same(train_policy(make_model(), SETTINGS, resume=point), uninterrupted)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "training.resume"
    with pytest.raises(Interrupted):
        train_policy(make_model(), SETTINGS, report=interrupt_after(1), resume=make_point(path))
    return path.read_bytes()


@pytest.mark.parametrize("where", [0, 30, 200, -1])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, saved: bytes, where: int) -> None:
    path = tmp_path / "training.resume"
    damaged = bytearray(saved)
    damaged[where] ^= 1
    for data in (bytes(damaged), saved[: len(saved) // 2], b""):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"training\.resume is damaged"):
            make_point(path).load()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 3}, "training.seed = 0, now 3"), ({"steps": 9}, "training.steps = 4096, now 9")],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, saved: bytes, change: dict[str, int], words: str
) -> None:
    path = tmp_path / "training.resume"
    path.write_bytes(saved)
    with pytest.raises(ConfigError, match=words):
        make_point(path, replace(SETTINGS, **change)).load()


def test_an_environment_comes_back_to_a_snapshot() -> None:
    """Over the end of an episode, with rates drawn anew and shared conditions."""
    rng = np.random.default_rng(0)
    env = SimulatorVecEnv(make_model(), 8, seed=1, rate_fraction=(0.3, 1.2), copies=4)
    env.reset()
    actions = rng.integers(0, env.action_space.n, (70, 8))
    for row in actions[:40]:
        env.step(row)
    snapshot = env.snapshot()
    expected = [env.step(row) for row in actions[40:]]
    again = SimulatorVecEnv(make_model(), 8, seed=77, rate_fraction=(0.3, 1.2), copies=4)
    again.restore(snapshot)
    for row, (observation, reward, done, _) in zip(actions[40:], expected, strict=True):
        got = again.step(row)
        assert np.array_equal(got[0], observation) and np.array_equal(got[1], reward)
        assert np.array_equal(got[2], done)
    for one in (env, again):
        one.close()
