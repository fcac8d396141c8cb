"""The reference's Tables 1 to 4 beside ours: `python -m agents.paper_tables`.

What they hold is measured in `agents.studies.paper_tables`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TextTable

from agents.cli import Parser, positive_int, run_study
from agents.report.paper import invalid, write_page
from agents.studies.paper_tables import (
    ARM_COLUMNS,
    AS_STATED,
    READINGS,
    SINGLE_COLUMNS,
    TESTBED,
    arm_rows,
    single_rows,
    study,
    study_on_testbed,
)
from agents.studies.provenance import provenance
from env.reference import measured
from executor.errors import ConfigError
from executor.files import write_json
from executor.netns import add_isolation_argument, check_isolation
from executor.networks import check_model

__all__ = ["main"]

REQUESTS = {"simulator": 300, "testbed": 30}
TABLE_WIDTH = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.paper_tables", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.paper_tables",
        description="The reference's tables beside ours, from the simulator loaded with its own "
        "machines, or from nodes on this one.",
    )
    add = parser.add_argument
    add(
        "--models",
        default=",".join(measured()),
        help="comma-separated, of torchvision's; those it did not measure, like vit_b_16, are "
        "estimated on its machines (default: its three)",
    )
    add("--backend", choices=tuple(REQUESTS), default="simulator")
    add_isolation_argument(parser)
    add(
        "--requests",
        type=positive_int,
        help="in the steady state, per arm (default: "
        + ", ".join(f"{n} on the {backend}" for backend, n in REQUESTS.items())
        + ")",
    )
    add("--json", type=Path, help="write the results here")
    add("--report", type=Path, help="write a page with the tables into this folder")
    return parser


def _main(args: argparse.Namespace) -> int:
    names = [name for name in args.models.split(",") if name]
    try:
        for name in names or [""]:
            check_model(name)
    except ConfigError:
        raise ConfigError(
            "--models must be classification models of torchvision; the reference measured "
            f"{', '.join(measured())}; got --models {args.models!r}"
        ) from None
    check_isolation(args.isolation, testbed=args.backend == "testbed")
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    requests = args.requests or REQUESTS[args.backend]
    nodes = args.backend == "testbed"
    result = {
        "backend": args.backend,
        "requests": requests,
        "readings": TESTBED if nodes else READINGS,
        "reference": {name: asdict(measured()[name]) for name in names if name in measured()},
        "ours": _on_nodes(names, requests, args.isolation, console)
        if nodes
        else _simulated(names, requests),
        "made": provenance(None, args.command),
    }
    for table in text_tables(result):
        console.print(table)
    for line in invalid(result):
        console.print(line, markup=False, highlight=False)
    if args.json is not None:
        write_json(args.json, result)
    if args.report is not None:
        console.print(f"report: {write_page(result, args.report)}", markup=False, highlight=False)
    return 0


def _simulated(names: list[str], requests: int) -> dict[str, Any]:
    return {
        reading: {
            name: study(name, reading, requests)
            for name in names
            if reading == AS_STATED or name in measured()
        }
        for reading in READINGS
    }


def _on_nodes(names: list[str], requests: int, isolation: str, console: Console) -> dict[str, Any]:
    ours = {}
    with console.status("") as status:
        for name in names:

            def tell(what: str, name: str = name) -> None:
                status.update(f"{name}: {what}")

            ours[name] = study_on_testbed(name, requests, isolation, tell)
    return dict.fromkeys(TESTBED, ours)


def text_tables(result: dict[str, Any]) -> list[TextTable]:
    """Everything, for the terminal."""
    parts: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("Table 1: one device by itself", SINGLE_COLUMNS, single_rows(result))
    ]
    for reading, meaning in result["readings"].items():
        for rule in ("constrained", "free"):
            title = f"Tables 2-4, {rule}, {reading}: {meaning}"
            parts.append((title, ARM_COLUMNS, arm_rows(result, reading, rule)))
    tables = []
    for title, columns, rows in parts:
        if not rows:  # a reading of none of the models
            continue
        table = TextTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for k, column in enumerate(columns):
            table.add_column(column, justify="left" if k < 3 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


if __name__ == "__main__":
    sys.exit(main())
