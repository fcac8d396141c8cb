"""The client's requests without an answer: each ends exactly once, whoever ends it first."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

from executor.errors import HandshakeError, RequestRefused
from executor.plan import Plan
from executor.wire import Header

__all__ = ["Pending", "PendingTable"]


@dataclass(slots=True)
class Pending:
    """A request without an answer yet.

    Attributes:
        deadline_s: When it is given up (`late` gives up control requests only: an inference's
            deadline is the recovery's).
        plan: The plan asked for; None for control requests.
        scheduled_s: When an inference was due.
        submitted_s: When it was submitted.
        header: What its inferences are sent with, plan and try aside.
        body: The input, kept until the request ends: it may have to be sent again.
        tensor: Whether the caller gave a torch tensor, and wants one back.
        replies: Handshakes only: replies so far, by node.
        future: Completes with a Reply (inference) or the reply's JSON (control).
    """

    deadline_s: float
    plan: Plan | None = None
    scheduled_s: float = 0.0
    submitted_s: float = 0.0
    header: Header | None = None
    body: memoryview | None = None
    tensor: bool = False
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    future: concurrent.futures.Future[Any] = field(default_factory=concurrent.futures.Future)

    def __post_init__(self) -> None:
        # Sent requests cannot be called back, so their futures cannot be cancelled.
        self.future.set_running_or_notify_cancel()


class PendingTable:
    """Requests by sequence number, with the bound on inferences in flight; thread-safe."""

    def __init__(self, max_in_flight: int) -> None:
        """Start empty."""
        self.in_flight = 0
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._seq = itertools.count(1)
        self._open: dict[int, Pending] = {}
        self._closed = False

    def register(self, pending: Pending) -> int:
        """Enter a request; returns its sequence number.

        Raises:
            RequestRefused: It is an inference and the bound is reached.
            HandshakeError: The table is closed.
        """
        with self._lock:
            if self._closed:
                raise HandshakeError("this client is closed; make a new one")
            if pending.plan is not None:
                if self.in_flight >= self._max_in_flight:
                    raise RequestRefused(
                        f"{self.in_flight} requests are in flight, the bound is "
                        f"{self._max_in_flight}; wait for one to finish"
                    )
                self.in_flight += 1
            seq = next(self._seq)
            self._open[seq] = pending
            return seq

    def settle(self, seq: int) -> Pending | None:
        """Take a request out to end it; None if it has ended already."""
        with self._lock:
            return self._take(seq)

    def get(self, seq: int) -> Pending | None:
        """A request that stays open."""
        with self._lock:
            return self._open.get(seq)

    def late(self, now_s: float) -> list[tuple[int, Pending]]:
        """Take out the control requests whose deadline has passed."""
        with self._lock:
            late = [
                (seq, pending)
                for seq, pending in self._open.items()
                if pending.plan is None and now_s > pending.deadline_s
            ]
            for seq, _ in late:
                self._take(seq)
            return late

    def close(self) -> list[Pending]:
        """Admit no more requests, and take out all that are open."""
        with self._lock:
            self._closed = True
            ended = list(self._open.values())
            self._open.clear()
            self.in_flight = 0
            return ended

    def _take(self, seq: int) -> Pending | None:
        pending = self._open.pop(seq, None)
        if pending is not None and pending.plan is not None:
            self.in_flight -= 1
        return pending
