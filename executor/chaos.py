"""The chaos suite: `python -m executor.chaos [--model M] [--minutes M] [--seed S] [--json F]`.

Runs a testbed under load while nodes are killed and stopped, hops are cut, stalled, slowed and
damaged, strangers connect and disks fill, at random moments. Every output is compared with the
whole model's, bit for bit, and every request is accounted for. Ends with 1 if an output was wrong,
a request did not end exactly once, or a promise beside these was broken.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from executor._chaos import FAULTS, Fault, Ground, Load, Outcome, Pairs, full_disk_problem, inject
from executor.arguments import Parser
from executor.client import Client
from executor.errors import ConfigError, SplitpilotError
from executor.files import write_json
from executor.model import MODELS, build_chain, sample_input
from executor.netns import add_isolation_argument, check_isolation
from executor.plan import ModelSpec, Plan
from executor.testbed import DEFAULT_HOPS, Testbed, TestbedHop, TestbedNode

__all__ = ["Report", "main", "run"]

NODES = (
    TestbedNode("edge", 3.0, "pi4"),
    TestbedNode("fog", 2.0, "laptop"),
    TestbedNode("cloud", 1.0, "server"),
)
DIRECT_HOP = TestbedHop(30.0, 0.015)
TIMEOUT_S = 15.0
INPUTS = 4
CALM_RUNS = 5
GONE_RUNS = 15
MAX_RATE_RPS = 8.0
UTILISATION = 0.4
CAPACITY_S, CAPACITY_FLIGHT = 20.0, 12
# Bounds on recovery, beyond the latency of the plan that goes around the fault.
AROUND_BOUND_S, NORMAL_BOUND_S = 1.0, 3.0


@dataclass
class Report:
    """What a run found; plain data but for `outcomes`.

    Attributes:
        model: The model.
        seed: Of faults and load.
        direct: Whether there was a direct link from edge to cloud.
        seconds: How long the load ran.
        rate_rps: Its mean rate.
        capacity_rps: What the chain completed, without faults, with as many requests in flight as
            it takes; None if it was not measured.
        calm_s: Median latency per plan on idle nodes.
        outcomes: The faults, in order.
        ends: How requests ended, by kind.
        retried: Requests completed after more than one try.
        unaccounted: Requests that did not end exactly once.
        late_replies: Replies to requests that had been answered already, dropped.
        gone_ratio: With the fog killed for good: median latency of requests that ask for a plan
            through it, over that of the best plan without it.
        problems: Broken promises beside wrong and unaccounted requests.
    """

    model: str
    seed: int
    direct: bool
    seconds: float = 0.0
    rate_rps: float = 0.0
    capacity_rps: float | None = None
    calm_s: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    unaccounted: int = 0
    late_replies: int = 0
    gone_ratio: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise was kept (recovery times are reported, not judged)."""
        return not (self.ends.get("wrong", 0) or self.unaccounted or self.problems)

    def around_excess_s(self, outcome: Outcome) -> float | None:
        """Time to go around a fault beyond the idle latency of the plan that did."""
        return self._excess_s(outcome.around_s, outcome.plan)

    def normal_excess_s(self, outcome: Outcome) -> float | None:
        """Time to be as before a fault beyond the idle latency of the plan that was."""
        return self._excess_s(outcome.normal_s, outcome.normal_plan)

    def _excess_s(self, seconds: float | None, plan: tuple[int, ...] | None) -> float | None:
        return None if seconds is None else seconds - self.calm_s.get(_name(plan), 0.0)

    def plain(self) -> dict[str, Any]:
        """The report as JSON data; what never came is null."""
        values = asdict(self)
        for raw, outcome in zip(values["outcomes"], self.outcomes, strict=True):
            raw["around_excess_s"] = self.around_excess_s(outcome)
            raw["normal_excess_s"] = self.normal_excess_s(outcome)
        names = {fault.name for fault in FAULTS if fault.fast and fault.hop is not None}
        fast = [outcome for outcome in self.outcomes if outcome.name in names]
        values["recovery"] = {
            "around_excess_s": _percentiles([self.around_excess_s(o) for o in fast]),
            "normal_s": _percentiles([o.normal_s for o in fast]),
            "normal_excess_s": _percentiles([self.normal_excess_s(o) for o in fast]),
            "bounds_s": [AROUND_BOUND_S, NORMAL_BOUND_S],
        }
        values["ok"] = self.ok
        plain: dict[str, Any] = _finite(values)
        return plain


