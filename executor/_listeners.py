"""Who hears a node's STATUS: whoever talks to it, for a while, at a bounded total rate. No clock.

A node with 200 clients that told each of them everything ten times a second would do little else.
So each STATUS goes to at most `PER_TURN` listeners, in turn; with more of them each is told less
often, and how often (`every_s`) stands in the STATUS, because silence is judged by it.
"""

from __future__ import annotations

__all__ = ["STATUS_PERIOD_S", "Listeners", "silent_after_s"]

STATUS_PERIOD_S = 0.1
# At 200 listeners a STATUS then comes every 0.2 s: one or two may be late before 0.7 s are over.
PER_TURN = 100
# A listener is kept through a frame that takes this long to arrive on a slow hop.
KEPT_S = 30.0
_MAX_LISTENERS = 4096


class Listeners:
    """Peers to be told, and whose turn it is for the STATUS of each node."""

    def __init__(self, n_nodes: int, per_turn: int = PER_TURN, bound: int = _MAX_LISTENERS) -> None:
        """Start with nobody.

        Args:
            n_nodes: Nodes in the chain: STATUS of each may have to be passed on.
            per_turn: Listeners told of one STATUS.
            bound: Listeners known at most; whoever comes then is not told anything.
        """
        self._per_turn, self._bound = per_turn, bound
        self._heard_s: dict[bytes, float] = {}
        self._next = [0] * n_nodes

    def __len__(self) -> int:
        return len(self._heard_s)

    @property
    def every_s(self) -> float:
        """Seconds between two STATUS of one node to one listener."""
        turns = -(-len(self._heard_s) // self._per_turn)
        return STATUS_PERIOD_S * max(1, turns)

    @property
    def last_heard_s(self) -> float:
        """When anybody was heard last; -inf if nobody was."""
        return max(self._heard_s.values(), default=float("-inf"))

    def heard(self, peer: bytes, now_s: float) -> None:
        """A peer said something, and hears the STATUS from now on."""
        if peer in self._heard_s or len(self._heard_s) < self._bound:
            self._heard_s[peer] = now_s

    def forget(self, peer: bytes) -> None:
        """A peer is gone."""
        self._heard_s.pop(peer, None)

    def forget_silent(self, now_s: float) -> None:
        """Forget peers that were not heard for `KEPT_S`."""
        for peer, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > KEPT_S:
                del self._heard_s[peer]

    def turn(self, node: int) -> list[bytes]:
        """Whom to tell of the next STATUS of `node`."""
        peers = list(self._heard_s)
        if len(peers) <= self._per_turn:
            return peers
        start = self._next[node] % len(peers)
        self._next[node] = start + self._per_turn
        return (peers + peers)[start : start + self._per_turn]

    def everybody(self) -> list[bytes]:
        """Whom to tell what cannot wait."""
        return list(self._heard_s)


def silent_after_s(least_s: float, every_s: float) -> float:
    """After how long without a STATUS its sender counts as silent.

    Args:
        least_s: The limit where a STATUS comes every 0.2 s or more often.
        every_s: How often one comes, as the sender says.
    """
    return least_s * max(1.0, every_s / 0.2)
