"""What is known of a hop: the two-point probe, passive estimates, and clock offsets.

No sockets and no clock of its own: callers pass in events with their times, and every time is
seconds of the caller's monotonic clock unless it says otherwise.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from executor.errors import ConfigError
from executor.profile import HopModel

__all__ = [
    "MIN_FRAME_BYTES",
    "MIN_PROBE_BYTES",
    "RATE_MEMORY_S",
    "ClockOffset",
    "HopEstimate",
    "PassiveEstimator",
    "two_point",
]

MIN_FRAME_BYTES = 16 * 1024  # frames below are dominated by overhead; the estimate skips them
MIN_PROBE_BYTES = 4096
PING_PERIOD_S = 0.5
RTT_WINDOW_S = 10.0
RATE_MEMORY_S = 1.0  # a frame counts for 1/e of one that comes so much later
MIN_SERVICE_S = 1e-6
CLOCK_STEP_S = 1e-6  # clocks read that close together may seem to run backwards


def two_point(
    small_bytes: int,
    small_rtts_s: Sequence[float],
    large_bytes: int,
    large_rtts_s: Sequence[float],
    previous: HopModel | None = None,
) -> HopModel:
    """The reference's link model rtt(s) = omega + s / beta (arXiv 2605.09623).

    beta = (s2 - s1) / (tau2 - tau1) and omega = max(0, tau1 - s1 / beta), with tau the mean round
    trips of s1 and s2 bytes.

    Args:
        small_bytes: s1, bytes of the small payload.
        small_rtts_s: Its round trips.
        large_bytes: s2, more than s1.
        large_rtts_s: Its round trips.
        previous: Kept when the probe is malformed (tau2 <= tau1); its frame overhead is carried
            over.

    Returns:
        beta as `bytes_per_s`, and omega less the frame overhead as `rtt_s`.

    Raises:
        ConfigError: The arguments make no probe, or it is malformed and there is no `previous`.
    """
    if not 0 <= small_bytes < large_bytes or not small_rtts_s or not large_rtts_s:
        raise ConfigError(
            f"a two-point probe needs sizes 0 <= s1 < s2 and a round trip of each, got "
            f"{small_bytes} and {large_bytes} bytes, {len(small_rtts_s)} and {len(large_rtts_s)} "
            "round trips"
        )
    tau1, tau2 = fmean(small_rtts_s), fmean(large_rtts_s)
    if not (math.isfinite(tau1) and math.isfinite(tau2) and tau2 > tau1):
        if previous is None:
            raise ConfigError(
                f"malformed link probe: {large_bytes} bytes took {tau2:.6f} s, {small_bytes} bytes "
                f"{tau1:.6f} s; probe again with a larger payload"
            )
        return previous
    beta = (large_bytes - small_bytes) / (tau2 - tau1)
    omega = max(0.0, tau1 - small_bytes / beta)
    overhead = previous.frame_overhead_s if previous else 0.0
    return HopModel(bytes_per_s=beta, rtt_s=max(0.0, omega - overhead), frame_overhead_s=overhead)


@dataclass(frozen=True)
class HopEstimate:
    """A hop's bandwidth as measured so far, and the seconds since what it rests on."""

    bytes_per_s: float
    age_s: float


