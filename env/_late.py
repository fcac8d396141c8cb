"""Late binding in the simulator: the fog picks its cut when a request's turn comes.

A request's turn is when its compute begins; one that is only relayed has it on arrival, and joins
the fog's queue if there is something to compute after all. The fog knows what a sender knows: the
bytes of the frames that have not left its hop, and the rate of those that have; a frame that takes
longer than that bounds the rate from above. (That acknowledgements are on their way for a while is
left out.)

What is chosen decides what waits on the hop for the next request, so choices are made one after
the other, event by event, in all environments at once. They fix each request's work; fog and hop
are then served as ever (`Station.serve`), in the order of arrival at each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._bandwidth import Bandwidth
from env._stations import Rates, RequestStore, Station
from env._transfer import transfer_costs
from executor.link import MIN_FRAME_BYTES, RATE_MEMORY_S
from executor.profile import Profile

__all__ = ["LateBinding"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Chunks = list[tuple[I64, F64]]

FOG, HOP, CLOUD = 2, 3, 4  # stations
READY, UNSEEN, RELAYED = 0, 1, 2
NEVER = np.inf


class _Frames:
    """What a hop holds and has carried, per environment (a row each).

    Args:
        room: Most frames of one environment.
        reach: Reach at which what is there is done, less the frames still to be added: minus what
            was already done of the first.
        start_s: When the first one's service began.
        counted: [2, n] bytes and seconds of service measured before (`env._bandwidth.Bandwidth`).
    """

    def __init__(self, room: int, reach: F64, start_s: F64, counted: F64) -> None:
        n = len(reach)
        self._size, self._start_s = np.zeros((n, room)), np.zeros((n, room))
        self._end_s = np.full((n, room + 1), NEVER)
        self._counts = np.zeros((n, room), dtype=bool)
        self._reach, self._free_s = reach, start_s
        self._first, self._count = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self._held = np.zeros(n)
        self._counted, self._counted_to_s = counted, np.zeros(n)

    def add(
        self, row: I64, env: I64, time_s: F64, size: F64, probe: NDArray[np.bool_], rates: Rates
    ) -> None:
        """A frame each in these rows, after all before it."""
        at = rates.reach(env, np.maximum(time_s, 0.0))
        # What was there before the interval began queues up behind what was done of the first.
        reach = np.where(time_s > 0.0, np.maximum(at, self._reach[row]), self._reach[row]) + size
        end_s, k = rates.time(env, reach), self._count[row]
        self._size[row, k], self._end_s[row, k] = size, end_s
        self._start_s[row, k] = np.maximum(time_s, self._free_s[row])
        self._counts[row, k] = probe | (size >= MIN_FRAME_BYTES)
        self._reach[row], self._free_s[row] = reach, end_s
        self._count[row] += 1
        self._held[row] += size

    def backlog_s(self, row: I64, time_s: F64, known_rate: F64, rtt_s: F64) -> F64:
        """Seconds of frames as their sender reckons them."""
        left, now = row, time_s
        while len(left):
            k = self._first[left]
            gone = self._end_s[left, k] <= now
            left, now, k = left[gone], now[gone], k[gone]
            size, counts = self._size[left, k], self._counts[left, k]
            self._held[left] -= size
            self._count_in(left[counts], k[counts])
            self._first[left] += 1
        held = self._held[row] * (self._first[row] < self._count[row])
        counted_bytes, counted_s = self._counted[:, row]
        measured = counted_bytes / np.where(counted_s > 0, counted_s, 1.0)
        rate = np.where(counted_s > 0, measured, known_rate)
        k = np.minimum(self._first[row], self._size.shape[1] - 1)
        elapsed_s = time_s - self._start_s[row, k] - rtt_s
        overdue = (held > 0) & self._counts[row, k] & (elapsed_s > 0)
        bound = self._size[row, k] / np.where(overdue, elapsed_s, 1.0)
        rate = np.where(overdue, np.minimum(rate, bound), rate)
        backlog: F64 = held / np.maximum(rate, 1e-3)
        return backlog

    def _count_in(self, row: I64, k: I64) -> None:
        """Take in what the frame k of these rows has measured."""
        end_s = self._end_s[row, k]
        left = np.exp((self._counted_to_s[row] - end_s) / RATE_MEMORY_S)
        new = np.stack([self._size[row, k], end_s - self._start_s[row, k]])
        self._counted[:, row] = left * self._counted[:, row] + new
        self._counted_to_s[row] = end_s


class _Lane:
    """Arrivals of the environments of interest, by row and time, with a position in each row."""

    def __init__(self, slot: I64, time_s: F64, row: I64, n: int) -> None:
        order = np.lexsort((time_s, row))
        self.slot, self.time_s = slot[order], np.append(time_s[order], NEVER)
        count = np.bincount(row, minlength=n)
        self.end = np.cumsum(count)
        self.at = self.end - count

    def next_s(self) -> F64:
        """[n] time of each row's next, infinite where there is none."""
        return np.where(self.at < self.end, self.time_s[self.at], NEVER)


