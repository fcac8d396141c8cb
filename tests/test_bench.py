"""The bench in short form: what it reports and that outputs are right, not how long things take."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from executor.bench.__main__ import main
from executor.bench.cases import echo_case
from executor.bench.longrun import growth
from executor.bench.measure import CaseResult, SystemResult
from executor.bench.report import summary, table
from executor.bench.systems import pump_futures

ROOT = Path(__file__).resolve().parent.parent
NET = """
from torch import nn

INPUT_SHAPE = (1, 3, 32, 32)


def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(1),
        nn.Linear(8 * 28 * 28, 10),
    )
"""


def bench(*args):
    return subprocess.run(
        [sys.executable, "-m", "executor.bench", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:make"


def test_every_system_runs_every_case_and_all_outputs_are_right(net, tmp_path):
    json_path, png = tmp_path / "bench.json", tmp_path / "bench.png"
    ran = bench(
        *("--model", net, "--sizes", "300", "--rounds", "4", "--seconds", "20"),
        *("--json", str(json_path), "--plot", str(png)),
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(json_path.read_text())
    names = ["echo 300 KiB"]
    names += [f"net.make, {how}" for how in ("2 stages", "3 stages", "3 stages, shaped")]
    assert [case["case"] for case in result["cases"]] == names
    for case in result["cases"]:
        assert case["case"] in ran.stdout
        assert {"executor", "pickled socket"} <= set(case["systems"])
        assert set(case["systems"]).isdisjoint(result["missing"])
        for name, system in case["systems"].items():
            assert name in ran.stdout
            assert 2 <= system["requests"] <= 4 and system["wrong"] == 0
            assert system["floor_p50_s"] > 0
            assert 0 < system["p50_s"] <= system["p95_s"] <= system["p99_s"]
            assert len(system["memory_mib"]) == case["n_nodes"] and min(system["memory_mib"]) > 0
    shaped, three = result["cases"][-1], result["cases"][-2]
    assert "torch rpc" in shaped["skipped"] or "torch rpc" in result["missing"]
    # 5 and 10 ms each way, and the bytes at 40 and 60 Mbit/s.
    assert shaped["wire_s"] > 0.03 > three["wire_s"]
    for system in three["systems"].values():
        assert set(system["throughput"]) == {"1", "4", "8"}
        assert all(t["rate_rps"] > 0 and t["of_bound"] > 0 for t in system["throughput"].values())
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_long_run_changes_plans_and_watches_memory_and_files(net, tmp_path):
    path = tmp_path / "long.json"
    ran = bench("--model", net, "--long", "160", "--json", str(path))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(path.read_text())
    assert (result["requests"], result["plan_changes"], result["wrong"]) == (160, 3, 0)
    # The last plan did not get all of its requests.
    assert len(result["first_after_change"]) == 2 and min(result["first_after_change"]) > 0
    assert "first request under a new plan" in ran.stdout
    assert len(result["samples"]) == 20 and result["samples"][-1]["requests"] == 160
    late = [sample["open_files"] for sample in result["samples"][10:]]
    assert late[0] == late[-1] and len(late[0]) == 4
    assert result["growth"]["open_files"] == [0, 0, 0, 0]
    assert len(result["growth"]["memory_mib"]) == 4 and "growth" in ran.stdout


def test_growth_is_that_of_the_settled_run():
    samples = [[9.0, 3], [5.0, 3], [5.0, 3], [5.0, 4], [5.5, 4], [6.0, 4], [7.0, 4], [7.0, 4]]
    assert growth(samples) == [2.0, 1.0 - 0.5]
    assert growth([[5.0, 3]]) == [0.0, 0]


def test_the_memory_of_real_nodes_is_held_against_what_is_allowed(net, tmp_path, capsys):
    path = tmp_path / "memory.json"
    assert main(["--model", net, "--memory", "--backends", "eager", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    (node,) = result["nodes"]
    assert node["backend"] == "eager" and 0 < node["weights_mib"] < 1
    assert node["bound_mib"] > result["no_model_mib"] + 100 and node["within"]
    assert f"{node['memory_mib']:.0f} MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--rounds", "1"], "--rounds"),
        (["--seconds", "0"], "--seconds"),
        (["--sizes", "4,x"], "--sizes"),
        (["--sizes", "99999999"], "--sizes"),
        (["--long", "0"], "--long"),
        (["--memory", "--backends", "eager,abacus"], "abacus"),
        (["--json", "no/such/folder/f.json"], "no/such/folder"),
        (["--systems", "carrier-pigeon"], "carrier-pigeon"),
        (["--model", "alexnett", "--sizes", "none", "--systems", "executor"], "alexnett"),
    ],
)
def test_bad_input_is_one_line(args, word, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_the_floor_is_a_requests_own_stages_and_the_wire():
    system = SystemResult(
        latency_s=[0.10, 0.12, 0.20],
        stage_s=[0.07, 0.09, 0.16],
        memory_mib=[1.0],
        rate_rps={4: [9.0, 11.0]},
        bound_rps={4: [10.0, 10.0]},
    )
    case = CaseResult("net, 3 stages", 3, (1, 2), (400, 300, 200), 100, 0.01, {"executor": system})
    values = summary(case)["systems"]["executor"]
    assert values["floor_p50_s"] == pytest.approx(0.10)
    assert values["overhead_s"] == pytest.approx(0.02)
    assert values["p50_over_floor"] == pytest.approx(1.2)
    assert values["throughput"]["4"] == {"rate_rps": 10.0, "of_bound": pytest.approx(1.0)}
    assert "WRONG" not in table([summary(case)])
    system.wrong = 1
    assert "1 of 3 WRONG" in table([summary(case)])


def test_an_echo_is_the_tensor_and_is_copied_once():
    case = echo_case(4096)
    x = case.inputs[0]
    y = case.chain.run(x, 0, 1)
    assert case.is_right(0, y) and not case.is_right(1, y) and not case.is_right(0, y[:, 1:])
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
    assert len(case.chain.taken_s) == 1 and case.crossing_bytes() == ((4096,) * 3, 4096)


def test_no_more_are_in_flight_than_asked():
    waiting, most = [], []

    class Answer:
        def result(self, timeout=None):
            waiting.remove(self)

    def submit(x):
        waiting.append(Answer())
        most.append(len(waiting))
        return waiting[-1]

    done_s = pump_futures(submit, [torch.zeros(1)] * 9, 4)
    assert max(most) == 4 and not waiting
    assert len(done_s) == 9 and np.all(np.diff(done_s) >= 0)
