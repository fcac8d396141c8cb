"""The reference's Tables 1 to 4 beside ours: `python -m agents.paper_tables`.

The simulator gets its Table 1 and its 40 MB/s hops (`env.reference`), and its closed loop: one
request at a time, nothing changing. There its static split, its scheduler, the queue-aware solver
and the shipped policy run, under its rule (no tier empty, head on the cloud) and without. As
nothing changes and nothing queues, a clairvoyant can do no better than hold the best plan: it is
found by trying every one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table as TextTable

from agents.cli import CHECKPOINTS, Parser, positive_int, run_study
from agents.compare import ArmRun, run_arm
from agents.controllers import ArmContext, Controller, Solver, Static, make_arm
from agents.provenance import provenance
from agents.runtime import Checkpoint
from env.conditions import mean_delay_s
from env.cost import PAPER_CLOUD_W, PAPER_EDGE_W, PAPER_FOG_W, Cost
from env.predict import CostModel
from env.reference import Measured, closed_loop, measured, reference_profile
from env.scenario import HopSetup, Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.files import write_json
from executor.model import model_spec
from executor.networks import check_model
from executor.plan import Plan

__all__ = ["main", "reductions", "study"]

F64 = NDArray[np.float64]
STARTUP = 120  # intervals: its 95 inferences, probes included, and the first decision after them
PASSES = 5000  # its 500 passes x 10 runs: what overhead is spread over
WATTS = np.array([PAPER_EDGE_W, PAPER_FOG_W, PAPER_CLOUD_W])
AS_STATED = "as stated"
READINGS = {
    AS_STATED: "its Table 1 and its 40 MB/s, and nothing else",
    "static matched": "what is missing to its static split's latency added to both hops as delay",
}
FIGURES = ("latency_ms", "compute_j", "full_j")


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
        from agents.report.paper import write_page

        console.print(f"report: {write_page(result, args.report)}", markup=False, highlight=False)
    return 0


def study(name: str, reading: str, requests: int) -> dict[str, Any]:
    """One model under one reading of what the reference leaves open.

    Args:
        name: Of the model.
        reading: A key of `READINGS`; of a model that it did not measure, `AS_STATED`.
        requests: In the steady state.

    Returns:
        "single": latency and joules of one device by itself, no transfer; "constrained" and
        "free": the arms' figures by name, `static` and the clairvoyants among them.
    """
    spec, scenario = model_spec(name), Scenario.load("paper")
    scenario = scenario.replace(rate_rps=1.0 / scenario.interval_s)
    plain = CostModel(reference_profile(spec, scenario), scenario)
    if reading == "static matched":
        static = _tried(plain, np.array([spec.static_plan]))
        missing_s = max(0.0, 1e-3 * (measured()[name].static_ms - float(static["latency_ms"][0])))
        # There and back over two hops.
        hops = tuple(HopSetup(h.bandwidth, missing_s / 4.0) for h in scenario.hops)
        scenario = scenario.replace(hops=hops)
    free = CostModel(reference_profile(spec, scenario), scenario)
    ruled = CostModel(free.profile, scenario.replace(constrained=True))
    whole_s = free.profile.work_prefix_s()[:, -1]
    static_arm = make_arm("static", ArmContext(free))
    paper = make_arm("paper-constrained", ArmContext(free))
    constrained = {
        "static": _arm(free, static_arm, requests),
        "paper": _arm(free, paper, requests),
        "solver": _arm(ruled, Solver(), requests),
        **_clairvoyants(ruled),
    }
    arms: list[tuple[str, Controller]] = [
        (a, make_arm(a, ArmContext(free))) for a in ("edge", "fog", "cloud", "paper")
    ]
    arms.append(("solver", Solver()))
    policy = _policy(free, name)
    if policy is not None:
        arms.append(("policy", policy))
    unconstrained = {"static": constrained["static"]}
    unconstrained |= {arm: _arm(free, controller, requests) for arm, controller in arms}
    return {
        "one_way_delay_ms": 1e3 * mean_delay_s(scenario.hops[0]),
        "single": {"ms": (1e3 * whole_s).tolist(), "j": (WATTS * whole_s).tolist()},
        "constrained": constrained,
        "free": {**unconstrained, **_clairvoyants(free)},
    }


def _policy(model: CostModel, name: str) -> Controller | None:
    """The shipped policy, never trained on these machines; None where there is none."""
    try:
        checkpoint = Checkpoint.load(CHECKPOINTS / name, name)
    except ConfigError:
        return None
    return make_arm("policy", ArmContext(model, checkpoint))


def _simulator(model: CostModel, intervals: int, batch: int = 1) -> Simulator:
    mbps = np.array([h.bandwidth.levels[0] for h in model.scenario.hops])
    tape = closed_loop(model.scenario, np.tile(mbps, (intervals, 1)), batch)
    return Simulator(model, batch, 0, record_requests=True, conditions=tape.play())


def _energy(run: ArmRun, model: CostModel, startup: bool = False) -> tuple[F64, F64]:
    """Joules of all nodes together, compute and full; [R] each."""
    cost = Cost(model.profile, model.references, model.scenario)
    energy = cost.energy(run.startup if startup else run.spent)
    return energy.total_compute_j, energy.total_full_j


def _arm(model: CostModel, controller: Controller, requests: int) -> dict[str, Any]:
    """What an arm takes per request: in the steady state, and with its overhead.

    Overhead is what the start costs more than the steady state, profiling, probes and decisions,
    spread over `PASSES` requests.
    """
    run = run_arm(
        _simulator(model, STARTUP + requests), controller, seed=0, n_intervals=requests,
        startup=STARTUP,
    )  # fmt: skip
    count = int(run.steady.arrived[0])
    compute_j, full_j = (float(e[0]) / count for e in _energy(run, model))
    steady = {
        "latency_ms": 1e3 * float(run.latency_s.mean()), "compute_j": compute_j, "full_j": full_j,
    }  # fmt: skip
    nodes = model.profile.nodes
    pass_s = np.array([sum(n.unit_s) for n in nodes])
    profile_j = {
        "compute_j": float(WATTS @ pass_s),
        "full_j": float(pass_s @ [n.power.compute_w for n in nodes])
        + float(pass_s.max()) * nodes[0].power.idle_w,
    }
    start_compute_j, start_full_j = (float(e[0]) for e in _energy(run, model, startup=True))
    started = int(run.startup.completed[0])
    spent = {
        "latency_ms": 1e3 * float(run.startup.latency_sum_s[0]),
        "compute_j": start_compute_j,
        "full_j": start_full_j,
    }
    # Probes are in the records' transmit energy; the time they take is not any request's.
    waiting_ms = 1e3 * (
        run.profile_passes * float(pass_s.max())
        + float(run.probe_s[0]) / requests * PASSES
        + float(np.mean(run.decide_s)) * PASSES
    )
    extra = {
        "latency_ms": waiting_ms,
        "compute_j": run.profile_passes * profile_j["compute_j"],
        "full_j": run.profile_passes * profile_j["full_j"],
    }
    overall = {k: (spent[k] + (PASSES - started) * steady[k] + extra[k]) / PASSES for k in FIGURES}
    plan = Plan(tuple(map(int, run.trajectory.cuts[-1])))
    fixed = isinstance(controller, Static)
    return {
        "plan": str(plan),
        **steady,
        "edge_j": float(run.spent.node_busy_s[0, 0]) * PAPER_EDGE_W / count,
        "overall": steady if fixed else overall,
    }


def _tried(model: CostModel, cuts: NDArray[np.int64]) -> dict[str, F64]:
    """Figures of one request under each of P plans [P, H], by itself."""
    simulator = _simulator(model, 1, len(cuts))
    run = run_arm(simulator, Static("every", cuts), seed=0, n_intervals=1)
    compute_j, full_j = _energy(run, model)
    cost = Cost(model.profile, model.references, model.scenario)
    return {
        "latency_ms": 1e3 * run.spent.latency_sum_s,
        "compute_j": compute_j,
        "full_j": full_j,
        "edge_j": run.spent.node_busy_s[:, 0] * PAPER_EDGE_W,
        "cost": cost(run.spent, np.ones(len(cuts))),
    }


def _clairvoyants(model: CostModel) -> dict[str, Any]:
    """The best of every plan: by our cost, by latency alone, by compute energy alone."""
    tried = _tried(model, model.table.cuts)
    found = {}
    for name, by in (("cost", "cost"), ("latency", "latency_ms"), ("energy", "compute_j")):
        best = int(np.argmin(tried[by]))
        figures = {k: float(tried[k][best]) for k in (*FIGURES, "edge_j")}
        found[f"best {name}"] = {
            "plan": str(model.plans[best]),
            **figures,
            "overall": {k: figures[k] for k in FIGURES},
        }
    return found


def reductions(arms: dict[str, Any], name: str, overall: bool = False) -> dict[str, float]:
    """How much less than `static` an arm takes: 0.2 is 20 % less, negative is more.

    Args:
        arms: Figures by arm.
        name: The arm.
        overall: With its overhead.
    """
    ours = arms[name]["overall"] if overall else arms[name]
    return {k: 1.0 - ours[k] / arms["static"][k] for k in FIGURES}


def reported(figures: dict[str, Any]) -> dict[str, float]:
    """The reference's own reductions; compute energy is the only one it counts."""
    m = Measured(**figures)
    return {
        "latency_ms": 1.0 - m.adaptive_ms / m.static_ms,
        "compute_j": 1.0 - m.adaptive_j / m.static_j,
    }