class _Turns:
    """One interval of fog and hop, event by event; only environments with a choice to make.

    Each of those has a row. Its next event is what leaves the fog, what reaches the fog or its hop
    otherwise, or whose turn on the fog it is: the earliest, and of equals in this order.

    Args:
        works: Fixes what follows from a choice.
        store: The live requests.
        envs: [n] the environment of each row.
        rates: The stations' rates.
        visits: What computes on the fog, and what may (`relays`).
        arrivals: What reaches the hop without computing on the fog, `relays` among them.
        relays: [capacity] the slots of those that choose when they arrive.
        fog_done: [n] work done of the request that the fog has begun.
        frames: The hop.
        known_rate: [n] bytes/s of the hop, as measured before.
        rtt_s: [n] its round trip, as measured.
    """

    def __init__(
        self,
        works: LateBinding,
        store: RequestStore,
        envs: I64,
        rates: list[Rates],
        visits: _Lane,
        arrivals: _Lane,
        relays: NDArray[np.bool_],
        fog_done: F64,
        frames: _Frames,
        known_rate: F64,
        rtt_s: F64,
    ) -> None:
        n = len(envs)
        self._works, self._store, self._envs, self._rates = works, store, envs, rates
        self._visits, self._arrivals, self._relays = visits, arrivals, relays
        self._frames, self._known_rate, self._rtt_s = frames, known_rate, rtt_s
        self._status = np.append(np.where(relays[visits.slot], UNSEEN, READY), READY)
        self._place = np.zeros(store.capacity, dtype=np.int64)
        self._place[visits.slot] = np.arange(len(visits.slot))
        self._reach, self._free_s = -fog_done, np.full(n, -NEVER)
        self._leaves_s, self._leaving = np.full(n, NEVER), np.zeros(n, dtype=np.int64)

    def run(self, dt_s: float) -> None:
        """All events up to the interval's end."""
        visits, arrivals = self._visits, self._arrivals
        while True:
            skipped = (visits.at < visits.end) & (self._status[visits.at] == RELAYED)
            if skipped.any():
                visits.at[skipped] += 1
                continue
            ready = self._status[visits.at] == READY
            start_s = np.where(ready, np.maximum(visits.next_s(), self._free_s), NEVER)
            arrive_s = arrivals.next_s()
            now_s = np.minimum(np.minimum(self._leaves_s, arrive_s), start_s)
            going = now_s <= dt_s
            if not going.any():
                return
            leaves = going & (self._leaves_s <= now_s)
            arrives = going & ~leaves & (arrive_s <= now_s)
            starts = going & ~leaves & ~arrives
            for which, handle in (
                (leaves, self._leave),
                (arrives, self._arrive),
                (starts, self._start),
            ):
                row = np.flatnonzero(which)
                if len(row):
                    handle(row, now_s[row])

    def _leave(self, row: I64, now_s: F64) -> None:
        """The fog has finished, and hands on."""
        self._send(row, self._leaving[row], now_s)
        self._leaves_s[row] = NEVER

    def _arrive(self, row: I64, now_s: F64) -> None:
        """Something reaches the hop: it is sent, unless it is computed on the fog after all."""
        slot = self._arrivals.slot[self._arrivals.at[row]]
        self._arrivals.at[row] += 1
        chooses = self._relays[slot]
        stays = np.zeros(len(row), dtype=bool)
        if chooses.any():
            late = slot[chooses]
            cut = self._pick(row[chooses], late, now_s[chooses])
            stays[chooses] = computed = cut > self._store.cuts[late, 0]
            self._works.fix(self._store, late[computed], cut[computed])
            self._status[self._place[late]] = np.where(computed, READY, RELAYED)
            self._store.late_limit_s[:, late[~computed]] = -NEVER
        self._relays[slot[~stays]] = False
        self._send(row[~stays], slot[~stays], now_s[~stays])

    def _start(self, row: I64, now_s: F64) -> None:
        """Somebody's turn on the fog has come."""
        store, at, env = self._store, self._visits.at[row], self._envs[row]
        slot, arrived_s = self._visits.slot[at], self._visits.time_s[at]
        self._visits.at[row] += 1
        late = store.late_limit_s[0].take(slot) >= 0.0
        if late.any():
            chosen = slot[late]
            cut = self._pick(row[late], chosen, np.maximum(now_s[late], 0.0))
            self._works.fix(store, chosen, cut)
            store.late_limit_s[:, chosen] = -NEVER
        done = self._reach[row]
        from_ = self._rates[FOG].reach(env, np.maximum(arrived_s, 0.0))
        done = np.where(arrived_s > 0.0, np.maximum(from_, done), done)
        self._reach[row] = done + store.work[FOG].take(slot)
        self._free_s[row] = self._rates[FOG].time(env, self._reach[row])
        crosses = store.work[HOP].take(slot) >= 0.0
        self._leaves_s[row] = np.where(crosses, self._free_s[row], NEVER)
        self._leaving[row] = slot

    def _send(self, row: I64, slot: I64, now_s: F64) -> None:
        size, probe = self._store.work[HOP].take(slot), self._store.is_probe.take(slot)
        self._frames.add(row, self._envs[row], now_s, size, probe, self._rates[HOP])

    def _pick(self, row: I64, slot: I64, now_s: F64) -> I64:
        """The cuts that the tables name now."""
        store = self._store
        backlog_s = self._frames.backlog_s(row, now_s, self._known_rate[row], self._rtt_s[row])
        hit = backlog_s <= store.late_limit_s[:, slot]
        named = store.late_cut[hit.argmax(axis=0), slot]
        cut = np.where(hit.any(axis=0), named, store.cuts[slot, 1])
        bound: I64 = np.maximum(cut, store.cuts[slot, 0])
        return bound


