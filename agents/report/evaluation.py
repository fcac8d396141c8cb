"""What the page of a comparison says: `python -m agents.evaluate --report DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.nodes import not_valid
from agents.report import figures
from agents.report.page import Page, Section, Table, figure, interval, made_section, render
from agents.report.verdicts import Verdict, ratio, reference_arm, subject_arm, verdicts
from executor.errors import ConfigError

__all__ = ["write_report"]

Arms = Mapping[str, Any]
SHOWN_OVER_TIME = 6


def write_report(result: dict[str, Any], directory: Path, reference: str | None = None) -> Path:
    """Write a comparison's page; returns its path.

    Args:
        result: What `agents.studies.comparison.compare` gives, or an earlier run's JSON.
        directory: Where `index.html` goes.
        reference: The arm compared with beside `static`; None takes the solver.

    Raises:
        ConfigError: The reference did not take part, a package is missing, or the folder cannot
            be written.
    """
    subject = subject_arm(result["arms"])
    try:
        other = reference_arm(result["arms"], reference, subject)
    except KeyError:
        raise ConfigError(
            f"--reference {reference!r} did not take part; expected one of "
            f"{', '.join(result['arms'])}"
        ) from None
    return render(_Report(result, subject, other).page(), directory)


class _Report:
    """Builds the page's parts.

    Args:
        result: The comparison.
        subject: The arm it is about.
        reference: The arm it is compared with, beside `static`.
    """

    def __init__(self, result: dict[str, Any], subject: str, reference: str) -> None:
        self.result, self.subject, self.reference = result, subject, reference
        self.arms: Arms = result["arms"]
        self.rates: dict[str, Arms] = {
            f"{rate} of capacity": part["arms"] for rate, part in result["by_rate"].items()
        }
        self.verdicts = verdicts(result, subject)

    def page(self) -> Page:
        """All of it."""
        r = self.result
        rows = r["seeds"] * r["repeats"]
        first = r["made"]["first_seed"]
        seeds = f"{first} to {first + r['seeds'] - 1}"
        what = (
            f"measured traces, {r['split']} part" if "split" in r else f"scenario {r['scenario']}"
        )
        parts = [
            self._against(), self._simulated(), self._losing(), self._latency(), self._energy(),
            self._front(), self._overhead(), self._pace(), self._hops(), self._regret(),
            self._over_time(), made_section(r["made"], seeds),
        ]  # fmt: skip
        return Page(
            title=f"{r['model']}: {len(self.arms)} arms on the {r['backend']}",
            subtitle=f"{what}; {rows} condition{'s' if rows > 1 else ''} per cell, "
            f"{r['intervals']} intervals of {r['interval_s']:g} s; the same bandwidth, load and "
            "arrivals for every arm; bootstrap 95 % intervals over paired conditions",
            tiles=self._tiles(),
            warnings=self._warnings(),
            sections=[part for part in parts if part is not None],
        )

    def _tiles(self) -> list[Mapping[str, str]]:
        tiles: list[Mapping[str, str]] = []
        for other in dict.fromkeys((self.reference, "static")):
            if other != self.subject:
                found = interval(ratio(self.arms, self.subject, other), 2)
                tiles.append({"value": found, "label": f"cost of {self.subject} / {other}"})
        if "regret" in self.arms[self.subject]:
            found = interval(self.arms[self.subject]["regret"], 2)
            tiles.append({"value": found, "label": f"cost of {self.subject} / oracle"})
        count = {w: sum(v.word == w for v in self.verdicts) for w in ("wins", "even", "loses")}
        tiles.append(
            {
                "value": " / ".join(map(str, count.values())),
                "label": f"cells that {self.subject} wins / ties / loses against the best other",
            }
        )
        return tiles

    def _warnings(self) -> list[str]:
        found = []
        if self.result["seeds"] * self.result["repeats"] == 1:
            found.append("One condition per cell: intervals are points, and nothing is judged.")
        for rate, part in self.result["by_rate"].items():
            found += [f"At {rate} {line}." for line in not_valid(part["overrun_share"])]
        return found

    def _against(self) -> Section:
        section = Section(
            "arms",
            "Arms side by side",
            [
                "Cost is per arrived request: "
                f"{self.result.get('units', {}).get('cost', 'see the documentation')}. Overhead "
                "(probes, switches) is included; the start of an episode is not.",
            ],
        )
        section.figures.append(
            figure(
                figures.arms_figure(self.rates, self.reference),
                f"Cost per request of every arm, and its ratio to {self.reference} and static",
                "Dots are means, bars 95 % intervals; below 1 an arm is cheaper.",
            )
        )
        section.tables += [
            self._differences(other) for other in dict.fromkeys(("static", self.reference))
        ]
        section.more = [
            self._summary(f"{rate}", arms)
            for rate, arms in {**self.rates, "all rates": self.arms}.items()
        ]
        section.more_title = "Every figure, rate by rate"
        return section

    def _differences(self, other: str) -> Table:
        """Every arm minus another, paired."""
        rows = []
        for name, arm in self.arms.items():
            if name == other:
                continue
            against = arm["versus_static"] if other == "static" else arm["versus"][other]
            rows.append(
                [
                    name,
                    interval(against["cost_ratio"]),
                    interval(against["cost"]),
                    interval(against["latency_ms"], 0),
                    interval(against["energy_edge_j"]),
                    interval(against["energy_total_j"]),
                ]
            )
        columns = ["arm", "cost ratio", "cost", "latency, ms", "edge J", "total J"]
        caption = f"Paired differences: arm - {other}, all rates (the ratio: arm / {other})"
        return Table(columns, rows, caption, strong=self.subject)

    def _summary(self, caption: str, arms: Arms) -> Table:
        columns = [
            "arm", "cost", "mean ms", "p50", "p95", "p99", "edge J", "total J", "edge J*",
            "total J*", "lost %", "late %", "switches", "battery h",
        ]  # fmt: skip
        rows = []
        for name, arm in arms.items():
            full, compute = arm["energy_j"]["full"], arm["energy_j"]["compute"]
            submitted = max(arm["requests"]["submitted"], 1)
            rows.append(
                [name, f"{arm['cost']:.3f}"]
                + [f"{arm['latency_ms'][k]:.0f}" for k in ("mean", "p50", "p95", "p99")]
                + [f"{x[k]:.3f}" for x in (full, compute) for k in ("edge", "total")]
                + [f"{100 * arm['requests'][k] / submitted:.2f}" for k in ("lost", "late")]
                + [str(arm["switches"]), f"{arm['battery_h']:.1f}"]
            )
        return Table(columns, rows, f"{caption} (*: compute accounting)", strong=self.subject)

    def _simulated(self) -> Section | None:
        """The testbed's costs beside the simulator's, where there are both."""
        tables = []
        columns = ["arm", "cost", "simulated", f"/ {self.reference}", "simulated "]
        for rate, part in self.result["by_rate"].items():
            found = part.get("simulated")
            if found is None:
                continue
            rows = []
            for name, arm in found["arms"].items():
                row = [name, f"{part['arms'][name]['cost']:.3f}", f"{arm['cost']:.3f}"]
                if name != self.reference:
                    there = ratio(part["arms"], name, self.reference)
                    row += [interval(there), interval(arm["versus"][self.reference])]
                rows.append(row + [""] * (len(columns) - len(row)))
            slow = ", ".join(f"{node} {x:.2f}" for node, x in found["slowness"].items())
            caption = f"{rate} of capacity; times as slow as profiled: {slow}"
            tables.append(Table(columns, rows, caption, strong=self.subject))
        lead = [
            "The same conditions in the simulator, with every node as fast as it was in that run "
            "and each arm told what it was told on the nodes. Where the ratios agree, the "
            "simulator's margins can be believed."
        ]
        title = "The simulator beside the nodes"
        return Section("simulated", title, lead, tables=tables) if tables else None

    def _losing(self) -> Section:
        lost = [v for v in self.verdicts if v.word == "loses"]
        if lost:
            where = "; ".join(f"{_cell(v)} (to {v.best}, {interval(v.ratio)})" for v in lost)
            lead = [f"{self.subject} loses in {len(lost)} of {len(self.verdicts)} cells: {where}."]
        else:
            lead = [f"{self.subject} loses in none of {len(self.verdicts)} cells."]
        lead.append(
            "A cell is lost where the whole interval of the ratio to the best other arm lies above "
            "1. That arm is chosen after the fact, cell by cell, and may know the future "
            "(best-static); the oracle is left out."
        )
        rows = [[_cell(v), v.best, interval(v.ratio), v.word] for v in self.verdicts]
        columns = ["cell", "best other arm", f"cost of {self.subject} / its", "verdict"]
        return Section("losing", "Where it loses", lead, tables=[Table(columns, rows)])

    def _latency(self) -> Section:
        picture = figures.latency_figure(self.rates)
        alt = "Latency percentiles of every arm"
        note = "From scheduled arrival to output; lost requests have none."
        return Section("latency", "Latency", [], [figure(picture, alt, note)])

    def _energy(self) -> Section:
        meters = self.result.get("meters", {})
        lead = [
            "full: the edge's idle watts over the time with a request outstanding, and every "
            "node's compute and transmission. compute: " + str(meters.get("compute", "")) + "."
        ]
        sources = [[node, source] for node, source in meters.get("full", {}).items()]
        picture = figures.energy_figure(self.arms)
        return Section(
            "energy",
            "Energy",
            lead,
            [figure(picture, "Energy per request of every arm", "All rates together.")],
            more=[
                Table(
                    ["node", "where its watts come from"],
                    sources,
                    text=["where its watts come from"],
                )
            ],
            more_title="Where the watts come from",
        )

    def _front(self) -> Section:
        picture = figures.front_figure(self.rates)
        alt = "Latency against energy of every arm"
        note = "The dotted line joins the arms that none but the oracle beats in both."
        return Section("front", "Latency against energy", [], [figure(picture, alt, note)])

    def _overhead(self) -> Section:
        rows = []
        for name, arm in self.arms.items():
            o = arm["overhead"]
            rows.append(
                [
                    name,
                    f"{o['profile_s']:.2f}",
                    f"{o['probe_s']:.2f}",
                    f"{o['decide_us']:.0f}",
                    f"{o['switch_ms']:.1f}",
                    str(arm["switches"]),
                    f"{o['energy_j']:.2f}",
                    f"{o['startup_cost']:.3f}",
                ]
            )
        columns = ["arm", "profile s", "probes s", "decision us", "switch ms", "switches",
                   "energy J", "start-up cost"]  # fmt: skip
        units = self.result.get("units", {})
        lead = [
            f"profile: {units.get('profile_s', '')}. decision: {units.get('decide_us', '')}. "
            f"switch: {units.get('switch_ms', '')}. Probes and energy are per episode; the "
            "start-up cost is per request of the time before the steady state.",
        ]
        table = Table(columns, rows, "All rates together", strong=self.subject)
        return Section("overhead", "Overhead", lead, tables=[table])

    def _pace(self) -> Section | None:
        conditions = self.result.get("by_condition", {})
        paces = {
            c["change_every_s"]: c["arms"] for c in conditions.values() if c.get("change_every_s")
        }
        if len(paces) < 2:
            return None
        base = "best-static" if "best-static" in self.arms else "static"
        shown = [n for n in self.arms if n not in ("edge", "fog", "cloud", base)]
        rows = [
            [name, *(interval(ratio(arms, name, base)) for arms in paces.values())]
            for name in shown
        ]
        columns = ["arm", *(f"every {p:g} s" for p in paces)]
        return Section(
            "pace",
            "How fast conditions change",
            [f"Cost over that of {base}, all rates together, by the pace of change."],
            [
                figure(
                    figures.pace_figure(paces, shown, base),
                    f"Cost over {base} by how often conditions change",
                    "Bandwidth and load are drawn anew at each change and held in between.",
                )
            ],
            [Table(columns, rows, f"cost / {base}", strong=self.subject)],
        )

    def _hops(self) -> Section:
        rule = "LAN-like: every hop's mean round trip is below 10 ms; else WAN-like."
        kinds: dict[str, Arms] = {k: p["arms"] for k, p in self.result.get("by_hops", {}).items()}
        section = Section("hops", "LAN-like and WAN-like hops", [rule])
        if len(kinds) < 2:
            only = next(iter(kinds), self.result["hops"])
            section.lead.append(
                f"All conditions of this run are {only}; --scenario lan,wan shows both."
            )
            return section
        section.figures.append(
            figure(
                figures.arms_figure(kinds, self.reference),
                "Cost of every arm on LAN-like and on WAN-like hops",
                "All rates together.",
            )
        )
        section.more = [self._summary(kind, arms) for kind, arms in kinds.items()]
        section.more_title = "Every figure, by kind of hops"
        return section

    def _regret(self) -> Section:
        section = Section("regret", "Regret to the oracle, by family of conditions")
        if "oracle" not in self.arms:
            section.lead.append("The oracle did not take part (--arms all).")
            return section
        families: dict[str, Arms] = {
            f: part["arms"] for f, part in self.result.get("by_family", {}).items()
        } or self.rates
        section.lead.append(
            "Cost over that of a search that knows the future and starts from what every arm "
            "played; part of the distance is information nobody has when deciding."
        )
        section.figures.append(
            figure(figures.regret_figure(families), "Regret of every arm by family", "")
        )
        rows = [
            [name, *(interval(arms[name]["regret"]) for arms in families.values())]
            for name in self.arms
            if name != "oracle"
        ]
        section.tables.append(Table(["arm", *families], rows, "cost / oracle", self.subject))
        return section

    def _over_time(self) -> Section | None:
        trajectory = self.result.get("trajectory")
        if not trajectory:
            return None
        likely = ("best-static", "paper-1s", self.reference, self.subject, "oracle", "static")
        shown = [n for n in dict.fromkeys(likely) if n in trajectory["arms"]][:SHOWN_OVER_TIME]
        where = f"{trajectory['condition']}, " if trajectory["condition"] else ""
        picture = figures.trajectory_figure(trajectory, shown, self.result["interval_s"])
        return Section(
            "time",
            "Split and bandwidth over time",
            [
                f"One condition ({where}{trajectory['rate']} of capacity, first seed): which node "
                f"runs which of the {trajectory['units']} units."
            ],
            [figure(picture, "Bandwidth, split and requests outstanding over time", "")],
        )


def _cell(verdict: Verdict) -> str:
    where = f"{verdict.condition}, " if verdict.condition else ""
    return f"{where}{verdict.rate} of capacity"
