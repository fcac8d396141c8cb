"""Testbed nodes as hosts: `--isolation netns`, a network namespace and a CPU quota for each.

Linux, root and pyroute2 (the extra `[netns]`). Every hop is two veth pairs with the relay between
them. Its rate is the kernel's: a token bucket (tc tbf) at the sending end of either direction.
Delay, outages, cuts and damage stay the relay's, which then has no rate of its own: many kernels
have no netem, and two ways of delaying would be two things to calibrate.

The pacer gives a node the speed of its device; the quota holds the whole process, with all that
the pacer does not see (frames, checksums, Python), to its device's share of a core.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from executor.child import Child
from executor.errors import ConfigError
from executor.hops import START_TIMEOUT_S, Relay, TestbedHop
from executor.shaping import RateTrace

if TYPE_CHECKING:
    import argparse

__all__ = [
    "ISOLATIONS",
    "NetnsRelay",
    "add_isolation_argument",
    "check_isolation",
    "open_relay",
    "unavailable",
]

log = logging.getLogger(__name__)

ISOLATIONS = ("none", "netns")
QUOTA_HEADROOM = 1.5
"""A node's CPU quota, in shares of what its device could compute: work that is not paced, too."""

_UNSHAPED_MBPS = 100_000.0
_PORT = 5550


def add_isolation_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every command that starts a testbed."""
    parser.add_argument(
        "--isolation",
        choices=ISOLATIONS,
        default="none",
        help="netns: run each testbed node in its own network namespace, with rates by tc and a "
        "CPU quota (Linux, root; docs/links.md)",
    )


def check_isolation(isolation: str, *, testbed: bool) -> None:
    """Refuse `--isolation netns` where it cannot be had, before anything is started.

    Args:
        isolation: What was asked for.
        testbed: Whether the command starts a testbed.

    Raises:
        ConfigError: No testbed, no Linux, no root or no pyroute2. What the kernel lacks shows on
            starting.
    """
    if isolation == "none":
        return
    if not testbed:
        raise ConfigError(f"--isolation {isolation} is for nodes of the testbed; none is started")
    if sys.platform != "linux":
        raise ConfigError(f"--isolation netns needs Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise ConfigError(f"--isolation netns needs root, this is user {os.geteuid()}")
    try:
        import pyroute2  # noqa: F401  # only whether it is there
    except ImportError as error:
        raise ConfigError(
            "--isolation netns needs pyroute2; install it: pip install 'splitpilot[netns]'"
        ) from error


def unavailable() -> str | None:
    """Why namespaces cannot be had here; None if they can. Makes two nodes and removes them."""
    try:
        with NetnsRelay(["a", "b"], [1.0, 1.0], [(0, 1)]):
            return None
    except ConfigError as error:
        return str(error)


class NetnsRelay(Relay):
    """Relay, namespaces and token buckets of a testbed. A context manager."""

    bind_host = "0.0.0.0"  # only its own testbed's hosts are in a node's network

    def __init__(
        self, names: Sequence[str], ratios: Sequence[float], hops: Sequence[tuple[int, int]]
    ) -> None:
        """Make the network; what it is made of is gone with this process at the latest.

        Args:
            names: The nodes'.
            ratios: How many times slower each is than a core.
            hops: The two nodes of each hop, in the order of `add_hop`.

        Raises:
            ConfigError: It cannot be had here; says why.
        """
        check_isolation("netns", testbed=True)
        from executor._namespaces import KEEPER, PREFIX, addresses, inside

        self.client_host = addresses(0)[1]
        self._addresses, self._inside = addresses, inside
        self._keeper = Child("keeper of namespaces", KEEPER)
        try:
            cores = [QUOTA_HEADROOM / ratio for ratio in ratios]
            self._keeper.send({"nodes": list(names), "cores": cores, "hops": list(hops)})
            made = json.loads(self._keeper.read_line(START_TIMEOUT_S))
            for name in made["swept"]:
                log.warning("removed what a killed run left behind: %s", name)
            self._groups = [Path(folder) for folder in made["groups"]]
            prefix = f"{PREFIX}-{made['pid']}"
            self._links = f"{prefix}-links"
            self.namespaces = [f"{prefix}-{k}-{name}" for k, name in enumerate(names)]
            with self.inside():
                super().__init__()
        except BaseException:
            self._keeper.close()
            raise

    def node_port(self, reserved: ExitStack) -> int:
        """Any: nobody else listens in a node's namespace."""
        return _PORT

    def node_host(self, node: int) -> str:
        """Its end of the first veth pair that leads to it."""
        return self.target_host(node - 1) if node else self.client_host

    def dial_host(self, hop: int) -> str:
        """The relay's end of the hop's first veth pair."""
        return self._addresses(1 + 2 * hop)[0]

    def target_host(self, hop: int) -> str:
        """The node's end of the hop's second veth pair."""
        return self._addresses(2 + 2 * hop)[1]

    def inside(self, node: int | None = None) -> AbstractContextManager[None]:
        """The namespace of a node, or that of the relay and the clients."""
        return self._inside(self._links if node is None else self.namespaces[node])

    def admit(self, node: int, pid: int) -> None:
        """Hold a process to the node's CPU quota."""
        with suppress(ProcessLookupError):  # it has ended: whoever talks to it will say so
            (self._groups[node] / "cgroup.procs").write_text(str(pid))

    def add_hop(self, target_port: int, hop: TestbedHop) -> int:
        """As `Relay.add_hop`, the rate being the token buckets'."""
        index = self._hops
        port = super().add_hop(target_port, replace(hop, mbps=_UNSHAPED_MBPS))
        self.set_rate(index, hop.mbps)
        return port

    def set_rate(self, hop: int, mbps: float) -> None:
        """As `Relay.set_rate`, in the kernel."""
        RateTrace.constant(mbps)
        super().set_rate(hop, _UNSHAPED_MBPS)  # an outage ends with it
        self._keeper.send({"hop": hop, "mbps": float(mbps)})

    def play_rate(self, hop: int, t0_s: float, dt_s: float, mbps: Sequence[float]) -> None:
        """As `Relay.play_rate`, in the kernel but for outages."""
        rates = [float(rate) for rate in mbps]
        RateTrace.from_samples(t0_s, dt_s, rates)
        super().play_rate(hop, t0_s, dt_s, [_UNSHAPED_MBPS if rate else 0.0 for rate in rates])
        trace = {"t0": float(t0_s), "dt_s": float(dt_s), "mbps": rates}
        self._keeper.send({"hop": hop, "trace": trace})

    def close(self) -> None:
        """End the relay and remove the network. May be called again."""
        super().close()
        self._keeper.close()


def open_relay(
    isolation: str, names: Sequence[str], ratios: Sequence[float], hops: Sequence[tuple[int, int]]
) -> Relay:
    """The hops of a testbed, isolated as asked.

    Raises:
        ConfigError: An unknown isolation, or one that cannot be had here.
    """
    if isolation not in ISOLATIONS:
        raise ConfigError(f"isolation must be one of {', '.join(ISOLATIONS)}, got {isolation!r}")
    return Relay() if isolation == "none" else NetnsRelay(names, ratios, hops)
