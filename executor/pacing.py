"""Emulated speed: traces that integrate exactly, and the pacer that stretches a stage to them.

Three emulated nodes share a machine's cores, so a stage is paced by its CPU time (which
preemption does not touch), not by its wall time: its work is `ratio` times the CPU seconds it
took here, and it ends when the integral of (1 - load) reaches that work.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from executor.errors import ConfigError, StageAbandoned

__all__ = ["MAX_LOAD", "LoadTrace", "Pacer", "StepTrace"]

MAX_LOAD = 0.9
"""Loads are clipped to [0, MAX_LOAD]: a stage is never slower than 10 times its unloaded self."""

_SLICE_S = 0.01
OVERRUN_SLACK_S = 0.001
OVERRUN_SLACK_SHARE = 0.05

T = TypeVar("T")


class StepTrace:
    """A non-negative function of time, constant over steps of `dt_s`, with its integral.

    The first value holds before `t0_s` and the last one after the end. Times are
    `time.monotonic()` seconds wherever processes share a trace (on Linux it is system-wide).
    """

    def __init__(self, t0_s: float, dt_s: float, values: Sequence[float]) -> None:
        """Take the samples.

        Args:
            t0_s: Start of the first step.
            dt_s: Length of a step, positive.
            values: One finite, non-negative value per step, at least one.

        Raises:
            ConfigError: An argument is outside what is said above.
        """
        if not math.isfinite(t0_s):
            raise ConfigError(f"a trace's start must be a finite time in s, got {t0_s}")
        if not (math.isfinite(dt_s) and dt_s > 0):
            raise ConfigError(f"a trace's step must be positive, got {dt_s} s")
        if not values:
            raise ConfigError("a trace needs at least one sample, got none")
        for k, value in enumerate(values):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"trace sample {k} must be finite and >= 0, got {value}")
        self._values = [float(value) for value in values]
        self._edges = [t0_s + k * dt_s for k in range(len(values))]
        # _sums[k]: integral from t0_s to _edges[k]; the last step has no end.
        self._sums = [0.0]
        for k in range(len(values) - 1):
            self._sums.append(
                self._sums[-1] + self._values[k] * (self._edges[k + 1] - self._edges[k])
            )

    def _step(self, t_s: float) -> int:
        return max(0, bisect_right(self._edges, t_s) - 1)

    def value_at(self, t_s: float) -> float:
        """The value at `t_s`."""
        return self._values[self._step(t_s)]

    def next_step_s(self, t_s: float) -> float:
        """When the step after that at `t_s` begins; infinity in the last one."""
        k = bisect_right(self._edges, t_s, lo=1)
        return self._edges[k] if k < len(self._edges) else math.inf

    def integral(self, start_s: float, stop_s: float) -> float:
        """Integral of the value from `start_s` to `stop_s` (value times seconds)."""
        first, last = self._step(start_s), self._step(stop_s)
        if first == last:
            return self._values[first] * (stop_s - start_s)
        whole = self._sums[last] - self._sums[first]
        before = self._values[first] * (start_s - self._edges[first])
        after = self._values[last] * (stop_s - self._edges[last])
        return whole - before + after

    def finish_time(self, start_s: float, amount: float) -> float:
        """The first time at which the integral from `start_s` reaches `amount`.

        Args:
            start_s: When the work starts.
            amount: Value times seconds to accumulate (work seconds, bytes, ...).

        Returns:
            A time >= `start_s`; infinity where the trace stays at 0 before enough has come.
        """
        if amount <= 0:
            return start_s
        k = self._step(start_s)
        if k + 1 == len(self._values):
            return _reach(start_s, amount, self._values[k])
        head = self._values[k] * (self._edges[k + 1] - start_s)
        if head >= amount:
            return start_s + amount / self._values[k]
        target = self._sums[k + 1] + (amount - head)
        m = bisect_left(self._sums, target, lo=k + 1)
        if m == k + 1:  # what is left vanishes beside the sum
            return self._edges[m]
        return _reach(self._edges[m - 1], target - self._sums[m - 1], self._values[m - 1])


def _reach(start_s: float, amount: float, rate: float) -> float:
    return start_s + amount / rate if rate > 0 else math.inf


class LoadTrace:
    """A node's background load over time, clipped to [0, MAX_LOAD].

    Work proceeds at speed 1 - load: a loaded node is slower by 1 / (1 - load).
    """

    def __init__(self, speed: StepTrace) -> None:
        self._speed = speed

    @classmethod
    def constant(cls, value: float) -> LoadTrace:
        """The same load at all times.

        Raises:
            ConfigError: The value is no finite number.
        """
        return cls.from_samples(0.0, 1.0, [value])

    @classmethod
    def from_samples(cls, t0_s: float, dt_s: float, values: Sequence[float]) -> LoadTrace:
        """One load per step of `dt_s` from `t0_s` on; the last holds after the end.

        Raises:
            ConfigError: No samples, a step that is not positive, or a load that is not finite.
        """
        for k, value in enumerate(values):
            if not math.isfinite(value):
                raise ConfigError(f"load sample {k} must be a finite number, got {value}")
        return cls(StepTrace(t0_s, dt_s, [1.0 - min(max(v, 0.0), MAX_LOAD) for v in values]))

    def value_at(self, t_s: float) -> float:
        """The load at `t_s`, in [0, MAX_LOAD]."""
        return 1.0 - self._speed.value_at(t_s)

    def work_s(self, start_s: float, stop_s: float) -> float:
        """Unloaded seconds of work that get done from `start_s` to `stop_s`."""
        return self._speed.integral(start_s, stop_s)

    def finish_time(self, start_s: float, work_s: float) -> float:
        """When `work_s` unloaded seconds of work that start at `start_s` are done."""
        return self._speed.finish_time(start_s, work_s)


class Pacer:
    """Runs stages at an emulated node's speed, one at a time, on the calling thread.

    Attributes:
        ratio: How many times slower than this machine's core the node is; None runs unpaced.
        load: The node's background load. Assign to change it; a running stage keeps the trace it
            ends under, and the next one uses the new trace.
        stages: Stages run so far.
        overruns: Paced stages that were already later than their deadline by more than 1 ms plus
            5 % when their compute ended. More than 1 % of them make a run invalid.
    """

    def __init__(
        self,
        ratio: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Set the speed.

        Args:
            ratio: Positive, or None for unpaced (the work is then the wall time, and the load
                is ignored).
            clock: Wall clock of the load trace, s.
            cpu_clock: CPU time of the calling thread, s.
            sleep: Sleeps for a number of seconds.

        Raises:
            ConfigError: The ratio is not a positive finite number.
        """
        if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
            raise ConfigError(f"a node's speed ratio must be positive, got {ratio}")
        self.ratio = ratio
        self.load = LoadTrace.constant(0.0)
        self.stages = 0
        self.overruns = 0
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._sleep = sleep

    def run(
        self, fn: Callable[[], T], is_wanted: Callable[[], bool] | None = None
    ) -> tuple[T, float]:
        """Run `fn`, then sleep until the emulated node would have finished it.

        Args:
            fn: The stage.
            is_wanted: Asked again and again while it sleeps.

        Returns:
            What `fn` returned, and its work: the unloaded seconds it takes on the emulated node.

        Raises:
            StageAbandoned: `is_wanted` said no.
        """
        start_s = self._clock()
        cpu_start_s = self._cpu_clock()
        result = fn()
        cpu_s = self._cpu_clock() - cpu_start_s
        now_s = self._clock()
        self.stages += 1
        if self.ratio is None:
            return result, now_s - start_s
        work_s = self.ratio * cpu_s
        deadline_s = self.load.finish_time(start_s, work_s)
        late_s = now_s - deadline_s
        if late_s > OVERRUN_SLACK_S + OVERRUN_SLACK_SHARE * (deadline_s - start_s):
            self.overruns += 1
        elif late_s < 0 and is_wanted is None:
            self._sleep(-late_s)
        while is_wanted is not None and (left_s := deadline_s - self._clock()) > 0:
            if not is_wanted():
                raise StageAbandoned("its output is not wanted any more")
            self._sleep(min(left_s, _SLICE_S))
        return result, work_s
