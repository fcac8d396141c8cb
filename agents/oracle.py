"""The clairvoyant oracle: what a controller could reach that knows the conditions to come.

It knows every interval's bandwidth, load and arrivals to the last request, decides as often as the
other arms (one plan per interval) and has every plan that they have. Over the true future, in the
simulator with its queues, it looks for the sequence of plans that costs least: a beam search, then
local search on the best sequences. It may also start from the sequences that other arms played on
the same conditions ("incumbents"), so it costs no more than any of them.

What it is: the cost of a sequence that exists, so an upper bound of the least possible cost, and
a lower bound of what any arm compared with it spent. What it is not: a proven optimum (it equals
brute force where that is feasible, `tests/test_oracle.py`; elsewhere the evidence is that a search
twice as wide finds under 1 % less), nor a target: no controller without the future can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.branches import Branches
from agents.controllers import Decision
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
EQUAL = 1e-9  # costs this close (relative to the larger of 1 and them) are the same branch


@dataclass(frozen=True)
class OracleSettings:
    """How hard the oracle looks.

    Attributes:
        width: Sequences that the beam keeps per condition.
        penalties: The beam ranks by cost so far + (1 + penalty) x cost of running out what is
            open; each penalty chooses its share of the beam, so states with short and with long
            queues both live on.
        finalists: Best sequences per condition that local search refines (half of them after
            its first pass).
        promising: Plans that local search tries at each interval.
        holds: For how many intervals it tries them.
        lookahead: Intervals over which a move is judged, with true arrivals.
        sweeps: Most passes of local search.
        least_gain: It ends when a pass gains a smaller share of the cost.
    """

    width: int = 48
    penalties: tuple[float, ...] = (0.0, 1.0, 4.0)
    finalists: int = 3
    promising: int = 48
    holds: tuple[int, ...] = (1, 2, 4)
    lookahead: int = 6
    sweeps: int = 4
    least_gain: float = 1e-3


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
    search_ = _Search(model, pool, settings)
    half = max(1, settings.finalists // 2)
    for cuts in search_.beam(pool.best(half) if incumbents else [])[: settings.finalists]:
        pool.add(cuts)
    search_.refine()
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


class _Search:
    """Beam search and local search over sequences of plans."""

    def __init__(self, model: CostModel, pool: _Pool, settings: OracleSettings) -> None:
        self._actions, self._settings = model.table.cuts, settings
        self._pool, self._branches = pool, pool.branches
        self._batch, self._length = self._branches.tape.batch, len(self._branches.tape)

    def beam(self, rails: list[I64]) -> list[I64]:
        """Sequences [T, B, H] of the beam that is left at the end, the cheapest first.

        Args:
            rails: Sequences that stay in the beam to the end, so that leaving them is tried at
                every interval.
        """
        branches, actions = self._branches, self._actions
        everybody = np.arange(self._batch)
        rail_owner = np.tile(everybody, len(rails))
        rail_cuts = np.concatenate(rails, axis=1) if rails else None
        # Members of the beam first, then the rails; both exist from the start.
        owner = np.concatenate([everybody, rail_owner])
        snapshot, spent = branches.start(owner), np.zeros(len(owner))
        parents: list[I64] = []
        played: list[I64] = []
        for t in range(self._length):
            n, a = len(owner), len(actions)
            parent = np.repeat(np.arange(n), a)
            cuts = np.tile(actions, (n, 1))
            step, rest = branches.spend(snapshot, parent, owner[parent], t, [cuts])
            chosen = self._choose(owner[parent], spent[parent] + step, rest)
            parent, cuts = parent[chosen], cuts[chosen]
            if rail_cuts is not None:
                parent = np.concatenate([parent, np.arange(n - len(rail_owner), n)])
                cuts = np.concatenate([cuts, rail_cuts[t]])
            owner = owner[parent]
            snapshot, step = branches.step(snapshot, parent, owner, t, cuts)
            spent = spent[parent] + step
            parents.append(parent)
            played.append(cuts)
        return self._unwind(owner, spent + branches.open_cost(snapshot, owner), parents, played)

    def _choose(self, owner: I64, spent: F64, rest: F64) -> I64:
        """Which branches stay: per environment the cheapest by each penalty, no state twice."""
        width = max(1, round(self._settings.width / len(self._settings.penalties)))
        chosen: list[I64] = []
        for penalty in self._settings.penalties:
            score = spent + (1.0 + penalty) * rest
            order = np.lexsort((score, owner))
            same = np.zeros(len(order), dtype=bool)
            ranked, of, past = score[order], owner[order], spent[order]
            close = EQUAL * np.maximum(np.abs(ranked[1:]), 1.0)
            same[1:] = (
                (of[1:] == of[:-1])
                & (ranked[1:] - ranked[:-1] <= close)
                & (np.abs(past[1:] - past[:-1]) <= close)
            )
            order, of = order[~same], of[~same]
            count = np.bincount(of, minlength=self._batch)
            rank = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
            chosen.append(order[rank < width])
        return np.unique(np.concatenate(chosen))

    def _unwind(self, owner: I64, total: F64, parents: list[I64], played: list[I64]) -> list[I64]:
        """The last members' whole sequences, by rank in cost."""
        order = np.lexsort((total, owner))
        count = np.bincount(owner, minlength=self._batch)
        first = np.cumsum(count) - count
        sequences = []
        for rank in range(int(count.min())):
            member = order[first + rank]
            cuts = np.empty((self._length, self._batch, self._actions.shape[1]), dtype=np.int64)
            for t in reversed(range(self._length)):
                cuts[t] = played[t][member]
                member = parents[t][member]
            sequences.append(cuts)
        return sequences

    def refine(self) -> None:
        """Local search on the pool's best; what it finds goes into the pool."""
        settings, pool = self._settings, self._pool
        for k in range(settings.sweeps):
            before = pool.cost()
            donors = pool.best(settings.finalists)
            parts = donors if k == 0 else donors[: max(1, settings.finalists // 2)]
            owner = np.tile(np.arange(self._batch), len(parts))
            swept = self._sweep(np.concatenate(parts, axis=1), owner, donors)
            for part in np.split(swept, len(parts), axis=1):
                pool.add(part)
            if before - pool.cost() <= settings.least_gain * before:
                break

    def _sweep(self, cuts: I64, owner: I64, donors: list[I64]) -> I64:
        """One pass of local search: from every interval on, try other plans for a while."""
        branches, n = self._branches, len(owner)
        cuts = cuts.copy()
        everybody = np.arange(n)
        snapshot = branches.start(owner)
        for t in range(self._length):
            if t >= self._pool.startup:
                tried = self._moves(snapshot, cuts, owner, t, donors)
                parent = np.repeat(everybody, tried.shape[2])
                plans = list(tried.reshape(len(tried), len(parent), -1))
                spent, rest = branches.spend(snapshot, parent, owner[parent], t, plans)
                total = (spent + rest).reshape(n, -1)
                best = total.argmin(axis=1)
                gain = total[:, 0] - total[everybody, best]
                best[gain <= EQUAL * np.maximum(total[:, 0], 1.0)] = 0
                cuts[t : t + len(tried)] = tried[:, everybody, best]
            snapshot, _ = branches.step(snapshot, everybody, owner, t, cuts[t])
        return cuts

    def _moves(self, snapshot: Snapshot, cuts: I64, owner: I64, t: int, donors: list[I64]) -> I64:
        """What to try from interval t on, [L, n, moves, H]; the first move is to change nothing.

        The others hold one of the most promising plans for a while, or do what another good
        sequence does.
        """
        settings = self._settings
        ahead = min(settings.lookahead, self._length - t)
        plans = self._promising(snapshot, cuts, owner, t)
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

    def _promising(self, snapshot: Snapshot, cuts: I64, owner: I64, t: int) -> I64:
        """The plans [n, few, H] that cost least when held for two intervals, for each branch."""
        actions, n = self._actions, len(owner)
        few = self._settings.promising
        if few >= len(actions):
            return np.broadcast_to(actions, (n, *actions.shape))
        parent = np.repeat(np.arange(n), len(actions))
        held, later = np.tile(actions, (n, 1)), cuts[t + 2 : t + PROMISING_INTERVALS]
        plans = [held, held, *(c[parent] for c in later)][: self._length - t]
        spent, rest = self._branches.spend(snapshot, parent, owner[parent], t, plans)
        total = (spent + rest).reshape(n, -1)
        return actions[np.argpartition(total, few - 1, axis=1)[:, :few]]
