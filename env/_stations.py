"""Queueing in numpy: first-come first-served stations of many environments, an interval at a time.

A station serves at a rate that is constant within each sub-step. Measured in the work it could
have done since the interval began (its *reach*), every request needs a constant amount, so the
finish of the k-th request in order of arrival is plain Lindley: F_k = max(C(a_k), F_{k-1}) + w_k,
and it departs when the reach comes to F_k. All environments share one flat, sorted array; a lane
per environment, wider than any reach, keeps the running maximum from crossing over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Departures", "Rates", "RequestStore", "Station", "route", "sums"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

NO_SLOTS = np.zeros(0, dtype=np.int64)
NO_TIMES = np.zeros(0)


class RequestStore:
    """The live requests (and probes), by slot; slots 0..live-1 are in use.

    Attributes:
        env: [capacity] environment.
        arrival_s: [capacity] scheduled arrival, absolute simulation time.
        work: [S, capacity] work at each station (unloaded seconds or bytes); -1 where not visited.
        completion_s: [capacity] completion after the interval's start, where it is in it.
        is_probe: [capacity].
        cuts: [capacity, H] the plan.
        late_limit_s, late_cut: [late_rows, capacity] table from which the fog picks its cut
            (`env.late.LateTables`), limits -inf once it has; columns only with `late_rows`.
        wall_s: [S, capacity] seconds served, kept only when `record` is true.
        wait_s: [capacity] seconds spent behind others, at all stations together; kept likewise.
    """

    def __init__(
        self, n_stations: int, capacity: int, n_hops: int, record: bool, late_rows: int = 0
    ) -> None:
        self._record, self._late = record, late_rows > 0
        self.live, self.capacity = 0, capacity
        self.env = np.zeros(capacity, dtype=np.int64)
        self.arrival_s = np.zeros(capacity)
        self.completion_s = np.zeros(capacity)
        self.work = np.zeros((n_stations, capacity))
        self.is_probe = np.zeros(capacity, dtype=bool)
        kept = capacity if record else 0
        self.wall_s = np.zeros((n_stations, kept))
        self.wait_s = np.zeros(kept)
        self.cuts = np.zeros((capacity, n_hops), dtype=np.int64)
        self.late_limit_s = np.full((late_rows, capacity if self._late else 0), -np.inf)
        self.late_cut = np.zeros(self.late_limit_s.shape, dtype=np.int64)

    def extend(self, count: int) -> slice:
        """`count` new slots, not probes and with nothing served; the rest is the caller's to fill.

        They follow those in use.
        """
        if self.live + count > self.capacity:
            extra = max(self.capacity, count)
            self.capacity += extra
            for name in ("env", "arrival_s", "completion_s", "work", "is_probe"):
                old = getattr(self, name)
                unused = np.zeros((*old.shape[:-1], extra), dtype=old.dtype)
                setattr(self, name, np.concatenate([old, unused], axis=-1))
            self.cuts = np.pad(self.cuts, ((0, extra), (0, 0)))
            if self._record:
                self.wall_s = np.pad(self.wall_s, ((0, 0), (0, extra)))
                self.wait_s = np.pad(self.wait_s, (0, extra))
            if self._late:
                self.late_limit_s = np.pad(self.late_limit_s, ((0, 0), (0, extra)))
                self.late_cut = np.pad(self.late_cut, ((0, 0), (0, extra)))
        new = slice(self.live, self.live + count)
        self.live += count
        self.is_probe[new] = False
        if self._record:
            self.wall_s[:, new] = self.wait_s[new] = 0.0
        if self._late:
            self.late_limit_s[:, new] = -np.inf
        return new

    def forget(self, slots: I64) -> None:
        """These begin anew: nothing served, and no table to pick a cut from."""
        if self._record:
            self.wall_s[:, slots] = 0.0
            self.wait_s[slots] = 0.0
        if self._late:
            self.late_limit_s[:, slots] = -np.inf

    def keep(self, slots: I64) -> None:
        """Keep only these; the i-th becomes slot i."""
        n = self.live = len(slots)
        for column in (self.env, self.arrival_s, self.is_probe, *self.work):
            column[:n] = column.take(slots)
        self.cuts[:n] = self.cuts.take(slots, axis=0)
        if self._record:
            self.wall_s[:, :n] = self.wall_s[:, slots]
            self.wait_s[:n] = self.wait_s[slots]
        if self._late:
            self.late_limit_s[:, :n] = self.late_limit_s[:, slots]
            self.late_cut[:, :n] = self.late_cut[:, slots]


class Rates:
    """One station's service rate over an interval, in every environment.

    Args:
        rate: [B, K] work per second in each of K sub-steps, positive.
        substep_s: Length of a sub-step.
        last_s: Length of the last sub-step, where it is another.
    """

    def __init__(self, rate: F64, substep_s: float, last_s: float | None = None) -> None:
        self.rate = np.ascontiguousarray(rate)
        self.substep_s = substep_s
        self.n_substeps = rate.shape[1]
        # Work done by the end of each sub-step but the last, [K - 1, B].
        self.bounds = np.cumsum(self.rate[:, :-1] * substep_s, axis=1).T
        self.total: F64 = self.rate[:, -1] * (substep_s if last_s is None else last_s)
        self._reach: F64 = self.bounds
        if self.n_substeps > 1:
            self.total += self.bounds[-1]
            self._reach = np.concatenate([np.zeros((len(rate), 1)), self.bounds.T], axis=1)

    def reach(self, env: I64, time_s: F64) -> F64:
        """Work that `env` can do from the interval's start to `time_s` >= 0.

        Past the interval's end the last rate is held.
        """
        reach: F64
        if self.n_substeps == 1:
            reach = self.rate.take(env)
            reach *= time_s
            return reach
        k = np.minimum((time_s / self.substep_s).astype(np.int64), self.n_substeps - 1)
        cell = env * self.n_substeps + k
        reach = self.rate.take(cell) * (time_s - k * self.substep_s)
        reach += self._reach.take(cell)
        return reach

    def time(self, env: I64, reach: F64) -> F64:
        """The inverse of `reach`."""
        time_s: F64
        if self.n_substeps == 1:
            time_s = reach / self.rate.take(env)
            return time_s
        k = np.zeros(len(reach), dtype=np.int64)
        for bound in self.bounds:
            beyond = reach > bound.take(env)
            if not beyond.any():
                break  # the bounds rise
            k += beyond
        cell = env * self.n_substeps + k
        time_s = (reach - self._reach.take(cell)) / self.rate.take(cell)
        time_s += k * self.substep_s
        return time_s

    def value_at(self, env: I64, time_s: F64) -> F64:
        """Rate of `env` at `time_s` after the interval's start."""
        cell = env
        if self.n_substeps > 1:
            k = np.minimum((time_s / self.substep_s).astype(np.int64), self.n_substeps - 1)
            cell = env * self.n_substeps + k
        value: F64 = self.rate.take(cell)
        return value


