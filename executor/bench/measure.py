"""One case measured: every system does a request, in turn, again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from executor.bench.cases import Case
from executor.bench.hosts import BenchError, Host, Report
from executor.bench.systems import Asked, Link, OwnNodes, Place, Serving, System
from executor.bench.wire_floor import Sink, Wire
from executor.ports import reserve_port
from executor.testbed import Relay

__all__ = ["CaseResult", "Effort", "Running", "SystemResult", "drain", "run_case"]

_WARM_ROUNDS = 3
_STREAMS = 2
_STREAM_REQUESTS = 20


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Requests per system and case, one at a time.
        seconds: After so long no further round of a case begins.
    """

    rounds: int
    seconds: float


@dataclass
class SystemResult:
    """What one system did in one case; lists have a value per request.

    Attributes:
        latency_s: From the call to its output.
        stage_s: Seconds of all its stages together, measured around each in its process.
        wrong: Outputs that were not the reference's.
        memory_mib: Anonymous resident memory, per node.
        rate_rps: By number in flight, completions per second in the steady part of each stream.
        bound_rps: By number in flight, min(1 / slowest stage, cores / sum of stages), stages as
            measured meanwhile, of each stream.
    """

    latency_s: list[float] = field(default_factory=list)
    stage_s: list[float] = field(default_factory=list)
    wrong: int = 0
    memory_mib: list[float] = field(default_factory=list)
    rate_rps: dict[int, list[float]] = field(default_factory=dict)
    bound_rps: dict[int, list[float]] = field(default_factory=dict)


