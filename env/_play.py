"""Plays traces to a batch of environments: the exact mean over every sub-step, repeated for ever.

A series of 1 s means says nothing of what happens within a second. Held, it would tell a
controller that decides faster than that what comes; so it is filled in. Within a sample the value
follows the straight line between neighbouring means, times log-normal jitter, and is then scaled
so that every sample's mean is exact. The jitter has two parts:

- an Ornstein-Uhlenbeck process whose variance and time constant are extrapolated from the series'
  own variogram at lags of one and two samples (pooled over the traces of a family); only what it
  does around the line through its own sample means is used;
- for bandwidth, white noise below that, which no series of means can show; its size was fitted to
  recordings packet by packet (`generators.toml`, [jitter]).

Load and arrival series only follow the line. Native (mahimahi) traces are played as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from env.generators import jitter_constants
from env.traces import Trace

__all__ = ["Jitter", "TracePlayer", "fit_jitter", "played"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

CELL_S = 0.05
MAX_CELLS = 20
# Time constants that two lags can tell apart, in samples.
MIN_RATE, MAX_RATE = 0.02, 4.0
MIN_PAIRS = 10
OUTAGE_SHARE = 0.01  # of the mean: what is below is an outage, not a value
MAX_SIGMA = 2.0  # more than any measured family's; beyond it a second is one spike
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Jitter:
    """An Ornstein-Uhlenbeck process of the logarithm.

    Attributes:
        sigma: Its standard deviation.
        rate: One over its time constant, per sample.
    """

    sigma: float
    rate: float


def _variogram(series: Sequence[F64], lag: int) -> float:
    """Half the mean squared difference of logarithms `lag` samples apart; outages are skipped."""
    floor = OUTAGE_SHARE * float(np.mean(np.concatenate(series)))
    squares, count = 0.0, 0
    for values in series:
        a, b = values[:-lag], values[lag:]
        both = (a > floor) & (b > floor)
        difference = np.log(b[both]) - np.log(a[both])
        squares += float(difference @ difference)
        count += len(difference)
    return 0.5 * squares / count if count >= MIN_PAIRS else 0.0


def _averaged(rate: float, lag: int) -> float:
    """Variogram of the sample means of a unit-variance Ornstein-Uhlenbeck process."""
    decay = np.exp(-rate)
    variance = 2.0 * (rate - 1.0 + decay)
    covariance = (1.0 - decay) ** 2 * decay ** (lag - 1)
    return float((variance - covariance) / rate**2)


def fit_jitter(series: Sequence[F64]) -> Jitter:
    """The process whose sample means have the series' variogram at lags 1 and 2.

    Their ratio falls with the rate; it is solved for by bisection in the logarithm.
    """
    first, second = _variogram(series, 1), _variogram(series, 2)
    if first <= 0.0:
        return Jitter(0.0, 1.0)
    low, high = MIN_RATE, MAX_RATE
    for _ in range(50):
        rate = float(np.sqrt(low * high))
        if _averaged(rate, 2) / _averaged(rate, 1) > second / first:
            low = rate
        else:
            high = rate
    return Jitter(min(float(np.sqrt(first / _averaged(low, 1))), MAX_SIGMA), low)


def played(trace: Trace) -> F64:
    """A trace's values in the unit of its process: s one way for `rtt_ms`, mean 1 for arrivals."""
    if trace.quantity == "rtt_ms":
        return trace.values / 2000.0
    if trace.quantity == "rate_rps":
        return trace.values / max(float(trace.values.mean()), 1e-12)
    return trace.values


class _Block:
    """Traces of one family and step: their samples, one after the other, and how to fill them in.

    Args:
        traces: The traces.
        cells: Cells per sample; 1 leaves the samples as they are.
        time_scale: Seconds of the trace per second played.

    Attributes:
        moves: Whether two fillings differ.
    """

    def __init__(self, traces: Sequence[Trace], cells: int, time_scale: float) -> None:
        series = [played(t) for t in traces]
        self.traces, self._cells = tuple(traces), cells
        self.samples = np.concatenate(series)
        jittered = cells > 1 and traces[0].quantity in ("mbps", "rtt_ms")
        self.jitter = fit_jitter(series) if jittered else Jitter(0.0, 1.0)
        self._white = 0.0
        if jittered and traces[0].quantity == "mbps":
            constants = jitter_constants()
            cell_s = traces[0].dt_s / time_scale / cells
            self._white = constants.white_sigma * float(np.sqrt(constants.cell_s / cell_s))
        self.moves = self.jitter.sigma > 0 or self._white > 0
        index = np.arange(len(self.samples))
        self._before, self._after = np.maximum(index - 1, 0), np.minimum(index + 1, index[-1])
        first = np.cumsum([0, *(len(s) for s in series)])
        self._before[first[:-1]] = first[:-1]
        self._after[first[1:] - 1] = first[1:] - 1
        offset = (np.arange(cells) + 0.5) / cells - 0.5
        self._back, self._forth = np.maximum(-offset, 0.0), np.maximum(offset, 0.0)

    def _line(self, samples: F64) -> F64:
        """Straight lines between the samples' middles, [n, cells]."""
        line: F64 = samples[:, None] * (1.0 - self._back - self._forth)
        line += samples[self._before][:, None] * self._back
        line += samples[self._after][:, None] * self._forth
        return line

    def fill(self, rng: np.random.Generator) -> F64:
        """Values of every cell, [n * cells]; each sample's mean is exact."""
        if self._cells == 1:
            return self.samples
        line = self._line(self.samples)
        if self.moves:
            noise = self._noise(rng).reshape(line.shape)
            noise -= self._line(noise.mean(axis=1))
            if self._white:
                noise += self._white * rng.standard_normal(line.shape)
            line *= np.exp(noise, out=noise)
        mean = line.mean(axis=1)
        line *= np.divide(self.samples, mean, out=np.zeros_like(mean), where=mean > 0)[:, None]
        return line.reshape(-1)

    def _noise(self, rng: np.random.Generator) -> F64:
        """The process at every cell: a first-order recursion, summed up by doubling."""
        decay = float(np.exp(-self.jitter.rate / self._cells))
        noise = rng.standard_normal(len(self.samples) * self._cells)
        noise *= self.jitter.sigma * np.sqrt(1.0 - decay**2)
        shift = 1
        while decay**shift > NEGLIGIBLE and shift < len(noise):
            noise[shift:] += decay**shift * noise[:-shift]
            shift *= 2
        return noise