class LateBinding:
    """Makes the late choices of an interval, and fixes the works that follow from them."""

    def __init__(self, profile: Profile) -> None:
        self._n = profile.spec.n_units
        self._fog_s, self._cloud_s = profile.work_prefix_s()[1:]
        self._fog_overhead_s = profile.nodes[1].stage_overhead_s
        self._cloud_overhead_s = profile.nodes[2].stage_overhead_s
        self._bytes = profile.cut_bytes()
        self._transfers = transfer_costs(profile)

    def choose(
        self,
        store: RequestStore,
        stations: list[Station],
        flows: list[Chunks],
        rates: list[Rates],
        dt_s: float,
        bandwidth: Bandwidth,
        rtt_s: F64,
    ) -> None:
        """Let every request whose turn comes in this interval have its cut.

        Args:
            store: The live requests; works and cuts are written to.
            stations: All; what the fog and its hop hold is part of it.
            flows: Those to the fog and its hop are complete; a request that was to be relayed and
                is computed moves from the one to the other.
            rates: The stations' rates.
            dt_s: The interval.
            bandwidth: What was measured of the hops before.
            rtt_s: [B] the hop's round trip, as measured.
        """
        fog, hop = stations[FOG], stations[HOP]
        queued, queued_s, fog_done, _ = fog.contents()
        sent, sent_s, hop_done, hop_start_s = hop.contents()
        visitors = np.concatenate([queued, *(c[0] for c in flows[FOG])])
        visit_s = np.concatenate([queued_s, *(c[1] for c in flows[FOG])])
        direct = np.concatenate([sent, *(c[0] for c in flows[HOP])])
        direct_s = np.concatenate([sent_s, *(c[1] for c in flows[HOP])])
        visitors, visit_s = visitors[visit_s <= dt_s], visit_s[visit_s <= dt_s]
        direct, direct_s = direct[direct_s <= dt_s], direct_s[direct_s <= dt_s]
        gate = store.late_limit_s[0].take(direct) >= 0.0
        undecided = np.concatenate([visitors, direct])
        undecided = undecided[store.late_limit_s[0].take(undecided) >= 0.0]
        envs = np.unique(store.env.take(undecided))
        if len(envs) == 0:
            return
        # Only environments with a choice to make, a row each.
        n, row_of = len(envs), np.full(fog.batch, -1)
        row_of[envs] = np.arange(n)
        visitors = np.concatenate([visitors, direct[gate]])
        visit_s = np.concatenate([visit_s, direct_s[gate]])
        v_row, d_row = row_of[store.env.take(visitors)], row_of[store.env.take(direct)]
        ours = v_row >= 0
        visits = _Lane(visitors[ours], visit_s[ours], v_row[ours], n)
        ours = d_row >= 0
        arrivals = _Lane(direct[ours], direct_s[ours], d_row[ours], n)
        relays = np.zeros(store.capacity, dtype=bool)
        relays[direct[gate]] = True
        room = np.bincount(np.concatenate([v_row[v_row >= 0], d_row[ours]]), minlength=n).max()
        known_rate, counted = bandwidth.of_hop(1, envs)
        frames = _Frames(int(room), -hop_done[envs], hop_start_s[envs], counted)
        _Turns(
            self, store, envs, rates, visits, arrivals, relays, fog_done[envs], frames,
            known_rate, rtt_s[envs],
        ).run(dt_s)  # fmt: skip
        self._move(relays, hop, flows)  # what is left of them joined the queue

    def fix(self, store: RequestStore, slot: I64, cut: I64) -> None:
        """Write the works of fog, hop and cloud for that cut of the fog."""
        start, n = store.cuts[slot, 0], self._n
        fog_s = self._fog_s.take(cut) - self._fog_s.take(start) + self._fog_overhead_s
        cloud_s = self._cloud_s[n] - self._cloud_s.take(cut) + self._cloud_overhead_s
        visits, size = cut > start, self._bytes.take(cut)
        if self._transfers is not None:
            both = np.stack([start, cut], axis=-1)
            converting, visited = self._transfers.node_s(both)
            fog_s, cloud_s = fog_s + converting[:, 1], cloud_s + converting[:, 2]
            visits, size = visited[:, 1], self._transfers.hop_bytes(both)[:, 1]
        store.work[FOG, slot] = np.where(visits, fog_s, 0.0)
        store.work[HOP, slot] = np.where(cut < n, size, -1.0)
        store.work[CLOUD, slot] = np.where(cut < n, cloud_s, -1.0)
        store.cuts[slot, 1] = cut

    @staticmethod
    def _move(moved: NDArray[np.bool_], hop: Station, flows: list[Chunks]) -> None:
        """Take those that joined the fog's queue off the way to its hop."""
        if not moved.any():
            return
        slot, ready_s, served, start_s = hop.contents()
        chunks = [(slot, ready_s), *flows[HOP]]
        flows[FOG] += [(s[moved[s]], t[moved[s]]) for s, t in chunks]
        (slot, ready_s), *flows[HOP] = [(s[~moved[s]], t[~moved[s]]) for s, t in chunks]
        hop.put(slot, ready_s, served, start_s)
