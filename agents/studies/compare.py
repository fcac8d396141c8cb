"""Runs arms on the same conditions and compares them in pairs.

Every arm meets the same bandwidth, load and arrivals (common random numbers): condition by
condition, so differences are paired. The start of an episode, where an adaptive scheduler
measures and learns, is accounted for apart from the steady state.

Per request means: everything charged in the steady state, the run-out of its last requests
included, over the requests that arrived in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.branches import Branches
from agents.arms.controllers import Controller, Decision, Static
from agents.arms.oracle import Oracle
from agents.arms.paper import Paper
from agents.paired import bootstrap_mean, paired_ratio
from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.simulator import Simulator
from env.system import System

__all__ = [
    "BATTERY_WH",
    "ArmRun",
    "Trajectory",
    "arm_steps",
    "best_static_cuts",
    "per_row",
    "run_arm",
    "startup_intervals",
    "summarise",
    "versus",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

BATTERY_WH = 50.0  # 5 V, 10 Ah
# Forward passes per node at startup: the reference's three warm-ups and one timed pass, ours 3 + 10
# over single units and as many over whole models (`executor.profiler`).
PAPER_PROFILE_PASSES, PROFILE_PASSES = 4, 26
MAX_STARTUP_INTERVALS = 3000
SETTLE_S = 10.0


@dataclass
class Trajectory:
    """The first condition's intervals one by one, start-up included; T elements each.

    Attributes:
        cuts: [T, H] the plan in force.
        measured_bytes_per_s: [T, H] bandwidth as the controller saw it when it decided.
        in_flight: Requests outstanding at the interval's end.
        latency_s: Mean latency of the requests that completed in it; NaN where none did.
    """

    cuts: I64
    measured_bytes_per_s: F64
    in_flight: F64
    latency_s: F64


@dataclass
class ArmRun:
    """What one arm did on R conditions (environments of a batch, or one run after the other).

    Attributes:
        name: The arm's name.
        intervals: Steady-state intervals per condition, on average.
        startup: Spent before the steady state, [R] rows.
        steady: Spent in it, run-out excluded.
        drained: Spent running out what was outstanding at its end.
        latency_s: Latency of each request that arrived in the steady state and completed.
        latency_row: Which condition each of those belongs to.
        switches: [R] changes of plan in the steady state.
        probe_s: [R] seconds the hops spent on probes in the steady state, all hops together.
        probe_j: [R] the energy of those.
        decide_s: CPU seconds of each call of `decide` in the steady state (on a busy machine wall
            time would measure the others).
        profile_passes: Forward passes every node spent on profiling before the first interval.
        trajectory: The first condition, interval by interval.
    """

    name: str
    intervals: float
    startup: IntervalRecord
    steady: IntervalRecord
    drained: IntervalRecord
    latency_s: F64
    latency_row: I64
    switches: I64
    probe_s: F64
    probe_j: F64
    decide_s: list[float]
    profile_passes: int
    trajectory: Trajectory

    @property
    def rows(self) -> int:
        """Number of conditions R."""
        return len(self.switches)

    @property
    def spent(self) -> IntervalRecord:
        """Steady state and run-out together."""
        total = IntervalRecord.zeros(self.rows, self.steady.node_active_s.shape[1])
        total.add(self.steady)
        total.add(self.drained)
        return total

    @classmethod
    def stack(cls, runs: Sequence[ArmRun]) -> ArmRun:
        """One run over all conditions of several."""
        records: dict[str, IntervalRecord] = {}
        for part in ("startup", "steady", "drained"):
            fields = {
                f: np.concatenate([getattr(getattr(r, part), f) for r in runs])
                for f in IntervalRecord.__dataclass_fields__
            }
            records[part] = IntervalRecord(**fields)
        first = np.cumsum([0] + [r.rows for r in runs])
        return cls(
            name=runs[0].name,
            intervals=sum(r.intervals * r.rows for r in runs) / int(first[-1]),
            latency_s=np.concatenate([r.latency_s for r in runs]),
            latency_row=np.concatenate(
                [r.latency_row + f for r, f in zip(runs, first, strict=False)]
            ),
            switches=np.concatenate([r.switches for r in runs]),
            probe_s=np.concatenate([r.probe_s for r in runs]),
            probe_j=np.concatenate([r.probe_j for r in runs]),
            decide_s=[t for r in runs for t in r.decide_s],
            profile_passes=runs[0].profile_passes,
            trajectory=runs[0].trajectory,
            **records,
        )


def run_arm(
    system: System | Simulator,
    controller: Controller,
    *,
    seed: int,
    n_intervals: int,
    startup: int = 0,
    on_interval: Callable[[], None] = lambda: None,
    on_decision: Callable[[Decision], None] = lambda decision: None,
) -> ArmRun:
    """Run one arm for `startup` + `n_intervals` intervals, then let its requests finish.

    Args:
        system: A simulator (any batch) or a real system (batch 1), recording requests.
        controller: The arm; it is reset.
        seed: Names the conditions; the same for every arm that is compared.
        n_intervals: Steady-state intervals.
        startup: Intervals before, accounted for apart.
        on_interval: Called after every interval (progress).
        on_decision: Called with every decision.
    """
    steps = arm_steps(
        system, controller, seed=seed, n_intervals=n_intervals, startup=startup,
        on_decision=on_decision,
    )  # fmt: skip
    while True:
        try:
            next(steps)
        except StopIteration as end:
            run: ArmRun = end.value
            return run
        on_interval()


def arm_steps(
    system: System | Simulator,
    controller: Controller,
    *,
    seed: int,
    n_intervals: int,
    startup: int = 0,
    on_decision: Callable[[Decision], None] = lambda decision: None,
) -> Generator[None, None, ArmRun]:
    """As `run_arm`, pausing after every interval, so that arms can take turns; returns its run."""
    model = system.model
    state = system.reset(seed)
    batch, n_nodes = state.batch, model.profile.n_nodes
    controller.reset(model, batch)
    records = [IntervalRecord.zeros(batch, n_nodes) for _ in range(2)]
    switches = np.zeros(batch, dtype=np.int64)
    probe_s, probe_j = np.zeros(batch), np.zeros(batch)
    transmit_w = np.array([n.power.transmit_w for n in model.profile.nodes[:-1]])
    frame_s = np.array([h.frame_overhead_s for h in model.profile.hops])
    latencies: list[F64] = []
    rows: list[I64] = []
    decide_s: list[float] = []
    seen: list[tuple[I64, F64, float, float]] = []
    last, cuts = None, None
    steady_from_s = startup * model.scenario.interval_s

    def keep_latencies(done: Any) -> None:
        counts = ~done.lost & (done.arrival_s >= steady_from_s)
        latencies.append((done.completion_s - done.arrival_s)[counts])
        rows.append(done.env[counts])

    for t in range(startup + n_intervals):
        steady = t >= startup
        begin = time.thread_time()
        decision = controller.decide(state, last)
        elapsed = time.thread_time() - begin
        on_decision(decision)
        measured = state.bytes_per_s[0].copy()
        last = system.step(decision.cuts, decision.probe_bytes)
        state, record = last.state, last.record
        mean_s = record.latency_sum_s[0] / record.completed[0] if record.completed[0] else np.nan
        seen.append((decision.cuts[0].copy(), measured, float(state.in_flight[0]), float(mean_s)))
        records[steady].add(record)
        if steady:
            decide_s.append(elapsed)
            if cuts is not None:
                switches += (decision.cuts != cuts).any(axis=1)
            if decision.probe_bytes is not None:
                sent = decision.probe_bytes / np.maximum(state.bytes_per_s, 1.0)
                sent += frame_s * (decision.probe_bytes > 0)
                probe_s += sent.sum(axis=1)
                probe_j += sent @ transmit_w
        if last.completed is not None:
            keep_latencies(last.completed)
        cuts = decision.cuts.copy()
        yield
    end = system.drain_completed()
    if end.completed is not None:
        keep_latencies(end.completed)
    return ArmRun(
        name=controller.name,
        intervals=n_intervals,
        startup=records[0],
        steady=records[1],
        drained=end.record,
        latency_s=np.concatenate(latencies) if latencies else np.zeros(0),
        latency_row=np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64),
        switches=switches,
        probe_s=probe_s,
        probe_j=probe_j,
        decide_s=decide_s,
        profile_passes=_profile_passes(controller),
        trajectory=Trajectory(*(np.array(column) for column in zip(*seen, strict=True))),
    )


def _profile_passes(controller: Controller) -> int:
    if isinstance(controller, Static | Oracle):
        return 0
    return PAPER_PROFILE_PASSES if isinstance(controller, Paper) else PROFILE_PASSES


def startup_intervals(simulator: Simulator, seed: int) -> int:
    """Intervals until the reference's scheduler has started on every condition of the batch.

    10 s are added in which the queue that its probe splits left can run out.
    """
    paper = Paper()
    state, last, t = simulator.reset(seed), None, 0
    paper.reset(simulator.model, state.batch)
    while not paper.started.all() and t < MAX_STARTUP_INTERVALS:
        decision = paper.decide(state, last)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state, t = last.state, t + 1
    return t + int(np.ceil(SETTLE_S / simulator.model.scenario.interval_s))


def best_static_cuts(simulator: Simulator, *, seed: int, n_intervals: int, startup: int = 0) -> I64:
    """In hindsight, the candidate that costs least when held throughout; per condition, [B, H].

    Every candidate is run on the very conditions that `seed` names.
    """
    simulator.reset(seed)
    branches = Branches(simulator.model, simulator.record(startup + n_intervals))
    return branches.best_held(simulator.model.table.cuts, startup)


def per_row(run: ArmRun, model: CostModel) -> dict[str, F64]:
    """Per condition, [R] each: cost per arrived request; latency and energy per completed one."""
    spent = run.spent
    cost = Cost(model.profile, model.references, model.scenario)
    energy = cost.energy(spent)
    arrived = np.maximum(run.steady.arrived, 1)
    completed = np.maximum(spent.completed, 1)
    return {
        "cost": cost(spent, np.ones(run.rows)) / arrived,
        "latency_ms": 1e3 * spent.latency_sum_s / completed,
        "energy_edge_j": energy.edge_full_j / completed,
        "energy_total_j": energy.total_full_j / completed,
    }


def versus(run: ArmRun, other: ArmRun, model: CostModel) -> dict[str, Any]:
    """Paired differences run - other with 95 % intervals, and the ratio of their costs."""
    a, b = per_row(run, model), per_row(other, model)
    differences: dict[str, Any] = {name: bootstrap_mean(a[name] - b[name]) for name in a}
    differences["cost_ratio"] = paired_ratio(a["cost"], b["cost"])
    return differences


def summarise(
    runs: dict[str, ArmRun],
    model: CostModel,
    decide_us: dict[str, float],
    switch_ms: float = 0.0,
) -> dict[str, Any]:
    """Results of every arm as plain numbers, ready for JSON.

    Where the oracle takes part, `regret` is each arm's cost over the oracle's, pair by pair.

    Args:
        runs: Arms by name, `static` among them; all on the same conditions.
        model: The system's cost model.
        decide_us: Time of one decision per arm.
        switch_ms: What a switch interrupts. Every frame carries its plan, so none drains or stops
            anything: 0 unless a system measured otherwise.
    """
    results = {}
    for name, run in runs.items():
        result = _one(run, model, decide_us[name], switch_ms)
        result["versus_static"] = versus(run, runs["static"], model)
        result["versus"] = {
            o: versus(run, runs[o], model) for o in runs if o not in (name, "static")
        }
        if "oracle" in runs:
            result["regret"] = versus(run, runs["oracle"], model)["cost_ratio"]
        results[name] = result
    return results


def _one(run: ArmRun, model: CostModel, decide_us: float, switch_ms: float) -> dict[str, Any]:
    profile, interval_s = model.profile, model.scenario.interval_s
    cost = Cost(profile, model.references, model.scenario)
    spent, rows = run.spent, per_row(run, model)
    energy, steady = cost.energy(spent), cost.energy(run.steady)
    completed = max(int(spent.completed.sum()), 1)
    latency = 1e3 * run.latency_s if len(run.latency_s) else np.zeros(1)
    p50, p95, p99 = (float(x) for x in np.percentile(latency, [50, 95, 99]))
    edge = profile.nodes[0].power
    seconds = run.rows * run.intervals * interval_s
    # A battery also pays for the edge's idling between requests.
    active_j = steady.edge_full_j.sum() - edge.idle_w * run.steady.union_s.sum()
    edge_w = edge.idle_w + float(active_j) / max(seconds, 1e-9)
    pass_s = [sum(n.unit_s) for n in profile.nodes]
    pass_j = sum(t * n.power.compute_w for t, n in zip(pass_s, profile.nodes, strict=True))
    before = run.startup
    carried = int(before.arrived.sum() - before.completed.sum() - before.lost.sum())
    startup_cost = cost(run.startup, np.ones(run.rows))
    return {
        "latency_ms": {
            "mean": float(rows["latency_ms"].mean()),
            "p50": p50,
            "p95": p95,
            "p99": p99,
        },
        "energy_j": {
            "full": {
                "edge": float(energy.edge_full_j.sum()) / completed,
                "total": float(energy.total_full_j.sum()) / completed,
            },
            "compute": {
                "edge": float(energy.edge_compute_j.sum()) / completed,
                "total": float(energy.total_compute_j.sum()) / completed,
            },
        },
        "cost": float(rows["cost"].mean()),
        "requests": {
            "submitted": int(run.steady.arrived.sum()),
            "completed": int(spent.completed.sum()) - carried,
            "lost": int(spent.lost.sum()),
            "late": int(spent.late.sum()),
        },
        "switches": int(run.switches.sum()),
        "overhead": {
            # Nodes profile at the same time: the slowest sets the duration.
            "profile_s": run.profile_passes * max(pass_s),
            "probe_s": float(run.probe_s.mean()),
            "decide_us": decide_us,
            "switch_ms": switch_ms,
            "energy_j": float(run.profile_passes * pass_j + run.probe_j.mean()),
            "startup_cost": float(startup_cost.sum() / max(int(run.startup.arrived.sum()), 1)),
        },
        "battery_h": BATTERY_WH / edge_w,
        "ci95": {name: bootstrap_mean(values) for name, values in rows.items()},
    }
