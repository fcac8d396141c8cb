"""Mixed conditions: each environment's own kind, shared within groups, named by a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from env.conditions import Conditions, IntervalConditions
from env.mixture import VARIED, MixedConditions, Mixture
from env.predict import CostModel
from env.scenario import MAX_ONE_WAY_DELAY_S, Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from executor.errors import ConfigError
from executor.model import model_spec

RATES = (0.3, 1.2)


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def of_env(interval: IntervalConditions, b: int) -> tuple[np.ndarray, ...]:
    """All that environment b meets in an interval."""
    return (
        interval.hop_bytes_per_s[b],
        interval.node_speed[b],
        interval.hop_delay_s[b],
        interval.arrival_offset_s[interval.arrival_env == b],
    )


def test_its_own_share_meets_the_scenario_unchanged(model: CostModel) -> None:
    """Their process is drawn in the scenario's sub-steps; finer ones repeat it."""
    mixed = MixedConditions(model, Mixture(own_share=0.5), RATES, 16, 3)
    assert mixed.n_own == 8 and mixed.substep_s == 0.2
    # What the parts were given, drawn by hand from the same numbers.
    rng = np.random.default_rng([3, 6])
    rng.uniform(size=(2, 16, 2))
    rate = rng.uniform(*RATES, size=16)[:8] * model.capacity_rps
    alone = Conditions(model.scenario, rate, int(rng.integers(2**62)))
    assert np.allclose(mixed.rate_rps[:8], rate)
    for _ in range(5):
        interval, expected = mixed.next(), alone.next()
        assert interval.hop_bytes_per_s.shape == (16, 2, 5)
        assert np.allclose(interval.hop_bytes_per_s[:8], expected.hop_bytes_per_s)
        assert np.allclose(interval.node_speed[:8], expected.node_speed)
        assert np.allclose(interval.hop_delay_s[:8], expected.hop_delay_s)
        first = interval.arrival_env < 8
        assert np.array_equal(interval.arrival_env[first], expected.arrival_env)
        assert np.allclose(interval.arrival_offset_s[first], expected.arrival_offset_s)
        assert np.array_equal(interval.arrival_count[:8], expected.arrival_count)


def test_the_others_links_lie_in_the_mixture_s_range(model: CostModel) -> None:
    mixture = Mixture(own_share=0.0, bandwidth=(0.02, 0.02), delay=(2.0, 2.0))
    slow = MixedConditions(model, mixture, RATES, 40, 1)
    same = MixedConditions(
        model, replace(mixture, bandwidth=(1.0, 1.0), delay=(1.0, 1.0)), RATES, 40, 1
    )
    for _ in range(20):
        a, b = slow.next(), same.next()
        assert np.allclose(a.hop_bytes_per_s, 0.02 * b.hop_bytes_per_s)
        assert np.allclose(a.hop_delay_s, np.minimum(2 * b.hop_delay_s, MAX_ONE_WAY_DELAY_S))
        assert np.array_equal(a.node_speed, b.node_speed)
    wide = MixedConditions(model, Mixture(own_share=0.0), RATES, 400, 1)
    means = np.mean([wide.next().hop_bytes_per_s.mean(axis=2) for _ in range(20)], axis=0)
    assert np.ptp(np.log(means), axis=0).min() > np.log(100.0)


def test_rates_are_fractions_of_what_each_environment_can_serve(model: CostModel) -> None:
    """On links too slow to send anything, that is what the edge can compute alone."""
    mixture = Mixture(own_share=0.5, bandwidth=(1e-6, 1e-6))
    mixed = MixedConditions(model, mixture, (1.0, 1.0), 16, 1)
    edge_s = model.table.work_s[-1, 0]
    load = 0.5 * (0.0 + 0.25)
    assert np.allclose(mixed.rate_rps[:8], model.capacity_rps)
    assert np.allclose(mixed.rate_rps[8:], (1.0 - load) / edge_s)
    assert model.capacity_rps > 1.5 * mixed.rate_rps[8]


def test_groups_share_everything_and_a_seed_names_everything(model: CostModel) -> None:
    mixed, again = (MixedConditions(model, Mixture(), RATES, 32, 1, copies=4) for _ in range(2))
    mixed.reset(9)
    again.next()
    again.reset(9)
    assert np.array_equal(mixed.rate_rps, again.rate_rps)
    seen = set()
    for _ in range(4):
        a, b = mixed.next(), again.next()
        for env in range(32):
            first = env - env % 4
            for x, y, z in zip(of_env(a, env), of_env(b, env), of_env(a, first), strict=True):
                assert np.array_equal(x, y) and np.array_equal(x, z)
        seen |= {float(x) for x in a.hop_bytes_per_s[::4, 0, 0]}
    assert len(seen) == 4 * 8, "groups must differ"
    again.reset(10)
    assert not np.array_equal(mixed.rate_rps, again.rate_rps)


def test_a_simulator_takes_the_rates_that_a_seed_names(model: CostModel) -> None:
    mixture = Mixture()
    conditions = MixedConditions(model, mixture, RATES, 12, 1)
    system = mixture.system(model)
    assert system.plans == model.plans and system.references == model.references
    simulator = Simulator(system, 12, 1, conditions=conditions)
    before = simulator.n_ref.copy()
    state = simulator.reset(7)
    assert np.array_equal(simulator.n_ref, conditions.rate_rps)
    assert np.array_equal(state.arrival_rps, conditions.rate_rps)
    assert not np.array_equal(before, simulator.n_ref)
    arrived = np.zeros(12)
    for _ in range(100):
        arrived += simulator.step(np.tile(model.table.cuts[-1], (12, 1))).record.arrived
    assert np.all(np.abs(arrived / (100 * simulator.n_ref) - 1.0) < 0.5)


def test_a_chain_of_another_length_has_its_own_links_scaled() -> None:
    base = Scenario.load()
    scenario = base.replace(nodes=base.nodes[:2], hops=base.hops[:1])
    two = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    mixture = Mixture()
    assert mixture.varied(scenario) == (scenario,) and mixture.system(two) is two
    assert MixedConditions(two, mixture, RATES, 8, 0).next().hop_bytes_per_s.shape == (8, 1, 1)


def test_only_links_and_loads_vary(model: CostModel) -> None:
    own, *others = Mixture.varied(model.scenario.replace(constrained=True, max_in_flight=7))
    assert len(others) == len(VARIED)
    for other in others:
        assert other.constrained and other.max_in_flight == 7
        assert other.nodes[0] == own.nodes[0] and other.nodes[1].ratio == own.nodes[1].ratio
        assert other.hops != own.hops and other.arrivals == own.arrivals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"own_share": 1.5}, "own_share must lie in 0..1, got 1.5"),
        ({"bandwidth": (0.0, 1.0)}, "bandwidth must be a range above 0"),
        ({"delay": (2.0, 1.0)}, "delay must be a range above 0"),
    ],
)
def test_impossible_mixtures_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Mixture(**settings)


def test_groups_must_fill_the_batch(model: CostModel) -> None:
    with pytest.raises(ConfigError, match="10 environments do not divide into groups of 4"):
        MixedConditions(model, Mixture(), RATES, 10, 0, copies=4)