class PassiveEstimator:
    """Bandwidth and backlog of one hop, from the frames it carries anyway.

    Frames arrive in the order they were sent and each is acknowledged once, so the hop is a serial
    server: a frame's service starts when it reaches the link or when the frame before it has been
    received, whichever is later, and ends when it has been received. Bandwidth is bytes over
    service, a frame counting exp(-t / `memory_s`) as much as one that was received t later; small
    frames, whose service is mostly overhead, do not count, but for probes, which are small on a
    slow hop.

    One thread reports frames; `backlog_s` may be asked from another.
    """

    def __init__(
        self, memory_s: float = RATE_MEMORY_S, min_frame_bytes: int = MIN_FRAME_BYTES
    ) -> None:
        self._memory_s = memory_s
        self._min_frame_bytes = min_frame_bytes
        self._in_flight: deque[tuple[int, float, bool]] = deque()  # bytes, sent, does it count
        self._counted_bytes, self._counted_s = 0.0, 0.0  # bytes and service of frames that count
        self._counted_to_s = -math.inf  # when the newest of them was received
        self._returns: deque[tuple[float, float]] = deque()  # acknowledged, return delay
        self._last_received_s = -math.inf
        self._lock = threading.Lock()
        self.unacked_bytes = 0

    def on_sent(self, frame_bytes: int, now_s: float, *, probe: bool = False) -> None:
        """A frame, or a probe, was handed to the hop's socket."""
        counts = frame_bytes >= (MIN_PROBE_BYTES if probe else self._min_frame_bytes)
        with self._lock:
            self._in_flight.append((frame_bytes, now_s, counts))
            self.unacked_bytes += frame_bytes

    def on_ack(self, received_s: float, now_s: float, held_s: float = 0.0) -> None:
        """The oldest frame in flight was acknowledged (without one, nothing happens).

        Args:
            received_s: When the peer had the whole frame, on this node's clock
                (`ClockOffset.to_local`).
            now_s: When the acknowledgement arrived.
            held_s: For how long the peer kept it back, in favour of what had to go on.
        """
        with self._lock:
            self._take_ack(received_s, now_s, held_s)

    def _take_ack(self, received_s: float, now_s: float, held_s: float) -> None:
        if not self._in_flight:
            return
        frame_bytes, sent_s, counts = self._in_flight.popleft()
        self.unacked_bytes -= frame_bytes
        self._note_return(max(0.0, now_s - held_s - received_s), now_s)
        service_s = received_s - self._service_start_s(sent_s)
        self._last_received_s = max(self._last_received_s, received_s)
        if not counts or service_s < MIN_SERVICE_S:
            return
        left = math.exp(min(0.0, self._counted_to_s - received_s) / self._memory_s)
        self._counted_bytes = left * self._counted_bytes + frame_bytes
        self._counted_s = left * self._counted_s + service_s
        self._counted_to_s = received_s

    def on_lost(self) -> None:
        """The connection broke: what was in flight will not be acknowledged."""
        with self._lock:
            self._in_flight.clear()
            self.unacked_bytes = 0

    def backlog_s(self, now_s: float) -> float | None:
        """Seconds in which what is not acknowledged gets across; None while the rate is unknown."""
        with self._lock:
            if not self.unacked_bytes:
                return 0.0
            estimate = self.estimate(now_s)
            return None if estimate is None else self.unacked_bytes / estimate.bytes_per_s

    @property
    def rtt_s(self) -> float | None:
        """Round trip of an empty frame (twice the least return delay), None before the first."""
        return 2.0 * min(delay for _, delay in self._returns) if self._returns else None

    def estimate(self, now_s: float) -> HopEstimate | None:
        """Bandwidth and its age; None before the first large frame.

        A large frame that is overdue bounds the bandwidth from above before it arrives; otherwise
        an outage would show only when it is over.
        """
        estimate = None
        if self._counted_s:
            rate = self._counted_bytes / self._counted_s
            estimate = HopEstimate(rate, max(0.0, now_s - self._counted_to_s))
        if self._in_flight and estimate:
            frame_bytes, sent_s, counts = self._in_flight[0]
            seen_until_s = now_s - (self.rtt_s or 0.0) / 2.0
            elapsed_s = seen_until_s - self._service_start_s(sent_s)
            if counts and elapsed_s > 0:
                bound = frame_bytes / elapsed_s
                if bound < estimate.bytes_per_s:
                    estimate = HopEstimate(bound, 0.0)
        return estimate

    def _service_start_s(self, sent_s: float) -> float:
        return max(sent_s + (self.rtt_s or 0.0) / 2.0, self._last_received_s)

    def _note_return(self, delay_s: float, now_s: float) -> None:
        # Kept increasing in delay, so the deque stays short and its first is the minimum.
        while self._returns and self._returns[-1][1] >= delay_s:
            self._returns.pop()
        self._returns.append((now_s, delay_s))
        while self._returns[0][0] < now_s - RTT_WINDOW_S:
            self._returns.popleft()


class ClockOffset:
    """A peer's clock against ours, from four-timestamp exchanges of small frames.

    Queueing makes the two ways unequal and corrupts an exchange, so the one with the least round
    trip of the window is believed; its error is at most half that round trip.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float, float]] = deque()  # when, rtt, offset

    def add(self, sent_s: float, received_s: float, replied_s: float, returned_s: float) -> None:
        """One exchange; a negative round trip (a clock was set) is ignored.

        Args:
            sent_s: We sent, our clock.
            received_s: The peer received, its clock.
            replied_s: The peer replied, its clock.
            returned_s: We received the reply, our clock.
        """
        rtt_s = (returned_s - sent_s) - (replied_s - received_s)
        if rtt_s < -CLOCK_STEP_S:
            return
        rtt_s = max(0.0, rtt_s)
        offset_s = ((received_s - sent_s) + (replied_s - returned_s)) / 2.0
        while self._samples and self._samples[-1][1] >= rtt_s:
            self._samples.pop()
        self._samples.append((returned_s, rtt_s, offset_s))
        while self._samples[0][0] < returned_s - self._window_s:
            self._samples.popleft()

    @property
    def offset_s(self) -> float:
        """The peer's clock minus ours; 0 before the first exchange."""
        return self._samples[0][2] if self._samples else 0.0

    @property
    def rtt_s(self) -> float | None:
        """Least round trip of the window; None before the first exchange."""
        return self._samples[0][1] if self._samples else None

    def to_local(self, peer_s: float) -> float:
        """A time of the peer's clock on ours."""
        return peer_s - self.offset_s
