"""Wakes a thread that polls a file descriptor; from any thread, or a signal handler."""

from __future__ import annotations

import contextlib
import select
import socket

__all__ = ["Wake", "polling"]


class Wake:
    """A pair of sockets of which only the waking counts.

    Attributes:
        fd: Readable from `set` until `clear`.
    """

    def __init__(self) -> None:
        """Open it."""
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.fd = self._near.fileno()

    def set(self) -> None:
        """Wake whoever polls."""
        # A full or closed pair is fine: the thread is then awake, or gone.
        with contextlib.suppress(OSError):
            self._far.send(b"\0")

    def clear(self) -> None:
        """Let it not be readable any more."""
        with contextlib.suppress(OSError):
            self._near.recv(4096)

    def close(self) -> None:
        """Close it; nobody may poll any more."""
        self._near.close()
        self._far.close()


def polling(*fds: int) -> select.poll:
    """What waits until one of these is readable."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return poller
