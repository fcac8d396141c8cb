"""Bootstrap 95 % intervals over paired rows: of a mean, of a ratio of means."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_mean", "paired_ratio"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

RESAMPLES = 2000
BOOTSTRAP_SEED = 20260509


@functools.lru_cache(maxsize=4)
def _resample(n_rows: int) -> I64:
    """Row indices of every bootstrap resample; the same for every quantity of that many rows."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return rng.integers(0, n_rows, size=(RESAMPLES, n_rows))


def _interval(mean: float, resampled: F64) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def bootstrap_mean(values: F64) -> dict[str, float]:
    """Mean of the rows [R] and its bootstrap 95 % interval: {mean, low, high}."""
    return _interval(float(values.mean()), values[_resample(len(values))].mean(axis=1))


def paired_ratio(a: F64, b: F64) -> dict[str, float]:
    """Ratio of the means of two paired rows [R] with its bootstrap 95 % interval."""
    index = _resample(len(a))
    ratios = a[index].mean(axis=1) / np.maximum(b[index].mean(axis=1), 1e-12)
    return _interval(float(a.mean() / max(b.mean(), 1e-12)), ratios)
