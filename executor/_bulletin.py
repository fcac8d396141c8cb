"""What is sent of a node's STATUS: all of it where it is news, else a BEAT. No clock, no sockets.

A STATUS is some 500 bytes. Ten of them a second from each of two nodes would be 80 kbit/s on the
hop towards the client, almost a gigabyte a day, and more than a bad radio link carries: answers
would wait behind them. Most say what the one before said, so mostly a BEAT of 12 bytes is sent. It
says that the last STATUS still holds; what grows with time alone (`GROWING`) has grown since. All
of it is sent again every second, so what gets lost is made up for by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from executor._json import decode_json, encode_json
from executor._outbox import Parts
from executor._requests import seconds, whole
from executor.wire import Header, Kind, attach, message, pack

__all__ = ["GROWING", "Bulletin", "is_news", "read_status"]

GROWING = ("hop_age_s", "stalled_s")
"""Fields that count seconds since something, and grow as long as they are neither None nor 0."""

WHOLE_EVERY_S = 1.0  # `energy_j` is never older
_LOAD_OFF = 0.02
_SECONDS_OFF = 0.05
_UNTOLD = ("energy_j", "load", *GROWING)


def is_news(status: Mapping[str, Any], told: Mapping[str, Any], elapsed_s: float) -> bool:
    """Whether a STATUS says more than that one told `elapsed_s` before it still holds."""
    for name in GROWING:
        now, then = status[name], told[name]
        if (now is None) is not (then is None):
            return True
        if now is not None and abs(now - (then + elapsed_s if then else 0.0)) > _SECONDS_OFF:
            return True
    if abs(status.get("load", 0.0) - told.get("load", 0.0)) > _LOAD_OFF:
        return True
    return any(value != told.get(name) for name, value in status.items() if name not in _UNTOLD)


def read_status(header: Header, body: memoryview | None, nodes: range) -> tuple[int, float | None]:
    """Which of these nodes a STATUS or BEAT is of; and how often that says that it comes.

    Raises:
        WireError: It is of none of them, or no STATUS.
    """
    low, high = nodes[0], nodes[-1]
    if header.kind is Kind.BEAT:
        return whole({"node": header.seq}, "node", low, high), None
    raw = decode_json(body)
    return whole(raw, "node", low, high), seconds(raw, "every_s")


class Bulletin:
    """One node's newest STATUS, and which listeners have it."""

    def __init__(self, node: int) -> None:
        """Start with nothing to tell."""
        self._beat: Parts = [pack(Header(Kind.BEAT, seq=node))]
        self._parts: Parts | None = None
        self._have: set[bytes] = set()
        self._told: Mapping[str, Any] = {}
        self._told_s = float("-inf")

    def report(self, status: Mapping[str, Any], now_s: float) -> None:
        """Take this node's own STATUS; it replaces the last one if it is news, or that is old."""
        elapsed_s = now_s - self._told_s
        if elapsed_s < WHOLE_EVERY_S and not is_news(status, self._told, elapsed_s):
            return
        self._told, self._told_s = status, now_s
        header = Header(Kind.STATUS, clock_s=(now_s, 0.0, 0.0))
        body = attach(header, encode_json(status))
        self.replace(message(header, body))

    def replace(self, parts: Parts) -> None:
        """Take a STATUS to pass on as it came."""
        self._parts = parts
        self._have.clear()

    def messages(self, peers: Iterable[bytes]) -> Iterator[tuple[bytes, Parts]]:
        """What to send to each of them: the STATUS, or a BEAT to those who have it."""
        if self._parts is None:
            return
        for peer in peers:
            yield peer, self._beat if peer in self._have else self._parts
            self._have.add(peer)
