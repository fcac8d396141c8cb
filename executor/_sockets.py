"""ZeroMQ sockets with the settings every hop wants: small buffers, bounded queues, CURVE."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from executor._outbox import Parts
from executor.cluster import Cluster, NodeConfig
from executor.errors import ConfigError
from executor.keys import AllowList, load_public, load_secret
from executor.wire import MAX_BODY_BYTES

__all__ = [
    "HandshakeMonitor",
    "authenticate",
    "bind_router",
    "connect_dealer",
    "link_changes",
    "receive_parts",
    "send_parts",
    "watch_link",
]

_log = logging.getLogger(__name__)

# Kernel buffers hide a slow hop's backlog from its sender; they are kept small on purpose.
_BUFFER_BYTES = 256 * 1024
# As plain numbers: combining pyzmq's flags takes longer than what they ask for.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
# Received parts below this are handed out as bytes, and sent parts below that are copied.
_SMALL_BYTES = 2048
_COPIED_BYTES = 256 * 1024
_LINK_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
# Messages ZeroMQ may hold towards a peer. Down the chain the node's own outbox does the queueing,
# where it can be seen and bounded; up the chain there are only small replies. 3 rather than 2: of
# 1 or 2, every part that is taken out is reported to the other thread, which is woken by that.
_DOWN_HWM = 3
_UP_HWM = 1000
# And from a peer: what the node cannot take yet waits with its sender. Each connection has as much,
# so that many connections cost this many frames each.
_IN_HWM = 3


def bind_router(
    ctx: zmq.Context[zmq.Socket[bytes]], cluster: Cluster, node: NodeConfig
) -> tuple[zmq.Socket[bytes], int]:
    """The socket on which a node serves; returns it and its port.

    Raises:
        ConfigError: The address cannot be bound, or a key is missing.
    """
    socket = ctx.socket(zmq.ROUTER)
    try:
        _set_common(socket)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.SNDHWM, _UP_HWM)
        socket.set(zmq.RCVHWM, _IN_HWM)
        # A larger message costs its sender the connection before it costs us the memory.
        socket.set(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
        if cluster.keys_dir is not None:
            socket.set(zmq.CURVE_SERVER, 1)
            _set_own_keys(socket, Path(cluster.keys_dir), node.name)
        socket.bind(node.bind_endpoint())
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(
            f"node {node.name} cannot bind {node.host}:{node.port}: {error}"
        ) from None
    except ConfigError:
        socket.close(0)
        raise
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return socket, int(endpoint.rstrip(b"\0").rpartition(b":")[2])


def connect_dealer(
    ctx: zmq.Context[zmq.Socket[bytes]], cluster: Cluster, target: NodeConfig, own_name: str
) -> zmq.Socket[bytes]:
    """The socket on which `own_name` talks to the node after it.

    Without ZeroMQ's heartbeats: `Hop.is_silent` does their work. One that waits in a full inbox
    when its connection ends makes libzmq 4.3.5 abort the process that reads it (libzmq issues 3937
    and 4767).

    Raises:
        ConfigError: The target's address cannot be dialled, or a key is missing.
    """
    endpoint = target.connect_endpoint()
    socket = ctx.socket(zmq.DEALER)
    try:
        _set_common(socket)
        socket.set(zmq.SNDHWM, _DOWN_HWM)
        socket.set(zmq.RCVHWM, _UP_HWM)
        socket.set(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 400)
        if cluster.keys_dir is not None:
            keys = Path(cluster.keys_dir)
            _set_own_keys(socket, keys, own_name)
            socket.set(zmq.CURVE_SERVERKEY, load_public(keys, target.name).z85)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot dial node {target.name} at {endpoint}: {error}") from None
    except ConfigError:
        socket.close(0)
        raise
    return socket


def watch_link(dealer: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that tells when a dealer's connection is made or broken, for `link_changes`.

    Before the dealer is closed: `dealer.disable_monitor()`, then close this one.
    """
    monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(_LINK_EVENTS)
    monitor.linger = 0
    return monitor


def link_changes(monitor: zmq.Socket[bytes]) -> list[bool]:
    """What has happened to the connection since the last call: made (true), broken (false)."""
    changes: list[bool] = []
    while True:
        try:
            event, _ = monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return changes
        changes.append(int.from_bytes(event[:2], sys.byteorder) == zmq.EVENT_HANDSHAKE_SUCCEEDED)


