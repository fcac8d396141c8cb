"""A link's behaviour without sockets or clocks: rates over time, and serial transmission.

1 Mbit/s is 125 000 bytes/s.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from executor.errors import ConfigError
from executor.pacing import StepTrace

__all__ = ["BYTES_PER_MBIT", "DelayTrace", "RateTrace", "SerialLink", "check_delay"]

BYTES_PER_MBIT = 125_000.0

T = TypeVar("T")


class RateTrace(StepTrace):
    """A link's rate over time, in bytes/s."""

    @classmethod
    def constant(cls, mbps: float) -> RateTrace:
        """The same rate at all times.

        Raises:
            ConfigError: The rate is not positive (only a trace may hold an outage).
        """
        if not (math.isfinite(mbps) and mbps > 0):
            raise ConfigError(f"a hop's bandwidth must be positive, got {mbps} Mbit/s")
        return cls(0.0, 1.0, [mbps * BYTES_PER_MBIT])

    @classmethod
    def from_samples(cls, t0_s: float, dt_s: float, mbps: Sequence[float]) -> RateTrace:
        """One rate per step of `dt_s` from `t0_s` on; 0 is an outage; the last one holds.

        Raises:
            ConfigError: No samples, a step that is not positive, a rate below 0 or not finite.
        """
        return cls(t0_s, dt_s, [rate * BYTES_PER_MBIT for rate in mbps])


class DelayTrace(StepTrace):
    """A link's one-way delay over time, in seconds."""

    @classmethod
    def constant(cls, delay_s: float) -> DelayTrace:
        """The same delay at all times.

        Raises:
            ConfigError: It is negative or not finite.
        """
        return cls(0.0, 1.0, [check_delay(delay_s)])

    @classmethod
    def from_samples(cls, t0_s: float, dt_s: float, delay_s: Sequence[float]) -> DelayTrace:
        """One delay per step of `dt_s` from `t0_s` on; the last one holds.

        Raises:
            ConfigError: No samples, a step that is not positive, or a delay that is negative or
                not finite.
        """
        return cls(t0_s, dt_s, [check_delay(value) for value in delay_s])


class SerialLink(Generic[T]):
    """One direction of a hop: a single server with propagation. No sockets, no clock.

    A piece that arrives at `a` starts at s = max(a, end of the piece before), ends when the
    integral of the rate from s on reaches its bytes, and is due one delay later, never before an
    earlier piece.

    Attributes:
        queued_bytes: Bytes of the pieces that have not wholly left.
        delay: One-way propagation over time; a change counts for the pieces that leave from then
            on.
    """

    def __init__(self, trace: RateTrace, delay_s: float) -> None:
        self.queued_bytes = 0
        self.delay = DelayTrace.constant(delay_s)
        self._trace = trace
        self._waiting: deque[tuple[float, int, T]] = deque()
        self._flying: deque[tuple[float, T]] = deque()
        self._free_s = -math.inf
        self._due_s = -math.inf
        self._head_start_s = -math.inf
        self._head_left_bytes = 0.0
        self._head_end_s = math.inf

    def offer(self, arrived_s: float, n_bytes: int, piece: T) -> None:
        """Queue a piece of `n_bytes` that arrived at `arrived_s`."""
        self._waiting.append((arrived_s, n_bytes, piece))
        self.queued_bytes += n_bytes
        if len(self._waiting) == 1:
            self._begin()

    def _begin(self) -> None:
        if not self._waiting:
            self._head_end_s = math.inf
            return
        arrived_s, n_bytes, _ = self._waiting[0]
        self._head_start_s = max(self._free_s, arrived_s)
        self._head_left_bytes = n_bytes
        self._head_end_s = self._trace.finish_time(self._head_start_s, n_bytes)

    def _advance(self, now_s: float) -> None:
        while self._head_end_s <= now_s:
            _, n_bytes, piece = self._waiting.popleft()
            self.queued_bytes -= n_bytes
            self._free_s = self._head_end_s
            self._due_s = max(self._due_s, self._free_s + self.delay.value_at(self._free_s))
            self._flying.append((self._due_s, piece))
            self._begin()

    def take_due(self, now_s: float) -> list[T]:
        """Remove and return the pieces that have arrived at the far end by `now_s`, in order."""
        self._advance(now_s)
        due = []
        while self._flying and self._flying[0][0] <= now_s:
            due.append(self._flying.popleft()[1])
        return due

    def next_event_s(self) -> float:
        """When something next happens; infinity if nothing does before the next call."""
        return min(self._head_end_s, self._flying[0][0] if self._flying else math.inf)

    def rate_at(self, t_s: float) -> float:
        """The rate at `t_s`, bytes/s."""
        return self._trace.value_at(t_s)

    def set_trace(self, now_s: float, trace: RateTrace) -> None:
        """Use `trace` from `now_s` on; the piece being sent keeps what it has sent."""
        self._advance(now_s)
        if self._waiting:
            if self._head_start_s < now_s:
                sent_bytes = self._trace.integral(self._head_start_s, now_s)
                self._head_left_bytes = max(0.0, self._head_left_bytes - sent_bytes)
                self._head_start_s = now_s
            self._head_end_s = trace.finish_time(self._head_start_s, self._head_left_bytes)
        self._trace = trace

    def clear(self) -> None:
        """Drop everything queued or under way."""
        self._waiting.clear()
        self._flying.clear()
        self.queued_bytes = 0
        self._free_s = self._due_s = -math.inf
        self._head_end_s = math.inf


def check_delay(value: Any) -> float:
    """The delay in seconds as a float.

    Raises:
        ConfigError: It is negative or not finite.
    """
    delay_s = float(value)
    if not (math.isfinite(delay_s) and delay_s >= 0):
        raise ConfigError(f"a hop's delay must be finite and >= 0, got {value} s")
    return delay_s
