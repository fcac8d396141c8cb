"""Moves frames between a node's sockets and its core; by whichever of its threads is free."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import zmq

from executor._compute import Outcome
from executor._hop import Hop, Parts
from executor._sockets import (
    HandshakeMonitor,
    connect_dealer,
    link_changes,
    receive_parts,
    send_parts,
    watch_link,
)
from executor._watched import WatchedCore
from executor.cluster import Cluster, NodeConfig
from executor.wire import pack

__all__ = ["Dialled", "Mover"]

_log = logging.getLogger("executor.node")

_MAX_WAIT_S = 0.1
_ROUNDS_PER_TURN = 16
# What is due by the clock may be so late in favour of a job.
_TICK_LATE_S = 0.05
# As plain numbers: combining pyzmq's flags takes longer than asking.
_IN = int(zmq.POLLIN)
_IN_OUT = int(zmq.POLLIN | zmq.POLLOUT)


class Dialled:
    """A dealer towards a node further on, and the socket that watches its connection."""

    def __init__(
        self, ctx: zmq.Context[zmq.Socket[bytes]], cluster: Cluster, target: NodeConfig, role: str
    ) -> None:
        self.endpoint = target.connect_endpoint()
        self.dealer = connect_dealer(ctx, cluster, target, role)
        self.monitor = watch_link(self.dealer)
        self.blocked = False

    def renew(self) -> None:
        """Drop the connection and make another."""
        self.dealer.disconnect(self.endpoint)
        self.dealer.connect(self.endpoint)

    def close(self) -> None:
        """Close both sockets."""
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)


class Mover:
    """Takes frames in, lets the core decide, and sends what it leaves.

    Not thread-safe: its owner's lock is held during `turn`. Between turns any thread may wait on
    `fds`. ZeroMQ signals these only at the edge, so a turn ends with nothing left to take, or says
    that there is more.

    Attributes:
        outcomes: What was computed; any thread may append.
        fds: File descriptors that become readable when something came.
    """

    def __init__(
        self,
        core: WatchedCore,
        router: zmq.Socket[bytes],
        handshakes: HandshakeMonitor,
        dialled: list[Dialled],
    ) -> None:
        self.outcomes: collections.deque[Outcome] = collections.deque()
        self._core = core
        self._router = router
        self._handshakes = handshakes
        self._links: list[tuple[Dialled, Hop]] = list(zip(dialled, core.links, strict=True))
        self._poller = zmq.Poller()
        sources = [router]
        for end in dialled:
            sources += [end.dealer, end.monitor]
        for source in sources:
            self._poller.register(source, _IN)
        self.fds = [source.FD for source in sources]

    def turn(self, until_job: bool = False) -> int:
        """Do all there is to do; returns after how many ms the next turn is due, if nothing comes.

        0 where there is more to do: others get a turn.

        Args:
            until_job: Return as soon as there is something to compute; what can wait is left to
                whoever has the next turn, acknowledgements too.
        """
        while self.outcomes:
            self._feed(self._core.on_outcome, self.outcomes.popleft())
        self._send_acks()
        # What came is taken in before time is: after a pause of this process, too.
        more = self._take_all(until_job)
        due_s = self._core.due_s(time.monotonic())
        if due_s <= (-_TICK_LATE_S if until_job and self._core.has_jobs else 0):
            self._tick()
            # What was sent may have let something in unsignalled.
            more = self._take_all(until_job)
            due_s = self._core.due_s(time.monotonic())
        return 0 if more else int(1000 * min(max(due_s, 0.0), _MAX_WAIT_S)) + 1

    def _take_all(self, until_job: bool) -> bool:
        """Take what there is, up to a bound; whether there is more to do."""
        for _ in range(_ROUNDS_PER_TURN):
            ready = self._ready()
            if not ready:
                return False
            self._take(ready)
            if until_job and self._core.has_jobs:
                return True
            self._send_acks()
        return True

    def _send_acks(self) -> None:
        while self._core.acks:
            identity, header = self._core.acks.popleft()
            header.clock_s = (*header.clock_s[:2], time.monotonic())
            self._send_up(identity, [pack(header)])

    def _ready(self) -> dict[Any, int]:
        for end, link in self._links:
            waiting = bool(link.outbox)
            if waiting != end.blocked:
                end.blocked = waiting
                self._poller.register(end.dealer, _IN_OUT if waiting else _IN)
        return dict(self._poller.poll(0))

    def _take(self, ready: dict[Any, int]) -> None:
        """Take one message from each socket that has one."""
        for end, link in self._links:
            events = ready.get(end.dealer, 0)
            if events & _IN:
                self._feed(self._core.on_downstream, receive_parts(end.dealer), link=link)
            elif events:
                self._send_down()
            elif end.monitor in ready:
                # What came over a connection is taken in before the news of its end.
                for up in link_changes(end.monitor):
                    self._feed(self._core.on_link, link, up)
        if self._router in ready:
            identity, *parts = receive_parts(self._router)
            self._feed(self._core.on_upstream, bytes(identity), parts)

    def _tick(self) -> None:
        # Only then: a crowd of strangers must not wake the node for each that was turned away.
        self._handshakes.read()
        self._feed(self._core.tick)
        for end, link in self._links:
            if link in self._core.stuck:
                _log.warning("nothing gets across to %s any more; dialling anew", end.endpoint)
                end.renew()
                self._feed(self._core.on_link, link, False)
        self._core.stuck.clear()

    def _feed(self, handle: Callable[..., None], *event: object, **more: object) -> None:
        """Hand one event to the core and send what it leaves."""
        try:
            handle(*event, time.monotonic(), **more)
        except Exception:
            # One frame must never end a node, whatever it turned out to hold.
            self._core.bad_frames += 1
            _log.exception("%s failed; the frame is dropped", handle.__name__)
        while self._core.up:
            self._send_up(*self._core.up.popleft())
        self._send_down()

    def _send_up(self, identity: bytes, parts: Parts) -> None:
        try:
            send_parts(self._router, [identity, *parts])
        except zmq.ZMQError as error:
            # Gone, or so slow that its queue is full: the client's deadline covers both.
            _log.debug("no way up to a peer: %s", error)
            if error.errno != zmq.EAGAIN:
                self._core.forget(identity)

    def _send_down(self) -> None:
        """Send what waits for the links, as far as they take it."""
        for end, link in self._links:
            if link.outbox:
                with contextlib.suppress(zmq.Again):
                    while link.outbox:
                        send_parts(end.dealer, link.outbox[0])
                        link.outbox.popleft()
