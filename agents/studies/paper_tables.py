"""The reference's tables from the simulator loaded with its own machines, as plain numbers.

`agents.paper_tables` shows them. The simulator gets its Table 1 and its 40 MB/s hops
(`env.reference`), and its closed loop: one request at a time, nothing changing. There its static
split, its scheduler, the queue-aware solver and the shipped policy run, under its rule (no tier
empty, head on the cloud) and without. As nothing changes and nothing queues, a clairvoyant can do
no better than hold the best plan: it is found by trying every one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import ArmContext, Controller, Solver, Static, make_arm
from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS
from agents.studies.compare import ArmRun, run_arm
from env.conditions import mean_delay_s
from env.cost import PAPER_CLOUD_W, PAPER_EDGE_W, PAPER_FOG_W, Cost
from env.predict import CostModel
from env.reference import Measured, closed_loop, measured, reference_profile
from env.scenario import HopSetup, Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.model import model_spec
from executor.plan import Plan

__all__ = [
    "ARM_COLUMNS",
    "AS_STATED",
    "PASSES",
    "READINGS",
    "SINGLE_COLUMNS",
    "arm_rows",
    "reductions",
    "reported",
    "single_rows",
    "study",
]

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
