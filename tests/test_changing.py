"""Conditions that change at a set pace; a guard for each environment."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agents import evaluate
from agents.arms.controllers import Static, cloud_only
from agents.arms.guard import GuardedController, GuardSettings
from agents.arms.per_row import PerRow
from env.changing import Changing
from env.conditions import BYTES_PER_S_PER_MBPS
from env.cost import IntervalRecord
from env.predict import CostModel
from env.scenario import HopSetup, Process, Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from env.system import StepResult
from executor.errors import ConfigError
from executor.model import model_spec

RATE = np.full(64, 3.0)


def played(period_s: float, intervals: int, seed: int = 5) -> tuple[np.ndarray, Changing]:
    """Bandwidth of the first hop, Mbit/s, [B, all sub-steps]."""
    source = Changing(Scenario.load(), RATE, seed, period_s)
    steps = [source.next().hop_bytes_per_s[:, 0] for _ in range(intervals)]
    return np.concatenate(steps, axis=1) / BYTES_PER_S_PER_MBPS, source


@pytest.mark.parametrize("period_s", [0.05, 0.4, 1.0, 3.0])
def test_values_are_held_for_the_period_and_then_change(period_s: float) -> None:
    values, source = played(period_s, 24)
    hold = round(period_s / source.substep_s)
    assert hold * source.substep_s == pytest.approx(period_s)
    changed = np.diff(values, axis=1) != 0
    for row in changed:
        at = np.flatnonzero(row)
        assert at[0] < hold and (np.diff(at) == hold).all()
    # Environments do not change at the same moment.
    assert hold == 1 or len({int(np.flatnonzero(row)[0]) for row in changed}) > 1


def test_the_pace_changes_nothing_else() -> None:
    fast, slow = played(0.2, 200)[0], played(2.0, 200)[0]
    for share in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(fast, share), np.quantile(slow, share), rtol=0.06)
    arrivals = [Changing(Scenario.load(), RATE, 5, p).next().arrival_count for p in (0.2, 2.0)]
    assert 0.6 < arrivals[0].sum() / arrivals[1].sum() < 1.6


def test_seed_names_the_conditions() -> None:
    again, source = played(0.4, 6)
    source.reset(5)
    steps = [source.next().hop_bytes_per_s[:, 0] for _ in range(6)]
    repeated = np.concatenate(steps, axis=1) / BYTES_PER_S_PER_MBPS
    np.testing.assert_array_equal(again, repeated)
    assert (played(0.4, 6, seed=6)[0] != again).any()


def test_what_cannot_change_at_a_pace_is_refused() -> None:
    scenario = Scenario.load()
    with pytest.raises(ConfigError, match="above 0; got 0"):
        Changing(scenario, RATE, 1, 0.0)
    trace = HopSetup(Process("trace", path="a.csv"))
    with pytest.raises(ConfigError, match="cannot come from traces"):
        Changing(scenario.replace(hops=(trace, scenario.hops[1])), RATE, 1, 1.0)


def test_command_at_two_paces(tmp_path, capsys) -> None:
    scenario = Scenario.load()
    profile, out = tmp_path / "profile.json", tmp_path / "out.json"
    synthetic_profile(model_spec("alexnet"), scenario).save(profile)
    argv = ["--model", "alexnet", "--profile", str(profile), "--checkpoint", str(tmp_path / "no")]
    argv += ["--arms", "solver,best-static", "--seeds", "2", "--intervals", "4", "--startup-s", "1"]
    argv += ["--rates", "0.3", "--change-every", "0.5,3", "--json", str(out)]
    assert evaluate.main([*argv, "--report", str(tmp_path / "page")]) == 0
    result = json.loads(out.read_text())
    assert list(result["by_condition"]) == ["every 0.5 s", "every 3 s"]
    # 3 changes of every 3 s are longer than 4 intervals.
    assert len(result["trajectory"]["mbps"][0]) == 5
    submitted = [
        c["arms"]["static"]["requests"]["submitted"] for c in result["by_condition"].values()
    ]
    assert submitted[1] > submitted[0] > 0
    assert "How fast conditions change" in (tmp_path / "page" / "index.html").read_text()
    assert "every 3 s" in capsys.readouterr().out


def test_a_model_without_a_checkpoint_gets_a_synthetic_profile(tmp_path) -> None:
    out = tmp_path / "out.json"
    argv = ["--model", "squeezenet1_1", "--arms", "solver", "--seeds", "2", "--intervals", "4"]
    argv += ["--startup-s", "1", "--rates", "0.3", "--change-every", "1", "--json", str(out)]
    assert evaluate.main(argv) == 0
    result = json.loads(out.read_text())
    assert set(result["meters"]["profiled_with"].values()) == {"synthetic"}
    assert result["arms"]["solver"]["requests"]["submitted"] > 0


def test_a_guard_for_each_environment_decides_as_it_would_alone() -> None:
    scenario = Scenario.load().replace(capacity_fraction=0.4)
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)

    def guard() -> GuardedController:
        policy = Static("policy", cloud_only(model.profile.spec, 3))
        return GuardedController(policy, GuardSettings(drift_ratio=0.5, window_s=3.0))

    simulator = Simulator(model, 3, 4, record_requests=True)
    rows, alone, second = PerRow("guarded", guard), guard(), np.array([1])
    rows.reset(model, 3)
    alone.reset(model, 1)
    state, last, fell_back = simulator.reset(4), None, False
    for _ in range(12):
        own = None
        if last is not None:
            record = {
                name: getattr(last.record, name)[1:2]
                for name in IntervalRecord.__dataclass_fields__
            }
            own = StepResult(state.take(second), IntervalRecord(**record))
        decision = rows.decide(state, last)
        np.testing.assert_array_equal(
            alone.decide(state.take(second), own).cuts, decision.cuts[1:2]
        )
        fell_back |= bool(alone.reason)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
    assert fell_back and alone.fallbacks["observed cost above predicted"]
