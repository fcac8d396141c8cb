"""Exogenous conditions: bandwidth, load and arrivals per interval, for a batch of environments.

They do not depend on any action: the same scenario, rates, batch and seed give the same conditions
to every controller (common random numbers), in the simulator and on the testbed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from env._play import TracePlayer, played
from env.scenario import MAX_ONE_WAY_DELAY_S, HopSetup, Process, Scenario
from env.traces import load_traces
from executor.errors import ConfigError

__all__ = [
    "Conditions",
    "ConditionsSource",
    "IntervalConditions",
    "SharedConditions",
    "mean_delay_s",
    "process_mean",
    "typical_mbps",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
BYTES_PER_S_PER_MBPS = 1e6 / 8
MAX_LOAD = 0.9
LATELY_S = 12.0


@dataclass(frozen=True)
class IntervalConditions:
    """What happens outside during one interval.

    Attributes:
        hop_bytes_per_s: Shape [B, H, K]: bandwidth, constant in each of the K sub-steps.
        node_speed: Shape [B, N, K]: 1 - load.
        hop_delay_s: Shape [B, H, K]: one-way propagation delay.
        arrival_env: Shape [R], not decreasing: which environment each request arrives in.
        arrival_offset_s: Shape [R]: seconds after the interval's start, sorted within each
            environment.
        arrival_count: Shape [B].
    """

    hop_bytes_per_s: F64
    node_speed: F64
    hop_delay_s: F64
    arrival_env: NDArray[np.int64]
    arrival_offset_s: F64
    arrival_count: NDArray[np.int64]

    def take(self, index: I64) -> IntervalConditions:
        """Environment b of the result has the conditions of this one's environment index[b]."""
        count = self.arrival_count[index]
        first = (np.cumsum(self.arrival_count) - self.arrival_count)[index]
        env = np.repeat(np.arange(len(index)), count)
        position = np.arange(len(env)) + np.repeat(first - (np.cumsum(count) - count), count)
        offset = self.arrival_offset_s[position]
        return IntervalConditions(
            **self._levels(lambda a: a[index]),
            arrival_env=env,
            arrival_offset_s=offset,
            arrival_count=count,
        )

    def held(self) -> IntervalConditions:
        """The last sub-step's values, and no arrivals."""
        return IntervalConditions(
            **self._levels(lambda a: a[:, :, -1:]),
            arrival_env=np.zeros(0, dtype=np.int64),
            arrival_offset_s=np.zeros(0),
            arrival_count=np.zeros_like(self.arrival_count),
        )

    def mean(self) -> IntervalConditions:
        """The means over the sub-steps as a single one, and no arrivals."""
        means = {
            name: level.mean(axis=2, keepdims=True)
            for name, level in self._levels(lambda a: a).items()
        }
        return replace(self.held(), **means)

    def smoothed(self, before: IntervalConditions | None, interval_s: float) -> IntervalConditions:
        """What it has lately been: running means over about `LATELY_S`, and no arrivals.

        Args:
            before: The same after the interval before; None for the first one.
            interval_s: How long an interval lasts.
        """
        now = self.mean()
        if before is None:
            return now
        share = -np.expm1(-interval_s / LATELY_S)
        return replace(
            now,
            **{
                name: old + share * (new - old)
                for (name, new), old in zip(
                    now._levels(lambda a: a).items(),
                    before._levels(lambda a: a).values(),
                    strict=True,
                )
            },
        )

    @staticmethod
    def lately(intervals: Sequence[IntervalConditions], interval_s: float) -> IntervalConditions:
        """`smoothed` over intervals one after the other, of which there is at least one."""
        found = intervals[0].smoothed(None, interval_s)
        for interval in intervals[1:]:
            found = interval.smoothed(found, interval_s)
        return found

    @staticmethod
    def joined(intervals: Sequence[IntervalConditions]) -> IntervalConditions:
        """Intervals one after the other as sub-steps of a single one, without their arrivals."""
        quiet = intervals[0].held()
        names = quiet._levels(lambda a: a)
        series = {n: np.concatenate([getattr(i, n) for i in intervals], axis=2) for n in names}
        return replace(quiet, **series)

    def _levels(self, change: Callable[[F64], F64]) -> dict[str, F64]:
        """Every quantity of shape [B, ., K], changed."""
        names = [f.name for f in fields(self) if not f.name.startswith("arrival_")]
        return {name: change(getattr(self, name)) for name in names}


