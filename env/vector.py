"""The batched simulator as a Stable-Baselines3 vector environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from env.conditions import ConditionsSource
from env.cost import Cost
from env.offloading import observation_space
from env.predict import CostModel
from env.simulator import Simulator
from env.state import Encoder, idle_probes

__all__ = ["RateFraction", "SimulatorVecEnv"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
# A fixed fraction, a (low, high) range, or a draw: (generator, number of environments) -> [B].
RateFraction = float | tuple[float, float] | Callable[[np.random.Generator, int], F64]


class SimulatorVecEnv(VecEnv):
    """`n_envs` copies of the "Offloading-v0" environment over one batched simulator.

    Episodes are synchronous: all end by truncation after `scenario.steps_per_episode` steps and
    start again by themselves with a new seed of this environment's own sequence. Observation,
    action, reward (the drain's cost included in an episode's last) are those of
    `env.offloading.OffloadingEnv`. `infos` are empty except at an episode's end, where they hold
    `terminal_observation`, `TimeLimit.truncated` and `episode` (return r, length l, seconds t).

    Args:
        model: Profile, scenario, references and the candidate plans that actions index.
        n_envs: Number of environments B.
        seed: Of the sequence of episodes' seeds.
        rate_fraction: Mean arrival rate as a fraction of the best static plan's capacity: a
            number, a range drawn from uniformly per environment and episode, a callable that draws
            [B] values, or None for the scenario's rate.
        copies: So many neighbouring environments share their conditions and rate.
        conditions: Where conditions and rates come from, in place of the scenario, `rate_fraction`
            and `copies`.
        encoder: What makes the observations; None for `Encoder(model)`.
    """

    def __init__(
        self,
        model: CostModel,
        n_envs: int,
        *,
        seed: int = 0,
        rate_fraction: RateFraction | None = None,
        copies: int = 1,
        conditions: ConditionsSource | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        self.model = model
        self.encoder = encoder or Encoder(model)
        self.cost = Cost(model.profile, model.references, model.scenario)
        self.copies = copies
        self._fraction = rate_fraction
        self._rng = np.random.default_rng(seed)
        rate = self._draw_rates(n_envs)
        self.simulator = Simulator(
            model, n_envs, self._next_seed(), rate_rps=rate, copies=copies, conditions=conditions
        )
        self._episode_steps = model.scenario.steps_per_episode
        self._empty_infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        self._not_done, self._done = np.zeros(n_envs, bool), np.ones(n_envs, bool)
        self._actions = np.zeros(n_envs, dtype=np.int64)
        self.render_mode = None
        super().__init__(n_envs, observation_space(self.encoder), spaces.Discrete(len(model.plans)))

    def _next_seed(self) -> int:
        return int(self._rng.integers(2**62))

    def _draw_rates(self, n_envs: int) -> F64 | None:
        fraction = self._fraction
        if fraction is None:
            return None
        if callable(fraction):
            drawn = fraction(self._rng, n_envs)
        elif isinstance(fraction, tuple):
            drawn = self._rng.uniform(*fraction, size=n_envs)
        else:
            drawn = np.full(n_envs, fraction)
        return np.asarray(drawn, dtype=np.float64) * self.model.capacity_rps

    def reset(self) -> VecEnvObs:
        """Start new episodes everywhere; returns observations [B, size]."""
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
            self._reset_seeds()
        return self._start()

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to come back to this moment: plain values and an array.

        Not the simulator's state but what led to it: the generator's state (`rng`) when the
        episode began, and the actions since (`actions`, [T, B]).
        """
        actions = np.stack(self._taken) if self._taken else np.zeros((0, self.num_envs), np.int64)
        return {"rng": self._rng_at_start, "actions": actions}

    def restore(self, snapshot: dict[str, Any]) -> F32:
        """Come back to a snapshot of an environment made alike, bit for bit.

        Runs the episode's beginning again. Returns the observations [B, size].
        """
        self._reset_seeds()
        self._rng.bit_generator.state = snapshot["rng"]
        observation = self._start()
        for actions in np.asarray(snapshot["actions"]):
            self.step_async(actions)
            observation = np.asarray(self.step_wait()[0], dtype=np.float32)
        return observation

    def _start(self) -> F32:
        self._rng_at_start = self._rng.bit_generator.state
        self._taken: list[NDArray[np.int64]] = []
        rate = self._draw_rates(self.num_envs)
        if rate is not None:
            self.simulator.set_rates(rate)
        self._state = self.simulator.reset(self._next_seed())
        self._history = self.encoder.push(self.encoder.new_history(self.num_envs), self._state)
        self._steps = 0
        self._return = np.zeros(self.num_envs)
        self._began = time.monotonic()
        return self.encoder.observe(self._history, self._state)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions [B] for `step_wait`."""
        self._actions = np.array(actions, dtype=np.int64)

    def step_wait(self) -> VecEnvStepReturn:
        """Run one interval; returns observations, rewards, dones and infos."""
        self._taken.append(self._actions)
        cuts = self.model.table.cuts[self._actions]
        probes = idle_probes(self._state, self.model.scenario)
        result = self.simulator.step(cuts, probes)
        self._state = result.state
        self._history = self.encoder.push(self._history, result.state)
        observation = self.encoder.observe(self._history, result.state)
        cost = self.cost(result.record, self.simulator.n_ref)
        self._steps += 1
        if self._steps < self._episode_steps:
            self._return -= cost
            return observation, (-cost).astype(np.float32), self._not_done, self._empty_infos
        cost += self.cost(self.simulator.drain(), self.simulator.n_ref)
        self._return -= cost
        seconds = round(time.monotonic() - self._began, 6)
        infos = [
            {
                "terminal_observation": observation[i],
                "TimeLimit.truncated": True,
                "episode": {"r": float(total), "l": self._steps, "t": seconds},
            }
            for i, total in enumerate(self._return)
        ]
        return self._start(), (-cost).astype(np.float32), self._done, infos

    def close(self) -> None:
        """Release the simulator."""
        self.simulator.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute, once per chosen environment (they share one simulator)."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute; all environments share it."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method once and give its result per chosen environment."""
        result = getattr(self, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """No environment is wrapped."""
        return [False] * len(list(self._get_indices(indices)))
