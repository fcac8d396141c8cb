"""The reference's machines in the simulator, and its closed loop (arXiv 2605.09623).

Its Table 1 gives each model's time on each machine; how that time is spread over the layers is not
printed. `UNIT_SHARES`, measured on another processor, stand in for it, the same on every machine
(as in its own estimate, which has one weight per layer). A model it did not measure gets VGG16's
time there, by the ratio of what both are estimated to take from operations and bytes
(`env.synthetic.estimated_unit_s`): a guess, and said to be one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env.conditions import BYTES_PER_S_PER_MBPS, IntervalConditions, mean_delay_s
from env.scenario import Scenario
from env.synthetic import UNIT_SHARES, estimated_unit_s
from env.tape import Tape
from executor.energy import device_power
from executor.plan import ModelSpec
from executor.profile import HopModel, NodeProfile, Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Measured", "closed_loop", "measured", "reference_profile"]

FILE = Path(__file__).with_name("reference.toml")
YARDSTICK = "vgg16"  # large matrix products, as a transformer has them


@dataclass(frozen=True)
class Measured:
    """What the reference measured of one model.

    Attributes:
        single_ms: The whole model on the edge, the fog, the cloud.
        single_j: Joules of those.
        static_ms: Latency of its static split.
        adaptive_ms: Of its scheduler.
        static_j: Joules, compute only, all nodes together.
        adaptive_j: Likewise.
    """

    single_ms: tuple[float, float, float]
    single_j: tuple[float, float, float]
    static_ms: float
    adaptive_ms: float
    static_j: float
    adaptive_j: float


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    raw: dict[str, Any] = tomllib.loads(FILE.read_text())
    return raw


def measured() -> dict[str, Measured]:
    """Its figures, by model."""
    return {
        name: Measured(
            **{**m, "single_ms": tuple(m["single_ms"]), "single_j": tuple(m["single_j"])}
        )
        for name, m in _file()["models"].items()
    }


def reference_profile(spec: ModelSpec, scenario: Scenario) -> Profile:
    """A model on its three machines; one that it did not measure is estimated, which needs torch.

    Args:
        spec: The model.
        scenario: Names and devices of three nodes, and the delays.
    """
    single_ms: tuple[float, ...]
    if spec.name in measured():
        single_ms, origin = measured()[spec.name].single_ms, "arXiv 2605.09623, Table 1"
        shares = np.array(UNIT_SHARES[spec.name], dtype=np.float64)
    else:
        single_ms, shares = _estimated(spec.name)
        origin = "estimated from VGG16 in arXiv 2605.09623, Table 1"
    shares /= shares.sum()
    rate = float(_file()["bytes_per_s"])
    return Profile(
        spec=spec,
        nodes=tuple(
            NodeProfile(
                name=node.name,
                unit_s=tuple((1e-3 * whole_ms * shares).tolist()),
                stage_overhead_s=0.0,
                power=device_power(node.device),
                meter=origin,
            )
            for node, whole_ms in zip(scenario.nodes, single_ms, strict=True)
        ),
        hops=tuple(HopModel(rate, 2.0 * mean_delay_s(hop)) for hop in scenario.hops),
    )


def _estimated(name: str) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """Milliseconds of a whole model on each of its machines, and relative time per unit."""
    from executor.model import unit_costs

    unit_s, yardstick_s = (
        np.array(estimated_unit_s(unit_costs(model))) for model in (name, YARDSTICK)
    )
    ratio = float(unit_s.sum() / yardstick_s.sum())
    return tuple(ratio * ms for ms in measured()[YARDSTICK].single_ms), unit_s


def closed_loop(scenario: Scenario, mbps: NDArray[np.float64], batch: int = 1) -> Tape:
    """Its way of measuring: the next request comes when the last has been answered.

    Here one comes at the beginning of every interval; a request is alone as long as it takes less
    than an interval. What happens between two requests costs nothing in either accounting.

    Args:
        scenario: Nodes, which are unloaded, delays, and the interval.
        mbps: [T, H] bandwidth of each interval's hops.
        batch: Environments, all with the same conditions.
    """
    n_hops = len(scenario.hops)
    delay = np.array([mean_delay_s(h) for h in scenario.hops]).reshape(1, n_hops, 1)
    everybody = np.arange(batch)
    intervals = [
        IntervalConditions(
            hop_bytes_per_s=np.tile(row.reshape(1, n_hops, 1), (batch, 1, 1)),
            node_speed=np.ones((batch, scenario.n_nodes, 1)),
            hop_delay_s=np.tile(delay, (batch, 1, 1)),
            arrival_env=everybody,
            arrival_offset_s=np.zeros(batch),
            arrival_count=np.ones(batch, dtype=np.int64),
        )
        for row in np.asarray(mbps, dtype=np.float64) * BYTES_PER_S_PER_MBPS
    ]
    rate_rps = np.full(batch, 1.0 / scenario.interval_s)
    return Tape(intervals, rate_rps, scenario.interval_s)