class ConditionsSource(Protocol):
    """What a simulator takes its conditions from.

    Attributes:
        rate_rps: [B] mean arrival rate of each environment.
        substep_s: Seconds that a bandwidth or a load lasts.
    """

    rate_rps: F64
    substep_s: float

    def reset(self, seed: int) -> None:
        """Start again, with the conditions that `seed` names."""

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        ...


class Conditions:
    """Draws `IntervalConditions` one interval after the other.

    Bandwidth, load and delay come from one random stream, arrivals from another, and which traces
    are played from a third: another arrival rate leaves bandwidth and load as they were. How much
    is drawn never depends on an action.

    Args:
        scenario: Processes and interval.
        rate_rps: Mean arrival rate per environment, shape [B].
        seed: Everything drawn depends on this alone.
    """

    def __init__(self, scenario: Scenario, rate_rps: F64, seed: int) -> None:
        self.scenario = scenario
        self.rate_rps = np.asarray(rate_rps, dtype=np.float64)
        self.batch = len(self.rate_rps)
        self.substeps = max(1, int(np.ceil(scenario.interval_s / scenario.substep_s - 1e-9)))
        self.substep_s = scenario.interval_s / self.substeps
        self._n_hops = len(scenario.hops)
        self._processes = [h.bandwidth for h in scenario.hops]
        self._processes += [n.load for n in scenario.nodes]
        self._processes.append(scenario.arrivals)
        # These have an offset drawn whether or not they play a trace; delays, which came later,
        # must not move the draws that follow.
        self._n_first = len(self._processes)
        quantities = ["mbps"] * self._n_hops + ["load"] * len(scenario.nodes) + ["rate_rps"]
        self._delay_hops = [h for h, hop in enumerate(scenario.hops) if hop.delay is not None]
        self._processes += [hop.delay for hop in scenario.hops if hop.delay is not None]
        quantities += ["rtt_ms"] * len(self._delay_hops)
        self._delay_s = np.zeros((self.batch, self._n_hops, self.substeps))
        for h, hop in enumerate(scenario.hops):
            self._delay_s[:, h] = mean_delay_s(hop)
        self._players = {
            i: TracePlayer(load_traces(p.path, q), p.scale, p.time_scale, p.jitter)
            for i, (p, q) in enumerate(zip(self._processes, quantities, strict=True))
            if p.kind == "trace"
        }
        # Neither moves by draws of its own: filled in for a whole interval at once.
        self._constant = [
            (i, min(max(p.levels[0], p.minimum), p.maximum))
            for i, p in enumerate(self._processes)
            if p.kind == "constant"
        ]
        # Multiplicative noise first, so that either kind is one block of rows.
        moving = [(not p.log, i) for i, p in enumerate(self._processes) if p.kind == "markov"]
        self._rows = [i for _, i in sorted(moving)]
        self._n_log = sum(not additive for additive, _ in moving)
        self._out_rows = [m for m, i in enumerate(self._rows) if self._processes[i].outage_per_s]
        self._setup([self._processes[i] for i in self._rows])
        self.reset(seed)

    def _setup(self, moving: list[Process]) -> None:
        """Stack the moving processes' parameters: one pass of array code advances them all."""
        self._n_levels = np.array([len(p.levels) for p in moving], dtype=np.int64)
        self._levels = np.zeros((len(moving), max([len(p.levels) for p in moving], default=1)))
        for row, p in zip(self._levels, moving, strict=True):
            row[: len(p.levels)] = p.levels

        def column(name: str) -> F32:
            return np.array([float(getattr(p, name)) for p in moving], dtype=np.float32)[:, None]

        dt = self.substep_s
        self._p_switch = -np.expm1(-dt / column("dwell_s"))
        self._ar = np.exp(-dt / column("correlation_s"))
        self._innovation = np.sqrt(1.0 - self._ar**2)
        self._sigma = column("sigma")
        # exp(shift - variance / 2) has mean 1.
        self._half_variance = 0.5 * self._sigma[: self._n_log] ** 2
        out = self._out_rows
        self._p_outage = -np.expm1(-dt * column("outage_per_s")[out])
        self._p_stay_out = np.exp(-dt / column("outage_s")[out])
        self._outage_value = column("outage_value")[out]
        self._minimum, self._maximum = column("minimum"), column("maximum")

    def reset(self, seed: int) -> None:
        """Start again from the beginning of the conditions that `seed` names."""
        self._rng, self._arrival_rng, trace_rng = np.random.default_rng(seed).spawn(3)
        shape = (len(self._rows), self.batch)
        regime = (self._rng.random(shape) * self._n_levels[:, None]).astype(np.int64)
        self._level = np.take_along_axis(self._levels, regime, axis=1).astype(np.float32)
        self._noise = self._rng.standard_normal(shape, dtype=np.float32)
        self._out = np.zeros((len(self._out_rows), self.batch), dtype=bool)
        self._turn = 0
        share = self._rng.random((self._n_first, self.batch))
        for i, player in self._players.items():
            where = share[i] if i < self._n_first else trace_rng.random(self.batch)
            player.reset(trace_rng, self.batch, where)

    def _move(self) -> F32:
        """One sub-step of the moving processes; returns their values, [rows, B]."""
        uniform = self._rng.random(self._level.shape, dtype=np.float32)
        switch = np.flatnonzero(uniform < self._p_switch)
        row = switch // self.batch
        # Given u < p, u / p is uniform again: it draws the regime.
        drawn = uniform.take(switch) / self._p_switch.take(row) * self._n_levels.take(row)
        regime = np.minimum(drawn.astype(np.int64), self._n_levels.take(row) - 1)
        self._level.reshape(-1)[switch] = self._levels[row, regime]
        self._noise *= self._ar
        self._noise += self._innovation * self._rng.standard_normal(
            self._level.shape, dtype=np.float32
        )
        shift, n = self._sigma * self._noise, self._n_log
        values = np.empty_like(self._level)
        np.multiply(self._level[:n], np.exp(shift[:n] - self._half_variance), out=values[:n])
        np.add(self._level[n:], shift[n:], out=values[n:])
        if self._out_rows:
            uniform = self._rng.random(self._out.shape, dtype=np.float32)
            self._out = uniform < np.where(self._out, self._p_stay_out, self._p_outage)
            values[self._out_rows] = np.where(self._out, self._outage_value, values[self._out_rows])
        np.maximum(values, self._minimum, out=values)
        return np.minimum(values, self._maximum, out=values)

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        steps = np.empty((len(self._processes), self.batch, self.substeps))
        if self._rows:
            for k in range(self.substeps):
                steps[self._rows, :, k] = self._move()
        for i, value in self._constant:
            steps[i] = value
        start_s = self._turn * self.scenario.interval_s
        for i, player in self._players.items():
            means, process = (
                player.means(start_s, self.substep_s, self.substeps),
                self._processes[i],
            )
            np.clip(means, process.minimum, process.maximum, out=steps[i])
        self._turn += 1
        h, n = self._n_hops, self._n_first - 1
        steps[:h] *= BYTES_PER_S_PER_MBPS
        speed = 1.0 - np.minimum(steps[h:n], MAX_LOAD)
        delay = self._delay_s
        if self._delay_hops:
            delay = delay.copy()
            drawn = np.minimum(steps[n + 1 :], MAX_ONE_WAY_DELAY_S)
            delay[:, self._delay_hops] = drawn.transpose(1, 0, 2)
        env, offset, count = self._arrivals(steps[n])
        return IntervalConditions(
            hop_bytes_per_s=steps[:h].transpose(1, 0, 2),
            node_speed=speed.transpose(1, 0, 2),
            hop_delay_s=delay,
            arrival_env=env,
            arrival_offset_s=offset,
            arrival_count=count,
        )

    def _arrivals(self, multiplier: F64) -> tuple[I64, F64, I64]:
        """Poisson arrivals of an interval: environments, offsets, counts.

        The expected counts of all environments' sub-steps, laid end to end, make one line; a
        Poisson number of uniform points on it, sorted, are everybody's arrivals at once.
        """
        expected = (self.rate_rps[:, None] * self.substep_s * multiplier).reshape(-1)
        bounds = np.zeros(len(expected) + 1)
        np.cumsum(expected, out=bounds[1:])
        total = bounds[-1]
        points = self._arrival_rng.random(self._arrival_rng.poisson(total))
        points *= total
        points.sort()
        cell_counts = np.diff(points.searchsorted(bounds[:-1]), append=len(points))
        per_s = self.substep_s / np.maximum(expected, 1e-300)
        origin = bounds[:-1] * per_s
        if self.substeps > 1:
            origin -= np.tile(np.arange(self.substeps) * self.substep_s, self.batch)
        offset = points * np.repeat(per_s, cell_counts)
        offset -= np.repeat(origin, cell_counts)
        count = cell_counts.reshape(self.batch, self.substeps).sum(axis=1)
        env = np.repeat(np.arange(self.batch), count)
        return env, np.clip(offset, 0.0, self.scenario.interval_s, out=offset), count


