"""What branches of an environment cost under a known future, exactly: the simulator, many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from env.conditions import IntervalConditions
from env.cost import Cost
from env.predict import CostModel
from env.simulator import Simulator, Snapshot
from env.system import DRAIN_DEADLINES
from env.tape import Tape

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = ["EQUAL", "Branches"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

AHEAD_INTERVALS = 12  # a run-out sees so many intervals' means; then the mean of those is held
EQUAL = 1e-9  # costs this close (relative to the larger of 1 and them) are the same branch
CHUNK = 4096  # branches simulated at once: their arrays stay in the processor's cache


class Branches:
    """Exact costs of branches under a tape's future.

    Args:
        model: The system's cost model.
        tape: T intervals of B environments.

    Attributes:
        busy: [T][B] where requests arrive: elsewhere the plan in force changes nothing.
    """

    def __init__(self, model: CostModel, tape: Tape) -> None:
        self.model, self.tape = model, tape
        self.busy = [interval.arrival_count > 0 for interval in tape.intervals]
        self._cost = Cost(model.profile, model.references, model.scenario)
        self._simulator = Simulator(model, tape.batch, 0, conditions=tape.play())
        run_out_s = DRAIN_DEADLINES * model.references.deadline_s
        ahead = min(AHEAD_INTERVALS, int(run_out_s / model.scenario.interval_s - 1e-9))
        means = [interval.mean() for interval in tape.intervals]
        lately = IntervalConditions.lately(tape.intervals, model.scenario.interval_s)
        self._after = []
        for t in range(1, len(tape) + 1):
            coming = means[t : t + ahead]
            # As `Simulator.drain` has it at the end.
            held = lately if t + ahead >= len(tape) else IntervalConditions.joined(coming).mean()
            self._after.append(IntervalConditions.joined([*coming, held]))
        self._start = self._simulator.snapshot()

    def start(self, owner: I64) -> Snapshot:
        """The beginning, for branches with the conditions of environments `owner`."""
        self._simulator.restore(self._start, owner, self.tape.play(owner))
        return self._simulator.snapshot()

    def step(
        self, snapshot: Snapshot, parent: I64, owner: I64, t: int, cuts: I64
    ) -> tuple[Snapshot, F64]:
        """Interval t of the branches: where they are then, and its cost.

        Args:
            snapshot: Where they come from.
            parent: [n] environment of the snapshot that each goes on from.
            owner: [n] whose conditions each has: environment of the tape.
            t: The interval.
            cuts: [n, H].
        """
        simulator = self._simulator
        simulator.restore(snapshot, parent, self.tape.play(owner, t))
        spent = self._charge(simulator.step(cuts))
        return simulator.snapshot(), spent

    def spend(
        self, snapshot: Snapshot, parent: I64, owner: I64, t: int, cuts: Sequence[I64]
    ) -> tuple[F64, F64]:
        """As `step` over several intervals, from t on, without a snapshot but with a run-out.

        Args:
            snapshot: As in `step`.
            parent: As in `step`.
            owner: As in `step`.
            t: The first interval.
            cuts: [n, H] of each interval.

        Returns:
            Costs [n] of the intervals, and of running out what is open after them.
        """
        n, simulator = len(parent), self._simulator
        spent, open_ = np.zeros(n), np.zeros(n)
        after, interval_s = self._after[t + len(cuts) - 1], self.model.scenario.interval_s
        for i in range(0, n, CHUNK):
            part = slice(i, min(n, i + CHUNK))
            simulator.restore(snapshot, parent[part], self.tape.play(owner[part], t))
            for plans in cuts:
                spent[part] += self._charge(simulator.step(plans[part]))
            open_[part] = self._charge(simulator.run_out(after.take(owner[part]), interval_s))
        return spent, open_

    def open_cost(self, snapshot: Snapshot, owner: I64) -> F64:
        """Cost of running out what is open after the last interval; as `spend`'s second."""
        simulator = self._simulator
        simulator.restore(snapshot, np.arange(snapshot.batch), self.tape.play(owner))
        return self._charge(simulator.run_out(self._after[-1].take(owner), None))

    def total(
        self, cuts: I64, startup: int, probes: F64 | None = None, owner: I64 | None = None
    ) -> F64:
        """Cost [n] from interval `startup` on, what is open at the end included.

        Args:
            cuts: [T, n, H] of every interval.
            startup: The first interval that counts.
            probes: [T, n, H] bytes, or None.
            owner: [n] environments of the tape; all, in order, when None.
        """
        simulator = self._simulator
        owner = np.arange(self.tape.batch) if owner is None else owner
        total = np.zeros(len(owner))
        for i in range(0, len(owner), CHUNK):
            part = slice(i, min(len(owner), i + CHUNK))
            simulator.restore(self._start, owner[part], self.tape.play(owner[part]))
            for t in range(len(self.tape)):
                sent = None if probes is None else probes[t, part]
                spent = self._charge(simulator.step(cuts[t, part], sent))
                total[part] += spent if t >= startup else 0.0
            total[part] += self._charge(simulator.drain_completed())
        return total

    def best_held(self, plans: I64, startup: int) -> I64:
        """Of plans [A, H], the one that costs least when held throughout, per environment [B, H].

        Args:
            plans: To choose from.
            startup: As in `total`.
        """
        batch = self.tape.batch
        owner = np.tile(np.arange(batch), len(plans))
        cuts = np.repeat(plans, batch, axis=0)
        every = np.broadcast_to(cuts, (len(self.tape), *cuts.shape))
        total = self.total(every, startup, owner=owner).reshape(len(plans), batch)
        best: I64 = plans[total.argmin(axis=0)]
        return best

    def _charge(self, result: StepResult) -> F64:
        record = result.record
        return self._cost(record, np.ones(len(record.arrived)))
