"""What a node does with each frame, without sockets or torch.

The loop in `executor.node` feeds frames and outcomes in, and sends what the core leaves in `up`
(towards clients) and in the hop's outbox (down the chain). Nodes hold no routing state but the
way back to each client, and no plan: every frame carries its own.
"""

from __future__ import annotations

import collections
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from executor._compute import FairQueue, Job, Outcome
from executor._hop import Hop, Parts, ProbeRun, localise
from executor.energy import Meter
from executor.errors import ConfigError, WireError
from executor.plan import ModelSpec, Plan
from executor.wire import (
    Header,
    HopStamp,
    Kind,
    StageStamp,
    array_body,
    check_body,
    decode_json,
    encode_json,
    pack,
    parse_header,
)

__all__ = ["CoreConfig", "NodeCore"]

_log = logging.getLogger(__name__)

_STATUS_PERIOD_S = 0.1
# A listener is kept through a frame that takes this long to arrive on a slow hop.
_LISTENER_KEPT_S = 30.0
_MAX_LISTENERS = 256
_MAX_ROUTES = 4096
_LOG_PERIOD_S = 1.0
_MAX_PROBE_REPEATS = 100
_MAX_PROBE_BYTES = 16 * 2**20
_MAX_PROFILE_REPEATS = 1000


@dataclass(frozen=True)
class CoreConfig:
    """What a node's core must know.

    Attributes:
        index: The node's place in the chain.
        n_nodes: Nodes in the chain.
        spec: The model.
        digest: First 8 bytes of the weights' digest.
        max_queue: Requests that may queue for compute, and that may wait on the hop.
        hello: What the node says of itself in a handshake.
    """

    index: int
    n_nodes: int
    spec: ModelSpec
    digest: bytes
    max_queue: int
    hello: Mapping[str, Any]


