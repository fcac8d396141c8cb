"""What one peer may ask of a node: messages per second, and room in the node's tables. No clock."""

from __future__ import annotations

import collections
from dataclasses import dataclass

__all__ = ["PeerLimits", "Routes", "TokenBucket"]

# A second's worth at once is normal: frames pile up behind a stalled link and then come together.
_BURST_S = 2.0


@dataclass(slots=True)
class TokenBucket:
    """So many events per second in the long run, so many at once.

    Attributes:
        rate_per_s: Tokens that are added per second.
        burst: Tokens it holds at most, and at first.
        tokens: Tokens there are, as of `filled_s`.
        filled_s: When they were counted.
    """

    rate_per_s: float
    burst: float
    tokens: float
    filled_s: float

    def take(self, now_s: float) -> bool:
        """Take a token, if there is one. A clock that went back adds none."""
        added = max(0.0, now_s - self.filled_s) * self.rate_per_s
        self.tokens = min(self.burst, self.tokens + added)
        self.filled_s = now_s
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class PeerLimits:
    """A bucket per connection, for the `max_peers` that were heard last."""

    def __init__(self, rate_per_s: float, max_peers: int = 4096) -> None:
        """Start with nobody known.

        Args:
            rate_per_s: Messages per second and peer, in the long run; twice as many at once.
            max_peers: Peers remembered; beyond that the one silent for longest is forgotten.
        """
        self.rate_per_s = rate_per_s
        self._max_peers = max_peers
        self._buckets: collections.OrderedDict[bytes, TokenBucket] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, peer: bytes, now_s: float) -> bool:
        """Whether one more message of this peer may be served now."""
        bucket = self._buckets.get(peer)
        if bucket is None:
            burst = max(1.0, self.rate_per_s * _BURST_S)
            bucket = self._buckets[peer] = TokenBucket(self.rate_per_s, burst, burst, now_s)
            if len(self._buckets) > self._max_peers:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        return bucket.take(now_s)

    def forget(self, peer: bytes) -> None:
        """A peer is gone."""
        self._buckets.pop(peer, None)


class Routes:
    """The way back to each client: the peer that its requests came from. Bounded, and fair.

    Over the bound, the peer with the most clients loses the one of its own that was heard longest
    ago: whoever makes up client ids by the thousand pushes out nobody's but their own.
    """

    def __init__(self, bound: int = 4096) -> None:
        """Keep at most `bound` clients."""
        self._bound = bound
        self._peer_of: dict[bytes, bytes] = {}
        self._clients: dict[bytes, collections.OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._peer_of)

    def learn(self, client: bytes, peer: bytes) -> None:
        """A client's message came from this peer."""
        before = self._peer_of.get(client)
        if before is not None and before != peer:
            self._drop(client, before)
            before = None
        clients = self._clients.setdefault(peer, collections.OrderedDict())
        clients[client] = None
        clients.move_to_end(client)
        self._peer_of[client] = peer
        if before is None and len(self._peer_of) > self._bound:
            most = max(self._clients, key=lambda p: len(self._clients[p]))
            self._drop(next(iter(self._clients[most])), most)

    def get(self, client: bytes) -> bytes | None:
        """The peer to send a client's replies to; None if it is not known (any more)."""
        return self._peer_of.get(client)

    def _drop(self, client: bytes, peer: bytes) -> None:
        del self._peer_of[client]
        clients = self._clients[peer]
        del clients[client]
        if not clients:
            del self._clients[peer]
