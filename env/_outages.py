"""A hop that is down, as the nodes see and survive it (`executor.recovery`).

A hop over which nothing has come for as long as the executor is patient (`CostModel.patience_s`, at
least `SILENT_AFTER_S`) is down, and so are the nodes behind it: no controller may use them, what is
submitted runs in front of it, and what was on its way over it is sent again, cut short at the last
node that can be reached. When the hop carries again, so do they.

The nodes notice within their heartbeats; here it is noticed at the end of the interval in which the
silence has lasted so long. What is sent again starts from its input, behind what waits at the first
node already, and so does what had only its output still on the way. Its earlier try is forgotten
everywhere, while real nodes may compute on for a while.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from env._chain import REPLY_RATE_FLOOR, Chain
from env._stations import RequestStore, Station
from env.conditions import IntervalConditions
from executor.recovery import SILENT_AFTER_S

__all__ = ["Outages"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Outages:
    """Which hops are down in B environments; never changes.

    Args:
        silent_s: [B, H] seconds, up to now, in which a hop has carried nothing.
        patience_s: [H] after how many of them it is down. Nothing more is heard of those behind
            another that is silent; what was known of them stays.

    Attributes:
        first_down: [B] the first hop that is down; H where none is.
        any: Whether there is one.
    """

    def __init__(self, silent_s: F64, patience_s: F64) -> None:
        self.silent_s, self._patience_s = silent_s, patience_s
        self.any = False
        if silent_s.any():
            # How long one in front of it has been silent, so that nothing is known of a hop since.
            unseen_s = np.maximum.accumulate(np.maximum(silent_s - SILENT_AFTER_S, 0.0), axis=1)
            unseen_s = np.pad(unseen_s[:, :-1], ((0, 0), (1, 0)))
            down = silent_s - unseen_s >= patience_s - 1e-9  # sums of sub-steps
            self.any = bool(down.any())
            self.first_down: I64 = np.where(
                down.any(axis=1), down.argmax(axis=1), silent_s.shape[1]
            )
        else:
            self.first_down = np.full(len(silent_s), silent_s.shape[1])

    @classmethod
    def at_start(cls, coming: IntervalConditions, patience_s: F64) -> Outages:
        """Before the first interval: the nodes have waited long enough to miss who is silent."""
        dead = _dead(coming.hop_bytes_per_s[:, :, 0])
        return cls(np.where(dead, patience_s, 0.0), patience_s)

    def take(self, index: I64) -> Outages:
        """Environment b of the result is as this one's environment index[b]."""
        return Outages(self.silent_s[index], self._patience_s)

    def after(self, conditions: IntervalConditions, substep_s: float) -> Outages:
        """What it is once an interval has passed."""
        dead = _dead(conditions.hop_bytes_per_s)
        if not dead.any():
            if not self.silent_s.any():
                return self
            return Outages(np.zeros_like(self.silent_s), self._patience_s)
        count = dead.shape[2]
        alive = ~dead[:, :, ::-1]
        trailing = np.where(alive.any(axis=2), alive.argmax(axis=2), count)
        before = np.where(trailing == count, self.silent_s, 0.0)
        return Outages(before + trailing * substep_s, self._patience_s)

    def node_up(self) -> Mask:
        """Which nodes can be reached, [B, N]."""
        n_nodes = self.silent_s.shape[1] + 1
        up: Mask = np.arange(n_nodes) <= self.first_down[:, None]
        return up

    def around(self, cuts: I64, n_units: int) -> I64:
        """The plans [B, H], cut short at the last node that can be reached."""
        if not self.any:
            return cuts
        return _shortened(cuts, self.first_down, n_units)

    def send_again(
        self,
        chain: Chain,
        store: RequestStore,
        stations: Sequence[Station],
        probing: Mask,
        backlog: list[F64],
        back: tuple[I64, F64],
    ) -> tuple[I64, F64]:
        """Take what is on its way over a hop that is down off it, and send it again.

        Args:
            chain: What plans ask of the stations.
            store: The live requests; those of lost probes are at no station after this.
            stations: All; their contents are written to.
            probing: [B, H] where a probe is on its way; written to.
            backlog: S x [B] work that waits at each station; written to.
            back: Slots and times of the outputs on their way back.

        Returns:
            Those that are still on their way back.
        """
        if not self.any:
            return back
        batch = len(self.first_down)
        stuck = self._crosses(store, back[0])
        again = [back[0][stuck]]
        for s, station in enumerate(stations):
            slot, ready_s, served, start_s = station.contents()
            env, probe = store.env.take(slot), store.is_probe.take(slot)
            # Of the probes those that are on that very hop.
            here = s == 2 * self.first_down.take(env) + 1
            leaves = np.where(probe, here, self._crosses(store, slot))
            if not leaves.any():
                continue
            gone, gone_env = slot[leaves], env[leaves]
            # Of what was in service only the rest was waiting.
            head = np.r_[True, env[1:] != env[:-1]] & leaves
            waiting = store.work[s].take(gone) * (ready_s[leaves] <= 0.0)
            backlog[s] = backlog[s] - np.bincount(gone_env, waiting, batch)
            backlog[s][env[head]] += served[env[head]]
            served, start_s = served.copy(), start_s.copy()
            served[env[head]] = start_s[env[head]] = 0.0
            station.put(slot[~leaves], ready_s[~leaves], served, start_s)
            lost = probe[leaves]
            again.append(gone[~lost])
            if lost.any():
                probing[gone_env[lost], s // 2] = False
        self._submit(np.concatenate(again), chain, store, stations, backlog)
        return back[0][~stuck], back[1][~stuck]

    def _crosses(self, store: RequestStore, slot: I64) -> Mask:
        """Whether the plans of these cross a hop that is down."""
        hop = self.first_down.take(store.env.take(slot))
        down = np.flatnonzero(hop < self.silent_s.shape[1])
        crosses = np.zeros(len(slot), dtype=bool)
        crosses[down] = store.work[2 * hop[down] + 1, slot[down]] >= 0.0
        return crosses

    def _submit(
        self,
        slot: I64,
        chain: Chain,
        store: RequestStore,
        stations: Sequence[Station],
        backlog: list[F64],
    ) -> None:
        """Put these requests at the first station of their plans, cut short, oldest first."""
        slot = slot[np.lexsort((store.arrival_s.take(slot), store.env.take(slot)))]
        hop = self.first_down.take(store.env.take(slot))
        cuts = _shortened(store.cuts.take(slot, axis=0), hop, chain.n_units)
        store.cuts[slot] = cuts
        for row, work in zip(store.work, chain.work_of(cuts), strict=True):
            row[slot] = work
        store.forget(slot)
        on_edge = store.work[0].take(slot) >= 0.0
        for s, new in ((0, slot[on_edge]), (1, slot[~on_edge])):
            held, ready_s, served, start_s = stations[s].contents()
            held, ready_s = np.append(held, new), np.append(ready_s, np.zeros(len(new)))
            order = np.lexsort((ready_s, store.env.take(held)))
            stations[s].put(held[order], ready_s[order], served, start_s)
            work = store.work[s].take(new)
            backlog[s] = backlog[s] + np.bincount(store.env.take(new), work, len(served))


def _dead(bytes_per_s: F64) -> Mask:
    """Where not even heartbeats pass."""
    dead: Mask = bytes_per_s < REPLY_RATE_FLOOR
    return dead


def _shortened(cuts: I64, hop: I64, n_units: int) -> I64:
    """Plans [n, H] with everything from the node before hop [n] on run there."""
    beyond = np.arange(cuts.shape[1]) >= hop[:, None]
    short: I64 = np.where(beyond, n_units, cuts)
    return short