@dataclass
class CaseResult:
    """A case: its systems, and what the bytes cost.

    Attributes:
        name: The case.
        n_nodes: Nodes in the chain.
        plan: Where it was cut.
        down_bytes: Bytes of each crossing on the way down, from the client on.
        output_bytes: Bytes of the output, which crosses as often on its way back.
        wire_s: Seconds that these crossings take at least.
        systems: By name.
        skipped: Systems that were left out here, and why.
    """

    name: str
    n_nodes: int
    plan: tuple[int, ...]
    down_bytes: tuple[int, ...]
    output_bytes: int
    wire_s: float = 0.0
    systems: dict[str, SystemResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def run_case(case: Case, systems: dict[str, System], effort: Effort) -> CaseResult:
    """Measure a case. To be called in a process that has only the chain (`hosts.in_process`).

    Raises:
        BenchError: A node failed.
    """
    down_bytes, output_bytes = case.crossing_bytes()
    result = CaseResult(case.name, case.n_nodes, case.plan.cuts, down_bytes, output_bytes)
    if case.hops:
        result.skipped = {s.name: s.unshaped for s in systems.values() if s.unshaped}
    taking_part = [s for s in systems.values() if s.name not in result.skipped]
    with Running(case, taking_part) as running:
        _rounds(case, running, effort, result)
        for _ in range(_STREAMS):
            for in_flight in case.in_flight:
                for name, link in running.links.items():
                    _stream(case, running.hosts[name], link, in_flight, result.systems[name])
    return result


class Running:
    """All nodes of a case, and the links to them. A context manager."""

    def __init__(self, case: Case, systems: list[System]) -> None:
        self.hosts: dict[str, Sequence[Asked]] = {}
        self.links: dict[str, Link] = {}
        self._stack = ExitStack()
        try:
            self._start(case, systems)
        except BaseException:
            self._stack.close()
            raise

    def _start(self, case: Case, systems: list[System]) -> None:
        with ExitStack() as reserved:
            clients = {}
            every: list[Host] = []
            for system in [*systems, _WIRE]:
                # Forked first: from here on this process has threads.
                listens = tuple(reserve_port(reserved) for _ in range(case.n_nodes))
                store = reserve_port(reserved)
                clients[system.name] = (listens, store)
            relay = self._relay(case, clients)
            for system in [*systems, _WIRE]:
                listens, store = clients[system.name]
                dials = relay.get(system.name, listens)
                mine: list[Host] = []
                n_hosts = 1 if system is _WIRE else case.n_nodes if system.serve else 0
                for index in range(n_hosts):
                    place = _place(case, index, listens, dials, store)
                    host = Host(system, place, every)
                    self._stack.callback(host.close)
                    mine.append(host)
                    every.append(host)
                self.hosts[system.name] = mine
            for system in [*systems, _WIRE]:
                listens, store = clients[system.name]
                place = _place(case, -1, listens, relay.get(system.name, listens), store)
                self._connect(system, place)
        sizes = case.crossing_bytes()
        self.wire = Wire(clients[_WIRE.name][0][0], {*sizes[0], sizes[1]})
        self._stack.callback(self.wire.close)

    def _relay(self, case: Case, clients: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Where each system's nodes are dialled, if the hops are shaped."""
        if not case.hops:
            return {}
        relay = self._stack.enter_context(Relay())
        dials = {}
        for name, (listens, _) in clients.items():
            far = zip(listens[1:], case.hops, strict=False)
            dials[name] = (listens[0], *(relay.add_hop(port, hop) for port, hop in far))
        return dials

    def _connect(self, system: System, place: Place) -> None:
        hosts = self.hosts[system.name]
        if system.together:
            for host in hosts:
                host.ask("serve")
        else:
            for host in reversed(hosts):
                host.ask("serve")
                host.answer()
        if system is _WIRE:
            return
        link = system.dial(place)
        self._stack.callback(link.close)
        self.links[system.name] = link
        if isinstance(link, OwnNodes):
            self.hosts[system.name] = link.nodes
        if system.together:
            for host in hosts:
                host.answer()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _place(
    case: Case, index: int, listens: tuple[int, ...], dials: tuple[int, ...], store: int
) -> Place:
    return Place(
        index, case.n_nodes, listens, dials, store, case.chain, case.plan, dict(case.shapes)
    )


def _serve_sink(place: Place) -> Serving:
    return Sink(place.listens[0])


def _no_link(place: Place) -> Link:
    raise BenchError("the bare wire is no system")


_WIRE = System("bare wire", _serve_sink, _no_link)


def _rounds(case: Case, running: Running, effort: Effort, result: CaseResult) -> None:
    """One request per system and round; who goes first changes."""
    names = list(running.links)
    result.systems = {name: SystemResult() for name in names}
    turns = cycle(range(len(case.inputs)))
    deadline_s = float("inf")
    for number in range(_WARM_ROUNDS + effort.rounds):
        if number == _WARM_ROUNDS:
            deadline_s = time.monotonic() + effort.seconds
            for name in names:
                drain(running.hosts[name])
            result.systems = {name: SystemResult() for name in names}
            running.wire.taken_s = {n: [] for n in running.wire.taken_s}
        if time.monotonic() > deadline_s:
            break
        which = next(turns)
        running.wire.measure()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun_s = time.monotonic()
            output = running.links[name].call(case.inputs[which])
            system = result.systems[name]
            system.latency_s.append(time.monotonic() - begun_s)
            system.wrong += not case.is_right(which, output)
    for name in names:
        drained = drain(running.hosts[name])
        system = result.systems[name]
        system.memory_mib = [node.memory_mib for node in drained]
        per_node = (node.stage_s for node in drained)
        system.stage_s = [sum(stages) for stages in zip(*per_node, strict=True)]
        if len(system.stage_s) != len(system.latency_s):
            raise BenchError(
                f"{name}: {len(system.latency_s)} requests ran {len(system.stage_s)} stages"
            )
    result.wire_s = _wire_s(case, running.wire)


def _wire_s(case: Case, wire: Wire) -> float:
    """Seconds of all crossings, one after the other."""
    down_bytes, output_bytes = case.crossing_bytes()
    total_s = 0.0
    for sizes in (down_bytes, (output_bytes,) * len(down_bytes)):
        total_s += wire.seconds(sizes[0])
        for k, n_bytes in enumerate(sizes[1:]):
            if case.hops:
                hop = case.hops[k]
                total_s += n_bytes * 8 / (hop.mbps * 1e6) + hop.delay_s
            else:
                total_s += wire.seconds(n_bytes)
    return total_s


def _stream(
    case: Case, hosts: Sequence[Asked], link: Link, in_flight: int, system: SystemResult
) -> None:
    """Throughput with so many in flight."""
    n = _STREAM_REQUESTS + 2 * in_flight  # full from the first completions to the last
    xs = [case.inputs[k % len(case.inputs)] for k in range(n)]
    drain(hosts)
    done_s = link.pump(xs, in_flight)
    rate_rps = (n - 2 * in_flight) / (done_s[n - 1 - in_flight] - done_s[in_flight - 1])
    stages = [node.stage_s[in_flight : n - in_flight] for node in drain(hosts)]
    means = [sum(taken) / len(taken) for taken in stages]
    cores = len(os.sched_getaffinity(0))
    system.rate_rps.setdefault(in_flight, []).append(rate_rps)
    system.bound_rps.setdefault(in_flight, []).append(min(1 / max(means), cores / sum(means)))


def drain(hosts: Sequence[Asked]) -> list[Report]:
    """What each node's process has to report; its stages' seconds start anew."""
    for host in hosts:
        host.ask("drain")
    return [host.answer() for host in hosts]