def run(
    model: str,
    minutes: float,
    seed: int,
    *,
    direct: bool = False,
    faults: Sequence[Fault] = FAULTS,
    nodes: Sequence[TestbedNode] = NODES,
    hops: Sequence[TestbedHop] = DEFAULT_HOPS,
    gone: bool = True,
    of_capacity: float | None = None,
    isolation: str = "none",
    watch: Callable[[Testbed], AbstractContextManager[object]] = nullcontext,
    console: Console | None = None,
) -> Report:
    """Run the suite.

    Args:
        model: Model name.
        minutes: How long faults are injected; the one under way is finished.
        seed: Of faults and load.
        direct: Add a direct link from edge to cloud.
        faults: Which may happen; they come in shuffled rounds.
        nodes: Edge, fog and cloud.
        hops: The two hops.
        gone: At the end, kill the fog for good and measure service without it.
        of_capacity: Load as a share of what the chain can do, which is measured first; else the
            edge alone could serve it.
        isolation: As `Testbed` takes it.
        watch: A context over the time under load.
        console: Where to tell what happens.

    Raises:
        SplitpilotError: The testbed could not be started, or a node did not come back.
    """
    report = Report(model, seed, direct)
    rng = random.Random(seed)
    tell: Callable[[str], object] = console.print if console is not None else len
    with tempfile.TemporaryDirectory(prefix="splitpilot-chaos-") as name:
        folder = Path(name)
        problem = full_disk_problem(folder / "disk")
        if problem:
            report.problems.append(f"checkpoint on a full disk: {problem}")
        other = folder / "other-weights.pt"
        pairs, spec, digest = _expectations(model, other, faults)
        link = DIRECT_HOP if direct else None
        with Testbed(model, nodes=nodes, hops=hops, direct=link, isolation=isolation) as testbed:
            client = testbed.client(timeout_s=TIMEOUT_S, max_in_flight=64)
            plans = _plans(spec)
            report.calm_s = _calm(client, pairs, plans, spec)
            edge_s = report.calm_s[_name((spec.n_units,) * 2)]
            report.rate_rps = min(MAX_RATE_RPS, UTILISATION / edge_s)
            if of_capacity is not None:
                report.capacity_rps = _capacity_rps(client, pairs, plans)
                report.rate_rps = of_capacity * report.capacity_rps
            tell(
                f"{model}: {report.rate_rps:.2f} requests/s over plans {', '.join(map(str, plans))}"
            )
            client.prefer(_preferred(plans, spec, report.calm_s))
            ground = Ground(testbed, client, rng, other, digest, tuple(pairs[0][0].shape))
            load = Load(client, pairs, plans, report.rate_rps, seed)
            begun_s = time.monotonic()
            load.start()
            try:
                with watch(testbed):
                    _inject_all(report, ground, load, faults, begun_s + 60.0 * minutes, tell)
            finally:
                load.finish(TIMEOUT_S + 10.0)
                report.seconds = time.monotonic() - begun_s
            if gone:
                report.gone_ratio = _without_fog(testbed, client, pairs, plans, spec)
            report.late_replies = client.counts.late_replies
    _account(report, load)
    return report


