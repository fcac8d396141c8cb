"""Where a model may be cut, and where it is cut.

A model is a chain of n units. Cut k (0..n) is the boundary before unit k: cut 0 is the model's
input, cut n its output. A plan holds one cut per hop, not decreasing: for three nodes (i, j), the
edge runs units [0, i), the fog [i, j), the cloud [j, n). An empty stage only relays; hops after
the unit n has run are not crossed at all.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, pairwise

from executor.errors import ConfigError

__all__ = [
    "ModelSpec",
    "Plan",
    "candidate_cuts",
    "candidate_plans",
    "constrained_plans",
    "find_route",
    "is_constrained",
    "next_node",
    "plan_mask",
    "plan_of",
]

INPUT_SLACK = 1.05


@dataclass(frozen=True)
class ModelSpec:
    """What a plan needs to know about a model; no tensors, no timings.

    Attributes:
        name: The model's name, e.g. "alexnet".
        unit_names: One name per unit, n in all.
        cut_bytes: Bytes that cross at each cut, n + 1 values (cut 0 is the input).
        has_params: Per unit, whether it holds parameters.
        head_start: Index of the first unit of the classifier head (constrained plans run it on the
            last node).
        static_plan: The reference work's rough thirds (arXiv 2605.09623, tables), for three nodes.
        input_shape: Shape of the input, float32.
    """

    name: str
    unit_names: tuple[str, ...]
    cut_bytes: tuple[int, ...]
    has_params: tuple[bool, ...]
    head_start: int
    static_plan: tuple[int, int]
    input_shape: tuple[int, ...] = (1, 3, 224, 224)

    def __post_init__(self) -> None:
        n = len(self.unit_names)
        if n < 1 or len(self.cut_bytes) != n + 1 or len(self.has_params) != n:
            raise ConfigError(
                f"model spec {self.name!r}: {n} units need {n + 1} cut sizes and {n} flags, got "
                f"{len(self.cut_bytes)} and {len(self.has_params)}"
            )
        if min(self.cut_bytes) <= 0:
            raise ConfigError(f"model spec {self.name!r}: cut sizes must be positive")
        if not 0 < self.head_start < n:
            raise ConfigError(f"model spec {self.name!r}: head_start must lie in 1..{n - 1}")

    @property
    def n_units(self) -> int:
        """Number of units n."""
        return len(self.unit_names)


@dataclass(frozen=True)
class Plan:
    """The cuts, one per hop, not decreasing.

    Attributes:
        cuts: Cut index per hop; N nodes have N - 1 of them.
    """

    cuts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ConfigError("a plan needs at least one cut (two nodes), got none")
        if self.cuts[0] < 0 or any(a > b for a, b in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ConfigError(f"plan cuts must be >= 0 and not decrease, got {self.cuts}")

    def check(self, n_units: int, n_nodes: int) -> None:
        """Raise ConfigError unless the plan fits a model of `n_units` on `n_nodes`."""
        if len(self.cuts) != n_nodes - 1:
            raise ConfigError(
                f"plan {self} has {len(self.cuts)} cuts; a chain of {n_nodes} nodes needs "
                f"{n_nodes - 1}"
            )
        if self.cuts[-1] > n_units:
            raise ConfigError(f"plan {self}: cuts must lie in 0..{n_units}")

    def stage(self, node: int, n_units: int) -> tuple[int, int]:
        """Units [start, stop) that node `node` runs."""
        start = self.cuts[node - 1] if node > 0 else 0
        stop = self.cuts[node] if node < len(self.cuts) else n_units
        return start, stop

    def last_node(self, n_units: int) -> int:
        """Index of the node that produces the output (the request goes no further)."""
        return bisect_left(self.cuts, n_units)

    def __str__(self) -> str:
        return "(" + ", ".join(map(str, self.cuts)) + ")"


@functools.lru_cache(maxsize=1024)
def plan_of(cuts: tuple[int, ...]) -> Plan:
    """`Plan(cuts)`, kept: nodes meet the same few plans again and again.

    Raises:
        ConfigError: As `Plan`.
    """
    return Plan(cuts)


def candidate_cuts(spec: ModelSpec) -> tuple[int, ...]:
    """Cuts worth offering, from `cut_bytes` alone (timings would change the action space).

    A cut is dropped where it carries more than the input (by more than 5 %: a vision transformer's
    extra token adds 0.5 % and should not leave it uncut), or where a neighbour reached without
    passing parametrised work carries no more bytes (of equals the last one stays: the
    parameterless work before it is cheap where the parametrised work ran; but none past the head's
    start, where a constrained plan may not cut). Cuts 0 and n stay.
    """
    n = spec.n_units
    kept = []
    for k in range(n + 1):
        if k in (0, n):
            kept.append(k)
            continue
        if spec.cut_bytes[k] > INPUT_SLACK * spec.cut_bytes[0]:
            continue
        lo = k
        while lo > 0 and not spec.has_params[lo - 1]:
            lo -= 1
        hi = k
        while hi < n and not spec.has_params[hi]:
            hi += 1
        group = range(lo, hi + 1)
        best = min(group, key=lambda c: (spec.cut_bytes[c], c > spec.head_start, -c))
        if best == k:
            kept.append(k)
    return tuple(kept)


def is_constrained(plan: Plan, spec: ModelSpec) -> bool:
    """Whether the plan obeys the reference's rule: no tier empty, head on the last node."""
    bounds = (0, *plan.cuts)
    no_empty = all(a < b for a, b in pairwise(bounds))
    return no_empty and plan.cuts[-1] <= spec.head_start


