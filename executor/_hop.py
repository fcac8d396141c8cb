"""The sending side of one hop, without sockets: outbox, backlog, clock, pings and probes.

The node's loop sends what lies in `outbox` and hands back what the neighbour answers. A frame
counts as backlog until the neighbour acknowledges it, because ZeroMQ, the kernel and the link all
hold bytes that nobody else sees.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor._listeners import STATUS_PERIOD_S, silent_after_s
from executor._outbox import Outbox, Parts
from executor.link import PING_PERIOD_S, ClockOffset, PassiveEstimator
from executor.wire import Header, HopStamp, Kind, StageStamp, array_body, message

__all__ = ["Hop", "Parts", "ProbeRun", "hop_status", "localise", "short"]

Key = tuple[bytes, int, int]

_FIRST_PINGS = 8
_FIRST_PING_PERIOD_S = 0.05
_PING_LOST_S = 1.0
_MAX_OUTBOX = 1024
_PROBE_LOST_S = 60.0
_MAX_PROBES = 64
_STUCK_S = 4.0
_PAUSE_S = 1.0
# Six of the neighbour's heartbeats, or three where it has many to tell.
_SILENT_S = 0.6
_SLOWEST_BYTES_PER_S = 5000.0


@dataclass(slots=True)
class ProbeRun:
    """A client's probe of this hop: `repeats` round trips of a payload, one after the other."""

    request: Header
    payload_bytes: int
    repeats: int
    seq: int = 0
    sent_s: float = 0.0
    rtts_s: list[float] = field(default_factory=list)


