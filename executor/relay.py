"""Shaped hops on one machine: `python -m executor.relay`, a TCP proxy per hop in one process.

Each direction of a hop is a serial link. Bytes are sent one after the other at the hop's rate,
then travel for the one-way delay; the delay overlaps with later bytes, so it does not lower the
throughput. A frame's last byte arrives at start + bytes / rate + delay.

Commands are JSON lines on stdin; the end of stdin ends the process:

    {"hop": 0, "listen": 0, "target": "127.0.0.1:5000", "mbps": 40, "delay_s": 0.005}
    {"hop": 0, "mbps": 5}      {"hop": 0, "delay_s": 0.02}      {"hop": 0, "cut": true}
    {"hop": 0, "trace": {"t0": 1234.5, "dt_s": 1.0, "mbps": [40, 0, 5]}}
    {"hop": 0, "delay_trace": {"t0": 1234.5, "dt_s": 1.0, "delay_s": [0.02, 0.1]}}
    {"hop": 0, "flip_bytes": 500000}

A new hop listens on 127.0.0.1 unless "host" says where, and is answered with
{"ready": 0, "port": 40001}; a bad command with {"error": "..."}.
1 Mbit/s is 125 000 bytes/s. A cut hop drops its connections and every new one until it is mended.
`flip_bytes` flips one random bit per so many bytes on average, in both directions; 0 stops it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from executor.arguments import Parser
from executor.errors import ConfigError
from executor.ports import HOST
from executor.shaping import DelayTrace, RateTrace, SerialLink, check_delay

__all__ = ["RelayServer", "main"]

BUFFER_BYTES = 64 * 1024
READ_BYTES = 16 * 1024
# A piece of the link is one packet, or about 1 ms of a fast link: what a frame's end can wait for.
MIN_PIECE_BYTES = 1460
PIECE_S = 0.001
# Bytes that were held back by the window and read late count as having waited, up to this long.
CATCH_UP_S = 0.02
_SETTINGS = {
    *("host", "listen", "target", "mbps", "delay_s", "trace", "delay_trace", "cut", "flip_bytes")
}


class _Flow:
    """One direction of one connection: source socket -> link -> destination socket."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        link: SerialLink[_Piece],
        damage: _Damage,
    ):
        self.damage = damage
        self.source = source
        self.sink = sink
        self.link = link
        self.arrived: deque[memoryview] = deque()  # came out of the link, not yet taken by sink
        self.arrived_bytes = 0
        self.polled = False  # the last select asked about the source
        self.held_back = False  # the window closed, and the source may have had more since
        self.ended = False  # the source will send no more
        self.done = False  # and the sink was told so

    def may_read(self) -> bool:
        room = self.link.queued_bytes < BUFFER_BYTES and self.arrived_bytes < BUFFER_BYTES
        return room and not self.ended

    def read(self) -> None:
        """Move what the source has into the link, up to the window."""
        while self.may_read():
            try:
                data = self.source.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                self.held_back = False
                return
            now_s = time.monotonic()
            if not data:
                self.ended = True
                self.link.offer(now_s, 0, (self, None))
                return
            # Had this thread woken in time, held-back bytes would have followed at once.
            arrived_s = now_s - CATCH_UP_S if self.held_back else now_s
            view = memoryview(self.damage.apply(data))
            rate = self.link.rate_at(now_s)
            step = int(min(max(rate * PIECE_S, MIN_PIECE_BYTES), READ_BYTES))
            for k in range(0, len(view), step):
                piece = view[k : k + step]
                self.link.offer(arrived_s, len(piece), (self, piece))
        self.held_back = True

    def arrive(self, piece: memoryview | None) -> None:
        if piece is None:
            self.done = True
        else:
            self.arrived.append(piece)
            self.arrived_bytes += len(piece)

    def write(self) -> None:
        """Hand the sink what has arrived, as far as it takes it."""
        while self.arrived:
            try:
                sent = self.sink.sendmsg(list(self.arrived)[:64])
            except (BlockingIOError, InterruptedError):
                return
            self.arrived_bytes -= sent
            while sent:
                piece = self.arrived.popleft()
                if sent < len(piece):
                    self.arrived.appendleft(piece[sent:])
                    break
                sent -= len(piece)
        if self.done:
            self.sink.shutdown(socket.SHUT_WR)


_Piece = tuple[_Flow, "memoryview | None"]


