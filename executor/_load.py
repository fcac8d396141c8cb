"""How much of this machine others use, from Linux's /proc/stat."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["HostLoad"]

_PERIOD_S = 1.0
_MAX_LOAD = 0.9


class HostLoad:
    """Share of the machine's CPU time that processes other than this one take."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        """Begin the first window; `stat` is the kernel's file."""
        self._stat = stat
        self._load = 0.0
        self._last = (time.monotonic(), self._busy_s(), time.process_time())

    def read(self, now_s: float) -> float:
        """Load of the last full second, 0..0.9; 0 where the kernel does not tell."""
        then_s, busy_then_s, own_then_s = self._last
        if now_s - then_s >= _PERIOD_S:
            busy_s, own_s = self._busy_s(), time.process_time()
            others_s = (busy_s - busy_then_s) - (own_s - own_then_s)
            share = others_s / ((now_s - then_s) * (os.cpu_count() or 1))
            self._load = min(max(share, 0.0), _MAX_LOAD)
            self._last = (now_s, busy_s, own_s)
        return self._load

    def _busy_s(self) -> float:
        """CPU seconds that all cores together were not idle (user, nice, system, irq, softirq)."""
        try:
            fields = self._stat.read_text().split("\n", 1)[0].split()
            ticks = [int(field) for field in fields[1:8]]
            user, nice, system, _idle, _iowait, irq, softirq = ticks
        except (OSError, ValueError):
            return 0.0
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
