"""The simulator: many environments advanced together, one interval at a time, exact to rounding.

A request meets the stations of its plan in tandem: node 0, hop 0, node 1, ... A node whose stage is
empty only relays (no queue), a hop behind the last unit is not crossed. Every station serves in
the order of arrival at it. A node does a stage's unloaded seconds at speed 1 - load; a hop sends
bytes at its bandwidth; the frame overhead and the one-way delay follow without occupying it. The
output goes back over the crossed hops: one-way delay plus its bytes at the bandwidth of the moment.
With late binding the fog may pick another cut than the plan's (`env.late`, `env._late`).
A delay may be a process; what a hop carries then still arrives in order, and the state's round trip
is what pings would have measured.

Stations are served in the chain's order, once per interval: whatever reaches a station before the
interval's end has left the stations before it by then, so its order there is final.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from env._accounting import Arrivals, account, admitted, join, refused_rows, rows
from env._bandwidth import Bandwidth, Measured, measure
from env._begin import first_state
from env._chain import Chain, Delays
from env._late import FOG, LateBinding
from env._outages import Outages
from env._pings import Pings, send_probes
from env._snapshot import Queued, Snapshot
from env._stations import NO_SLOTS, NO_TIMES, Departures, Rates, RequestStore, route
from env.conditions import ConditionsSource, IntervalConditions, SharedConditions
from env.cost import IntervalRecord
from env.late import ROWS, LateRule
from env.predict import CostModel
from env.state import SystemState
from env.system import ARRIVAL_SMOOTHING_S, DRAIN_DEADLINES, Completed, StepResult
from env.tape import Tape, record_conditions
from executor.errors import ConfigError

__all__ = ["Completed", "Simulator", "Snapshot", "StepResult"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# Per station, chunks of (slots, arrival there after the interval's start).
Flows = list[list[tuple[I64, F64]]]


class Simulator:
    """B environments of one scenario.

    Approximations: whether a new request finds `max_in_flight` others is judged as if requests
    completed evenly, at the last interval's rate (their exact number would be known too late); a
    reply takes the bandwidth at the last departure and occupies no hop; what is still open
    `DRAIN_DEADLINES` deadlines into `drain` is given up as lost; hops are found down, and up again,
    between intervals (`env._outages`).

    Args:
        model: Profile, scenario, references, candidate plans.
        batch: Number of environments B.
        seed: Names the conditions (bandwidth, load, arrivals); they do not depend on any action.
        rate_rps: Mean arrivals per second: None for the scenario's, a number, one per environment,
            or a (low, high) tuple drawn uniformly per environment at each reset.
        record_requests: Also return one row per finished request (`StepResult.completed`).
        copies: So many neighbouring environments share their conditions and rate.
        conditions: Where bandwidth, load and arrivals come from, with their rates (a tape's
            player); None draws those that `seed` names.

    Attributes:
        model: As given.
        n_ref: [B] each environment's mean arrival rate, requests/s.
        time_s: Simulation time, 0 at reset.
        late_rule: Gives the cut tables of late binding; None without it.
    """

    _back: tuple[I64, F64]  # outputs on their way back
    _probing: NDArray[np.bool_]

    def __init__(
        self,
        model: CostModel,
        batch: int,
        seed: int,
        *,
        rate_rps: F64 | float | tuple[float, float] | None = None,
        record_requests: bool = False,
        copies: int = 1,
        conditions: ConditionsSource | None = None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        self.model, self.batch = model, batch
        self.record_requests = record_requests
        self._rate_range: tuple[float, float] | None = None
        if isinstance(rate_rps, tuple):
            self._rate_range = rate_rps
            rate_rps = min(rate_rps)
        self._seeds = np.random.default_rng([seed, 1])
        self._dt_s = model.scenario.interval_s
        self._smoothing = -np.expm1(-self._dt_s / ARRIVAL_SMOOTHING_S)
        self.n_ref: F64
        self._conditions: ConditionsSource
        if conditions is None:
            self._conditions = SharedConditions(model.scenario, np.ones(batch), seed, copies)
            self.set_rates(np.asarray(model.rate_rps() if rate_rps is None else rate_rps))
        elif rate_rps is not None or copies != 1:
            raise ConfigError("conditions bring their own rates; give no rate_rps and no copies")
        else:
            self._play(conditions)
        self._chain = Chain(model)
        self.late_rule = LateRule(model) if model.scenario.late_binding else None
        self._late = None if self.late_rule is None else LateBinding(model.profile)
        capacity = batch * min(model.scenario.max_in_flight, 16) + 64
        self._store = RequestStore(
            self._chain.n_stations,
            capacity,
            self._chain.n_hops,
            record_requests,
            late_rows=0 if self.late_rule is None else ROWS,
        )
        self._stations = self._chain.stations(batch, record_requests)
        self.reset(seed)

    def set_rates(self, rate_rps: F64) -> None:
        """Give each environment another mean arrival rate [B]; call `reset` next.

        Raises:
            ConfigError: A rate is not positive, or the conditions bring their own.
        """
        if not isinstance(self._conditions, SharedConditions):
            raise ConfigError("the conditions this simulator was given bring their own rates")
        rate = np.broadcast_to(np.asarray(rate_rps, dtype=np.float64), (self.batch,)).copy()
        if not np.all(rate > 0):
            raise ConfigError(f"rate_rps must be positive, got {rate.min()} requests/s")
        copies = self._conditions.copies
        self._conditions.rate_rps = rate[::copies]
        self.n_ref = np.repeat(rate[::copies], copies)

    def _play(self, conditions: ConditionsSource) -> None:
        """Take conditions from another source."""
        self._coming: IntervalConditions | None = None  # drawn, not yet played
        if len(conditions.rate_rps) != self.batch:
            raise ConfigError(
                f"expected conditions for {self.batch} environments, got {len(conditions.rate_rps)}"
            )
        self._conditions, self.n_ref = conditions, conditions.rate_rps.copy()

    def reset(self, seed: int | None = None) -> SystemState:
        """Empty queues and new conditions, hops and nodes measured once (`env._begin`).

        Args:
            seed: Names the conditions; None draws the next seed of this simulator's own sequence.
        """
        if seed is None:
            seed = int(self._seeds.integers(2**62))
        if self._rate_range is not None:
            rng = np.random.default_rng([seed, 2])
            self.set_rates(rng.uniform(*self._rate_range, size=self.batch))
        self._conditions.reset(seed)
        if not isinstance(self._conditions, SharedConditions):
            self._play(self._conditions)  # the seed may name other rates
        self._empty()
        self.time_s = 0.0
        self._lately: IntervalConditions | None = None
        coming = self._coming = self._conditions.next()
        chain = self._chain
        self._outages = Outages.at_start(coming, self.model.patience_s)
        self._state = first_state(chain, self.model.scenario, coming, self.n_ref, self._outages)
        self._bandwidth = Bandwidth(self._state.bytes_per_s, self._dt_s)
        self._pings = Pings(self.batch, chain.n_hops) if chain.delay_varies else None
        self._completed_rps = np.zeros(self.batch)
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
        asked = self._chain.checked(cuts, self.batch)
        cuts = self._outages.around(asked, self._chain.n_units)
        conditions, self._coming = self._coming or self._conditions.next(), None
        self._lately = conditions.smoothed(self._lately, self._dt_s)
        record = IntervalRecord.zeros(self.batch, self._chain.n_nodes)
        flows: Flows = [[] for _ in self._stations]
        if probe_bytes is not None:
            sizes = np.asarray(probe_bytes, dtype=np.float64) * self._state.node_up[:, 1:]
            send_probes(self._store, self._probing, sizes, self._chain.probe_limit_bytes, flows)
        new, refused = self._admit(conditions, cuts, record)
        edge = self._store.work[0].take(new.slot) >= 0.0
        route(new.slot, new.offset_s, edge, flows[0], flows[1])
        rates = self._chain.rates(conditions, self._conditions.substep_s)
        delays = self._delays(conditions, self._conditions.substep_s, self._dt_s)
        completed = self._advance(rates, delays, self._dt_s, flows, record, new)
        if completed is not None and refused is not None:
            completed = join(completed, refused)
        self._outages = self._outages.after(conditions, self._conditions.substep_s)
        self._back = self._outages.send_again(
            self._chain, self._store, self._stations, self._probing, self._backlog, self._back
        )
        self._observe(conditions, asked, record)
        return StepResult(state=self._state, record=record, completed=completed)

    def drain(self) -> IntervalRecord:
        """No more arrivals, and conditions held as they lately were: run out what is open.

        Their means (`IntervalConditions.smoothed`): a moment's outage must not last for ever.

        What `DRAIN_DEADLINES` deadlines do not finish is lost, and charged for them. `reset` next.
        """
        return self.drain_completed().record

    def drain_completed(self) -> StepResult:
        """As `drain`, with the requests that ended (when recorded) and the state after it."""
        if self._lately is None:
            return StepResult(self._state, IntervalRecord.zeros(self.batch, self._chain.n_nodes))
        return self.run_out(self._lately)

    def run_out(self, coming: IntervalConditions, substep_s: float | None = None) -> StepResult:
        """As `drain_completed`, under other conditions.

        Args:
            coming: Bandwidth and load from now on, in sub-steps; the last is held until all is
                done. Arrivals in it are left out.
            substep_s: How long a sub-step lasts; None for the usual length.
        """
        limit = DRAIN_DEADLINES * self.model.references.deadline_s
        substep_s = substep_s or self._conditions.substep_s
        last_s = limit - substep_s * (coming.node_speed.shape[2] - 1)
        if last_s <= 0:
            raise ConfigError(f"a run-out lasts {limit:g} s; conditions go on for longer")
        record = IntervalRecord.zeros(self.batch, self._chain.n_nodes)
        flows: Flows = [[] for _ in self._stations]
        rates = self._chain.rates(coming, substep_s, last_s)
        delays, none = self._delays(coming, substep_s, limit), Arrivals.none(self.batch)
        completed = self._advance(rates, delays, limit, flows, record, none)
        record.lost += self._in_flight
        if completed is not None:
            given_up = np.flatnonzero(~self._store.is_probe[: self._store.live])
            completed = join(completed, rows(self._store, given_up, None))
        self._empty()
        self._observe(coming.held(), self._state.cuts, record)
        return StepResult(state=self._state, record=record, completed=completed)

    def record(self, n_intervals: int) -> Tape:
        """The coming intervals' conditions; for this simulator they are over. `reset` next."""
        coming, self._coming = self._coming, None
        return record_conditions(self._conditions, n_intervals, coming)

    def snapshot(self) -> Snapshot:
        """Everything there is to these environments but the conditions to come."""
        return Snapshot(
            time_s=self.time_s,
            n_ref=self.n_ref.copy(),
            completed_rps=self._completed_rps.copy(),
            in_flight=self._in_flight.copy(),
            bandwidth=self._bandwidth.take(np.arange(self.batch)),
            due_s=self._due_s.copy(),
            pings=None if self._pings is None else self._pings.take(np.arange(self.batch)),
            outages=self._outages,
            probing=self._probing.copy(),
            state=self._state.take(np.arange(self.batch)),
            lately=self._lately,
            queued=Queued.of(self._store, self._stations, self._back),
            recorded=self.record_requests,
        )

    def restore(
        self, snapshot: Snapshot, index: I64, conditions: ConditionsSource | None = None
    ) -> SystemState:
        """Go on from a snapshot, of this simulator or of another of the same cost model.

        With `index` 0..B-1 and the same conditions everything goes on bit by bit as it would have;
        environments in other places of a batch do so to rounding.

        Args:
            snapshot: Where from.
            index: Environment b takes the snapshot's environment index[b], as often as wanted.
            conditions: Where conditions come from, from now on (and after a `reset`); the number
                of environments may be another with them. None goes on with this simulator's own.

        Raises:
            ConfigError: No such environments, another chain, or requests that were not recorded.
        """
        index = np.asarray(index, dtype=np.int64)
        snapshot.check(index, len(self._stations), self.record_requests)
        expected = self.batch if conditions is None else len(conditions.rate_rps)
        if len(index) != expected:
            raise ConfigError(f"expected an index of {expected} environments, got {len(index)}")
        self.batch = expected
        if conditions is not None:
            self._play(conditions)
        self._empty()
        self._back = snapshot.queued.put(index, self._store, self._stations)
        self.time_s, self.n_ref = snapshot.time_s, snapshot.n_ref.take(index)
        self._completed_rps = snapshot.completed_rps.take(index)
        self._in_flight = snapshot.in_flight.take(index)
        self._outages = snapshot.outages.take(index)
        self._probing = snapshot.probing[index]
        self._bandwidth = snapshot.bandwidth.take(index)
        self._due_s = snapshot.due_s[index]
        self._pings = None if snapshot.pings is None else snapshot.pings.take(index)
        self._state = snapshot.state.take(index)
        self._lately = None if snapshot.lately is None else snapshot.lately.take(index)
        return self._state

    def _empty(self) -> None:
        """Forget every request and probe."""
        self._store.keep(NO_SLOTS)
        for station in self._stations:
            station.clear()
        self._back = NO_SLOTS, NO_TIMES
        self._in_flight = np.zeros(self.batch, dtype=np.int64)
        self._probing = np.zeros((self.batch, self._chain.n_hops), dtype=bool)
        # When the newest frame of each hop arrives behind it, from now; used where delays vary.
        self._due_s = np.full((self.batch, self._chain.n_hops), -np.inf)

    def close(self) -> None:
        """Nothing to release; here because a `System` has it."""

    def _admit(
        self, conditions: IntervalConditions, cuts: I64, record: IntervalRecord
    ) -> tuple[Arrivals, Completed | None]:
        """Give the interval's arrivals slots; returns them, and rows of the refused."""
        env, offset = conditions.arrival_env, conditions.arrival_offset_s
        count = accepted = conditions.arrival_count
        record.arrived = count
        room = self.model.scenario.max_in_flight - self._in_flight
        refused = None
        if len(env) and np.any(count > room):
            freed: F64 = self._completed_rps.take(env) * offset
            fits = admitted(env, count, room.take(env) + freed)
            if self.record_requests:
                refused = refused_rows(env[~fits], self.time_s + offset[~fits], cuts)
            env, offset = env[fits], offset[fits]
            accepted = np.bincount(env, minlength=self.batch)
            record.lost = count - accepted
        store = self._store
        new = store.extend(len(env))
        store.env[new] = env
        store.arrival_s[new] = self.time_s + offset
        store.completion_s[new] = self._dt_s
        for row, work in zip(store.work, self._chain.work_of(cuts), strict=True):
            row[new] = work.take(env)
        store.cuts[new] = cuts.take(env, axis=0)
        if self.late_rule is not None:
            tables = self.late_rule.tables(self._state, cuts)
            whole = self._outages.first_down.take(env) == self._chain.n_hops  # else no tables
            store.late_limit_s[:, new] = np.where(whole, tables.limit_s[env].T, -np.inf)
            store.late_cut[:, new] = tables.cut[env].T
        return Arrivals(np.arange(new.start, new.stop), env, offset, accepted), refused

    def _delays(self, conditions: IntervalConditions, substep_s: float, dt: float) -> Delays | None:
        """The delays of an interval of length `dt`; None where they are constant."""
        if self._pings is None:
            return None
        self._pings.send(conditions.hop_delay_s, substep_s, self.time_s, dt)
        return Delays(conditions.hop_delay_s, substep_s, self._due_s)

    def _advance(
        self,
        rates: list[Rates],
        delays: Delays | None,
        dt: float,
        flows: Flows,
        record: IntervalRecord,
        new: Arrivals,
    ) -> Completed | None:
        """Serve all stations for `dt` and account for it in `record`.

        Returns one row per finished request, if they are recorded.
        """
        store, chain = self._store, self._chain
        done = [self._back]
        self._measured: list[Measured] = []
        self._backlog: list[F64] = []
        self._rtt_s = self._state.rtt_s
        if self._pings is not None:
            self._rtt_s = self._pings.rtt_s(self.time_s + dt, self._rtt_s)
        for s, station in enumerate(self._stations):
            if s == FOG and self._late is not None:
                rtt_s = self._state.rtt_s[:, 1]
                self._late.choose(store, self._stations, flows, rates, dt, self._bandwidth, rtt_s)
            left = station.serve(store, flows[s], rates[s], dt)
            self._backlog.append(left.backlog)
            if self.record_requests:
                store.wall_s[s][left.slot] = left.wall_s
                store.wait_s[left.slot] += left.depart_s - left.ready_s - left.wall_s
            k = s // 2
            if s % 2:
                record.hop_transmit_s[:, k] = left.busy_s
                self._measured.append(measure(store, s, left, dt, self._rtt_s[:, k]))
                if delays is None:
                    arrive = left.depart_s + chain.lag_s[k]
                else:
                    arrive = delays.arrive(k, left) + chain.overhead_s[k]
                slot, arrive = self._without_probes(left, arrive, k)
                runs = store.work[s + 1].take(slot) >= 0.0
                # The last node always has work, so what is relayed has a hop ahead.
                relay = flows[s + 2] if s + 2 < len(flows) else flows[s + 1]
                route(slot, arrive, runs, flows[s + 1], relay)
                continue
            record.node_active_s[:, k], record.node_busy_s[:, k] = left.spent, left.busy_s
            ends: list[tuple[I64, F64]] = [(left.slot, left.depart_s)]
            if s + 1 < len(flows):
                ends.clear()
                crosses = store.work[s + 1].take(left.slot) >= 0.0
                route(left.slot, left.depart_s, crosses, flows[s + 1], ends)
            for slot, depart in ends:
                back = chain.return_s(rates, delays, k, store.env.take(slot), depart)
                done.append((slot, depart + back))
        return self._finish(done, dt, record, new)

    def _without_probes(self, left: Departures, arrive_s: F64, hop: int) -> tuple[I64, F64]:
        """Slots and arrivals behind the hop of the requests among `left`; probes end here."""
        if not self._probing[:, hop].any():
            return left.slot, arrive_s
        probe = self._store.is_probe.take(left.slot)
        self._probing[left.env[probe], hop] = False
        rest = np.flatnonzero(~probe)
        return left.slot.take(rest), arrive_s.take(rest)

    def _finish(
        self, ends: list[tuple[I64, F64]], dt: float, record: IntervalRecord, new: Arrivals
    ) -> Completed | None:
        """Complete what is back by the interval's end; `ends` are slots and completions."""
        slot = np.concatenate([x[0] for x in ends])
        completion = np.concatenate([x[1] for x in ends])
        back = completion <= dt
        now, later = np.flatnonzero(back), np.flatnonzero(~back)
        self._back = slot.take(later), completion.take(later) - dt
        done = slot.take(now), completion.take(now)
        deadline = self.model.references.deadline_s
        account(record, self._store, self._in_flight, new, done, self.time_s, dt, deadline)
        self._in_flight = self._in_flight + new.count - record.completed
        completed = None
        if self.record_requests:
            completed = rows(self._store, done[0], self.time_s + done[1])
        self._compact()
        if self._pings is not None:
            self._due_s -= dt
        self.time_s += dt
        return completed

    def _compact(self) -> None:
        """Give the requests that are still open the first slots."""
        lists = [self._back[0], *(station.slot for station in self._stations)]
        self._store.keep(np.concatenate(lists))
        ends = np.cumsum([len(x) for x in lists])
        back, *rest = np.split(np.arange(self._store.live), ends[:-1])
        self._back = back, self._back[1]
        for station, slot in zip(self._stations, rest, strict=True):
            station.slot = slot

    def _observe(self, conditions: IntervalConditions, cuts: I64, record: IntervalRecord) -> None:
        """The state a controller sees at the interval's end."""
        old = self._state
        bytes_per_s, age_s = self._bandwidth.note(self._measured)
        self._completed_rps = record.completed / self._dt_s
        mean = record.latency_sum_s / np.maximum(record.completed, 1)
        ratio = mean / self.model.references.latency_s
        counted = record.arrived / self._dt_s - old.arrival_rps
        self._state = SystemState(
            bytes_per_s=bytes_per_s,
            bandwidth_age_s=age_s,
            rtt_s=self._rtt_s,
            node_load=1.0 - conditions.node_speed[:, :, -1],
            node_backlog_s=np.stack(self._backlog[0::2], axis=1),
            hop_backlog_bytes=np.stack(self._backlog[1::2], axis=1),
            arrival_rps=old.arrival_rps + self._smoothing * counted,
            in_flight=self._in_flight.astype(np.float64),
            cuts=cuts,
            latency_ratio=np.where(record.completed > 0, ratio, 1.0),
            node_up=self._outages.node_up(),
        )
