"""How little energy any constant plan spends per request, beside the static thirds.

python benchmarks/least_energy.py [--seeds 24 --intervals 100]

Every candidate plan is held through the same conditions of the default scenario, and what is open
in the end is run out. Energy is that of all machines, fully accounted, per completed request. The
least is chosen in hindsight, for each model and rate, whatever it costs in latency and losses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from executor.profile import Profile

MODELS = ("alexnet", "mobilenet_v2", "vgg16")
SEED = 41_000


def main() -> None:
    """Print a line for each model and rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--intervals", type=int, default=100)
    args = parser.parse_args()
    print("model, rate: thirds J (lost); least J, its plan (lost), 1 - least / thirds")
    for name in MODELS:
        profile = Profile.load(Path("checkpoints") / name / "profile.json")
        model = CostModel(profile, Scenario.load())
        thirds = np.array([profile.spec.static_plan])
        cuts = np.concatenate([thirds, model.table.cuts])
        for rate in (0.4, 0.8, 1.1):
            joules, lost = spent(model, cuts, rate, args.seeds, args.intervals)
            best = int(joules.argmin())
            print(
                f"{name}, {rate}: {joules[0]:.3f} J ({lost[0]:.0%}); {joules[best]:.3f} J "
                f"{tuple(cuts[best].tolist())} ({lost[best]:.0%}), "
                f"{1.0 - joules[best] / joules[0]:.1%}",
                flush=True,
            )


def spent(
    model: CostModel, cuts: np.ndarray, rate: float, seeds: int, intervals: int
) -> tuple[np.ndarray, np.ndarray]:
    """Joules per completed request and share of requests lost, of each plan."""
    n_plans = len(cuts)
    rate_rps = rate * model.capacity_rps
    simulator = Simulator(model, n_plans * seeds, SEED, rate_rps=rate_rps, copies=n_plans)
    simulator.reset(SEED)
    total = IntervalRecord.zeros(simulator.batch, model.profile.n_nodes)
    held = np.tile(cuts, (seeds, 1))
    for _ in range(intervals):
        total.add(simulator.step(held).record)
    total.add(simulator.drain())
    energy = Cost(model.profile, model.references, model.scenario).energy(total)

    def by_plan(values: np.ndarray) -> np.ndarray:
        return np.asarray(values.reshape(seeds, n_plans).sum(axis=0), dtype=np.float64)

    completed, lost = by_plan(total.completed), by_plan(total.lost)
    return by_plan(energy.total_full_j) / np.maximum(completed, 1), lost / (completed + lost)


if __name__ == "__main__":
    main()