def _expectations(
    model: str, other: Path, faults: Sequence[Fault]
) -> tuple[Pairs, ModelSpec, bytes]:
    """Inputs with the whole model's outputs; and a file of other weights, if one is asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chain = build_chain(model)
        n = chain.spec.n_units
        inputs = [sample_input(seed) for seed in range(INPUTS)]
        pairs = [(x.numpy(), chain.run(x, 0, n).numpy()) for x in inputs]
        if any(fault.name.startswith("other weights") for fault in faults):
            from torchvision.models import get_model

            torch.manual_seed(1)
            torch.save(get_model(model, weights=None).state_dict(), other)
        return pairs, chain.spec, bytes.fromhex(chain.digest)
    finally:
        torch.set_num_threads(threads)


def _plans(spec: ModelSpec) -> list[Plan]:
    """What the load asks for: all through the fog, most through the cloud."""
    n, (i, j) = spec.n_units, spec.static_plan
    return [Plan((i, j)), Plan((0, j)), Plan((i, n)), Plan((i, i))]


def _detours(plans: Sequence[Plan], spec: ModelSpec) -> list[Plan]:
    n = spec.n_units
    short = [Plan((p.cuts[0], n)) for p in plans]
    past = [Plan((p.cuts[0], p.cuts[0])) for p in plans]
    return list(dict.fromkeys([*short, *past, Plan((n, n))]))


def _calm(client: Client, pairs: Pairs, plans: Sequence[Plan], spec: ModelSpec) -> dict[str, float]:
    """Median latency of every plan that may run, one request at a time; the first warms up."""
    calm = {}
    for plan in dict.fromkeys([*plans, *_detours(plans, spec)]):
        records = [client.submit(pairs[0][0], plan).result().record for _ in range(CALM_RUNS + 1)]
        calm[_name(plan.cuts)] = statistics.median(r.latency_s for r in records[1:])
    return calm


def _capacity_rps(client: Client, pairs: Pairs, plans: Sequence[Plan]) -> float:
    """Requests a second over the load's plans with `CAPACITY_FLIGHT` always in flight."""
    begun_s, done = time.monotonic(), 0
    flight = [client.submit(pairs[0][0], plans[i % len(plans)]) for i in range(CAPACITY_FLIGHT)]
    while (taken_s := time.monotonic() - begun_s) < CAPACITY_S:
        flight.pop(0).result()
        done += 1
        flight.append(client.submit(pairs[0][0], plans[done % len(plans)]))
    for future in flight:
        future.result()
    return done / taken_s


def _preferred(plans: Sequence[Plan], spec: ModelSpec, calm_s: dict[str, float]) -> list[Plan]:
    return sorted(_detours(plans, spec), key=lambda plan: calm_s[_name(plan.cuts)])


def _inject_all(
    report: Report,
    ground: Ground,
    load: Load,
    faults: Sequence[Fault],
    until_s: float,
    tell: Callable[[str], object],
) -> None:
    start_s = time.monotonic()
    bag: list[Fault] = []
    while time.monotonic() < until_s:
        if not bag:
            bag = ground.random.sample(list(faults), len(faults))
        time.sleep(ground.random.uniform(0.3, 1.5))
        outcome = inject(bag.pop(), ground, load, start_s)
        report.outcomes.append(outcome)
        report.problems += outcome.problems
        around, normal = _seconds(outcome.around_s), _seconds(outcome.normal_s)
        tell(
            f"{outcome.at_s:7.1f} s  {outcome.name:<24} for {outcome.held_s:4.1f} s  "
            f"around {around}  normal {normal}  {outcome.note}"
        )


def _without_fog(
    testbed: Testbed, client: Client, pairs: Pairs, plans: Sequence[Plan], spec: ModelSpec
) -> float:
    """Service with the fog gone for good over the best that is left, one request at a time."""
    testbed.kill("fog")
    x, asked = pairs[0][0], plans[0]

    def latency_s(plan: Plan) -> float:
        return client.submit(x, plan).result().record.latency_s

    latency_s(asked)
    direct = testbed.cluster.direct_links
    left = [p for p in _detours(plans, spec) if p.cuts[0] == spec.n_units or p.cuts[0] == p.cuts[1]]
    left = left if direct else [Plan((spec.n_units,) * 2)]
    tried = {plan: statistics.median(latency_s(plan) for _ in range(CALM_RUNS)) for plan in left}
    best = min(left, key=lambda plan: tried[plan])
    client.prefer(sorted(left, key=lambda plan: tried[plan]))
    pairs_s = [(latency_s(asked), latency_s(best)) for _ in range(GONE_RUNS)]
    served_s = statistics.median(served for served, _ in pairs_s)
    best_s = statistics.median(best for _, best in pairs_s)
    return served_s / best_s


def _account(report: Report, load: Load) -> None:
    tickets = load.tickets
    report.ends = dict(Counter(ticket.end or "open" for ticket in tickets))
    report.unaccounted = sum(ticket.ends != 1 for ticket in tickets)
    report.retried = sum(t.record is not None and t.record.tries > 1 for t in tickets)


