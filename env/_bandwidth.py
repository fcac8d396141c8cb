"""What frames have measured of the hops: a sender's estimate of bandwidth, and how old it is.

As `executor.link.PassiveEstimator`: bytes over service, older frames counting exponentially less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from env._stations import Departures, RequestStore, sums
from executor.link import MIN_FRAME_BYTES, RATE_MEMORY_S

__all__ = ["Bandwidth", "Measured", "measure"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """What a hop's frames measured in an interval, [B] each; the age is infinite where nothing.

    Bytes and service are sums in which a frame counts exp(-t / `RATE_MEMORY_S`) as much as one that
    was through at the interval's end, t later.
    `bound_bytes_per_s` is what the frame still on the hop allows at most: its bytes over the time
    it has taken so far, as its sender sees it (a round trip late); infinite where there is none.
    Without it an outage would show only when it is over (`executor.link.PassiveEstimator`).
    """

    size_bytes: F64
    service_s: F64
    age_s: F64
    bound_bytes_per_s: F64


def measure(
    store: RequestStore, station: int, left: Departures, dt_s: float, rtt_s: F64
) -> Measured:
    """Bytes and service seconds of probes and of frames large enough to measure.

    `rtt_s` [B] is the hop's round trip as known to its sender.
    """
    batch = len(rtt_s)
    env, depart, work, wall = left.env, left.depart_s, left.work, left.wall_s
    large = work >= MIN_FRAME_BYTES
    if not large.all():
        large |= store.is_probe.take(left.slot)
        env, depart, work, wall = env[large], depart[large], work[large], wall[large]
    ago_s = dt_s - depart
    weight = np.exp(ago_s / -RATE_MEMORY_S)
    size, service = sums(env, work * weight, batch), sums(env, wall * weight, batch)
    age = np.full(batch, np.inf)
    age[env] = ago_s  # of repeated indices the last, newest, stays
    bound = np.full(batch, np.inf)
    head = left.head_slot
    head_bytes, head_env = store.work[station].take(head), store.env.take(head)
    seen_s = left.head_elapsed_s - rtt_s.take(head_env)
    overdue = (seen_s > 0) & ((head_bytes >= MIN_FRAME_BYTES) | store.is_probe.take(head))
    bound[head_env[overdue]] = head_bytes[overdue] / seen_s[overdue]
    return Measured(size, service, age, bound)


class Bandwidth:
    """The estimates of every hop, from interval to interval.

    Args:
        bytes_per_s: [B, H] what is known at the start.
        interval_s: Length of an interval.

    Attributes:
        bytes_per_s, age_s: [B, H] the estimate, and the seconds since what it rests on.
    """

    def __init__(self, bytes_per_s: F64, interval_s: float) -> None:
        self.bytes_per_s = bytes_per_s.copy()
        self.age_s = np.zeros_like(bytes_per_s)
        self._interval_s = interval_s
        self._counted = np.zeros((2, *bytes_per_s.shape))  # bytes and seconds of service

    def take(self, index: I64) -> Bandwidth:
        """Environment b of the result has the estimates of this one's environment index[b]."""
        taken = Bandwidth(self.bytes_per_s[index], self._interval_s)
        taken.age_s, taken._counted = self.age_s[index], self._counted[:, index]
        return taken

    def of_hop(self, hop: int, env: I64) -> tuple[F64, F64]:
        """Of that hop of these environments: bytes per second, and the sums that it rests on.

        The sums [2, n], bytes and seconds of service, are as they count at the interval's end; 0
        where no frame was measured yet.
        """
        return self.bytes_per_s[env, hop], self._counted[:, env, hop]

    def note(self, measured: list[Measured]) -> tuple[F64, F64]:
        """Take in what an interval measured, hop by hop.

        Returns:
            Bandwidth and age as the sender tells them, [B, H]: a frame that is overdue lowers the
            one, as of now, and is forgotten when it is through.
        """
        self.age_s += self._interval_s
        self._counted *= np.exp(self._interval_s / -RATE_MEMORY_S)
        bound = np.empty_like(self.bytes_per_s)
        for h, m in enumerate(measured):
            self._counted[:, :, h] += m.size_bytes, m.service_s
            self.age_s[:, h] = np.minimum(self.age_s[:, h], m.age_s)
            bound[:, h] = m.bound_bytes_per_s
            seen = np.flatnonzero(m.service_s > 0)  # in a long run-out old frames count nothing
            size_bytes, service_s = self._counted[:, seen, h]
            self.bytes_per_s[seen, h] = size_bytes / service_s
        overdue = bound < self.bytes_per_s
        return np.where(overdue, bound, self.bytes_per_s), np.where(overdue, 0.0, self.age_s)
