"""The simulator's bookkeeping: what an interval's requests cost, and one row per request."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from env._stations import NO_SLOTS, NO_TIMES, RequestStore, sums
from env.cost import IntervalRecord
from env.system import Completed

__all__ = ["Arrivals", "account", "admitted", "join", "refused_rows", "rows"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Arrivals:
    """An interval's accepted requests, by environment and then time.

    Attributes:
        slot, env, offset_s: One element each; offsets count from the interval's start.
        count: [B].
    """

    slot: I64
    env: I64
    offset_s: F64
    count: I64

    @classmethod
    def none(cls, batch: int) -> Arrivals:
        """No arrivals."""
        return cls(NO_SLOTS, NO_SLOTS, NO_TIMES, np.zeros(batch, dtype=np.int64))


def admitted(env: I64, count: I64, credits: F64) -> NDArray[np.bool_]:
    """Which arrivals find a credit.

    Of the first k arrivals a_k = min(a_{k-1} + 1, F_k) are admitted, F_k the credits by then; so
    a_k - k is the running minimum of F_j - j, and of 0.

    Args:
        env: [R] of each arrival, by environment and then time.
        count: [B] arrivals.
        credits: [R] that there are at each arrival, those used by earlier ones included.
    """
    rank = np.arange(1, len(env) + 1) - (np.cumsum(count) - count).take(env)
    short = rank - np.maximum(np.floor(credits), 0.0)
    # Running maximum of what is short, in a lane per environment.
    lane = env * (float(np.abs(short).max()) + 1.0) * 2.0
    refused = np.maximum(np.maximum.accumulate(short + lane) - lane, 0.0)
    before = np.where(rank == 1, 0.0, np.concatenate([[0.0], refused[:-1]]))
    fits: NDArray[np.bool_] = refused == before
    return fits


def account(
    record: IntervalRecord,
    store: RequestStore,
    in_flight: I64,
    new: Arrivals,
    done: tuple[I64, F64],
    start_s: float,
    dt_s: float,
    deadline_s: float,
) -> None:
    """Fill in what latency is made of: outstanding, union, completed, late, latency sum.

    Args:
        record: Written to.
        store: The live requests.
        in_flight: [B] outstanding when the interval began.
        new: Those accepted in it.
        done: Slots and completions of those that ended in it.
        start_s: Absolute time when the interval began.
        dt_s: Its length.
        deadline_s: A longer latency is late.
    """
    batch = len(in_flight)
    slot, completion = done
    env, arrival = store.env.take(slot), store.arrival_s.take(slot)
    latency = completion + (start_s - arrival)
    record.completed = np.bincount(env, minlength=batch)
    record.latency_sum_s = sums(env, latency, batch)
    late = latency > deadline_s
    if late.any():
        record.late = np.bincount(env[late], minlength=batch)
    record.outstanding_s = in_flight * dt_s - sums(env, dt_s - completion, batch)
    if len(new.slot):
        record.outstanding_s += sums(new.env, dt_s - new.offset_s, batch)
    # Until when the requests of earlier intervals keep the chain in use.
    covered = np.zeros(batch)
    carried = np.flatnonzero(arrival < start_s)
    carried_env = env.take(carried)
    np.maximum.at(covered, carried_env, completion.take(carried))
    covered[in_flight > np.bincount(carried_env, minlength=batch)] = dt_s
    store.completion_s[slot] = completion
    record.union_s = _union(covered, new, store.completion_s.take(new.slot), dt_s)


def _union(covered: F64, new: Arrivals, end: F64, dt_s: float) -> F64:
    """Seconds with a request outstanding: up to the last completion, less the gaps.

    A gap precedes an arrival that comes after every earlier request of its environment ended.
    """
    if len(end) == 0:
        return covered
    lane = new.env * (2.0 * dt_s)
    running = np.maximum.accumulate(end + lane)
    previous = np.empty_like(running)
    previous[0] = 0.0
    previous[1:] = running[:-1]
    previous -= lane
    np.maximum(previous, covered.take(new.env), out=previous)
    gap = np.maximum(new.offset_s - previous, 0.0)
    last = covered.copy()
    np.maximum.at(last, new.env, end)
    union: F64 = last - sums(new.env, gap, len(covered))
    return union


def rows(store: RequestStore, slot: I64, completion_s: F64 | None) -> Completed:
    """One row per request of `slot`; without completions they are lost."""
    return Completed(
        env=store.env[slot],
        arrival_s=store.arrival_s[slot],
        completion_s=np.full(len(slot), np.nan) if completion_s is None else completion_s,
        cuts=store.cuts[slot],
        stage_s=store.wall_s[0::2, slot].T,
        work_s=np.maximum(store.work[0::2, slot].T, 0.0),
        transmit_s=store.wall_s[1::2, slot].T,
        wait_s=store.wait_s[slot],
        lost=np.full(len(slot), completion_s is None),
    )


def refused_rows(env: I64, arrival_s: F64, cuts: I64) -> Completed:
    """One row per refused arrival; `cuts` [B, H] are the environments' plans."""
    count, n_hops = len(env), cuts.shape[1]
    return Completed(
        env=env,
        arrival_s=arrival_s,
        completion_s=np.full(count, np.nan),
        cuts=cuts[env],
        stage_s=np.zeros((count, n_hops + 1)),
        work_s=np.zeros((count, n_hops + 1)),
        transmit_s=np.zeros((count, n_hops)),
        wait_s=np.zeros(count),
        lost=np.ones(count, dtype=bool),
    )


def join(first: Completed, second: Completed) -> Completed:
    """The rows of both."""
    return Completed(
        *(np.concatenate([getattr(x, f.name) for x in (first, second)]) for f in fields(first))
    )
