"""A hop that is down: who notices, what is sent again, and that nothing is lost or done twice."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_branching import assert_same, take
from toy_chain import SPEC, random_cuts, toy_profile, toy_scenario

from env._outages import Outages
from env.conditions import Conditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_model
from env.tape import Tape, record_conditions
from executor.recovery import MOST_PATIENCE_S, SILENT_AFTER_S

N = SPEC.n_units
STEP_S = 0.2


def tape_with(dead, rate=4.0, seed=5, interval_s=STEP_S, n_nodes=3, slow=False):
    """Conditions whose hops carry nothing where `dead` [T, B, H] says so."""
    scenario = toy_scenario(n_nodes, outage_mbps=20.0, interval_s=interval_s)
    profile = toy_profile(n_nodes)
    if slow:  # so that an outage finds requests in the last node, too
        last = profile.nodes[-1]
        last = dataclasses.replace(last, unit_s=tuple(20.0 * t for t in last.unit_s))
        profile = profile.with_changes(nodes=(*profile.nodes[:-1], last))
    model = CostModel(profile, scenario)
    steps, batch, _ = dead.shape
    rates = np.full(batch, rate)
    tape = record_conditions(Conditions(model.scenario, rates, seed), steps)
    intervals = [
        dataclasses.replace(
            one, hop_bytes_per_s=np.where(dead[t][:, :, None], 0.0, one.hop_bytes_per_s)
        )
        for t, one in enumerate(tape.intervals)
    ]
    return model, Tape(intervals, rates, tape.substep_s)


def play(model, tape, plan, **options):
    player = tape.play()
    simulator = Simulator(model, tape.batch, 0, conditions=player, **options)
    cuts = np.tile(plan, (tape.batch, 1))
    return simulator, [simulator.step(cuts) for _ in range(len(tape))]


def between(start, stop, hop, steps=60, batch=1, n_hops=2):
    dead = np.zeros((steps, batch, n_hops), dtype=bool)
    dead[start:stop, :, hop] = True
    return dead


@pytest.mark.parametrize(("hop", "up"), [(0, [True, False, False]), (1, [True, True, False])])
def test_what_lies_behind_a_silent_hop_is_down_until_it_carries_again(hop, up):
    model, tape = tape_with(between(10, 30, hop))
    _, results = play(model, tape, (1, 3))
    seen = np.array([r.state.node_up[0] for r in results])
    notice = 10 + int(np.ceil(SILENT_AFTER_S / STEP_S)) - 1
    assert seen[:notice].all()
    np.testing.assert_array_equal(seen[notice:29], np.tile(up, (29 - notice, 1)))
    assert seen[30:].all()


def test_a_hop_that_is_down_from_the_start_is_known_to_be():
    model, tape = tape_with(between(0, 60, 0), rate=1.0)
    simulator = Simulator(model, 1, 0, conditions=tape.play())
    np.testing.assert_array_equal(simulator.reset().node_up, [[True, False, False]])
    usable = model.usable(simulator.reset())[0]
    assert {p.cuts for p, ok in zip(model.plans, usable, strict=True) if ok} == {(N, N)}
    results = [simulator.step(np.array([[0, 0]])) for _ in range(60)]
    done = sum(r.record.completed for r in results) + simulator.drain().completed
    np.testing.assert_array_equal(done, sum(r.record.arrived for r in results))
    assert not any(r.record.hop_transmit_s.any() for r in results)


@pytest.mark.parametrize(("hop", "plan", "ran"), [(0, (1, 3), (N, N)), (1, (1, 3), (1, N))])
def test_what_was_on_its_way_is_sent_again_cut_short(hop, plan, ran):
    model, tape = tape_with(between(10, 60, hop))
    simulator, results = play(model, tape, plan, record_requests=True)
    done = [r.completed for r in results]
    cuts = np.concatenate([c.cuts for c in done])
    arrival = np.concatenate([c.arrival_s for c in done])
    completion = np.concatenate([c.completion_s for c in done])
    late = completion > 10 * STEP_S + SILENT_AFTER_S + STEP_S
    assert late.sum() > 5
    np.testing.assert_array_equal(cuts[late], np.tile(ran, (late.sum(), 1)))
    sent_before = late & (arrival < 10 * STEP_S + SILENT_AFTER_S)
    assert sent_before.any()  # those are the ones sent again
    assert len(np.unique(arrival)) == len(arrival)  # none answered twice
    assert completion[~np.isnan(completion)].max() < 60 * STEP_S
    assert simulator.drain().lost.sum() == 0


def test_an_outage_shorter_than_the_heartbeats_patience_changes_no_plan():
    model, tape = tape_with(between(10, 12, 0))
    _, results = play(model, tape, (1, 3), record_requests=True)
    for result in results:
        assert result.state.node_up.all()
        assert (result.completed.cuts == (1, 3)).all()


def test_a_silent_hop_is_waited_for_as_long_as_the_way_around_it_costs():
    model, tape = tape_with(between(10, 26, 0))
    model.patience_s = np.array([2.0, SILENT_AFTER_S])
    _, results = play(model, tape, (1, 3))
    up = [r.state.node_up.all() for r in results]
    assert up == [t < 19 or t >= 26 for t in range(60)]
    model.patience_s = np.array([3.4, SILENT_AFTER_S])
    _, results = play(model, tape, (1, 3), record_requests=True)
    assert all((r.completed.cuts == (1, 3)).all() for r in results)


def test_of_hops_behind_a_silent_one_nothing_is_known():
    dead = between(10, 40, 0) | between(5, 40, 1)
    model, tape = tape_with(dead)
    model.patience_s = np.array([2.0, 2.0])
    _, results = play(model, tape, (1, 3))
    seen = [int(r.state.node_up.sum()) for r in results]
    # The second is not missed any more when the first falls silent, which takes 2 s, too.
    assert seen[14:19] == [3, 3, 3, 3, 3] and seen[19:39] == [1] * 20 and seen[40] == 3


def test_a_hop_known_to_be_down_stays_so_when_one_in_front_of_it_falls_silent():
    model, tape = tape_with(between(10, 40, 0) | between(2, 40, 1))
    model.patience_s = np.array([2.0, 2.0])
    _, results = play(model, tape, (1, 3))
    seen = [int(r.state.node_up.sum()) for r in results]
    assert seen[:11] == [3] * 11 and seen[11:19] == [2] * 8 and seen[19:39] == [1] * 20


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "mobilenet_v2"])
def test_patience_is_what_the_way_around_costs_more_in_seconds_of_latency(name):
    scenario = Scenario.load()
    profile = synthetic_model(name, scenario)
    model = CostModel(profile, scenario)
    assert model.patience_s.shape == (2,)
    assert ((model.patience_s >= SILENT_AFTER_S) & (model.patience_s <= MOST_PATIENCE_S)).all()
    # The more expensive the edge, the longer the way to it is waited for.
    edge = profile.nodes[0]
    slow = profile.with_changes(nodes=(edge.scaled(8.0), *profile.nodes[1:]))
    slow_s = CostModel(slow, scenario, model.references).patience_s
    assert slow_s[0] == MOST_PATIENCE_S >= model.patience_s[0]
    assert (CostModel(profile, scenario, direct={0: 2}).patience_s == SILENT_AFTER_S).all()


def test_a_plan_that_does_not_cross_the_hop_goes_on():
    dead = between(10, 40, 1)
    model, tape = tape_with(dead)
    _, results = play(model, tape, (1, N))
    _, undisturbed = play(*tape_with(np.zeros_like(dead)), (1, N))
    for one, two in zip(results, undisturbed, strict=True):
        np.testing.assert_array_equal(one.record.completed, two.record.completed)
        np.testing.assert_array_equal(one.record.latency_sum_s, two.record.latency_sum_s)


def test_silence_is_counted_over_intervals_and_ends_with_the_first_byte():
    _, tape = tape_with(between(1, 3, 0, steps=4), interval_s=0.5)
    outages = Outages.at_start(tape.intervals[0], np.full(2, SILENT_AFTER_S))
    found = []
    for interval in tape.intervals:
        outages = outages.after(interval, tape.substep_s)
        found.append(outages.silent_s[0, 0])
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 0.0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_nodes=st.sampled_from([2, 3, 4]),
    interval_s=st.sampled_from([0.2, 1.0]),
    late=st.booleans(),
    slow=st.booleans(),
)
def test_every_request_ends_once_whatever_fails_and_whenever(seed, n_nodes, interval_s, late, slow):
    rng = np.random.default_rng(seed)
    batch, steps, n_hops = 3, 40, n_nodes - 1
    dead = np.zeros((steps, batch, n_hops), dtype=bool)
    state = np.zeros((batch, n_hops), dtype=bool)
    for t in range(steps):
        state ^= rng.random(state.shape) < 0.2
        dead[t] = state
    model, tape = tape_with(dead, 6.0, seed, interval_s, n_nodes, slow)
    if late and n_nodes == 3:
        scenario = model.scenario.replace(late_binding=True)
        model = CostModel(model.profile, scenario, model.references)
    recording = Simulator(model, batch, 0, conditions=tape.play(), record_requests=True)
    restored = Simulator(model, batch, 0, conditions=tape.play(), record_requests=True)
    plain = Simulator(model, batch, 0, conditions=tape.play())
    keys, balance = [], np.zeros(batch, dtype=int)
    for t in range(steps):
        cuts = random_cuts(rng, batch, n_hops)
        probes = np.where(rng.random((batch, n_hops)) < 0.2, 65536.0, 0.0)
        restored.restore(restored.snapshot(), np.arange(batch), tape.play(start=t))
        one = recording.step(cuts, probes)
        assert_same(take(one), take(restored.step(cuts, probes)))
        assert_same(take(one), take(plain.step(cuts, probes)), exact=False)
        keys += list(zip(one.completed.env, one.completed.arrival_s, strict=True))
        balance += one.record.arrived - one.record.completed - one.record.lost
        np.testing.assert_array_equal(one.state.in_flight, balance)
        for backlog in (one.state.node_backlog_s, one.state.hop_backlog_bytes):
            assert (backlog > -1e-6).all()
        for f in dataclasses.fields(one.record):
            assert (getattr(one.record, f.name) > -1e-9).all()
    end = recording.drain_completed()
    keys += list(zip(end.completed.env, end.completed.arrival_s, strict=True))
    assert len(set(keys)) == len(keys)
    np.testing.assert_array_equal(balance, end.record.completed + end.record.lost)
