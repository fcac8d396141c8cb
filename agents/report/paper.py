"""The page of `agents.paper_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.nodes import not_valid
from agents.report.page import Page, Section, Table, made_section, render
from agents.studies.paper_tables import (
    ARM_COLUMNS,
    PASSES,
    SINGLE_COLUMNS,
    arm_rows,
    reductions,
    reported,
    single_rows,
)

__all__ = ["invalid", "write_page"]


def write_page(result: dict[str, Any], directory: Path) -> Path:
    """Write the page; returns its path.

    Args:
        result: What `agents.paper_tables` writes as JSON.
        directory: Where `index.html` goes.
    """
    sections = [
        Section(
            "one",
            "Its Table 1",
            ["One device by itself, no transfer. Joules are 12 W, 15 W and 31.8 W times seconds."],
            tables=[Table(SINGLE_COLUMNS, single_rows(result))],
        )
    ]
    for k, (reading, meaning) in enumerate(result["readings"].items()):
        if not result["ours"][reading]:
            continue
        sections.append(
            Section(
                f"reading{k}",
                f"Its Tables 2 to 4, {reading}",
                [
                    f"{meaning}. 'less' is against our static split; 'net' counts start-up, "
                    f"profiling, probes and decisions, spread over {PASSES} requests. The best "
                    "rows are what a clairvoyant could get for one aim alone; 'of most' is what an "
                    "arm saves over what the best for that aim does.",
                    *invalid(result),
                ],
                tables=[
                    Table(ARM_COLUMNS, arm_rows(result, reading, "constrained"), "Its rule"),
                    Table(ARM_COLUMNS, arm_rows(result, reading, "free"), "Tiers may be skipped"),
                ],
            )
        )
    sections.append(made_section(result["made"], "none: nothing is drawn"))
    tiles: list[Mapping[str, str]] = [
        {"value": _pair(reported(theirs)), "label": f"{name}: reported, latency / energy less"}
        for name, theirs in result["reference"].items()
    ]
    tiles += [
        {
            "value": _pair(reductions(ours["constrained"], "solver")),
            "label": f"{name}: ours under its rule",
        }
        for name, ours in next(iter(result["ours"].values())).items()
    ]
    page = Page(
        title="The reference's tables beside ours",
        subtitle=f"arXiv 2605.09623; {result['backend']}, closed loop, "
        f"{result['requests']} requests per arm in the steady state",
        tiles=tiles,
        sections=sections,
    )
    return render(page, directory)


def invalid(result: dict[str, Any]) -> list[str]:
    """Why what was measured is not valid, a line for each node and arm of each model."""
    models = [(name, found) for ours in result["ours"].values() for name, found in ours.items()]
    return [
        f"{name}: {line}"
        for name, found in models
        for line in not_valid(found.get("overrun_share", {}))
    ] + [
        f"{name}: not valid: {figures['lost']} requests of {arm} ({rule}) were lost"
        for name, found in models
        for rule in ("constrained", "free")
        for arm, figures in found[rule].items()
        if figures["lost"]
    ]


def _pair(less: dict[str, float]) -> str:
    return f"{less['latency_ms']:.1%} / {less['compute_j']:.1%}"