class SharedConditions(Conditions):
    """The same conditions for each group of `copies` neighbouring environments.

    What the copies of a group earn differs by their actions alone, so their mean is a baseline
    that takes the conditions' luck out of an advantage (input-driven baselines, arXiv 1807.02264).

    Args:
        scenario: Processes and interval.
        rate_rps: Shape [B]; a group takes its first environment's rate.
        seed: Everything drawn depends on this alone.
        copies: Environments per group; divides B.
    """

    def __init__(self, scenario: Scenario, rate_rps: F64, seed: int, copies: int) -> None:
        if len(rate_rps) % copies:
            raise ConfigError(f"{len(rate_rps)} environments do not divide into groups of {copies}")
        self.copies = copies
        super().__init__(scenario, np.asarray(rate_rps)[::copies], seed)

    def next(self) -> IntervalConditions:
        """The next interval's conditions, repeated within groups."""
        drawn = super().next()
        if self.copies == 1:
            return drawn
        return drawn.take(np.repeat(np.arange(self.batch), self.copies))


def process_mean(process: Process, quantity: str = "mbps") -> float:
    """Long-run mean of a process (outages and clipping included roughly).

    Args:
        process: The process.
        quantity: What a trace is read as: "mbps", "load", "rate_rps" or "rtt_ms".

    Returns:
        The mean in the process's unit; of several traces, the mean of their means.

    Raises:
        ConfigError: A trace cannot be read.
    """
    if process.kind == "trace":
        traces = load_traces(process.path, quantity)
        return process.scale * float(np.mean([played(t).mean() for t in traces]))
    mean = float(np.mean(process.levels))
    if process.kind == "constant":
        return mean
    out = process.outage_per_s * process.outage_s
    share = out / (1.0 + out)
    return (1.0 - share) * mean + share * process.outage_value


def typical_mbps(process: Process) -> float:
    """The bandwidth that a capacity is reckoned with.

    The mean of a constant or hand-written process. Measured bandwidth, and so its generators, are
    heavy-tailed: a mean made by seldom and splendid moments is above what there is most of the
    time, and a fraction of the capacity there would overload every plan. There it is the median.

    Raises:
        ConfigError: A trace cannot be read.
    """
    if process.kind == "trace":
        values = np.concatenate([played(t) for t in load_traces(process.path, "mbps")])
        return process.scale * float(np.median(values))
    if process.name:
        shrink = np.exp(-0.5 * process.sigma**2) if process.log else 1.0
        return float(np.median(process.levels) * shrink)
    return process_mean(process)


def mean_delay_s(hop: HopSetup) -> float:
    """Long-run mean of a hop's one-way delay, s."""
    delay = hop.one_way_delay_s
    return process_mean(delay, "rtt_ms") if isinstance(delay, Process) else delay
