"""Longer chains: `python -m agents.chains`. How long a decision takes, and how good it is.

Chains of 2 to 6 nodes in the simulator, speeds spread geometrically from edge to cloud.
The solver searches every candidate plan at each decision. It is held against brute force: every
candidate held throughout, on the same conditions, the best of each condition taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from agents.arms.controllers import Solver, Static
from agents.cli import MODEL_HELP, Parser, model_argument, positive_int, progress, run_study
from agents.paired import paired_ratio
from agents.studies.compare import per_row, run_arm
from agents.studies.provenance import provenance
from env.predict import CostModel
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_model
from executor.errors import ConfigError
from executor.files import write_json
from executor.model import model_spec
from executor.modelref import model_label
from executor.plan import candidate_plans

__all__ = ["chain_scenario", "main", "study"]

SEED = 9000
STARTUP = 10
SLOWEST, FASTEST = 12.0, 1.0
TIMED = 300
MOST_PLANS = 20000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.chains", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.chains",
        description="Decision time and quality on chains of several lengths, in the simulator.",
    )
    add = parser.add_argument
    add("--model", required=True, type=model_argument, help=MODEL_HELP)
    add("--nodes", default="2,3,4,5,6", help="numbers of nodes, comma-separated")
    add("--seeds", type=positive_int, default=4, help="conditions")
    add("--intervals", type=positive_int, default=20)
    add("--json", type=Path, help="write the results here")
    return parser


def _main(args: argparse.Namespace) -> int:
    lengths = [int(x) if x.isdigit() else 0 for x in args.nodes.split(",")]
    if not all(2 <= n <= 8 for n in lengths):
        raise ConfigError(f"--nodes must be numbers from 2 to 8 like 2,3,4, got {args.nodes!r}")
    _check_plans(args.model, lengths)
    console = Console()
    console.width = max(console.width, 100)
    with progress(console) as bar:
        task = bar.add_task("chains", total=2 * len(lengths), note="")
        rows = []
        for n_nodes in lengths:
            for changing in (False, True):
                bar.update(task, note=f"{n_nodes} nodes")
                rows.append(study(args.model, n_nodes, changing, args.seeds, args.intervals))
                bar.advance(task)
    title = f"{model_label(args.model)}: the solver on longer chains"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("nodes", "plans", "decision p50 us", "p99 us", "conditions", "cost",
                   "/ brute force (95 %)"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        ratio = r["ratio"]
        table.add_row(
            str(r["nodes"]), str(r["plans"]), f"{r['decide_us']['p50']:.0f}",
            f"{r['decide_us']['p99']:.0f}", "changing" if r["changing"] else "constant",
            f"{r['cost']:.3f}", f"{ratio['mean']:.3f} ({ratio['low']:.3f}..{ratio['high']:.3f})",
        )  # fmt: skip
    console.print(table)
    if args.json is not None:
        made = provenance(None, args.command)
        result = {"model": model_label(args.model), "rows": rows, "made": made}
        write_json(args.json, result)
    return 0


def _check_plans(model_name: str, lengths: Sequence[int]) -> None:
    """Raise ConfigError where brute force would have too many plans to try."""
    cuts = len(candidate_plans(model_spec(model_name), 2))
    for n_nodes in lengths:
        plans = comb(cuts + n_nodes - 2, n_nodes - 1)
        if plans > MOST_PLANS:
            raise ConfigError(
                f"{model_label(model_name)} has {plans} plans on {n_nodes} nodes, and at most "
                f"{MOST_PLANS} are tried: give fewer --nodes"
            )


def chain_scenario(n_nodes: int, changing: bool) -> Scenario:
    """The default scenario stretched to so many nodes.

    Speeds fall geometrically from 12 times slower at the edge to 1; the first and the last node and
    hop are the default's, the nodes between are fogs and the hops between are like the last.

    Args:
        n_nodes: At least 2.
        changing: Conditions change as in the default scenario; else they stay at its means.
    """
    base = Scenario.load().replace(capacity_fraction=0.4)
    edge, fog, cloud = base.nodes
    ratios = np.geomspace(SLOWEST, FASTEST, n_nodes)
    kinds = [edge, *[fog] * (n_nodes - 2), cloud]
    calm = Process(levels=(0.0,), log=False)
    nodes = tuple(
        NodeSetup(
            f"{kind.name}{k}" if kind is fog else kind.name,
            kind.device,
            float(ratio),
            kind.load if changing else calm,
        )
        for k, (kind, ratio) in enumerate(zip(kinds, ratios, strict=True))
    )
    first, last = base.hops
    hops = [first, *[last] * (n_nodes - 2)]
    if not changing:
        hops = [
            HopSetup(Process(levels=(float(np.mean(h.bandwidth.levels)),)), h.one_way_delay_s)
            for h in hops
        ]
    return base.replace(nodes=nodes, hops=tuple(hops))


def study(
    model_name: str, n_nodes: int, changing: bool, seeds: int, intervals: int
) -> dict[str, Any]:
    """One chain: the solver's decision time, and its cost over brute force's."""
    scenario = chain_scenario(n_nodes, changing)
    model = CostModel(synthetic_model(model_name, scenario), scenario)
    simulator = Simulator(model, seeds, SEED, record_requests=True)
    how: dict[str, Any] = {"seed": SEED, "n_intervals": intervals, "startup": STARTUP}
    solver = per_row(run_arm(simulator, Solver(), **how), model)["cost"]
    brute = _brute_force(model, seeds, how)
    return {
        "nodes": n_nodes,
        "plans": len(model.plans),
        "changing": changing,
        "decide_us": _decide_us(model),
        "cost": float(solver.mean()),
        "ratio": paired_ratio(solver, brute),
    }


def _brute_force(model: CostModel, seeds: int, how: dict[str, Any]) -> NDArray[np.float64]:
    """Least cost per request of any candidate held throughout, per condition; all at once."""
    drawn, plans = Simulator(model, seeds, SEED), len(model.plans)
    drawn.reset(SEED)
    tape = drawn.record(how["startup"] + how["n_intervals"])
    conditions = tape.play(np.tile(np.arange(seeds), plans))
    every = Simulator(model, plans * seeds, SEED, record_requests=True, conditions=conditions)
    arm = Static("every plan", np.repeat(model.table.cuts, seeds, axis=0))
    cost = per_row(run_arm(every, arm, **how), model)["cost"]
    least: NDArray[np.float64] = cost.reshape(plans, seeds).min(axis=0)
    return least


def _decide_us(model: CostModel) -> dict[str, float]:
    """CPU time of one decision for one environment."""
    simulator, solver = Simulator(model, 1, SEED), Solver()
    solver.reset(model, 1)
    state = simulator.step(model.table.cuts[:1]).state
    took = []
    for _ in range(TIMED):
        begin = time.thread_time()
        solver.decide(state)
        took.append(1e6 * (time.thread_time() - begin))
    p50, p99 = np.percentile(took, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


if __name__ == "__main__":
    sys.exit(main())
