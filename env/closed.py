"""Running nodes in a closed loop: the next request comes when the last has been answered.

So arXiv 2605.09623 measures; the simulator's counterpart is `env.reference.closed_loop`.
"""

from __future__ import annotations

import time
from concurrent.futures import wait

import numpy as np
from numpy.typing import NDArray

from env.live import LiveSystem
from env.system import StepResult

__all__ = ["ClosedLoop"]


class ClosedLoop(LiveSystem):
    """As `LiveSystem`, with one request per interval, which lasts until its answer is there.

    What passes between two requests, decisions and probes, is no request's. The state's arrival
    rate stays the scenario's, as nothing ever queues.
    """

    def step(
        self, cuts: NDArray[np.int64], probe_bytes: NDArray[np.float64] | None = None
    ) -> StepResult:
        """Run one request under a plan, after the probes; shapes as `LiveSystem.step`."""
        self._begin(cuts, probe_bytes)
        wait([future for *_, future in self._probes])
        begin_s = time.monotonic()
        taken = self._submit(begin_s)
        if taken:
            wait([self._open[-1].future])
        self._end_s = time.monotonic()
        return self._end(begin_s, 1, [] if taken else [begin_s])
