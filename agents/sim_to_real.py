"""Predicted against measured, per plan, node and hop: `python -m agents.sim_to_real`.

Plans spread over the candidates run on the testbed and, with the profile just measured there, in
the simulator: at several bandwidths, idle and at 0.7 of each plan's own capacity, under the same
arrivals. Also `python -m agents.evaluate --sim-to-real`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TextTable

from agents.cli import (
    MODEL_HELP,
    Parser,
    add_transfer_argument,
    model_argument,
    numbers,
    positive_float,
    positive_int,
    progress,
    run_study,
    transfers,
)
from agents.nodes import calibrate, measure_profile, spread, start_testbed
from agents.report.sim_to_real import write_page
from agents.studies.provenance import provenance
from agents.studies.sim_to_real import MAX_IN_FLIGHT, SEED, Extent, error, lines, measure, summary
from env.scenario import Scenario
from executor.files import write_json
from executor.modelref import model_label
from executor.netns import add_isolation_argument
from executor.plan import Plan, candidate_plans

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.sim_to_real", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.sim_to_real",
        description="Hold the simulator against the testbed, plan by plan.",
    )
    add, extent = parser.add_argument, Extent()
    add("--model", required=True, type=model_argument, help=MODEL_HELP)
    add("--scenario", help="nodes and hops: TOML file or shipped name (default: default)")
    add("--plans", type=positive_int, default=extent.plans)
    add("--bandwidths", default="20,60,150", help="Mbit/s of every hop, comma-separated")
    add("--requests", type=positive_int, default=extent.requests, help="mean, per cell")
    add("--seconds", type=positive_float, default=extent.seconds, help="of a cell, at most")
    repeats_help = "runs of each cell; above 1 tells how far the nodes repeat themselves"
    add("--repeats", type=positive_int, default=extent.repeats, help=repeats_help)
    add_transfer_argument(parser)
    add_isolation_argument(parser)
    add("--json", type=Path, help="write the results here")
    add("--report", type=Path, help="write a page with a table and figures into this folder")
    return parser


def _main(args: argparse.Namespace) -> int:
    bandwidths = tuple(numbers("--bandwidths", args.bandwidths, "Mbit/s", "20,60"))
    extent = Extent(
        args.plans,
        bandwidths,
        requests=args.requests,
        seconds=args.seconds,
        repeats=args.repeats,
    )
    scenario, console = Scenario.load(args.scenario), Console()
    console.width = max(console.width, 110)
    forms = transfers(args.transfer, len(scenario.hops), True, "")
    testbed = start_testbed(args.model, scenario, transfers=forms, isolation=args.isolation)
    try:
        client = testbed.client(max_in_flight=MAX_IN_FLIGHT)
        try:
            profile = measure_profile(client)
            profile = calibrate(
                client, profile, spread(candidate_plans(profile.spec, profile.n_nodes), 8)
            )
            with progress(console) as bar:
                task = bar.add_task("plans", total=None, note="")

                def tell(done: int, total: int) -> None:
                    bar.update(task, completed=done, total=total)

                rows, overruns = measure(testbed, client, profile, scenario, extent, tell)
        finally:
            client.close()
    finally:
        testbed.close()
    result = {
        "model": model_label(args.model),
        "nodes": [n.name for n in profile.nodes],
        "rows": rows,
        "overrun_share": overruns,
        "made": {**provenance(profile, args.command), "seed": SEED},
        **summary(rows, [n.name for n in profile.nodes]),
    }
    _show(result, console)
    if args.json is not None:
        write_json(args.json, result)
    if args.report is not None:
        console.print(f"report: {write_page(result, args.report)}", markup=False, highlight=False)
    return 0


def _show(result: dict[str, Any], console: Console) -> None:
    title = f"{result['model']}: simulated against measured latency"
    table = TextTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("Mbit/s", "load", "plan", "n", "mean ms", "simulated", "", "p95 ms",
                   "simulated", ""):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        values = []
        for what in ("mean_ms", "p95_ms"):
            values += [
                f"{row['measured'][what]:.1f}",
                f"{row['simulated'][what]:.1f}",
                f"{error(row, what):+.1%}",
            ]
        plan = str(Plan(tuple(row["plan"])))
        table.add_row(f"{row['mbps']:g}", f"{row['load']:g}", plan, str(row["requests"]), *values)
    console.print(table)
    for line in lines(result):
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
