"""Edges that share a fog and a cloud, against the event-by-event simulation and single chains."""

from dataclasses import fields

import numpy as np
import pytest
from event_simulation import Reference, lately_of
from toy_chain import random_cuts, toy_profile, toy_scenario

from env.conditions import Conditions
from env.cost import IntervalRecord
from env.predict import CostModel
from env.scenario import HopSetup, Process
from env.sharing import CrowdConditions, SharingSimulator
from env.simulator import Simulator
from executor.errors import ConfigError

STATIONS, HOPS = 10, 5  # of one edge in the reference: even, and more than a chain of 3 has


def crowd(edges, groups, seed, interval_s, steps, probing=False, n_nodes=3, **changes):
    scenario = toy_scenario(n_nodes, interval_s=interval_s, rate_rps=4.0, **changes)
    model = CostModel(toy_profile(n_nodes), scenario)
    batch = edges * groups
    source = Conditions(scenario, np.full(batch, 4.0), seed)
    sim = SharingSimulator(model, edges, source, record_requests=True)
    sim.reset(seed)
    rng = np.random.default_rng(seed)
    results = []
    for k in range(steps):
        if k % 3 == 0:
            cuts = random_cuts(rng, batch, n_nodes - 1)
        probes = np.where(rng.random(cuts.shape) < 0.3, 30_000.0, 0.0) if probing else None
        results.append(sim.step(cuts, probes))
    return sim, model, results, sim.drain_completed()


def event_by_event(model, seed, edges, groups, steps):
    """Per group: the reference, and a function that makes an edge's request for it."""
    batch = edges * groups
    conditions = CrowdConditions(Conditions(model.scenario, np.full(batch, 4.0), seed), edges)
    intervals = [conditions.next() for _ in range(steps)]
    played = [*intervals, lately_of(intervals, model.scenario)]
    speed = np.concatenate([c.node_speed for c in played], axis=2)
    hop = np.concatenate([c.hop_bytes_per_s for c in played], axis=2)
    for g in range(groups):
        rates = [[1.0]] * (STATIONS * edges)
        delays = [[0.0]] * (HOPS * edges)
        for e in range(edges):
            for k in range(3):
                rates[STATIONS * e + 2 * k] = list(speed[g * edges + e, k])
            for h in range(2):
                rates[STATIONS * e + 2 * h + 1] = list(hop[g * edges + e, h])
                delays[HOPS * e + h] = [model.scenario.hops[h].one_way_delay_s]
        reference = Reference(model.profile, model.scenario, rates, conditions.substep_s, delays)

        def request(e, arrival_s, cuts, reference=reference):
            """The fog and what is behind it are the first edge's."""
            item = reference.request(arrival_s, cuts)
            item.route = [(s + STATIONS * e if s < 2 else s, w, o) for s, w, o in item.route]
            item.back = [h + HOPS * e if h < 1 else h for h in item.back]
            return item

        yield g, reference, request


@pytest.mark.parametrize("edges", [2, 5])
@pytest.mark.parametrize(("interval_s", "steps"), [(1.0, 15), (0.2, 50)])
def test_equals_event_by_event(edges, interval_s, steps):
    groups, seed = 2, 7
    _, model, results, drained = crowd(edges, groups, seed, interval_s, steps)
    checked = waited = 0
    energy = Reference.work_done
    for g, reference, request in event_by_event(model, seed, edges, groups, steps):
        mine = [
            (c, i)
            for c in [r.completed for r in [*results, drained]]
            for i in np.flatnonzero(c.env // edges == g)
            if c.work_s[i].sum() > 0
        ]
        items = [request(c.env[i] % edges, c.arrival_s[i], tuple(c.cuts[i])) for c, i in mine]
        reference.run(items)
        for (c, i), item in zip(mine, items, strict=True):
            if c.lost[i]:
                continue
            assert c.completion_s[i] == pytest.approx(item.completion_s, abs=1e-6)
            checked += 1
        # The queue of the fog at every interval's end, and what it has worked by then.
        for k, result in enumerate(results):
            now = (k + 1) * interval_s
            here = [x for x in items if 2 in x.service and x.service[2][0] <= now]
            backlog = 0.0
            for item in here:
                _, start, end = item.service[2]
                work = next(w for s, w, _ in item.route if s == 2)
                backlog += work * (start > now)
                if start <= now < end:
                    backlog += energy(reference, 2, now, end)
                waited += item.service[2][1] > item.service[2][0]
            rows = slice(g * edges, (g + 1) * edges)
            assert result.state.node_backlog_s[rows, 1] == pytest.approx(backlog, abs=1e-6)
            spent = sum(
                energy(reference, 2, max(start, now - interval_s), min(end, now))
                for _, start, end in (x.service[2] for x in here)
            )
            assert result.record.node_active_s[rows, 1].sum() == pytest.approx(spent, abs=1e-6)
    assert checked > 100 and waited > 50


@pytest.mark.parametrize("probing", [False, True])
def test_one_edge_is_the_simulator(probing):
    """To the last bit: states, records and requests."""
    scenario = toy_scenario(3, rate_rps=4.0)
    model = CostModel(toy_profile(3), scenario)
    sims = [
        make(Conditions(scenario, np.full(6, 4.0), 3))
        for make in (
            lambda c: SharingSimulator(model, 1, c, record_requests=True),
            lambda c: Simulator(model, 6, 3, record_requests=True, conditions=c),
        )
    ]
    for sim in sims:
        sim.reset(3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        cuts = random_cuts(rng, 6, 2)
        probes = np.where(rng.random(cuts.shape) < 0.3, 30_000.0, 0.0) if probing else None
        compare(*(sim.step(cuts, probes) for sim in sims))
    compare(*(sim.drain_completed() for sim in sims))


def compare(one, other):
    for part in ("state", "record", "completed"):
        a, b = getattr(one, part), getattr(other, part)
        for f in fields(a):
            np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), f.name)


