"""The reference's adaptive scheduler (arXiv 2605.09623), as a controller.

It runs 50 inferences at the static split and 15 at each of three probe splits, fits one rate per
node, probes the hops, and picks the split of lowest score. Afterwards it refits, re-probes and
searches again every 100 inferences (`paper`) or at every interval (`paper-1s`). All environments of
a batch are searched in one pass of array code.

Where the reference leaves something open, the reading that serves it best in our measurements is
taken: the score's normalisers are those of the start-up's fit, kept (not refreshed at every
search); and the deadline is missed when the running split's own estimate is over it (waiting time,
which its estimate and its closed loop do not know, would force a switch at every decision while
there is a queue).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Decision, static_thirds
from env.cost import PAPER_CLOUD_W, PAPER_EDGE_W, PAPER_FOG_W
from env.predict import CostModel, PlanTable
from env.state import SystemState
from executor.errors import ConfigError
from executor.plan import ModelSpec, Plan, is_constrained

if TYPE_CHECKING:
    from env.simulator import Completed
    from env.system import StepResult

__all__ = ["Estimates", "Paper", "PaperSettings", "SplitModel", "probe_splits"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

LAST_PROBE, STEADY = 3, 4  # phases: 0 static split, 1-3 probe splits, 4 steady state


@dataclass(frozen=True)
class PaperSettings:
    """The scheduler's constants; those the reference does not state are marked (ours).

    Attributes:
        every_inferences: Completed inferences between two decisions; None decides at every
            interval.
        constrained: Its own rule: no tier empty, head on the last node. False also lets it skip
            tiers, which its tables show to be better.
        startup_static: Inferences at the static split before anything else.
        startup_probe: Inferences at each of the three probe splits.
        window: Inferences in the last window, which refits use beside the start-up data.
        improvement: Share by which the score must improve to switch.
        deadline_s: L_max (ours: None takes the scenario's deadline).
        w_end: Weight of edge energy (ours: None takes the scenario's).
        w_tot: Weight of total energy (ours: None takes the scenario's).
        w_lat: Weight of latency (ours: None takes the scenario's).
        edge_w: Watts of the edge's constant-power meter.
        fog_w: Watts while the middle nodes compute; from its single-device table. With a meter of
            constant power the fitted rho is this very constant, so it is not fitted again.
        cloud_w: Watts while the last node computes; from its single-device table.
    """

    every_inferences: int | None = 100
    constrained: bool = False
    startup_static: int = 50
    startup_probe: int = 15
    window: int = 100
    improvement: float = 0.03
    deadline_s: float | None = None
    w_end: float | None = None
    w_tot: float | None = None
    w_lat: float | None = None
    edge_w: float = PAPER_EDGE_W
    fog_w: float = PAPER_FOG_W
    cloud_w: float = PAPER_CLOUD_W

    def __post_init__(self) -> None:
        if self.every_inferences is not None and self.every_inferences < 1:
            raise ConfigError(f"every_inferences must be >= 1, got {self.every_inferences}")
        if min(self.startup_static, self.startup_probe, self.window) < 1:
            raise ConfigError(
                "startup_static, startup_probe and window must be >= 1, got "
                f"{self.startup_static}, {self.startup_probe}, {self.window}"
            )
        if not 0 <= self.improvement < 1:
            raise ConfigError(f"improvement must lie in 0..1, got {self.improvement}")


def probe_splits(spec: ModelSpec, n_nodes: int) -> tuple[Plan, Plan, Plan]:
    """Edge-heavy, balanced and cloud-heavy splits, at fifths of the feature range.

    For three nodes (3/5, 4/5), (2/5, 3/5) and (1/5, 2/5) of the features; N nodes use N + 2 parts.
    """
    grid = [round(spec.head_start * k / (n_nodes + 2)) for k in range(n_nodes + 3)]
    heavy, balanced, light = (Plan(tuple(grid[s : s + n_nodes - 1])) for s in (3, 2, 1))
    return heavy, balanced, light


@dataclass(frozen=True)
class Estimates:
    """Per environment and split, shape [B, P] each: seconds and joules of one inference."""

    latency_s: F64
    edge_j: F64
    total_j: F64


class SplitModel:
    """Its estimate of every split: all non-decreasing tuples of unit cuts.

    Attributes:
        cuts: [P, H] every split.
        share: [P, N] each node's share of the layer weights W.
        allowed: [P] splits that may be picked.

    Args:
        model: Profile and scenario of the system.
        settings: The scheduler's settings.
    """

    def __init__(self, model: CostModel, settings: PaperSettings) -> None:
        profile = model.profile
        n, n_nodes = profile.spec.n_units, profile.n_nodes
        every = list(combinations_with_replacement(range(n + 1), n_nodes - 1))
        self.cuts: I64 = np.array(every, dtype=np.int64)
        self._index = {c: i for i, c in enumerate(every)}
        weights = np.array(profile.nodes[0].unit_s)
        self._prefix: F64 = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        self.share = self.shares(self.cuts)
        self._crossed: F64 = (self.cuts < n).astype(np.float64)
        self._bytes: F64 = PlanTable(profile, [Plan(c) for c in every]).hop_bytes
        constrained = settings.constrained or model.scenario.constrained
        self.allowed: Mask = np.array(
            [not constrained or is_constrained(Plan(c), profile.spec) for c in every]
        )
        middle = [settings.fog_w] * (n_nodes - 2)
        self.rho_w: F64 = np.array([settings.edge_w, *middle, settings.cloud_w])
        default = model.scenario.weights
        self._w_end = default.edge_energy if settings.w_end is None else settings.w_end
        self._w_tot = default.total_energy if settings.w_tot is None else settings.w_tot
        self._w_lat = default.latency if settings.w_lat is None else settings.w_lat
        self.static = self.index(static_thirds(profile.spec, n_nodes))
        self.probes = [self.index(p) for p in probe_splits(profile.spec, n_nodes)]

    def index(self, plan: Plan) -> int:
        """Position of a plan among the splits."""
        return self._index[plan.cuts]

    def shares(self, cuts: I64) -> F64:
        """Share of W that each node runs under `cuts` [R, H]; shape [R, N]."""
        zero, one = np.zeros((len(cuts), 1)), np.ones((len(cuts), 1))
        bounds = np.concatenate([zero, self._prefix[cuts], one], axis=1)
        out: F64 = np.diff(bounds, axis=1)
        return out

    def estimate(self, sigma_s: F64, bytes_per_s: F64, omega_s: F64) -> Estimates:
        """Estimate every split.

        Args:
            sigma_s: [B, N] fitted seconds of a whole model on each node.
            bytes_per_s: [B, H] beta, the hops' bandwidth.
            omega_s: [B, H] fixed time per hop.
        """
        node_s = sigma_s[:, None, :] * self.share  # [B, P, N]
        hop_s = omega_s @ self._crossed.T + (1.0 / np.maximum(bytes_per_s, 1.0)) @ self._bytes.T
        edge_j = self.rho_w[0] * node_s[..., 0]
        latency_s: F64 = node_s.sum(axis=2) + hop_s
        return Estimates(latency_s, edge_j, node_s @ self.rho_w)

    def probe_means(self, estimates: Estimates) -> F64:
        """Its normalisers: edge energy, total energy, latency at the probe splits; [B, 3]."""
        terms = (estimates.edge_j, estimates.total_j, estimates.latency_s)
        means = np.stack([term[:, self.probes].mean(axis=1) for term in terms], axis=1)
        out: F64 = np.maximum(means, 1e-12)
        return out

    def score(self, estimates: Estimates, means: F64) -> F64:
        """Its score S, shape [B, P], with normalisers [B, 3]."""
        out: F64 = (
            self._w_end * estimates.edge_j / means[:, [0]]
            + self._w_tot * estimates.total_j / means[:, [1]]
            + self._w_lat * estimates.latency_s / means[:, [2]]
        )
        return out


class _Samples:
    """What was measured: sums of the start-up's samples, and the last window one by one."""

    def __init__(self, batch: int, n_nodes: int, window: int) -> None:
        self.window = window
        self._start_tw = np.zeros((batch, n_nodes))
        self._start_ww = np.zeros((batch, n_nodes))
        self._stage_s = np.zeros((batch, window, n_nodes))
        self._share = np.zeros((batch, window, n_nodes))
        self._count = np.zeros(batch, dtype=np.int64)

    def add(self, done: Completed, share: F64, starting: Mask) -> None:
        """Take the completed requests of one interval; `starting` [B] are still starting up."""
        early = starting[done.env] & ~done.lost
        np.add.at(self._start_tw, done.env[early], (done.stage_s * share)[early])
        np.add.at(self._start_ww, done.env[early], (share * share)[early])
        late = np.flatnonzero(~starting[done.env] & ~done.lost)
        late = late[np.lexsort((done.completion_s[late], done.env[late]))]
        env = done.env[late]
        if not len(env):
            return
        position = np.arange(len(env)) - np.searchsorted(env, env)
        slot = (self._count[env] + position) % self.window
        self._stage_s[env, slot] = done.stage_s[late]
        self._share[env, slot] = share[late]
        self._count += np.bincount(env, minlength=len(self._count))

    def sigma_s(self) -> F64:
        """Seconds of a whole model per node: least squares through the origin, [B, N]."""
        tw = self._start_tw + (self._stage_s * self._share).sum(axis=1)
        ww = self._start_ww + (self._share * self._share).sum(axis=1)
        out: F64 = tw / np.maximum(ww, 1e-12)
        return out


class Paper:
    """The scheduler, one per environment.

    Decisions fall on interval boundaries: "every 100 inferences" is the first boundary with 100
    completions since the last decision. The hops' two-point probe is sent in the interval before,
    so that its result is in the state the decision sees.

    Args:
        settings: Its constants.
        name: The arm's name.
    """

    def __init__(self, settings: PaperSettings | None = None, name: str = "paper") -> None:
        self.name = name
        self.settings = settings or PaperSettings()

    def reset(self, model: CostModel, batch: int) -> None:
        """Begin the start-up in every environment."""
        s = self.settings
        self._splits = SplitModel(model, s)
        self._samples = _Samples(batch, model.profile.n_nodes, s.window)
        self._deadline_s = model.references.deadline_s if s.deadline_s is None else s.deadline_s
        self._payload_bytes = float(model.scenario.probing.paper_bytes)
        self._startup = np.array([self._splits.static, *self._splits.probes])
        every = s.every_inferences or 0
        self._quota = np.array([s.startup_static] + [s.startup_probe] * 3 + [every])
        self._phase = np.zeros(batch, dtype=np.int64)
        self._count = np.zeros(batch, dtype=np.int64)
        self._plan = np.full(batch, self._splits.static)
        self._probed = np.zeros(batch, dtype=bool)
        self._means = np.ones((batch, 3))

    @property
    def started(self) -> Mask:
        """[B] whether the start-up is over and the first split picked."""
        return self._phase >= STEADY

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Take in what completed, move on where a quota is reached, and ask for probes."""
        got = self._observe(last)
        full = self._count >= self._quota[self._phase]
        ready = full & ((self._phase < LAST_PROBE) | self._probed)
        searching = ready & (self._phase >= LAST_PROBE)
        if searching.any():
            self._search(state, searching)
        advancing = ready & ~self.started
        self._phase[advancing] += 1
        starting = advancing & ~self.started
        self._plan[starting] = self._startup[self._phase[starting]]
        self._count[ready] = 0
        due_next = self._count + got >= self._quota[self._phase]
        self._probed = (self._phase >= LAST_PROBE) & due_next
        cuts = self._splits.cuts[self._plan]
        probe = np.where(self._probed, self._payload_bytes, 0.0)
        return Decision(cuts, np.repeat(probe[:, None], cuts.shape[1], axis=1))

    def _observe(self, last: StepResult | None) -> I64:
        """Store the last interval's measurements; returns the completions counted, [B]."""
        batch = len(self._phase)
        if last is None:
            return np.zeros(batch, dtype=np.int64)
        done = last.completed
        if done is None:
            raise ConfigError(
                "the paper's scheduler needs each request's measurements: make the simulator with "
                "record_requests=True"
            )
        self._samples.add(done, self._splits.shares(done.cuts), ~self.started)
        # During start-up only what ran at the phase's own split counts towards its quota.
        own = (done.cuts == self._splits.cuts[self._plan][done.env]).all(axis=1)
        counted = ~done.lost & (own | self.started[done.env])
        got = np.bincount(done.env[counted], minlength=batch)
        self._count += got
        return got

    def _search(self, state: SystemState, where: Mask) -> None:
        """Refit, estimate every split and switch by its rules, in the environments `where`."""
        rows = np.flatnonzero(where)
        splits, running, first = self._splits, self._plan[rows], ~self.started[rows]
        estimates = splits.estimate(
            self._samples.sigma_s()[rows], state.bytes_per_s[rows], state.rtt_s[rows]
        )
        self._means[rows[first]] = splits.probe_means(estimates)[first]
        score = splits.score(estimates, self._means[rows])
        at = np.arange(len(rows))
        valid = splits.allowed & (estimates.latency_s <= self._deadline_s)
        valid &= score <= score[:, [splits.static]]
        valid[at[~first], running[~first]] = False
        best = np.where(valid, score, np.inf).argmin(axis=1)
        found = valid.any(axis=1)
        missed = estimates.latency_s[at, running] > self._deadline_s
        improved = score[at, best] <= (1.0 - self.settings.improvement) * score[at, running]
        switch = found & (first | missed | improved)
        fall_back = ~found & (first | missed)
        self._plan[rows] = np.where(switch, best, np.where(fall_back, splits.static, running))
