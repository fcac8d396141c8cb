"""Beam search over sequences of plans under a known future: the oracle's first step.

Every branch is a state of the simulator. What it is worth shows only later, so branches are ranked
in several ways, each choosing a share of the beam: by what has been spent and what running out the
open requests will cost, that weighted more or less; and by playing them on for some intervals, true
arrivals included, along a sequence that somebody else found good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.arms.branches import EQUAL, Branches
from env.simulator import Snapshot

if TYPE_CHECKING:
    from agents.arms.oracle import OracleSettings

__all__ = ["Beam"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Of a start-up that does not count, only the queues at its end matter.
LEAD_INTERVALS, NARROWER = 10, 8
SURVEYED = 4  # members of a beam that are asked which plans are worth trying


class Beam:
    """The better branches of every environment of a tape, interval by interval.

    Args:
        branches: Tell what a branch costs.
        actions: [A, H] the plans there are.
        settings: How many are kept, and how they are judged.
        startup: What the first so many intervals spend does not count.
    """

    def __init__(
        self, branches: Branches, actions: I64, settings: OracleSettings, startup: int
    ) -> None:
        self._branches, self._actions = branches, actions
        self._settings, self._startup = settings, startup
        self._batch, self._length = branches.tape.batch, len(branches.tape)

    def run(self, rails: list[I64], guides: list[I64]) -> list[I64]:
        """Sequences [T, B, H] of the beam that is left at the end, the cheapest first.

        Args:
            rails: Sequences that stay in the beam to the end, so that leaving them is tried at
                every interval.
            guides: Sequences that a branch follows while it is judged at length.
        """
        branches, startup = self._branches, self._startup
        everybody = np.arange(self._batch)
        rail_owner, rail_cuts = np.tile(everybody, len(rails)), np.concatenate(rails, axis=1)
        # Members of the beam first, then the rails; both exist from the start.
        owner = np.concatenate([everybody, rail_owner])
        snapshot, spent = branches.start(owner), np.zeros(len(owner))
        parents: list[I64] = []
        played: list[I64] = []
        for t in range(self._length):
            members = len(owner) - len(rail_owner)
            parent, cuts = self._grown(snapshot, owner, spent, t, guides)
            parent = np.concatenate([parent, np.arange(members, len(owner))])
            cuts = np.concatenate([cuts, rail_cuts[t]])
            owner = owner[parent]
            snapshot, step = branches.step(snapshot, parent, owner, t, cuts)
            spent = spent[parent] + (step if t >= startup else 0.0)
            parents.append(parent)
            played.append(cuts)
        return self._unwind(owner, spent + branches.open_cost(snapshot, owner), parents, played)

    def _grown(
        self, snapshot: Snapshot, owner: I64, spent: F64, t: int, guides: list[I64]
    ) -> tuple[I64, I64]:
        """The members after interval t: which each comes from [n], and its plan [n, H].

        The better branches are judged a second time, at length.
        """
        settings, branches = self._settings, self._branches
        width = settings.width
        if t < self._startup - LEAD_INTERVALS:
            width //= NARROWER
        n, actions = len(owner), self._actions
        tried = self._worth_trying(snapshot, owner, spent, t)
        count = np.where(branches.busy[t][owner], tried.shape[1], 1)
        parent = np.repeat(np.arange(n), count)
        number = np.arange(len(parent)) - np.repeat(np.cumsum(count) - count, count)
        which = tried[owner[parent], number]
        step, rest = branches.spend(snapshot, parent, owner[parent], t, [actions[which]])
        past = spent[parent] + step
        keep = self._choose(owner[parent], past, rest, settings.screened * width)
        parent, which, past, rest = parent[keep], which[keep], past[keep], rest[keep]
        of, ahead = owner[parent], slice(t + 1, t + 1 + settings.guided)
        if t + 1 == self._length:
            guides = []
        share = width // (1 + len(guides))
        # Every way of judging errs: one sees no requests to come, the others follow poor guides.
        kept = [self._choose(of, past, rest, share)]
        for guide in guides:
            plans = [actions[which], *(cuts[of] for cuts in guide[ahead])]
            step, rest = branches.spend(snapshot, parent, of, t, plans)
            kept.append(self._choose(of, spent[parent] + step, rest, share))
        keep = np.unique(np.concatenate(kept))
        return parent[keep], actions[which[keep]]

    def _worth_trying(self, snapshot: Snapshot, owner: I64, spent: F64, t: int) -> I64:
        """Indices [B, few] of the plans that do well for some members of each beam."""
        actions, batch = self._actions, self._batch
        few = min(self._settings.promising, len(actions))
        if few == len(actions):
            return np.tile(np.arange(few), (batch, 1))
        # Who spent little so far has the longest queues; ask members all along that line.
        order, count = np.lexsort((spent, owner)), np.bincount(owner, minlength=batch)
        share = np.linspace(0.0, 1.0, SURVEYED)[:, None]
        asked = order[np.cumsum(count) - count + np.round(share * (count - 1)).astype(np.int64)]
        parent = np.repeat(asked.T.reshape(-1), len(actions))
        plans = np.tile(actions, (batch * SURVEYED, 1))
        step, rest = self._branches.spend(snapshot, parent, owner[parent], t, [plans])
        above = np.full((batch, len(actions)), np.inf)
        for penalty in self._settings.penalties:
            score = (step + (1.0 + penalty) * rest).reshape(batch, SURVEYED, len(actions))
            above = np.minimum(above, (score - score.min(axis=2, keepdims=True)).min(axis=1))
        return np.argpartition(above, few - 1, axis=1)[:, :few]

    def _choose(self, owner: I64, spent: F64, rest: F64, width: int) -> I64:
        """Which branches stay: per environment the cheapest by each penalty, no state twice."""
        width = max(1, round(width / len(self._settings.penalties)))
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
