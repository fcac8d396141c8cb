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
from agents.report.paper import write_page
from agents.studies.paper_tables import (
    ARM_COLUMNS,
    AS_STATED,
    READINGS,
    SINGLE_COLUMNS,
    arm_rows,
    single_rows,
    study,
)
from agents.studies.provenance import provenance
from env.reference import measured
from executor.errors import ConfigError
from executor.files import write_json
from executor.networks import check_model

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.paper_tables", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.paper_tables",
        description="The reference's tables beside ours, from the simulator loaded with its own.",
    )
    add = parser.add_argument
    add(
        "--models",
        default=",".join(measured()),
        help="comma-separated, of torchvision's; those it did not measure, like vit_b_16, are "
        "estimated on its machines (default: its three)",
    )
    add("--requests", type=positive_int, default=300, help="in the steady state, per arm")
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
    result = {
        "requests": args.requests,
        "readings": READINGS,
        "reference": {name: asdict(measured()[name]) for name in names if name in measured()},
        "ours": {
            reading: {
                name: study(name, reading, args.requests)
                for name in names
                if reading == AS_STATED or name in measured()
            }
            for reading in READINGS
        },
        "made": provenance(None, args.command),
    }
    console = Console()
    console.width = max(console.width, 130)
    for table in text_tables(result):
        console.print(table)
    if args.json is not None:
        write_json(args.json, result)
    if args.report is not None:
        console.print(f"report: {write_page(result, args.report)}", markup=False, highlight=False)
    return 0


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
