"""One size of crowd: edges that share a fog and a cloud, under every arm, and what is told of them.

The edges decide once a second; the simulator goes in steps of a fifth (as often as 200 clients hear
a node's STATUS), so that they can do so at moments of their own (`agents.arms.staggered`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import ArmContext, Controller, Glancing, Static, make_arm
from agents.arms.runtime import Checkpoint
from agents.arms.staggered import CountingOthers, Staggered
from agents.paired import paired_ratio
from agents.studies.compare import ArmRun, per_row, run_arm
from env.cost import Cost
from env.grid import GridConditions
from env.predict import CostModel
from env.scenario import HopSetup, Scenario
from env.sharing import SharingSimulator
from env.state import SystemState
from env.system import StepResult
from executor.profile import Profile

__all__ = ["INTERVAL_S", "LEAST_ROWS", "STEP_S", "Crowd", "crowd_model"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SEED = 9000
STEP_S, INTERVAL_S = 0.2, 1.0
STEPS = round(INTERVAL_S / STEP_S)
LEAST_ROWS = 24  # small crowds run under more conditions
ROWS_AT_ONCE = 2000  # of the search for the best static plan


def crowd_model(profile: Profile, rate: float, interval_s: float, factor: int = 1) -> CostModel:
    """The cost model of one edge of a crowd, in the default scenario.

    Args:
        profile: Of the default scenario's three nodes.
        rate: Requests of an edge, as a fraction of what it can do by itself at its usual load.
        interval_s: Time between its decisions, or the simulator's step.
        factor: So many times faster are fog, cloud and the hop between them; a joule does there
            what it did.
    """
    scenario = Scenario.load().replace(interval_s=interval_s)
    edge = CostModel(profile, scenario)
    alone = edge.demand[0, 0, [p.cuts[0] == profile.spec.n_units for p in edge.plans]].item()
    free = 1.0 - float(np.mean(scenario.nodes[0].load.levels))
    scenario = scenario.replace(rate_rps=rate * free / alone)
    if factor == 1:
        return CostModel(profile, scenario)
    first, *others = profile.nodes
    grown = [
        replace(
            node,
            unit_s=tuple(t / factor for t in node.unit_s),
            stage_overhead_s=node.stage_overhead_s / factor,
            power=replace(
                node.power,
                compute_w=node.power.compute_w * factor,
                transmit_w=node.power.transmit_w * factor,
            ),
        )
        for node in others
    ]
    hops = [replace(h, bytes_per_s=h.bytes_per_s * factor) for h in profile.hops[1:]]
    setups = [HopSetup(h.bandwidth.scaled(factor), h.one_way_delay_s) for h in scenario.hops[1:]]
    return CostModel(
        replace(profile, nodes=(first, *grown), hops=(profile.hops[0], *hops)),
        scenario.replace(hops=(scenario.hops[0], *setups)),
    )


class _Watched(SharingSimulator):
    """Keeps, step by step, how busy each group's fog was and who sent its requests away."""

    def reset(self, seed: int | None = None) -> SystemState:
        """As `Simulator.reset`."""
        self.fog_busy: list[F64] = []  # [G] share of the step
        self.leaving: list[F64] = []  # [G] share of the edges
        return super().reset(seed)

    def step(self, cuts: I64, probe_bytes: F64 | None = None) -> StepResult:
        """As `SharingSimulator.step`."""
        result = super().step(cuts, probe_bytes)
        busy_s = result.record.node_busy_s[:, 1].reshape(-1, self.edges).sum(axis=1)
        self.fog_busy.append(busy_s / self.model.scenario.interval_s)
        away = cuts[:, 0] < self.model.profile.spec.n_units
        self.leaving.append(away.reshape(-1, self.edges).mean(axis=1))
        return result