@dataclass
class Departures:
    """What one station did in one interval; times count from the interval's start.

    Attributes:
        slot, env, depart_s, work: One element per departure, by environment and then time.
        ready_s: When each arrived here, perhaps before the interval.
        wall_s: Its seconds in service; empty where the station is not `timed`.
        departed_work: [B] sum of `work`.
        spent: [B] work done in the interval.
        busy_s: [B] seconds serving in the interval.
        backlog: [B] work left of those that have arrived and not departed.
        head_slot, head_elapsed_s: The request in service at the interval's end, one per
            environment that has one, and its seconds in service; empty where not `timed`.
    """

    slot: I64
    env: I64
    depart_s: F64
    ready_s: F64
    work: F64
    wall_s: F64
    departed_work: F64
    spent: F64
    busy_s: F64
    backlog: F64
    head_slot: I64
    head_elapsed_s: F64


class Station:
    """One station of every environment: its queue, carried from interval to interval.

    Args:
        index: Its row in `RequestStore.work`.
        batch: Number of environments B.
        work_bound: More than the work of all requests that can be here in one environment.
        lag_bound_s: Arrivals lie at most this long after the interval's end.
        timed: Whether each departure's seconds in service are wanted.
    """

    def __init__(
        self,
        index: int,
        batch: int,
        work_bound: float,
        lag_bound_s: float,
        timed: bool,
    ) -> None:
        self.index, self.batch, self._timed = index, batch, timed
        self._work_bound, self._lag_bound_s = work_bound, lag_bound_s + 1e-3
        self.clear()

    def clear(self) -> None:
        """Forget every request."""
        self.slot, self._ready_s, self._oldest_s = NO_SLOTS, NO_TIMES, 0.0
        # Of the request in service: the work already done, and (if timed) its start, <= 0 from now.
        self._served, self._start_s = np.zeros(self.batch), np.zeros(self.batch)

    def contents(self) -> tuple[I64, F64, F64, F64]:
        """Slots here and when each is (or was) here; per environment `_served` and `_start_s`."""
        return self.slot, self._ready_s, self._served, self._start_s

    def put(self, slot: I64, ready_s: F64, served: F64, start_s: F64) -> None:
        """Hold other contents; slots and times by environment, in the order of arrival here."""
        self.slot, self._ready_s = slot, ready_s
        self._oldest_s = min(0.0, float(ready_s.min(initial=0.0)))
        self._served, self._start_s, self.batch = served, start_s, len(served)

    def serve(
        self, store: RequestStore, coming: list[tuple[I64, F64]], rates: Rates, dt_s: float
    ) -> Departures:
        """Serve one interval.

        Args:
            store: The live requests.
            coming: Requests that come here, in chunks of slots and arrivals here after the
                interval's start; all that arrive before its end must be among them (later ones
                may be).
            rates: This station's rate.
            dt_s: The interval.
        """
        slot = np.concatenate([self.slot, *(c[0] for c in coming)])
        ready = np.concatenate([self._ready_s, *(c[1] for c in coming)])
        if len(slot) == 0:
            zeros = np.zeros(self.batch)
            return Departures(
                slot, slot, ready, ready, ready, ready, zeros, zeros, zeros, zeros, slot, ready
            )  # fmt: skip
        env = store.env.take(slot)
        # By environment, then by arrival here.
        key = env * (dt_s + self._lag_bound_s - self._oldest_s)
        key += ready
        # A few sorted runs, which a merge sort is quick at; ties keep the order they came in.
        order = np.argsort(key, kind="stable")
        slot, ready, env = slot.take(order), ready.take(order), env.take(order)
        work = store.work[self.index].take(slot)
        head = _firsts(env)
        finish = self._finish(env, ready, work, head, rates, dt_s)
        depart = rates.time(env, finish)
        ends_now = depart <= dt_s
        kept, gone = np.flatnonzero(~ends_now), np.flatnonzero(ends_now)

        timed = self._timed or rates.n_substeps > 1
        start = self._starts(env, ready, depart, head) if timed else NO_TIMES
        served, began = np.zeros(self.batch), np.zeros(self.batch)
        kept_env, kept_ready, kept_work = env.take(kept), ready.take(kept), work.take(kept)
        self.slot, self._ready_s = slot.take(kept), kept_ready - dt_s
        self._oldest_s = 0.0
        kept_work *= kept_ready <= dt_s
        backlog = np.zeros(self.batch)
        head_slot, elapsed = NO_SLOTS, NO_TIMES
        if len(kept):
            self._oldest_s = min(0.0, float(self._ready_s.min()))
            backlog += sums(kept_env, kept_work, self.batch)
            first = kept.take(_firsts(kept_env))
            first_env = env.take(first)
            done = rates.total.take(first_env) - finish.take(first) + work.take(first)
            served[first_env] = np.maximum(done, 0.0)
            if timed:
                began[first_env] = np.minimum(start.take(first), dt_s) - dt_s
                head_slot, elapsed = slot.take(first), -began.take(first_env)
            backlog -= served

        env, work, depart = env.take(gone), work.take(gone), depart.take(gone)
        departed_work = sums(env, work, self.batch)
        spent = departed_work - self._served + served
        if timed:
            wall = depart - start.take(gone)
            busy = sums(env, wall, self.batch) + self._start_s - began
        else:
            wall, busy = NO_TIMES, spent / rates.rate[:, 0]
        self._served, self._start_s = served, began
        return Departures(
            slot.take(gone), env, depart, ready.take(gone), work, wall, departed_work,
            spent, busy, backlog, head_slot, elapsed,
        )  # fmt: skip

    def _finish(self, env: I64, ready: F64, work: F64, head: I64, rates: Rates, dt_s: float) -> F64:
        """Lindley: the reach at which each request, in order, is finished."""
        reach = rates.reach(env, np.maximum(ready, 0.0))
        reach[head] -= self._served.take(env.take(head))
        width = self._work_bound + float(rates.rate.max()) * (dt_s + self._lag_bound_s)
        lane = env * width
        lane -= np.cumsum(work)
        reach += lane
        reach += work
        finish = np.maximum.accumulate(reach)
        finish -= lane
        return finish

    def _starts(self, env: I64, ready: F64, depart: F64, head: I64) -> F64:
        """When each request's service begins; right up to the first that stays, per environment."""
        start = np.empty_like(depart)
        start[0] = 0.0
        start[1:] = depart[:-1]
        np.maximum(start, ready, out=start)
        head_ready = ready.take(head)
        start[head] = np.where(head_ready > 0.0, head_ready, self._start_s.take(env.take(head)))
        return start


def _firsts(env: I64) -> I64:
    """Index of each environment's first element in a sorted array."""
    first = np.empty(len(env), dtype=bool)
    first[0] = True
    np.not_equal(env[1:], env[:-1], out=first[1:])
    return np.flatnonzero(first)


def sums(env: I64, values: F64, batch: int) -> F64:
    """Sum of `values` per environment, [B]."""
    total: NDArray[Any] = np.bincount(env, values, minlength=batch)
    return total


def route(
    slot: I64,
    time_s: F64,
    yes: NDArray[np.bool_],
    there: list[tuple[I64, F64]],
    elsewhere: list[tuple[I64, F64]],
) -> None:
    """Add requests and their times to one list or the other."""
    chosen = np.flatnonzero(yes)
    if len(chosen) == len(yes):
        there.append((slot, time_s))
        return
    there.append((slot.take(chosen), time_s.take(chosen)))
    others = np.flatnonzero(~yes)
    elsewhere.append((slot.take(others), time_s.take(others)))
