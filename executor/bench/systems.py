"""What is compared: the interface, and who there is.

A system serves one node in each of its processes (`serve`) and lets the bench ask the first one
(`dial`). Nothing here is tuned against a peer: each is written as its library's documentation
shows, gives the stage the tensor it received without a copy where that is possible, runs one stage
at a time in a process, and is checked for right outputs like this executor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from executor.bench.cases import TimedChain
from executor.plan import Plan

__all__ = [
    "Asked",
    "Link",
    "OwnNodes",
    "Place",
    "Serving",
    "System",
    "find_systems",
    "pump_futures",
]

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Place:
    """What a process has to know to be one node of a chain; `index` -1 is the client.

    Attributes:
        index: Its place in the chain.
        n_nodes: Nodes in the chain.
        listens: The port that each node listens on.
        dials: The port at which each node is dialled: its own, or a relay's in front of it.
        store: A port for a rendezvous.
        chain: The units.
        plan: Where they are cut.
        shapes: Of the activation at each cut; the last one is the output's.
    """

    index: int
    n_nodes: int
    listens: tuple[int, ...]
    dials: tuple[int, ...]
    store: int
    chain: TimedChain
    plan: Plan
    shapes: Mapping[int, tuple[int, ...]]

    @property
    def last(self) -> bool:
        """Whether no node comes after this one."""
        return self.index == self.n_nodes - 1

    @property
    def stage(self) -> tuple[int, int]:
        """First unit of this node's stage, and one past the last."""
        return self.plan.stage(self.index, self.chain.spec.n_units)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Run this node's stage."""
        return self.chain.run(x, *self.stage)


class Serving(Protocol):
    """A node at work."""

    def close(self) -> None:
        """End it."""


class Link(Protocol):
    """The client's end of a system."""

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Run one inference and wait for its output."""

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        """Run all of them, so many at a time; returns when each was complete (monotonic s)."""

    def close(self) -> None:
        """Disconnect."""


class Asked(Protocol):
    """What runs a node, asked for its `hosts.Report`."""

    def ask(self, what: str) -> None:
        """Send a command: "drain"."""

    def answer(self, timeout_s: float = DEADLINE_S) -> Any:
        """What it has to say to that."""


@runtime_checkable
class OwnNodes(Protocol):
    """A link that started its system's nodes itself.

    Attributes:
        nodes: They, in the order of the chain.
    """

    nodes: Sequence[Asked]


@dataclass(frozen=True)
class System:
    """A way to run a split model.

    Attributes:
        name: What it is called in the report.
        serve: Starts one node; None where the link starts them (`OwnNodes`).
        dial: Connects a client.
        together: Whether nodes and client only come up together; else the last node starts first.
        unshaped: Why it cannot run over shaped hops; empty if it can.
    """

    name: str
    serve: Callable[[Place], Serving] | None
    dial: Callable[[Place], Link]
    together: bool = False
    unshaped: str = ""


def find_systems() -> tuple[dict[str, System], dict[str, str]]:
    """Those that can run here by name, this executor first; and why the others cannot."""
    from executor.bench import grpc_peer, ours, pickle_peer, ray_peer, rpc_peer

    found: dict[str, System] = {}
    missing: dict[str, str] = {}
    for module in (ours, rpc_peer, grpc_peer, pickle_peer, ray_peer):
        reason = module.missing()
        if reason:
            missing[module.SYSTEM.name] = reason
        else:
            found[module.SYSTEM.name] = module.SYSTEM
    return found, missing


def pump_futures(
    submit: Callable[[torch.Tensor], Future[object]], xs: Sequence[torch.Tensor], in_flight: int
) -> list[float]:
    """`Link.pump` for whoever hands out futures; they complete in order."""
    done_s: list[float] = []
    waiting: deque[Future[object]] = deque()
    for x in xs:
        if len(waiting) == in_flight:
            waiting.popleft().result(DEADLINE_S)
            done_s.append(time.monotonic())
        waiting.append(submit(x))
    for future in waiting:
        future.result(DEADLINE_S)
        done_s.append(time.monotonic())
    return done_s
