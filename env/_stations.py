"""Queueing in numpy: first-come first-served stations of many environments, an interval at a time.

A station serves at a rate that is constant within each sub-step. Measured in the work it could
have done since the interval began (its *reach*), every request needs a constant amount, so the
finish of the k-th request in order of arrival is plain Lindley: F_k = max(C(a_k), F_{k-1}) + w_k,
and it departs when the reach comes to F_k. All environments share one flat, sorted array; a lane
per environment, wider than any reach, keeps the running maximum from crossing over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Departures", "Rates", "RequestStore", "Station"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# An outage serves at this rate (bytes/s), not at 0: no division by zero, and no frame notices.
RATE_FLOOR = 1e-3
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
        cuts: [capacity, H], kept only when `record` is true.
        wall_s: [S, capacity] seconds served, kept only when `record` is true.
    """

    def __init__(self, n_stations: int, capacity: int, n_hops: int, record: bool) -> None:
        self._record = record
        self.live, self.capacity = 0, capacity
        self.env = np.zeros(capacity, dtype=np.int64)
        self.arrival_s = np.zeros(capacity)
        self.completion_s = np.zeros(capacity)
        self.work = np.zeros((n_stations, capacity))
        self.is_probe = np.zeros(capacity, dtype=bool)
        kept = capacity if record else 0
        self.cuts = np.zeros((kept, n_hops), dtype=np.int64)
        self.wall_s = np.zeros((n_stations, kept))

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
            if self._record:
                self.cuts = np.pad(self.cuts, ((0, extra), (0, 0)))
                self.wall_s = np.pad(self.wall_s, ((0, 0), (0, extra)))
        new = slice(self.live, self.live + count)
        self.live += count
        self.is_probe[new] = False
        if self._record:
            self.wall_s[:, new] = 0.0
        return new

    def keep(self, slots: I64) -> None:
        """Keep only these; the i-th becomes slot i."""
        n = self.live = len(slots)
        for column in (self.env, self.arrival_s, self.is_probe, *self.work):
            column[:n] = column.take(slots)
        if self._record:
            self.cuts[:n] = self.cuts[slots]
            self.wall_s[:, :n] = self.wall_s[:, slots]


class Rates:
    """One station's service rate over an interval, in every environment.

    Args:
        rate: [B, K] work per second in each of K sub-steps, positive.
        substep_s: Length of a sub-step.
    """

    def __init__(self, rate: F64, substep_s: float) -> None:
        self.rate = np.ascontiguousarray(rate)
        self.substep_s = substep_s
        self.n_substeps = rate.shape[1]
        # Work done by the end of each sub-step but the last, [K - 1, B].
        self.bounds = np.cumsum(self.rate[:, :-1] * substep_s, axis=1).T
        self.total: F64 = self.rate[:, -1] * substep_s
        if self.n_substeps > 1:
            self.total += self.bounds[-1]
            zero = np.zeros((len(rate), 1))
            self._reach = np.concatenate([zero, self.bounds.T], axis=1)

    def reach(self, env: I64, time_s: F64) -> F64:
        """Work that `env` can do from the interval's start to `time_s` >= 0.

        Past the interval's end the last rate is held.
        """
        if self.n_substeps == 1:
            reach: F64 = self.rate.take(env)
            reach *= time_s
            return reach
        k = np.minimum((time_s / self.substep_s).astype(np.int64), self.n_substeps - 1)
        cell = env * self.n_substeps + k
        return self._reach.take(cell) + self.rate.take(cell) * (time_s - k * self.substep_s)

    def time(self, env: I64, reach: F64) -> F64:
        """The inverse of `reach`."""
        if self.n_substeps == 1:
            time_s: F64 = reach / self.rate.take(env)
            return time_s
        k = np.zeros(len(reach), dtype=np.int64)
        for bound in self.bounds:
            k += reach > bound.take(env)
        cell = env * self.n_substeps + k
        return k * self.substep_s + (reach - self._reach.take(cell)) / self.rate.take(cell)

    def value_at(self, env: I64, time_s: F64) -> F64:
        """Rate of `env` at `time_s` after the interval's start."""
        if self.n_substeps == 1:
            value: F64 = self.rate.take(env)
            return value
        k = np.minimum((time_s / self.substep_s).astype(np.int64), self.n_substeps - 1)
        return self.rate.take(env * self.n_substeps + k)


@dataclass
class Departures:
    """What one station did in one interval.

    `slot`, `env`, `depart_s`, `work`, `wall_s` have one element per departure, by environment and
    then time; `spent` (work done), `busy_s` (wall seconds serving), `departed_work`,
    `departed_wall_s` and `backlog` (work of those that have arrived and not departed) have shape
    [B]. Times count from the interval's start.
    """

    slot: I64
    env: I64
    depart_s: F64
    work: F64
    wall_s: F64
    departed_work: F64
    departed_wall_s: F64
    spent: F64
    busy_s: F64
    backlog: F64


