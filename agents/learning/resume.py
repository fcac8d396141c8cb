"""An interrupted training goes on where it was: `train.py --resume`.

While PPO runs, everything its next steps depend on is written every few seconds to one file beside
the checkpoint: weights and optimizer, every random generator, the environments (as the actions
since their episode began), the best weights so far, and the profile they were trained on. A resumed
training ends with the same weights, bit for bit, on the same machine and library versions. The
file is written between two rollouts, aside and then renamed, so a kill at any moment leaves the
newest whole one.

The file is one line (name, format, SHA-256 of the rest) and then what `torch.save` writes of plain
values and tensors; it is read with `weights_only=True`, which runs no code from it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from env.cost import References
from env.predict import CostModel
from env.scenario import Scenario
from env.vector import SimulatorVecEnv
from executor.errors import ConfigError
from executor.files import write_atomic
from executor.profile import Profile

__all__ = ["FILE_NAME", "ResumePoint"]

_log = logging.getLogger(__name__)

FILE_NAME = "training.resume"
FORMAT_VERSION = 1
SAVE_EVERY_S = 5.0
_TITLE = b"splitpilot-training"


class ResumePoint:
    """The file an interrupted training is resumed from.

    Attributes:
        path: The file.
        every_s: Seconds between two savings.
    """

    def __init__(
        self,
        path: Path,
        model_name: str,
        scenario: Scenario,
        settings: dict[str, Any],
        every_s: float = SAVE_EVERY_S,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            path: The file.
            model_name: The model that is trained for.
            scenario: Nodes, hops, conditions, cost.
            settings: How it is trained: plain values. A training is only resumed with the same.
            every_s: Seconds between two savings.
        """
        self.path, self.every_s = path, every_s
        self._scenario = scenario
        self._begun_with = {"model": model_name, "scenario": asdict(scenario), **settings}
        self._saved: dict[str, Any] | None = None

    def load(self) -> bool:
        """Read what was saved; returns whether there was anything.

        Raises:
            ConfigError: The file is damaged, or the training was begun with other settings.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        line, _, body = data.partition(b"\n")
        if line != _first_line(body):
            raise ConfigError(
                f"{self.path} is damaged, or not a training's; delete it and train from the start"
            )
        # Its digest is right, so it is what a training wrote; still no code is run from it.
        saved = torch.load(io.BytesIO(body), weights_only=True)
        then, now = saved["begun_with"], self._begun_with
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                raise ConfigError(
                    f"{self.path} was begun with {_difference(key, then.get(key), now.get(key))}; "
                    f"give the same, or train without --resume"
                )
        if saved["versions"] != _versions():
            _log.warning(
                "the training was begun with %s, now %s: it goes on, but not bit for bit",
                saved["versions"],
                _versions(),
            )
        self._saved = saved
        return True

    @property
    def loaded(self) -> bool:
        """Whether something was loaded, which `restore` will go on from."""
        return self._saved is not None

    @property
    def steps(self) -> int:
        """Environment steps done when it was saved; 0 if nothing was loaded."""
        return int(self._saved["ppo"]["num_timesteps"]) if self._saved else 0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training before it was interrupted; 0 if nothing was loaded."""
        return float(self._saved["elapsed_s"]) if self._saved else 0.0

    def cost_model(self) -> CostModel | None:
        """The model it was being trained on; None if nothing was loaded."""
        if self._saved is None:
            return None
        profile = Profile.from_json(self._saved["profile"], str(self.path))
        return CostModel(profile, self._scenario, References(**self._saved["references"]))

    def restore(self, ppo: PPO, env: SimulatorVecEnv) -> dict[str, Any] | None:
        """Put a PPO and its environment, made as before, into the state that was loaded.

        To be called last before `learn`: it sets the random generators. Returns what the training
        keeps besides (see `saver`), or None, with nothing changed, if nothing was loaded.
        """
        saved = self._saved
        if saved is None:
            return None
        state = saved["ppo"]
        ppo.policy.load_state_dict(state["policy"])
        ppo.policy.optimizer.load_state_dict(state["optimizer"])
        ppo.num_timesteps = state["num_timesteps"]
        ppo._n_updates = state["n_updates"]
        ppo._last_obs = env.restore(
            {"rng": saved["env"]["rng"], "actions": saved["env"]["actions"].numpy()}
        )
        ppo._last_episode_starts = state["episode_starts"].numpy()
        _set_generators(saved["generators"])
        own: dict[str, Any] = saved["own"]
        return own

    def saver(
        self, model: CostModel, env: SimulatorVecEnv, own: Callable[[], dict[str, Any]]
    ) -> BaseCallback:
        """A callback for `learn` that saves before a rollout, every `every_s` seconds.

        Args:
            model: What is trained on.
            env: PPO's environment.
            own: What the training keeps besides PPO's own state: plain values and tensors.
        """
        return _Saver(self, model, env, own)

    def remove(self) -> None:
        """The training has ended: forget the file."""
        self.path.unlink(missing_ok=True)

    def save(
        self,
        ppo: PPO,
        model: CostModel,
        env: SimulatorVecEnv,
        own: dict[str, Any],
        elapsed_s: float,
    ) -> None:
        """Write the file, aside and then renamed.

        Raises:
            ConfigError: It cannot be written; the one before it is as it was.
        """
        snapshot = env.snapshot()
        starts = ppo._last_episode_starts
        buffer = io.BytesIO()
        torch.save(
            {
                "begun_with": self._begun_with,
                "versions": _versions(),
                "profile": model.profile.to_json(),
                "references": asdict(model.references),
                "elapsed_s": self.elapsed_s + elapsed_s,
                "ppo": {
                    "policy": ppo.policy.state_dict(),
                    "optimizer": ppo.policy.optimizer.state_dict(),
                    "num_timesteps": ppo.num_timesteps,
                    "n_updates": ppo._n_updates,
                    "episode_starts": torch.from_numpy(np.array(starts)),
                },
                "env": {"rng": snapshot["rng"], "actions": torch.from_numpy(snapshot["actions"])},
                "generators": _generators(),
                "own": own,
            },
            buffer,
        )
        body = buffer.getvalue()
        write_atomic(self.path, _first_line(body) + b"\n" + body)


