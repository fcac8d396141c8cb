import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.errors import ConfigError
from executor.plan import (
    ModelSpec,
    Plan,
    candidate_cuts,
    candidate_plans,
    is_constrained,
    plan_mask,
)

quick = settings(deadline=None, database=None, derandomize=True, max_examples=150)


@st.composite
def specs(draw):
    n = draw(st.integers(2, 12))
    return ModelSpec(
        name="drawn",
        unit_names=tuple(f"u{i}" for i in range(n)),
        # Few sizes, so that equal neighbours are common.
        cut_bytes=tuple(draw(st.lists(st.integers(1, 6), min_size=n + 1, max_size=n + 1))),
        has_params=tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n))),
        head_start=draw(st.integers(1, n - 1)),
        static_plan=(0, n),
    )


@st.composite
def specs_and_plans(draw):
    spec = draw(specs())
    hops = draw(st.integers(1, 4))
    cuts = draw(st.lists(st.integers(0, spec.n_units), min_size=hops, max_size=hops))
    return spec, Plan(tuple(sorted(cuts)))


def chain_spec(cut_bytes, has_params, head_start):
    names = tuple(f"u{i}" for i in range(len(has_params)))
    return ModelSpec("hand", names, tuple(cut_bytes), tuple(has_params), head_start, (1, 2))


def without_parameters_between(spec, a, b):
    return not any(spec.has_params[min(a, b) : max(a, b)])


@quick
@given(st.lists(st.integers(-3, 9), min_size=1, max_size=5))
def test_a_plan_takes_exactly_the_cuts_that_do_not_decrease(cuts):
    valid = cuts[0] >= 0 and cuts == sorted(cuts)
    if valid:
        assert Plan(tuple(cuts)).cuts == tuple(cuts)
    else:
        with pytest.raises(ConfigError, match="not decrease"):
            Plan(tuple(cuts))


def test_a_plan_needs_a_cut_and_must_fit_the_chain():
    with pytest.raises(ConfigError, match="at least one cut"):
        Plan(())
    Plan((2, 5)).check(5, 3)
    with pytest.raises(ConfigError, match="needs 2"):
        Plan((2,)).check(5, 3)
    with pytest.raises(ConfigError, match=r"0\.\.5"):
        Plan((2, 6)).check(5, 3)
    assert str(Plan((2, 5))) == "(2, 5)"


@quick
@given(specs_and_plans())
def test_stages_tile_the_model(drawn):
    spec, plan = drawn
    stages = [plan.stage(node, spec.n_units) for node in range(len(plan.cuts) + 1)]
    assert stages[0][0] == 0
    assert stages[-1][1] == spec.n_units
    assert all(start <= stop for start, stop in stages)
    assert all(before[1] == after[0] for before, after in pairwise(stages))


@quick
@given(specs_and_plans())
def test_the_last_node_is_the_first_that_reaches_the_output(drawn):
    spec, plan = drawn
    last = plan.last_node(spec.n_units)
    for node in range(len(plan.cuts) + 1):
        start, stop = plan.stage(node, spec.n_units)
        if node < last:
            assert stop < spec.n_units
        elif node == last:
            assert stop == spec.n_units
        else:
            assert start == stop == spec.n_units


@quick
@given(specs())
def test_a_cut_is_dropped_only_for_a_better_one(spec):
    n, size = spec.n_units, spec.cut_bytes
    kept = candidate_cuts(spec)
    assert list(kept) == sorted(set(kept))
    assert {0, n} <= set(kept)
    for k in range(1, n):
        near = [c for c in range(n + 1) if without_parameters_between(spec, c, k)]
        dominated = any(size[c] <= size[k] for c in near if c != k)
        if k in kept:
            assert size[k] <= size[0]
            assert all(size[c] >= size[k] for c in near)
        else:
            assert size[k] > size[0] or dominated
    # One per group at most, so equals never both stay (the ends always do).
    inner = [k for k in kept if k not in (0, n)]
    assert not any(without_parameters_between(spec, a, b) for a, b in pairwise(inner))


