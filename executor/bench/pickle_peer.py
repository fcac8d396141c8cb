"""A pickled tensor over a socket with TCP_NODELAY: a length, then the pickle.

Each node has a thread that receives, computes and sends on, and one that hands answers back as
they are; only the client unpickles those.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
import time
from collections.abc import Sequence

import torch

from executor.bench.systems import DEADLINE_S, Place, System
from executor.ports import HOST

__all__ = ["SYSTEM", "connect", "listen", "missing", "receive", "send"]

_LENGTH = struct.Struct("!Q")
_RETRY_S = 0.05


def missing() -> str:
    """It is always there."""
    return ""


def listen(port: int) -> socket.socket:
    """A listening socket."""
    return socket.create_server((HOST, port))


def connect(port: int) -> socket.socket:
    """A connection without Nagle's delay, as soon as somebody listens."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            sock = socket.create_connection((HOST, port))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_RETRY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, data: bytes | bytearray | memoryview) -> None:
    """Send a length and so many bytes."""
    sock.sendall(_LENGTH.pack(len(data)))
    sock.sendall(data)


def receive(sock: socket.socket) -> bytearray:
    """Receive what `send` sent.

    Raises:
        EOFError: The connection ended.
    """
    return _exactly(sock, _LENGTH.unpack(_exactly(sock, _LENGTH.size))[0])


def _exactly(sock: socket.socket, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return data


def _dumps(x: torch.Tensor) -> bytes:
    return pickle.dumps(x, protocol=pickle.HIGHEST_PROTOCOL)


class _Serving:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._listener = listen(place.listens[place.index])
        self._down = None if place.last else connect(place.dials[place.index + 1])
        self._up: socket.socket | None = None
        self._threads = [threading.Thread(target=self._forward)]
        self._threads[0].start()

    def _forward(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._up, _ = self._listener.accept()
            self._up.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._down is not None:
                self._threads.append(threading.Thread(target=self._backward))
                self._threads[1].start()
            sink = self._down or self._up
            while True:
                send(sink, _dumps(self._place.run(pickle.loads(receive(self._up)))))

    def _backward(self) -> None:
        assert self._down is not None and self._up is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                send(self._up, receive(self._down))

    def close(self) -> None:
        for sock in (self._listener, self._up, self._down):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        for thread in self._threads:
            thread.join()


class _Link:
    def __init__(self, place: Place) -> None:
        self._sock = connect(place.dials[0])

    def call(self, x: torch.Tensor) -> torch.Tensor:
        send(self._sock, _dumps(x))
        return self._answer()

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        done_s: list[float] = []
        for sent, x in enumerate(xs):
            if sent - len(done_s) == in_flight:
                self._answer()
                done_s.append(time.monotonic())
            send(self._sock, _dumps(x))
        while len(done_s) < len(xs):
            self._answer()
            done_s.append(time.monotonic())
        return done_s

    def _answer(self) -> torch.Tensor:
        output: torch.Tensor = pickle.loads(receive(self._sock))
        return output

    def close(self) -> None:
        self._sock.close()


SYSTEM = System("pickled socket", _Serving, _Link)