def _tables(report: Report) -> list[Table]:
    faults = Table(title=f"{report.model}: recovery, seconds (p50 / p99)")
    beyond = "beyond the plan's latency"
    for column in ("fault", "times", "around it", beyond, "normal again", beyond):
        faults.add_column(column, justify="left" if column == "fault" else "right")
    for name in dict.fromkeys(o.name for o in report.outcomes):
        mine = [o for o in report.outcomes if o.name == name]
        rows: list[list[float | None]] = [
            [o.around_s for o in mine],
            [report.around_excess_s(o) for o in mine],
            [o.normal_s for o in mine],
            [report.normal_excess_s(o) for o in mine],
        ]
        faults.add_row(name, str(len(mine)), *(_both(row) for row in rows))
    recovery = report.plain()["recovery"]
    faults.add_section()
    faults.add_row(
        "dead or stopped node, cut or stalled hop",
        str(recovery["around_excess_s"]["n"]),
        "",
        f"{_pair(recovery['around_excess_s'])} (bound {AROUND_BOUND_S:g})",
        f"{_pair(recovery['normal_s'])} (bound {NORMAL_BOUND_S:g})",
        _pair(recovery["normal_excess_s"]),
    )
    totals = Table("requests", "number")
    row = {
        "submitted": sum(report.ends.values()),
        "completed": report.ends.get("completed", 0),
        "of these retried": report.retried,
        "timeout": report.ends.get("timeout", 0),
        "refused": report.ends.get("refused", 0),
        "failed": report.ends.get("failed", 0),
        "wrong": report.ends.get("wrong", 0),
        "unaccounted": report.unaccounted,
    }
    for what, number in row.items():
        totals.add_row(what, str(number))
    return [faults, totals]


def _name(cuts: Sequence[int] | None) -> str:
    return str(Plan(tuple(cuts))) if cuts else ""


def _percentiles(values: Sequence[float | None]) -> dict[str, float | int]:
    known = [value for value in values if value is not None]
    if not known:
        return {"n": 0}
    # "higher": a wait that never ended must not be averaged away.
    p50, p99 = np.percentile(known, [50, 99], method="higher")
    return {"n": len(known), "p50": float(p50), "p99": float(p99)}


def _pair(values: dict[str, Any]) -> str:
    return f"{_seconds(values.get('p50'))} / {_seconds(values.get('p99'))}"


def _both(values: Sequence[float | None]) -> str:
    found = _percentiles(values)
    return _pair(found) if found["n"] else "-"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if math.isfinite(value) else "never"


def _finite(value: Any) -> Any:
    """The value with infinite numbers as None: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chosen(names: str | None) -> tuple[Fault, ...]:
    if names is None:
        return FAULTS
    known = {fault.name: fault for fault in FAULTS}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"unknown faults {unknown}; expected some of {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; returns the exit code."""
    parser = Parser(
        prog="python -m executor.chaos",
        description="Break a testbed under load, and check that no promise breaks with it.",
    )
    parser.add_argument("--model", choices=MODELS, default="alexnet")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are injected")
    parser.add_argument("--seed", type=int, default=0, help="of faults and load")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--direct", action="store_true", help="add a direct link edge - cloud")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs=len(NODES),
        metavar=tuple(node.name.upper() for node in NODES),
        default=[node.ratio for node in NODES],
        help="how many times slower than a core of this machine each node is (default: "
        f"{' '.join(f'{node.ratio:g}' for node in NODES)})",
    )
    parser.add_argument("--faults", help="only these, comma-separated: 'kill fog,cut hop 1'")
    add_isolation_argument(parser)
    args = parser.parse_args(argv)
    console = Console()
    try:
        if not (math.isfinite(args.minutes) and args.minutes > 0):
            raise ConfigError(f"--minutes must be positive, got {args.minutes}")
        check_isolation(args.isolation, testbed=True)
        faults = _chosen(args.faults)
        nodes = [replace(n, ratio=ratio) for n, ratio in zip(NODES, args.ratios, strict=True)]
        report = run(
            args.model,
            args.minutes,
            args.seed,
            direct=args.direct,
            isolation=args.isolation,
            faults=faults,
            nodes=nodes,
            console=console,
        )
        if args.json:
            write_json(args.json, report.plain())
    except (SplitpilotError, OSError) as error:
        print(f"executor.chaos: {error}", file=sys.stderr)
        return 2
    for table in _tables(report):
        console.print(table)
    if report.gone_ratio is not None:
        console.print(f"fog gone for good: {report.gone_ratio:.3f} x the best plan without it")
    for problem in report.problems:
        console.print(f"broken: {problem}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