@quick
@given(specs())
def test_a_cut_a_constrained_plan_may_use_is_kept_where_it_costs_nothing(spec):
    head = spec.head_start
    smallest = min(
        size
        for cut, size in enumerate(spec.cut_bytes)
        if without_parameters_between(spec, cut, head)
    )
    before = [
        c
        for c in range(1, head + 1)
        if without_parameters_between(spec, c, head) and spec.cut_bytes[c] == smallest
    ]
    if smallest <= spec.cut_bytes[0] and before and spec.cut_bytes[0] != smallest:
        assert max(before) in candidate_cuts(spec)


@quick
@given(specs(), st.integers(2, 4))
def test_candidate_plans_are_every_combination_in_order(spec, n_nodes):
    cuts = candidate_cuts(spec)
    plans = candidate_plans(spec, n_nodes)
    assert len(plans) == math.comb(len(cuts) + n_nodes - 2, n_nodes - 1)
    assert [p.cuts for p in plans] == sorted({p.cuts for p in plans})
    assert all(set(p.cuts) <= set(cuts) for p in plans)
    for plan in plans:
        plan.check(spec.n_units, n_nodes)
    n = spec.n_units
    hops = n_nodes - 1
    whole_on_one = {(0,) * (hops - node) + (n,) * node for node in range(n_nodes)}
    assert whole_on_one <= {tuple(p.cuts) for p in plans}


@quick
@given(specs(), st.booleans(), st.sets(st.integers(0, 2)))
def test_the_mask_is_the_rule_and_the_living_nodes(spec, constrained, down):
    plans = candidate_plans(spec)
    mask = plan_mask(plans, spec, constrained=constrained, down=down)
    for plan, allowed in zip(plans, mask, strict=True):
        touched = range(plan.last_node(spec.n_units) + 1)
        expected = not (down & set(touched)) and (not constrained or is_constrained(plan, spec))
        assert allowed == expected
    if not constrained and not down:
        assert all(mask)
    if 0 in down:
        assert not any(mask)
    elif 1 in down and not constrained:
        n = spec.n_units
        assert [p.cuts for p, ok in zip(plans, mask, strict=True) if ok] == [(n, n)]


@quick
@given(specs_and_plans())
def test_constrained_means_no_empty_stage_and_the_head_last(drawn):
    spec, plan = drawn
    stages = [plan.stage(node, spec.n_units) for node in range(len(plan.cuts) + 1)]
    expected = all(a < b for a, b in stages) and stages[-1][0] <= spec.head_start
    assert is_constrained(plan, spec) == expected


def test_candidates_by_hand():
    # conv(40) relu(40) pool(10) | conv(200, over the input) relu(200) | linear(4)
    spec = chain_spec([100, 40, 40, 10, 200, 200, 4], [1, 0, 0, 1, 0, 1], head_start=5)
    assert candidate_cuts(spec) == (0, 3, 6)
    assert [p.cuts for p in candidate_plans(spec)] == [
        (0, 0),
        (0, 3),
        (0, 6),
        (3, 3),
        (3, 6),
        (6, 6),
    ]
    assert [p.cuts for p in candidate_plans(spec, 2)] == [(0,), (3,), (6,)]


def test_of_equal_cuts_the_last_stays_but_none_past_the_head():
    has_params = [1, 0, 0, 1]
    assert candidate_cuts(chain_spec([9, 5, 5, 5, 1], has_params, head_start=3)) == (0, 3, 4)
    assert candidate_cuts(chain_spec([9, 5, 5, 5, 1], has_params, head_start=2)) == (0, 2, 4)
    # A smaller one past the head's start does replace the cuts before it.
    assert candidate_cuts(chain_spec([9, 5, 5, 4, 1], has_params, head_start=2)) == (0, 3, 4)


def test_a_chain_of_one_node_has_no_plans():
    spec = chain_spec([9, 5, 1], [1, 1], head_start=1)
    with pytest.raises(ConfigError, match="at least 2 nodes"):
        candidate_plans(spec, 1)


@pytest.mark.parametrize(
    ("cut_bytes", "has_params", "head_start"),
    [([9, 5], [1, 1], 1), ([9, 5, 1], [1], 1), ([9, 0, 1], [1, 1], 1), ([9, 5, 1], [1, 1], 2)],
)
def test_a_spec_that_contradicts_itself_is_refused(cut_bytes, has_params, head_start):
    with pytest.raises(ConfigError, match="model spec"):
        ModelSpec("bad", ("a", "b"), tuple(cut_bytes), tuple(has_params), head_start, (1, 1))
