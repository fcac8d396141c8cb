"""The learned policy: the queue-aware solver plus a learned correction, as an SB3 policy.

    logits = -excess / tau + dense(h) + prices(h) . demand[plan]

`excess` is each candidate's predicted cost above the cheapest (the tail of the observation, see
`env.state.Encoder`), h a small network's view of the state history. Both heads start at zero, so
the untrained policy is the solver, and PPO learns what the closed form misses. `prices` is a price
per unit of work at each station: one number moves every plan that uses that station, so it
generalises over plans; `dense` moves single plans. With a *base*, the policy for all models
(`agents.arms.scoring`), `excess` is what that reckons, and the untrained policy is the base.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from agents.arms.runtime import base_of, with_base
from env.offloading import observation_space
from env.predict import CostModel
from env.state import Encoder
from executor.errors import ConfigError

__all__ = [
    "ResidualSolverPolicy",
    "demand_features",
    "export_arrays",
    "load_policy",
    "policy_kwargs",
]


F32 = NDArray[np.float32]


def demand_features(model: CostModel) -> NDArray[np.float32]:
    """What each candidate asks of each station, scaled to at most 1; shape [A, N + 2 H]."""
    table = model.table
    columns = np.concatenate([table.work_s, table.hop_bytes, table.crossed], axis=1)
    scaled: NDArray[np.float32] = (columns / np.maximum(columns.max(axis=0), 1e-12)).astype(
        np.float32
    )
    return scaled


def policy_kwargs(
    model: CostModel, tau: float = 0.05, width: int = 64, base: Mapping[str, F32] | None = None
) -> dict[str, Any]:
    """Arguments for `ResidualSolverPolicy` that fit a cost model's candidates."""
    demand = demand_features(model).tolist()
    return {"demand": demand, "tau": tau, "width": width, "base": dict(base or {})}


class _Trunk(nn.Module):
    """Splits the observation into the state view and the solver's excess costs."""

    def __init__(self, size: int, n_actions: int, width: int) -> None:
        super().__init__()
        self.n_actions = n_actions
        self.latent_dim_pi = width + n_actions
        self.latent_dim_vf = width
        self.pi = nn.Sequential(
            nn.Linear(size, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.vf = nn.Sequential(
            nn.Linear(size, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )

    def _view(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        excess = observation[:, -self.n_actions :]
        return torch.cat([observation[:, : -self.n_actions], torch.exp(-excess)], dim=1), excess

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view, excess = self._view(observation)
        return torch.cat([self.pi(view), excess], dim=1), self.vf(view)

    def forward_actor(self, observation: torch.Tensor) -> torch.Tensor:
        view, excess = self._view(observation)
        return torch.cat([self.pi(view), excess], dim=1)

    def forward_critic(self, observation: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.vf(self._view(observation)[0])
        return hidden


class _Head(nn.Module):
    """Logits: the solver's prior plus the zero-initialised correction."""

    demand: torch.Tensor

    def __init__(self, width: int, demand: torch.Tensor, tau: float) -> None:
        super().__init__()
        n_actions, n_features = demand.shape
        self.width, self.tau = width, tau
        self.dense = nn.Linear(width, n_actions)
        self.prices = nn.Linear(width, n_features)
        for layer in (self.dense, self.prices):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("demand", demand)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        hidden, excess = latent[:, : self.width], latent[:, self.width :]
        correction = self.dense(hidden) + self.prices(hidden) @ self.demand.T
        logits: torch.Tensor = correction - excess / self.tau
        return logits


class ResidualSolverPolicy(ActorCriticPolicy):
    """Actor-critic whose actor is a correction on the solver.

    Args:
        demand: [A][K] what each plan asks of each station (`demand_features`).
        tau: Temperature of the solver's prior, in units of cost.
        width: Width of the two hidden layers of actor and critic.
        base: Arrays of the policy for all models that this one corrects; none for the solver.

    Attributes:
        base: As given. It is part of the observation, so whoever makes those must use it
            (`agents.arms.runtime.encoder_on`); here it is only kept.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        demand: list[list[float]],
        tau: float = 0.05,
        width: int = 64,
        base: dict[str, F32] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = base or {}
        self._demand = torch.tensor(demand, dtype=torch.float32)
        self._tau, self._width = tau, width
        kwargs["ortho_init"] = False
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def clone(self) -> ResidualSolverPolicy:
        """A copy with weights of its own."""
        copied = type(self)(
            self.observation_space,
            spaces.Discrete(len(self._demand)),
            lambda _: 1e-4,
            self._demand.tolist(),
            self._tau,
            self._width,
            self.base,
        )
        copied.load_state_dict(self.state_dict())
        return copied

    def actor_parameters(self) -> list[nn.Parameter]:
        """The parameters that decide; the critic's are the others."""
        trunk = self.mlp_extractor.pi
        assert isinstance(trunk, nn.Module)
        return [*trunk.parameters(), *self.action_net.parameters()]

    def strengthen(self, factor: float) -> None:
        """Multiply the correction; at 0 the policy is the solver."""
        head = self.action_net
        assert isinstance(head, _Head)
        with torch.no_grad():
            for layer in (head.dense, head.prices):
                layer.weight.mul_(factor)
                layer.bias.mul_(factor)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Trunk(  # type: ignore[assignment]  # same interface, other inside
            self.features_dim, len(self._demand), self._width
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = _Head(self._width, self._demand, self._tau)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=1e-5)


def load_policy(path: Path, model: CostModel, arrays: Mapping[str, F32]) -> ResidualSolverPolicy:
    """The policy of a checkpoint's policy.zip, with its critic, to learn on with.

    Only its weights are read, no code.

    Args:
        path: The file.
        model: Of a system with the same candidates.
        arrays: The checkpoint's; temperature and base are taken from them.

    Raises:
        ConfigError: It cannot be read, or is of other candidates.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = io.BytesIO(archive.read("policy.pth"))
        weights = torch.load(stored, map_location="cpu", weights_only=True)
        width = len(weights["mlp_extractor.pi.0.bias"])
        policy = ResidualSolverPolicy(
            observation_space(Encoder(model)),
            spaces.Discrete(len(model.plans)),
            lambda _: 1e-4,
            **policy_kwargs(model, float(arrays["tau"][0]), width, base_of(arrays)),
        )
        policy.load_state_dict(weights)
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"cannot learn on with {path}: {error}; make it anew with train.py"
        ) from error
    return policy


def export_arrays(policy: ResidualSolverPolicy) -> dict[str, NDArray[np.float32]]:
    """The actor's weights as plain arrays, for `agents.arms.runtime` (decides without torch)."""
    trunk, head = policy.mlp_extractor.pi, policy.action_net
    assert isinstance(trunk, nn.Sequential) and isinstance(head, _Head)
    first, second, demand = trunk[0], trunk[2], head.demand
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    tensors = {
        "w1": first.weight.T,
        "b1": first.bias,
        "w2": second.weight.T,
        "b2": second.bias,
        # Both heads are linear in h, so they fold into one matrix.
        "w3": (head.dense.weight + demand @ head.prices.weight).T,
        "b3": head.dense.bias + demand @ head.prices.bias,
        "tau": torch.tensor([head.tau]),
    }
    arrays = {k: np.ascontiguousarray(v.detach().cpu().numpy()) for k, v in tensors.items()}
    return with_base(arrays, policy.base)
