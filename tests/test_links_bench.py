"""`benchmarks/links.py` in short form: what it reads from arrivals, and a real link's table."""

import json
import math
from itertools import pairwise

import pytest

from benchmarks import links
from executor.shaping import BYTES_PER_MBIT


def arrivals(steps, late_s=0.0):
    """Samples every ms: from each (time, Mbit/s) on bytes come at that rate, the last one ends."""
    samples, total = [], 0.0
    for (begin_s, mbps), (end_s, _) in pairwise(steps):
        for k in range(round((end_s - begin_s) * 1000)):
            samples.append((begin_s + late_s + k / 1000, int(total)))
            total += mbps * BYTES_PER_MBIT / 1000
    return samples


@pytest.mark.parametrize("late_s", [0.0, 0.15, -0.2])
def test_a_rate_and_the_time_of_a_step_are_read_from_arrivals(late_s):
    samples = arrivals([(0.0, 40.0), (2.0, 10.0), (4.0, 20.0), (6.0, 0.0)], late_s)
    assert links.rate_mbps(samples, 0.5, 1.5) == pytest.approx(40.0, rel=0.001)
    assert links.rate_mbps(samples, 2.5, 3.5) == pytest.approx(10.0, rel=0.001)
    for at_s, before, after in ((2.0, 40.0, 10.0), (4.0, 10.0, 20.0)):
        off_s = links.step_off_s(samples, at_s, before * BYTES_PER_MBIT, after * BYTES_PER_MBIT)
        assert off_s == pytest.approx(late_s, abs=0.02)
    assert links.step_off_s(samples, 0.7, 4e6, 1e6) == links.STEP_S  # there was none


def test_a_miss_is_a_miss():
    def row(off):
        return links.Row(20.0, "rate", "bare TCP", 20.0, 20.0 * (1 + off), off, 0.03, "Mbit/s")

    assert row(-0.029).ok and not row(-0.031).ok and not row(math.inf).ok


def test_the_command_measures_a_real_link_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    for name, value in {"HOLD_S": 0.6, "STEP_S": 0.3, "WARM_S": 0.2, "MESSAGES": 8}.items():
        monkeypatch.setattr(links, name, value)
    monkeypatch.setattr(links.shutil, "which", lambda name: None)
    arrived = []  # of each stream
    stream = links.stream
    monkeypatch.setattr(links, "stream", lambda *how: arrived.append(stream(*how)) or arrived[-1])
    file = tmp_path / "links.json"
    code = links.main(["--mbps", "40", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [r["what"] for r in rows] == [
        "rate", "4 steps", "rate back", "added delay", "added delay",
    ]  # fmt: skip
    assert code == (0 if all(r["ok"] for r in rows) else 1)
    # The link's own limit since a stream's start, which a reader that comes late keeps, too.
    for (begun_s, _), *samples in arrived:
        most = [links.BUFFER_BYTES + 40.0 * BYTES_PER_MBIT * (t_s - begun_s) for t_s, _ in samples]
        assert all(total <= limit for (_, total), limit in zip(samples, most, strict=True))
    assert len(arrived) == 2
    assert [r["measured"] >= r["asked"] for r in rows[3:]] == [True, True]
    out = capsys.readouterr().out
    assert "iperf3: skipped, it is not installed" in out and "the relay's links" in out


def test_bad_rates_are_refused():
    assert links.main(["--mbps", "fast"]) == 2
    assert links.main(["--mbps", "-5"]) == 2
