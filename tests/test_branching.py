"""Snapshots, branches and tapes: a restored environment goes on as if nothing had happened."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chain import random_cuts, toy_profile, toy_scenario

from env.conditions import Conditions, IntervalConditions, SharedConditions
from env.predict import CostModel
from env.scenario import HopSetup, Process
from env.simulator import Simulator
from env.tape import Tape, record_conditions
from executor.errors import ConfigError

BATCH = 5


def toy_model(n_nodes=3, **changes):
    return CostModel(toy_profile(n_nodes), toy_scenario(n_nodes, outage_mbps=0.5, **changes))


def varying_delays(n_nodes):
    delay = Process("markov", (0.01, 0.3, 0.8), dwell_s=0.6)
    hops = toy_scenario(n_nodes, outage_mbps=0.5).hops
    return {"hops": tuple(HopSetup(hop.bandwidth, delay) for hop in hops)}


def tape_of(model, n_intervals, batch=BATCH, seed=3):
    rate = np.linspace(3.0, 9.0, batch)
    return record_conditions(Conditions(model.scenario, rate, seed), n_intervals)


def tape_simulator(model, tape, index=None, **options):
    player = tape.play(index)
    return Simulator(model, len(player.rate_rps), 0, conditions=player, **options)


def random_step(rng, batch, n_hops):
    """A plan per environment, and sometimes probes."""
    probes = np.where(rng.random((batch, n_hops)) < 0.3, rng.choice([3000.0, 65536.0]), 0.0)
    return random_cuts(rng, batch, n_hops), probes if rng.random() < 0.5 else None


def take(result, index=slice(None)):
    """Every figure of a step's state and record, of the environments `index`."""
    parts = [result.state, result.record]
    return {
        f"{type(p).__name__}.{f.name}": getattr(p, f.name)[index]
        for p in parts
        for f in dataclasses.fields(p)
    }


def assert_same(one, two, exact=True):
    for name in one:
        if exact:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
        else:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-7, atol=1e-5, err_msg=name)


def rows_of(completed, env):
    """What is recorded of one environment's requests, in the order of their arrival."""
    mine = np.flatnonzero(completed.env == env)
    mine = mine[np.argsort(completed.arrival_s[mine])]
    return [getattr(completed, f.name)[mine] for f in dataclasses.fields(completed)[1:]]


@pytest.mark.parametrize("interval_s", [1.0, 0.2, 2.5])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_tape_plays_the_very_conditions_it_recorded(interval_s, copies):
    model = toy_model(interval_s=interval_s)
    rate = np.repeat([3.0, 8.0], 2)
    tape = record_conditions(SharedConditions(model.scenario, rate, 3, copies), 12)
    drawn = Simulator(model, 4, 3, rate_rps=rate, copies=copies)
    recorded = drawn.record(12)
    drawn.reset(3)
    for one, two in zip(tape.intervals, recorded.intervals, strict=True):
        for f in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, f.name), getattr(two, f.name))
    played = tape_simulator(model, tape)
    np.testing.assert_array_equal(drawn.n_ref, played.n_ref)
    rng = np.random.default_rng(0)
    for _ in range(12):
        step = random_step(rng, 4, 2)
        assert_same(take(drawn.step(*step)), take(played.step(*step)))
    assert_same(take(drawn.drain_completed()), take(played.drain_completed()))
    first = [played.reset(), played.step(step[0])][1]
    again = [played.reset(7), played.step(step[0])][1]
    assert_same(take(first), take(again))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_nodes=st.sampled_from([2, 3, 4]),
    interval_s=st.sampled_from([0.2, 1.0, 2.5]),
    before=st.integers(0, 12),
    after=st.integers(0, 6),
    record=st.booleans(),
    delays=st.booleans(),
)
def test_a_restored_branch_goes_on_bit_by_bit(
    seed, n_nodes, interval_s, before, after, record, delays
):
    changes = varying_delays(n_nodes) if delays else {}
    model = toy_model(n_nodes, interval_s=interval_s, max_in_flight=8, **changes)
    tape = tape_of(model, max(1, before + after), seed=seed)
    original = tape_simulator(model, tape, record_requests=record)
    branch = tape_simulator(model, tape, record_requests=record)
    rng = np.random.default_rng(seed)
    steps = [random_step(rng, BATCH, n_nodes - 1) for _ in range(before + after)]
    for k, step in enumerate(steps):
        original.step(*step)
        if k >= after:  # what the branch did before must not show
            branch.step(*random_step(rng, BATCH, n_nodes - 1))
    original.reset()
    for step in steps[:before]:
        original.step(*step)
    branch.restore(original.snapshot(), np.arange(BATCH), tape.play(start=before))
    for step in steps[before:]:
        one, two = original.step(*step), branch.step(*step)
        assert_same(take(one), take(two))
    assert original.time_s == branch.time_s
    one, two = original.drain_completed(), branch.drain_completed()
    assert_same(take(one), take(two))
    if record and one.completed is not None:
        for b in range(BATCH):
            for x, y in zip(rows_of(one.completed, b), rows_of(two.completed, b), strict=True):
                np.testing.assert_array_equal(x, y)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    index=st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=9),
    record=st.booleans(),
)
def test_an_environment_can_be_copied_to_other_places(seed, index, record):
    model, index = toy_model(), np.array(index)
    tape = tape_of(model, 14, seed=seed)
    original = tape_simulator(model, tape, record_requests=True)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        original.step(*random_step(rng, BATCH, 2))
    branch = tape_simulator(model, tape, record_requests=record)
    state = branch.restore(original.snapshot(), index, tape.play(index, start=8))
    np.testing.assert_array_equal(branch.n_ref, tape.rate_rps[index])
    np.testing.assert_array_equal(state.in_flight, original.snapshot().in_flight[index])
    for _ in range(6):
        cuts, probes = random_step(rng, BATCH, 2)
        one = original.step(cuts, probes)
        two = branch.step(cuts[index], None if probes is None else probes[index])
        assert_same(take(one, index), take(two), exact=False)
    one, two = original.drain_completed(), branch.drain_completed()
    assert_same(take(one, index), take(two), exact=False)
    assert (two.completed is not None) == record
    if record:
        for b, original_b in enumerate(index):
            for x, y in zip(
                rows_of(one.completed, original_b), rows_of(two.completed, b), strict=True
            ):
                np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-6)


