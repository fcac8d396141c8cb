"""The clairvoyant oracle: what a controller could reach that knows the conditions to come.

It knows every interval's bandwidth, load and arrivals to the last request, decides as often as the
other arms (one plan per interval) and has every plan that they have. Over the true future, in the
simulator with its queues, it looks for the sequence of plans that costs least: a beam search, then
local search on the best sequences. It may also start from the sequences that other arms played on
the same conditions ("incumbents"), each improved by local search first, so it costs no more than
any of them.

What it is: the cost of a sequence that exists, so an upper bound of the least possible cost, and
a lower bound of what any arm compared with it spent. What it is not: a proven optimum (it equals
brute force where that is feasible, `tests/test_oracle.py`; elsewhere a search twice as wide changes
the cost by less than 1 % in most cells, docs/arms.md), nor a target: no controller without the
future can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.arms.beam import Beam
from agents.arms.branches import EQUAL, Branches
from agents.arms.controllers import Decision
from env.predict import CostModel
from env.simulator import Snapshot
from env.state import SystemState
from env.tape import Tape
from executor.errors import ConfigError

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["Oracle", "OracleSettings", "PlanSequence", "search"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

PROMISING_INTERVALS = 4  # over which a plan is judged before it is tried at length


@dataclass(frozen=True)
class OracleSettings:
    """How hard the oracle looks.

    Attributes:
        width: Sequences that the beam keeps per condition.
        screened: So many times as many are judged at length, at each interval.
        guided: For so many intervals, in which they follow the cheapest sequence known before,
            and the best plan held throughout.
        penalties: The beam ranks by cost so far + (1 + penalty) x cost of running out what is
            open; each penalty chooses its share of the beam, so states with short and with long
            queues both live on.
        finalists: Best sequences per condition that local search refines (half of them after
            its first pass).
        promising: Plans that either search tries at each interval, of those there are.
        holds: For how many intervals it tries them.
        lookahead: Intervals over which a move is judged, with true arrivals.
        survivors: So many of the moves are then judged over `long` intervals.
        long: See `survivors`.
        sweeps: Most passes of local search.
        least_gain: It ends when a pass gains a smaller share of the cost.
    """

    width: int = 384
    screened: int = 3
    guided: int = 8
    penalties: tuple[float, ...] = (0.0, 1.0, 4.0)
    finalists: int = 4
    promising: int = 192
    holds: tuple[int, ...] = (1, 2, 4)
    lookahead: int = 5
    survivors: int = 8
    long: int = 24
    sweeps: int = 4
    least_gain: float = 1e-3

    def wider(self, factor: int) -> OracleSettings:
        """So many times the sequences kept, the sequences refined and the plans tried."""
        return replace(
            self,
            width=factor * self.width,
            finalists=factor * self.finalists,
            promising=factor * self.promising,
        )


@dataclass(frozen=True)
class PlanSequence:
    """What to do in each of T intervals, for B environments.

    Attributes:
        cuts: [T, B, H].
        probe_bytes: [T, B, H] probes sent; None for none.
    """

    cuts: I64
    probe_bytes: F64 | None = None

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> PlanSequence:
        """What a controller decided, interval by interval."""
        cuts = np.array([d.cuts for d in decisions])
        none = np.zeros(cuts.shape[1:])
        probes = np.array([none if d.probe_bytes is None else d.probe_bytes for d in decisions])
        return cls(cuts, probes if probes.any() else None)


class Oracle:
    """Plays a sequence that was found in advance; see this module's docstring.

    Args:
        sequence: For the conditions that it will be run on.
    """

    name = "oracle"

    def __init__(self, sequence: PlanSequence) -> None:
        self._sequence = sequence
        self._t = 0

    def reset(self, model: CostModel, batch: int) -> None:
        """Start from the first interval."""
        if self._sequence.cuts.shape[1] != batch:
            raise ConfigError(
                f"the oracle looked ahead for {self._sequence.cuts.shape[1]} environments, got "
                f"{batch}"
            )
        self._t = 0

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """What the sequence says for this interval."""
        t, probes = self._t, self._sequence.probe_bytes
        if t >= len(self._sequence.cuts):
            raise ConfigError(f"the oracle looked only {t} intervals ahead")
        self._t += 1
        return Decision(self._sequence.cuts[t], None if probes is None else probes[t])


def search(
    model: CostModel,
    tape: Tape,
    *,
    startup: int = 0,
    incumbents: Sequence[PlanSequence] = (),
    settings: OracleSettings | None = None,
) -> PlanSequence:
    """The cheapest sequence found for each environment of a tape.

    Args:
        model: The system's cost model.
        tape: The future.
        startup: What the first so many intervals spend is not part of what is compared.
        incumbents: Sequences to do no worse than.
        settings: How hard to look.

    Raises:
        ConfigError: An incumbent is not as long or as wide as the tape.
    """
    settings = settings or OracleSettings()
    shape = (len(tape), tape.batch, len(model.profile.hops))
    for incumbent in incumbents:
        if incumbent.cuts.shape != shape:
            raise ConfigError(f"incumbents must have shape {shape}, got {incumbent.cuts.shape}")
    pool = _Pool(Branches(model, tape), startup)
    for incumbent in incumbents:
        pool.add(incumbent.cuts)  # who knows the future needs no probes
        if incumbent.probe_bytes is not None and incumbent.probe_bytes.any():
            pool.add(incumbent.cuts, incumbent.probe_bytes)
    held = np.broadcast_to(pool.branches.best_held(model.table.cuts, startup), shape)
    pool.add(held)
    local = _LocalSearch(model.table.cuts, pool, settings)
    if incumbents and settings.sweeps:
        # Each for itself: they differ more than what one beam ends with.
        local.improve(pool.best(len(incumbents) + 1), pool.best(settings.finalists))
    half = max(1, settings.finalists // 2)
    guides = [*pool.best(1), held] if incumbents else [held]
    beam = Beam(pool.branches, model.table.cuts, settings, startup)
    for cuts in beam.run(pool.best(half), guides)[: settings.finalists]:
        pool.add(cuts)
    local.refine()
    return pool.winner()


class _Pool:
    """Whole sequences and what they cost."""

    def __init__(self, branches: Branches, startup: int) -> None:
        self.branches, self.startup = branches, startup
        self._cuts: list[I64] = []
        self._probes: list[F64 | None] = []
        self._totals: list[F64] = []

    def add(self, cuts: I64, probes: F64 | None = None) -> F64:
        """Take a sequence [T, B, H] in; returns its costs [B]."""
        total = self.branches.total(cuts, self.startup, probes)
        self._cuts.append(cuts)
        self._probes.append(probes)
        self._totals.append(total)
        return total

    def cost(self) -> float:
        """Of the cheapest sequences, all environments together."""
        return float(np.min(self._totals, axis=0).sum())

    def best(self, count: int) -> list[I64]:
        """The `count` cheapest sequences of each environment, as far as they differ in cost."""
        totals = np.array(self._totals)
        order = np.argsort(totals, axis=0, kind="stable")
        ranked = np.take_along_axis(totals, order, axis=0)
        again = np.zeros(ranked.shape, dtype=bool)
        again[1:] = ranked[1:] - ranked[:-1] <= EQUAL * np.maximum(ranked[1:], 1.0)
        fresh_first = np.argsort(again, axis=0, kind="stable")
        order = np.take_along_axis(order, fresh_first, axis=0)
        return [self._assemble(row) for row in order[:count]]

    def _assemble(self, which: I64) -> I64:
        """Sequence which[b] of each environment b."""
        columns = [self._cuts[k][:, b] for b, k in enumerate(which)]
        return np.stack(columns, axis=1)

    def winner(self) -> PlanSequence:
        """The cheapest of each environment, with its probes."""
        which = np.argmin(self._totals, axis=0)
        cuts = self._assemble(which)
        probes = np.zeros(cuts.shape)
        for b, k in enumerate(which):
            sent = self._probes[k]
            if sent is not None:
                probes[:, b] = sent[:, b]
        return PlanSequence(cuts, probes if probes.any() else None)


class _LocalSearch:
    """Local search on a pool's best sequences."""

    def __init__(self, actions: I64, pool: _Pool, settings: OracleSettings) -> None:
        self._actions, self._settings = actions, settings
        self._pool, self._branches = pool, pool.branches
        self._batch, self._length = self._branches.tape.batch, len(self._branches.tape)

    def refine(self) -> None:
        """Local search on the pool's best; what it finds goes into the pool."""
        settings, pool = self._settings, self._pool
        for k in range(settings.sweeps):
            before = pool.cost()
            donors = pool.best(settings.finalists)
            self.improve(donors if k == 0 else donors[: max(1, settings.finalists // 2)], donors)
            if before - pool.cost() <= settings.least_gain * before:
                break

    def improve(self, parts: list[I64], donors: list[I64]) -> None:
        """One pass over each of `parts`, which may copy from `donors`; into the pool."""
        owner = np.tile(np.arange(self._batch), len(parts))
        swept = self._sweep(np.concatenate(parts, axis=1), owner, donors)
        for part in np.split(swept, len(parts), axis=1):
            self._pool.add(part)

    def _sweep(self, cuts: I64, owner: I64, donors: list[I64]) -> I64:
        """From every interval on, try other plans for a while."""
        cuts, everybody = cuts.copy(), np.arange(len(owner))
        snapshot = self._branches.start(owner)
        for t in range(self._length):
            rows = np.flatnonzero(self._branches.busy[t][owner])
            if t >= self._pool.startup and len(rows):
                better = self._improved(snapshot, cuts[:, rows], owner[rows], rows, t, donors)
                cuts[t : t + len(better), rows] = better
            snapshot, _ = self._branches.step(snapshot, everybody, owner, t, cuts[t])
        return cuts

    def _improved(
        self, snapshot: Snapshot, cuts: I64, owner: I64, rows: I64, t: int, donors: list[I64]
    ) -> I64:
        """The best found for the intervals from t on, [L, n, H], of sequences `cuts` [T, n, H].

        Many moves are judged over a few intervals. Where the best of them leave other queues
        behind than changing nothing does, these are judged again over many.
        """
        settings, each = self._settings, np.arange(len(rows))
        tried = self._moves(snapshot, cuts, owner, rows, t, donors)
        spent, rest = self._costs(snapshot, tried, owner, rows, t)
        total = spent + rest
        first = total.copy()
        first[:, 0] = -np.inf  # to change nothing stays in
        few = min(settings.survivors + 1, total.shape[1])
        kept = np.sort(np.argpartition(first, few - 1, axis=1)[:, :few], axis=1)
        total, rest = (np.take_along_axis(x, kept, axis=1) for x in (total, rest))
        tried = np.take_along_axis(tried, kept[None, :, :, None], axis=2)
        later = cuts[t + len(tried) : t + settings.long]
        apart = np.abs(rest - rest[:, :1]) > EQUAL * np.maximum(rest[:, :1], 1.0)
        unsure = np.flatnonzero(apart.any(axis=1))
        if len(later) and len(unsure):
            followed = np.repeat(later[:, unsure, None], few, axis=2)
            at_length = np.concatenate([tried[:, unsure], followed])
            spent, rest = self._costs(snapshot, at_length, owner[unsure], rows[unsure], t)
            total[unsure] = spent + rest
        best = total.argmin(axis=1)
        gain = total[:, 0] - total[each, best]
        best[gain <= EQUAL * np.maximum(total[:, 0], 1.0)] = 0
        return tried[:, each, best]

    def _costs(
        self, snapshot: Snapshot, tried: I64, owner: I64, rows: I64, t: int
    ) -> tuple[F64, F64]:
        """Costs [n, moves] of plans tried [L, n, moves, H] from t on, and of running out then."""
        ahead, n, moves, hops = tried.shape
        plans = list(tried.reshape(ahead, n * moves, hops))
        parent, of = np.repeat(rows, moves), np.repeat(owner, moves)
        spent, rest = self._branches.spend(snapshot, parent, of, t, plans)
        return spent.reshape(n, moves), rest.reshape(n, moves)

    def _moves(
        self, snapshot: Snapshot, cuts: I64, owner: I64, rows: I64, t: int, donors: list[I64]
    ) -> I64:
        """What to try from interval t on, [L, n, moves, H]; the first move is to change nothing.

        The others hold one of the most promising plans for a while, or do what another good
        sequence does.
        """
        settings = self._settings
        ahead = min(settings.lookahead, self._length - t)
        plans = self._promising(snapshot, cuts, owner, rows, t)
        few = plans.shape[1]
        moves = 1 + len(settings.holds) * (few + len(donors))
        tried = np.repeat(cuts[t : t + ahead, :, None], moves, axis=2)
        given = np.stack([d[t : t + ahead, owner] for d in donors], axis=2)
        for h, hold in enumerate(settings.holds):
            first = 1 + h * (few + len(donors))
            tried[:hold, :, first : first + few] = plans
            # A borrowed stretch may be twice as long: it changes plans on its way.
            tried[: 2 * hold, :, first + few : first + few + len(donors)] = given[: 2 * hold]
        return tried

    def _promising(self, snapshot: Snapshot, cuts: I64, owner: I64, rows: I64, t: int) -> I64:
        """The plans [n, few, H] that cost least when held for two intervals, for each branch."""
        actions, n = self._actions, len(owner)
        few = self._settings.promising
        if few >= len(actions):
            return np.broadcast_to(actions, (n, *actions.shape))
        held = np.broadcast_to(actions, (2, n, *actions.shape))
        later = cuts[t + 2 : t + PROMISING_INTERVALS, :, None]
        plans = np.concatenate([held, np.repeat(later, len(actions), axis=2)])
        spent, rest = self._costs(snapshot, plans[: self._length - t], owner, rows, t)
        return actions[np.argpartition(spent + rest, few - 1, axis=1)[:, :few]]
