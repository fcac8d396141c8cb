"""Conditions to train on: a scenario's own, and the shipped scenarios' on faster and slower links.

A policy that met one kind of link decides badly on another. Here every environment has conditions
of its own kind: a share of them the scenario's as it is, the others those of a shipped scenario,
every hop of every environment made faster or slower by a factor of its own. Nodes, cost and
interval stay the scenario's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from env.conditions import Conditions, IntervalConditions
from env.predict import CostModel, usual_conditions
from env.scenario import MAX_ONE_WAY_DELAY_S, HopSetup, Scenario
from executor.errors import ConfigError

__all__ = ["MixedConditions", "Mixture"]

F64 = NDArray[np.float64]

# Not 3g and lte: their generators were fitted to sources that the test plays (docs/traces.md).
VARIED = ("lan", "wan", "5g")


@dataclass(frozen=True)
class Mixture:
    """How conditions are mixed.

    Attributes:
        own_share: Share of the environments with the scenario's own conditions, unchanged.
        bandwidth: Range of the factors on each hop's bandwidth elsewhere, drawn log-uniformly.
        delay: Range of the factors on each hop's delay elsewhere, likewise.
    """

    own_share: float = 0.5
    bandwidth: tuple[float, float] = (0.02, 2.0)
    delay: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.own_share <= 1.0:
            raise ConfigError(f"own_share must lie in 0..1, got {self.own_share}")
        for name in ("bandwidth", "delay"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ConfigError(f"mixed {name} must be a range above 0, got {low}..{high}")

    @staticmethod
    def varied(scenario: Scenario) -> tuple[Scenario, ...]:
        """The scenario, and itself with the links and loads of each shipped one.

        The shipped ones are chains of three nodes; a chain of another length has only its own.
        """
        shipped = [Scenario.load(name) for name in VARIED]
        return (
            scenario,
            *(
                _with_links_of(scenario, other)
                for other in shipped
                if other.n_nodes == scenario.n_nodes
            ),
        )

    def system(self, model: CostModel) -> CostModel:
        """The cost model of a simulator that plays mixed conditions: one whose delays may vary."""
        varied = self.varied(model.scenario) if self.own_share < 1.0 else ()
        for scenario in varied:
            if any(hop.delay is not None for hop in scenario.hops):
                return CostModel(model.profile, scenario, model.references)
        return model


class MixedConditions:
    """A `ConditionsSource` of B environments under a mixture of conditions.

    The first environments are the scenario's own, then those of each varied scenario in turn.

    Args:
        model: Whose capacity the rates are fractions of, under each environment's usual conditions.
        mixture: How conditions are mixed.
        rates: Arrival rates as fractions of that capacity: (low, high), drawn uniformly.
        n_envs: Number of environments B.
        seed: Everything drawn depends on this alone, factors and rates as well.
        copies: So many neighbouring environments share all of it; divides B.

    Attributes:
        n_own: Environments, of the first, whose conditions are the scenario's own.
        rate_rps: [B].
    """

    def __init__(
        self,
        model: CostModel,
        mixture: Mixture,
        rates: tuple[float, float],
        n_envs: int,
        seed: int,
        copies: int = 1,
    ) -> None:
        if n_envs % copies:
            raise ConfigError(f"{n_envs} environments do not divide into groups of {copies}")
        self._model, self._mixture, self._rates = model, mixture, rates
        self._groups, self.copies = n_envs // copies, copies
        own = round(mixture.own_share * self._groups)
        self.n_own = own * copies
        scenarios = mixture.varied(model.scenario)
        dealt = [len(x) for x in np.array_split(np.arange(self._groups - own), len(scenarios))]
        parts = [
            (s, n) for s, n in zip((scenarios[0], *scenarios), (own, *dealt), strict=True) if n
        ]
        interval_s = model.scenario.interval_s
        substeps = max(_substeps(s) for s, _ in parts)
        self.substep_s = interval_s / substeps
        self._parts: list[Conditions] = []
        usual = []
        for scenario, count in parts:
            # A coarser part's sub-steps are repeated, so that its process stays what it is.
            fits = substeps % _substeps(scenario) == 0
            played = scenario if fits else scenario.replace(substep_s=self.substep_s)
            self._parts.append(Conditions(played, np.ones(count), seed))
            usual.append([np.tile(x, (count, 1)) for x in usual_conditions(scenario)])
        self._substeps = substeps
        self._speed, self._bytes_per_s = (np.concatenate(x) for x in zip(*usual, strict=True))
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start again, with the conditions that `seed` names."""
        rng = np.random.default_rng([seed, 6])
        shape, own = self._bytes_per_s.shape, self.n_own // self.copies
        self._faster, self._longer = (
            np.exp(rng.uniform(np.log(low), np.log(high), size=shape))
            for low, high in (self._mixture.bandwidth, self._mixture.delay)
        )
        self._faster[:own] = self._longer[:own] = 1.0
        capacity_rps = self._model.capacity_at(self._speed, self._bytes_per_s * self._faster)
        rate = rng.uniform(*self._rates, size=self._groups) * capacity_rps
        first = 0
        for part in self._parts:
            part.rate_rps = rate[first : first + part.batch]
            part.reset(int(rng.integers(2**62)))
            first += part.batch
        self.rate_rps: F64 = np.repeat(rate, self.copies)

    def next(self) -> IntervalConditions:
        """The next interval's conditions."""
        drawn = [part.next() for part in self._parts]

        def joined(name: str) -> F64:
            values = [getattr(d, name) for d in drawn]
            wide = [np.repeat(v, self._substeps // v.shape[2], axis=2) for v in values]
            all_: F64 = np.concatenate(wide)
            return all_

        first = np.cumsum([0, *(part.batch for part in self._parts[:-1])])
        delay_s = joined("hop_delay_s") * self._longer[:, :, None]
        mixed = IntervalConditions(
            hop_bytes_per_s=joined("hop_bytes_per_s") * self._faster[:, :, None],
            node_speed=joined("node_speed"),
            hop_delay_s=np.minimum(delay_s, MAX_ONE_WAY_DELAY_S),
            arrival_env=np.concatenate(
                [d.arrival_env + n for d, n in zip(drawn, first, strict=True)]
            ),
            arrival_offset_s=np.concatenate([d.arrival_offset_s for d in drawn]),
            arrival_count=np.concatenate([d.arrival_count for d in drawn]),
        )
        if self.copies == 1:
            return mixed
        return mixed.take(np.repeat(np.arange(self._groups), self.copies))


def _substeps(scenario: Scenario) -> int:
    """Sub-steps of an interval, as `env.conditions.Conditions` counts them."""
    return max(1, int(np.ceil(scenario.interval_s / scenario.substep_s - 1e-9)))


def _with_links_of(scenario: Scenario, other: Scenario) -> Scenario:
    """The scenario with another's bandwidth, delays and loads; the first node keeps its load."""
    nodes = (
        scenario.nodes[0],
        *(
            replace(n, load=o.load)
            for n, o in zip(scenario.nodes[1:], other.nodes[1:], strict=True)
        ),
    )
    hops = tuple(HopSetup(o.bandwidth, o.one_way_delay_s) for o in other.hops)
    return scenario.replace(nodes=nodes, hops=hops, substep_s=other.substep_s)
