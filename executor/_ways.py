"""The requests a node has not answered yet: the way back of each, and what is being done for it."""

from __future__ import annotations

import collections
from dataclasses import dataclass

from executor._compute import Job
from executor._hop import Hop
from executor.wire import Header

__all__ = ["Way", "Ways"]

_MAX_OPEN = 4096


@dataclass(slots=True)
class Way:
    """One request in a node.

    Attributes:
        identity: The peer it came from, and its answer goes to.
        header: Its newest try.
        job: Its stage, queued or running here; None if nothing is computed for it now.
        hop: Where it was sent on; None if it was not.
    """

    identity: bytes
    header: Header
    job: Job | None = None
    hop: Hop | None = None


class Ways:
    """Open requests by id; the oldest is forgotten where there are too many."""

    def __init__(self) -> None:
        """Start empty."""
        self._open: collections.OrderedDict[tuple[bytes, int], Way] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, header: Header) -> Way | None:
        """The request that a header belongs to."""
        return self._open.get((header.client, header.seq))

    def enter(self, way: Way) -> None:
        """Note a request's newest try."""
        key = (way.header.client, way.header.seq)
        self._open[key] = way
        self._open.move_to_end(key)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)

    def take(self, header: Header) -> Way | None:
        """Take a request out: it is answered."""
        return self._open.pop((header.client, header.seq), None)

    def drop(self, header: Header) -> None:
        """Forget a request that nobody waits for, unless this is not its newest try."""
        way = self.get(header)
        if way is not None and way.header is header:
            self.take(header)

    def over(self, hop: Hop) -> list[Header]:
        """The requests that wait for an answer over `hop`."""
        return [way.header for way in self._open.values() if way.hop is hop]
