"""The sim-to-real report in a short form, on real processes: its form, not its timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents import evaluate, sim_to_real
from agents.studies.sim_to_real import summary

MODEL = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )
"""


def row(mean: tuple[float, float], node: tuple[float, float], load: float = 0.1) -> dict:
    def figures(k: int) -> dict:
        return {"mean_ms": mean[k], "p95_ms": 2 * mean[k], "node_ms": [node[k], 0.0, 5.0],
                "hop_ms": [4.0, 0.0]}  # fmt: skip

    return {"mbps": 20.0, "load": load, "plan": [1, 2], "requests": 3,
            "measured": figures(0), "again": [], "simulated": figures(1),
            "recalibrated": figures(1), "corrected": figures(0)}  # fmt: skip


def test_errors_are_absolute_shares_of_what_was_measured() -> None:
    rows = [row((100.0, 90.0), (10.0, 12.0)), row((50.0, 60.0), (0.5, 9.0))]
    found = summary(rows, ["edge", "fog", "cloud"])
    mape = found["mape"]
    assert found["recalibrated"] == {k: mape[k] for k in ("mean", "p95")}
    assert found["corrected"] == {"mean": 0.0, "p95": 0.0}
    assert mape["mean"] == pytest.approx(0.15) and mape["p95"] == pytest.approx(0.15)
    # Half a millisecond is too short to be judged, and the fog ran nothing.
    assert mape["nodes"] == {"edge": pytest.approx(0.2), "fog": None, "cloud": 0.0}
    assert mape["hops"] == {"edge - fog": 0.0, "fog - cloud": None}


def test_cells_measured_again_tell_how_far_the_nodes_repeat_themselves() -> None:
    one, two = row((100.0, 90.0), (10.0, 12.0)), row((50.0, 60.0), (0.5, 9.0))
    names = ["edge", "fog", "cloud"]
    assert summary([one, two], names)["again"] == {"mean": None, "p95": None}
    one["again"], two["again"] = [{"mean_ms": 110.0, "p95_ms": 200.0}], [
        {"mean_ms": 35.0, "p95_ms": 120.0}
    ]  # fmt: skip
    again = summary([one, two], names)["again"]
    assert again == {"mean": pytest.approx(0.2), "p95": pytest.approx(0.1)}


def test_short_form_on_the_testbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    out, page = tmp_path / "out.json", tmp_path / "page"
    argv = ["--sim-to-real", "--model", f"{tmp_path / 'mine.py'}:tiny", "--plans", "2"]
    argv += [
        "--bandwidths",
        "40",
        "--requests",
        "4",
        "--repeats",
        "2",
        "--json",
        str(out),
        "--report",
        str(page),
    ]
    assert evaluate.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["nodes"] == ["edge", "fog", "cloud"] and 1 <= len(result["rows"]) <= 4
    for cell in result["rows"]:
        assert cell["mbps"] == 40.0 and cell["load"] in (0.1, 0.7) and cell["requests"] > 0
        for side in ("measured", "simulated", "recalibrated", "corrected"):
            assert cell[side]["mean_ms"] > 0 and len(cell[side]["node_ms"]) == 3
            assert len(cell[side]["hop_ms"]) == 2
    assert set(result["mape"]) == {"mean", "p95", "nodes", "hops"}
    assert set(result["overrun_share"]) == {"edge", "fog", "cloud"}
    text = (page / "index.html").read_text()
    assert text.count("<img alt=") == 2 and str(tmp_path) not in text
    shown = capsys.readouterr().out
    assert "mean absolute percentage error over" in shown
    assert "the same cells measured again" in shown
    assert "as recalibrated by the cells before: mean latency" in shown
    assert "with every node as fast as it was in the cell" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bandwidths", "fast"], "--bandwidths must be Mbit/s like 20,60, got 'fast'"),
        (["--bandwidths", "20,-1"], "--bandwidths must be different Mbit/s above 0, got '20,-1'"),
        (["--scenario", "nowhere.toml"], "cannot read scenario nowhere.toml"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys) -> None:
    assert sim_to_real.main(["--model", "alexnet", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
