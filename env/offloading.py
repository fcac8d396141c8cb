"""The Gymnasium environment: choose where to cut, once per interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder, SystemState, idle_probes
from env.synthetic import synthetic_model
from env.system import System
from executor.errors import ConfigError
from executor.profile import Profile

__all__ = ["OffloadingEnv", "observation_space"]

F32 = NDArray[np.float32]
OBSERVATION_BOUND = 20.0


def observation_space(encoder: Encoder) -> spaces.Box:
    """The space of `Encoder.observe`'s rows; all components are logarithms or bounded shares."""
    bound = OBSERVATION_BOUND
    return spaces.Box(-bound, bound, shape=(encoder.size,), dtype=np.float32)


class OffloadingEnv(gymnasium.Env[F32, np.int64]):
    """Choose the plan of the next interval's requests ("Offloading-v0").

    ```python
    env = gymnasium.make("Offloading-v0", model="alexnet")            # simulator
    env = gymnasium.make("Offloading-v0", model="profile.json", scenario="scenario.toml")
    env = gymnasium.make("Offloading-v0", system=my_system)           # real nodes
    ```

    ## Observation
    `Box(-20, 20, (size,), float32)`: the last 8 measured states, newest first (zeros before the
    episode began), then what the closed-form cost model predicts. `env.state.Encoder` builds it.

    | per state | count | unit | range |
    |---|---|---|---|
    | bandwidth as last measured, over the profile's | H | 0.5 ln | -4..4 |
    | age of that measurement | H | 0.3 ln(1 + s) | 0..4 |
    | round-trip time over the profile's | H | 0.5 ln | -4..4 |
    | node load | N | share | 0..0.9 |
    | node backlog | N | ln(1 + intervals of work) | 0..4 |
    | hop backlog at the measured bandwidth | H | ln(1 + intervals) | 0..4 |
    | arrival rate over the best static plan's capacity | 1 | ln | -4..4 |
    | requests outstanding over the in-flight bound | 1 | share | 0..1 |
    | current cuts | H | cut / n | 0..1 |
    | last interval's latency over the edge-only latency | 1 | ln | -3..3 |

    Then the ln of the cheapest candidate's predicted cost per request, and for each of the A
    candidates its predicted cost above that one's, clipped at 10.

    ## Action
    `Discrete(A)`: index into `model.plans`, the candidate plans in lexicographic order of their
    cuts. It holds for requests that arrive in the next interval; earlier ones finish under their
    own plan. Hops that no frame has measured for `probing.idle_s` are probed by the environment,
    and the probes' time and energy are in the cost.

    ## Reward
    Minus `env.cost.Cost` of what was spent in the interval:
    `-(w_lat * outstanding_s / L_ref + (w_end * E_edge + w_tot * E_total) / E_ref + c_lost * lost)
    / n_ref`, with n_ref the mean arrivals per second. Example: edge-only, unloaded, L_ref = 0.3 s,
    E_ref = 1.8 J, default weights (0.3, 0.6, 0.2) and n_ref = 2 /s: an interval in which two
    requests came and were served one after the other has outstanding_s = 0.6 s and both energies
    3.6 J, so the reward is -(0.3 * 2 + 0.6 * 2 + 0.2 * 2) / 2 = -1.1.

    ## Episode end
    `truncated` after `scenario.episode_s` (a continuing task, never `terminated`). The last reward
    includes the cost of running out what was still open then.

    ## Info
    Of the interval: `arrived`, `completed`, `lost`, `late`, `latency_sum_s`, `outstanding_s`,
    `edge_j`, `total_j`, `cost` and `plan` (the cuts).

    ## References
    State, cost and the reference system: arXiv 2605.09623. Little's law makes the integral of the
    number outstanding the sum of latencies, so stalling gains nothing.

    Args:
        system: What to run on; a simulator of `model` when None.
        model: A model (with a synthetic profile), or the path of a profile.
        scenario: A scenario, the path of one, or None for the shipped one.
        rate_rps: Simulator only: mean arrivals per second, a (low, high) range drawn at each
            reset, or None for the scenario's rate.
        seed: Simulator only: of the sequence of episodes, where `reset` is given none.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self,
        system: System | None = None,
        *,
        model: str | Path = "alexnet",
        scenario: Scenario | str | Path | None = None,
        rate_rps: float | tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.render_mode = None
        if system is None:
            cost_model = _cost_model(model, scenario)
            system = Simulator(cost_model, 1, seed, rate_rps=rate_rps)
        self.system: System = system
        self.model = system.model
        self.encoder = Encoder(self.model)
        self.cost = Cost(self.model.profile, self.model.references, self.model.scenario)
        # Gymnasium types a Box by the union of all its element types.
        self.observation_space = cast("spaces.Space[F32]", observation_space(self.encoder))
        self.action_space = spaces.Discrete(len(self.model.plans))
        self._episode_steps = self.model.scenario.steps_per_episode
        self._state: SystemState | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[F32, dict[str, Any]]:
        """Start an episode; `seed` names its conditions, None draws the next ones."""
        super().reset(seed=seed)
        self._state = self.system.reset(seed)
        self._history = self.encoder.push(self.encoder.new_history(1), self._state)
        self._steps = 0
        return self.encoder.observe(self._history, self._state)[0], {}

    def step(self, action: np.int64) -> tuple[F32, float, bool, bool, dict[str, Any]]:
        """Run one interval under plan `action`.

        Raises:
            ConfigError: `action` is no candidate's index, or `reset` was not called.
        """
        if self._state is None:
            raise ConfigError("step needs an episode: call reset first")
        if not self.action_space.contains(action):
            raise ConfigError(f"action must lie in 0..{len(self.model.plans) - 1}, got {action!r}")
        cuts = self.model.table.cuts[[int(action)]]
        result = self.system.step(cuts, idle_probes(self._state, self.model.scenario))
        self._state = result.state
        self._history = self.encoder.push(self._history, result.state)
        self._steps += 1
        truncated = self._steps >= self._episode_steps
        record = result.record
        if truncated:
            record.add(self.system.drain())
            self._state = None
        observation = self.encoder.observe(self._history, result.state)[0]
        cost = float(self.cost(record, self.system.n_ref)[0])
        info = self._info(record) | {"cost": cost, "plan": tuple(cuts[0].tolist())}
        return observation, -cost, False, truncated, info

    def _info(self, record: IntervalRecord) -> dict[str, Any]:
        energy = self.cost.energy(record)
        return {
            "arrived": int(record.arrived[0]),
            "completed": int(record.completed[0]),
            "lost": int(record.lost[0]),
            "late": int(record.late[0]),
            "latency_sum_s": float(record.latency_sum_s[0]),
            "outstanding_s": float(record.outstanding_s[0]),
            "edge_j": float(energy.edge_full_j[0]),
            "total_j": float(energy.total_full_j[0]),
        }

    def close(self) -> None:
        """Release the system."""
        self.system.close()


def _cost_model(model: str | Path, scenario: Scenario | str | Path | None) -> CostModel:
    """The cost model of a profile file, or of any model, with a synthetic profile."""
    if not isinstance(scenario, Scenario):
        scenario = Scenario.load(scenario)
    if Path(model).suffix == ".json":
        return CostModel(Profile.load(Path(model)), scenario)
    return CostModel(synthetic_model(str(model), scenario), scenario)