class Station:
    """One station of every environment: its queue, carried from interval to interval.

    Args:
        index: Its row in `RequestStore.work`.
        batch: Number of environments B.
        work_bound: More than the work of all requests that can be here in one environment.
        lag_bound_s: Arrivals lie at most this long after the interval's end.
    """

    def __init__(self, index: int, batch: int, work_bound: float, lag_bound_s: float) -> None:
        self.index, self.batch = index, batch
        self._work_bound, self._lag_bound_s = work_bound, lag_bound_s + 1e-3
        self.clear()

    def clear(self) -> None:
        """Forget every request."""
        self.slot, self._ready_s, self._oldest_s = NO_SLOTS, NO_TIMES, 0.0
        # Of the request in service: the work already done, and its start (<= 0, from now).
        self._served, self._start_s = np.zeros(self.batch), np.zeros(self.batch)

    def serve(
        self, store: RequestStore, slots: list[I64], ready_s: list[F64], rates: Rates, dt_s: float
    ) -> Departures:
        """Serve one interval.

        Args:
            store: The live requests.
            slots: Requests that come to this station, in chunks; all that arrive before the
                interval's end must be among them (later ones may be).
            ready_s: Their arrival here, after the interval's start.
            rates: This station's rate.
            dt_s: The interval.
        """
        slot = np.concatenate([self.slot, *slots])
        ready = np.concatenate([self._ready_s, *ready_s])
        if len(slot) == 0:
            zeros = np.zeros(self.batch)
            return Departures(slot, slot, ready, ready, ready, zeros, zeros, zeros, zeros, zeros)
        env = store.env.take(slot)
        # By environment, then by arrival here.
        key = env * (dt_s + self._lag_bound_s - self._oldest_s)
        key += ready
        order = np.argsort(key)
        slot, ready, env = slot.take(order), ready.take(order), env.take(order)
        work = store.work[self.index].take(slot)
        head = _firsts(env)
        head_env, head_ready = env.take(head), ready.take(head)

        reach = rates.reach(env, np.maximum(ready, 0.0))
        reach[head] -= self._served.take(head_env)
        fastest = float(rates.rate.max())
        lane = env * (self._work_bound + fastest * (dt_s + self._lag_bound_s))
        lane -= np.cumsum(work)
        reach += lane
        reach += work
        finish = np.maximum.accumulate(reach)
        finish -= lane

        depart = rates.time(env, finish)
        start = np.empty_like(depart)
        start[0] = 0.0
        start[1:] = depart[:-1]
        np.maximum(start, ready, out=start)
        start[head] = np.where(head_ready > 0.0, head_ready, self._start_s.take(head_env))
        gone = depart <= dt_s
        kept = np.flatnonzero(~gone)
        out = np.flatnonzero(gone)
        out_env, out_work = env.take(out), work.take(out)
        out_depart = depart.take(out)
        out_wall = out_depart - start.take(out)

        served, began = np.zeros(self.batch), np.zeros(self.batch)
        kept_env, kept_ready = env.take(kept), ready.take(kept)
        backlog = np.bincount(
            kept_env, work.take(kept) * (kept_ready <= dt_s), minlength=self.batch
        ).astype(np.float64, copy=False)
        if len(kept):
            first = kept.take(_firsts(kept_env))
            first_env = env.take(first)
            done = rates.total.take(first_env) - finish.take(first) + work.take(first)
            served[first_env] = np.maximum(done, 0.0)
            began[first_env] = np.minimum(start.take(first), dt_s) - dt_s
            backlog -= served
        self.slot = slot.take(kept)
        self._ready_s = kept_ready - dt_s
        self._oldest_s = min(0.0, float(self._ready_s.min())) if len(kept) else 0.0
        departed_work = np.bincount(out_env, out_work, minlength=self.batch)
        departed_wall = np.bincount(out_env, out_wall, minlength=self.batch)
        result = Departures(
            slot=slot.take(out),
            env=out_env,
            depart_s=out_depart,
            work=out_work,
            wall_s=out_wall,
            departed_work=departed_work,
            departed_wall_s=departed_wall,
            spent=departed_work - self._served + served,
            busy_s=departed_wall + self._start_s - began,
            backlog=backlog,
        )
        self._served, self._start_s = served, began
        return result


def _firsts(env: I64) -> I64:
    """Index of each environment's first element in a sorted array."""
    first = np.empty(len(env), dtype=bool)
    first[0] = True
    np.not_equal(env[1:], env[:-1], out=first[1:])
    return np.flatnonzero(first)
