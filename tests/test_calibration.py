"""What calibration makes of a profile, and when a run on nodes counts: `agents.nodes`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from toy_chain import toy_profile

from agents.nodes import fit_calibration, not_valid
from executor._records import RequestRecord
from executor.profile import Profile


def _records(
    profile: Profile, plans: Sequence[tuple[int, int]], scale: float, start_s: float
) -> list[RequestRecord]:
    """Of requests whose stages took `scale` x their units and `start_s`; hops took nothing."""
    records = []
    for i, cuts in enumerate(plans):
        ends = (0, *cuts, profile.spec.n_units)
        units_s = [
            sum(n.unit_s[a:b]) for n, (a, b) in zip(profile.nodes, pairwise(ends), strict=True)
        ]
        took_s = tuple(scale * u + start_s if u else 0.0 for u in units_s)
        none = (0.0,) * len(profile.hops)
        records.append(
            RequestRecord(i, cuts, 0.0, 0.0, sum(took_s), took_s, took_s,
                          (0.0,) * profile.n_nodes, none, none)
        )  # fmt: skip
    return records


def test_calibration_tells_a_stage_s_start_from_its_units() -> None:
    profile = toy_profile(3)
    plans = [(0, 0), (1, 3), (1, 5), (3, 4), (4, 5), (6, 6)]
    found = fit_calibration(profile, _records(profile, plans, 0.8, 0.002))
    for node, was in zip(found.nodes, profile.nodes, strict=True):
        np.testing.assert_allclose(node.unit_s, 0.8 * np.array(was.unit_s), rtol=1e-6)
        assert np.isclose(node.stage_overhead_s, 0.002, rtol=1e-6)


def test_calibration_asks_no_start_of_stages_that_hardly_differ() -> None:
    profile = toy_profile(3)
    found = fit_calibration(profile, _records(profile, [(3, 5), (4, 5)], 0.8, 0.002))
    for node, was in zip(found.nodes, profile.nodes, strict=True):
        slower = np.array(node.unit_s)[[0, 2]] / np.array(was.unit_s)[[0, 2]]
        assert (slower > 0.8).all() and node.stage_overhead_s == 0.0


def test_calibration_meets_mean_times_where_they_scatter() -> None:
    profile = toy_profile(3)
    plans = [(1, 3), (1, 5), (3, 4), (4, 5)] * 2
    records = [
        record for scale in (0.5, 1.5) for record in _records(profile, plans, scale, 0.5 * scale)
    ]
    found = fit_calibration(profile, records)
    for node, was in zip(found.nodes, profile.nodes, strict=True):
        np.testing.assert_allclose(node.unit_s, was.unit_s, rtol=1e-6)
        assert np.isclose(node.stage_overhead_s, 0.5, rtol=1e-6)


def test_a_run_is_not_valid_where_more_than_a_hundredth_of_stages_ended_late() -> None:
    assert not_valid({"edge": 0.0, "fog": 0.01}) == []
    (line,) = not_valid({"edge": 0.0, "cloud": 0.023})
    assert line.startswith("not valid: 2.3% of cloud's stages ended late (at most 1%)")
