"""A long run of this executor alone: plans change, outputs are checked, memory is watched."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from executor.bench import ours
from executor.bench.cases import Case
from executor.bench.hosts import open_files, resident_mib
from executor.bench.measure import Running, drain
from executor.plan import candidate_plans

__all__ = ["PLAN_EVERY", "describe", "growth", "run_long"]

PLAN_EVERY = 50
_SAMPLES = 20


def run_long(case: Case, requests: int) -> dict[str, Any]:
    """So many requests one after the other, another candidate plan every `PLAN_EVERY`.

    Returns:
        `requests`, `seconds`, `plan_changes`, `wrong`, and `samples`: requests done so far, and per
        process (client first) MiB of anonymous memory and open files. `growth` has of both, per
        process, by how much the median of the last quarter's samples exceeds the second quarter's.
        `first_after_change`: how long the first request under each new plan took, over the median
        of the others before the next change.
    """
    plans = candidate_plans(case.chain.spec, case.n_nodes)
    choose = random.Random(0)
    wrong = changes = 0
    taken_s: list[float] = []  # under the plan in force
    first_after: list[float] = []
    samples: list[dict[str, Any]] = []
    begun_s = time.monotonic()
    with Running(case, [ours.SYSTEM]) as running:
        link = running.links[ours.SYSTEM.name]
        assert isinstance(link, ours.Link)
        for number in range(requests):
            if number and number % PLAN_EVERY == 0:
                link.plan = choose.choice([plan for plan in plans if plan != link.plan])
                changes += 1
                taken_s = []
            which = number % len(case.inputs)
            asked_s = time.monotonic()
            output = link.call(case.inputs[which])
            taken_s.append(time.monotonic() - asked_s)
            wrong += not case.is_right(which, output)
            if changes and len(taken_s) == PLAN_EVERY:
                first_after.append(round(taken_s[0] / median(taken_s[1:]), 3))
            if (number + 1) % max(1, requests // _SAMPLES) == 0:
                nodes = drain(running.hosts[ours.SYSTEM.name])
                samples.append(
                    {
                        "requests": number + 1,
                        "memory_mib": [resident_mib(), *(node.memory_mib for node in nodes)],
                        "open_files": [open_files(), *(node.open_files for node in nodes)],
                    }
                )
    return {
        "requests": requests,
        "seconds": round(time.monotonic() - begun_s, 1),
        "plan_changes": changes,
        "first_after_change": first_after,
        "wrong": wrong,
        "growth": {key: growth([s[key] for s in samples]) for key in ("memory_mib", "open_files")},
        "samples": samples,
    }


def growth(samples: Sequence[Sequence[float]]) -> list[float]:
    """By how much each column's median over the last quarter exceeds that over the second."""
    quarter = max(1, len(samples) // 4)
    columns = zip(*samples, strict=True)
    return [
        round(median(column[-quarter:]) - median(column[quarter : 2 * quarter] or column), 2)
        for column in columns
    ]


def describe(result: dict[str, Any]) -> str:
    """The run as text: memory and files early, half way and at the end."""
    samples = result["samples"]
    shown = [samples[len(samples) // 5], samples[len(samples) // 2], samples[-1]]
    lines = [
        f"long run: {result['requests']} requests in {result['seconds']:.0f} s, "
        f"{result['plan_changes']} plan changes, {result['wrong']} wrong; client and nodes:"
    ]
    for sample in shown:
        memory = "/".join(f"{value:.1f}" for value in sample["memory_mib"])
        files = "/".join(map(str, sample["open_files"]))
        lines.append(f"  after {sample['requests']:6} requests: {memory} MiB, {files} open files")
    if first := result["first_after_change"]:
        middle, p95, most = np.percentile(first, (50, 95, 100))
        lines.append(
            "  first request under a new plan, over the median of those after it: "
            f"median {middle:.2f}, p95 {p95:.2f}, most {most:.2f}"
        )
    memory, files = (
        "/".join(f"{value:+g}" for value in result["growth"][key])
        for key in ("memory_mib", "open_files")
    )
    lines.append(f"  growth, second quarter to last: {memory} MiB, {files} open files")
    return "\n".join(lines)