def candidate_plans(spec: ModelSpec, n_nodes: int = 3) -> tuple[Plan, ...]:
    """All plans over the candidate cuts, in lexicographic order (the policy's action space)."""
    if n_nodes < 2:
        raise ConfigError(f"a chain needs at least 2 nodes, got {n_nodes}")
    cuts = combinations_with_replacement(candidate_cuts(spec), n_nodes - 1)
    return tuple(Plan(c) for c in cuts)


def constrained_plans(spec: ModelSpec, n_nodes: int = 3) -> tuple[Plan, ...]:
    """All plans that obey the reference's rule (`is_constrained`), in lexicographic order.

    Not only those over the candidate cuts: where the first node must run something, the input is
    no alternative to a cut that carries more, and an early cut may still be the best.

    Raises:
        ConfigError: Fewer than 2 nodes, or more than there are units for.
    """
    if not 2 <= n_nodes <= spec.head_start + 1:
        raise ConfigError(
            f"{spec.name} has {spec.head_start} units before its head; constrained plans need 2 to "
            f"{spec.head_start + 1} nodes, got {n_nodes}"
        )
    return tuple(Plan(c) for c in combinations(range(1, spec.head_start + 1), n_nodes - 1))


def next_node(plan: Plan, node: int, n_units: int, direct: Mapping[int, int] | None) -> int:
    """The node after `node` on the way of a request, where `direct` links may be taken.

    A direct link is taken where the plan leaves every node between its ends empty.
    """
    far = direct.get(node) if direct else None
    if far is not None and far <= plan.last_node(n_units):
        bounds = (plan.stage(k, n_units) for k in range(node + 1, far))
        if all(start == stop for start, stop in bounds):
            return far
    return node + 1


def find_route(
    plan: Plan,
    n_units: int,
    *,
    down: Iterable[int] = (),
    broken: Iterable[tuple[int, int]] = (),
    direct: Mapping[int, int] | None = None,
) -> tuple[int, ...] | None:
    """The nodes that a request passes under `plan` now; None where it cannot be served.

    The chain is taken where it is whole, else the chain with every direct link the plan permits.

    Args:
        plan: The plan.
        n_units: The model's units.
        down: Nodes that do not answer.
        broken: Links (from, to) that are not connected.
        direct: Direct links, from node -> to node.
    """
    out, gone, last = frozenset(down), frozenset(broken), plan.last_node(n_units)
    for links in (None, direct) if direct else (None,):
        route = [0]
        while route[-1] < last:
            route.append(next_node(plan, route[-1], n_units, links))
        if out.isdisjoint(route) and gone.isdisjoint(pairwise(route)):
            return tuple(route)
    return None


def plan_mask(
    plans: Sequence[Plan],
    spec: ModelSpec,
    *,
    constrained: bool = False,
    down: Iterable[int] = (),
    direct: Mapping[int, int] | None = None,
) -> tuple[bool, ...]:
    """Which plans may be used now: the one mask of policy, runtime and solvers.

    Args:
        plans: The plans to judge.
        spec: The model.
        constrained: Apply the reference's rule (`is_constrained`).
        down: Indices of nodes that do not answer; a plan that needs one (to compute, or to relay
            where no direct link leads past it) is excluded.
        direct: Direct links, see `find_route`.
    """
    out = frozenset(down)
    n = spec.n_units
    return tuple(
        (not constrained or is_constrained(p, spec))
        and find_route(p, n, down=out, direct=direct) is not None
        for p in plans
    )
