"""A simulator that tells the next interval: only what is seen differs from the plain one."""

import numpy as np
from toy_chain import toy_profile, toy_scenario

from env.foretold import Foretold
from env.predict import CostModel
from env.simulator import Simulator

CUTS = np.full((3, 2), 3)


def test_the_coming_intervals_means_are_told_and_nothing_else_changes():
    model = CostModel(toy_profile(3), toy_scenario(3, rate_rps=8.0))
    plain, told, tape = (kind(model, 3, 5) for kind in (Simulator, Foretold, Simulator))
    plain.reset(5)
    tape.reset(5)
    state, intervals = told.reset(5), tape.record(6).intervals
    for coming, after in zip(intervals, [*intervals[1:], None], strict=True):
        assert np.allclose(state.bytes_per_s, np.maximum(coming.hop_bytes_per_s.mean(axis=2), 1.0))
        assert np.allclose(state.node_load, 1.0 - coming.node_speed.mean(axis=2))
        assert np.allclose(state.arrival_rps, coming.arrival_count / model.scenario.interval_s)
        one, two = plain.step(CUTS), told.step(CUTS)
        state = two.state
        for name in ("arrived", "completed", "latency_sum_s", "outstanding_s", "hop_transmit_s"):
            assert np.array_equal(getattr(one.record, name), getattr(two.record, name))
        assert np.array_equal(one.state.hop_backlog_bytes, state.hop_backlog_bytes)
        if after is not None:
            assert not np.allclose(one.state.bytes_per_s, state.bytes_per_s)


def test_at_the_end_of_a_tape_the_measured_state_is_left():
    model = CostModel(toy_profile(3), toy_scenario(3, rate_rps=8.0))
    source = Simulator(model, 3, 5)
    tape = source.record(2)
    told = Foretold(model, 3, 0, conditions=tape.play())
    plain = Simulator(model, 3, 0, conditions=tape.play())
    for _ in range(2):
        a, b = told.step(CUTS).state, plain.step(CUTS).state
    assert np.array_equal(a.bytes_per_s, b.bytes_per_s)
    snapshot = told.snapshot()
    again = told.restore(snapshot, np.array([2, 0, 1]), tape.play(np.array([2, 0, 1]), start=1))
    expected = np.maximum(tape.intervals[1].hop_bytes_per_s.mean(axis=2)[[2, 0, 1]], 1.0)
    assert np.allclose(again.bytes_per_s, expected)
