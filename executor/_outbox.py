"""What waits for a hop's socket: requests in turn over their clients, all else in order."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

from executor._fairness import FairBuffer
from executor.wire import Header

__all__ = ["Outbox", "Parts"]

Parts = list[bytes | memoryview]


class Outbox:
    """Messages for the neighbour. The owner sends `[0]`, then calls `popleft`, as with a deque.

    A message that is no request goes after as many requests as waited when it came: a probe
    measures the hop behind its backlog.
    """

    def __init__(self, on_handed: Callable[[Header], None]) -> None:
        """Start empty; `on_handed` gets the header of each message taken out that has one."""
        self._requests: FairBuffer[tuple[Header, Parts, float]] = FairBuffer()
        self._others: collections.deque[tuple[int, Header | None, Parts]] = collections.deque()
        self._taken = 0
        self._on_handed = on_handed

    def __len__(self) -> int:
        return len(self._others) + len(self._requests)

    def __getitem__(self, index: int) -> Parts:
        """The next message; only index 0 is of use."""
        if index or not self:
            raise IndexError(index)
        return self._others[0][2] if self._other_is_next() else self._requests.peek()[1]

    def append(self, parts: Parts, header: Header | None = None) -> None:
        """Add a message that is no request; with its header if `on_handed` wants to know."""
        self._others.append((self._taken + len(self._requests), header, parts))

    def add_request(self, header: Header, parts: Parts, until_s: float = math.inf) -> None:
        """Add a request, which nobody waits for after `until_s`."""
        self._requests.put(header.client, (header, parts, until_s))

    def popleft(self) -> Parts:
        """Take out the next message."""
        header: Header | None
        if self._other_is_next():
            _, header, parts = self._others.popleft()
        else:
            header, parts, _ = self._requests.take()
            self._taken += 1
        if header is not None:
            self._on_handed(header)
        return parts

    def displace(self, client: bytes) -> Header | None:
        """Make room for a request of `client`: `FairBuffer.displace`."""
        displaced = self._requests.displace(client)
        return None if displaced is None else displaced[0]

    def overdue(self, now_s: float) -> list[Header]:
        """Take out the requests that nobody waits for any more."""
        return [header for header, *_ in self._requests.discard(lambda item: item[2] <= now_s)]

    def withdraw(self, header: Header) -> bool:
        """Take a request out; whether it was still here."""
        return bool(self._requests.discard(lambda item: item[0] is header, header.client))

    def clear(self) -> None:
        """Forget all that waits."""
        self._requests.clear()
        self._others.clear()

    def _other_is_next(self) -> bool:
        # With too few requests left (one was displaced) it need not wait for more to come.
        return bool(self._others) and (self._others[0][0] <= self._taken or not len(self._requests))