def receive_parts(source: zmq.Socket[bytes]) -> Parts:
    """The next message; large parts as views of ZeroMQ's own memory.

    Ask the socket's poller first: ZeroMQ's "there is none" costs an exception.

    Raises:
        zmq.Again: There is none.
    """
    parts: Parts = []
    more = True
    while more:
        frame = source.recv(_NOBLOCK, copy=False)
        parts.append(frame.buffer if len(frame) >= _SMALL_BYTES else frame.bytes)
        more = frame.more
    return parts


def send_parts(sink: zmq.Socket[bytes], parts: Parts) -> None:
    """Send a message without copying large parts, which nobody may write to until it has left.

    Raises:
        zmq.Again: The sink takes nothing now; nothing was sent.
        zmq.ZMQError: It cannot be sent at all.
    """
    last = len(parts) - 1
    for k, part in enumerate(parts):
        flags = _NOBLOCK if k == last else _MORE
        if len(part) < _COPIED_BYTES:
            sink.send(part, flags)
            continue
        # What was received is handed on as ZeroMQ's own; else a thread of pyzmq has to be told
        # when the part has left.
        held: object = part.obj if isinstance(part, memoryview) else None
        if isinstance(held, zmq.Frame) and len(held) == len(part):
            sink.send(held, flags, copy=False)
        else:
            sink.send(part, flags, copy=False)


def authenticate(
    ctx: zmq.Context[zmq.Socket[bytes]], cluster: Cluster, node: NodeConfig
) -> ThreadAuthenticator | None:
    """Start admitting the keys on the node's allow-list, and no others; None without keys.

    The caller stops what it gets. It must be started before the first bind.

    Raises:
        ConfigError: A key of the allow-list is missing, unusable or expired.
    """
    if cluster.keys_dir is None:
        return None
    folder = Path(cluster.keys_dir)
    try:
        allowed = AllowList(load_public(folder, name) for name in cluster.allowed(node))
    except ConfigError as error:
        raise ConfigError(f"node {node.name}: allow-list: {error}") from None
    authenticator = ThreadAuthenticator(ctx, log=_log)
    authenticator.start()
    authenticator.configure_curve_callback("*", allowed)
    return authenticator


class HandshakeMonitor:
    """Counts the connections to a serving socket that did not get in.

    A failed handshake (no key, a key that is not on the allow-list, a wrong server key) is reported
    as such. One that was dropped before it got that far (bytes that are not ZMTP) only shows as a
    disconnection, and cannot be told from an admitted peer's that leaves: of those, as many count
    as there are more than admitted peers.
    """

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]], served: zmq.Socket[bytes]) -> None:
        """Start counting; must come before the first peer."""
        endpoint = f"inproc://handshakes-{id(self)}"
        failures = (
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        served.monitor(endpoint, failures | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket = ctx.socket(zmq.PAIR)
        # A full pipe would make ZeroMQ's own thread wait; an event is small, and soon read.
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._failures = failures
        self._failed = self._admitted = self._left = 0
        self._after_failure = False

    @property
    def unauthenticated(self) -> int:
        """Connections refused so far."""
        return self._failed + max(0, self._left - self._admitted)

    def read(self, at_most: int = 4096) -> None:
        """Take the events there are."""
        for _ in range(at_most):
            try:
                event = self._socket.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            kind = int.from_bytes(event[:2], "little")
            if kind & self._failures:
                self._failed += 1
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._admitted += 1
            elif kind == zmq.EVENT_DISCONNECTED and not self._after_failure:
                self._left += 1
            # ZeroMQ reports a failed handshake and its disconnection one right after the other.
            self._after_failure = bool(kind & self._failures)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(0)


def _set_common(socket: zmq.Socket[bytes]) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDBUF, _BUFFER_BYTES)
    socket.set(zmq.RCVBUF, _BUFFER_BYTES)
    socket.set(zmq.IPV6, 1)


def _set_own_keys(socket: zmq.Socket[bytes], keys: Path, name: str) -> None:
    own, secret = load_secret(keys, name)
    socket.set(zmq.CURVE_PUBLICKEY, own.z85)
    socket.set(zmq.CURVE_SECRETKEY, secret)
