"""Whether nodes and simulator rank arms alike, as `benchmarks/ranking.py` judges it."""

import json

import pytest

from benchmarks.ranking import main, ranked
from executor.errors import ConfigError


def written(folder, nodes, simulated):
    """A file as `agents.evaluate --backend testbed --traces --json` writes it, of one cell."""
    part = {"cost_rows": nodes, "simulated": {"cost_rows": simulated}}
    path = folder / "out.json"
    path.write_text(
        json.dumps({"model": "alexnet", "by_condition": {"slow": {"by_rate": {"0.7": part}}}})
    )
    return path


def test_arms_in_the_same_order_agree(tmp_path, capsys):
    path = written(tmp_path, {"a": [1.0, 4.0], "b": [2.0, 8.0]}, {"a": [1.1, 4.4], "b": [1.5, 6.0]})
    assert ranked([path])
    told = capsys.readouterr().out
    assert "a / b: 0.733 (0.733-0.733), on the nodes 0.500 (0.500-0.500)" in told
    assert "1 of 1 rankings agree" in told


def test_a_pair_turned_round_is_named_and_every_draw_counts_alike(tmp_path, capsys):
    # By the sum of its costs `a` is the cheaper on the nodes, too: an outage in one draw decides.
    path = written(
        tmp_path, {"a": [1.2, 1.2, 99.0], "b": [1.0, 1.0, 100.0]}, {"a": [1.0] * 3, "b": [1.2] * 3}
    )
    assert not ranked([path])
    told = capsys.readouterr().out
    assert "on the nodes 1.125 (0.990-1.200), which includes 1: OUT OF ORDER" in told


def test_what_lies_within_a_percent_has_no_order(tmp_path):
    assert ranked([written(tmp_path, {"a": [2.0], "b": [1.0]}, {"a": [1.0], "b": [1.009]})])
    assert not ranked([written(tmp_path, {"a": [2.0], "b": [1.0]}, {"a": [1.0], "b": [1.011]})])


def test_files_of_one_model_are_taken_together(tmp_path, capsys):
    few, more = tmp_path / "few", tmp_path / "more"
    few.mkdir(), more.mkdir()
    paths = [
        written(few, {"a": [1.2], "b": [1.0]}, {"a": [1.0], "b": [1.2]}),
        written(more, {"a": [1.0, 1.0], "b": [1.5, 1.6]}, {"a": [1.0, 1.0], "b": [1.2, 1.2]}),
    ]
    assert not ranked(paths[:1])
    assert ranked(paths)
    told = capsys.readouterr().out
    assert "3 draws" in told and "1 of 1 rankings agree" in told


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "alexnet", "by_rate": {}}'])
def test_another_file_is_refused(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"expected what `agents\.evaluate"):
        ranked([path])
    monkeypatch.setattr("sys.argv", ["ranking.py", str(path)])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
