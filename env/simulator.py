"""The simulator: many environments advanced together, one interval at a time, exact to rounding.

A request meets the stations of its plan in tandem: node 0, hop 0, node 1, ... A node whose stage is
empty only relays (no queue), a hop behind the last unit is not crossed. Every station serves in
the order of arrival at it. A node does a stage's unloaded seconds at speed 1 - load; a hop sends
bytes at its bandwidth; the frame overhead and the one-way delay follow without occupying it. The
output goes back over the crossed hops: one-way delay plus its bytes at the bandwidth of the moment.

Stations are served in the chain's order, once per interval: whatever reaches a station before the
interval's end has left the stations before it by then, so its order there is final.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._stations import NO_SLOTS, NO_TIMES, RATE_FLOOR, Departures, Rates, RequestStore, Station
from env.conditions import Conditions, IntervalConditions, process_mean
from env.cost import IntervalRecord
from env.predict import CostModel
from env.state import SystemState
from env.system import ARRIVAL_SMOOTHING_S, Completed, StepResult
from executor.errors import ConfigError

__all__ = ["Completed", "Simulator", "StepResult"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# Per station, chunks of (slots, arrival there after the interval's start).
Flows = list[list[tuple[I64, F64]]]

MEASURED_BYTES = 16384  # frames below are dominated by overhead; the passive estimate skips them
DRAIN_DEADLINES = 20.0
REPLY_RATE_FLOOR = 1e3  # bytes/s: a reply in an outage is late by seconds, not for ever


class Simulator:
    """B environments of one scenario.

    Approximations, all documented here: a credit freed inside an interval counts from the next
    one (a request is lost when those outstanding at the interval's start plus those accepted in it
    reach `max_in_flight`); a reply takes the bandwidth at the last departure and occupies no hop;
    requests still open `DRAIN_DEADLINES` deadlines into `drain` are given up as lost.

    Args:
        model: Profile, scenario, references, candidate plans.
        batch: Number of environments B.
        seed: Names the conditions (bandwidth, load, arrivals); they do not depend on any action.
        rate_rps: Mean arrivals per second: None for the scenario's, a number, one per environment,
            or a (low, high) tuple drawn uniformly per environment at each reset.
        record_requests: Also return one row per finished request (`StepResult.completed`).

    Attributes:
        model: As given.
        n_ref: [B] each environment's mean arrival rate, requests/s.
        time_s: Simulation time, 0 at reset.
    """

    def __init__(
        self,
        model: CostModel,
        batch: int,
        seed: int,
        *,
        rate_rps: F64 | float | tuple[float, float] | None = None,
        record_requests: bool = False,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        self.model, self.batch = model, batch
        self.record_requests = record_requests
        self._rate_range: tuple[float, float] | None = None
        if isinstance(rate_rps, tuple):
            self._rate_range = rate_rps
            rate_rps = min(rate_rps)
        self._seed: int | None = seed
        self._seeds = np.random.default_rng([seed, 1])
        self._conditions = Conditions(model.scenario, np.ones(batch), seed)
        self.n_ref: F64
        self.set_rates(np.asarray(model.rate_rps() if rate_rps is None else rate_rps))
        self._setup()
        self.reset()

    def _setup(self) -> None:
        """Constants of the chain."""
        profile, scenario = self.model.profile, self.model.scenario
        self._n_nodes, self._n_hops = profile.n_nodes, len(profile.hops)
        self._n_units = profile.spec.n_units
        self._prefix_s = profile.work_prefix_s()
        self._overhead_s = np.array([n.stage_overhead_s for n in profile.nodes])
        self._cut_bytes = profile.cut_bytes()
        self._dt_s = scenario.interval_s
        self._delay_s = np.array([h.one_way_delay_s for h in scenario.hops])
        frame_s = np.array([h.frame_overhead_s for h in profile.hops])
        self._lag_s = frame_s + self._delay_s
        self._mean_load = np.array([process_mean(n.load) for n in scenario.nodes])
        self._profile_rate = np.array([h.bytes_per_s for h in profile.hops])
        self._smoothing = -np.expm1(-self._dt_s / ARRIVAL_SMOOTHING_S)
        n_stations = self._n_nodes + self._n_hops
        capacity = self.batch * min(scenario.max_in_flight, 16) + 64
        self._store = RequestStore(n_stations, capacity, self._n_hops, self.record_requests)
        # One probe per hop at most, besides the requests.
        here = scenario.max_in_flight + 2
        largest = np.empty(n_stations)
        largest[0::2] = self._prefix_s[:, -1] + self._overhead_s
        largest[1::2] = max(self._cut_bytes.max(), scenario.probing.paper_bytes)
        self._probe_limit = float(largest[1])
        lag = float(self._lag_s.max())
        self._stations = [
            Station(s, self.batch, here * float(w), lag) for s, w in enumerate(largest)
        ]

    def set_rates(self, rate_rps: F64) -> None:
        """Give each environment another mean arrival rate [B]; call `reset` next.

        Raises:
            ConfigError: A rate is not positive.
        """
        rate = np.broadcast_to(np.asarray(rate_rps, dtype=np.float64), (self.batch,)).copy()
        if not np.all(rate > 0):
            raise ConfigError(f"rate_rps must be positive, got {rate.min()} requests/s")
        self.n_ref = self._conditions.rate_rps = rate

    def reset(self, seed: int | None = None) -> SystemState:
        """Empty queues and new conditions.

        Args:
            seed: Names the conditions; None draws the next seed of this simulator's own sequence
                (the constructor's seed the first time).
        """
        if seed is None:
            seed, self._seed = self._seed, None
        if seed is None:
            seed = int(self._seeds.integers(2**62))
        if self._rate_range is not None:
            rng = np.random.default_rng([seed, 2])
            self.set_rates(rng.uniform(*self._rate_range, size=self.batch))
        self._conditions.reset(seed)
        self._empty()
        b, h = self.batch, self._n_hops
        self.time_s = 0.0
        self._last: IntervalConditions | None = None
        self._state = SystemState(
            bytes_per_s=np.tile(self._profile_rate, (b, 1)),
            bandwidth_age_s=np.zeros((b, h)),
            rtt_s=np.tile(2.0 * self._delay_s, (b, 1)),
            node_load=np.tile(self._mean_load, (b, 1)),
            node_backlog_s=np.zeros((b, self._n_nodes)),
            hop_backlog_bytes=np.zeros((b, h)),
            arrival_rps=self.n_ref.copy(),
            in_flight=np.zeros(b),
            cuts=np.full((b, h), self._n_units, dtype=np.int64),
            latency_ratio=np.ones(b),
        )
        return self._state

    def step(self, cuts: I64, probe_bytes: F64 | None = None) -> StepResult:
        """Advance one interval.

        Args:
            cuts: [B, H] plan of each environment's new requests, from this moment on.
            probe_bytes: [B, H] sizes of probes sent at the interval's start, 0 for none. A probe
                queues behind the frames already at its hop; while one is on its way, no second is
                sent.

        Raises:
            ConfigError: The cuts are no plans, or of the wrong shape.
        """
        cuts = self._checked(cuts)
        conditions = self._last = self._conditions.next()
        record = IntervalRecord.zeros(self.batch, self._n_nodes)
        slot, env, offset, refused = self._admit(conditions, cuts, record)
        rates = self._rates(conditions, self._dt_s / self._conditions.substeps)
        flows: Flows = [[] for _ in self._stations]
        if probe_bytes is not None:
            self._send_probes(np.asarray(probe_bytes), flows)
        first = np.flatnonzero(self._store.work[0].take(slot) >= 0.0)
        if len(first) == len(slot):
            flows[0].append((slot, offset))
        else:
            rest = np.flatnonzero(self._store.work[0].take(slot) < 0.0)
            flows[0].append((slot.take(first), offset.take(first)))
            flows[1].append((slot.take(rest), offset.take(rest)))
        completed = self._advance(rates, self._dt_s, flows, record, (slot, env, offset))
        if refused is not None:
            completed = _join(completed, refused)
        self._observe(conditions, cuts, record)
        return StepResult(state=self._state, record=record, completed=completed)

    def drain(self) -> IntervalRecord:
        """No more arrivals and the last conditions held: run out what is open.

        Bounded by `DRAIN_DEADLINES` deadlines; what is still open then is counted as lost, and was
        charged as outstanding until then. Call `reset` afterwards.
        """
        return self.drain_completed().record

    def drain_completed(self) -> StepResult:
        """As `drain`, with the requests that ended (when recorded) and the state after it."""
        record = IntervalRecord.zeros(self.batch, self._n_nodes)
        completed = None
        if self._last is not None:
            limit = DRAIN_DEADLINES * self.model.references.deadline_s
            held = IntervalConditions(
                hop_bytes_per_s=self._last.hop_bytes_per_s[:, :, -1:],
                node_speed=self._last.node_speed[:, :, -1:],
                arrival_env=NO_SLOTS,
                arrival_offset_s=NO_TIMES,
                arrival_count=np.zeros(self.batch, dtype=np.int64),
            )
            flows: Flows = [[] for _ in self._stations]
            completed = self._advance(self._rates(held, limit), limit, flows, record)
            record.lost += self._in_flight
            if self.record_requests:
                open_slots = np.concatenate([self._back_slot, *(s.slot for s in self._stations)])
                given_up = open_slots[~self._store.is_probe[open_slots]]
                completed = _join(completed, self._rows(given_up, None))
            self._empty()
            self._observe(held, self._state.cuts, record)
        return StepResult(state=self._state, record=record, completed=completed)

    def _empty(self) -> None:
        """Forget every request and probe."""
        self._store.keep(NO_SLOTS)
        for station in self._stations:
            station.clear()
        self._back_slot, self._back_s = NO_SLOTS, NO_TIMES  # outputs on their way back
        self._in_flight = np.zeros(self.batch, dtype=np.int64)
        self._probing = np.zeros((self.batch, self._n_hops), dtype=bool)

    def close(self) -> None:
        """Nothing to release; here because a `System` has it."""

    def _checked(self, cuts: I64) -> I64:
        """`cuts` as int64 [B, H], or a ConfigError."""
        cuts = np.array(cuts, dtype=np.int64)
        if cuts.shape != (self.batch, self._n_hops):
            raise ConfigError(
                f"cuts must have shape {(self.batch, self._n_hops)}, got {cuts.shape}"
            )
        falls = np.any(cuts[:, 1:] < cuts[:, :-1]) if self._n_hops > 1 else False
        if cuts.min() < 0 or cuts.max() > self._n_units or falls:
            raise ConfigError(f"cuts must lie in 0..{self._n_units} and not decrease along a row")
        return cuts

    def _rates(self, conditions: IntervalConditions, substep_s: float) -> list[Rates]:
        """Rates of the stations, in the chain's order."""
        rates = []
        for k in range(self._n_nodes):
            rates.append(Rates(conditions.node_speed[:, k], substep_s))
            if k < self._n_hops:
                hop = np.maximum(conditions.hop_bytes_per_s[:, k], RATE_FLOOR)
                rates.append(Rates(hop, substep_s))
        return rates

    def _admit(
        self, conditions: IntervalConditions, cuts: I64, record: IntervalRecord
    ) -> tuple[I64, I64, F64, Completed | None]:
        """Give the interval's arrivals slots; returns slots, environments, offsets, the refused."""
        env, offset = conditions.arrival_env, conditions.arrival_offset_s
        count = conditions.arrival_count
        record.arrived = count
        room = self.model.scenario.max_in_flight - self._in_flight
        refused = None
        self._accepted = count
        if np.any(count > room):
            rank = np.arange(len(env)) - (np.cumsum(count) - count).take(env)
            fits = rank < room.take(env)
            if self.record_requests:
                refused = self._refused(env[~fits], offset[~fits], cuts)
            env, offset = env[fits], offset[fits]
            self._accepted = np.minimum(count, room)
            record.lost = count - self._accepted
        store = self._store
        new = store.extend(len(env))
        store.env[new] = env
        store.arrival_s[new] = self.time_s + offset
        store.completion_s[new] = self._dt_s
        for row, work in zip(store.work, self._work_of(cuts), strict=True):
            row[new] = work.take(env)
        if self.record_requests:
            store.cuts[new] = cuts[env]
        return np.arange(new.start, new.stop), env, offset, refused

    def _work_of(self, cuts: I64) -> list[F64]:
        """Work of a plan at each station, [B] per station; -1 where it is not visited."""
        n = self._n_units
        works = []
        before: I64 | int = 0
        for k in range(self._n_nodes):
            after = cuts[:, k] if k < self._n_hops else n
            prefix = self._prefix_s[k]
            seconds = prefix[after] - prefix[before] + self._overhead_s[k]
            works.append(np.where(np.greater(after, before), seconds, -1.0))
            if k < self._n_hops:
                works.append(np.where(cuts[:, k] < n, self._cut_bytes[cuts[:, k]], -1.0))
                before = cuts[:, k]
        return works

    def _send_probes(self, probe_bytes: F64, flows: Flows) -> None:
        """Put probes at the hops, at the interval's start."""
        env, hop = np.nonzero((probe_bytes > 0) & ~self._probing)
        if len(env) == 0:
            return
        sizes = probe_bytes[env, hop]
        if sizes.max() > self._probe_limit:
            raise ConfigError(
                f"a probe must not exceed {self._probe_limit:.0f} bytes, got {sizes.max():.0f}"
            )
        self._probing[env, hop] = True
        new = self._store.extend(len(env))
        slot = np.arange(new.start, new.stop)
        self._store.env[new] = env
        self._store.is_probe[new] = True
        self._store.work[2 * hop + 1, slot] = sizes
        for h in range(self._n_hops):
            mine = slot[hop == h]
            if len(mine):
                flows[2 * h + 1].append((mine, np.zeros(len(mine))))

    def _advance(
        self,
        rates: list[Rates],
        dt: float,
        flows: Flows,
        record: IntervalRecord,
        new: tuple[I64, I64, F64] = (NO_SLOTS, NO_SLOTS, NO_TIMES),
    ) -> Completed | None:
        """Serve all stations for `dt`, account for it in `record`; returns the finished requests.

        `new` holds this interval's accepted arrivals, by environment and then time: slots,
        environments, offsets.
        """
        store = self._store
        done_slot, done_s = [self._back_slot], [self._back_s]
        self._measured: list[tuple[F64, F64, F64]] = []
        self._backlog: list[F64] = []
        for s, station in enumerate(self._stations):
            slots = [c[0] for c in flows[s]]
            ready = [c[1] for c in flows[s]]
            left = station.serve(store, slots, ready, rates[s], dt)
            self._backlog.append(left.backlog)
            if self.record_requests:
                store.wall_s[s][left.slot] = left.wall_s
            if s % 2:
                record.hop_transmit_s[:, s // 2] = left.busy_s
                self._measured.append(self._measure(left, dt))
                slot, arrive = self._without_probes(left, s // 2)
                arrive = arrive + self._lag_s[s // 2]
                runs = store.work[s + 1].take(slot) >= 0.0
                stop = np.flatnonzero(runs)
                flows[s + 1].append((slot.take(stop), arrive.take(stop)))
                if len(stop) < len(runs):
                    relay = np.flatnonzero(~runs)
                    flows[s + 2].append((slot.take(relay), arrive.take(relay)))
                continue
            record.node_active_s[:, s // 2] = left.spent
            record.node_busy_s[:, s // 2] = left.busy_s
            if s + 1 == len(self._stations):
                done_slot.append(left.slot)
                done_s.append(
                    left.depart_s + self._return_s(rates, s // 2, left.env, left.depart_s)
                )
                continue
            crosses = store.work[s + 1].take(left.slot) >= 0.0
            on = np.flatnonzero(crosses)
            flows[s + 1].append((left.slot.take(on), left.depart_s.take(on)))
            if len(on) < len(crosses):
                end = np.flatnonzero(~crosses)
                depart = left.depart_s.take(end)
                done_slot.append(left.slot.take(end))
                back = self._return_s(rates, s // 2, left.env.take(end), depart)
                done_s.append(depart + back)
        return self._finish(np.concatenate(done_slot), np.concatenate(done_s), dt, record, new)

    def _return_s(self, rates: list[Rates], node: int, env: I64, depart_s: F64) -> F64:
        """Seconds for the output to come back from `node` to the edge."""
        total = np.full(len(env), self._delay_s[:node].sum())
        for h in range(node):
            rate = np.maximum(rates[2 * h + 1].value_at(env, depart_s), REPLY_RATE_FLOOR)
            total += self._cut_bytes[-1] / rate
        return total

    def _measure(self, left: Departures, dt: float) -> tuple[F64, F64, F64]:
        """Of frames large enough to measure: bytes, service seconds, age of the newest; [B] each.

        The age is infinite where there was none.
        """
        large = left.work >= MEASURED_BYTES
        env, depart = left.env, left.depart_s
        size, wall = left.departed_work, left.departed_wall_s
        if not large.all():
            large |= self._store.is_probe.take(left.slot)
            env, depart = env[large], depart[large]
            size = np.bincount(env, left.work[large], minlength=self.batch)
            wall = np.bincount(env, left.wall_s[large], minlength=self.batch)
        age = np.full(self.batch, np.inf)
        age[env] = dt - depart  # of repeated indices the last, newest, stays
        return size, wall, age

    def _without_probes(self, left: Departures, hop: int) -> tuple[I64, F64]:
        """Slots and departures of the requests among `left`; probes end here."""
        if not self._probing[:, hop].any():
            return left.slot, left.depart_s
        probe = self._store.is_probe.take(left.slot)
        self._probing[left.env[probe], hop] = False
        rest = np.flatnonzero(~probe)
        return left.slot.take(rest), left.depart_s.take(rest)

    def _finish(
        self,
        slot: I64,
        completion_s: F64,
        dt: float,
        record: IntervalRecord,
        new: tuple[I64, I64, F64],
    ) -> Completed | None:
        """Complete what is back by the interval's end and account for latency."""
        store, b = self._store, self.batch
        new_slot, new_env, new_offset = new
        back = completion_s <= dt
        later = np.flatnonzero(~back)
        self._back_slot, self._back_s = slot.take(later), completion_s.take(later) - dt
        now = np.flatnonzero(back)
        slot, completion_s = slot.take(now), completion_s.take(now)
        env, arrival = store.env.take(slot), store.arrival_s.take(slot)
        latency = completion_s + (self.time_s - arrival)
        store.completion_s[slot] = completion_s
        record.completed = np.bincount(env, minlength=b)
        record.latency_sum_s = np.bincount(env, latency, minlength=b)
        late = latency > self.model.references.deadline_s
        if late.any():
            record.late = np.bincount(env[late], minlength=b)
        before = self._in_flight
        after_end = dt - completion_s
        record.outstanding_s = before * dt - np.bincount(env, after_end, minlength=b)
        record.outstanding_s += np.bincount(new_env, dt - new_offset, minlength=b)
        carried = arrival < self.time_s
        carried_env = env[carried]
        covered = np.zeros(b)  # until when the requests of earlier intervals keep the chain in use
        np.maximum.at(covered, carried_env, completion_s[carried])
        open_still = before > np.bincount(carried_env, minlength=b)
        covered[open_still] = dt
        record.union_s = self._union(covered, new_env, new_offset, new_slot, dt)
        accepted = np.bincount(new_env, minlength=b)
        self._in_flight = before + accepted - record.completed
        completed = self._rows(slot, self.time_s + completion_s) if self.record_requests else None
        self._compact()
        self.time_s += dt
        return completed

    def _compact(self) -> None:
        """Give the requests that are still open the first slots."""
        lists = [self._back_slot, *(station.slot for station in self._stations)]
        self._store.keep(np.concatenate(lists))
        ends = np.cumsum([len(x) for x in lists])
        self._back_slot, *rest = np.split(np.arange(self._store.live), ends[:-1])
        for station, slot in zip(self._stations, rest, strict=True):
            station.slot = slot

    def _rows(self, slot: I64, completion_s: F64 | None) -> Completed:
        """One row per request of `slot`; without a completion they are lost."""
        store = self._store
        lost = completion_s is None
        return Completed(
            env=store.env[slot],
            arrival_s=store.arrival_s[slot],
            completion_s=np.full(len(slot), np.nan) if completion_s is None else completion_s,
            cuts=store.cuts[slot],
            stage_s=store.wall_s[0::2, slot].T,
            work_s=np.maximum(store.work[0::2, slot].T, 0.0),
            transmit_s=store.wall_s[1::2, slot].T,
            lost=np.full(len(slot), lost),
        )

    def _refused(self, env: I64, offset: F64, cuts: I64) -> Completed:
        """One row per refused arrival."""
        count = len(env)
        return Completed(
            env=env,
            arrival_s=self.time_s + offset,
            completion_s=np.full(count, np.nan),
            cuts=cuts[env],
            stage_s=np.zeros((count, self._n_nodes)),
            work_s=np.zeros((count, self._n_nodes)),
            transmit_s=np.zeros((count, self._n_hops)),
            lost=np.ones(count, dtype=bool),
        )

    def _union(self, covered: F64, env: I64, offset: F64, slot: I64, dt: float) -> F64:
        """Seconds with a request outstanding: up to the last completion, less the gaps.

        A gap precedes an arrival that comes after every earlier request of its environment ended.
        """
        if len(env) == 0:
            return covered
        end = self._store.completion_s.take(slot)
        lane = env * (2.0 * dt)
        running = np.maximum.accumulate(end + lane)
        previous = np.empty_like(running)
        previous[0] = 0.0
        previous[1:] = running[:-1]
        previous -= lane
        np.maximum(previous, covered.take(env), out=previous)
        gap = np.maximum(offset - previous, 0.0)
        last = covered.copy()
        np.maximum.at(last, env, end)
        union: F64 = last - np.bincount(env, gap, minlength=self.batch)
        return union

    def _observe(self, conditions: IntervalConditions, cuts: I64, record: IntervalRecord) -> None:
        """The state a controller sees at the interval's end."""
        old = self._state
        rate, age = old.bytes_per_s.copy(), old.bandwidth_age_s + self._dt_s
        for h, (size, wall, newest) in enumerate(self._measured):
            seen = np.flatnonzero(newest < np.inf)
            rate[seen, h] = size.take(seen) / wall.take(seen)
            age[:, h] = np.minimum(age[:, h], newest)
        mean = record.latency_sum_s / np.maximum(record.completed, 1)
        ratio = mean / self.model.references.latency_s
        counted = record.arrived / self._dt_s - old.arrival_rps
        self._state = SystemState(
            bytes_per_s=rate,
            bandwidth_age_s=age,
            rtt_s=old.rtt_s,
            node_load=1.0 - conditions.node_speed[:, :, -1],
            node_backlog_s=np.stack(self._backlog[0::2], axis=1),
            hop_backlog_bytes=np.stack(self._backlog[1::2], axis=1),
            arrival_rps=old.arrival_rps + self._smoothing * counted,
            in_flight=self._in_flight.astype(np.float64),
            cuts=cuts,
            latency_ratio=np.where(record.completed > 0, ratio, 1.0),
        )


def _join(first: Completed | None, second: Completed) -> Completed:
    """Rows of both."""
    if first is None:
        return second
    parts = zip(vars(first).values(), vars(second).values(), strict=True)
    return Completed(*(np.concatenate(pair) for pair in parts))
