"""Many edges under every arm: when they decide, what they are shown, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_chain import toy_profile, toy_scenario

from agents import edges
from agents.arms.controllers import Controller, Decision, Solver, Static
from agents.arms.paper import Paper
from agents.arms.staggered import CountingOthers, Staggered
from agents.studies import crowd
from agents.studies.compare import run_arm
from agents.studies.crowd import Crowd, crowd_model
from env.conditions import Conditions
from env.grid import GridConditions
from env.predict import CostModel
from env.scenario import Scenario
from env.sharing import SharingSimulator
from env.state import SystemState
from env.synthetic import synthetic_model
from env.system import StepResult


class Noting:
    """Gives the n-th plan at its n-th decision, and notes what it was asked with."""

    def __init__(self) -> None:
        self.name, self.asked = "noting", list[tuple[SystemState, StepResult | None]]()

    def reset(self, model: CostModel, batch: int) -> None:
        self.batch = batch

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        self.asked.append((state, last))
        return Decision(np.full((self.batch, 2), len(self.asked)))


def toy_crowd(n_edges: int, interval_s: float = 0.2) -> SharingSimulator:
    scenario = toy_scenario(3, interval_s=interval_s)
    model = CostModel(toy_profile(3), scenario)
    source = GridConditions(scenario, np.full(n_edges, 5.0), 1)
    return SharingSimulator(model, n_edges, source, record_requests=True)


def test_each_edge_decides_at_its_phase_and_is_told_of_the_whole_interval() -> None:
    simulator, made = toy_crowd(3), []

    def make() -> Controller:
        made.append(Noting())
        return made[-1]

    phase = np.array([0, 2, 2])
    controller = Staggered("noting", make, simulator.model, phase, 5)
    played = []
    state, last = simulator.reset(1), None
    controller.reset(simulator.model, 3)
    results = []
    for _ in range(13):
        played.append(controller.decide(state, last).cuts[:, 0].tolist())
        last = simulator.step(np.full((3, 2), 6))
        state = last.state
        results.append(last)
    # All at step 0; then edge 0 at 5 and 10, the others at 2, 7 and 12.
    assert played == [[1, 1, 1]] * 2 + [[1, 2, 2]] * 3 + [[2, 2, 2]] * 2 + [[2, 3, 3]] * 3 + [
        [3, 3, 3]
    ] * 2 + [[3, 4, 4]]
    first, others, alone = made
    assert len(controller.decide_s) == len(alone.asked) == len(first.asked) == 3
    assert others.asked[0][1] is None
    joined = others.asked[2][1]  # steps 2 to 6
    assert joined is not None and joined.completed is not None
    five = results[2:7]
    for name in ("arrived", "completed", "outstanding_s", "node_busy_s"):
        total = sum(getattr(r.record, name)[1:] for r in five)
        np.testing.assert_allclose(getattr(joined.record, name), total)
    done = joined.completed
    assert set(done.env.tolist()) == {0, 1}
    for k in range(2):
        ended = np.concatenate([r.completed.completion_s[r.completed.env == k + 1] for r in five])
        np.testing.assert_array_equal(done.completion_s[done.env == k], ended)
    mean_s = joined.record.latency_sum_s / joined.record.completed
    ratio = mean_s / simulator.model.references.latency_s
    np.testing.assert_allclose(others.asked[2][0].latency_ratio, ratio)
    assert others.asked[2][0].batch == 2


@pytest.mark.parametrize("make", [Solver, Paper])
def test_one_step_per_interval_changes_nothing(make: type) -> None:
    """Only the last ratio is told otherwise where nothing completed: these two do not look."""
    runs = []
    for wrapped in (False, True):
        simulator = toy_crowd(3, 1.0)
        controller = make()
        if wrapped:
            phase = np.zeros(3, dtype=np.int64)
            controller = Staggered("wrapped", make, simulator.model, phase, 1)
        runs.append(run_arm(simulator, controller, seed=3, n_intervals=40))
    one, other = runs
    np.testing.assert_array_equal(one.latency_s, other.latency_s)
    np.testing.assert_array_equal(one.switches, other.switches)


def test_who_counts_others_sees_slower_nodes_and_hops() -> None:
    simulator = toy_crowd(2)
    inner = Noting()
    busy = np.zeros((2, 5))
    busy[1] = [0.0, 0.0, 0.5, 0.75, 0.99]
    controller = CountingOthers(inner, lambda: busy)
    state = simulator.reset(1)
    controller.reset(simulator.model, 2)
    controller.decide(state)
    seen = inner.asked[0][0]
    np.testing.assert_allclose(seen.node_load[0], state.node_load[0])
    np.testing.assert_allclose(seen.bytes_per_s[0], state.bytes_per_s[0])
    free = (1.0 - seen.node_load[1]) / (1.0 - state.node_load[1])
    np.testing.assert_allclose(free, [1.0, 0.5, 0.05])
    np.testing.assert_allclose(seen.bytes_per_s[1] / state.bytes_per_s[1], [1.0, 0.25])


def test_others_busy_is_what_the_other_edges_use() -> None:
    scenario = toy_scenario(3, interval_s=0.2)
    model = CostModel(toy_profile(3), scenario)
    simulator = SharingSimulator(model, 2, Conditions(scenario, np.full(2, 6.0), 2))
    fog, edge = [0, 6], [6, 6]
    used = []
    for _ in range(400):
        record = simulator.step(np.array([fog, edge])).record
        used.append(record.node_busy_s[:, 1].sum() / 0.2)
    busy = simulator.others_busy
    weight = np.exp(-0.2 / 3.0) ** np.arange(len(used))[::-1]
    expected = (weight * used).sum() / weight.sum()
    assert 0.05 < expected
    # While nothing departs the station's time is put down to both.
    assert busy[1, 2] == pytest.approx(expected, rel=0.3) and busy[0, 2] < 0.3 * busy[1, 2]
    assert (busy[:, :2] == 0).all() and (busy[:, 3:] == 0).all()


def test_an_edge_alone_has_no_others() -> None:
    simulator = toy_crowd(1)
    for _ in range(20):
        simulator.step(np.array([[0, 3]]))
    assert (simulator.others_busy == 0).all()


def test_grown_capacity_is_faster_and_as_frugal() -> None:
    profile = synthetic_model("alexnet", Scenario.load())
    one, four = (crowd_model(profile, 0.5, 1.0, factor) for factor in (1, 4))
    np.testing.assert_allclose(four.demand[:2], one.demand[:2])
    np.testing.assert_allclose(four.demand[2::2], one.demand[2::2] / 4, rtol=1e-6)
    np.testing.assert_allclose(four.active_cost, one.active_cost, rtol=1e-6)
    assert four.rate_rps() == one.rate_rps()
    assert four.profile.hops[1].bytes_per_s == 4 * one.profile.hops[1].bytes_per_s
    # Half of what the edge can do, an eighth of which others take.
    alone_s = one.table.work_s[[p.cuts == (21, 21) for p in one.plans], 0].item()
    assert one.rate_rps() * alone_s / 0.875 == pytest.approx(0.5)


def test_best_static_is_the_best_common_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "LEAST_ROWS", 1)
    profile = synthetic_model("alexnet", Scenario.load())
    slow, fast = (crowd_model(profile, 0.5, s) for s in (1.0, 0.2))
    small = Crowd(slow, fast, 3, 2, 6, 2)
    best = small._best_static().reshape(2, 3, 2)
    assert (best == best[:, :1]).all()

    def cost(cuts: np.ndarray) -> np.ndarray:
        small._keep("any", "", small._run(Static("", cuts)), [])
        return small._cost["any", ""]

    found = cost(best.reshape(6, 2))
    for cuts in slow.table.cuts[::8]:
        # Found in steps of a second; admission is the same to within a few requests.
        assert (found <= 1.01 * cost(np.tile(cuts, (6, 1)))).all()


def test_an_edge_without_requests_is_served_all_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "LEAST_ROWS", 1)
    profile = synthetic_model("alexnet", Scenario.load())
    slow, fast = (crowd_model(profile, 1e-6, s) for s in (1.0, 0.2))
    quiet = Crowd(slow, fast, 3, 2, 2, 1)
    quiet.run("edge", None)
    row = quiet.results()["arms"][0]
    assert row["cost"] == row["lost"] == 0.0 and row["served"]["ratio"] == 1.0


def test_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(crowd, "LEAST_ROWS", 1)
    out = tmp_path / "out.json"
    argv = ["--model", "alexnet", "--seeds", "1", "--seconds", "2", "--startup-s", "2"]
    arms = ["--arms", "static,best-static,solver,policy-all"]
    assert edges.main([*argv, *arms, "--edges", "1,3", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [c["edges"] for c in result["crowds"]] == [1, 3]
    alone, three = ({(r["arm"], r["decides"]): r for r in c["arms"]} for c in result["crowds"])
    assert list(alone) == [
        ("static", ""), ("best-static", ""), ("solver", "at once"), ("solver", "per request"),
        ("policy-all", "at once"), ("policy-all", "per request"),
    ]  # fmt: skip
    assert {when for _, when in three} == {"", "at once", "staggered", "per request", "counting"}
    assert alone["best-static", ""]["ratio"]["mean"] == 1.0
    assert 0 < alone["solver", "at once"]["decide_us"]["p50"]
    assert 0 <= three["solver", "staggered"]["leaving"]["mean"] <= 1
    shown = capsys.readouterr().out
    assert "3 edges" in shown and "staggered" in shown
    for bad, said in (
        (["--edges", "0,5"], "--edges must be different numbers from 1 to 1000"),
        (["--arms", "oracle"], "unknown arm 'oracle'"),
        (["--arms", "policy", "--checkpoint", str(tmp_path)], "no checkpoint in"),
    ):
        assert edges.main([*argv, *bad]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert edges._startup_s(["solver"], 2.0) == 30
    assert edges._startup_s(["paper-1s"], 2.0) == 30 + 57
