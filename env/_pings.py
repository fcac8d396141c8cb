"""What a hop's pings have measured: the round trip that a sender knows of while it changes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from env._stations import RequestStore
from executor.errors import ConfigError
from executor.link import PING_PERIOD_S, RTT_WINDOW_S

__all__ = ["Pings", "send_probes"]

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


def send_probes(
    store: RequestStore,
    probing: NDArray[np.bool_],
    probe_bytes: F64,
    limit_bytes: float,
    flows: list[list[tuple[I64, F64]]],
) -> None:
    """Put probes at the hops, at an interval's start.

    Args:
        store: The live requests; each probe gets a slot.
        probing: [B, H] where a probe is on its way, and no second is sent; written to.
        probe_bytes: [B, H] sizes, 0 for none.
        limit_bytes: The largest.
        flows: Per station what comes to it; written to.

    Raises:
        ConfigError: A probe is larger than that.
    """
    env, hop = np.nonzero((probe_bytes > 0) & ~probing)
    if len(env) == 0:
        return
    sizes = probe_bytes[env, hop]
    if sizes.max() > limit_bytes:
        raise ConfigError(f"a probe must not exceed {limit_bytes:.0f} bytes, got {sizes.max():.0f}")
    probing[env, hop] = True
    new = store.extend(len(env))
    slot = np.arange(new.start, new.stop)
    store.env[new] = env
    store.is_probe[new] = True
    store.work[2 * hop + 1, slot] = sizes
    for h in range(probing.shape[1]):
        mine = slot[hop == h]
        flows[2 * h + 1].append((mine, np.zeros(len(mine))))
