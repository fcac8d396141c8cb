"""Fit what the arms that forecast believe: train conditions rank settings, validation chooses.

python benchmarks/fit_predictive.py --arm predictive                 # shipped scenarios alone
python benchmarks/fit_predictive.py --arm mpc --traces DIR           # and measured traces

Coordinate descent: each setting in turn is given the value whose cost over the solver's is least on
the training conditions (the traces' training part and the scenarios default, lan, wan and 5g), and
so on until a pass changes nothing. Of the settings it began with and those after each pass, the
ones that cost least on the validation conditions (the traces' validation part and other draws of
the scenarios) are printed as chosen. The test part is never read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agents.arms.controllers import Controller, Solver
from agents.arms.mpc import ModelPredictive, ModelPredictiveSettings
from agents.arms.predictive import Predictive, PredictiveSettings
from agents.cli import CHECKPOINTS, load_profile, numbers, positive_int, run_command
from agents.learning.validation import mean_cost
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.splits import split

F64 = NDArray[np.float64]
Values = dict[str, Any]
SCENARIOS = ("default", "lan", "wan", "5g")
FORECAST: dict[str, tuple[float, ...]] = {
    "fall": (1.5, 2.0, 3.0, 6.0, float("inf")),
    "bandwidth_s": (3.0, 6.0, 10.0, 20.0, 60.0, float("inf")),
    "load_s": (6.0, 20.0, 60.0, float("inf")),
    "arrivals_s": (3.0, 6.0, 20.0, 60.0, float("inf")),
    "memory_s": (20.0, 60.0, 200.0),
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "predictive": FORECAST,
    "mpc": {"horizon": (2, 3, 4, 6), "tried": (3, 4, 6, 8, 12), **FORECAST},
}
TRAIN_SEED, VALIDATION_SEED = 51_000, 52_000


def arm(name: str, values: Values) -> Controller:
    """The arm with those settings."""
    forecast = PredictiveSettings(**{k: v for k, v in values.items() if k in FORECAST})
    if name == "predictive":
        return Predictive(forecast)
    rest = {k: int(v) for k, v in values.items() if k not in FORECAST}
    return ModelPredictive(replace(ModelPredictiveSettings(), forecast=forecast, **rest))


@dataclass
class Cells:
    """Simulators to judge settings in, and what the solver costs there."""

    simulators: list[Simulator]
    solver: list[F64]
    seed: int
    steps: int

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        scenarios: Sequence[Scenario],
        seed: int,
        args: argparse.Namespace,
    ) -> Cells:
        """Every model under every scenario; the environments of one differ in rate and draw."""
        rates = np.repeat(numbers("--rates", args.rates, "fractions", "0.4,0.8"), args.seeds)
        simulators = []
        for name in names:
            for scenario in scenarios:
                profile = load_profile(CHECKPOINTS / name / "profile.json", name, scenario)
                model = CostModel(profile, scenario)
                rate_rps = rates * model.capacity_rps
                simulators.append(Simulator(model, len(rates), seed, rate_rps=rate_rps))
        steps = args.intervals
        solver = [mean_cost(Solver(), s, seed, steps) for s in simulators]
        return cls(simulators, solver, seed, steps)

    def ratio(self, controller: Controller) -> float:
        """Cost over the solver's, all cells counting the same."""
        return float(np.mean(self.ratios(controller)))

    def ratios(self, controller: Controller) -> list[float]:
        """The same in each cell."""
        return [
            float(mean_cost(controller, s, self.seed, self.steps).mean() / solver.mean())
            for s, solver in zip(self.simulators, self.solver, strict=True)
        ]


def descend(name: str, values: Values, cells: Cells, passes: int) -> list[Values]:
    """The settings at the start and after each pass."""
    best, found = cells.ratio(arm(name, values)), [dict(values)]
    print(f"train, at the start: {best:.4f} x the solver  {values}", flush=True)
    for k in range(passes):
        for key, grid in GRIDS[name].items():
            for value in grid:
                if value == values[key]:
                    continue
                ratio = cells.ratio(arm(name, {**values, key: value}))
                if ratio < best - 1e-6:
                    best, values = ratio, {**values, key: value}
        if values == found[-1]:
            break
        found.append(dict(values))
        print(f"train, after pass {k + 1}: {best:.4f}  {values}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Fit and choose; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--arm", choices=tuple(GRIDS), default="predictive")
    add("--models", default="alexnet,vgg16,mobilenet_v2", help="with a shipped checkpoint")
    add("--traces", type=Path, help="also on these measured traces")
    add("--rates", default="0.4,0.8,1.1", help="fractions of the best static plan's capacity")
    add("--seeds", type=positive_int, default=8, help="conditions per rate")
    add("--intervals", type=positive_int, default=60)
    add("--passes", type=positive_int, default=2)
    args = parser.parse_args(argv)
    return run_command(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    shipped = [Scenario.load(name) for name in SCENARIOS]
    parts = None if args.traces is None else split(args.traces)
    names = args.models.split(",")

    def cells(part: str, seed: int) -> Cells:
        measured = [] if parts is None else [c.scenario for c in parts.part(part)]
        return Cells.of(names, [*shipped, *measured], seed, args)

    whole = ModelPredictiveSettings()
    forecast = whole.forecast if args.arm == "mpc" else PredictiveSettings()
    start: Values = {key: getattr(forecast, key) for key in FORECAST}
    if args.arm == "mpc":
        start = {"horizon": whole.horizon, "tried": whole.tried, **start}
    found = descend(args.arm, start, cells("train", TRAIN_SEED), args.passes)
    validation = cells("validation", VALIDATION_SEED)
    ratios = [validation.ratio(arm(args.arm, values)) for values in found]
    for values, ratio in zip(found, ratios, strict=True):
        print(f"validation: {ratio:.4f}  {values}")
    chosen = found[int(np.argmin(ratios))]
    by_cell = validation.ratios(arm(args.arm, chosen))
    print(f"chosen: {chosen}, {min(by_cell):.3f} to {max(by_cell):.3f} x the solver in a cell")
    return 0


if __name__ == "__main__":
    sys.exit(main())
