"""From a scenario or a cluster file to running, profiled nodes as a system."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env.conditions import mean_delay_s, process_mean
from env.cost import References
from env.live import LiveSystem
from env.predict import CostModel, PlanTable
from env.scenario import Scenario
from executor.client import Client, RequestRecord
from executor.cluster import Cluster
from executor.errors import ConfigError
from executor.model import sample_input
from executor.modelref import model_label
from executor.networks import INPUT_SHAPE
from executor.plan import Plan, candidate_plans
from executor.profile import Profile
from executor.testbed import Testbed, TestbedHop, TestbedNode

__all__ = [
    "calibrate",
    "measure_profile",
    "not_valid",
    "open_cluster",
    "open_testbed",
    "random_inputs",
    "start_testbed",
]

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
INPUT_POOL = 8
MAX_OVERRUN_SHARE = 0.01
LEAST_SPREAD = 2.0  # longest stage over shortest, for a start to be told from a scale


def random_inputs(
    shape: tuple[int, ...] = INPUT_SHAPE, pool: int = INPUT_POOL
) -> Callable[[int], Any]:
    """A source of seeded random float32 inputs of a model's input shape, made once and cycled."""
    inputs = [sample_input(seed, shape) for seed in range(pool)]
    return lambda i: inputs[i % pool]


def not_valid(overrun_share: Mapping[str, float]) -> list[str]:
    """Why a run is not valid, a line for each such node (`LiveSystem.overrun_share`)."""
    return [
        f"not valid: {share:.1%} of {node}'s stages ended late (at most {MAX_OVERRUN_SHARE:.0%}); "
        "use a quieter machine or larger node ratios"
        for node, share in overrun_share.items()
        if share > MAX_OVERRUN_SHARE
    ]


def start_testbed(
    model: str,
    scenario: Scenario,
    weights: str = "none",
    transfers: Sequence[str] = (),
    isolation: str = "none",
) -> Testbed:
    """Start the scenario's nodes and hops on this machine, at their mean conditions, unloaded.

    Args:
        model: The model to run.
        scenario: Nodes and hops.
        weights: As `executor.model.build_chain`.
        transfers: Per hop, the form activations cross it in (`executor.codec`); float32 if empty.
        isolation: As `executor.testbed.Testbed` takes it.
    """
    forms = [*(transfers or ["float32"] * len(scenario.hops)), "float32"]
    testbed = Testbed(
        model,
        weights=weights,
        nodes=tuple(
            TestbedNode(n.name, n.ratio, n.device, transfer=form)
            for n, form in zip(scenario.nodes, forms, strict=True)
        ),
        hops=tuple(TestbedHop(process_mean(h.bandwidth), mean_delay_s(h)) for h in scenario.hops),
        isolation=isolation,
    )
    testbed.__enter__()
    return testbed


def spread(plans: Sequence[Plan], count: int) -> list[Plan]:
    """`count` plans spread evenly over a list, ends included."""
    index = np.unique(np.linspace(0, len(plans) - 1, min(count, len(plans))).round().astype(int))
    return [plans[i] for i in index]


def measure_profile(client: Client, repeats: int = 5) -> Profile:
    """The nodes' startup profile: units, hops, power."""
    return client.profile(repeats)


def calibrate(
    client: Client,
    profile: Profile,
    plans: Sequence[Plan],
    repeats: int = 3,
    report: Report = lambda what, done, total: None,
) -> Profile:
    """Fit what the profile cannot see, from a few requests run one at a time on idle nodes.

    Fits, per node, a scale of its unit times and a start that every stage takes (`fit_stages`); and
    from what is left of the latencies a further overhead per stage and one per frame: least squares
    over which stages and hops each plan used, not below 0.
    """
    source = random_inputs(profile.spec.input_shape)
    records: list[RequestRecord] = []
    for p, plan in enumerate(plans):
        for i in range(repeats + 1):
            record = client.submit(source(i), plan).result().record
            if i:
                records.append(record)
        report("calibrating", p + 1, len(plans))
    return fit_calibration(profile, records)


def fit_calibration(profile: Profile, records: Sequence[RequestRecord]) -> Profile:
    """The fit behind `calibrate`, from records of idle, unloaded nodes."""
    cuts = np.array([r.plan for r in records], dtype=np.int64)
    # On idle nodes the wall time of a stage is its work, and what it will take again.
    stages_s = np.array([r.stage_s for r in records])
    profile = fit_stages(profile, cuts, stages_s)
    table = PlanTable(profile, [Plan(r.plan) for r in records])
    n_nodes = profile.n_nodes
    used = (table.work_s > 0).astype(np.float64)
    transmit_s = np.array([r.transmit_s for r in records])
    rtt = np.array([h.rtt_s for h in profile.hops])
    reply = profile.spec.cut_bytes[-1] / np.array([h.bytes_per_s for h in profile.hops])
    known = stages_s.sum(axis=1) + transmit_s.sum(axis=1) + table.crossed @ (rtt + reply)
    rest = np.array([r.latency_s for r in records]) - known
    design = np.concatenate([used, table.crossed], axis=1)
    fitted = np.maximum(np.linalg.lstsq(design, rest, rcond=None)[0], 0.0)
    nodes = tuple(
        replace(node, stage_overhead_s=node.stage_overhead_s + float(fitted[k]))
        for k, node in enumerate(profile.nodes)
    )
    hops = tuple(
        replace(hop, frame_overhead_s=float(fitted[n_nodes + h]))
        for h, hop in enumerate(profile.hops)
    )
    return profile.with_changes(nodes=nodes, hops=hops)


