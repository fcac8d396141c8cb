"""The simulator against a plain event-by-event one, and the laws its records must obey."""

from itertools import pairwise

import numpy as np
import pytest
from event_simulation import (
    Item,
    Reference,
    first_rate,
    lately_of,
    measured_rate,
    overlap,
    union,
)
from toy_chain import SLOWEST_MBPS, SPEC, constant_scenario, random_cuts, toy_profile, toy_scenario

from env.conditions import Conditions
from env.cost import Cost, IntervalRecord
from env.predict import CostModel
from env.scenario import HopSetup, Process
from env.simulator import Simulator
from env.system import DRAIN_DEADLINES
from executor.errors import ConfigError
from executor.link import MIN_FRAME_BYTES


def rollout(n_nodes, seed, interval_s, steps, batch=4, probing=False, hold=4, **changes):
    """Run the simulator under random plans; everything needed to check it."""
    scenario = toy_scenario(n_nodes, interval_s=interval_s, **changes)
    model = CostModel(toy_profile(n_nodes), scenario)
    sim = Simulator(model, batch, seed, record_requests=True)
    rng = np.random.default_rng(seed + 1)
    results, plans, probes = [], [], []
    cuts = random_cuts(rng, batch, n_nodes - 1)
    for k in range(steps):
        if k % hold == 0:
            cuts = random_cuts(rng, batch, n_nodes - 1)
        sent = np.where(rng.random(cuts.shape) < 0.2, rng.choice([3000.0, 65536.0]), 0.0)
        plans.append(cuts)
        probes.append(sent if probing else np.zeros(cuts.shape))
        results.append(sim.step(cuts, probes[-1] if probing else None))
    drained = sim.drain_completed()
    return sim, model, results, drained, plans, probes


def conditions_of(scenario, rate, seed, steps):
    conditions = Conditions(scenario, rate, seed)
    return conditions, [conditions.next() for _ in range(steps)]


def references(sim, model, results, drained, seed, probes):
    """Per environment: the reference after running the simulator's accepted requests, and rows."""
    scenario, steps = model.scenario, len(results)
    conditions, intervals = conditions_of(scenario, sim.n_ref, seed, steps)
    lately = lately_of(intervals, scenario)
    speed = np.concatenate([c.node_speed for c in [*intervals, lately]], axis=2)
    hop = np.concatenate([c.hop_bytes_per_s for c in [*intervals, lately]], axis=2)
    done = [r.completed for r in [*results, drained]]
    for b in range(sim.batch):
        rates = [None] * (2 * len(hop[0]) + 1)
        rates[0::2], rates[1::2] = [list(s) for s in speed[b]], [list(h) for h in hop[b]]
        delays = np.concatenate([c.hop_delay_s[b] for c in [*intervals, lately]], axis=1)
        reference = Reference(model.profile, scenario, rates, conditions.substep_s, delays)
        rows = [(c, i) for c in done for i in np.flatnonzero(c.env == b)]
        kept = [(c, i) for c, i in rows if not (c.lost[i] and c.work_s[i].sum() == 0)]
        items = [reference.request(c.arrival_s[i], tuple(c.cuts[i])) for c, i in kept]
        sent = []
        for k, sizes in enumerate(probes):
            for h in np.flatnonzero(sizes[b]):
                sent.append(Item(k * scenario.interval_s, [(2 * h + 1, sizes[b, h], 0.0)]))
        yield b, reference, kept, items, sent, intervals


