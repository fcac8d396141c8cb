"""A node's core with what an operator asks of it: counts, health, and a drain."""

from __future__ import annotations

import collections
from typing import Any

from executor._compute import Outcome
from executor._counters import STAGE_BOUNDS_S, Histogram
from executor._hop import Hop, Parts
from executor._nodecore import NodeCore
from executor._requests import Refusal
from executor.wire import Header, Kind

__all__ = ["WatchedCore"]

_ABOUT = ("model", "digest", "device", "torch_device")
_NEVER_S = float("-inf")


class WatchedCore(NodeCore):
    """Counts what the core does; refuses new requests while it drains.

    Attributes:
        draining: Whether new requests are refused; set it to let the node finish what it has.
    """

    draining = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `NodeCore`."""
        super().__init__(*args, **kwargs)
        self._requests = self._relayed = 0
        self._errors: collections.Counter[str] = collections.Counter()
        self._stage_s = Histogram(STAGE_BOUNDS_S)
        self._queue_wait_s = Histogram(STAGE_BOUNDS_S)
        self._next_heard_s = _NEVER_S

    @property
    def drained(self) -> bool:
        """Whether every request that was taken has been answered."""
        return not (len(self._ways) or len(self._jobs) or self.up or self.acks)

    def facts(self, now_s: float) -> dict[str, Any]:
        """What an operator wants to know, as plain data and histograms that nobody changes."""
        return {
            **self._status(now_s),
            **{key: self.config.hello.get(key, "") for key in _ABOUT},
            "draining": self.draining,
            "open_requests": len(self._ways),
            "hop_probe_bytes": self.hop.probe_bytes if self.hop is not None else 0,
            "requests": self._requests,
            "relayed": self._relayed,
            "errors": sorted(self._errors.items()),
            "stage_s": self._stage_s.copy(),
            "queue_wait_s": self._queue_wait_s.copy(),
            "next_heard_ago_s": _ago(self._next_heard_s, now_s),
            "next_silent": self.hop is not None and not self.hop.is_up(now_s),
            "previous_heard_ago_s": _ago(self._listeners.last_heard_s, now_s),
        }

    def on_downstream(self, parts: Parts, now_s: float, link: Hop | None = None) -> None:
        """As `NodeCore`, and note that the next node was heard."""
        if link in (None, self.hop):
            self._next_heard_s = now_s
        super().on_downstream(parts, now_s, link)

    def on_outcome(self, outcome: Outcome, now_s: float) -> None:
        """As `NodeCore`, and count the stage."""
        if outcome.output is not None:
            arrive_s = outcome.job.header.stages[self.config.index].arrive_s
            self._stage_s.add(outcome.end_s - outcome.start_s)
            self._queue_wait_s.add(max(0.0, outcome.start_s - arrive_s))
        super().on_outcome(outcome, now_s)

    def _infer(
        self, identity: bytes, header: Header, body: memoryview | None, now_s: float
    ) -> None:
        self._requests += 1
        if self.draining:
            if self.config.index > 0:
                self._acknowledge(identity, header, Kind.ACK, now_s)
            raise Refusal("draining", "is draining before it ends; nothing was run")
        super()._infer(identity, header, body, now_s)
        way = self._ways.get(header)
        self._relayed += way is not None and way.header is header and way.job is None

    def _control(self, header: Header, body: memoryview | None, now_s: float) -> None:
        if self.draining and header.kind is not Kind.HELLO:
            raise Refusal("draining", "is draining before it ends; ask later")
        super()._control(header, body, now_s)

    def _refuse(self, header: Header, refusal: Refusal, now_s: float) -> None:
        self.refused += refusal.code == "draining"
        super()._refuse(header, refusal, now_s)

    def _error(
        self, header: Header, code: str, reason: str, to: int | None = None, wait_s: float = 0.0
    ) -> None:
        self._errors[code] += 1
        super()._error(header, code, reason, to, wait_s)


def _ago(then_s: float, now_s: float) -> float | None:
    """Seconds since, None for never."""
    return None if then_s == _NEVER_S else max(0.0, now_s - then_s)
