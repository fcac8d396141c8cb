"""The simulator held against the testbed, cell by cell, as plain numbers.

`agents.sim_to_real` shows them. A cell is one plan at one bandwidth and one fraction of its own
capacity; the same arrivals come on both sides. It is simulated three times: with the profile taken
at the start; with that recalibrated, as in deployment, by the cells before; and with every node as
fast as it was in the cell itself. The last is no prediction: what is left there is the simulator's
own error, and what it takes off the first is that nodes were not as fast as when profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Static
from agents.arms.recalibrated import Recalibrated
from agents.nodes import not_valid, random_inputs, spread
from agents.studies.compare import ArmRun, run_arm
from env.conditions import BYTES_PER_S_PER_MBPS
from env.live import LiveSystem
from env.predict import CostModel, PlanTable
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from env.simulator import Simulator
from executor.client import Client
from executor.plan import Plan, candidate_plans
from executor.profile import Profile
from executor.testbed import Testbed

__all__ = [
    "MAX_IN_FLIGHT",
    "OTHER_PROFILES",
    "SEED",
    "Extent",
    "error",
    "lines",
    "measure",
    "summary",
]

IDLE, BUSY = 0.1, 0.7  # of the plan's own capacity
SEED = 42
MAX_IN_FLIGHT = 64
LEAST_MS = 1.0  # shorter stages and transfers are not judged in per cent
# Beside the profile of the start.
OTHER_PROFILES = {
    "recalibrated": "with the profile as recalibrated by the cells before",
    "corrected": "no prediction, with every node as fast as it was in the cell",
}


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        plans: Plans, spread evenly over the candidates.
        bandwidths_mbps: Of every hop.
        loads: Arrivals as fractions of the plan's own capacity.
        requests: Mean requests per cell.
        seconds: A cell lasts at most so long.
        repeats: Runs of a cell, one after the other; simulated is held against the first.
    """

    plans: int = 12
    bandwidths_mbps: tuple[float, ...] = (20.0, 60.0, 150.0)
    loads: tuple[float, ...] = (IDLE, BUSY)
    requests: int = 30
    seconds: float = 8.0
    repeats: int = 1


def constant_scenario(base: Scenario, mbps: float, episode_s: float) -> Scenario:
    """`base` with every hop at `mbps`, nodes unloaded and Poisson arrivals of constant rate."""
    return base.replace(
        nodes=tuple(NodeSetup(n.name, n.device, n.ratio) for n in base.nodes),
        hops=tuple(HopSetup(Process(levels=(mbps,)), h.one_way_delay_s) for h in base.hops),
        arrivals=Process(),
        max_in_flight=MAX_IN_FLIGHT,
        episode_s=episode_s,
    )


def capacity_rps(profile: Profile, plan: Plan, mbps: float) -> float:
    """Requests/s at which the plan's slowest station saturates."""
    table = PlanTable(profile, [plan])
    hop_s = float(table.hop_bytes.max()) / (mbps * BYTES_PER_S_PER_MBPS)
    return 1.0 / max(float(table.work_s.max()), hop_s)


