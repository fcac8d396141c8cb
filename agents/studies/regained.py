"""What a wrong profile costs over time, and how much of that an arm regains: the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW_S", "Spent", "analyse", "share", "worst_window"]

F64 = NDArray[np.float64]

WINDOW_S = 60.0
ENOUGH = 0.7
RESAMPLES = 2000
BOOTSTRAP_SEED = 20260509


@dataclass(frozen=True)
class Spent:
    """What an arm spent, interval by interval.

    Attributes:
        cost: [T, R] in each of R conditions, in units of one request.
        arrived: [T, R] requests that arrived; the same for every arm.
        interval_s: Length of an interval.
    """

    cost: F64
    arrived: F64
    interval_s: float

    @property
    def window(self) -> int:
        """Intervals of `WINDOW_S`; all there are where the run was shorter."""
        return max(1, min(round(WINDOW_S / self.interval_s), len(self.cost)))

    def per_request(self) -> F64:
        """[W, R] cost per request of each full window, one after the other."""
        return _blocks(self.cost, self.window) / np.maximum(_blocks(self.arrived, self.window), 1)


def _blocks(values: F64, window: int) -> F64:
    """[W, R] sums of full windows; what is left over in the end is left out."""
    count = len(values) // window
    sums: F64 = values[: count * window].reshape(count, window, -1).sum(axis=1)
    return sums


def _sliding(values: F64, window: int) -> F64:
    """[T - window + 1, R] sums of every window."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    sums: F64 = total[window:] - total[:-window]
    return sums


def worst_window(arm: Spent, solver: Spent, pooled: bool = False) -> tuple[float, float]:
    """Largest ratio of an arm's cost over the solver's in any window.

    Args:
        arm: What it spent.
        solver: What the solver spent on the same conditions.
        pooled: Of all conditions together, not of the worst one.

    Returns:
        It, and when that window ends, seconds.
    """
    costs = [_sliding(x.cost, arm.window) for x in (arm, solver)]
    if pooled:
        costs = [x.sum(axis=1, keepdims=True) for x in costs]
    ratio = costs[0] / costs[1]
    end = int(ratio.max(axis=1).argmax())
    return float(ratio.max()), (end + arm.window) * arm.interval_s


def share(arm: F64, wrong: F64, right: F64) -> float | None:
    """Of what `wrong` costs above `right`, the share that `arm` does not; sums of any shape.

    None where the wrong profile cost nothing: then there is nothing to regain.
    """
    lost = float(np.sum(wrong) - np.sum(right))
    return 1.0 - float(np.sum(arm) - np.sum(right)) / lost if lost > 0 else None


def analyse(
    arms: Mapping[str, Spent], wrong: str, right: str, minutes: tuple[int, ...] = (1, 2, 5, 10)
) -> dict[str, Any]:
    """How much each arm regains of what `wrong` lost against `right`.

    Args:
        arms: What each spent, on the same conditions.
        wrong: The arm that decides with the wrong profile and does nothing about it.
        right: The arm that decides with the right one.
        minutes: When to report; those beyond the run are left out.

    Returns:
        Per arm: `share` over the whole run with `ci95` (conditions resampled), `share_by_minute`
        (the window that ends then), `share_after_first` (all but the first window), and
        `minutes_to_enough`: the end of the first window from which on the rest of the run regains
        at least 70 %; None where there is none.
    """
    costs = {name: arm.cost for name, arm in arms.items()}
    window = arms[right].window
    result: dict[str, Any] = {}
    for name, cost in costs.items():
        if name == right:
            continue
        blocks = [_blocks(x, window) for x in (cost, costs[wrong], costs[right])]
        count = len(blocks[0])
        shares = [share(*(b[w] for b in blocks)) for w in range(count)]
        rest = [share(*(b[w:] for b in blocks)) for w in range(count)]
        enough = next((w + 1 for w, s in enumerate(rest) if s is not None and s >= ENOUGH), None)
        result[name] = {
            "share": share(cost, costs[wrong], costs[right]),
            "ci95": _interval(cost, costs[wrong], costs[right]),
            "share_after_first": rest[1] if count > 1 else None,
            "share_by_minute": {
                str(m): shares[k]
                for m in minutes
                if 0 <= (k := round(m * 60 / (window * arms[right].interval_s)) - 1) < count
            },
            "minutes_to_enough": (
                None if enough is None else enough * window * arms[right].interval_s / 60.0
            ),
        }
    return result


def _interval(arm: F64, wrong: F64, right: F64) -> tuple[float, float] | None:
    """95 % interval of the share over the whole run; None with fewer than 3 conditions."""
    count = arm.shape[1]
    if count < 3:
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(count, size=(RESAMPLES, count))
    sums = [x.sum(axis=0)[drawn].sum(axis=1) for x in (arm, wrong, right)]
    lost = sums[1] - sums[2]
    shares = 1.0 - (sums[0] - sums[2])[lost > 0] / lost[lost > 0]
    if len(shares) < RESAMPLES / 2:  # the loss itself is not above 0
        return None
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)