class _Connection:
    """An accepted connection, its twin towards the target, and the two flows between them."""

    def __init__(self, near: socket.socket, hop: _Hop) -> None:
        self.near = near
        self.far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for sock in (self.near, self.far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.flows = (
            _Flow(self.near, self.far, hop.links[0], hop.damage),
            _Flow(self.far, self.near, hop.links[1], hop.damage),
        )
        self.connecting = True
        self.closed = False
        self.far.connect_ex(hop.target)

    def finish_connect(self) -> None:
        error = self.far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.connecting = False

    def close(self) -> None:
        self.closed = True
        self.near.close()
        self.far.close()


class _Damage:
    """Flips one bit per `flip_bytes` bytes that pass, on average; none while that is 0."""

    def __init__(self) -> None:
        self.flip_bytes = 0.0
        self._random = random.Random(0)

    def apply(self, data: bytes) -> bytes:
        if not self.flip_bytes:
            return data
        damaged = bytearray(data)
        position = self._random.expovariate(1.0 / self.flip_bytes)
        while position < len(damaged):
            damaged[int(position)] ^= 1 << self._random.randrange(8)
            position += self._random.expovariate(1.0 / self.flip_bytes)
        return bytes(damaged)


class _Hop:
    """A listening port, a target, and one serial link per direction, shared by connections."""

    def __init__(
        self, listener: socket.socket, target: tuple[str, int], trace: RateTrace, delay_s: float
    ) -> None:
        self.listener = listener
        self.target = target
        self.links: tuple[SerialLink[_Piece], SerialLink[_Piece]] = (
            SerialLink(trace, delay_s),
            SerialLink(trace, delay_s),
        )
        self.connections: list[_Connection] = []
        self.damage = _Damage()
        self.cut = False

    def accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return  # the peer has gone again
        if self.cut:
            sock.close()
        else:
            self.connections.append(_Connection(sock, self))

    def drop(self) -> None:
        for connection in self.connections:
            connection.close()
        self.connections.clear()
        for link in self.links:
            link.clear()

    def pump(self, readable: set[Any], writable: set[Any]) -> None:
        """Move bytes: link -> sinks for what is due, sources -> link for what select reported."""
        if self.listener in readable:
            self.accept()
        arrivals: set[_Flow] = set()
        for link in self.links:
            for flow, piece in link.take_due(time.monotonic()):
                flow.arrive(piece)
                arrivals.add(flow)
        for connection in self.connections:
            try:
                if connection.connecting and connection.far in writable:
                    connection.finish_connect()
                for flow in connection.flows:
                    if flow in arrivals or flow.sink in writable:
                        flow.write()
                    if flow.source in readable:
                        flow.read()
                    elif flow.polled:
                        flow.held_back = False
            except OSError:
                connection.close()  # reset or refused: the node at either end dials again
            if all(flow.done and not flow.arrived for flow in connection.flows):
                connection.close()
        if any(connection.closed for connection in self.connections):
            self.connections = [c for c in self.connections if not c.closed]


class RelayServer:
    """All hops of a testbed in one thread; `command` changes them, `wait` and `pump` move bytes.

    `select` and not `epoll`: its timeout is exact to microseconds, epoll's to milliseconds.
    """

    def __init__(self) -> None:
        self._hops: dict[int, _Hop] = {}

    def command(self, message: object) -> dict[str, int] | None:
        """Carry out one command (see the module's text); returns the answer to print, if any.

        Raises:
            ConfigError: The command is malformed, a value is out of range, or a port is taken.
        """
        if not isinstance(message, dict) or type(message.get("hop")) is not int:
            raise ConfigError(f'a relay command needs a whole number under "hop", got {message!r}')
        index = message["hop"]
        settings = {key: value for key, value in message.items() if key != "hop"}
        unknown = settings.keys() - _SETTINGS
        if unknown:
            raise ConfigError(f"relay command for hop {index}: unknown settings {sorted(unknown)}")
        try:
            if "listen" in settings:
                return self._add(index, settings)
            self._change(index, settings)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"relay command for hop {index} is malformed: {error!r} in {message!r}"
            ) from error
        return None

    def _add(self, index: int, settings: dict[str, Any]) -> dict[str, int]:
        if index in self._hops:
            raise ConfigError(f"hop {index} is being relayed already")
        own_host = str(settings.get("host", HOST))
        host, _, port = str(settings["target"]).rpartition(":")
        trace = RateTrace.constant(float(settings["mbps"]))
        delay_s = check_delay(settings["delay_s"])
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit the buffer; later it would be too late for the window.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            listener.bind((own_host, int(settings["listen"])))
            listener.listen()
            self._hops[index] = _Hop(listener, (host, int(port)), trace, delay_s)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"hop {index} cannot listen on {own_host}:{settings['listen']}: {error.strerror}"
            ) from error
        except BaseException:
            listener.close()
            raise
        return {"ready": index, "port": listener.getsockname()[1]}

    def _change(self, index: int, settings: dict[str, Any]) -> None:
        hop = self._hops.get(index)
        if hop is None:
            raise ConfigError(f"there is no hop {index}; hops are {sorted(self._hops)}")
        trace: RateTrace | None = None
        if "trace" in settings:
            samples = settings["trace"]
            rates = [float(rate) for rate in samples["mbps"]]
            trace = RateTrace.from_samples(float(samples["t0"]), float(samples["dt_s"]), rates)
        elif "mbps" in settings:
            trace = RateTrace.constant(float(settings["mbps"]))
        delay: DelayTrace | None = None
        if "delay_trace" in settings:
            samples = settings["delay_trace"]
            delays = [float(delay_s) for delay_s in samples["delay_s"]]
            delay = DelayTrace.from_samples(float(samples["t0"]), float(samples["dt_s"]), delays)
        elif "delay_s" in settings:
            delay = DelayTrace.constant(float(settings["delay_s"]))
        flip_bytes = float(settings.get("flip_bytes", hop.damage.flip_bytes))
        if not (math.isfinite(flip_bytes) and flip_bytes >= 0):
            raise ConfigError(f"hop {index}: flip_bytes must be >= 0, got {flip_bytes}")
        hop.damage.flip_bytes = flip_bytes
        for link in hop.links:
            if trace is not None:
                link.set_trace(time.monotonic(), trace)
            if delay is not None:
                link.delay = delay
        if "cut" in settings:
            hop.cut = bool(settings["cut"])
            if hop.cut:
                hop.drop()

    def wait(self, control: int) -> tuple[set[Any], set[Any]]:
        """Wait until there is something to do; returns what is readable, and what is writable.

        Args:
            control: A descriptor to watch besides.
        """
        readers: list[Any] = [control]
        writers: list[Any] = []
        wake_s = math.inf
        for hop in self._hops.values():
            readers.append(hop.listener)
            wake_s = min(wake_s, *(link.next_event_s() for link in hop.links))
            for connection in hop.connections:
                if connection.connecting:
                    writers.append(connection.far)
                    continue
                for flow in connection.flows:
                    flow.polled = flow.may_read()
                    if flow.polled:
                        readers.append(flow.source)
                    if flow.arrived:
                        writers.append(flow.sink)
        timeout_s = None if wake_s == math.inf else max(0.0, wake_s - time.monotonic())
        readable, writable, _ = select.select(readers, writers, [], timeout_s)
        return set(readable), set(writable)

    def pump(self, readable: set[Any], writable: set[Any]) -> None:
        """Move bytes, after `wait`."""
        for hop in self._hops.values():
            hop.pump(readable, writable)

    def close(self) -> None:
        """Close every socket."""
        for hop in self._hops.values():
            hop.drop()
            hop.listener.close()
        self._hops.clear()


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _serve(server: RelayServer, control: int) -> None:
    unread = b""
    while True:
        readable, writable = server.wait(control)
        # Commands first: they hold for the connections and bytes that came after them.
        if control in readable:
            data = os.read(control, 1 << 16)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in filter(None, lines):
                _obey(server, line)
        server.pump(readable, writable)


def _obey(server: RelayServer, line: bytes) -> None:
    try:
        answer = server.command(json.loads(line))
    except ValueError as error:
        _answer({"error": f"a relay command must be one line of JSON: {error}"})
    except ConfigError as error:
        _answer({"error": str(error)})
    else:
        if answer is not None:
            _answer(answer)


def main(argv: Sequence[str] | None = None) -> int:
    """Relay until stdin ends; returns the exit code."""
    parser = Parser(
        prog="python -m executor.relay",
        description="Shape the hops of a local testbed; commands are JSON lines on stdin.",
    )
    parser.parse_args(argv)
    # It needs little, but at once: behind busy nodes a wake-up would be milliseconds late.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    server = RelayServer()
    try:
        _serve(server, sys.stdin.fileno())
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
