"""Comparing arms: pairing, intervals, accounts that add up, the command."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from agents import evaluate
from agents.arms.controllers import ArmContext, Solver, Static, make_arm
from agents.paired import bootstrap_mean, paired_ratio
from agents.studies import cells
from agents.studies.compare import (
    ArmRun,
    best_static_cuts,
    per_row,
    run_arm,
    startup_intervals,
    summarise,
    versus,
)
from env.cost import Cost
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from env.system import DRAIN_DEADLINES
from executor.errors import ConfigError
from executor.model import model_spec
from executor.plan import Plan

SEED = 11


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load().replace(capacity_fraction=0.2)
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


@pytest.fixture(scope="module")
def simulator(model) -> Simulator:
    return Simulator(model, 6, 0, record_requests=True)


@pytest.fixture(scope="module")
def runs(model, simulator) -> dict[str, ArmRun]:
    return {
        name: run_arm(
            simulator,
            make_arm(name, ArmContext(model)),
            seed=SEED,
            n_intervals=25,
            startup=5,
        )
        for name in ("static", "paper", "solver")
    }


def test_bootstrap_of_equal_rows_is_a_point():
    assert bootstrap_mean(np.full(9, 2.5)) == {"mean": 2.5, "low": 2.5, "high": 2.5}
    assert paired_ratio(np.full(9, 3.0), np.full(9, 2.0)) == {"mean": 1.5, "low": 1.5, "high": 1.5}


def test_bootstrap_interval_is_about_two_standard_errors():
    rng = np.random.default_rng(0)
    values = rng.normal(5.0, 2.0, 400)
    got = bootstrap_mean(values)
    error = values.std() / 20.0
    assert got["mean"] == pytest.approx(values.mean())
    assert got["mean"] - got["low"] == pytest.approx(1.96 * error, rel=0.1)
    assert got["high"] - got["mean"] == pytest.approx(1.96 * error, rel=0.1)
    assert bootstrap_mean(values) == got


def test_pairing_removes_what_the_conditions_share():
    rng = np.random.default_rng(1)
    hard = rng.exponential(10.0, 30)  # how hard a condition is, the same for both arms
    a, b = 0.9 * hard, hard
    ratio = paired_ratio(a, b)
    assert (ratio["low"], ratio["high"]) == (pytest.approx(0.9), pytest.approx(0.9))
    assert bootstrap_mean(a - b)["high"] < 0
    assert bootstrap_mean(a)["high"] > bootstrap_mean(b)["low"]


def test_arms_meet_the_same_arrivals_and_their_accounts_add_up(runs, model):
    arrived = runs["static"].steady.arrived
    for run in runs.values():
        np.testing.assert_array_equal(run.steady.arrived, arrived)
        everything = [run.startup, run.steady, run.drained]
        total = {
            name: sum(getattr(r, name) for r in everything)
            for name in ("arrived", "completed", "lost", "outstanding_s", "latency_sum_s")
        }
        np.testing.assert_array_equal(total["arrived"], total["completed"] + total["lost"])
        if not total["lost"].any():  # Little's law
            np.testing.assert_allclose(total["outstanding_s"], total["latency_sum_s"], rtol=1e-9)
        # Latencies are those of requests that arrived in the steady state.
        carried = run.startup.arrived - run.startup.completed - run.startup.lost
        completed = run.spent.completed - carried
        np.testing.assert_array_equal(np.bincount(run.latency_row, minlength=6), completed)


def test_cost_per_request_is_the_steady_states_over_its_arrivals(runs, model):
    run = runs["solver"]
    cost = Cost(model.profile, model.references, model.scenario)
    one = np.ones(run.rows)
    expected = (cost(run.steady, one) + cost(run.drained, one)) / run.steady.arrived
    np.testing.assert_allclose(per_row(run, model)["cost"], expected)


def test_an_arm_against_itself_differs_by_nothing(runs, model):
    result = versus(runs["static"], runs["static"], model)
    ratio = result.pop("cost_ratio")
    assert ratio == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert all(v == {"mean": 0.0, "low": 0.0, "high": 0.0} for v in result.values())


def test_static_never_switches_and_needs_no_probes(runs):
    assert not runs["static"].switches.any() and not runs["static"].probe_s.any()
    assert runs["solver"].switches.any()


def test_stacked_runs_keep_their_rows(runs):
    run = runs["solver"]
    both = ArmRun.stack([run, run])
    assert both.rows == 12
    np.testing.assert_array_equal(both.steady.arrived, np.tile(run.steady.arrived, 2))
    assert both.latency_row.max() > 5 and len(both.latency_s) == 2 * len(run.latency_s)


def test_best_static_costs_no_more_than_any_static_plan(model, simulator):
    settings = {"seed": SEED, "n_intervals": 10, "startup": 3}
    cuts = best_static_cuts(simulator, **settings)
    assert cuts.shape == (6, 2)
    best = per_row(run_arm(simulator, Static("b", cuts), **settings), model)["cost"]
    for plan in (model.plans[0], model.plans[7], model.plans[-1]):
        cost = per_row(run_arm(simulator, Static("s", Plan(plan.cuts)), **settings), model)["cost"]
        assert (best <= cost + 1e-12).all()


def test_start_up_covers_the_references_scheduler(simulator, model):
    intervals = startup_intervals(simulator, SEED)
    rate = model.rate_rps()
    assert intervals >= 95 / rate / 1.5 and intervals < 200


def test_summary_has_every_figure(runs, model):
    summary = summarise(runs, model, {name: 1.0 for name in runs})
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    for name, arm in summary.items():
        assert set(arm["latency_ms"]) == {"mean", "p50", "p95", "p99"}
        assert set(arm["energy_j"]) == {"full", "compute"}
        assert set(arm["energy_j"]["full"]) == {"edge", "total"}
        assert set(arm["requests"]) == {"submitted", "completed", "lost", "late"}
        assert arm["requests"]["submitted"] == (
            arm["requests"]["completed"] + arm["requests"]["lost"]
        )
        assert {"profile_s", "probe_s", "decide_us", "switch_ms", "energy_j"} <= set(
            arm["overhead"]
        )
        assert {"cost", "latency_ms", "energy_edge_j", "energy_total_j", "cost_ratio"} == set(
            arm["versus_static"]
        )
        assert set(arm["versus"]) == set(runs) - {name, "static"}
        assert arm["latency_ms"]["p50"] <= arm["latency_ms"]["p95"] <= arm["latency_ms"]["p99"]
    edge = model.profile.nodes[0].power
    most, least = 50.0 / edge.idle_w, 50.0 / (edge.idle_w + edge.compute_w + edge.transmit_w)
    assert least < summary["static"]["battery_h"] < most
    assert summary["static"]["overhead"]["profile_s"] == 0.0
    assert summary["solver"]["overhead"]["profile_s"] > summary["paper"]["overhead"]["profile_s"]


def test_edge_only_unloaded_costs_what_the_example_says():
    """One arm whose every figure is known: edge-only, one at a time."""
    scenario = Scenario.load()
    quiet = [type(n)(n.name, n.device, n.ratio) for n in scenario.nodes]
    scenario = scenario.replace(nodes=tuple(quiet), rate_rps=0.02)
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    simulator = Simulator(model, 4, 0, record_requests=True)
    arm = make_arm("edge", ArmContext(model))
    rows = per_row(run_arm(simulator, arm, seed=3, n_intervals=400), model)
    np.testing.assert_allclose(rows["cost"], 1.1, rtol=1e-6)
    np.testing.assert_allclose(rows["latency_ms"], 1e3 * model.references.latency_s, rtol=1e-6)
    np.testing.assert_allclose(rows["energy_edge_j"], model.references.edge_j, rtol=1e-6)


@pytest.fixture
def profile_file(model, tmp_path):
    path = tmp_path / "profile.json"
    model.profile.save(path)
    return path


def command(profile_file, tmp_path, *more: str) -> list[str]:
    fixed = ["--model", "alexnet", "--profile", str(profile_file), "--seeds", "3"]
    fixed += ["--checkpoint", str(tmp_path / "none"), "--intervals", "8", "--startup-s", "4"]
    return [*fixed, *more]


def test_command_on_the_simulator(profile_file, tmp_path, capsys):
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    argv = command(profile_file, tmp_path, "--arms", "solver,paper", "--rates", "0.1,0.3")
    assert evaluate.main([*argv, "--json", str(out), "--plot", str(figure)]) == 0
    assert "solver" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["rates"] == [pytest.approx(0.1), pytest.approx(0.3)]
    assert list(result["arms"]) == ["static", "paper", "solver"]
    assert list(result["by_rate"]) == ["0.1", "0.3"]
    assert (result["model"], result["backend"], result["seeds"]) == ("alexnet", "simulator", 3)
    assert result["interval_s"] == 1.0 and result["by_rate"]["0.1"]["startup_s"] == 4.0
    pooled = result["arms"]["solver"]["requests"]["submitted"]
    parts = [r["arms"]["solver"]["requests"]["submitted"] for r in result["by_rate"].values()]
    assert pooled == sum(parts)
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_command_shows_each_arms_regret_to_the_oracle(profile_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = command(profile_file, tmp_path, "--arms", "solver,linucb,oracle", "--rates", "0.5")
    assert evaluate.main([*argv, "--json", str(out)]) == 0
    assert "x oracle" in capsys.readouterr().out
    arms = json.loads(out.read_text())["by_rate"]["0.5"]["arms"]
    assert list(arms) == ["static", "solver", "linucb", "oracle"]
    assert arms["oracle"]["regret"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert arms["oracle"]["overhead"]["decide_us"] == 0.0
    assert arms["oracle"]["overhead"]["profile_s"] == 0.0
    for name in ("static", "solver", "linucb"):
        regret = arms[name]["regret"]
        assert regret == arms[name]["versus"]["oracle"]["cost_ratio"]
        assert 1.0 - 1e-9 <= regret["low"] <= regret["mean"] <= regret["high"]
    without = command(profile_file, tmp_path, "--arms", "solver", "--json", str(out))
    assert evaluate.main(without) == 0
    assert "x oracle" not in capsys.readouterr().out
    assert "regret" not in json.loads(out.read_text())["arms"]["solver"]


def test_command_repeats_exactly(profile_file, tmp_path):
    results = []
    for k in range(2):
        out = tmp_path / f"{k}.json"
        argv = command(profile_file, tmp_path, "--arms", "solver", "--json", str(out))
        assert evaluate.main(argv) == 0
        result = json.loads(out.read_text())
        for arm in result["arms"].values():
            del arm["overhead"]["decide_us"]
        results.append(result["arms"])
    assert results[0] == results[1]


def test_cells_are_the_same_side_by_side(profile_file, tmp_path):
    rows = []
    for count in ("1", "2"):
        out = tmp_path / f"{count}.json"
        argv = command(profile_file, tmp_path, "--arms", "solver", "--rates", "0.4,0.8")
        assert evaluate.main([*argv, "--workers", count, "--json", str(out)]) == 0
        result = json.loads(out.read_text())
        assert list(result["by_rate"]) == ["0.4", "0.8"]
        rows.append([part["cost_rows"] for part in result["by_rate"].values()])
    assert rows[0] == rows[1]


def test_command_runs_a_live_system_seed_by_seed(profile_file, tmp_path, monkeypatch, capsys):
    """The testbed's path, with a simulated environment in its place."""
    opened = []

    def open_system(args, scenario, profile):
        opened.append(scenario)
        system = Simulator(CostModel(profile, scenario), 1, 0, record_requests=True)
        return contextlib.nullcontext(system)

    monkeypatch.setattr(cells, "make_testbed_system", open_system)
    out = tmp_path / "out.json"
    argv = command(profile_file, tmp_path, "--backend", "testbed", "--repeats", "2")
    argv += ["--json", str(out)]
    page = ["--report", str(tmp_path / "page")]
    assert evaluate.main([*argv, *page, "--arms", "solver,best-static"]) == 0
    result = json.loads(out.read_text())
    assert list(result["arms"]) == ["static", "best-static", "solver"]
    assert result["repeats"] == 2
    # Each repeat meets the same conditions, so it gives the same submissions.
    assert result["arms"]["solver"]["requests"]["submitted"] % 2 == 0
    assert opened[0].episode_s == 12.0
    # Beside it stands what the simulator says; here both are one.
    (part,) = result["by_rate"].values()
    assert part["simulated"]["slowness"] == {"edge": 1.0, "fog": 1.0, "cloud": 1.0}
    assert part["simulated"]["cost_rows"] == part["cost_rows"]
    assert {n: a["cost"] for n, a in part["simulated"]["arms"].items()} == {
        n: a["cost"] for n, a in part["arms"].items()
    }
    assert "beside the simulator, nodes as they were (edge 1.00" in capsys.readouterr().out
    assert "The simulator beside the nodes" in (tmp_path / "page" / "index.html").read_text()
    # No simulator here decides per request.
    assert evaluate.main([*argv, "--arms", "solver", "--per-request"]) == 0
    assert "simulated" not in json.loads(out.read_text())