class Hop:
    """What a node (or the client) knows of the hop to its next neighbour.

    Attributes:
        target: The neighbour's place in the chain.
        connected: Whether the owner's socket is connected to it; None as long as that is not known.
        every_s: How often the neighbour says that its STATUS comes.
        outbox: Messages to send; the owner takes them out.
        lost: Requests found lost on the way, as (client, seq, try); the owner takes them out.
        rate: Passive bandwidth estimate from acknowledged frames.
        clock: Offset of the neighbour's clock to ours, and the least round trip.
        probe_bytes: Body bytes of probes sent so far: traffic that serves no request.
    """

    def __init__(self, own_id: bytes, target: int = 0) -> None:
        """Start with nothing known; `own_id` (16 bytes) marks this sender's own pings."""
        self.target = target
        self.connected: bool | None = None
        self.every_s = STATUS_PERIOD_S
        self.outbox = Outbox(self._on_handed)
        self.lost: list[Key] = []
        self.rate = PassiveEstimator()
        self.clock = ClockOffset()
        self.probe_bytes = 0
        self._own_id = own_id
        self._seq = 0
        # In the order of sending: the first `_handed` have been sent, the rest waits in the outbox.
        self._handed = 0
        # Key, body bytes, when sent, whether it is a ping.
        self._unacked: collections.deque[tuple[Key, int, float, bool]] = collections.deque()
        self._moved_s = float("-inf")
        self._heard_s = float("-inf")
        self._ticked_s = self._awake_s = float("-inf")
        self._new_clock = False
        self._ping_seq = -1
        self._ping_sent_s = float("-inf")
        self._pings = 0
        self._probe: ProbeRun | None = None
        self._probes: collections.deque[ProbeRun] = collections.deque()

    @property
    def backlog_bytes(self) -> int:
        """Body bytes handed to the hop and not acknowledged."""
        return self.rate.unacked_bytes

    @property
    def backlog_frames(self) -> int:
        """Requests handed to the hop and not acknowledged."""
        return sum(1 for _, n_bytes, *_ in self._unacked if n_bytes)

    @property
    def expects(self) -> bool:
        """Whether something was sent that is not acknowledged yet."""
        return bool(self._unacked)

    def backlog_s(self, now_s: float) -> float | None:
        """Seconds in which its backlog gets across; None if unknown. From any thread.

        A link that is down never gets it across.
        """
        return float("inf") if self.connected is False else self.rate.backlog_s(now_s)

    @property
    def one_way_s(self) -> float:
        """Propagation delay of the hop; 0 until a frame was acknowledged."""
        return (self.rate.rtt_s or 0.0) / 2.0

    def send(self, header: Header, body: memoryview | None, now_s: float) -> None:
        """Queue a request or ping, and count it until it is acknowledged."""
        parts = message(header, body)
        if header.kind is Kind.INFER:
            until_s = now_s + header.left_s if header.left_s else float("inf")
            self.outbox.add_request(header, parts, until_s)
        else:
            self.outbox.append(parts, header)
        ping = header.kind is Kind.PING
        self._unacked.append((_key(header), header.body_bytes, now_s, ping))
        self.rate.on_sent(header.body_bytes, now_s, probe=ping)

    def forward(self, header: Header, body: memoryview | None) -> None:
        """Queue a message that nobody acknowledges (control frames).

        Dropped where the outbox is overlong, as it gets when the neighbour is away: whoever asked
        has a deadline and asks again.
        """
        if len(self.outbox) < _MAX_OUTBOX:
            self.outbox.append(message(header, body))

    def displace(self, client: bytes) -> Header | None:
        """Make room for a request of `client`: returns that of a greedier client which lost its.

        None if there is none, or all are on their way already.
        """
        displaced = self.outbox.displace(client)
        if displaced is not None:
            self._take_back([displaced])
        return displaced

    def overdue(self, now_s: float) -> list[Header]:
        """Take out the requests that still wait here, and that nobody waits for any more."""
        out = self.outbox.overdue(now_s)
        if out:
            self._take_back(out)
        return out

    def withdraw(self, header: Header) -> None:
        """Take out a request that nobody wants sent any more; one that is on its way stays."""
        if self.outbox.withdraw(header):
            self._take_back([header])

    def _take_back(self, headers: list[Header]) -> None:
        """Requests were taken out of the outbox: no acknowledgement will come for them."""
        keys = {_key(header) for header in headers}
        self._unacked = collections.deque(e for e in self._unacked if e[0] not in keys)
        self._recount()

    def _on_handed(self, header: Header) -> None:
        """A request or ping was sent: it may have overtaken others in the outbox."""
        position = self._position(header)
        if position is None or position < self._handed:
            return
        if position > self._handed:
            entry = self._unacked[position]
            del self._unacked[position]
            self._unacked.insert(self._handed, entry)
            self._recount()
        self._handed += 1

    def _position(self, header: Header) -> int | None:
        key = _key(header)
        return next((i for i, e in enumerate(self._unacked) if e[0] == key), None)

    def _recount(self) -> None:
        """Give the estimator the order in which acknowledgements will come."""
        self.rate.on_lost()
        for _, n_bytes, sent_s, ping in self._unacked:
            self.rate.on_sent(n_bytes, sent_s, probe=ping)

    def on_ack(self, header: Header, now_s: float) -> None:
        """Take an ACK or PONG: the neighbour has the frame, and all frames before it.

        Those before it that were never acknowledged were lost, with a connection or damaged.
        """
        position = self._position(header)
        if position is None:
            return
        if position > 0:
            self.lost += [self._unacked.popleft()[0] for _ in range(position)]
            self._recount()
        self._unacked.popleft()
        self._moved_s = now_s
        self._handed = max(0, self._handed - position - 1)
        _, received_s, replied_s = header.clock_s
        self.rate.on_ack(self.clock.to_local(received_s), now_s, max(0.0, replied_s - received_s))

    def on_pong(self, header: Header, now_s: float) -> ProbeRun | None:
        """Take a PONG; returns the probe that it completed, if any."""
        if header.client != self._own_id:
            return None
        sent_s, received_s, replied_s = header.clock_s
        if header.seq == self._ping_seq:
            self._ping_seq = -1
            if self._new_clock:  # its machine may have started anew, and its clock with it
                self.clock, self._new_clock = ClockOffset(), False
            self.clock.add(sent_s, received_s, replied_s, now_s)
        self.on_ack(header, now_s)
        probe = self._probe
        if probe is None or header.seq != probe.seq:
            return None
        probe.rtts_s.append(now_s - sent_s)
        if len(probe.rtts_s) >= probe.repeats:
            return self._next_probe(now_s)
        self._send_probe(probe, now_s)
        return None

    def probe(self, run: ProbeRun, now_s: float) -> bool:
        """Begin a probe, after those already under way; False if too many of them wait."""
        if len(self._probes) >= _MAX_PROBES:
            return False
        self._probes.append(run)
        if self._probe is None:
            self._next_probe(now_s)
        return True

    def stalled_s(self, now_s: float) -> float:
        """For how long nothing has got across while something waits for its acknowledgement."""
        return now_s - max(self._unacked[0][2], self._moved_s) if self._unacked else 0.0

    def on_heard(self, now_s: float) -> None:
        """Something came back over the link."""
        self._heard_s = now_s

    def is_up(self, now_s: float) -> bool | None:
        """Whether the link is connected and not silent; None as long as that is not known."""
        if self.connected is None:
            return None
        limit_s = silent_after_s(_SILENT_S, self.every_s)
        return self.connected and now_s - self._heard_s <= limit_s

    def is_stuck(self, now_s: float) -> bool:
        """Whether the connection is beyond hope: slower than any hop this is meant for.

        A damaged length makes the receiver wait for bytes that never come, while heartbeats still
        come back; only a new connection helps.
        """
        hopeless_s = _STUCK_S + self.backlog_bytes / _SLOWEST_BYTES_PER_S
        return self.stalled_s(now_s) > hopeless_s or self.is_silent(now_s)

    def is_silent(self, now_s: float) -> bool:
        """Whether so little comes back that the connection may be gone without a word, or damaged.

        A pause of this process does not count: what came meanwhile was not read yet.
        """
        limit_s = silent_after_s(_STUCK_S, self.every_s)
        return now_s - max(self._heard_s, self._awake_s) > limit_s

    def on_disconnected(self) -> list[ProbeRun]:
        """Forget what was under way, all of it lost; returns the probes that end with it."""
        self.connected = False
        self.outbox.clear()
        self._unacked.clear()
        self._handed = 0
        self.rate.on_lost()
        ended = [*([self._probe] if self._probe else []), *self._probes]
        self._probe = None
        self._probes.clear()
        return ended

    def on_connected(self, now_s: float) -> None:
        """Ping at once: the neighbour may be another process, which tells only those it knows."""
        self.connected = True
        self._heard_s = now_s
        self._new_clock = True
        self._pings, self._ping_seq, self._ping_sent_s = 0, -1, float("-inf")

    def due_s(self) -> float:
        """When the next ping is due, if the outbox is empty then; never while disconnected."""
        if self.connected is False:
            return float("inf")
        if self._ping_seq >= 0:
            # Late behind a backlog, or lost with a connection: the node may be back by now.
            return self._ping_sent_s + _PING_LOST_S
        early = self._pings < _FIRST_PINGS
        return self._ping_sent_s + (_FIRST_PING_PERIOD_S if early else PING_PERIOD_S)

    def tick(self, now_s: float) -> ProbeRun | None:
        """Send a ping when one is due; returns a probe that got no answer and was given up."""
        if now_s - self._ticked_s > _PAUSE_S:
            self._awake_s = now_s
        self._ticked_s = now_s
        lost = None
        if self._probe is not None and now_s - self._probe.sent_s > _PROBE_LOST_S:
            lost = self._next_probe(now_s)
        if not self.outbox and now_s >= self.due_s():
            self._pings += 1
            self._ping_sent_s = now_s
            self._ping_seq = self._ping(None, now_s)
        return lost

    def _send_probe(self, probe: ProbeRun, now_s: float) -> None:
        probe.sent_s = now_s
        self.probe_bytes += probe.payload_bytes
        probe.seq = self._ping(np.zeros(probe.payload_bytes, np.uint8), now_s)

    def _next_probe(self, now_s: float) -> ProbeRun | None:
        """End the probe under way, which is returned, and begin the next one."""
        ended = self._probe
        self._probe = self._probes.popleft() if self._probes else None
        if self._probe is not None:
            self._send_probe(self._probe, now_s)
        return ended

    def _ping(self, payload: NDArray[np.uint8] | None, now_s: float) -> int:
        self._seq += 1
        header = Header(Kind.PING, client=self._own_id, seq=self._seq, clock_s=(now_s, 0.0, 0.0))
        body = None if payload is None else array_body(header, payload)
        self.send(header, body, now_s)
        return self._seq


