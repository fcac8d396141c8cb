"""What the bytes alone cost: one way over a bare TCP connection between two processes.

`seconds` of n bytes is the time from the first byte's sending to an answer of one byte, less half
the round trip of one byte: bytes / bandwidth + propagation on loopback, with the kernel's own
buffers and nobody's protocol.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable

from executor.bench.pickle_peer import connect, listen, receive

__all__ = ["Sink", "Wire"]


class Sink:
    """The far process: takes messages, answers each with one byte."""

    def __init__(self, port: int) -> None:
        """Listen and serve one client."""
        self._listener = listen(port)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            sock, _ = self._listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    receive(sock)
                    sock.sendall(b"\0")

    def close(self) -> None:
        """End it; the client has hung up."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


class Wire:
    """The near end.

    Attributes:
        taken_s: By number of bytes, the round trips so far.
    """

    def __init__(self, port: int, sizes: Iterable[int]) -> None:
        """Connect; `sizes` are to be measured, besides one byte."""
        self._sock = connect(port)
        self._data = {n: bytes(n) for n in {1, *sizes}}
        self.taken_s: dict[int, list[float]] = {n: [] for n in self._data}

    def measure(self) -> None:
        """One round trip of every size."""
        for n_bytes, data in self._data.items():
            begun_s = time.monotonic()
            self._sock.sendall(n_bytes.to_bytes(8, "big"))
            self._sock.sendall(data)
            self._sock.recv(1)
            self.taken_s[n_bytes].append(time.monotonic() - begun_s)

    def seconds(self, n_bytes: int) -> float:
        """One way, in the median."""
        return max(0.0, _median(self.taken_s[n_bytes]) - _median(self.taken_s[1]) / 2)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
