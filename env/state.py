"""What a controller sees, and the one encoder that turns it into an observation.

The simulator, the real environment and deployment all build `SystemState` and encode it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from env.predict import CostModel, Prediction
from env.scenario import Scenario

__all__ = ["HISTORY", "Encoder", "SystemState", "idle_probes"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

HISTORY = 8
MAX_EXCESS = 10.0
# Fixed units, so that an encoder needs no statistics of the conditions it will meet.
RATE_REF_BYTES_PER_S = 5e6
RTT_REF_S = 0.02


@dataclass
class SystemState:
    """The measured state at a decision, for a batch of B environments, N nodes, H hops.

    Attributes:
        bytes_per_s: [B, H] bandwidth as last measured from frames or probes.
        bandwidth_age_s: [B, H] age of that measurement.
        rtt_s: [B, H] round-trip time of an empty frame, as last measured (by pings).
        node_load: [B, N] share of the CPU taken by others, 0..0.9.
        node_backlog_s: [B, N] unloaded seconds of work queued or running.
        hop_backlog_bytes: [B, H] bytes handed to the hop and not yet received behind it.
        arrival_rps: [B] arrivals per second, smoothed over the last intervals.
        in_flight: [B] requests outstanding.
        cuts: [B, H] the current plan.
        latency_ratio: [B] last interval's mean observed latency / predicted (1 where unknown).
        node_up: [B, N] whether the node can be used; all of them where it is not given. It masks
            plans (`CostModel.usable`) and is no part of the observation.
    """

    bytes_per_s: F64
    bandwidth_age_s: F64
    rtt_s: F64
    node_load: F64
    node_backlog_s: F64
    hop_backlog_bytes: F64
    arrival_rps: F64
    in_flight: F64
    cuts: I64
    latency_ratio: F64
    node_up: Mask = field(default_factory=lambda: np.ones((0, 0), dtype=np.bool_))

    def __post_init__(self) -> None:
        if not self.node_up.size:
            self.node_up = np.ones(self.node_load.shape, dtype=np.bool_)

    def take(self, index: I64) -> SystemState:
        """Environment b of the result is in the state of this one's environment index[b]."""
        return SystemState(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def batch(self) -> int:
        """Number of environments B."""
        return len(self.arrival_rps)


Excess = Callable[[F32, SystemState, Prediction], F32]


class Encoder:
    """State history -> observation.

    The observation has `HISTORY` blocks of `features` numbers, newest first, then 1 + A numbers:
    log of the cheapest candidate's predicted cost, and each candidate's predicted cost above it
    (clipped at 10). Units are fixed or the profile's; there are no running statistics to ship.

    Per state: log bandwidth (to 5 MB/s), log1p of its age and log RTT (to 20 ms) per hop; load and
    log1p backlog per node; log1p backlog (s) per hop; log of arrivals per edge-only latency;
    in-flight share; current cuts / n; log latency ratio.

    Args:
        model: The cost model whose profile and plans normalise the state.
        excess: (history, state, prediction) -> [B, A], what each candidate costs above the
            cheapest in the eyes of who knows better than the prediction; None: as predicted.
    """

    def __init__(self, model: CostModel, excess: Excess | None = None) -> None:
        self.model, self._excess = model, excess
        profile, scenario = model.profile, model.scenario
        n_hops, n_nodes = len(profile.hops), profile.n_nodes
        # One row of factors per quantity: gain x log(value x factor + shift), or value x factor.
        rows = [
            (n_hops, True, 0.5, 1.0 / RATE_REF_BYTES_PER_S, 0.0, -4.0, 4.0),
            (n_hops, True, 0.3, 1.0, 1.0, -4.0, 4.0),
            (n_hops, True, 0.5, 1.0 / RTT_REF_S, 0.0, 0.5 * np.log(1e-4 / RTT_REF_S), 4.0),
            (n_nodes, False, 1.0, 1.0, 0.0, -4.0, 4.0),
            (n_nodes, True, 1.0, 1.0 / scenario.interval_s, 1.0, -4.0, 4.0),
            (n_hops, True, 1.0, 1.0 / scenario.interval_s, 1.0, -4.0, 4.0),
            (1, True, 1.0, model.references.latency_s, 0.0, -4.0, 4.0),
            (1, False, 1.0, 1.0 / scenario.max_in_flight, 0.0, -4.0, 4.0),
            (n_hops, False, 1.0, 1.0 / profile.spec.n_units, 0.0, -4.0, 4.0),
            (1, True, 1.0, 1.0, 0.0, np.log(0.05), np.log(20.0)),
        ]
        wide = np.array([row[1:] for row in rows for _ in range(row[0])]).T
        self._logged = wide[0] > 0
        self._gain, self._factor, self._shift, self._low, self._high = wide[1:]
        self.features = wide.shape[1]
        self.size = HISTORY * self.features + 1 + len(model.plans)

    def encode_state(self, state: SystemState) -> F32:
        """One state's features, shape [B, features]."""
        values = np.concatenate(
            [
                state.bytes_per_s,
                state.bandwidth_age_s,
                state.rtt_s,
                state.node_load,
                state.node_backlog_s,
                state.hop_backlog_bytes / np.maximum(state.bytes_per_s, 1.0),
                state.arrival_rps[:, None],
                state.in_flight[:, None],
                state.cuts,
                state.latency_ratio[:, None],
            ],
            axis=1,
        )
        values *= self._factor
        values += self._shift
        np.log(np.maximum(values, 1e-9), out=values, where=self._logged)
        values *= self._gain
        np.maximum(values, self._low, out=values)
        np.minimum(values, self._high, out=values)
        features: F32 = values.astype(np.float32)
        return features

    def new_history(self, batch: int) -> F32:
        """An empty history, shape [B, HISTORY * features]."""
        return np.zeros((batch, HISTORY * self.features), dtype=np.float32)

    def push(self, history: F32, state: SystemState) -> F32:
        """A new history with `state` in front."""
        keep = (HISTORY - 1) * self.features
        pushed: F32 = np.concatenate([self.encode_state(state), history[:, :keep]], axis=1)
        return pushed

    def observe(self, history: F32, state: SystemState) -> F32:
        """The observation, shape [B, size]; `history` already holds `state`."""
        prediction = self.model.predict(state)
        cheapest = prediction.cost.min(axis=1, keepdims=True)
        if self._excess is None:
            excess = prediction.cost - cheapest
        else:
            excess = self._excess(history, state, prediction)
        parts = [history, np.log(cheapest), np.minimum(excess, MAX_EXCESS)]
        observation: F32 = np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")
        return observation


def idle_probes(state: SystemState, scenario: Scenario) -> F64:
    """Bytes to probe each hop with, [B, H]: where no frame measured it for `probing.idle_s`."""
    probing = scenario.probing
    idle = state.bandwidth_age_s > probing.idle_s
    bytes_: F64 = np.where(idle, probing.size_bytes(state.bytes_per_s), 0.0)
    return bytes_