def measure(
    testbed: Testbed,
    client: Client,
    profile: Profile,
    base: Scenario,
    extent: Extent,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row per cell, as plain numbers, and the share of each node's stages that ended late.

    Args:
        testbed: Running nodes, unloaded.
        client: Connected to them.
        profile: Measured there.
        base: Nodes and delays.
        extent: How much.
        tell: Called after each cell with how many are done, and of how many.
    """
    plans = spread(candidate_plans(profile.spec, profile.n_nodes), extent.plans)
    source = random_inputs(profile.spec.input_shape)
    total = len(plans) * len(extent.bandwidths_mbps) * len(extent.loads)
    rows: list[dict[str, Any]] = []
    # Simulated hops take what pings took, the handling of a frame included.
    pinged = base.replace(
        hops=tuple(
            replace(setup, one_way_delay_s=hop.rtt_s / 2.0)
            for setup, hop in zip(base.hops, profile.hops, strict=True)
        )
    )
    recalibrated = profile
    overruns: dict[str, float] = {}
    for mbps in extent.bandwidths_mbps:
        for load in extent.loads:
            for plan in plans:
                rate = load * capacity_rps(profile, plan, mbps)
                # At least one request is expected per cell, however slow the plan.
                steps = int(np.ceil(max(min(extent.requests / rate, extent.seconds), 1.0)))
                rate = max(rate, 1.0 / steps)
                model = CostModel(profile, constant_scenario(base, mbps, float(steps)))
                arm = Static("plan", plan)
                runs: list[ArmRun] = []
                slowness: list[float] = []  # in the first of them
                believed = CostModel(recalibrated, model.scenario, model.references)
                learning = Recalibrated(arm, believed)
                # One that does not count: the first after another plan finds its weights cold.
                client.submit(source(0), plan).result()
                for _ in range(extent.repeats):
                    live = LiveSystem(model, client, source, testbed, rate)
                    try:
                        runs.append(run_arm(live, learning, seed=SEED, n_intervals=steps))
                        overruns = live.overrun_share()
                        slowness = slowness or live.slowness().tolist()
                    finally:
                        live.close()
                scenario = constant_scenario(pinged, mbps, float(steps))
                known = {
                    "simulated": profile,
                    "recalibrated": recalibrated,
                    "corrected": profile.scaled(slowness),
                }
                virtual = {
                    name: _simulated(CostModel(p, scenario), arm, rate, steps)
                    for name, p in known.items()
                }
                recalibrated = believed.profile
                if all(len(run.latency_s) for run in (*runs, *virtual.values())):
                    rows.append(
                        {
                            "mbps": mbps,
                            "load": load,
                            "plan": list(plan.cuts),
                            "requests": len(runs[0].latency_s),
                            "measured": _figures(runs[0]),
                            "again": [_figures(run) for run in runs[1:]],
                            **{name: _figures(run) for name, run in virtual.items()},
                        }
                    )
                tell(len(rows), total)
    return rows, overruns


def _simulated(model: CostModel, arm: Static, rate_rps: float, steps: int) -> ArmRun:
    simulator = Simulator(model, 1, SEED, rate_rps=rate_rps, record_requests=True)
    return run_arm(simulator, arm, seed=SEED, n_intervals=steps)


def _figures(run: ArmRun) -> dict[str, Any]:
    """Latency, and per completed request the time in each node and on each hop; all ms."""
    spent, done = run.spent, max(int(run.spent.completed.sum()), 1)

    def each(total_s: NDArray[np.float64]) -> list[float]:
        mean: list[float] = (1e3 * total_s.sum(axis=0) / done).tolist()
        return mean

    return {
        "mean_ms": 1e3 * float(run.latency_s.mean()),
        "p95_ms": 1e3 * float(np.percentile(run.latency_s, 95)),
        "node_ms": each(spent.node_busy_s),
        "hop_ms": each(spent.hop_transmit_s),
    }


def error(row: dict[str, Any], what: str, which: str = "simulated") -> float:
    """Simulated over measured, less 1; `which`: or one of `OTHER_PROFILES`."""
    return float(row[which][what] / row["measured"][what] - 1.0)


def summary(rows: Sequence[dict[str, Any]], nodes: Sequence[str]) -> dict[str, Any]:
    """Mean absolute percentage errors: of mean and p95 latency, per node and per hop.

    A node or hop counts in the cells where it took at least 1 ms; None where there are none.
    `recalibrated` has those of latency with the profile as corrected by the cells before, and
    `corrected` with every node as fast as it was in the cell. Where
    cells were measured again, `again` is by how much that differs from the first time: what no
    prediction can be better than, but by luck.

    Args:
        rows: The cells.
        nodes: The nodes' names.
    """
    hops = [f"{a} - {b}" for a, b in pairwise(nodes)]

    def parts(key: str, names: Sequence[str]) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for k, name in enumerate(names):
            pairs = [(r["simulated"][key][k], r["measured"][key][k]) for r in rows]
            errors = [abs(s / m - 1.0) for s, m in pairs if m >= LEAST_MS]
            out[name] = float(np.mean(errors)) if errors else None
        return out

    again = {
        name: [
            abs(x[f"{name}_ms"] / r["measured"][f"{name}_ms"] - 1.0)
            for r in rows
            for x in r["again"]
        ]
        for name in ("mean", "p95")
    }
    return {
        "again": {name: float(np.mean(found)) if found else None for name, found in again.items()},
        "mape": {
            "mean": float(np.mean([abs(error(r, "mean_ms")) for r in rows])),
            "p95": float(np.mean([abs(error(r, "p95_ms")) for r in rows])),
            "nodes": parts("node_ms", nodes),
            "hops": parts("hop_ms", hops),
        },
        **{
            which: {
                name: float(np.mean([abs(error(r, f"{name}_ms", which)) for r in rows]))
                for name in ("mean", "p95")
            }
            for which in OTHER_PROFILES
        },
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The summary in words."""
    mape = result["mape"]
    parts = {**mape["nodes"], **mape["hops"]}
    each = ", ".join(f"{k} {'-' if v is None else f'{v:.1%}'}" for k, v in parts.items())
    found = [
        f"mean absolute percentage error over {len(result['rows'])} cells: mean latency "
        f"{mape['mean']:.1%}, p95 {mape['p95']:.1%}",
        f"in nodes and on hops: {each}",
        *(
            f"{what}: mean latency {result[which]['mean']:.1%}, p95 {result[which]['p95']:.1%}"
            for which, what in OTHER_PROFILES.items()
        ),
    ]
    again = result["again"]
    if again["mean"] is not None:
        found.append(
            f"the nodes beside themselves, the same cells measured again: mean latency "
            f"{again['mean']:.1%}, p95 {again['p95']:.1%}"
        )
    return found + not_valid(result["overrun_share"])
