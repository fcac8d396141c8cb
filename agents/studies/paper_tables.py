"""The reference's tables from a system in its closed loop, as plain numbers.

`agents.paper_tables` shows them. One request at a time, nothing changing: there its static split,
its scheduler, the queue-aware solver and the shipped policy run, under its rule (no tier empty,
head on the cloud) and without. The system is the simulator loaded with its own machines and its
40 MB/s hops (`env.reference`), or nodes on this machine behind such hops. As nothing changes and
nothing queues, a clairvoyant can do no better than hold the best plan: it is found by trying every
one in the simulator, on the testbed with the profile just measured there. On nodes the solver and
the policy correct that profile by what requests measure, as deployed; its scheduler does so anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import ArmContext, Controller, Solver, Static, make_arm
from agents.arms.paper import Paper
from agents.arms.recalibrated import Recalibrated
from agents.arms.runtime import Checkpoint
from agents.cli import CHECKPOINTS
from agents.nodes import open_testbed, random_inputs
from agents.studies.compare import ArmRun, arm_steps, run_arm
from env.closed import ClosedLoop
from env.conditions import mean_delay_s
from env.cost import PAPER_CLOUD_W, PAPER_EDGE_W, PAPER_FOG_W, Cost
from env.predict import CostModel
from env.recalibration import RecalibrationSettings
from env.reference import Measured, closed_loop, measured, reference_profile
from env.scenario import HopSetup, Scenario
from env.simulator import Simulator
from executor.errors import ConfigError, RequestError
from executor.model import model_spec
from executor.plan import Plan
from executor.profile import Profile

__all__ = [
    "ARM_COLUMNS",
    "AS_STATED",
    "PASSES",
    "READINGS",
    "SINGLE_COLUMNS",
    "TESTBED",
    "arm_rows",
    "reductions",
    "reported",
    "share_of_most",
    "single_rows",
    "study",
    "study_on_testbed",
]

F64 = NDArray[np.float64]
Arm = tuple[CostModel, Controller]
STARTUP = 100  # intervals: its 95 inferences, probes included, and the first decision after them
LEARNED = RecalibrationSettings().window  # requests that an arm corrects its profile by
WARM_UP = 3  # intervals on nodes before anything else counts: the first finds weights cold
TURN = 5  # requests of an arm on nodes before the next has its turn: a machine's speed drifts
TRIED = 3  # plans run on nodes to find the best for an aim: the simulator's best there
LEISURE = 3.0  # the arrivals that arms are told of on nodes, in whole models on the slowest
PASSES = 5000  # its 500 passes x 10 runs: what overhead is spread over
WATTS = np.array([PAPER_EDGE_W, PAPER_FOG_W, PAPER_CLOUD_W])
AS_STATED = "as stated"
READINGS = {
    AS_STATED: "its Table 1 and its 40 MB/s, and nothing else",
    "static matched": "what is missing to its static split's latency added to both hops as delay",
}
TESTBED = {"on nodes": "on nodes of this machine, behind hops of its 40 MB/s"}
AIMS = {"cost": "cost", "latency": "latency_ms", "energy": "compute_j"}  # figure by aim
FIGURES = ("latency_ms", "compute_j", "full_j")


def study(name: str, reading: str, requests: int) -> dict[str, Any]:
    """One model in the simulator, under one reading of what the reference leaves open.

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
    profile = reference_profile(spec, scenario)

    def run(arms: Sequence[Arm]) -> list[ArmRun]:
        return [
            run_arm(
                _simulator(model, STARTUP + requests),
                controller,
                seed=0,
                n_intervals=requests,
                startup=STARTUP,
            )
            for model, controller in arms
        ]

    return _arms(profile, scenario, run)