class TracePlayer:
    """Plays one process's traces: each environment draws one, and a place to begin.

    Args:
        traces: What to draw from, all of one quantity.
        scale: Factor on the values.
        time_scale: Seconds of the trace per second played.
        jitter: Fill in what happens within a sample; without, samples are held.
    """

    def __init__(
        self, traces: tuple[Trace, ...], scale: float, time_scale: float, jitter: bool
    ) -> None:
        self._scale = scale
        self._blocks = _blocks(traces, time_scale, jitter)
        self._moves = any(block.moves for block in self._blocks)
        # By block, as their cells follow each other.
        ordered = [trace for block in self._blocks for trace in block.traces]
        cells = [_cells(t, time_scale, jitter) for t in ordered]
        self.names = tuple(trace.name for trace in ordered)
        self._count = np.array([n * len(t.values) for n, t in zip(cells, ordered, strict=True)])
        self._cell_s = np.array(
            [t.dt_s / time_scale / n for n, t in zip(cells, ordered, strict=True)]
        )
        self._first = np.cumsum(self._count) - self._count
        self._filled: F64 | None = None

    def reset(self, rng: np.random.Generator, batch: int, share: F64) -> None:
        """Draw traces, and jitter, anew.

        Args:
            rng: Draws both.
            batch: Number of environments B.
            share: [B] in [0, 1): where in its trace each begins.
        """
        self.drawn = rng.integers(len(self.names), size=batch)
        if self._moves or self._filled is None:
            self._filled = np.concatenate([b.fill(rng) for b in self._blocks]) * self._scale
            # Integral up to the start of each cell, from the start of the first trace.
            amount = self._filled * np.repeat(self._cell_s, self._count)
            self._before = np.concatenate([[0.0], np.cumsum(amount)])
        self._start, self._n = self._first[self.drawn], self._count[self.drawn]
        self._step = self._cell_s[self.drawn]
        self._period = self._step * self._n
        self._offset_s = share * self._period
        self._lap = self._before[self._start + self._n] - self._before[self._start]

    def means(self, start_s: float, step_s: float, count: int) -> F64:
        """Means over `count` steps from `start_s` after the reset on, [B, count]."""
        assert self._filled is not None
        edges = self._offset_s[:, None] + (start_s + step_s * np.arange(count + 1))
        lap = np.floor(edges / self._period[:, None])
        position = (edges - lap * self._period[:, None]) / self._step[:, None]
        cell = np.clip(position.astype(np.int64), 0, self._n[:, None] - 1)
        at = self._start[:, None] + cell
        integral = self._filled[at] * ((position - cell) * self._step[:, None])
        integral += self._before[at] - self._before[self._start][:, None]
        integral += lap * self._lap[:, None]
        means: F64 = np.maximum(np.diff(integral, axis=1) / step_s, 0.0)
        return means


def _cells(trace: Trace, time_scale: float, jitter: bool) -> int:
    """Into how many cells each sample is cut."""
    if trace.native or not jitter:
        return 1
    return int(np.clip(round(trace.dt_s / time_scale / CELL_S), 1, MAX_CELLS))


@lru_cache(maxsize=32)
def _blocks(traces: tuple[Trace, ...], time_scale: float, jitter: bool) -> list[_Block]:
    """Traces by family and step, with the jitter fitted to each such group."""
    groups: dict[tuple[str, float, bool], list[Trace]] = {}
    for trace in traces:
        groups.setdefault((trace.family, trace.dt_s, trace.native), []).append(trace)
    return [_Block(g, _cells(g[0], time_scale, jitter), time_scale) for g in groups.values()]