class _Refusal(Exception):
    """A request cannot be served; the code and reason go back to the client."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class NodeCore:
    """One node's protocol.

    Attributes:
        up: Messages for upstream, each with the peer's identity; the owner takes them out.
        hop: The hop to the next node; None on the last.
        bad_frames: Frames that could not be accepted, so far.
        refused: Requests refused over a bound, so far.
    """

    def __init__(
        self,
        config: CoreConfig,
        jobs: FairQueue,
        measure: Callable[[float], dict[str, Any]],
        meter: Meter,
    ) -> None:
        """Prepare.

        Args:
            config: The node.
            jobs: Where stages to compute go.
            measure: Given the time, the compute half of a STATUS (load, backlog_s, ...).
            meter: Counts the node's energy.
        """
        self.config = config
        self.up: collections.deque[tuple[bytes, Parts]] = collections.deque()
        self.hop = Hop(uuid.uuid4().bytes) if config.index < config.n_nodes - 1 else None
        self.bad_frames = 0
        self.refused = 0
        self._jobs = jobs
        self._measure = measure
        self._meter = meter
        self._routes: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._listeners: dict[bytes, float] = {}
        self._last_received_s = 0.0
        self._next_status_s = 0.0
        self._logged_s = float("-inf")
        self._unlogged = 0

    def on_upstream(self, identity: bytes, parts: Parts, now_s: float) -> None:
        """Take a message from a client or from the node before this one."""
        try:
            header, body = _split(parts)
        except WireError as error:
            self._bad_frame(f"from upstream: {error}", now_s)
            return
        self._listen(identity, now_s)
        if header.kind is Kind.PING:
            pong = header.reply(Kind.PONG)
            pong.clock_s = (header.clock_s[0], now_s, time.monotonic())
            self.up.append((identity, [pack(pong)]))
            if header.body_bytes:
                self._last_received_s = now_s
            return
        if header.kind not in (Kind.HELLO, Kind.INFER, Kind.PROBE, Kind.PROFILE):
            self._bad_frame(f"{header.kind.name} does not come from upstream", now_s)
            return
        self._routes[header.client] = identity
        self._routes.move_to_end(header.client)
        if len(self._routes) > _MAX_ROUTES:
            self._routes.popitem(last=False)
        try:
            check_body(header, body)
            if header.kind is Kind.INFER:
                self._infer(identity, header, body, now_s)
            else:
                self._control(header, body, now_s)
        except WireError as error:
            self._bad_frame(str(error), now_s)
            self._error(header, "bad_body", str(error))
        except _Refusal as refusal:
            self.refused += refusal.code == "refused"
            self._error(header, refusal.code, str(refusal))

    def on_downstream(self, parts: Parts, now_s: float) -> None:
        """Take a message from the node after this one."""
        assert self.hop is not None
        try:
            header, body = _split(parts)
            check_body(header, body)
            if header.kind is Kind.RESULT:
                self._localise(header)
        except WireError as error:
            self._bad_frame(f"from downstream: {error}", now_s)
            return
        if header.kind is Kind.ACK:
            self.hop.on_ack(header, now_s)
        elif header.kind is Kind.PONG:
            ended = self.hop.on_pong(header, now_s)
            if ended is not None:
                self._probe_done(ended)
        elif header.kind is Kind.STATUS:
            self._broadcast(header, body)
        elif header.kind in (
            Kind.RESULT,
            Kind.ERROR,
            Kind.HELLO_REPLY,
            Kind.PROFILE_REPLY,
            Kind.PROBE_REPLY,
        ):
            self._to_client(header, body)
        else:
            self._bad_frame(f"{header.kind.name} does not come from downstream", now_s)

    def on_outcome(self, outcome: Outcome, now_s: float) -> None:
        """Take what the compute thread finished."""
        job, header = outcome.job, outcome.job.header
        if outcome.error:
            self._error(header, "failed", outcome.error)
        elif job.profile_repeats:
            self._json_up(header.reply(Kind.PROFILE_REPLY), {"unit_s": list(outcome.unit_s)})
        elif outcome.output is not None:
            self._meter.note_work(active_s=outcome.work_s)
            k = self.config.index
            header.stages[k] = StageStamp(
                header.stages[k].arrive_s, outcome.start_s, outcome.end_s, outcome.work_s
            )
            body = array_body(header, outcome.output)
            if k == Plan(header.cuts).last_node(self.config.spec.n_units):
                header.kind = Kind.RESULT
                self._to_client(header, body)
                return
            try:
                self._send_down(header, body, now_s)
            except _Refusal as refusal:
                self.refused += 1
                self._error(header, refusal.code, str(refusal))

    def due_s(self, now_s: float) -> float:
        """Seconds until `tick` has something to do."""
        due_s = self._next_status_s
        if self.hop is not None:
            due_s = min(due_s, self.hop.due_s())
        return max(0.0, due_s - now_s)

    def tick(self, now_s: float) -> None:
        """Do what is due by the clock: STATUS upstream, pings down the hop."""
        if self.hop is not None:
            lost = self.hop.tick(now_s)
            if lost is not None:
                self._error(lost.request, "failed", "the probe got no answer")
        if now_s < self._next_status_s:
            return
        self._next_status_s = max(self._next_status_s, now_s) + _STATUS_PERIOD_S
        for identity, heard_s in list(self._listeners.items()):
            if now_s - heard_s > _LISTENER_KEPT_S:
                del self._listeners[identity]
        if self._listeners:
            header = Header(Kind.STATUS, clock_s=(now_s, 0.0, 0.0))
            body = encode_json(self._status(now_s))
            header.body_bytes = len(body)
            self._broadcast(header, memoryview(body))

    def forget(self, identity: bytes) -> None:
        """Drop a peer that cannot be reached any more."""
        self._listeners.pop(identity, None)

    def _infer(
        self, identity: bytes, header: Header, body: memoryview | None, now_s: float
    ) -> None:
        """Compute, or only relay, an inference."""
        k, spec = self.config.index, self.config.spec
        if k > 0:
            ack = header.reply(Kind.ACK)
            ack.clock_s = (header.clock_s[0], now_s, time.monotonic())
            self.up.append((identity, [pack(ack)]))
        if header.digest != self.config.digest:
            raise _Refusal(
                "wrong_model",
                f"runs weights {self.config.digest.hex()}, asked for {header.digest.hex()}",
            )
        try:
            plan = Plan(header.cuts)
            plan.check(spec.n_units, self.config.n_nodes)
        except ConfigError as error:
            raise _Refusal("bad_plan", str(error)) from None
        if k > plan.last_node(spec.n_units):
            raise _Refusal("bad_plan", f"plan {plan} ends before this node")
        start, stop = plan.stage(k, spec.n_units)
        expected = spec.cut_bytes[start]
        if header.dtype is None or header.dtype.name != "float32" or header.body_bytes != expected:
            got = f"{header.body_bytes} bytes of {header.dtype or 'no dtype'}"
            raise WireError(f"cut {start} carries {expected} bytes of float32, got {got}")
        header.stages[k] = StageStamp(arrive_s=now_s)
        if k > 0:
            sent_s = header.hops[k - 1].sent_s
            header.hops[k - 1] = HopStamp(sent_s, now_s, self._last_received_s)
            self._last_received_s = now_s
        if start == stop:
            self._send_down(header, body, now_s)
        elif not self._jobs.put(Job(header, body, start, stop)):
            raise _Refusal(
                "refused", f"its queue is full ({self.config.max_queue} requests); send slower"
            )

    def _send_down(self, header: Header, body: memoryview | None, now_s: float) -> None:
        assert self.hop is not None
        if self.hop.backlog_frames >= self.config.max_queue:
            raise _Refusal(
                "refused",
                f"{self.hop.backlog_bytes} bytes wait on its hop "
                f"({self.config.max_queue} requests); send slower",
            )
        header.clock_s = (now_s, 0.0, 0.0)
        header.hops[self.config.index] = HopStamp(sent_s=now_s)
        self.hop.send(header, body, now_s)

    def _control(self, header: Header, body: memoryview | None, now_s: float) -> None:
        """Handshake, probe or profile: answer it here or hand it down the chain."""
        if header.kind is Kind.HELLO:
            self._json_up(header.reply(Kind.HELLO_REPLY), self.config.hello)
            if self.hop is not None:
                self.hop.forward(header, body)
            return
        request = decode_json(body)
        field = "hop" if header.kind is Kind.PROBE else "node"
        last = self.config.n_nodes - (2 if header.kind is Kind.PROBE else 1)
        target = _whole(request, field, 0, last)
        if target < self.config.index:
            raise WireError(f"{field} {target} lies before this node")
        if target > self.config.index:
            assert self.hop is not None
            self.hop.forward(header, body)
        elif header.kind is Kind.PROFILE:
            repeats = _whole(request, "repeats", 1, _MAX_PROFILE_REPEATS)
            if not self._jobs.put(Job(header, profile_repeats=repeats)):
                raise _Refusal("refused", "its queue is full; profile later")
        else:
            assert self.hop is not None
            n_bytes = _whole(request, "payload_bytes", 1, _MAX_PROBE_BYTES)
            repeats = _whole(request, "repeats", 1, _MAX_PROBE_REPEATS)
            self.hop.probe(ProbeRun(header, n_bytes, repeats), now_s)

    def _localise(self, header: Header) -> None:
        """Put a result's later stamps into this node's clock, and charge its hop's transfer."""
        k = self.config.index
        assert self.hop is not None
        if len(header.hops) != self.config.n_nodes - 1:
            raise WireError(f"a result has {self.config.n_nodes - 1} cuts, got {header.cuts}")
        localise(header, k, self.hop.clock.offset_s, self.hop.one_way_s)
        _, received_s, free_s = header.hops[k]
        self._meter.note_work(transmit_s=max(0.0, received_s - free_s))

    def _probe_done(self, run: ProbeRun) -> None:
        self._json_up(run.request.reply(Kind.PROBE_REPLY), {"rtts_s": run.rtts_s})

    def _status(self, now_s: float) -> dict[str, Any]:
        values: dict[str, Any] = {
            "node": self.config.index,
            "queue_len": len(self._jobs),
            "hop_backlog_bytes": 0,
            "hop_bytes_per_s": None,
            "hop_rtt_s": None,
            "hop_age_s": None,
            "refused": self.refused,
            "bad_frames": self.bad_frames,
        }
        if self.hop is not None:
            values["hop_backlog_bytes"] = self.hop.backlog_bytes
            values["hop_rtt_s"] = _short(self.hop.rate.rtt_s)
            estimate = self.hop.rate.estimate(now_s)
            if estimate is not None:
                values["hop_bytes_per_s"] = _short(estimate.bytes_per_s)
                values["hop_age_s"] = _short(estimate.age_s)
        values["meter"] = self._meter.name
        values["energy_j"] = _short(self._meter.read_j())
        return {**values, **self._measure(now_s)}

    def _listen(self, identity: bytes, now_s: float) -> None:
        """Whoever talks to a node hears its STATUS for a while."""
        if identity in self._listeners or len(self._listeners) < _MAX_LISTENERS:
            self._listeners[identity] = now_s

    def _broadcast(self, header: Header, body: memoryview | None) -> None:
        parts: Parts = [pack(header)] if body is None else [pack(header), body]
        self.up.extend((identity, parts) for identity in self._listeners)

    def _json_up(self, header: Header, values: Mapping[str, Any]) -> None:
        body = encode_json({**values, "node": self.config.index})
        header.body_bytes = len(body)
        self._to_client(header, memoryview(body))

    def _error(self, header: Header, code: str, reason: str) -> None:
        name = self.config.hello.get("name", self.config.index)
        self._json_up(
            header.reply(Kind.ERROR), {"code": code, "reason": f"node {name}: {reason}"[:1000]}
        )

    def _to_client(self, header: Header, body: memoryview | None) -> None:
        identity = self._routes.get(header.client)
        if identity is not None:
            self.up.append((identity, [pack(header)] if body is None else [pack(header), body]))

    def _bad_frame(self, reason: str, now_s: float) -> None:
        """Count a frame that cannot be accepted; log at most one line a second."""
        self.bad_frames += 1
        self._unlogged += 1
        if now_s - self._logged_s >= _LOG_PERIOD_S:
            _log.warning("bad frame (%d since the last line): %s", self._unlogged, reason)
            self._logged_s, self._unlogged = now_s, 0


def _split(parts: Parts) -> tuple[Header, memoryview | None]:
    """Parse the header; the body is checked later, when there is somebody to answer."""
    if len(parts) not in (1, 2):
        raise WireError(f"a message has 1 or 2 parts, got {len(parts)}")
    return parse_header(parts[0]), memoryview(parts[1]) if len(parts) == 2 else None


def _whole(request: Mapping[str, Any], field: str, low: int, high: int) -> int:
    value = request.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{field} must be a whole number in {low}..{high}, got {value!r}")
    return value


def _short(value: float | None) -> float | None:
    """Six significant digits are enough, and keep the heartbeat small."""
    return None if value is None else float(f"{value:.6g}")
