"""The page of `agents.sim_to_real`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from agents.report.figures import scatter_figure
from agents.report.page import Page, Section, Table, figure, made_section, render
from agents.studies.sim_to_real import OTHER_PROFILES, error, lines
from executor.plan import Plan

__all__ = ["write_page"]


def write_page(result: dict[str, Any], directory: Path) -> Path:
    """Write the page; returns its path.

    Args:
        result: What `agents.sim_to_real` writes as JSON.
        directory: Where `index.html` goes.
    """
    rows, mape, nodes = result["rows"], result["mape"], result["nodes"]
    hops = [f"{a} - {b}" for a, b in pairwise(nodes)]
    latency = [(f"{r['mbps']:g} Mbit/s", r["load"] > 0.5, r["measured"]["mean_ms"],
                r["simulated"]["mean_ms"]) for r in rows]  # fmt: skip
    tails = [(f"{r['mbps']:g} Mbit/s", r["load"] > 0.5, r["measured"]["p95_ms"],
              r["simulated"]["p95_ms"]) for r in rows]  # fmt: skip
    parts = [
        (name, r["load"] > 0.5, r["measured"][key][k], r["simulated"][key][k])
        for key, names in (("node_ms", nodes), ("hop_ms", hops))
        for k, name in enumerate(names)
        for r in rows
        if r["measured"][key][k] > 0 and r["simulated"][key][k] > 0
    ]
    sections = [
        Section(
            "latency",
            "Per plan",
            [
                "Every dot is one plan at one bandwidth and load; on the diagonal the simulator is "
                "right, within the band it is at most 10 % off."
            ],
            [
                figure(
                    scatter_figure({"mean latency, ms": latency, "p95 latency, ms": tails}),
                    "Simulated against measured latency",
                    "Filled: at 0.7 of the plan's capacity; open: idle.",
                )
            ],
            [_plans(rows)],
        ),
        Section(
            "parts",
            "Per node and hop",
            ["Time computing and in transmission per request, waiting left out."],
            [
                figure(
                    scatter_figure({"ms per request": parts}),
                    "Simulated against measured time per node and hop",
                    "Filled: at 0.7 of the plan's capacity; open: idle.",
                )
            ],
            [
                Table(
                    ["where", "mean absolute error"],
                    [
                        [k, "-" if v is None else f"{v:.1%}"]
                        for k, v in {**mape["nodes"], **mape["hops"]}.items()
                    ],
                )
            ],
        ),
        made_section(result["made"], str(result["made"]["seed"])),
    ]
    page = Page(
        title=f"{result['model']}: the simulator against the testbed",
        subtitle="The same plans and arrivals on both, with the profile measured on these nodes.",
        tiles=[
            {"value": f"{mape['mean']:.1%}", "label": "mean absolute error of mean latency"},
            {"value": f"{mape['p95']:.1%}", "label": "of p95 latency"},
            *(
                {
                    "value": f"{result[which]['mean']:.1%} / {result[which]['p95']:.1%}",
                    "label": f"both, {what}",
                }
                for which, what in OTHER_PROFILES.items()
            ),
            {"value": str(len(rows)), "label": "cells: plan x bandwidth x load"},
        ],
        warnings=[line for line in lines(result) if line.startswith("not valid")],
        sections=sections,
    )
    return render(page, directory)


def _plans(rows: list[dict[str, Any]]) -> Table:
    columns = ["plan", "Mbit/s", "load", "requests", "mean ms", "simulated", "error", "p95 ms",
               "simulated p95", "error p95"]  # fmt: skip
    return Table(
        columns,
        [
            [
                str(Plan(tuple(r["plan"]))), f"{r['mbps']:g}", f"{r['load']:g}", str(r["requests"]),
                f"{r['measured']['mean_ms']:.1f}", f"{r['simulated']['mean_ms']:.1f}",
                f"{error(r, 'mean_ms'):+.1%}", f"{r['measured']['p95_ms']:.1f}",
                f"{r['simulated']['p95_ms']:.1f}", f"{error(r, 'p95_ms'):+.1%}",
            ]
            for r in rows
        ],
    )  # fmt: skip
