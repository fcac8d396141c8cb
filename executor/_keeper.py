"""Keeps a testbed's network namespaces: `python -m executor._keeper`, while its stdin is open.

It makes namespaces, veth pairs, token buckets and CPU groups, plays the hops' rates, and removes
all of it when its stdin ends: that comes with its parent's end, however it ended. What a keeper
that was killed itself left behind, the next one removes.

Commands are JSON lines on stdin, the first of which says what to make; hops are pairs of nodes:

    {"nodes": ["edge", "fog", "cloud"], "cores": [0.1, 0.5, 1], "hops": [[0, 1], [1, 2]]}
    {"hop": 0, "mbps": 5}
    {"hop": 0, "trace": {"t0": 1234.5, "dt_s": 1.0, "mbps": [40, 0, 5]}}

The first is answered with {"pid": ..., "groups": [folder per node], "swept": [names]}; a refusal
is one line on stderr and exit code 2. A token bucket has no rate of 0: the rate before an outage
stays, and the relay holds the bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from pyroute2 import IPRoute, netns

from executor import _namespaces as namespaces
from executor._cgroups import CpuGroups
from executor.arguments import Parser
from executor.errors import ConfigError
from executor.shaping import RateTrace

__all__ = ["Keeper", "main"]

_FIRST_MBPS = 1000.0
# Nodes that lost their parent may have a stage to end.
_GONE_WAIT_S = 15.0


class _Hop:
    """A hop's two token buckets: at the sending end of either direction."""

    def __init__(self, ends: Sequence[tuple[IPRoute, int]]) -> None:
        self.trace = RateTrace.constant(_FIRST_MBPS)
        self._ends = ends
        self._rate = self.trace.value_at(0.0)
        for ip, index in ends:
            namespaces.shape(ip, index, self._rate, new=True)

    def follow(self, now_s: float) -> None:
        """Give the buckets the rate of now."""
        rate = self.trace.value_at(now_s)
        if rate in (0.0, self._rate):
            return
        for ip, index in self._ends:
            namespaces.shape(ip, index, rate)
        self._rate = rate


class Keeper:
    """Namespaces of nodes and the hops between them. A context manager, which removes them."""

    def __init__(self) -> None:
        self.groups = CpuGroups.find()
        self.hops: list[_Hop] = []
        self._prefix = f"{namespaces.PREFIX}-{os.getpid()}"
        self._namespaces: list[str] = []
        self._group_names: list[str] = []
        self._ips: list[IPRoute] = []

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make(
        self, nodes: Sequence[str], cores: Sequence[float], hops: Sequence[Sequence[int]]
    ) -> list[str]:
        """Make everything; returns each node's CPU group.

        Raises:
            ConfigError: The kernel refuses something; says what.
        """
        links = self._namespace(f"{self._prefix}-links")
        names = [f"{self._prefix}-{k}-{name}" for k, name in enumerate(nodes)]
        ips = [self._namespace(name) for name in names]
        with namespaces.step("create a veth pair (is the kernel's veth there?)"):
            namespaces.connect(links, ips[0], names[0], 0, "client")
            ends = [
                [
                    (ips[node], namespaces.connect(links, ips[node], names[node], link, f"hop{h}"))
                    for node, link in zip(hop, (1 + 2 * h, 2 + 2 * h), strict=True)
                ]
                for h, hop in enumerate(hops)
            ]
        with namespaces.step("limit a rate (is the kernel's sch_tbf there?)"):
            self.hops = [_Hop(pair) for pair in ends]
        folders = []
        with namespaces.step(f"create a CPU group in {self.groups.base}"):
            for name, share in zip(names, cores, strict=True):
                self._group_names.append(name)
                folders.append(str(self.groups.create(name, share)))
        return folders

    def _namespace(self, name: str) -> IPRoute:
        with namespaces.step("create a network namespace"):
            self._namespaces.append(name)
            netns.create(name)
            with namespaces.inside(name):
                ip = IPRoute()
            self._ips.append(ip)
            ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
        return ip

    def command(self, message: dict[str, Any]) -> None:
        """Change a hop's rate, or let it follow a trace."""
        hop = self.hops[message["hop"]]
        if "trace" in message:
            trace = message["trace"]
            hop.trace = RateTrace.from_samples(trace["t0"], trace["dt_s"], trace["mbps"])
        else:
            hop.trace = RateTrace.constant(message["mbps"])

    def follow(self) -> float:
        """Give every hop its rate of now; returns the time of the next change."""
        now_s = time.monotonic()
        for hop in self.hops:
            hop.follow(now_s)
        return min((hop.trace.next_step_s(now_s) for hop in self.hops), default=math.inf)

    def close(self) -> None:
        """Remove everything that was made; waits for what still runs in the CPU groups."""
        for ip in self._ips:
            ip.close()
        for name in self._namespaces:
            namespaces.remove(name)
        deadline_s = time.monotonic() + _GONE_WAIT_S
        for name in self._group_names:
            while not self.groups.remove(name) and time.monotonic() < deadline_s:
                time.sleep(0.05)


def _serve(keeper: Keeper, control: int) -> None:
    unread = b""
    while True:
        timeout_s = keeper.follow() - time.monotonic()
        wait_s = None if timeout_s == math.inf else max(0.0, timeout_s)
        if not select.select([control], [], [], wait_s)[0]:
            continue
        data = os.read(control, 1 << 16)
        if not data:
            return
        *lines, unread = (unread + data).split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if "nodes" in message:
                swept = namespaces.sweep(keeper.groups)
                groups = keeper.make(message["nodes"], message["cores"], message["hops"])
                answer = {"pid": os.getpid(), "groups": groups, "swept": swept}
                print(json.dumps(answer), flush=True)
            else:
                keeper.command(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Keep namespaces until stdin ends; returns the exit code."""
    description = "Make a testbed's network namespaces; commands are JSON lines on stdin."
    Parser(prog=f"python -m {namespaces.KEEPER}", description=description).parse_args(argv)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with Keeper() as keeper:
            try:
                _serve(keeper, sys.stdin.fileno())
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows must not be cut short
    except ConfigError as error:
        print(f"--isolation netns: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