def single_rows(result: dict[str, Any]) -> list[list[str]]:
    """Its Table 1 beside ours: model, device, ms, J."""
    rows = []
    for name, arms in result["ours"][AS_STATED].items():
        ours, theirs = arms["single"], result["reference"].get(name)
        for k, device in enumerate(("edge", "fog", "cloud")):
            its = [f"{theirs[x][k]:.3f}" if theirs else "" for x in ("single_ms", "single_j")]
            rows.append(
                [name, device, its[0], f"{ours['ms'][k]:.3f}", its[1], f"{ours['j'][k]:.3f}"]
            )
    return rows


def arm_rows(result: dict[str, Any], reading: str, rule: str) -> list[list[str]]:
    """Its Tables 2 to 4 and ours: a row per model and arm, with reductions against static."""
    rows = []
    for name, by_rule in result["ours"][reading].items():
        theirs = result["reference"].get(name)
        if rule == "constrained" and theirs:
            own = reported(theirs)
            rows += [
                [name, "reported static", "", f"{theirs['static_ms']:.1f}", "",
                 f"{theirs['static_j']:.3f}", "", "", "", "", ""],
                [name, "reported adaptive", "", f"{theirs['adaptive_ms']:.1f}",
                 f"{own['latency_ms']:.1%}", f"{theirs['adaptive_j']:.3f}",
                 f"{own['compute_j']:.1%}", "", "", "", ""],
            ]  # fmt: skip
        arms = by_rule[rule]
        for arm, figures in arms.items():
            less, net = reductions(arms, arm), reductions(arms, arm, overall=True)
            rows.append(
                [
                    name, arm, figures["plan"], f"{figures['latency_ms']:.1f}",
                    f"{less['latency_ms']:.1%}", f"{figures['compute_j']:.3f}",
                    f"{less['compute_j']:.1%}", f"{figures['full_j']:.3f}", f"{less['full_j']:.1%}",
                    f"{net['latency_ms']:.1%}", f"{net['compute_j']:.1%}",
                ]
            )  # fmt: skip
    return rows


SINGLE_COLUMNS = ("model", "device", "its ms", "ms", "its J", "J")
ARM_COLUMNS = (
    "model", "arm", "plan", "ms", "less", "compute J", "less", "full J", "less", "net ms less",
    "net J less",
)  # fmt: skip


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