def hop_status(hop: Hop | None, now_s: float) -> dict[str, Any]:
    """What a STATUS says of the hop to the next node; `hop` is None on the last node."""
    estimate = hop.rate.estimate(now_s) if hop is not None else None
    return {
        "hop_backlog_bytes": hop.backlog_bytes if hop is not None else 0,
        "hop_bytes_per_s": short(estimate.bytes_per_s) if estimate is not None else None,
        "hop_rtt_s": short(hop.rate.rtt_s) if hop is not None else None,
        "hop_age_s": short(estimate.age_s) if estimate is not None else None,
        "hop_up": hop.is_up(now_s) if hop is not None else None,
        "stalled_s": round(hop.stalled_s(now_s), 3) if hop is not None else 0.0,
    }


def short(value: float | None) -> float | None:
    """Six significant digits are enough, and keep the heartbeat small."""
    return None if value is None else float(f"{value:.6g}")


def _key(header: Header) -> Key:
    return header.client, header.seq, header.tries


def localise(header: Header, hop: int, offset_s: float, one_way_s: float) -> None:
    """Convert the stamps that nodes after hop `hop` made into the clock of the node before it.

    Applied at every hop on the way back, so the client reads all stamps in its own clock.

    Args:
        header: A RESULT's header, changed in place.
        hop: Index of the hop it came over; -1 for the way from the first node to the client.
        offset_s: The far clock minus the near one.
        one_way_s: The hop's propagation delay; the hop's own `received_s` and `free_s` are raised
            to the earliest moment at which its frame could have arrived. (Clocks are known to half
            a round trip: without this, a short hop may seem never to have been crossed.)
    """
    for j in range(hop + 1, len(header.stages)):
        stage = header.stages[j]
        if stage.arrive_s:
            shift_s = offset_s if stage.start_s else 0.0
            header.stages[j] = StageStamp(
                stage.arrive_s - offset_s,
                stage.start_s - shift_s,
                stage.end_s - shift_s,
                stage.work_s,
            )
    for h in range(max(hop, 0), len(header.hops)):
        sent_s, received_s, free_s = header.hops[h]
        if not received_s:
            continue
        received_s -= offset_s
        free_s -= offset_s
        if h == hop:
            received_s = max(received_s, sent_s + one_way_s)
            free_s = max(free_s, sent_s + one_way_s)
        else:
            sent_s -= offset_s
        header.hops[h] = HopStamp(sent_s, received_s, min(free_s, received_s))