def test_nodes_give_no_request_up_before_the_simulator_does(
    profile_file, tmp_path, monkeypatch, capsys
):
    """A node refuses what has waited for half of its time, which the simulator never does."""

    def open_system(args, scenario, profile):
        return contextlib.closing(LiveSystem(CostModel(profile, scenario), None, lambda i: i))

    def run(system, *args, **kwargs):
        run_out_s = DRAIN_DEADLINES * system.model.references.deadline_s
        assert 0.5 * system.timeout_s == pytest.approx(system.scenario.episode_s + run_out_s)
        raise ConfigError("as told")

    monkeypatch.setattr(cells, "make_testbed_system", open_system)
    monkeypatch.setattr(cells, "run_arm", run)
    argv = command(profile_file, tmp_path, "--backend", "testbed", "--arms", "solver")
    assert evaluate.main(argv) == 2
    assert "as told" in capsys.readouterr().err


def test_arms_on_the_testbed_correct_their_profile_if_asked(profile_file, tmp_path, monkeypatch):
    """Nodes whose fog is four times as slow as profiled, with a simulator in their place."""

    def open_system(args, scenario, profile):
        slow = CostModel(profile.scaled([1.0, 4.0, 1.0]), scenario)
        rate_rps = CostModel(profile, scenario).rate_rps()
        system = Simulator(slow, 1, 0, rate_rps=rate_rps, record_requests=True)
        return contextlib.nullcontext(system)

    monkeypatch.setattr(cells, "make_testbed_system", open_system)
    out = tmp_path / "out.json"
    argv = command(profile_file, tmp_path, "--backend", "testbed", "--intervals", "40")
    costs = {}
    for more in ((), ("--recalibrate",)):
        assert evaluate.main([*argv, *more, "--arms", "solver,mpc,cloud", "--json", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result.get("recalibrate", False) is bool(more)
        costs[bool(more)] = {name: arm["cost"] for name, arm in result["arms"].items()}
    assert costs[True]["static"] == costs[False]["static"]
    assert costs[True]["cloud"] == costs[False]["cloud"]
    assert costs[True]["solver"] < 0.95 * costs[False]["solver"]
    assert costs[True]["mpc"] < 0.95 * costs[False]["mpc"]
    # Each begins with the profile as it was taken: none corrects it for the next.
    assert evaluate.main([*argv, "--recalibrate", "--arms", "mpc", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["arms"]["mpc"]["cost"] == costs[True]["mpc"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "solver,magic"], "unknown arm 'magic'; expected some of edge"),
        (["--arms", "policy"], "no checkpoint in"),
        (["--backend", "testbed", "--arms", "oracle"], "only --backend simulator can tell"),
        (["--rates", "fast"], "--rates must be fractions like 0.4,0.8, got 'fast'"),
        (["--rates", "0.4,-1"], "--rates must be different fractions above 0"),
        (["--workers", "none"], "--workers takes a positive count of processes, or ray"),
        (["--per-request"], "--per-request is for --backend testbed"),
        (["--recalibrate"], "--recalibrate is for --backend testbed; a simulator is as its"),
        (["--workers", "2", "--backend", "testbed"], "--workers is for the simulator"),
        (["--startup-s", "-1"], "--startup-s must be >= 0"),
        (["--interval", "often"], "--interval must be seconds like 0.05,1,10, got 'often'"),
        (["--interval", "1,1"], "--interval must be different seconds above 0"),
        (["--interval", "0.12", "--arms", "solver"], "must be a multiple of 0.05 s, got 0.12 s"),
        (["--interval", "60", "--arms", "solver"], "interval_s must lie in 0.05..10 s, got 60"),
        (["--interval", "1,2", "--plot", "x.png"], "--plot shows one interval"),
        (["--scenario", "/nowhere.toml"], "cannot read scenario /nowhere.toml"),
        (["--profile", "/nowhere.json"], "cannot read profile /nowhere.json"),
        (["--arms", "solver", "--json", "/proc/none/out.json"], "cannot write /proc/none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(more, message, profile_file, tmp_path, capsys):
    assert evaluate.main(command(profile_file, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_profile_must_exist_and_belong_to_the_model(profile_file, tmp_path, capsys):
    argv = ["--model", "alexnet", "--checkpoint", str(tmp_path / "none"), "--arms", "solver"]
    assert evaluate.main(argv) == 2
    assert "give --profile FILE, or make a checkpoint" in capsys.readouterr().err
    assert evaluate.main(["--model", "vgg16", "--profile", str(profile_file)]) == 2
    assert "is of alexnet, not vgg16" in capsys.readouterr().err
    for argv in (["--model", "lenet"], ["--model", "alexnet", "--seeds", "0"]):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(argv)
        assert stopped.value.code == 2
    assert "unknown model 'lenet'" in capsys.readouterr().err


def test_decisions_are_timed_for_one_environment(runs):
    run = runs["solver"]
    assert len(run.decide_s) == 25 and min(run.decide_s) > 0.0
    assert Solver().name == "solver"