def test_all_edges_of_a_group_see_the_same_and_pay_in_equal_parts():
    edges = 4
    hop = HopSetup(Process("markov", (60.0, 200.0), dwell_s=3.0, sigma=0.3, minimum=20.0), 0.004)
    _, _, results, drained = crowd(edges, 3, 1, 1.0, 20, probing=True, hops=(hop, hop))
    total = IntervalRecord.zeros(12, 3)
    for result in [*results, drained]:
        state, record = result.state, result.record
        total.add(record)
        for shared in (
            state.bytes_per_s[:, 1],
            state.bandwidth_age_s[:, 1],
            state.hop_backlog_bytes[:, 1],
            state.node_backlog_s[:, 1],
            state.node_backlog_s[:, 2],
            record.node_active_s[:, 2],
            record.hop_transmit_s[:, 1],
        ):
            by_group = shared.reshape(3, edges)
            assert (by_group == by_group[:, :1]).all()
    assert len(np.unique(results[-1].state.bytes_per_s[:, 0])) == 12
    work = sum(r.completed.work_s[~r.completed.lost].sum(axis=0) for r in [*results, drained])
    # Those given up would have worked, too.
    assert not drained.completed.lost.any()
    assert total.node_active_s.sum(axis=0) == pytest.approx(work)
    assert (total.arrived == total.completed + total.lost).all()


def test_a_shared_hop_gets_one_probe_at_a_time():
    scenario = toy_scenario(3, rate_rps=0.001)
    model = CostModel(toy_profile(3), scenario)
    sim = SharingSimulator(model, 3, Conditions(scenario, np.full(3, 1e-3), 0))
    asked = np.array([[0.0, 20_000.0], [0.0, 30_000.0], [0.0, 10_000.0]])
    record = sim.step(np.full((3, 2), 6), asked).record
    for _ in range(20):  # an outage may hold it up
        record.add(sim.step(np.full((3, 2), 6)).record)
    state = sim.step(np.full((3, 2), 6)).state
    rate, age_s = state.bytes_per_s, state.bandwidth_age_s
    assert (age_s[:, 1] < sim.time_s).all() and age_s[:, 0] == pytest.approx(sim.time_s)
    assert record.hop_transmit_s[:, 0].sum() == 0
    sent = record.hop_transmit_s[:, 1].sum() * rate[0, 1]
    assert sent == pytest.approx(30_000.0)


def test_what_cannot_be_shared():
    scenario = toy_scenario(3)
    model = CostModel(toy_profile(3), scenario)
    with pytest.raises(ConfigError, match="4 environments do not divide into groups of 3"):
        SharingSimulator(model, 3, Conditions(scenario, np.full(4, 1.0), 0))
    late = CostModel(toy_profile(3), toy_scenario(3, late_binding=True))
    with pytest.raises(ConfigError, match="late binding"):
        SharingSimulator(late, 2, Conditions(scenario, np.full(4, 1.0), 0))
    sim = SharingSimulator(model, 2, Conditions(scenario, np.full(4, 1.0), 0))
    with pytest.raises(ConfigError, match="share a fog"):
        sim.restore(sim.snapshot(), np.arange(4))
