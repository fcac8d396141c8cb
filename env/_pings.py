"""What a hop's pings have measured: the round trip that a sender knows of while it changes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from executor.link import PING_PERIOD_S, RTT_WINDOW_S

__all__ = ["Pings"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Pings:
    """Pings every `PING_PERIOD_S` over every hop, as `executor._hop.Hop` sends them.

    As there, the round trip is twice the least way back of the last `RTT_WINDOW_S`, and a ping
    counts once it is back. Its way back takes the delay of the moment it was sent.

    Args:
        batch: Number of environments B.
        n_hops: Number of hops H.

    Attributes:
        delay_s: [B, H, W] one-way delay that each of the last W pings met; infinite before.
        sent: Pings sent since time 0 (over each hop).
    """

    def __init__(self, batch: int, n_hops: int) -> None:
        self._window = round(RTT_WINDOW_S / PING_PERIOD_S)
        self.delay_s = np.full((batch, n_hops, self._window), np.inf)
        self.sent = 0

    def take(self, index: I64) -> Pings:
        """Environment b of the result has the pings of this one's environment index[b]."""
        taken = Pings(len(index), self.delay_s.shape[1])
        taken.delay_s, taken.sent = self.delay_s[index], self.sent
        return taken

    def send(self, delay_s: F64, substep_s: float, start_s: float, length_s: float) -> None:
        """Send the pings of one interval.

        Args:
            delay_s: [B, H, K] one-way delay in each sub-step, the last one held.
            substep_s: Length of a sub-step.
            start_s: When the interval begins.
            length_s: Its length.
        """
        count = delay_s.shape[2]
        end = math.ceil((start_s + length_s) / PING_PERIOD_S - 1e-9)
        for ping in range(max(self.sent, end - self._window), end):
            k = int((ping * PING_PERIOD_S - start_s) / substep_s + 1e-9)
            self.delay_s[:, :, ping % self._window] = delay_s[:, :, min(max(k, 0), count - 1)]
        self.sent = max(self.sent, end)

    def rtt_s(self, now_s: float, before_s: F64) -> F64:
        """Round trip as measured by `now_s`, [B, H]; `before_s` where nothing is back yet."""
        newest = self.sent - 1
        ping = newest - (newest - np.arange(self._window)) % self._window
        rtt = 2.0 * self.delay_s
        rtt[rtt > now_s - ping * PING_PERIOD_S] = np.inf
        least = rtt.min(axis=2)
        return np.where(np.isfinite(least), least, before_s)
