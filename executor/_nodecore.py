"""What a node does with each frame, without sockets or torch.

The loop in `executor.node` feeds frames and outcomes in, and sends what the core leaves in `up`
(towards clients) and in the hops' outboxes (down the chain). Nodes hold no routing state but the
way back of each request, and no plan: every frame carries its own.

A request that comes twice is computed once. A later try (`Header.tries`) replaces an earlier one:
what queues for that is dropped, and a stage under way is used if both want the same one and given
up before its next unit if they do not.
"""

from __future__ import annotations

import collections
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from executor._bulletin import Bulletin, read_status
from executor._compute import FairQueue, Job, Outcome, turn_until_s
from executor._coreconfig import CoreConfig
from executor._fairness import Crowd
from executor._hop import Hop, Parts, ProbeRun, hop_status, localise, short
from executor._json import decode_json, encode_json
from executor._limits import PeerLimits, Routes
from executor._listeners import STATUS_PERIOD_S, Listeners
from executor._requests import ANSWERS, Refusal, check_size, over_rate, split, stage_of, whole
from executor._ways import Way, Ways
from executor.codec import form_of
from executor.energy import Meter
from executor.errors import FrameDamaged, WireError
from executor.late import chooser, rebound
from executor.plan import next_node, plan_of
from executor.wire import (
    Header,
    HopStamp,
    Kind,
    StageStamp,
    array_body,
    attach,
    check_body,
    message,
)

__all__ = ["CoreConfig", "NodeCore"]

_log = logging.getLogger(__name__)

_LOG_PERIOD_S = 1.0
_MAX_PROBE_REPEATS = 100
_MAX_PROBE_BYTES = 16 * 2**20
_MAX_PROFILE_REPEATS = 1000


