"""The comparison's page: what it says, that it stands alone, how it looks in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from agents import evaluate
from agents.report.evaluation import write_report
from agents.report.page import Page, Section, Table, interval, render
from agents.report.verdicts import reference_arm, subject_arm, verdicts
from agents.studies.provenance import without_folders
from env.predict import CostModel
from env.scenario import Scenario
from env.synthetic import synthetic_profile
from executor.errors import ConfigError
from executor.model import model_spec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run(tmp_path: Path, *more: str) -> dict[str, object]:
    scenario = Scenario.load()
    profile = tmp_path / "profile.json"
    CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario).profile.save(profile)
    out = tmp_path / "out.json"
    argv = ["--model", "alexnet", "--profile", str(profile), "--checkpoint", str(tmp_path / "no")]
    argv += ["--intervals", "3", "--startup-s", "1", "--seeds", "2", "--json", str(out), *more]
    assert evaluate.main(argv) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """Results on a LAN and a WAN at two rates, and their page."""
    folder = tmp_path_factory.mktemp("page")
    result = run(
        folder, "--arms", "solver,paper-1s,best-static,oracle", "--scenario", "lan,wan",
        "--rates", "0.3,0.6", "--report", str(folder / "report"),
    )  # fmt: skip
    return result, (folder / "report" / "index.html").read_text()


def arm(cost: float, **ratios: tuple[float, float, float]) -> dict:
    each = {
        other: {"cost_ratio": dict(zip(("mean", "low", "high"), r, strict=True))}
        for other, r in ratios.items()
    }
    return {"cost": cost, "versus_static": each.pop("static", {}), "versus": each}


def test_page_has_every_part_and_every_arm(made: tuple[dict, str]) -> None:
    _, page = made
    for part in ("arms", "losing", "latency", "energy", "front", "overhead", "hops", "regret",
                 "time", "made"):  # fmt: skip
        assert f'<h2 id="{part}">' in page, part
    for name in ("static", "best-static", "paper-1s", "solver", "oracle"):
        assert f"<td>{name}</td>" in page
    assert "All conditions of this run" not in page  # both kinds of hops took part
    assert page.count("<img alt=") == 7


def test_page_stands_alone_and_tells_of_no_folder(made: tuple[dict, str]) -> None:
    result, page = made
    assert "default-src 'none'" in page
    for outside in ("http:", "https:", "<script", "<link", "url(", "@import"):
        assert outside not in page
    assert set(re.findall(r'src="(.{26})', page)) == {"data:image/svg+xml;base64,"}
    for text in (page, json.dumps(result)):
        for folder in ("/tmp", "/root", "/home", "/work"):
            assert folder not in text
    assert result["made"]["command"].startswith("python -m agents.evaluate --model alexnet")
    assert "--report report" in result["made"]["command"]


def test_figures_are_svg_that_parses(made: tuple[dict, str]) -> None:
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", made[1])
    for picture in pictures:
        root = ElementTree.fromstring(base64.b64decode(picture))
        assert root.tag.endswith("svg") and len(list(root.iter())) > 30


def test_results_give_the_same_page_later(made: tuple[dict, str], tmp_path: Path) -> None:
    result, page = made
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(result))
    assert evaluate.main(["--from-json", str(saved), "--report", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "index.html").read_text() == page


def test_hops_are_told_apart(made: tuple[dict, str]) -> None:
    result, _ = made
    assert list(result["by_hops"]) == ["LAN-like", "WAN-like"]
    assert [c["hops"] for c in result["by_condition"].values()] == ["LAN-like", "WAN-like"]
    submitted = [p["arms"]["solver"]["requests"]["submitted"] for p in result["by_hops"].values()]
    assert sum(submitted) == result["arms"]["solver"]["requests"]["submitted"]


def test_trajectory_is_of_every_interval(made: tuple[dict, str]) -> None:
    result, _ = made
    seen = result["trajectory"]
    assert seen["condition"] == "lan" and seen["rate"] == "0.6" and seen["startup"] == 1
    assert [len(row) for row in seen["mbps"]] == [4, 4]
    assert set(seen["arms"]) == set(result["arms"])
    for played in seen["arms"].values():
        assert [len(row) for row in played["cuts"]] == [4, 4]
        assert len(played["in_flight"]) == len(played["latency_ms"]) == 4
        assert all(0 <= i <= j <= seen["units"] for i, j in zip(*played["cuts"], strict=True))
    assert set(map(tuple, zip(*seen["arms"]["static"]["cuts"], strict=True))) == {(10, 14)}
    # A LAN: 400 Mbit/s and more to the cloud.
    assert min(seen["mbps"][1]) > 150


def test_verdicts_name_what_is_lost() -> None:
    cell = {
        "static": arm(9.0),
        "solver": arm(1.0),
        "best-static": arm(0.8),
        "oracle": arm(0.1),
        "policy": arm(1.1, static=(0.1, 0.1, 0.1), solver=(1.1, 1.0, 1.2)),
    }
    cell["policy"]["versus"]["best-static"] = {"cost_ratio": {"mean": 1.4, "low": 1.2, "high": 2}}
    even = {**cell, "best-static": arm(2.0)}
    won = {**even, "policy": arm(0.5, solver=(0.5, 0.4, 0.6))}
    by_rate = {"0.4": {"arms": cell}, "0.8": {"arms": even}, "1.1": {"arms": won}}
    result = {"by_rate": by_rate, "seeds": 3, "repeats": 1}
    found = verdicts(result, "policy")
    assert [(v.rate, v.best, v.word) for v in found] == [
        ("0.4", "best-static", "loses"),
        ("0.8", "solver", "even"),
        ("1.1", "solver", "wins"),
    ]
    assert {v.word for v in verdicts({**result, "seeds": 1}, "policy")} == {"not judged"}
    assert subject_arm(cell) == "policy" and reference_arm(cell, None, "policy") == "solver"


def test_bad_input_is_one_line(
    made: tuple[dict, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, poor = tmp_path / "saved.json", tmp_path / "poor.json"
    saved.write_text(json.dumps(made[0]))
    poor.write_text('{"model": "alexnet"}')
    page = ["--report", str(tmp_path / "page")]
    for argv, message in (
        ([], "give --model NAME, or --from-json FILE"),
        (["--from-json", str(tmp_path / "none.json")], "cannot read results"),
        (["--from-json", str(poor)], "lack backend, arms, by_rate, made"),
        (["--from-json", str(saved), *page, "--reference", "magic"], "did not take part"),
        (["--from-json", str(saved), "--report", str(saved)], "cannot make the folder"),
        (["--model", "alexnet", "--change-every", "0"], "different seconds above 0"),
        (["--model", "alexnet", "--change-every", "1", "--scenario", "lan,wan"], "several"),
        (["--model", "alexnet", "--change-every", "1", "--backend", "testbed"], "the simulator"),
    ):
        capsys.readouterr()
        assert evaluate.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_what_a_page_says_is_escaped(tmp_path: Path) -> None:
    table = Table(["<a>", "b"], [["<i>x</i>", "1"]])
    page = Page("<b>", "&", sections=[Section("s", "t", tables=[table])])
    text = render(page, tmp_path).read_text()
    assert "<i>" not in text and "&lt;i&gt;x" in text and "<title>&lt;b&gt;</title>" in text
    with pytest.raises(ConfigError, match="cannot make the folder"):
        render(page, tmp_path / "index.html" / "below")
    assert interval({"mean": 1.0, "low": 0.5, "high": 2.0}, 1) == "1.0 (0.5 to 2.0)"


def test_folders_are_taken_out() -> None:
    assert without_folders("--json /a/b/c.json --x=/d/e y/z 0.4,0.8") == (
        "--json c.json --x=e z 0.4,0.8"
    )
    assert without_folders("plain /") == "plain /"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_page_in_a_browser(made: tuple[dict, str], tmp_path: Path) -> None:
    page = write_report(made[0], tmp_path)
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("<figure>") == 7
    assert "Where it loses" in done.stdout
