"""One policy for all models: it scores each candidate plan from what that plan asks of the system.

    logits[plan] = -excess[plan] / tau + score(view, features[plan])

`excess` is the plan's predicted cost above the cheapest, `view` what was measured over the last
intervals, `features` the plan's own numbers (`PlanEncoder`). One small network scores every plan of
every model, so a policy trained on some models and devices decides for others; its last layer
starts at zero, so untrained it is the queue-aware solver. `agents.learning.scoring_training` trains
it, `agents.arms.policy_all` keeps it and decides with it, and a model's own policy starts from it
(`agents.arms.runtime`). Importing this does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from env.predict import CostModel, Prediction, station_seconds
from env.state import HISTORY, MAX_EXCESS, Encoder, SystemState
from executor.errors import ConfigError

__all__ = ["N_NODES", "SCORING_ARRAYS", "PlanEncoder", "ScoringActor", "Seen", "digest"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

N_NODES = 3
SCORING_ARRAYS = ("view", "plan", "b1", "w2", "b2", "w3", "tau")
PIECE = 1 << 17  # hidden numbers worked on at once


def digest(arrays: Mapping[str, F32]) -> str | None:
    """SHA-256 of a policy's numbers (`SCORING_ARRAYS`); None where there are none."""
    if not arrays:
        return None
    whole = hashlib.sha256()
    for name in SCORING_ARRAYS:
        whole.update(np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return whole.hexdigest()


class Seen(NamedTuple):
    """What the policy sees of B environments with A candidate plans.

    Attributes:
        view: [B, V] the encoder's history, the log of the cheapest predicted cost, the features of
            the plan that has it, and per station exp(-excess) of the cheapest plan without it.
        plans: [F, B, A] the plans' features.
        excess: [B, A] predicted cost above the cheapest, clipped as in `env.state.Encoder`.
    """

    view: F32
    plans: F32
    excess: F32


class PlanEncoder:
    """State history -> `Seen`.

    Per plan, for a chain of N nodes, H hops and S = N + H stations (node 0, hop 0, node 1, ...):
    log1p of each station's utilisation, of its service time and of the backlog met there (both in
    intervals); exp(-excess), excess / 10; log latency (to edge-only); per hop whether it is
    crossed, and if so the age of its measurement, its log bandwidth now less the history's mean,
    and the history's least less now; per node used its load now less the history's mean; share of
    the cost that is computing energy; whether it is the current plan, and how far each cut moves.

    Args:
        model: The cost model of the system decided for.

    Raises:
        ConfigError: The chain has not `N_NODES` nodes.
    """

    def __init__(self, model: CostModel) -> None:
        n_nodes, n_hops = model.profile.n_nodes, len(model.profile.hops)
        if n_nodes != N_NODES:
            raise ConfigError(
                f"the policy for all models decides for {N_NODES} nodes, not {n_nodes}"
            )
        self.model, self.encoder = model, Encoder(model)
        self.n_plan_features = 3 * (n_nodes + n_hops) + 3 + 4 * n_hops + n_nodes + 2 + n_hops
        n_stations = n_nodes + n_hops
        self.view_size = HISTORY * self.encoder.features + 1 + self.n_plan_features + n_stations
        self._cuts = model.table.cuts.T[:, None].astype(np.float32)  # [H, 1, A]
        self._inverse_n = np.float32(1.0 / model.profile.spec.n_units)

    def observe(
        self, history: F32, state: SystemState, prediction: Prediction | None = None
    ) -> Seen:
        """`history` [B, HISTORY * features] already holds `state` (`env.state.Encoder.push`).

        `prediction` is the cost model's of that state, where the caller has it already.
        """
        model, interval_s = self.model, np.float32(self.model.scenario.interval_s)
        n_hops, n_nodes = state.bytes_per_s.shape[1], state.node_load.shape[1]
        n_stations, batch = n_nodes + n_hops, state.batch
        prediction = model.predict(state) if prediction is None else prediction
        cheapest = prediction.cost.min(axis=1, keepdims=True)
        excess = np.minimum(prediction.cost - cheapest, np.float32(MAX_EXCESS))
        unit_s, backlog_s = station_seconds(
            state.node_load,
            np.maximum(state.bytes_per_s, 1.0),
            state.node_backlog_s,
            state.hop_backlog_bytes,
        )
        arrival = np.maximum(state.arrival_rps, 1e-3).astype(np.float32)[:, None]
        past = history.reshape(batch, HISTORY, -1)
        bandwidth, age = past[:, :, :n_hops], past[:, 0, n_hops : 2 * n_hops]
        load = past[:, :, 3 * n_hops : 3 * n_hops + n_nodes]
        of_hops = np.stack([
            np.ones_like(age), age, bandwidth[:, 0] - bandwidth.mean(axis=1),
            bandwidth.min(axis=1) - bandwidth[:, 0],
        ])  # fmt: skip
        of_nodes = load[:, 0] - load.mean(axis=1)
        moved = self._cuts - state.cuts.T[:, :, None].astype(np.float32)  # [H, B, A]

        seen = np.empty((self.n_plan_features, batch, excess.shape[1]), dtype=np.float32)
        service_s = np.multiply(model.demand, unit_s, out=seen[n_stations : 2 * n_stations])
        np.multiply(service_s, arrival, out=seen[:n_stations])
        service_s /= interval_s
        np.multiply(model.used, backlog_s / interval_s, out=seen[2 * n_stations : 3 * n_stations])
        np.log1p(seen[: 3 * n_stations], out=seen[: 3 * n_stations])
        row = 3 * n_stations
        np.exp(-excess, out=seen[row])
        np.multiply(excess, np.float32(0.1), out=seen[row + 1])
        np.log(prediction.latency_s / np.float32(model.references.latency_s), out=seen[row + 2])
        np.multiply(seen[row + 2], np.float32(0.5), out=seen[row + 2])
        row += 3
        for quantity in of_hops:
            np.multiply(model.used[1::2], quantity.T[:, :, None], out=seen[row : row + n_hops])
            row += n_hops
        np.multiply(model.used[0::2], of_nodes.T[:, :, None], out=seen[row : row + n_nodes])
        row += n_nodes
        np.divide(model.active_cost, prediction.cost, out=seen[row])
        seen[row + 1] = ~moved.any(axis=0)
        np.multiply(moved, self._inverse_n, out=seen[row + 2 :])
        solvers = seen[:, np.arange(batch), excess.argmin(axis=1)].T
        without = [
            np.exp(-np.where(used, np.float32(MAX_EXCESS), excess).min(axis=1, keepdims=True))
            for used in model.used[:, 0] > 0
        ]
        view = [history, np.log(cheapest), solvers, *without]
        return Seen(np.concatenate(view, axis=1, dtype=np.float32), seen, excess)


class ScoringActor:
    """The policy deciding for one system (`agents.arms.runtime.Actor`).

    Args:
        model: The system's cost model.
        arrays: view [V, h], plan [F, h], b1, w2 [h, h], b2, w3 [h], tau [1].

    Raises:
        ConfigError: The chain has not `N_NODES` nodes, or the arrays are of another version.
    """

    def __init__(self, model: CostModel, arrays: Mapping[str, F32]) -> None:
        self.plan_encoder = PlanEncoder(model)
        wanted = self.plan_encoder.view_size, self.plan_encoder.n_plan_features
        found = len(arrays["view"]), len(arrays["plan"])
        if found != wanted:
            raise ConfigError(
                f"the policy for all models sees {found} numbers (system, plan), this version "
                f"gives {wanted}; train anew: `python -m agents.train_all`, then `python train.py`"
            )
        self.encoder = self.plan_encoder.encoder
        self._a = arrays
        self._inverse_tau = np.float32(1.0) / arrays["tau"][0]

    def observe(self, history: F32, state: SystemState) -> Seen:
        """What the policy sees; `history` already holds `state`."""
        return self.plan_encoder.observe(history, state)

    def logits(self, seen: Seen) -> F32:
        """Logits, [B, A]."""
        a, (n_features, batch, n_plans) = self._a, seen.plans.shape
        width = len(a["b1"])
        context = seen.view @ a["view"] + a["b1"]
        logits: F32 = seen.excess * -self._inverse_tau
        step = max(1, PIECE // (n_plans * width))
        for start in range(0, batch, step):
            rows = slice(start, start + step)
            flat = seen.plans[:, rows].reshape(n_features, -1)
            hidden = (flat.T @ a["plan"]).reshape(-1, n_plans, width)
            hidden += context[rows, None]
            np.tanh(hidden, out=hidden)
            hidden = hidden @ a["w2"]
            hidden += a["b2"]
            np.tanh(hidden, out=hidden)
            logits[rows] += hidden @ a["w3"]
        return logits

    def excess(self, history: F32, state: SystemState, prediction: Prediction) -> F32:
        """What each plan costs above the cheapest by this policy's reckoning, [B, A]."""
        logits = self.logits(self.plan_encoder.observe(history, state, prediction))
        excess: F32 = (logits.max(axis=1, keepdims=True) - logits) * self._a["tau"][0]
        return excess

    def lesson(self, seen: Seen, plans: I64) -> tuple[F32, F32, F32]:
        """What learning needs of the plans tried, [B, K]: view, features [B, K, F], excess."""
        tried = np.take_along_axis(seen.plans, plans[None], axis=2)
        excess = np.take_along_axis(seen.excess, plans, axis=1)
        return seen.view, np.ascontiguousarray(np.moveaxis(tried, 0, 2)), excess