class Crowd:
    """One size of crowd, and what the arms did in it.

    Args:
        slow: The cost model edges decide with.
        fast: The simulator's: the same in its shorter steps.
        edges: Edges per group E.
        seeds: Groups, at least; enough for `LEAST_ROWS` edges are made.
        seconds: Length of the steady state.
        startup_s: Before it, left out.

    Attributes:
        rows: What each arm did, by its name and by when its edges decide.
    """

    def __init__(
        self,
        slow: CostModel,
        fast: CostModel,
        edges: int,
        seeds: int,
        seconds: int,
        startup_s: int,
    ) -> None:
        self.slow, self.fast, self.edges = slow, fast, edges
        self.seconds, self.startup_s = seconds, startup_s
        self.groups = max(seeds, -(-LEAST_ROWS // edges))
        self.batch = self.groups * edges
        self.phase = np.random.default_rng([SEED, edges]).integers(STEPS, size=self.batch)
        self.rows: list[dict[str, Any]] = []
        self._cost: dict[tuple[str, str], F64] = {}

    def run(self, arm: str, checkpoint: Checkpoint | None) -> None:
        """Run an arm; one that adapts, in every way of `_ways` that it can."""
        context = ArmContext(self.slow, checkpoint, self._best_static)
        first = make_arm(arm, context)
        if isinstance(first, Static):
            self._keep(arm, "", self._run(first), [])
            return
        for when, model, phase, steps in self._ways(isinstance(first, Glancing)):
            controller = Staggered(arm, lambda: make_arm(arm, context), model, phase, steps)
            counting = CountingOthers(controller, lambda: self._system.others_busy)
            run = self._run(counting if when.endswith("counting") else controller)
            self._keep(arm, when, run, controller.decide_s)

    def _ways(self, glancing: bool) -> list[tuple[str, CostModel, I64, int]]:
        """When edges decide: in words, with which model, at which phase, every so many steps.

        A step is so short that deciding at each stands for deciding for each request.
        """
        together = np.zeros(self.batch, dtype=np.int64)
        ways = [("at once", self.slow, together, STEPS)]
        if self.edges > 1:
            ways.append(("staggered", self.slow, self.phase, STEPS))
        if glancing:
            ways.append(("per request", self.fast, together, 1))
            if self.edges > 1:
                ways.append(("counting", self.fast, together, 1))
        return ways

    def results(self) -> dict[str, Any]:
        """Plain numbers: the arms' rows, costs over the best static plan's where that ran."""
        best = self._cost.get(("best-static", ""))
        for row in self.rows:
            if best is not None:
                own = self._cost[row["arm"], row["decides"]]
                row["ratio"] = paired_ratio(own, best)
        return {
            "edges": self.edges,
            "groups": self.groups,
            "rate_rps": self.slow.rate_rps(),
            "plans": len(self.slow.plans),
            "arms": self.rows,
        }

    def _source(self, model: CostModel) -> GridConditions:
        return GridConditions(model.scenario, np.full(self.batch, model.rate_rps()), SEED)

    def _run(self, controller: Controller) -> ArmRun:
        self._system = _Watched(
            self.fast, self.edges, self._source(self.fast), record_requests=True
        )
        return run_arm(
            self._system,
            controller,
            seed=SEED,
            n_intervals=self.seconds * STEPS,
            startup=self.startup_s * STEPS,
        )

    def _best_static(self) -> I64:
        """Per group the one plan that, held by all its edges, costs least in hindsight, [B, H].

        Found in steps of a second, in which every candidate is tried on the same conditions.
        """
        drawn = SharingSimulator(self.slow, self.edges, self._source(self.slow))
        drawn.reset(SEED)
        tape = drawn.record(self.startup_s + self.seconds)
        cost = Cost(self.slow.profile, self.slow.references, self.slow.scenario)
        plans = self.slow.table.cuts
        totals = []
        for some in np.array_split(plans, -(-len(plans) * self.batch // ROWS_AT_ONCE)):
            if not len(some):
                continue
            index = np.tile(np.arange(self.batch), len(some))
            every = SharingSimulator(self.slow, self.edges, tape.play(index), record_requests=True)
            arm = Static("candidates", np.repeat(some, self.batch, axis=0))
            run = run_arm(every, arm, seed=SEED, n_intervals=self.seconds, startup=self.startup_s)
            paid = cost(run.spent, np.ones(run.rows))
            totals.append(paid.reshape(len(some), self.groups, self.edges).sum(axis=2))
        best: I64 = plans[np.concatenate(totals).argmin(axis=0)]
        return np.repeat(best, self.edges, axis=0)

    def _keep(self, arm: str, when: str, run: ArmRun, decide_s: list[float]) -> None:
        rows = per_row(run, self.fast)
        arrived = self._by_group(run.steady.arrived.astype(np.float64))
        paid = (self._by_group(rows["cost"]) * arrived).sum(axis=1)
        cost = paid / np.maximum(arrived.sum(axis=1), 1.0)
        self._cost[arm, when] = cost
        spent = run.spent
        energy = Cost(self.fast.profile, self.fast.references, self.fast.scenario).energy(spent)
        completed, submitted = max(int(spent.completed.sum()), 1), int(run.steady.arrived.sum())
        served = np.bincount(run.latency_row, minlength=run.rows)
        all_of_none = np.ones(run.rows)
        share = np.divide(served, run.steady.arrived, out=all_of_none, where=run.steady.arrived > 0)
        share = self._by_group(share)
        least, most = share.min(axis=1), share.max(axis=1)
        p50, p95 = np.percentile(run.latency_s, [50, 95]) if len(run.latency_s) else (0.0, 0.0)
        decide_us = 1e6 * np.array(decide_s or [0.0])
        self.rows.append(
            {
                "arm": arm,
                "decides": when,
                "cost": float(cost.mean()),
                "latency_s": {"p50": float(p50), "p95": float(p95)},
                "edge_j": float(energy.edge_full_j.sum()) / completed,
                "total_j": float(energy.total_full_j.sum()) / completed,
                "lost": 1.0 - int(served.sum()) / submitted if submitted else 0.0,
                "late": float((run.latency_s > self.fast.references.deadline_s).mean())
                if len(run.latency_s)
                else 0.0,
                "served": {
                    "least": float(least.mean()),
                    "most": float(most.mean()),
                    "ratio": float((most / least).mean()) if (least > 0).all() else None,
                },
                "switches_per_min": float(run.switches.mean()) * 60.0 / self.seconds,
                "fog_busy": _moves(self._by_second(self._system.fog_busy)),
                "leaving": _moves(self._by_second(self._system.leaving)),
                "decide_us": {
                    "p50": float(np.median(decide_us)),
                    "p99": float(np.percentile(decide_us, 99)),
                },
            }
        )

    def _by_group(self, values: F64) -> F64:
        return values.reshape(self.groups, self.edges)

    def _by_second(self, steps: list[F64]) -> F64:
        """Means over the seconds of the steady state, [seconds, G]."""
        steady = np.array(steps[self.startup_s * STEPS :])
        means: F64 = steady.reshape(self.seconds, STEPS, self.groups).mean(axis=1)
        return means


def _moves(series: F64) -> dict[str, float]:
    """Mean, deviation over time, and mean step from second to second, of [seconds, G]."""
    steps = np.abs(np.diff(series, axis=0)).mean() if len(series) > 1 else 0.0
    return {
        "mean": float(series.mean()),
        "deviation": float(series.std(axis=0).mean()),
        "step": float(steps),
    }
