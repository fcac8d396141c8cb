"""Free ports for processes that are still to be started."""

from __future__ import annotations

import socket
from contextlib import ExitStack

__all__ = ["HOST", "reserve_port"]

HOST = "127.0.0.1"


def reserve_port(stack: ExitStack) -> int:
    """A free loopback port that stays reserved while `stack` is open: bound, not listening.

    With SO_REUSEADDR on both sides a child may bind and listen on it meanwhile, so there is no
    moment at which somebody else could take it.
    """
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    return int(sock.getsockname()[1])
