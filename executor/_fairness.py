"""Who gets room when there is not enough for everybody: fair shares between clients.

A queue that refuses whoever comes when it is full is unfair: one client that sends fast keeps it
full, and the others' requests meet a full queue. Here the client with most requests waiting loses
its newest one instead, if it has at least two more than the newcomer. Where there are more clients
than places, and it has only one more, those decide that were served lately.

Whoever is refused is told when to come again. Two hundred clients that each try ten times a second,
with half a megabyte every time, would otherwise leave a node no time for anything but refusing.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Crowd", "FairBuffer", "Shares"]

T = TypeVar("T")

_FORGET_EVERY = 1024
_MAX_WAIT_S = 15.0
_MAX_WAITING = 4096
_ANSWERS = 64
_ANSWERS_KEPT_S = 5.0
# Supposed as long as too few answers were seen.
_FIRST_RATE_RPS = 10.0


class Shares:
    """What clients have had lately: requests served, older ones counting less. Bounded."""

    def __init__(self) -> None:
        """Start with nobody served."""
        self._served: dict[bytes, int] = {}
        self._since = 0

    def of(self, client: bytes) -> int:
        """Requests served lately."""
        return self._served.get(client, 0)

    def serve(self, client: bytes) -> None:
        """Count one; after so many, all counts are halved."""
        self._served[client] = self._served.get(client, 0) + 1
        self._since += 1
        if self._since >= _FORGET_EVERY:
            self._since = 0
            self._served = {c: n // 2 for c, n in self._served.items() if n > 1}


class Crowd:
    """Clients that were refused, and when each should come again.

    Each is sent away for as long as it takes to answer one request of each: then about as many come
    as places get free. Bounded.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._refused_s: collections.OrderedDict[bytes, float] = collections.OrderedDict()
        self._answered_s: collections.deque[float] = collections.deque(maxlen=_ANSWERS)

    def __len__(self) -> int:
        return len(self._refused_s)

    def answered(self, client: bytes, now_s: float) -> None:
        """A request of `client` was answered: a place is free, and this client had its turn."""
        self._answered_s.append(now_s)
        self._refused_s.pop(client, None)

    def refuse(self, client: bytes, now_s: float) -> float:
        """A request of `client` is refused; returns the seconds until it should come again."""
        self._refused_s[client] = now_s
        self._refused_s.move_to_end(client)
        oldest_s = next(iter(self._refused_s.values()))
        # Who has not come back for so long has given up.
        while len(self._refused_s) > _MAX_WAITING or now_s - oldest_s > 2 * _MAX_WAIT_S:
            self._refused_s.popitem(last=False)
            oldest_s = next(iter(self._refused_s.values()))
        return min(_MAX_WAIT_S, len(self._refused_s) / self._rate_rps(now_s))

    def _rate_rps(self, now_s: float) -> float:
        answers = self._answered_s
        while answers and now_s - answers[0] > _ANSWERS_KEPT_S:
            answers.popleft()
        if len(answers) < 2 or now_s <= answers[0]:
            return _FIRST_RATE_RPS
        return (len(answers) - 1) / (now_s - answers[0])


class FairBuffer(Generic[T]):
    """Items of several clients: round-robin over clients, first come first served within one."""

    def __init__(self) -> None:
        """Start empty."""
        self._clients: collections.OrderedDict[bytes, collections.deque[T]] = (
            collections.OrderedDict()
        )
        self._shares = Shares()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, client: bytes, item: T) -> None:
        """Add an item."""
        self._clients.setdefault(client, collections.deque()).append(item)
        self._length += 1

    def peek(self) -> T:
        """The item `take` would give; there must be one."""
        return next(iter(self._clients.values()))[0]

    def take(self) -> T:
        """The next item; there must be one. Its client goes behind the others."""
        client, items = next(iter(self._clients.items()))
        item = items.popleft()
        self._length -= 1
        self._shares.serve(client)
        if items:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return item

    def displace(self, client: bytes) -> T | None:
        """Make room for an item of `client`; returns the item that lost its place.

        None where nobody has enough more than `client`, which is then the one to be refused.
        """
        if not self._clients:
            return None
        served = self._shares.of
        greediest = max(self._clients, key=lambda c: (len(self._clients[c]), served(c)))
        more = len(self._clients[greediest]) - len(self._clients.get(client, ()))
        if more < 1 or (more == 1 and served(greediest) <= served(client)):
            return None
        items = self._clients[greediest]
        item = items.pop()
        self._length -= 1
        if not items:
            del self._clients[greediest]
        return item

    def discard(self, unwanted: Callable[[T], bool], client: bytes | None = None) -> list[T]:
        """Take the unwanted items out, a client's or everybody's; returns them."""
        out: list[T] = []
        for name in list(self._clients) if client is None else [client]:
            items = self._clients.get(name, ())
            gone = [item for item in items if unwanted(item)]
            if not gone:
                continue
            kept = collections.deque(item for item in items if not unwanted(item))
            if kept:
                self._clients[name] = kept
            else:
                del self._clients[name]
            out += gone
        self._length -= len(out)
        return out

    def items(self) -> list[T]:
        """What waits, in no particular order."""
        return [item for items in self._clients.values() for item in items]

    def clear(self) -> None:
        """Forget what waits."""
        self._clients.clear()
        self._length = 0
