"""A small chain, its scenarios and random plans, for the simulator's tests."""

import numpy as np

from env.scenario import HopSetup, NodeSetup, Process, Scenario
from executor.plan import ModelSpec
from executor.profile import HopModel, NodePower, NodeProfile, Profile

SPEC = ModelSpec(
    name="toy",
    unit_names=("a", "b", "c", "d", "e", "f"),
    cut_bytes=(600_000, 900_000, 200_000, 120_000, 40_000, 9_000, 4_000),
    has_params=(True, False, True, True, True, True),
    head_start=4,
    static_plan=(2, 4),
)


def toy_profile(n_nodes):
    ratios = (12.0, 3.0, 1.0, 0.5)[:n_nodes]
    unit = np.array([4.0, 0.0, 6.0, 3.0, 8.0, 2.0]) * 1e-3
    return Profile(
        spec=SPEC,
        nodes=tuple(
            NodeProfile(
                name=f"n{k}",
                unit_s=tuple((unit * r).tolist()),
                stage_overhead_s=1e-3 * r,
                power=NodePower("d", 3.0, 2.0 + k, 0.5, "test"),
                meter="none",
            )
            for k, r in enumerate(ratios)
        ),
        hops=tuple(HopModel(4e6, 0.008, 5e-4 * (h + 1)) for h in range(n_nodes - 1)),
    )


# An outage as slow as can be without the nodes giving the hop up: that is tests/test_outages.py's.
SLOWEST_MBPS = 0.01


def toy_scenario(n_nodes, outage_mbps=SLOWEST_MBPS, **changes):
    def load(k):
        return Process("markov", (0.0, 0.3 + 0.2 * k), dwell_s=3.0, sigma=0.05, log=False)

    hop = Process(
        "markov",
        (2.0, 12.0, 60.0),
        dwell_s=3.0,
        sigma=0.3,
        outage_per_s=0.15,
        outage_value=outage_mbps,
    )
    scenario = Scenario(
        nodes=tuple(NodeSetup(f"n{k}", "pi4", load=load(k)) for k in range(n_nodes)),
        hops=tuple(HopSetup(hop, 0.004 * (1 + 5 * h)) for h in range(n_nodes - 1)),
        arrivals=Process("markov", (0.4, 2.0), dwell_s=4.0),
        rate_rps=6.0,
        max_in_flight=20,
    )
    return scenario.replace(**changes)


def constant_scenario(mbps=8.0, load=0.0, **changes):
    calm = Process(levels=(load,), log=False)
    hops = [HopSetup(Process(levels=(mbps,)), delay) for delay in (0.01, 0.02)]
    return Scenario(
        nodes=tuple(NodeSetup(f"n{k}", "pi4", load=calm) for k in range(3)), hops=tuple(hops)
    ).replace(**changes)


def random_cuts(rng, batch, n_hops):
    return np.sort(rng.integers(0, SPEC.n_units + 1, (batch, n_hops)), axis=1)