@pytest.mark.parametrize("n_nodes", [2, 3, 4])
@pytest.mark.parametrize(("interval_s", "steps"), [(1.0, 20), (0.2, 50), (2.5, 10)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_event_by_event(n_nodes, interval_s, steps, seed):
    sim, model, results, drained, _, _ = rollout(n_nodes, seed, interval_s, steps)
    end = steps * interval_s + DRAIN_DEADLINES * model.references.deadline_s
    checked = overtaken = 0
    for b, reference, rows, items, _, intervals in references(
        sim, model, results, drained, seed, []
    ):
        reference.run(items)
        for (c, i), item in zip(rows, items, strict=True):
            if c.lost[i]:  # given up in the drain
                assert not item.completion_s <= end
                continue
            assert c.completion_s[i] == pytest.approx(item.completion_s, abs=1e-6)
            for k in range(n_nodes):
                _, start, stop = item.service.get(2 * k, (0, 0, 0))
                assert c.stage_s[i, k] == pytest.approx(stop - start, abs=1e-6)
                work = dict((s, w) for s, w, _ in item.route).get(2 * k, 0.0)
                assert c.work_s[i, k] == pytest.approx(work, abs=1e-12)
            for h in range(n_nodes - 1):
                _, start, stop = item.service.get(2 * h + 1, (0, 0, 0))
                assert c.transmit_s[i, h] == pytest.approx(stop - start, abs=1e-6)
            checked += 1
        order = sorted(items, key=lambda x: x.arrival_s)
        ends = [x.completion_s for x in order if np.isfinite(x.completion_s)]
        overtaken += sum(a > b for a, b in pairwise(ends))
        check_records(b, reference, model, results, items, intervals)
    assert checked > 50 and overtaken > 0


@pytest.mark.parametrize(("interval_s", "substep_s", "steps"), [(1.0, 0.1, 20), (0.2, 0.2, 60)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_event_by_event_when_delays_vary(interval_s, substep_s, steps, seed):
    # Fast hops, or their service would hide the propagation.
    fast = Process("markov", (40.0, 200.0), dwell_s=3.0)
    delay = Process("markov", (0.01, 0.3, 0.8), dwell_s=0.6, sigma=0.4, correlation_s=0.3)
    hops = (HopSetup(fast, delay), HopSetup(fast, 0.004))
    sim, model, results, drained, _, _ = rollout(
        3, seed, interval_s, steps, substep_s=substep_s, hops=hops, rate_rps=4.0
    )
    checked = waited = 0
    for b, reference, rows, items, _, intervals in references(
        sim, model, results, drained, seed, []
    ):
        reference.run(items)
        for (c, i), item in zip(rows, items, strict=True):
            if c.lost[i]:
                continue
            assert c.completion_s[i] == pytest.approx(item.completion_s, abs=1e-6)
            checked += 1
        check_records(b, reference, model, results, items, intervals)
        for k, result in enumerate(results):
            now = (k + 1) * interval_s
            for h in range(2):
                assert result.state.rtt_s[b, h] == pytest.approx(pinged(reference, h, now))
        # Frames that a falling delay would have brought in before the one ahead of them.
        used = sorted(x.service[1] for x in items if 1 in x.service)
        ends = [end + reference.delay(0, end) for _, _, end in used if np.isfinite(end)]
        waited += sum(later < earlier for earlier, later in pairwise(ends))
    assert checked > 100 and waited > 3


def pinged(reference, hop, now_s):
    """Twice the least delay of the pings, every 0.5 s, that were back in the last 10 s."""
    times = [0.5 * k for k in range(int(np.ceil(now_s / 0.5 - 1e-9)))][-20:]
    rtts = [2.0 * reference.delay(hop, t) for t in times]
    back = [rtt for t, rtt in zip(times, rtts, strict=True) if t + rtt <= now_s]
    return min(back, default=2.0 * reference.delay(hop, 0.0))


def check_records(b, reference, model, results, items, intervals):
    """Records and states of environment b against the reference's requests."""
    dt = model.scenario.interval_s
    spans = [(x.arrival_s, x.completion_s if np.isfinite(x.completion_s) else 1e9) for x in items]
    uses = {s: [] for s in range(len(reference.rates))}
    for item in items:
        for station, work, _ in item.route:
            if station in item.service:
                uses[station].append((*item.service[station], work))
    for k, result in enumerate(results):
        t0, t1 = k * dt, (k + 1) * dt
        r, s = result.record, result.state
        live = [(max(a, t0), min(e, t1)) for a, e in spans if a < t1 and e > t0]
        assert r.outstanding_s[b] == pytest.approx(sum(e - a for a, e in live), abs=1e-6)
        assert r.union_s[b] == pytest.approx(union(live), abs=1e-6)
        done = [e - a for a, e in spans if t0 < e <= t1]
        assert r.completed[b] == len(done)
        assert r.latency_sum_s[b] == pytest.approx(sum(done), abs=1e-6)
        assert r.late[b] == sum(x > model.references.deadline_s for x in done)
        mean = np.mean(done) / model.references.latency_s if done else 1.0
        assert s.latency_ratio[b] == pytest.approx(mean)
        assert s.in_flight[b] == sum(a < t1 < e for a, e in spans)
        # The in-flight bound, credits coming back at the last interval's rate.
        offsets = intervals[k].arrival_offset_s[intervals[k].arrival_env == b]
        rate = sum(t0 - dt < e <= t0 for _, e in spans) / dt
        open_ = sum(a < t0 < e for a, e in spans)
        room = model.scenario.max_in_flight - open_
        accepted = 0
        for offset in offsets:
            accepted += accepted + 1 <= max(0, int(room + rate * offset))
        assert (r.arrived[b], r.lost[b]) == (len(offsets), len(offsets) - accepted)
        assert s.node_load[b] == pytest.approx(1.0 - intervals[k].node_speed[b, :, -1])
        for station, here in uses.items():
            busy = sum(max(0.0, min(e, t1) - max(a, t0)) for _, a, e, _ in here)
            left = sum(
                w - reference.work_done(station, a, t1) for at, a, e, w in here if at <= t1 < e
            )
            if station % 2:
                assert r.hop_transmit_s[b, station // 2] == pytest.approx(busy, abs=1e-6)
                backlog = s.hop_backlog_bytes[b, station // 2]
                assert backlog == pytest.approx(left, rel=1e-6, abs=0.1)
            else:
                spent = sum(
                    reference.work_done(station, max(a, t0), min(e, t1)) for _, a, e, _ in here
                )
                assert r.node_busy_s[b, station // 2] == pytest.approx(busy, abs=1e-6)
                assert r.node_active_s[b, station // 2] == pytest.approx(spent, abs=1e-6)
                assert s.node_backlog_s[b, station // 2] == pytest.approx(left, abs=1e-6)
                continue
            h = station // 2
            frames = [(e, e - a, w) for _, a, e, w in here if w >= MIN_FRAME_BYTES]
            first = first_rate(model.scenario, intervals[0].hop_bytes_per_s[b, h, 0])
            rate, seen = measured_rate(frames, t1) or (first, 0.0)
            # The frame on the hop bounds the rate by the time it has taken, a round trip late.
            rtt_s = s.rtt_s[b, h]
            for _, start, end, size in here:
                seen_s = t1 - start - rtt_s
                overdue = start < t1 < end and seen_s > 0 and size >= MIN_FRAME_BYTES
                if overdue and size / seen_s < rate:
                    rate, seen = size / seen_s, t1
            assert s.bytes_per_s[b, h] == pytest.approx(rate, rel=1e-6)
            assert s.bandwidth_age_s[b, h] == pytest.approx(t1 - seen, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_probes_queue_with_the_frames(seed):
    sim, model, results, drained, _, probes = rollout(3, seed, 1.0, 30, probing=True)
    measured = 0
    for b, reference, rows, items, sent, _ in references(
        sim, model, results, drained, seed, probes
    ):
        # While a probe is on its way no second is sent: drop those, first to last.
        while True:
            # A probe that arrives with a request queues behind those already there.
            reference.run([*items, *sent])
            open_until = {}
            for probe in sorted(sent, key=lambda x: x.arrival_s):
                station = probe.route[0][0]
                if probe.arrival_s < open_until.get(station, -1.0):
                    sent = [x for x in sent if x is not probe]
                    break
                open_until[station] = probe.service[station][2]
            else:
                break
        for (c, i), item in zip(rows, items, strict=True):
            if not c.lost[i]:
                assert c.completion_s[i] == pytest.approx(item.completion_s, abs=1e-6)
        for k, result in enumerate(results):
            for h in range(2):
                uses = [x.service[2 * h + 1] for x in [*items, *sent] if 2 * h + 1 in x.service]
                busy = sum(overlap(start, end, k, k + 1) for _, start, end in uses)
                assert result.record.hop_transmit_s[b, h] == pytest.approx(busy, abs=1e-6)
                measured += result.state.bandwidth_age_s[b, h] < 1.0
    assert measured > 50


@pytest.mark.parametrize("n_nodes", [2, 3, 4])
def test_littles_law_over_an_episode_and_its_drain(n_nodes):
    scenario = toy_scenario(
        n_nodes, outage_mbps=2.0, rate_rps=3.0, max_in_flight=1000, deadline_s=100.0
    )
    sim = Simulator(CostModel(toy_profile(n_nodes), scenario), 6, 3)
    rng = np.random.default_rng(0)
    total = IntervalRecord.zeros(6, n_nodes)
    for _ in range(30):
        total.add(sim.step(random_cuts(rng, 6, n_nodes - 1)).record)
    open_after = total.arrived - total.completed
    total.add(sim.drain())
    assert open_after.sum() > 0
    np.testing.assert_array_equal(total.completed, total.arrived)
    np.testing.assert_allclose(total.outstanding_s, total.latency_sum_s, rtol=1e-9)


def test_a_hand_computed_request_and_its_energy():
    # 8 Mbit/s = 1e6 bytes/s; plan (2, 4): edge units 0-1, fog 2-3, cloud 4-5.
    scenario = constant_scenario(load=0.5, rate_rps=1e-9, interval_s=10.0)
    profile = toy_profile(3)
    model = CostModel(profile, scenario)
    sim = Simulator(model, 1, 0, rate_rps=0.05, record_requests=True)
    rows = []
    total = IntervalRecord.zeros(1, 3)
    while not rows:
        result = sim.step(np.array([[2, 4]]))
        total.add(result.record)
        if result.record.arrived[0] > 1:
            pytest.fail("expected a single request; choose another seed")
        if len(result.completed.env):
            rows.append(result.completed)
    edge, fog, cloud = 0.048 + 0.012, 0.027 + 0.003, 0.010 + 0.001
    hop0, hop1 = 0.2, 0.04
    reply = 2 * 0.004
    latency = 2 * (edge + fog + cloud) + hop0 + hop1 + 0.0005 + 0.001 + 2 * 0.03 + reply
    assert rows[0].completion_s[0] - rows[0].arrival_s[0] == pytest.approx(latency)
    np.testing.assert_allclose(total.node_active_s[0], [edge, fog, cloud])
    np.testing.assert_allclose(total.node_busy_s[0], [2 * edge, 2 * fog, 2 * cloud])
    np.testing.assert_allclose(total.hop_transmit_s[0], [hop0, hop1])
    energy = Cost(profile, model.references, scenario).energy(total)
    edge_j = 3.0 * latency + 2.0 * edge + 0.5 * hop0
    assert energy.edge_full_j[0] == pytest.approx(edge_j)
    assert energy.total_full_j[0] == pytest.approx(edge_j + 3.0 * fog + 4.0 * cloud + 0.5 * hop1)
    assert energy.edge_compute_j[0] == pytest.approx(12.0 * 2 * edge)


def test_the_same_seed_gives_the_same_run_and_another_does_not():
    model = CostModel(toy_profile(3), toy_scenario(3))
    rng = np.random.default_rng(0)
    cuts = [random_cuts(rng, 4, 2) for _ in range(12)]

    def costs(sim, seed):
        sim.reset(seed)
        return np.array([sim.step(c).record.outstanding_s for c in cuts])

    sim = Simulator(model, 4, 7)
    first = costs(sim, 7)
    np.testing.assert_array_equal(first, costs(sim, 7))
    np.testing.assert_array_equal(first, costs(Simulator(model, 4, 99), 7))
    assert not np.array_equal(first, costs(sim, 8))


def test_reset_without_a_seed_goes_on_with_a_sequence_of_its_own():
    model = CostModel(toy_profile(3), toy_scenario(3))
    cuts = np.full((3, 2), SPEC.n_units)

    def arrivals(sim):
        sim.reset()
        return np.array([sim.step(cuts).record.arrived for _ in range(8)])

    a, b = Simulator(model, 3, 5), Simulator(model, 3, 5)
    one, two = arrivals(a), arrivals(a)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, arrivals(b))
    np.testing.assert_array_equal(two, arrivals(b))


def test_conditions_do_not_depend_on_actions():
    model = CostModel(toy_profile(3), toy_scenario(3))
    runs = []
    for seed in (0, 1):
        sim, rng = Simulator(model, 5, 11), np.random.default_rng(seed)
        steps = [sim.step(random_cuts(rng, 5, 2)) for _ in range(20)]
        runs.append([(s.record.arrived, s.state.node_load, s.state.arrival_rps) for s in steps])
    for one, two in zip(*runs, strict=True):
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)


def test_drain_is_bounded_and_gives_up_what_an_outage_holds():
    scenario = constant_scenario(mbps=SLOWEST_MBPS, rate_rps=4.0)
    sim = Simulator(CostModel(toy_profile(3), scenario), 2, 0, record_requests=True)
    arrived = sum(sim.step(np.zeros((2, 2), dtype=np.int64)).record.arrived for _ in range(3))
    end = sim.drain_completed()
    np.testing.assert_array_equal(end.record.lost, arrived)
    assert end.completed.lost.all() and len(end.completed.env) == arrived.sum()
    limit = DRAIN_DEADLINES * sim.model.references.deadline_s
    np.testing.assert_allclose(end.record.outstanding_s, arrived * limit)
    assert end.state.in_flight.sum() == 0
    assert sim.drain().outstanding_s.sum() == 0


def test_bandwidth_outlives_a_drain_so_long_that_no_frame_counts_at_its_end():
    sim = Simulator(CostModel(toy_profile(3), constant_scenario(deadline_s=50.0)), batch=2, seed=0)
    sim.step(np.zeros((2, 2), dtype=int))
    state = sim.drain_completed().state  # 1000 s; exp(-1000) is 0
    assert (state.bytes_per_s > 0).all() and np.isfinite(state.bytes_per_s).all()


def test_a_drain_before_any_step_is_empty():
    sim = Simulator(CostModel(toy_profile(2), toy_scenario(2)), 2, 0)
    assert sim.drain().outstanding_s.sum() == 0


def test_many_requests_in_flight_are_kept_apart():
    scenario = toy_scenario(3, rate_rps=60.0, max_in_flight=400)
    sim = Simulator(CostModel(toy_profile(3), scenario), 3, 0)
    cuts = np.full((3, 2), SPEC.n_units)
    total, most = IntervalRecord.zeros(3, 3), 0.0
    for _ in range(20):
        result = sim.step(cuts)
        total.add(result.record)
        np.testing.assert_array_equal(
            result.state.in_flight, total.arrived - total.lost - total.completed
        )
        most = max(most, result.state.in_flight.max())
    assert total.lost.sum() > 0 and 390 < most < 420


def test_rates_per_environment_and_drawn():
    model = CostModel(
        toy_profile(2),
        constant_scenario().replace(
            nodes=constant_scenario().nodes[:2], hops=constant_scenario().hops[:1]
        ),
    )
    sim = Simulator(model, 2, 0, rate_rps=np.array([1.0, 20.0]))
    cuts = np.full((2, 1), SPEC.n_units)
    arrived = sum(sim.step(cuts).record.arrived for _ in range(40))
    assert 10 < arrived[0] < 90 < 600 < arrived[1] < 1000
    drawn = Simulator(model, 50, 0, rate_rps=(2.0, 4.0))
    first = drawn.n_ref
    assert first.min() >= 2.0 and first.max() <= 4.0 and np.ptp(first) > 1.0
    drawn.reset()
    assert not np.array_equal(first, drawn.n_ref)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (np.zeros((2, 3), dtype=int), "shape"),
        (np.array([[0, 7], [0, 0]]), "0..6"),
        (np.array([[-1, 0], [0, 0]]), "0..6"),
        (np.array([[4, 2], [0, 0]]), "not decrease"),
    ],
)
def test_wrong_cuts_are_named(cuts, message):
    sim = Simulator(CostModel(toy_profile(3), toy_scenario(3)), 2, 0)
    with pytest.raises(ConfigError, match=message):
        sim.step(cuts)


def test_wrong_sizes_are_named():
    model = CostModel(toy_profile(2), toy_scenario(2))
    with pytest.raises(ConfigError, match="batch"):
        Simulator(model, 0, 0)
    with pytest.raises(ConfigError, match="rate_rps"):
        Simulator(model, 1, 0, rate_rps=-1.0)
    sim = Simulator(model, 1, 0)
    with pytest.raises(ConfigError, match="probe"):
        sim.step(np.array([[0]]), np.array([[1e9]]))
