"""A profile without nodes to measure: for tests, benchmarks and a first look.

The shares below were measured once, one core, batch 1, and rounded; a real profile comes from
`executor.profiler`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from env.conditions import BYTES_PER_S_PER_MBPS, mean_delay_s, process_mean
from env.scenario import Scenario
from executor.energy import device_power
from executor.errors import ConfigError
from executor.plan import ModelSpec
from executor.profile import HopModel, NodeProfile, Profile

__all__ = ["EDGE_S", "UNIT_SHARES", "synthetic_profile"]

EDGE_RATIO = 12.0
# Whole-model seconds on a node of ratio 12 (twelve times slower than the measuring core).
EDGE_S = {"alexnet": 0.33, "vgg16": 3.4, "mobilenet_v2": 0.19}
STAGE_OVERHEAD_S = 2e-4
FRAME_OVERHEAD_S = 5e-4
# Per mille of the model's time, per unit.
UNIT_SHARES: dict[str, tuple[float, ...]] = {
    "alexnet": (
        41,
        4,
        50,
        106,
        2,
        29,
        69,
        2,
        89,
        2,
        59,
        2,
        9,
        5,
        2,
        334,
        2,
        1,
        153,
        1,
        39,
    ),
    "vgg16": (
        19,
        8,
        111,
        7,
        54,
        58,
        4,
        82,
        4,
        22,
        41,
        2,
        78,
        2,
        78,
        2,
        10,
        44,
        1,
        88,
        1,
        89,
        1,
        6,
        28,
        0.5,
        27,
        0.5,
        26,
        0.4,
        2,
        1,
        81,
        0.3,
        0.1,
        15,
        0.2,
        0.1,
        4,
    ),
    "mobilenet_v2": (
        41,
        58,
        200,
        95,
        56,
        35,
        35,
        29,
        29,
        28,
        27,
        30,
        46,
        45,
        39,
        41,
        42,
        50,
        40,
        9,
        26,
    ),
}


def synthetic_profile(
    spec: ModelSpec,
    scenario: Scenario,
    *,
    edge_s: float | None = None,
    shares: Sequence[float] | None = None,
) -> Profile:
    """A plausible profile of `spec` on the scenario's nodes.

    Args:
        spec: The model.
        scenario: Gives the nodes' names, devices and ratios, and the hops' means.
        edge_s: Whole-model seconds on a node of ratio 12; `EDGE_S`, or 0.3 s for other models.
        shares: Relative time per unit; `UNIT_SHARES`, or for other models 10 for a unit with
            parameters and 1 for one without.

    Raises:
        ConfigError: The number of shares is not the number of units.
    """
    if edge_s is None:
        edge_s = EDGE_S.get(spec.name, 0.3)
    if shares is None:
        shares = UNIT_SHARES.get(spec.name) or [10.0 if p else 1.0 for p in spec.has_params]
    if len(shares) != spec.n_units:
        raise ConfigError(f"{spec.name}: expected {spec.n_units} unit shares, got {len(shares)}")
    unit = np.asarray(shares, dtype=np.float64)
    unit *= edge_s / EDGE_RATIO / unit.sum()
    return Profile(
        spec=spec,
        nodes=tuple(
            NodeProfile(
                name=node.name,
                unit_s=tuple((unit * node.ratio).tolist()),
                stage_overhead_s=STAGE_OVERHEAD_S * node.ratio,
                power=device_power(node.device),
                meter="synthetic",
            )
            for node in scenario.nodes
        ),
        hops=tuple(
            HopModel(
                bytes_per_s=process_mean(hop.bandwidth) * BYTES_PER_S_PER_MBPS,
                rtt_s=2.0 * mean_delay_s(hop),
                frame_overhead_s=FRAME_OVERHEAD_S,
            )
            for hop in scenario.hops
        ),
    )
