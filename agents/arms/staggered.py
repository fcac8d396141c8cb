"""Many edges that decide on their own: at the same moments or each at its own, alone or not.

The simulator goes in short steps; an edge decides once per longer interval, at its phase. Between
its decisions its plan holds, and what the steps returned is put together, so a controller sees the
same as if the system itself went in its intervals.

The queue-aware prediction knows of others only the queue they have left by now, and believes that
it runs out unless this edge adds to it. `CountingOthers` takes away from every shared node and hop
what others use of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Controller, Decision
from env.cost import IntervalRecord
from env.predict import CostModel
from env.state import SystemState
from env.system import Completed, StepResult

__all__ = ["CountingOthers", "Staggered"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MOST_BUSY = 0.95  # others leave at least the rest of a node or hop


@dataclass
class _Group:
    """Edges that decide at the same moments, and what happened since they last did."""

    rows: I64
    phase: int
    controller: Controller
    seen: list[StepResult] = field(default_factory=list)


class Staggered:
    """A controller of the simulator's short steps, made of controllers of longer intervals.

    Args:
        name: The arm's name.
        make: Makes one; each phase gets its own.
        model: Of the edges' decisions: as the simulator's, with the longer interval.
        phase: [B] the step of an interval at which each edge decides. At the very first step all
            decide, whatever their phase.
        steps: Steps per interval.

    Attributes:
        decide_s: CPU seconds of each decision of the first edge by itself.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Controller],
        model: CostModel,
        phase: I64,
        steps: int,
    ) -> None:
        self.name, self.decide_s = name, list[float]()
        self._make, self._model, self._phase, self._steps = make, model, phase, steps

    def reset(self, model: CostModel, batch: int) -> None:
        """Make the controllers anew."""
        self._groups = [
            _Group(np.flatnonzero(self._phase == p), int(p), self._make())
            for p in np.unique(self._phase)
        ]
        # Deciding for a batch says little of deciding for one: the first edge does so, too.
        alone = _Group(np.zeros(1, dtype=np.int64), int(self._phase[0]), self._make())
        for group in [*self._groups, alone]:
            group.controller.reset(self._model, len(group.rows))
        self._alone, self._step = alone, 0
        self._cuts = np.zeros((batch, model.profile.n_nodes - 1), dtype=np.int64)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """New plans and probes of the edges whose turn it is."""
        probe = np.zeros(self._cuts.shape)
        for group in [*self._groups, self._alone]:
            if last is not None:
                group.seen.append(last)
            if self._step and (self._step - group.phase) % self._steps:
                continue
            own = self._joined(state, group)
            begin = time.thread_time()
            decision = group.controller.decide(own.state, own if self._step else None)
            if group is self._alone:
                self.decide_s.append(time.thread_time() - begin)
                continue
            self._cuts[group.rows] = decision.cuts
            if decision.probe_bytes is not None:
                probe[group.rows] = decision.probe_bytes
        self._step += 1
        return Decision(self._cuts.copy(), probe)

    def _joined(self, state: SystemState, group: _Group) -> StepResult:
        """What the steps since a group's last decision gave, as one interval of its own."""
        rows, seen = group.rows, group.seen
        total = IntervalRecord.zeros(len(rows), state.node_load.shape[1])
        for result in seen:
            total.add(
                IntervalRecord(
                    **{f.name: getattr(result.record, f.name)[rows] for f in fields(total)}
                )
            )
        mean_s = total.latency_sum_s / np.maximum(total.completed, 1)
        ratio = np.where(total.completed > 0, mean_s / self._model.references.latency_s, 1.0)
        own = replace(state.take(rows), latency_ratio=ratio)
        joined = StepResult(own, total, _of(rows, seen, state.batch))
        seen.clear()
        return joined


def _of(rows: I64, seen: list[StepResult], batch: int) -> Completed | None:
    """The requests of some environments that ended in several steps; they count from 0 here."""
    done = [r.completed for r in seen if r.completed is not None]
    if not done:
        return None
    place = np.full(batch, -1)
    place[rows] = np.arange(len(rows))
    joined = {f.name: np.concatenate([getattr(d, f.name) for d in done]) for f in fields(Completed)}
    env = place[joined["env"]]
    mine = env >= 0
    return Completed(**{**{k: v[mine] for k, v in joined.items()}, "env": env[mine]})


class CountingOthers:
    """A controller that is shown what others leave of the shared nodes and hops.

    Args:
        inner: Decides.
        others_busy: Gives the share [B, S] of each station that others use
            (`env.sharing.SharingSimulator.others_busy`).
    """

    def __init__(self, inner: Controller, others_busy: Callable[[], F64]) -> None:
        self.name = inner.name
        self._inner, self._others_busy = inner, others_busy

    def reset(self, model: CostModel, batch: int) -> None:
        """Start anew."""
        self._inner.reset(model, batch)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Decide on the slower nodes and hops that others leave."""
        left = 1.0 - np.minimum(self._others_busy(), MOST_BUSY)
        slower = replace(
            state,
            node_load=1.0 - (1.0 - state.node_load) * left[:, 0::2],
            bytes_per_s=state.bytes_per_s * left[:, 1::2],
        )
        return self._inner.decide(slower, last)
