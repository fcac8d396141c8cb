"""Deciding more or less often: the same conditions, the command, and the policy's history."""

import json

import numpy as np
import pytest
from test_policy import make_policy, random_states

from agents import evaluate
from agents.arms.controllers import Glancing, Solver
from agents.arms.guard import GuardedController
from agents.arms.mpc import ModelPredictive
from agents.arms.per_row import PerRow
from agents.arms.runtime import Checkpoint, PolicyController
from agents.learning.policy import export_arrays
from agents.studies.cadence import cadences
from env.grid import GRID_S, GridConditions
from env.predict import CostModel
from env.scenario import Scenario
from env.state import HISTORY, Encoder
from env.synthetic import synthetic_profile
from executor.model import model_spec


def toy_model(interval_s):
    scenario = Scenario.load().replace(interval_s=interval_s, episode_s=30.0)
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def test_every_interval_meets_the_same_conditions():
    rate = np.array([2.0, 9.0, 4.0])
    drawn = {}
    for interval_s in (0.05, 0.2, 1.0, 2.0):
        source = GridConditions(Scenario.load().replace(interval_s=interval_s), rate, 5)
        assert source.substep_s == GRID_S
        for seed in (5, 6):  # again after a reset, with others
            if seed != 5:
                source.reset(seed)
            steps = [source.next() for _ in range(round(4.0 / interval_s))]
            env = np.concatenate([s.arrival_env for s in steps])
            starts = [k * interval_s + s.arrival_offset_s for k, s in enumerate(steps)]
            at_s = np.concatenate(starts)
            for s in steps:
                assert (np.diff(s.arrival_env) >= 0).all()
                assert s.arrival_offset_s.max(initial=0.0) <= interval_s
                counted = np.bincount(s.arrival_env, minlength=3)
                np.testing.assert_array_equal(counted, s.arrival_count)
            drawn[interval_s, seed] = (
                np.concatenate([s.hop_bytes_per_s for s in steps], axis=2),
                np.concatenate([s.node_speed for s in steps], axis=2),
                np.sort(at_s[env == 1]),
            )
    for seed in (5, 6):
        for interval_s in (0.2, 1.0, 2.0):
            for one, other in zip(drawn[0.05, seed], drawn[interval_s, seed], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-9)
    assert len(drawn[1.0, 5][2]) > 10 and not np.array_equal(drawn[1.0, 5][0], drawn[1.0, 6][0])


def test_ratios_are_paired_to_one_second():
    results = {
        x: {"by_rate": {"0.4": {"cost_rows": {"solver": rows}}}}
        for x, rows in ((0.2, [1.0, 2.0]), (1.0, [2.0, 4.0]), (10.0, [4.0, 8.0]))
    }
    found = cadences(results)["0.4"]["solver"]
    assert found["0.2"] == {"cost": 1.5, "ratio": {"mean": 0.5, "low": 0.5, "high": 0.5}}
    assert found["1"]["ratio"]["mean"] == 1.0 and found["10"]["ratio"]["mean"] == 2.0


def test_the_command_compares_intervals(tmp_path, capsys):
    out, profile = tmp_path / "out.json", tmp_path / "profile.json"
    toy_model(1.0).profile.save(profile)
    argv = ["--model", "alexnet", "--profile", str(profile), "--seeds", "2", "--json", str(out)]
    argv += ["--arms", "solver", "--interval", "0.5,2", "--intervals", "5", "--startup-s", "4"]
    assert evaluate.main([*argv, "--late-binding"]) == 0
    result = json.loads(out.read_text())
    for interval, intervals in (("0.5", 20), ("2", 5)):
        part = result["by_interval"][interval]
        assert (part["interval_s"], part["intervals"]) == (float(interval), intervals)
        assert part["late_binding"] is True
    counts = [r["arms"]["solver"]["requests"]["submitted"] for r in result["by_interval"].values()]
    assert counts[0] == counts[1] > 0
    (arms,) = result["cadence"].values()
    assert arms["solver"]["2"]["ratio"]["mean"] == 1.0
    assert "cost by interval" in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint():
    model = toy_model(1.0)
    arrays = export_arrays(make_policy(model, 0.5))
    metadata = {"scenario": {"interval_s": 1.0}}
    return Checkpoint(model.profile, model.references, model.plans, arrays, metadata)