def test_branches_of_one_environment_part_with_their_plans():
    model = toy_model()
    tape = tape_of(model, 12)
    original = tape_simulator(model, tape)
    rng = np.random.default_rng(0)
    for _ in range(5):
        original.step(*random_step(rng, BATCH, 2))
    snapshot, index = original.snapshot(), np.zeros(len(model.plans), dtype=np.int64)
    branches = tape_simulator(model, tape)
    outcomes = []
    for _ in range(2):  # a snapshot can be restored again
        branches.restore(snapshot, index, tape.play(index, start=5))
        outcomes.append(sum(branches.step(model.table.cuts).record.outstanding_s for _ in range(3)))
    np.testing.assert_array_equal(*outcomes)
    assert len(np.unique(outcomes[0])) > len(model.plans) / 2


def test_run_out_under_the_tapes_future_is_stepping_through_it_without_arrivals():
    model = toy_model(deadline_s=3.0)
    tape = tape_of(model, 30)
    sim = tape_simulator(model, tape)
    rng = np.random.default_rng(4)
    for _ in range(6):
        sim.step(*random_step(rng, BATCH, 2))
    snapshot = sim.snapshot()
    future = [tape.intervals[t] for t in range(6, 30)]
    ahead = IntervalConditions.joined(future)
    at_once = sim.run_out(ahead)
    silent = [
        dataclasses.replace(c.held(), hop_bytes_per_s=c.hop_bytes_per_s, node_speed=c.node_speed)
        for c in future
    ]
    sim.restore(snapshot, np.arange(BATCH), Tape(silent, tape.rate_rps, tape.substep_s).play())
    steps = [sim.step(np.zeros((BATCH, 2), dtype=np.int64)).record for _ in future]
    steps.append(sim.drain())
    for name in ("outstanding_s", "union_s", "completed", "latency_sum_s", "hop_transmit_s"):
        total = sum(getattr(r, name) for r in steps)
        np.testing.assert_allclose(getattr(at_once.record, name), total, atol=1e-6, err_msg=name)
    assert at_once.record.completed.sum() > 20
    with pytest.raises(ConfigError, match="run-out lasts 60 s"):
        sim.run_out(
            dataclasses.replace(ahead, node_speed=np.tile(ahead.node_speed, 3))  # 72 s
        )


def test_wrong_branches_are_named():
    model = toy_model()
    tape = tape_of(model, 2)
    sim = tape_simulator(model, tape)
    snapshot = sim.snapshot()
    for index in ([], [0, 1, 2, 3, 5], [-1, 0, 0, 0, 0]):
        with pytest.raises(ConfigError, match=r"snapshot's environments are 0\.\.4"):
            sim.restore(snapshot, np.array(index, dtype=np.int64))
    with pytest.raises(ConfigError, match="an index of 5 environments, got 2"):
        sim.restore(snapshot, np.array([0, 1]))
    with pytest.raises(ConfigError, match="an index of 2 environments, got 5"):
        sim.restore(snapshot, np.arange(5), tape.play(np.array([0, 1])))
    with pytest.raises(ConfigError, match="records requests"):
        tape_simulator(model, tape, record_requests=True).restore(snapshot, np.arange(5))
    with pytest.raises(ConfigError, match="another chain"):
        other = toy_model(2)
        tape_simulator(other, tape_of(other, 1)).restore(snapshot, np.arange(5))
    with pytest.raises(ConfigError, match="conditions for 5 environments, got 2"):
        Simulator(model, 5, 0, conditions=tape.play(np.array([0, 1])))
    with pytest.raises(ConfigError, match=r"environments are 0\.\.4"):
        tape.play(np.array([5]))
    with pytest.raises(ConfigError, match="cannot start at 3"):
        tape.play(start=3)
    with pytest.raises(ConfigError, match="bring their own rates"):
        sim.set_rates(np.ones(5))
    with pytest.raises(ConfigError, match="bring their own rates"):
        Simulator(model, 5, 0, rate_rps=2.0, conditions=tape.play())
    cuts = np.zeros((5, 2), dtype=np.int64)
    sim.step(cuts)
    sim.step(cuts)
    with pytest.raises(ConfigError, match="tape is over after 2 intervals"):
        sim.step(cuts)
