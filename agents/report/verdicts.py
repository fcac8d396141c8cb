"""Where an arm wins, ties and loses: cell by cell, against the best of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Verdict", "cells", "ratio", "reference_arm", "subject_arm", "verdicts"]

# The same decider, or one that no controller can be: not what a policy is measured against here.
NO_OPPONENTS = ("policy", "guarded", "oracle")


@dataclass(frozen=True)
class Verdict:
    """One cell's.

    Attributes:
        condition: Name of the conditions; "" where there is one kind only.
        rate: Arrivals as a fraction of capacity.
        best: The cheapest of the other arms there.
        ratio: The subject's cost over its: mean, low, high.
        word: "wins" (the interval is below 1), "loses" (above), "even", or "not judged" where
            there is one condition only, and so no interval.
    """

    condition: str
    rate: str
    best: str
    ratio: dict[str, float]
    word: str


def subject_arm(arms: Mapping[str, Any]) -> str:
    """The arm that results are about: the policy where it took part."""
    named = [name for name in ("policy", "guarded", "solver") if name in arms]
    others = [name for name in arms if name not in ("static", "oracle")]
    return (named + others + ["static"])[0]


def reference_arm(arms: Mapping[str, Any], asked: str | None, subject: str) -> str:
    """The arm compared with beside `static`: the one asked for, else the solver.

    Raises:
        KeyError: The one asked for did not take part.
    """
    if asked is not None:
        if asked not in arms:
            raise KeyError(asked)
        return asked
    likely = ("policy-zeroed", "solver", "predictive", "best-static", "paper-1s", "paper")
    return next((name for name in likely if name in arms and name != subject), "static")


def cells(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every cell of a result: its conditions, its rate, its arms."""
    conditions = result.get("by_condition") or {"": result}
    for name, condition in conditions.items():
        for rate, part in condition["by_rate"].items():
            yield name, rate, part["arms"]


def ratio(arms: Mapping[str, Any], name: str, other: str) -> dict[str, float]:
    """Cost of arm `name` over that of `other`, paired: mean, low, high."""
    if name == other:
        return {"mean": 1.0, "low": 1.0, "high": 1.0}
    against = arms[name]["versus_static" if other == "static" else "versus"]
    if other != "static":
        against = against[other]
    found: dict[str, float] = against["cost_ratio"]
    return found


def verdicts(result: dict[str, Any], subject: str) -> list[Verdict]:
    """The subject against the best of the other arms, cell by cell."""
    judged = result["seeds"] * result["repeats"] > 1
    found = []
    for condition, rate, arms in cells(result):
        others = {n: a["cost"] for n, a in arms.items() if n not in (subject, *NO_OPPONENTS)}
        if not others:
            continue
        best = min(others, key=others.__getitem__)
        against = ratio(arms, subject, best)
        word = "wins" if against["high"] < 1 else "loses" if against["low"] > 1 else "even"
        found.append(Verdict(condition, rate, best, against, word if judged else "not judged"))
    return found