def test_the_policy_sees_the_past_at_the_interval_it_was_trained_at(checkpoint):
    often, usual = toy_model(0.2), toy_model(1.0)
    controller = PolicyController(checkpoint)
    controller.reset(often, 3)
    states = [random_states(often, 3, seed) for seed in range(5 * HISTORY + 3)]
    encoder = Encoder(usual)
    for t, state in enumerate(states):
        controller.decide(state)
        past = [encoder.encode_state(s) for s in states[t::-5]][:HISTORY]
        past += [np.zeros_like(past[0])] * (HISTORY - len(past))
        np.testing.assert_array_equal(controller._history, np.concatenate(past, axis=1))
    # In the moment it sees what it would in training.
    slow = PolicyController(checkpoint)
    slow.reset(usual, 3)
    for state in states[len(states) - 1 - 5 * (HISTORY - 1) :: 5]:
        decided = slow.decide(state)
    np.testing.assert_array_equal(decided.cuts, controller.decide(states[-1]).cuts[:3])


def test_the_solver_looks_a_second_and_a_half_ahead_at_least():
    assert toy_model(0.05).horizon_s == toy_model(1.0).horizon_s == 1.5
    assert toy_model(10.0).horizon_s == 15.0


def test_mpc_steps_by_a_second_at_least():
    """Of one state a controller that decides more often thinks as one that decides every second."""
    state = random_states(toy_model(1.0), 20, 0)
    cuts = {}
    for interval_s in (0.2, 1.0, 10.0):
        arm = ModelPredictive()
        arm.reset(toy_model(interval_s), 20)
        cuts[interval_s] = arm.decide(state).cuts
    np.testing.assert_array_equal(cuts[0.2], cuts[1.0])
    assert not np.array_equal(cuts[1.0], cuts[10.0])


def test_one_controller_per_row_glances_for_each(checkpoint):
    model = toy_model(1.0)
    together = PolicyController(checkpoint)
    rows = PerRow("policy", lambda: PolicyController(checkpoint))
    states = [random_states(model, 5, seed) for seed in range(2)]
    for arm in (together, rows):
        arm.reset(model, 5)
        arm.decide(states[0])
    np.testing.assert_array_equal(rows.glance(states[1]), together.glance(states[1]))


def test_a_glance_decides_for_the_moment_and_remembers_nothing(checkpoint):
    model = toy_model(1.0)
    controller = PolicyController(checkpoint)
    controller.reset(model, 20)
    states = [random_states(model, 20, seed) for seed in range(4)]
    for state in states[:3]:
        decided = controller.decide(state).cuts
    assert isinstance(controller, Glancing)
    np.testing.assert_array_equal(controller.glance(states[2]), decided)
    now = controller.glance(states[3])
    assert not np.array_equal(now, decided)
    np.testing.assert_array_equal(controller.glance(states[2]), decided)
    # As if this state had come instead of the last one.
    controller.reset(model, 20)
    for state in (*states[:2], states[3]):
        decided = controller.decide(state).cuts
    np.testing.assert_array_equal(now, decided)


def test_the_guard_glances_with_the_solver_where_the_state_cannot_be_trusted(checkpoint):
    model = toy_model(1.0)
    guarded, solver = GuardedController(PolicyController(checkpoint)), Solver()
    guarded.reset(model, 1)
    solver.reset(model, 1)
    policy = PolicyController(checkpoint)
    policy.reset(model, 1)
    told = 0
    for seed in range(30):
        state = random_states(model, 1, seed)
        state.bandwidth_age_s[:] = 1.0
        wanted, safe = policy.glance(state), solver.glance(state)
        np.testing.assert_array_equal(guarded.glance(state), wanted)
        told += not np.array_equal(wanted, safe)
        state.bandwidth_age_s[:] = 100.0
        np.testing.assert_array_equal(guarded.glance(state), safe)
    assert told > 0 and not guarded.fallbacks
    guarded.decide(state)  # stale: the solver decides for a while
    state.bandwidth_age_s[:] = 1.0
    np.testing.assert_array_equal(guarded.glance(state), solver.glance(state))
