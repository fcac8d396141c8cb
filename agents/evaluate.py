"""Arms side by side on the same conditions: `python -m agents.evaluate --model alexnet`.

Three questions have commands of their own, which a first argument here hands over to: `STUDIES`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.arms.controllers import ARMS
from agents.cli import (
    MODEL_HELP,
    Parser,
    add_transfer_argument,
    model_argument,
    numbers,
    positive_int,
    run_command,
)
from agents.nodes import not_valid
from agents.report.evaluation import write_report
from agents.report.terminal import TABLE_WIDTH, plot, simulated_table, table
from agents.studies.cadence import cadence_table, run_each
from agents.studies.comparison import compare
from agents.studies.workers import WORKERS_HELP
from env.splits import PARTS
from executor.errors import ConfigError
from executor.files import write_json
from executor.logs import add_log_arguments, configure_logging
from executor.netns import add_isolation_argument, check_isolation

__all__ = ["main"]

FIRST_SEED = 9000  # far from training's
STUDIES = {
    "--sim-to-real": "agents.sim_to_real",
    "--paper-tables": "agents.paper_tables",
    "--chains": "agents.chains",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in STUDIES:
        study = importlib.import_module(STUDIES[words[0]])
        return int(study.main(words[1:]))
    args = _parser().parse_args(words)
    args.command = " ".join(["python -m agents.evaluate", *words])
    configure_logging(args)
    return run_command(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    if args.from_json is not None:
        result = _read(args.from_json)
    elif args.model is None:
        raise ConfigError("give --model NAME, or --from-json FILE of an earlier run")
    else:
        check_isolation(args.isolation, testbed=args.backend == "testbed")
        intervals = numbers("--interval", args.interval, "seconds", "0.05,1,10")
        if len(intervals) > 1:
            return _main_each(args, intervals, console)
        args.interval_s = intervals[0] if intervals else None
        result = compare(args, console)
    _show(result, console)
    if args.json is not None:
        write_json(args.json, result)
    if args.plot is not None:
        plot(result, args.plot)
    if args.report is not None:
        page = write_report(result, args.report, args.reference)
        console.print(f"report: {page}", markup=False, highlight=False)
    return 0


def _main_each(args: argparse.Namespace, intervals: list[float], console: Console) -> int:
    """The same at each of several intervals between decisions."""
    result = run_each(intervals, args, lambda one: compare(one, console))
    for found in result["by_interval"].values():
        _show(found, console)
    for rate, arms in result["cadence"].items():
        console.print(cadence_table(f"{rate} of capacity: cost by interval, x 1 s", arms))
    if args.json is not None:
        write_json(args.json, result)
    return 0


def _read(path: Path) -> dict[str, Any]:
    """The results that an earlier run wrote as JSON."""
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"cannot read results {path}: {error}") from error
    needed = ("model", "backend", "arms", "by_rate", "made")
    missing = [key for key in needed if not isinstance(result, dict) or key not in result]
    if missing:
        raise ConfigError(
            f"results {path} lack {', '.join(missing)}; expected a file that "
            "`python -m agents.evaluate --json` of this version wrote"
        )
    return dict(result)


def _show(result: dict[str, Any], console: Console) -> None:
    """The tables, on the terminal."""
    name, backend = result["model"], result["backend"]
    if result.get("interval_s", 1.0) != 1.0:
        name += f", a decision every {result['interval_s']:g} s"
    if result.get("per_request"):
        name += ", policies and solver per request"
    if result.get("recalibrate"):
        name += ", recalibrated"
    for rate, part in result["by_rate"].items():
        title = f"{name}, {backend}, {rate} of capacity ({part['rate_rps']:.2f}/s)"
        console.print(table(title, part["arms"]))
        for line in not_valid(part["overrun_share"]):
            console.print(line, markup=False)
        if "simulated" in part:
            slow = ", ".join(f"{k} {v:.2f}" for k, v in part["simulated"]["slowness"].items())
            title = f"beside the simulator, nodes as they were ({slow} x as slow as profiled)"
            console.print(simulated_table(title, part))
    if len(result["by_rate"]) > 1:
        console.print(table(f"{name}, {backend}, all rates", result["arms"]))
    for family, part in result.get("by_family", {}).items():
        console.print(table(f"{name}, {family}, all rates", part["arms"]))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.evaluate",
        description="Compare arms on the same bandwidth, load and arrivals.",
        epilog="As the first argument, one of these asks something else (each has a --help): "
        + ", ".join(STUDIES),
    )
    add = parser.add_argument
    add("--model", type=model_argument, help=MODEL_HELP)
    add("--from-json", type=Path, help="show what an earlier run wrote with --json; run nothing")
    add("--backend", choices=("simulator", "testbed"), default="simulator")
    add_isolation_argument(parser)
    add("--scenario", help="TOML file or shipped name, or several (lan,wan); default: default")
    add(
        "--traces",
        type=Path,
        help="folder of measured traces (docs/traces.md): play a part of its split instead of the "
        "scenario's bandwidth, load, delay and arrivals",
    )
    add("--split", choices=tuple(PARTS), help="which part of --traces (default: test)")
    add("--conditions", help="of that part these alone, e.g. ucc5g-steady,hsdpa-x10-nab")
    add(
        "--change-every",
        help="seconds, e.g. 0.05,1,10,60,600: bandwidth and load change at these paces instead of "
        "the scenario's, at least 3 times (simulator only)",
    )
    add(
        "--arms",
        help=f"comma-separated, of {', '.join(ARMS)}; or all (default: all but the oracle, which "
        "takes minutes)",
    )
    add("--seeds", type=positive_int, default=16, help="conditions per rate")
    add("--first-seed", type=int, default=FIRST_SEED)
    add("--repeats", type=positive_int, default=1, help="testbed only: runs of each seed")
    add(
        "--intervals",
        type=positive_int,
        help="steady-state intervals, the longest where --interval names several (default: a whole "
        "episode)",
    )
    add("--rates", help="fractions of the best static plan's capacity, e.g. 0.4,0.8,1.1")
    add(
        "--interval",
        help="seconds between decisions, e.g. 1 or 0.05,0.2,1,10 (docs/cadence.md); the conditions "
        "of a simulator are then the same at each (default: the scenario's)",
    )
    add(
        "--late-binding",
        action="store_true",
        help="let the fog pick its cut when a request's turn comes (docs/cadence.md)",
    )
    add(
        "--per-request",
        action="store_true",
        help="testbed only: policies and solver decide again for every request, as it is submitted",
    )
    add(
        "--recalibrate",
        action="store_true",
        help="testbed only: arms that predict costs correct their profile by what requests "
        "measure, as agents.deploy does",
    )
    add(
        "--startup-s",
        type=float,
        help="seconds accounted for apart at the start (default: 20, or as long as the "
        "reference's start-up takes where it takes part)",
    )
    add_transfer_argument(parser)
    add("--workers", default="1", metavar="N", help=WORKERS_HELP)
    add("--checkpoint", type=Path, help="directory (default: checkpoints/MODEL)")
    add("--profile", type=Path, help="profile JSON (default: the checkpoint's; testbed: measured)")
    add("--json", type=Path, help="write the results here")
    add("--plot", type=Path, help="write a figure here (PNG, SVG, PDF)")
    add("--report", type=Path, help="write a page with tables and figures into this folder")
    add("--reference", help="arm that --report compares with, beside static (default: the solver)")
    add_log_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
