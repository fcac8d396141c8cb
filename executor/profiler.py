"""Measures what units and conversions cost on this node; run once at startup and on request."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from executor.codec import Affine, as_float32, encode
from executor.errors import ConfigError
from executor.model import UnitChain, sample_input
from executor.profile import Conversion

__all__ = ["profile_conversions", "profile_units"]

Run = Callable[[Callable[[], Any]], tuple[Any, float]]

_log = logging.getLogger(__name__)


def profile_units(chain: UnitChain, run: Run, repeats: int = 10, warmup: int = 3) -> list[float]:
    """Unloaded seconds of every unit on this node.

    A unit timed alone carries the cost of its call. So whole passes are timed in turn with the
    single units, and the units' medians are scaled until they sum to the whole pass's median: the
    profile's stage [0, n) then costs what a whole pass costs.

    Args:
        chain: The model.
        run: Runs a function and returns its result and its work in unloaded seconds, as
            `executor.pacing.Pacer.run` does.
        repeats: Timed passes; the medians are over these.
        warmup: Whole passes before the first timed one.

    Returns:
        n values, seconds.

    Raises:
        ConfigError: `repeats` is below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"profiling needs repeats >= 1 and warmup >= 0, got {repeats}, {warmup}")
    n = chain.spec.n_units
    x = sample_input(0, chain.spec.input_shape).to(chain.device)
    for _ in range(warmup):
        run(_stage(chain, x, 0, n))
    whole_s: list[float] = []
    unit_s: list[list[float]] = [[] for _ in range(n)]
    for _ in range(repeats):
        whole_s.append(run(_stage(chain, x, 0, n))[1])
        y = x
        for k in range(n):
            y, work_s = run(_stage(chain, y, k, k + 1))
            unit_s[k].append(work_s)
    medians = [statistics.median(times) for times in unit_s]
    whole, parts = statistics.median(whole_s), sum(medians)
    scale = whole / parts if parts > 0 else 1.0
    _log.info("%s: whole pass %.4f s, scale of units %.3f", chain.spec.name, whole, scale)
    return [median * scale for median in medians]


def profile_conversions(
    chain: UnitChain, run: Run, forms: Sequence[str], repeats: int = 10
) -> tuple[Conversion, ...]:
    """What each of `forms` takes on this node, at each cut of the model; medians of `repeats`.

    Args:
        chain: The model.
        run: As in `profile_units`.
        forms: Of `executor.codec.TRANSFERS`, without float32.
        repeats: Timed passes.

    Raises:
        WireError: An activation of the sample input cannot be sent in that form.
    """
    x = sample_input(0, chain.spec.input_shape).to(chain.device)
    cuts = range(chain.spec.n_units)
    encode_s: dict[str, list[list[float]]] = {form: [[] for _ in cuts] for form in forms}
    decode_s: dict[str, list[list[float]]] = {form: [[] for _ in cuts] for form in forms}
    cut_bytes: dict[str, list[int]] = {form: [0 for _ in cuts] for form in forms}
    for _ in range(repeats):
        y = x
        for k in cuts:
            array = y.cpu().contiguous().numpy()
            for form in forms:
                coded, work_s = run(partial(encode, array, form))
                encode_s[form][k].append(work_s)
                decode_s[form][k].append(run(partial(as_float32, coded))[1])
                cut_bytes[form][k] = (coded.body if isinstance(coded, Affine) else coded).nbytes
            y = chain.run(y, k, k + 1)
    return tuple(
        Conversion(
            form,
            tuple(cut_bytes[form]),
            tuple(map(statistics.median, encode_s[form])),
            tuple(map(statistics.median, decode_s[form])),
        )
        for form in forms
    )


def _stage(chain: UnitChain, x: torch.Tensor, start: int, stop: int) -> Callable[[], torch.Tensor]:
    def compute() -> torch.Tensor:
        y = chain.run(x, start, stop)
        if chain.device.type == "cuda":
            torch.cuda.synchronize(chain.device)  # else only the launches are timed
        return y

    return compute
