"""Chains of other lengths than three."""

from __future__ import annotations

import json
from math import comb

import pytest

from agents import chains
from agents.chains import chain_scenario, study
from executor.model import model_spec
from executor.plan import candidate_plans


@pytest.mark.parametrize("n_nodes", [2, 4])
def test_the_solver_finds_what_brute_force_finds_where_nothing_changes(
    n_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "STARTUP", 2)
    found = study("alexnet", n_nodes, False, 2, 4)
    assert found["nodes"] == n_nodes
    # Candidate cuts of AlexNet: 9; plans are non-decreasing tuples of them.
    assert found["plans"] == {2: 9, 4: 165}[n_nodes]
    assert 1.0 - 1e-9 <= found["ratio"]["mean"] < 1.1
    assert 0 < found["decide_us"]["p50"] <= found["decide_us"]["p99"]


def test_chains_are_stretched_from_the_default() -> None:
    scenario = chain_scenario(5, True)
    assert [n.name for n in scenario.nodes] == ["edge", "fog1", "fog2", "fog3", "cloud"]
    ratios = [n.ratio for n in scenario.nodes]
    assert ratios == sorted(ratios, reverse=True) and (ratios[0], ratios[-1]) == (12.0, 1.0)
    assert chain_scenario(3, True).hops == chain_scenario(3, True).hops
    assert all(h.bandwidth.kind == "constant" for h in chain_scenario(5, False).hops)


def test_command(tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    argv = ["--model", "alexnet", "--seeds", "2", "--intervals", "2", "--nodes", "2"]
    assert chains.main([*argv, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["nodes"], r["changing"]) for r in rows] == [(2, False), (2, True)]
    assert "brute force" in capsys.readouterr().out
    assert chains.main([*argv[:-1], "1"]) == 2
    assert "from 2 to 8 like 2,3,4, got '1'" in capsys.readouterr().err
    assert chains.main(["--model", "vit_b_16"]) == 2
    error = capsys.readouterr().err
    assert "31465 plans on 5 nodes, and at most 20000 are tried: give fewer --nodes" in error


def test_plans_are_counted_as_they_are_made() -> None:
    for n_nodes in (2, 3, 4, 5):
        made = len(candidate_plans(model_spec("alexnet"), n_nodes))
        assert made == comb(9 + n_nodes - 2, n_nodes - 1)
