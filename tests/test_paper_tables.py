"""The reference's tables beside ours: its figures, its closed loop, its rule."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from agents import paper_tables
from agents.arms.recalibrated import Recalibrated
from agents.report.paper import invalid
from agents.studies import paper_tables as tables
from agents.studies.paper_tables import reductions, share_of_most, study
from env.predict import CostModel
from env.reference import closed_loop, measured, reference_profile
from env.scenario import Scenario
from env.simulator import Simulator
from executor.errors import ConfigError
from executor.model import model_spec
from executor.plan import Plan, constrained_plans, is_constrained


@pytest.fixture(scope="module")
def alexnet() -> dict:
    return study("alexnet", "as stated", 20)


def test_its_own_figures_give_its_own_reductions() -> None:
    said = {"vgg16": (0.0634, 0.3582), "alexnet": (0.2292, 0.3570), "mobilenet_v2": (0.142, 0.2709)}
    for name, (latency, energy) in said.items():
        m = measured()[name]
        assert 1 - m.adaptive_ms / m.static_ms == pytest.approx(latency, abs=6e-5)
        # Its joules have three decimals.
        assert 1 - m.adaptive_j / m.static_j == pytest.approx(energy, abs=2e-3)


def test_one_device_by_itself_is_its_table_1(alexnet: dict) -> None:
    for name in measured():
        profile = reference_profile(model_spec(name), Scenario.load("paper"))
        whole_ms = 1e3 * profile.work_prefix_s()[:, -1]
        np.testing.assert_allclose(whole_ms, measured()[name].single_ms)
    assert alexnet["single"]["j"][:2] == pytest.approx([1.589, 0.315], abs=1e-3)
    assert alexnet["free"]["edge"]["latency_ms"] == pytest.approx(132.4)
    assert alexnet["free"]["edge"]["compute_j"] == pytest.approx(1.5888)


def test_a_split_takes_the_sum_of_its_parts(alexnet: dict) -> None:
    profile = reference_profile(model_spec("alexnet"), Scenario.load("paper"))
    prefix, size = profile.work_prefix_s(), profile.spec.cut_bytes
    edge, fog = prefix[0, 10], prefix[1, 14] - prefix[1, 10]
    cloud = prefix[2, 21] - prefix[2, 14]
    hops = (size[10] + size[14] + 2 * size[21]) / 40e6  # and the output comes back
    static = alexnet["constrained"]["static"]
    assert static["plan"] == "(10, 14)"
    assert static["latency_ms"] == pytest.approx(1e3 * (edge + fog + cloud + hops))
    assert static["compute_j"] == pytest.approx(12 * edge + 15 * fog + 31.8 * cloud)
    assert static["full_j"] > static["compute_j"]  # idling and transmitting


def test_no_arm_beats_the_clairvoyants_and_all_keep_the_rule(alexnet: dict) -> None:
    spec = model_spec("alexnet")
    for rule in ("constrained", "free"):
        arms = alexnet[rule]
        for name, figures in arms.items():
            assert figures["latency_ms"] >= arms["best latency"]["latency_ms"] - 1e-6, name
            assert figures["compute_j"] >= arms["best energy"]["compute_j"] - 1e-9, name
            plan = Plan(tuple(map(int, figures["plan"].strip("()").split(","))))
            assert rule == "free" or is_constrained(plan, spec), name
    # Nothing changes, so the solver finds the clairvoyant's plan.
    assert alexnet["constrained"]["solver"]["plan"] == alexnet["constrained"]["best cost"]["plan"]
    less = reductions(alexnet["constrained"], "solver")
    assert less["latency_ms"] > 0.2292 and less["compute_j"] > 0.3570
    net = reductions(alexnet["constrained"], "solver", overall=True)
    assert net["latency_ms"] < less["latency_ms"] and net["compute_j"] < less["compute_j"]
    assert reductions(alexnet["constrained"], "static", overall=True)["latency_ms"] == 0.0


def test_each_arm_is_held_against_the_most_there_is_to_save(alexnet: dict) -> None:
    for rule in ("constrained", "free"):
        arms = alexnet[rule]
        assert share_of_most(arms, "static") == {"latency_ms": 0.0, "compute_j": 0.0}
        assert share_of_most(arms, "best latency")["latency_ms"] == 1.0
        assert share_of_most(arms, "best energy")["compute_j"] == 1.0
        assert all(s <= 1.0 + 1e-6 for arm in arms for s in share_of_most(arms, arm).values())


def test_on_nodes_every_arm_runs_in_a_closed_loop(tmp_path, capsys, monkeypatch) -> None:
    """Three real processes behind hops of 320 Mbit/s; quicker than the scenario's."""
    quick = Scenario.load("paper")
    nodes = tuple(replace(n, ratio=r) for n, r in zip(quick.nodes, (3.0, 2.0, 1.0), strict=True))
    monkeypatch.setattr(tables.Scenario, "load", lambda name: quick.replace(nodes=nodes))
    monkeypatch.setattr(tables, "STARTUP", 2)
    monkeypatch.setattr(tables, "LEARNED", 2)
    correcting: list[Recalibrated] = []

    class Noted(Recalibrated):
        def __init__(self, controller) -> None:
            super().__init__(controller)
            correcting.append(self)

    monkeypatch.setattr(tables, "Recalibrated", Noted)
    out, page = tmp_path / "out.json", tmp_path / "page"
    argv = ["--backend", "testbed", "--models", "alexnet", "--requests", "2"]
    assert paper_tables.main([*argv, "--json", str(out), "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    for text in ("Table 1", "reported adaptive", "22.9%", "best cost", "on nodes", "of most"):
        assert text in shown
    result = json.loads(out.read_text())
    (found,) = result["ours"]["on nodes"].values()
    assert result["backend"] == "testbed" and set(found["overrun_share"]) == {
        "edge",
        "fog",
        "cloud",
    }
    # As deployed; each corrects a profile of its own: no arm learns from another's requests.
    assert [c.name for c in correcting] == ["solver", "solver", "policy"]
    assert len({id(c.model) for c in correcting}) == 3
    spec = model_spec("alexnet")
    for rule in ("constrained", "free"):
        for arm, figures in found[rule].items():
            assert min(figures[k] for k in ("latency_ms", "compute_j", "full_j")) > 0, arm
            plan = Plan(tuple(map(int, figures["plan"].strip("()").split(","))))
            assert rule == "free" or is_constrained(plan, spec), arm
    assert set(found["free"]) - set(found["constrained"]) == {"edge", "fog", "cloud", "policy"}
    assert not any(f["lost"] for rule in ("constrained", "free") for f in found[rule].values())
    found["free"]["solver"]["lost"] = 1
    assert "alexnet: not valid: 1 requests of solver (free) were lost" in invalid(result)
    assert "testbed, closed loop" in (page / "index.html").read_text()
    argv = ["--models", "alexnet", "--isolation", "netns"]
    assert paper_tables.main(argv) == 2
    assert "--isolation netns is for nodes of the testbed" in capsys.readouterr().err


def test_static_matched_takes_as_long_as_its_static_split(monkeypatch) -> None:
    monkeypatch.setattr(tables, "STARTUP", 5)
    arms = study("mobilenet_v2", "static matched", 5)["constrained"]
    assert arms["static"]["latency_ms"] == pytest.approx(measured()["mobilenet_v2"].static_ms)


def test_a_transformer_stands_in_by_its_operations(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tables, "STARTUP", 5)
    profile = reference_profile(model_spec("vit_b_16"), Scenario.load("paper"))
    whole_ms = 1e3 * profile.work_prefix_s()[:, -1]
    ratio = whole_ms / np.array(measured()["vgg16"].single_ms)
    # 17.6 against 15.5 GFLOP, but 86 against 138 million weights.
    assert ratio == pytest.approx(ratio[0]) and 0.9 < ratio[0] < 1.15
    argv = ["--models", "vit_b_16", "--requests", "3", "--report", str(tmp_path)]
    assert paper_tables.main(argv) == 0
    assert "static matched" not in (tmp_path / "index.html").read_text()
    shown = capsys.readouterr().out
    assert "vit_b_16" in shown and "(13, 27)" in shown and "best cost" in shown
    assert "reported" not in shown and "static matched" not in shown


def test_constrained_plans_are_all_that_obey_the_rule() -> None:
    for name in measured():
        spec = model_spec(name)
        plans = constrained_plans(spec)
        assert len(plans) == len(list(combinations(range(spec.head_start), 2)))
        assert all(is_constrained(p, spec) for p in plans) and list(plans) == sorted(
            plans, key=lambda p: p.cuts
        )
    scenario = Scenario.load("paper").replace(constrained=True)
    model = CostModel(reference_profile(model_spec("vgg16"), scenario), scenario)
    assert Plan((5, 10)) in model.plans and Plan((0, 10)) not in model.plans
    with pytest.raises(ConfigError, match="constrained plans need 2 to 15 nodes, got 16"):
        constrained_plans(model_spec("alexnet"), 16)


def test_closed_loop_brings_one_request_per_interval_and_environment() -> None:
    scenario = Scenario.load("paper")
    model = CostModel(reference_profile(model_spec("alexnet"), scenario), scenario)
    tape = closed_loop(scenario, np.array([[320.0, 320.0], [80.0, 320.0]]), batch=3)
    simulator = Simulator(model, 3, 0, record_requests=True, conditions=tape.play())
    took = []
    for _ in range(2):
        done = simulator.step(np.tile([3, 6], (3, 1))).completed
        assert done is not None and done.env.tolist() == [0, 1, 2]
        took.append(done.completion_s - done.arrival_s)
    # Cut 3's bytes over a hop of a quarter of the bandwidth, and the output back over it.
    extra = (186_624 + 4_000) / 40e6 * 3
    np.testing.assert_allclose(took[1] - took[0], extra)


def test_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(tables, "STARTUP", 5)
    out = tmp_path / "out.json"
    argv = ["--models", "alexnet", "--requests", "3", "--json", str(out)]
    assert paper_tables.main([*argv, "--report", str(tmp_path / "page")]) == 0
    shown = capsys.readouterr().out
    for text in ("Table 1", "reported adaptive", "22.9%", "35.7%", "best cost", "static matched"):
        assert text in shown
    result = json.loads(out.read_text())
    assert set(result["ours"]) == {"as stated", "static matched"}
    page = (tmp_path / "page" / "index.html").read_text()
    assert "22.9% / 35.7%" in page and str(tmp_path) not in page
    assert paper_tables.main(["--models", "lenet"]) == 2
    error = capsys.readouterr().err
    assert "vgg16, alexnet, mobilenet_v2; got --models 'lenet'" in error and error.count("\n") == 1