def study_on_testbed(
    name: str,
    requests: int,
    isolation: str = "none",
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """One model on nodes of this machine, as slow as the scenario `paper` says, profiled first.

    Args:
        name: Of the model.
        requests: In the steady state, per arm.
        isolation: As `executor.testbed.Testbed` takes it.
        tell: Called with what begins.

    Returns:
        As `study`, and "overrun_share" (`LiveSystem.overrun_share`).
    """
    scenario = Scenario.load("paper")
    tell("starting and profiling the nodes")
    with open_testbed(name, scenario, isolation=isolation) as system:
        profile, client = system.model.profile, system.client
        # An arm that counts queues must find none, whichever node a request is on.
        longest_s = float(profile.work_prefix_s()[:, -1].max())
        scenario = scenario.replace(
            rate_rps=1.0 / (LEISURE * longest_s),
            hops=tuple(
                HopSetup(setup.bandwidth, hop.rtt_s / 2.0)  # as pinged
                for setup, hop in zip(scenario.hops, profile.hops, strict=True)
            ),
        )

        def run(arms: Sequence[Arm]) -> list[ArmRun]:
            with ExitStack() as stack:
                turns = []
                for model, controller in arms:
                    loop = ClosedLoop(model, client, random_inputs(profile.spec.input_shape))
                    stack.callback(loop.close)
                    startup = _startup(controller)
                    tell(f"start of {controller.name}")
                    steps = arm_steps(
                        loop, controller, seed=0, n_intervals=requests, startup=startup
                    )
                    for _ in range(startup):
                        next(steps)
                    turns.append(steps)
                return _in_turns(turns, requests, tell)

        found = _arms(profile, scenario, run, tried=TRIED, deployed=Recalibrated)
        return {**found, "overrun_share": system.overrun_share()}


def _startup(controller: Controller) -> int:
    """Requests on nodes before an arm's count."""
    if isinstance(controller, Paper):
        return STARTUP
    return LEARNED if isinstance(controller, Recalibrated) else WARM_UP


def _in_turns(
    arms: Sequence[Generator[None, None, ArmRun]], requests: int, tell: Callable[[str], None]
) -> list[ArmRun]:
    """Let arms that have started serve `TURN` requests each, round by round."""
    done = 0
    while done < requests:
        turn = min(TURN, requests - done)
        for steps in arms:
            for _ in range(turn):
                next(steps)
        done += turn
        tell(f"{done} of {requests} requests per arm")
    runs = []
    for steps in arms:
        try:
            next(steps)
        except StopIteration as end:
            runs.append(end.value)
    return runs


def _arms(
    profile: Profile,
    scenario: Scenario,
    run: Callable[[Sequence[Arm]], list[ArmRun]],
    tried: int = 1,
    deployed: Callable[[Controller], Controller] = lambda controller: controller,
) -> dict[str, Any]:
    """Every arm under both rules.

    Args:
        profile: Of the system.
        scenario: Of the system.
        run: Runs each arm on a system of the cost model beside it.
        tried: So many of the simulator's best plans for each aim are run to find the best.
        deployed: What becomes of the solver and the policy where the profile can be wrong.
    """
    free = CostModel(profile, scenario)
    ruled = CostModel(profile, scenario.replace(constrained=True))
    context = ArmContext(free)
    arms: dict[tuple[str, str], Arm] = {
        ("constrained", "static"): (free, make_arm("static", context)),
        ("constrained", "paper"): (free, make_arm("paper-constrained", context)),
        ("constrained", "solver"): (ruled, deployed(Solver())),
    }
    for name in ("edge", "fog", "cloud", "paper"):
        arms["free", name] = free, make_arm(name, context)
    arms["free", "solver"] = free, deployed(Solver())
    policy = _policy(free, profile.spec.name)
    if policy is not None:
        arms["free", "policy"] = free, deployed(policy)
    held = {"constrained": _best_plans(ruled, tried), "free": _best_plans(free, tried)}
    for rule, model in (("constrained", ruled), ("free", free)):
        for plan in held[rule]:
            arms[rule, str(plan)] = model, Static(str(plan), plan)
    runs = zip(arms.items(), run(list(arms.values())), strict=True)
    figures = {key: _figures(one, *arm) for (key, arm), one in runs}
    found: dict[str, dict[str, Any]] = {
        "constrained": {},
        "free": {"static": figures["constrained", "static"]},
    }
    for (rule, name), values in figures.items():
        if name not in map(str, held[rule]):
            found[rule][name] = values
    for rule, plans in held.items():
        tries = [figures[rule, str(plan)] for plan in plans]
        for aim, by in AIMS.items():
            found[rule][f"best {aim}"] = min(tries, key=itemgetter(by))
    whole_s = profile.work_prefix_s()[:, -1]
    return {
        "one_way_delay_ms": 1e3 * mean_delay_s(scenario.hops[0]),
        "single": {"ms": (1e3 * whole_s).tolist(), "j": (WATTS * whole_s).tolist()},
        **found,
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


def _figures(run: ArmRun, model: CostModel, controller: Controller) -> dict[str, Any]:
    """What an arm took per request: in the steady state, and with its overhead.

    Overhead is what the start costs more than the steady state, profiling, probes and decisions,
    spread over `PASSES` requests.
    """
    count, requests = int(run.spent.completed[0]), int(run.intervals)
    if not count:
        raise RequestError(f"no request of {run.name} was answered")
    compute_j, full_j = (float(e[0]) / count for e in _energy(run, model))
    steady = {
        "latency_ms": 1e3 * float(run.spent.latency_sum_s[0]) / count,
        "compute_j": compute_j,
        "full_j": full_j,
    }
    cost = Cost(model.profile, model.references, model.scenario)(run.spent, np.ones(1))
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
        "cost": float(cost[0]) / count,
        "overall": steady if fixed else overall,
        "lost": requests - count,
    }


def _tried(model: CostModel, cuts: NDArray[np.int64]) -> dict[str, F64]:
    """Figures of one request under each of P plans [P, H], by itself."""
    simulator = _simulator(model, 1, len(cuts))
    run = run_arm(simulator, Static("every", cuts), seed=0, n_intervals=1)
    compute_j, _ = _energy(run, model)
    cost = Cost(model.profile, model.references, model.scenario)
    return {
        "latency_ms": 1e3 * run.spent.latency_sum_s,
        "compute_j": compute_j,
        "cost": cost(run.spent, np.ones(len(cuts))),
    }


def _best_plans(model: CostModel, count: int) -> list[Plan]:
    """The `count` best of every plan for each of the aims, in the simulator."""
    tried = _tried(model, model.table.cuts)
    best = {int(i) for by in AIMS.values() for i in np.argsort(tried[by], kind="stable")[:count]}
    return [model.plans[i] for i in sorted(best)]


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


def share_of_most(arms: dict[str, Any], name: str) -> dict[str, float]:
    """What an arm saves over `static`, latency and compute energy, over the most there is to save.

    Each over what the plan that is best for it alone saves, so no plan has all of both.

    Args:
        arms: Figures by arm.
        name: The arm.
    """
    less = reductions(arms, name)
    most = {"latency_ms": "best latency", "compute_j": "best energy"}
    return {k: less[k] / reductions(arms, best)[k] for k, best in most.items()}


def single_rows(result: dict[str, Any]) -> list[list[str]]:
    """Its Table 1 beside ours: model, device, ms, J."""
    rows = []
    for name, arms in next(iter(result["ours"].values())).items():
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
            adaptive = [
                f"{theirs['adaptive_ms']:.1f}", f"{own['latency_ms']:.1%}", "",
                f"{theirs['adaptive_j']:.3f}", f"{own['compute_j']:.1%}",
            ]  # fmt: skip
            static = [f"{theirs['static_ms']:.1f}", "", "", f"{theirs['static_j']:.3f}", ""]
            for what, figures in (("static", static), ("adaptive", adaptive)):
                row = [name, f"reported {what}", "", *figures]
                rows.append(row + [""] * (len(ARM_COLUMNS) - len(row)))
        arms = by_rule[rule]
        for arm, figures in arms.items():
            less, net = reductions(arms, arm), reductions(arms, arm, overall=True)
            share = share_of_most(arms, arm)
            rows.append(
                [
                    name, arm, figures["plan"], f"{figures['latency_ms']:.1f}",
                    f"{less['latency_ms']:.1%}", f"{share['latency_ms']:.0%}",
                    f"{figures['compute_j']:.3f}", f"{less['compute_j']:.1%}",
                    f"{share['compute_j']:.0%}", f"{figures['full_j']:.3f}",
                    f"{less['full_j']:.1%}", f"{net['latency_ms']:.1%}", f"{net['compute_j']:.1%}",
                ]
            )  # fmt: skip
    return rows


SINGLE_COLUMNS = ("model", "device", "its ms", "ms", "its J", "J")
ARM_COLUMNS = (
    "model", "arm", "plan", "ms", "less", "of most", "compute J", "less", "of most", "full J",
    "less", "net ms less", "net J less",
)  # fmt: skip