def fit_stages(profile: Profile, cuts: NDArray[np.int64], work_s: NDArray[np.float64]) -> Profile:
    """Fit each node's unit times and stage overhead to the work its stages were measured to take.

    A stage takes the sum of its units, scaled, and a time that does not depend on them: units one
    by one are timed with warm caches and a call each, a stage starts cold and calls once. Least
    squares of measured over profiled, neither below 0; the scale alone where stages hardly differ.
    So mean times are met, as mean latencies ask for: errors relative to what was measured, or
    medians, would lean towards the quick stages.

    Args:
        profile: The profile to correct.
        cuts: [R, H] the plans of R requests.
        work_s: [R, N] unloaded compute seconds of each.
    """
    table = PlanTable(profile, [Plan(tuple(map(int, row))) for row in cuts])
    nodes = []
    for k, node in enumerate(profile.nodes):
        units_s = table.work_s[:, k] - node.stage_overhead_s - table.convert_s[:, k]
        took_s = work_s[:, k] - table.convert_s[:, k]
        fits = (units_s > 0) & (took_s > 0) & table.runs[:, k]
        scale, start_s = _line(units_s[fits], took_s[fits])
        unit_s = tuple(scale * t for t in node.unit_s)
        nodes.append(replace(node, unit_s=unit_s, stage_overhead_s=start_s))
    return profile.with_changes(nodes=tuple(nodes))


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """(slope, intercept), neither below 0, of least error relative to x; all x, y are positive."""
    if not len(x):
        return 1.0, 0.0
    ratio = y / x
    through_origin = float(np.mean(ratio))
    if x.max() < LEAST_SPREAD * x.min():
        return through_origin, 0.0
    design = np.stack([np.ones(len(x)), 1.0 / x], axis=1)
    slope, intercept = np.linalg.lstsq(design, ratio, rcond=None)[0]
    if slope <= 0.0 or intercept <= 0.0:
        return through_origin, 0.0
    return float(slope), float(intercept)


@contextmanager
def open_testbed(
    model_name: str,
    scenario: Scenario,
    profile: Profile | None = None,
    references: References | None = None,
    weights: str = "none",
    source: Callable[[int], Any] | None = None,
    transfers: Sequence[str] = (),
    isolation: str = "none",
) -> Iterator[LiveSystem]:
    """The scenario's nodes on this machine, playing its conditions.

    Args:
        model_name: The model to run.
        scenario: Nodes, hops, processes, arrivals.
        profile: Used as it is; measured and calibrated when None.
        references: Units of the cost; from the profile when None.
        weights: As `executor.model.build_chain`.
        source: Inputs; seeded random ones when None.
        transfers: As `start_testbed`; those of the profile, where one is given.
        isolation: As `executor.testbed.Testbed` takes it.
    """
    if profile is not None:
        transfers = profile.transfers
    testbed = start_testbed(model_name, scenario, weights, transfers, isolation)
    try:
        client = testbed.client()
        try:
            if profile is None:
                profile = measure_profile(client)
                plans = candidate_plans(profile.spec, profile.n_nodes)
                profile = calibrate(client, profile, spread(plans, 8))
            model = CostModel(profile, scenario, references)
            system = LiveSystem(
                model, client, source or random_inputs(profile.spec.input_shape), testbed
            )
            try:
                yield system
            finally:
                system.close()
        finally:
            client.close()
    finally:
        testbed.close()


@contextmanager
def open_cluster(
    path: Path,
    model_name: str,
    scenario: Scenario,
    source: Callable[[int], Any] | None = None,
    references: References | None = None,
) -> Iterator[LiveSystem]:
    """The nodes a cluster file names, already running; conditions are what they are.

    Raises:
        ConfigError: The file is unreadable, or names another model or number of nodes.
        HandshakeError: A node does not answer or holds other weights.
    """
    cluster = Cluster.load(path)
    if cluster.model_name != model_label(model_name):
        raise ConfigError(f"cluster {path} runs {cluster.model}, but --model is {model_name}")
    if len(cluster.nodes) != scenario.n_nodes:
        raise ConfigError(
            f"cluster {path} has {len(cluster.nodes)} nodes, the scenario {scenario.n_nodes}; "
            "give a --scenario with one [[nodes]] table per node"
        )
    client = Client(cluster, max_in_flight=scenario.max_in_flight)
    try:
        client.connect()
        profile = measure_profile(client)
        plans = candidate_plans(profile.spec, profile.n_nodes)
        profile = calibrate(client, profile, spread(plans, 8))
        system = LiveSystem(
            CostModel(profile, scenario, references, direct=cluster.direct_links),
            client,
            source or random_inputs(profile.spec.input_shape),
        )
        try:
            yield system
        finally:
            system.close()
    finally:
        client.close()