class NodeCore:
    """One node's protocol.

    Attributes:
        up: Messages for upstream, each with the peer's identity; the owner takes them out.
        acks: Acknowledgements and pongs, each with the peer's identity and without the time of
            replying; the owner takes them out in this order, but what is on its way goes first.
        hop: The hop to the next node; None on the last.
        direct: The direct link, if the node has one.
        bad_frames: Frames that could not be accepted, so far.
        refused: Requests refused over a bound, so far.
        duplicates: Requests that came again while they were under way, so far.
        stuck: Links whose connection has to be made anew; the owner takes them out.
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
        self.acks: collections.deque[tuple[bytes, Header]] = collections.deque()
        last = config.index == config.n_nodes - 1
        self.hop = None if last else Hop(uuid.uuid4().bytes, config.index + 1)
        far = config.direct
        self.direct = None if far is None else Hop(uuid.uuid4().bytes, far)
        self.links = tuple(link for link in (self.hop, self.direct) if link is not None)
        self.bad_frames = self.refused = self.duplicates = 0
        self.stuck: list[Hop] = []
        self._jobs = jobs
        self._measure = measure
        self._meter = meter
        self._routes = Routes()
        self._limits = PeerLimits(config.peer_rate_rps)
        self._ways = Ways()
        self._crowd = Crowd()
        self._listeners = Listeners(config.n_nodes)
        self._bulletins = [Bulletin(node) for node in range(config.n_nodes)]
        self._last_received_s = 0.0
        self._next_status_s = 0.0
        self._urgent = False
        self._logged_s = float("-inf")
        self._unlogged = 0

    @property
    def has_jobs(self) -> bool:
        """Whether something waits to be computed."""
        return len(self._jobs) > 0

    def on_upstream(self, identity: bytes, parts: Parts, now_s: float) -> None:
        """Take a message from a client or from the node before this one."""
        try:
            header, body = split(parts)
        except WireError as error:
            self._bad_frame(f"from upstream: {error}", now_s)
            return
        self._listeners.heard(identity, now_s)
        admitted = self._limits.admit(identity, now_s)
        if header.kind is Kind.PING:
            if not admitted:
                return
            self._acknowledge(identity, header, Kind.PONG, now_s)
            if header.body_bytes:
                self._last_received_s = now_s
            return
        if header.kind not in (Kind.HELLO, Kind.INFER, Kind.PROBE, Kind.PROFILE):
            self._bad_frame(f"{header.kind.name} does not come from upstream", now_s)
            return
        self._routes.learn(header.client, identity)
        try:
            if not admitted:
                raise over_rate(self.config.peer_rate_rps)
            check_size(header)
            check_body(header, body)
            if header.kind is Kind.INFER:
                self._infer(identity, header, body, now_s)
            else:
                self._control(header, body, now_s)
        except FrameDamaged as error:
            self._bad_frame(str(error), now_s)
            self._error(header, "damaged", str(error))
        except WireError as error:
            self._bad_frame(str(error), now_s)
            self._error(header, "bad_body", str(error))
        except Refusal as refusal:
            self._refuse(header, refusal, now_s)

    def on_downstream(self, parts: Parts, now_s: float, link: Hop | None = None) -> None:
        """Take a message from a node after this one, over the hop unless `link` says otherwise."""
        link = link or self.hop
        assert link is not None
        link.on_heard(now_s)
        try:
            header, body = split(parts)
        except WireError as error:
            # It may have been the answer to any request that was sent on over this link.
            self._bad_frame(f"from downstream: {error}", now_s)
            self._lose(self._ways.over(link), "lost", f"damaged on its way back: {error}", link)
            return
        try:
            check_body(header, body)
            if header.kind is Kind.RESULT:
                self._localise(header, link)
        except WireError as error:
            self._bad_frame(f"from downstream: {error}", now_s)
            if header.kind in (Kind.RESULT, Kind.ERROR):
                self._lose([header], "lost", f"damaged on its way back: {error}", link)
            return
        if header.kind is Kind.ACK:
            link.on_ack(header, now_s)
            self._notice_lost(link)
        elif header.kind is Kind.PONG:
            ended = link.on_pong(header, now_s)
            self._notice_lost(link)
            if ended is not None:
                self._json_up(ended.request.reply(Kind.PROBE_REPLY), {"rtts_s": ended.rtts_s})
        elif header.kind in (Kind.STATUS, Kind.BEAT):
            self._on_status(header, body, link, now_s)
        elif header.kind in ANSWERS:
            if header.kind is Kind.RESULT:
                self._crowd.answered(header.client, now_s)
            self._to_client(header, body)
        else:
            self._bad_frame(f"{header.kind.name} does not come from downstream", now_s)

    def on_link(self, link: Hop, up: bool, now_s: float) -> None:
        """A link was connected, or its connection broke with all that was under way on it."""
        if up:
            link.on_connected(now_s)
        elif link.connected is not False:
            for run in link.on_disconnected():
                self._error(run.request, "hop_down", "the connection broke", link.target)
            self._lose(self._ways.over(link), "hop_down", "the connection broke", link)
        self._next_status_s, self._urgent = now_s, True  # whoever listens should know at once

    def on_outcome(self, outcome: Outcome, now_s: float) -> None:
        """Take what the compute thread finished."""
        job, header = outcome.job, outcome.job.header
        if job.profile_repeats:
            if outcome.error:
                self._error(header, "failed", outcome.error)
            else:
                self._json_up(header.reply(Kind.PROFILE_REPLY), outcome.profile())
            return
        if outcome.output is not None:
            self._meter.note_work(active_s=outcome.work_s)
        way = self._ways.get(header)
        if way is None or way.job is not job:
            return  # a later try took another way, or an earlier one was answered after all
        way.job, header = None, way.header
        if outcome.error:
            self._error(header, "failed", outcome.error)
        elif outcome.output is not None:
            k = self.config.index
            if outcome.job.choose is not None:
                header.cuts = rebound(plan_of(header.cuts), k, outcome.stop).cuts
            header.stages[k] = StageStamp(
                header.stages[k].arrive_s, outcome.start_s, outcome.end_s, outcome.work_s
            )
            body = array_body(header, outcome.output)
            if k == plan_of(header.cuts).last_node(self.config.spec.n_units):
                header.kind, header.late = Kind.RESULT, ()
                self._crowd.answered(header.client, now_s)
                self._to_client(header, body)
                return
            try:
                self._send_down(header, body, now_s)
            except Refusal as refusal:
                self._refuse(header, refusal, now_s)

    def due_s(self, now_s: float) -> float:
        """Seconds until `tick` has something to do; negative where it is overdue."""
        due_s = self._next_status_s
        for link in self.links:
            due_s = min(due_s, link.due_s())
        return due_s - now_s

    def tick(self, now_s: float) -> None:
        """Do what is due by the clock: STATUS upstream, pings down the links."""
        for link in self.links:
            lost = link.tick(now_s)
            if lost is not None:
                self._error(lost.request, "failed", "the probe got no answer")
            if link.connected and link.is_stuck(now_s):
                self.stuck.append(link)
        self._let_go(now_s)
        if now_s < self._next_status_s:
            return
        self._next_status_s = max(self._next_status_s, now_s) + STATUS_PERIOD_S
        self._listeners.forget_silent(now_s)
        listeners = self._listeners
        told = listeners.everybody() if self._urgent else listeners.turn(self.config.index)
        self._urgent = False
        if told:
            own = self._bulletins[self.config.index]
            own.report(self._status(now_s), now_s)
            self.up.extend(own.messages(told))

    def forget(self, identity: bytes) -> None:
        """Drop a peer that cannot be reached any more."""
        self._listeners.forget(identity)
        self._limits.forget(identity)

    def _infer(
        self, identity: bytes, header: Header, body: memoryview | None, now_s: float
    ) -> None:
        """Compute, or only relay, an inference."""
        k = self.config.index
        if k > 0:
            self._acknowledge(identity, header, Kind.ACK, now_s)
        config = self.config
        start, stop = stage_of(header, body, k, config.n_nodes, config.spec, config.digest)
        if header.tries > 1:  # an older try may be overdue, and not told so yet
            self._let_go(now_s)
        old = self._ways.get(header)
        if old is not None and header.tries <= old.header.tries:
            self.duplicates += 1
            if header.tries == old.header.tries:
                old.identity = identity  # the connection it first came over may be gone
            return
        header.stages[k] = StageStamp(arrive_s=now_s)
        if k > 0:
            sent_s = header.hops[k - 1].sent_s
            header.hops[k - 1] = HopStamp(sent_s, now_s, self._last_received_s)
            self._last_received_s = now_s
        way = Way(identity, header)
        until_s = turn_until_s(header, now_s)
        if old is not None:
            if old.job is not None and (old.job.start, old.job.stop) == (start, stop):
                self.duplicates += 1
                way.job = old.job
                way.job.until_s = until_s
            else:
                self._abandon(old)
        self._ways.enter(way)
        choose = chooser(header.late, k, self.hop, start, stop)
        if start == stop and choose is not None:  # what is only relayed has its turn now
            stop = choose()
            header.cuts = rebound(plan_of(header.cuts), k, stop).cuts
        plain = form_of(header.dtype, header.affine) == "float32"
        if start == stop and not (plain and config.transfer != "float32"):
            self._send_down(header, body, now_s)
        elif way.job is None:
            way.job = Job(header, body, start, stop, choose=choose, until_s=until_s)
            self._enqueue(way.job, now_s)

    def _abandon(self, way: Way) -> None:
        """Nobody wants what is computed for a request here, or waits for its hop, any more."""
        if way.job is not None:
            way.job.abandoned = True
            self._jobs.discard(way.header.client, way.header.seq)
        if way.hop is not None:
            way.hop.withdraw(way.header)

    def _acknowledge(self, identity: bytes, header: Header, kind: Kind, now_s: float) -> None:
        ack = header.reply(kind)
        ack.clock_s = (header.clock_s[0], now_s, now_s)
        self.acks.append((identity, ack))

    def _enqueue(self, job: Job, now_s: float) -> None:
        """Queue a job; somebody is refused where there is no room, in fairness."""
        reason = f"its queue is full ({self.config.max_queue} requests); send slower"
        refusal, out = Refusal("refused", reason, full=True), self._jobs.put(job)
        if out is job:
            raise refusal
        if out is not None:
            self._refuse(out.header, refusal, now_s)

    def _let_go(self, now_s: float) -> None:
        """Refuse what waits to be computed for too long, and forget what nobody waits for."""
        reason = "its turn did not come in half of the time left to answer it; send slower"
        for job in self._jobs.overdue(now_s):
            self._refuse(job.header, Refusal("refused", reason, full=True), now_s)
        for link in self.links:
            for header in link.overdue(now_s):
                self._ways.drop(header)

    def _send_down(self, header: Header, body: memoryview | None, now_s: float) -> None:
        n_units, k = self.config.spec.n_units, self.config.index
        links = {k: self.config.direct} if header.direct and self.config.direct else None
        target = next_node(plan_of(header.cuts), k, n_units, links)
        link = self.hop if target == k + 1 else self.direct
        assert link is not None
        self._check_link(link)
        if link.backlog_frames >= self.config.max_queue:
            waits = f"{link.backlog_bytes} bytes wait on its hop"
            reason = f"{waits} ({self.config.max_queue} requests); send slower"
            refusal = Refusal("refused", reason, full=True)
            displaced = link.displace(header.client)
            if displaced is None:
                raise refusal
            self._refuse(displaced, refusal, now_s)
        header.clock_s = (now_s, 0.0, 0.0)
        if header.left_s:
            header.left_s -= now_s - header.stages[k].arrive_s
            if header.left_s <= 0.0:
                self._ways.drop(header)
                return
        # A direct link's stamps stand at the last of the hops that it leads past.
        header.hops[link.target - 1] = HopStamp(sent_s=now_s)
        way = self._ways.get(header)
        if way is not None:
            way.hop = link
        link.send(header, body, now_s)

    def _check_link(self, link: Hop) -> None:
        if link.connected is False:
            raise Refusal("hop_down", f"not connected to node {link.target}", link.target)

    def _control(self, header: Header, body: memoryview | None, now_s: float) -> None:
        """Handshake, probe or profile: answer it here or hand it down the chain."""
        if header.kind is Kind.HELLO:
            self._json_up(header.reply(Kind.HELLO_REPLY), self.config.hello)
            for link in self.links:
                link.forward(header, body)
            return
        request = decode_json(body)
        field = "hop" if header.kind is Kind.PROBE else "node"
        last = self.config.n_nodes - (2 if header.kind is Kind.PROBE else 1)
        target = whole(request, field, 0, last)
        if target < self.config.index:
            raise WireError(f"{field} {target} lies before this node")
        if target > self.config.index:
            assert self.hop is not None
            self._check_link(self.hop)
            identity = self._routes.get(header.client)
            assert identity is not None
            self._ways.enter(Way(identity, header, hop=self.hop))
            self.hop.forward(header, body)
        elif header.kind is Kind.PROFILE:
            repeats = whole(request, "repeats", 1, _MAX_PROFILE_REPEATS)
            self._enqueue(Job(header, profile_repeats=repeats), now_s)
        else:
            assert self.hop is not None
            self._check_link(self.hop)
            n_bytes = whole(request, "payload_bytes", 1, _MAX_PROBE_BYTES)
            repeats = whole(request, "repeats", 1, _MAX_PROBE_REPEATS)
            if not self.hop.probe(ProbeRun(header, n_bytes, repeats), now_s):
                raise Refusal("refused", "too many probes wait on its hop; probe later")

    def _localise(self, header: Header, link: Hop) -> None:
        """Put a result's later stamps into this node's clock, and charge the link's transfer."""
        if len(header.hops) != self.config.n_nodes - 1:
            raise WireError(f"a result has {self.config.n_nodes - 1} cuts, got {header.cuts}")
        localise(header, link.target - 1, link.clock.offset_s, link.one_way_s)
        _, received_s, free_s = header.hops[link.target - 1]
        self._meter.note_work(transmit_s=max(0.0, received_s - free_s))

    def _lose(self, headers: Sequence[Header], code: str, reason: str, link: Hop) -> None:
        """Report requests as lost on a link, so that they are sent again."""
        for header in headers:
            self._error(header, code, f"to node {link.target}: {reason}", link.target)

    def _notice_lost(self, link: Hop) -> None:
        """Report what the neighbour's acknowledgements show to be lost."""
        lost, link.lost = link.lost, []
        for client, seq, tries in lost:
            way = self._ways.get(Header(Kind.ACK, client=client, seq=seq))
            if way is not None and way.hop is link and way.header.tries == tries:
                self._lose([way.header], "lost", "never acknowledged", link)

    def _status(self, now_s: float) -> dict[str, Any]:
        return {
            "node": self.config.index,
            "queue_len": len(self._jobs),
            **hop_status(self.hop, now_s),
            "direct_up": self.direct.is_up(now_s) if self.direct is not None else None,
            "boot": str(self.config.hello.get("boot", "")),
            "refused": self.refused,
            "bad_frames": self.bad_frames,
            "duplicates": self.duplicates,
            "every_s": round(self._listeners.every_s, 3),
            "meter": self._meter.name,
            "energy_j": short(self._meter.read_j()),
            **self._measure(now_s),
        }

    def _on_status(self, header: Header, body: memoryview | None, link: Hop, now_s: float) -> None:
        """Pass what a node further on says of itself on upstream, to those whose turn it is."""
        try:
            node, every_s = read_status(
                header, body, range(self.config.index + 1, self.config.n_nodes)
            )
        except WireError as error:
            self._bad_frame(f"status from downstream: {error}", now_s)
            return
        if every_s is not None:
            self._bulletins[node].replace(message(header, body))
            link.every_s = every_s if node == link.target else link.every_s
        self.up.extend(self._bulletins[node].messages(self._listeners.turn(node)))

    def _json_up(self, header: Header, values: Mapping[str, Any]) -> None:
        body = encode_json({**values, "node": self.config.index})
        self._to_client(header, attach(header, body))

    def _refuse(self, header: Header, refusal: Refusal, now_s: float) -> None:
        self.refused += refusal.code == "refused"
        wait_s = self._crowd.refuse(header.client, now_s) if refusal.full else 0.0
        self._error(header, refusal.code, str(refusal), refusal.to, wait_s)

    def _error(
        self, header: Header, code: str, reason: str, to: int | None = None, wait_s: float = 0.0
    ) -> None:
        name = self.config.hello.get("name", self.config.index)
        values = {
            "code": code,
            "reason": f"node {name}: {reason}"[:1000],
            "to": self.config.index if to is None else to,
            "wait_s": round(wait_s, 3),
        }
        self._json_up(header.reply(Kind.ERROR), values)

    def _to_client(self, header: Header, body: memoryview | None) -> None:
        """Send an answer back the way its request came; it is then no longer open here."""
        identity = self._routes.get(header.client)
        way = self._ways.get(header)
        if way is not None:
            if header.kind is Kind.ERROR and header.tries < way.header.tries:
                return  # of a try that nobody waits for any more
            identity = way.identity
            self._ways.take(header)
            self._abandon(way)
        if identity is not None:
            self.up.append((identity, message(header, body)))

    def _bad_frame(self, reason: str, now_s: float) -> None:
        """Count a frame that cannot be accepted; log at most one line a second."""
        self.bad_frames += 1
        self._unlogged += 1
        if now_s - self._logged_s >= _LOG_PERIOD_S:
            _log.warning("bad frame (%d since the last line): %s", self._unlogged, reason)
            self._logged_s, self._unlogged = now_s, 0
