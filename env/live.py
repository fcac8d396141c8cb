"""Running nodes as a system: the interface of the simulator, over the real executor, in real time.

One step submits the arrivals of one interval, open loop, and returns at its end with the measured
state and record. On the testbed the scenario's conditions are played on the hops and nodes; on a
cluster the conditions are what they are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from env.conditions import BYTES_PER_S_PER_MBPS, Conditions, IntervalConditions
from env.cost import IntervalRecord
from env.late import LateRule
from env.predict import CostModel, PlanTable
from env.state import SystemState
from env.system import ARRIVAL_SMOOTHING_S, DRAIN_DEADLINES, Completed, StepResult
from executor.errors import RequestError, RequestRefused, SplitpilotError
from executor.late import CutTable
from executor.plan import Plan

__all__ = ["ClientLike", "LiveSystem", "Playback"]

log = logging.getLogger(__name__)

F64 = NDArray[np.float64]
LEAD_S = 0.25


class ClientLike(Protocol):
    """What a live system needs of `executor.client.Client`."""

    @property
    def in_flight(self) -> int:
        """Requests outstanding."""

    def submit(
        self,
        x: Any,
        plan: Plan,
        scheduled_s: float | None = None,
        *,
        timeout_s: float | None = None,
        late: Sequence[CutTable] = (),
    ) -> Future[Any]:
        """Run one inference."""

    def be_patient(self, patience_s: Sequence[float]) -> None:
        """For how long each hop may be silent before requests go around it."""

    def status(self) -> Any:
        """Newest status per node."""

    def probe(self, hop: int, payload_bytes: int, repeats: int = 3) -> list[float]:
        """Round trips of a payload over one hop, s."""


class Playback(Protocol):
    """What can play a scenario's conditions: `executor.testbed.Testbed`."""

    def play_rate(self, hop: int, t0_s: float, dt_s: float, mbps: Sequence[float]) -> None:
        """Play a hop's bandwidth from monotonic time t0_s on."""

    def play_delay(self, hop: int, t0_s: float, dt_s: float, delay_s: Sequence[float]) -> None:
        """Play a hop's one-way delay from monotonic time t0_s on."""

    def play_load(self, node: int, t0_s: float, dt_s: float, values: Sequence[float]) -> None:
        """Play a node's load from monotonic time t0_s on."""


@dataclass
class _Open:
    """A request on its way."""

    scheduled_s: float
    future: Future[Any]


