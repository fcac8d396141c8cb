"""What is run: echoes of a tensor, and split models; each with its chain and its plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from executor.backends import build_backend
from executor.errors import ConfigError
from executor.model import UnitChain, sample_input
from executor.plan import ModelSpec, Plan
from executor.testbed import TestbedHop

__all__ = ["NODE_NAMES", "Case", "TimedChain", "build_model", "echo_case", "model_case"]

NODE_NAMES = ("edge", "fog", "cloud")
_N_INPUTS = 4
_TOLERANCE = 1e-5


class TimedChain(UnitChain):
    """A chain that notes how long each stage took: the same for every system.

    Attributes:
        taken_s: Wall seconds of each `run` so far.
    """

    taken_s: list[float]

    def run(
        self,
        x: torch.Tensor,
        start: int,
        stop: int,
        is_wanted: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """As `UnitChain.run`."""
        begun_s = time.monotonic()
        y = super().run(x, start, stop, is_wanted)
        self.taken_s.append(time.monotonic() - begun_s)
        return y

    @classmethod
    def of(cls, chain: UnitChain) -> TimedChain:
        """The same chain, timed."""
        made = cls.like(chain, chain.units)
        assert isinstance(made, TimedChain)
        made.taken_s = []
        return made


@dataclass(frozen=True)
class Case:
    """One thing to compare the systems at.

    Attributes:
        name: What it is called in the report.
        chain: The units, timed. Every system runs these very modules.
        plan: Where they are cut.
        n_nodes: Nodes in the chain, 2 or 3.
        inputs: A few inputs, so that a swapped answer would show.
        outputs: What the whole chain makes of them.
        shapes: Of the activation at each cut of the plan; -1 is the output's.
        in_flight: Numbers of requests in flight at which throughput is measured.
        hops: Shaped hops between the nodes; empty for bare loopback.
    """

    name: str
    chain: TimedChain
    plan: Plan
    n_nodes: int
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    shapes: dict[int, tuple[int, ...]]
    in_flight: tuple[int, ...] = ()
    hops: tuple[TestbedHop, ...] = ()

    def crossing_bytes(self) -> tuple[tuple[int, ...], int]:
        """Bytes on the way down (client to first node, then each hop), and of the output."""
        cuts = self.chain.spec.cut_bytes
        return (cuts[0], *(cuts[k] for k in self.plan.cuts)), cuts[-1]

    def is_right(self, which: int, output: torch.Tensor) -> bool:
        """Whether this is what input `which` gives, but for rounding (memory's alignment shows)."""
        expected = self.outputs[which]
        if output.shape != expected.shape:
            return False
        worst = float((output - expected).abs().max())
        return worst <= _TOLERANCE * float(expected.abs().max())

    def shaped(self, hops: tuple[TestbedHop, ...]) -> Case:
        """The same over shaped hops, without throughput."""
        return replace(self, name=f"{self.name}, shaped", hops=hops, in_flight=())


def echo_case(n_bytes: int) -> Case:
    """A tensor of so many bytes down the chain of three and back; a stage copies it once."""
    spec = ModelSpec(
        name="echo",
        unit_names=("a", "b", "c"),
        cut_bytes=(n_bytes,) * 4,
        has_params=(False,) * 3,
        head_start=2,
        static_plan=(1, 2),
        input_shape=(1, n_bytes // 4),
    )
    chain = UnitChain(spec, [nn.Identity() for _ in range(3)], [False] * 3, "0" * 16)
    inputs = tuple(sample_input(k, spec.input_shape) for k in range(_N_INPUTS))
    shapes = dict.fromkeys((0, 1, 2, -1), spec.input_shape)
    name = f"echo {_size(n_bytes)}"
    return Case(name, TimedChain.of(chain), Plan((1, 2)), 3, inputs, inputs, shapes)


def model_case(chain: UnitChain, n_nodes: int, in_flight: tuple[int, ...] = ()) -> Case:
    """A model at the reference's thirds, or at the first of these cuts on two nodes."""
    spec = chain.spec
    plan = Plan(spec.static_plan[: n_nodes - 1])
    inputs = tuple(sample_input(k, spec.input_shape) for k in range(_N_INPUTS))
    shapes: dict[int, tuple[int, ...]] = {}
    outputs = []
    for x in inputs:
        for start, stop in pairwise((0, *plan.cuts, spec.n_units)):
            shapes[start] = tuple(x.shape)
            x = chain.run(x, start, stop)
        shapes[-1] = tuple(x.shape)
        outputs.append(x)
    name = f"{spec.name}, {n_nodes} stages"
    timed = TimedChain.of(chain)
    return Case(name, timed, plan, n_nodes, inputs, tuple(outputs), shapes, in_flight)


def build_model(model: str) -> UnitChain:
    """An eager chain with seeded weights.

    Raises:
        ConfigError: No such model, or one that cannot be cut in three.
    """
    chain, _ = build_backend("eager", model)
    first, second = chain.spec.static_plan
    if not 0 < first < second < chain.spec.n_units:
        raise ConfigError(
            f"model {model}: the bench needs three stages with work in each, got cuts "
            f"{(first, second)} of {chain.spec.n_units} units"
        )
    return chain


def _size(n_bytes: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:g} {name}"
    return f"{n_bytes} B"