class _Saver(BaseCallback):
    def __init__(
        self,
        point: ResumePoint,
        model: CostModel,
        env: SimulatorVecEnv,
        own: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__()
        self._point, self._cost_model, self._env, self._own = point, model, env, own
        self._began_s = time.monotonic()
        self._next_s = self._began_s

    def _on_rollout_start(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        assert isinstance(self.model, PPO)
        self._point.save(
            self.model, self._cost_model, self._env, self._own(), now_s - self._began_s
        )
        self._next_s = time.monotonic() + self._point.every_s

    def _on_step(self) -> bool:
        return True


def _first_line(body: bytes) -> bytes:
    return b"%s %d %s" % (_TITLE, FORMAT_VERSION, hashlib.sha256(body).hexdigest().encode())


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "stable-baselines3": stable_baselines3.__version__,
    }


def _generators() -> dict[str, Any]:
    """The process-wide generators: torch's, NumPy's old one (SB3 shuffles with it), Python's."""
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "torch": torch.get_rng_state(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def _set_generators(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    state = saved["numpy"]["state"]
    key = np.array(state["key"], dtype=np.uint32)
    np.random.set_state({**saved["numpy"], "state": {**state, "key": key}})
    random.setstate(saved["python"])


def _difference(key: str, then: Any, now: Any) -> str:
    """Name the first value in which two settings differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for inner in sorted(then.keys() | now.keys()):
            if then.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", then.get(inner), now.get(inner))
    text = (str(v) if len(str(v)) <= 60 else str(v)[:60] + "..." for v in (then, now))
    return f"{key} = " + ", now ".join(text)
