"""What calibration makes of a profile: `agents.nodes.fit_calibration`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from toy_chain import toy_profile

from agents.nodes import fit_calibration
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


def test_calibration_finds_the_unit_that_is_slower_than_profiled() -> None:
    """As a fully connected layer is, whose weights no cache keeps from one request to the next."""
    profile = toy_profile(3)
    n = profile.spec.n_units
    slow = [t * (2.0 if k == n - 2 else 1.0) for k, t in enumerate(profile.nodes[0].unit_s)]
    true = profile.with_changes(nodes=tuple(replace(x, unit_s=tuple(slow)) for x in profile.nodes))
    plans = [(0, 0), (1, 3), (1, n), (3, 4), (4, 5), (n - 1, n - 1), (n, n), (0, n), (2, n - 2)]
    records = _records(true, plans, 1.0, 0.0)
    found = fit_calibration(profile, records).nodes[0].unit_s
    assert (
        found[n - 2] / found[0] > 1.5 * profile.nodes[0].unit_s[n - 2] / profile.nodes[0].unit_s[0]
    )
    # Stages that it was not shown, beside one scale for all units.
    stages = [(0, n - 1), (0, n - 3), (1, n - 2), (2, n), (3, n)]
    one = np.array(profile.nodes[0].unit_s) * sum(slow) / sum(profile.nodes[0].unit_s)
    apart, alike = (
        np.mean([abs(sum(x[a:b]) / sum(slow[a:b]) - 1.0) for a, b in stages]) for x in (found, one)
    )
    assert apart < 0.06 and apart < alike / 4, (apart, alike)