class LiveSystem:
    """The nodes behind a client, stepped in real time (the `System` protocol, batch 1).

    Args:
        model: Profile, scenario and candidates.
        client: Connected client.
        source: Gives the input of the i-th request.
        playback: Plays the scenario's conditions; None leaves hops and nodes as they are.
        rate_rps: Mean arrival rate; the scenario's when None.

    Attributes:
        glance: Gives a request's plan, cuts [1, H], from the state at the moment it is submitted;
            None: requests take the interval's plan.
        timeout_s: After which a request is given up as lost; the client's when None.
    """

    def __init__(
        self,
        model: CostModel,
        client: ClientLike,
        source: Callable[[int], Any],
        playback: Playback | None = None,
        rate_rps: float | None = None,
    ) -> None:
        self.model = model
        self.scenario = model.scenario
        self.client = client
        self.rate_rps = model.rate_rps() if rate_rps is None else rate_rps
        self.n_ref: F64 = np.array([self.rate_rps])
        self.time_s = 0.0
        self.last_output: Any = None
        self._source, self._playback = source, playback
        self.glance: Callable[[SystemState], NDArray[np.int64]] | None = None
        self.timeout_s: float | None = None
        self._late_rule = LateRule(model) if model.scenario.late_binding else None
        self._late_profile = model.profile
        n_nodes = model.profile.n_nodes
        self._probers = ThreadPoolExecutor(max(1, n_nodes - 1), thread_name_prefix="probe")
        self._probes: list[tuple[int, float, Future[list[float]]]] = []
        self._failing: set[int] = set()  # hops whose last probe failed
        self._silent: set[int] = set()  # hops that did not answer when they were first probed
        self._probed_s = -math.inf
        self._open: list[_Open] = []
        self._sent = 0
        self._cuts = np.zeros((1, n_nodes - 1), dtype=np.int64)
        self._forget_work()

    def reset(self, seed: int | None = None) -> SystemState:
        """Finish what is open, then start the conditions that `seed` names.

        They are held as they begin until every hop was probed once, or `probing.idle_s` are over.
        """
        self._finish_open()
        self._forget_work()
        self.client.be_patient(self.model.patience_s.tolist())
        self._conditions = Conditions(self.scenario, self.n_ref, seed or 0)
        n = self.scenario.steps_per_episode + 2
        self._intervals = [self._conditions.next() for _ in range(n)]
        self._interval = 0
        self._play(self._intervals[:1], time.monotonic())
        self._measure_hops()
        start = time.monotonic() + LEAD_S
        self._play(self._intervals, start)
        self._start_s = self._end_s = start
        self._arrival_rps = self.rate_rps
        self._latency_ratio = 1.0
        _sleep_until(start)
        return self._state()

    def step(self, cuts: NDArray[np.int64], probe_bytes: F64 | None = None) -> StepResult:
        """Run one interval under a plan.

        Args:
            cuts: [1, H].
            probe_bytes: [1, H] bytes to probe each hop with; 0 or None sends none.
        """
        begin, self._end_s = self._end_s, self._end_s + self.scenario.interval_s
        self._begin(cuts, probe_bytes)
        offsets = self._intervals[self._interval % len(self._intervals)].arrival_offset_s
        self._interval += 1
        refused: list[float] = []
        for offset in offsets:
            scheduled = begin + float(offset)
            _sleep_until(scheduled)
            if self.glance is not None:
                self._cuts = self.glance(self._state())
                self._bound = self._bind()
            if not self._submit(scheduled):
                refused.append(scheduled)
        _sleep_until(self._end_s)
        smoothing = 1.0 - np.exp(-self.scenario.interval_s / ARRIVAL_SMOOTHING_S)
        seen = len(offsets) / self.scenario.interval_s
        self._arrival_rps += smoothing * (seen - self._arrival_rps)
        return self._end(begin, len(offsets), refused)

    def drain(self) -> IntervalRecord:
        """No more arrivals: wait until nothing is outstanding; returns what that spent.

        Conditions that are played are held meanwhile as they lately were, as the simulator's are
        (`IntervalConditions.smoothed`). What `DRAIN_DEADLINES` deadlines did not finish is waited
        for, too, but lost and charged for them. `reset` next.
        """
        return self.drain_completed().record

    def drain_completed(self) -> StepResult:
        """As `drain`, with the requests that ended and the state after it."""
        begin = self._end_s
        if gone := self._intervals[: self._interval]:
            self._play([IntervalConditions.lately(gone, self.scenario.interval_s)], begin)
        self._finish_open()
        limit = begin + DRAIN_DEADLINES * self.model.references.deadline_s
        self._end_s = min(max(begin, time.monotonic()), limit)
        record = IntervalRecord.zeros(1, self.model.profile.n_nodes)
        completed = self._collect(record, begin, self._end_s, [], limit)
        return StepResult(state=self._state(), record=record, completed=completed)

    def overrun_share(self) -> dict[str, float]:
        """Per node, the share of paced stages that ended late; above 1 % a run is not valid."""
        status, nodes = self.client.status(), self.model.profile.nodes
        return {
            node.name: status[k].overruns / max(1, status[k].stages)
            for k, node in enumerate(nodes)
            if k in status
        }

    def slowness(self) -> F64:
        """[N] how many times as slow as profiled each node has been since `reset`.

        Measured over profiled work of all that completed; 1 for a node that ran none of it.
        """
        ran = (self._took_s > 0.0) & (self._profiled_s > 0.0)
        return np.divide(self._took_s, self._profiled_s, out=np.ones(len(ran)), where=ran)

    def close(self) -> None:
        """Stop probing; the client stays its owner's."""
        self._probers.shutdown(wait=True, cancel_futures=True)

    def _forget_work(self) -> None:
        """Measure how slow the nodes are anew, against the profile of now."""
        self._profile = self.model.profile
        self._profiled_s, self._took_s = np.zeros((2, self._profile.n_nodes))
        self._work_of: dict[tuple[int, ...], F64] = {}

    def _note_work(self, plan: tuple[int, ...], work_s: Sequence[float]) -> None:
        """Take in what a request's stages took, and should have taken."""
        if plan not in self._work_of:
            self._work_of[plan] = PlanTable(self._profile, [Plan(plan)]).work_s[0]
        self._profiled_s += self._work_of[plan]
        self._took_s += work_s

    def _begin(self, cuts: NDArray[np.int64], probe_bytes: F64 | None) -> None:
        """Take the interval's plan and send its probes."""
        self._cuts = np.array(cuts, dtype=np.int64)
        self._bound = self._bind()
        if probe_bytes is not None:
            self._start_probes(probe_bytes[0])

    def _submit(self, scheduled_s: float) -> bool:
        """Submit the next request; whether it was taken."""
        plan, late = self._bound
        x = self._source(self._sent)
        self._sent += 1
        try:
            future = self.client.submit(x, plan, scheduled_s, timeout_s=self.timeout_s, late=late)
        except RequestError as error:
            log.info("request refused: %s", error)
            return False
        self._open.append(_Open(scheduled_s, future))
        return True

    def _end(self, begin_s: float, arrived: int, refused: list[float]) -> StepResult:
        """What the interval from `begin_s` to `_end_s` gave."""
        self.time_s = self._end_s - self._start_s
        record = IntervalRecord.zeros(1, self.model.profile.n_nodes)
        completed = self._collect(record, begin_s, self._end_s, refused)
        record.arrived[0] = arrived
        if record.completed[0]:
            mean = float(record.latency_sum_s[0] / record.completed[0])
            self._latency_ratio = mean / self.model.references.latency_s
        return StepResult(state=self._state(), record=record, completed=completed)

    def _bind(self) -> tuple[Plan, tuple[CutTable, ...]]:
        """The present plan, and the cut tables that go with it."""
        late: tuple[CutTable, ...] = ()
        if self._late_rule is not None and self._seen.node_up.all():
            if self._late_profile is not self.model.profile:  # it was recalibrated
                self._late_rule, self._late_profile = LateRule(self.model), self.model.profile
            late = self._late_rule.tables(self._seen, self._cuts).cut_tables(0)
        return Plan(tuple(int(c) for c in self._cuts[0])), late

    def _play(self, intervals: Sequence[IntervalConditions], start_s: float) -> None:
        """Play these intervals from then on, if anything plays them; the last sub-step is held."""
        playback = self._playback
        if playback is None:
            return
        dt = self._conditions.substep_s
        rates = np.concatenate([i.hop_bytes_per_s[0] for i in intervals], axis=1)
        loads = 1.0 - np.concatenate([i.node_speed[0] for i in intervals], axis=1)
        for hop, row in enumerate(rates / BYTES_PER_S_PER_MBPS):
            playback.play_rate(hop, start_s, dt, row.tolist())
        for hop, setup in enumerate(self.scenario.hops):
            if setup.delay is not None:
                delays = np.concatenate([i.hop_delay_s[0, hop] for i in intervals])
                playback.play_delay(hop, start_s, dt, delays.tolist())
        for node, row in enumerate(loads):
            playback.play_load(node, start_s, dt, row.tolist())

    def _measure_hops(self) -> None:
        """Probe every hop, so that the first decision knows it; charged to no interval."""
        probing, n_nodes = self.scenario.probing, self.model.profile.n_nodes
        self._probed_s = time.monotonic()
        self._start_probes(np.full(n_nodes - 1, float(probing.payload_bytes)))
        wait([future for *_, future in self._probes], timeout=probing.idle_s)
        answered = {h for h, _, future in self._probes if future.done() and not future.exception()}
        self._silent = set(range(n_nodes - 1)) - answered
        self._collect_probes(IntervalRecord.zeros(1, n_nodes))

    def _finish_open(self) -> None:
        for item in self._open:
            item.future.exception()
        for _, _, future in self._probes:
            future.exception()

    def _start_probes(self, probe_bytes: F64) -> None:
        busy = {hop for hop, _, future in self._probes if not future.done()}
        for hop, n_bytes in enumerate(probe_bytes):
            if n_bytes > 0 and hop not in busy:
                future = self._probers.submit(self.client.probe, hop, int(n_bytes), 1)
                self._probes.append((hop, float(n_bytes), future))

    def _collect(
        self,
        record: IntervalRecord,
        begin: float,
        end: float,
        refused: list[float],
        lost_after: float = math.inf,
    ) -> Completed:
        """Account for an interval: what is still open, what ended, what probing took."""
        spans: list[tuple[float, float]] = []
        ended: list[tuple[float, float, Any]] = [(s, s, None) for s in refused]
        still: list[_Open] = []
        for item in self._open:
            if not item.future.done():
                still.append(item)
                spans.append((max(item.scheduled_s, begin), end))
                continue
            error = item.future.exception()
            if error is None:
                reply = item.future.result()
                self.last_output = reply.output
                finished, done = float(reply.record.completed_s), reply.record
                if finished > lost_after:
                    finished, done = end, None
            else:
                log.warning("request failed: %s", error)
                finished, done = end, None
            # One that completed just past the boundary was seen in this interval all the same.
            spans.append((max(item.scheduled_s, begin), max(finished, begin)))
            ended.append((item.scheduled_s, finished, done))
        self._open = still
        record.outstanding_s[0] = sum(max(0.0, b - a) for a, b in spans)
        record.union_s[0] = _union(spans)
        for scheduled, finished, done in ended:
            if done is None:
                record.lost[0] += 1
                continue
            latency = finished - scheduled
            record.completed[0] += 1
            record.latency_sum_s[0] += latency
            record.late[0] += latency > self.model.references.deadline_s
            record.node_active_s[0] += done.work_s
            record.node_busy_s[0] += done.stage_s
            record.hop_transmit_s[0] += done.transmit_s
            self._note_work(done.plan, done.work_s)
        self._collect_probes(record)
        return self._completed(ended)

    def _collect_probes(self, record: IntervalRecord) -> None:
        waiting = []
        for hop, n_bytes, future in self._probes:
            if not future.done():
                waiting.append((hop, n_bytes, future))
                continue
            error = future.exception()
            if isinstance(error, SplitpilotError):
                # Once for each time that it goes down; an outage is probed every second.
                level = logging.DEBUG if hop in self._failing else logging.WARNING
                log.log(level, "probe of hop %d failed: %s", hop, error)
                self._failing.add(hop)
            elif error is not None:
                raise error
            else:
                self._failing.discard(hop)
            if not isinstance(error, RequestRefused):  # without an answer, it was sent all the same
                rate = self._rate(hop, self.client.status())
                record.hop_transmit_s[0, hop] += n_bytes / rate
        self._probes = waiting

    def _completed(self, ended: list[tuple[float, float, Any]]) -> Completed:
        n_nodes = self.model.profile.n_nodes
        nodes, hops = (0.0,) * n_nodes, (0.0,) * (n_nodes - 1)
        done = [d for _, _, d in ended]

        def rows(name: str, empty: tuple[float, ...]) -> F64:
            values = [getattr(d, name) if d is not None else empty for d in done]
            return np.array(values, dtype=np.float64).reshape(len(done), len(empty))

        cuts = [d.plan if d is not None else tuple(self._cuts[0]) for d in done]
        return Completed(
            env=np.zeros(len(done), dtype=np.int64),
            arrival_s=np.array([s - self._start_s for s, _, _ in ended]),
            completion_s=np.array([f - self._start_s for _, f, _ in ended]),
            cuts=np.array(cuts, dtype=np.int64).reshape(len(done), n_nodes - 1),
            stage_s=rows("stage_s", nodes),
            work_s=rows("work_s", nodes),
            transmit_s=rows("transmit_s", hops),
            wait_s=np.array([self._waited_s(d) if d is not None else 0.0 for d in done]),
            lost=np.array([d is None for d in done], dtype=bool),
        )

    def _waited_s(self, record: Any) -> float:
        """What a request waited behind others: to be submitted, at nodes, and at hops.

        What is left of a hop's time without its service and propagation is the wait there.
        """
        status = self.client.status()
        total = record.submitted_s - record.scheduled_s + sum(record.queue_s)
        for h, (crossed_s, served_s) in enumerate(
            zip(record.hop_s, record.transmit_s, strict=True)
        ):
            total += max(0.0, crossed_s - served_s - 0.5 * self._rtt(h, status))
        return float(total)

    def _rate(self, hop: int, status: Any) -> float:
        node = status.get(hop)
        measured = node.hop_bytes_per_s if node is not None else None
        return float(measured or self.model.profile.hops[hop].bytes_per_s)

    def _rtt(self, hop: int, status: Any) -> float:
        node = status.get(hop)
        measured = node.hop_rtt_s if node is not None else None
        return float(measured or self.model.profile.hops[hop].rtt_s)

    def _state(self) -> SystemState:
        """The state now; cut tables are derived from the last one that was seen."""
        self._seen = self._measured_state()
        return self._seen

    def _measured_state(self) -> SystemState:
        status = self.client.status()
        now = time.monotonic()
        n_nodes = self.model.profile.n_nodes
        slowest = self.scenario.probing.unanswered_bytes_per_s
        rates, ages, rtts, hop_backlog = [], [], [], []
        for h in range(n_nodes - 1):
            node = status.get(h)
            measured = node is not None and node.hop_bytes_per_s
            age = node.hop_age_s + now - node.received_s if measured else now - self._start_s
            rate = self._rate(h, status)
            if h in self._silent and not (measured and now - age > self._probed_s):
                rate, age = min(rate, slowest), now - self._start_s
            rates.append(rate)
            ages.append(max(0.0, age))
            rtts.append(self._rtt(h, status))
            hop_backlog.append(node.hop_backlog_bytes if node is not None else 0.0)
        loads, backlogs = [], []
        for k in range(n_nodes):
            node = status.get(k)
            loads.append(min(node.load, 0.9) if node is not None else 0.0)
            backlogs.append(node.backlog_s if node is not None else 0.0)
        return SystemState(
            bytes_per_s=np.array([rates]),
            bandwidth_age_s=np.array([ages]),
            rtt_s=np.array([rtts]),
            node_load=np.array([loads], dtype=np.float64),
            node_backlog_s=np.array([backlogs], dtype=np.float64),
            hop_backlog_bytes=np.array([hop_backlog], dtype=np.float64),
            arrival_rps=np.array([self._arrival_rps]),
            in_flight=np.array([float(sum(not item.future.done() for item in self._open))]),
            cuts=self._cuts.copy(),
            latency_ratio=np.array([self._latency_ratio]),
            node_up=np.array([[not (k in status and status[k].down) for k in range(n_nodes)]]),
        )


def _sleep_until(t_s: float) -> None:
    delay = t_s - time.monotonic()
    if delay > 0:
        time.sleep(delay)


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total
