"""Network namespaces, veth pairs and token buckets, by pyroute2 (Linux, root).

A testbed's namespaces are `splitpilot-PID-K-NAME`, one per node, and `splitpilot-PID-links`, in
which the other ends of all the nodes' veth pairs lie; PID is of the process that keeps them
(`executor._keeper`). Every address lies in one of them, so the host's own interfaces, addresses
and routes stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError, netns
from pyroute2.netns import NETNS_RUN_DIR

from executor._cgroups import CpuGroups
from executor.errors import ConfigError

__all__ = ["KEEPER", "PREFIX", "addresses", "connect", "inside", "remove", "shape", "step", "sweep"]

PREFIX = "splitpilot"
KEEPER = "executor._keeper"
_OURS = re.compile(PREFIX + r"-(\d+)-(?:links|\d+-.*)")
_ROOT = 0x10000  # handle 1:
# A full segment on the wire (Ethernet, IP, TCP with time stamps) and what it carries.
_FRAME_BYTES, _PAYLOAD_BYTES = 1514, 1448
# What may leave at once: a bucket must outlast the wait for a timer, else its rate is missed.
_BURST_S = 0.002
_MIN_BURST_BYTES = 2 * _FRAME_BYTES
_LEAST_RATE, _MOST_RATE = 125, 2**32 - 1
# More than the sockets' buffers hold, so that nothing is dropped.
_LIMIT_BYTES = 4 << 20


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """The calling thread is in that namespace, and so are the sockets and processes it makes."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(Path(NETNS_RUN_DIR) / name, os.O_RDONLY)
        try:
            netns.setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            netns.setns(own)
    finally:
        os.close(own)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Whatever the kernel refuses here is one clear error: "cannot WHAT: reason".

    Raises:
        ConfigError: The kernel refused.
    """
    try:
        yield
    except NetlinkError as error:
        raise ConfigError(f"cannot {what}: {error.args[-1]}") from error
    except OSError as error:
        raise ConfigError(f"cannot {what}: {error.strerror or error}") from error


def addresses(link: int) -> tuple[str, str]:
    """The two ends of veth pair `link` (0..255): the links' side's, and the node's."""
    return f"10.0.{link}.1", f"10.0.{link}.2"


def connect(links: IPRoute, node: IPRoute, namespace: str, link: int, name: str) -> int:
    """Lay veth pair `link` from the links' side to a node.

    Args:
        links: Speaks to the kernel inside the links' namespace.
        node: The same inside the node's.
        namespace: Name of the node's namespace.
        link: Number of the pair, which picks its addresses.
        name: What the node's interface is called; `name` and the link's number on the other side.

    Returns:
        Index of the node's interface.
    """
    far = f"{name}-{link}"
    links.link("add", ifname=far, kind="veth", peer={"ifname": name, "net_ns_fd": namespace})
    index = 0
    for ip, ifname, address in zip((links, node), (far, name), addresses(link), strict=True):
        index = ip.link_lookup(ifname=ifname)[0]
        ip.addr("add", index=index, address=address, prefixlen=30)
        ip.link("set", index=index, state="up")
    return index


def shape(ip: IPRoute, index: int, bytes_per_s: float, *, new: bool = False) -> None:
    """Let full TCP segments carry so many payload bytes a second out of an interface.

    The bucket counts whole frames, so its rate is higher by their headers. It is at least 1 kbit/s
    and at most 34 Gbit/s, which is what the kernel's fields can hold.
    """
    rate = round(bytes_per_s * _FRAME_BYTES / _PAYLOAD_BYTES)
    rate = min(max(rate, _LEAST_RATE), _MOST_RATE)
    burst = max(_MIN_BURST_BYTES, round(rate * _BURST_S))
    verb = "add" if new else "change"
    ip.tc(verb, "tbf", index, _ROOT, rate=rate, burst=burst, limit=_LIMIT_BYTES)


def remove(name: str) -> None:
    """Remove a namespace and the veth pairs that have an end in it."""
    with contextlib.suppress(OSError, NetlinkError):
        with inside(name):
            ip = IPRoute()
        with ip:
            for link in ip.get_links(kind="veth"):
                with contextlib.suppress(NetlinkError):  # its other end was removed just now
                    ip.link("del", index=link["index"])
    with contextlib.suppress(OSError):
        netns.remove(name)


def sweep(groups: CpuGroups) -> list[str]:
    """Remove what killed keepers left behind; returns the names, "busy" where one is in use."""
    swept = []
    found = {*netns.listnetns(), *groups.names()}
    for name in sorted(found):
        match = _OURS.fullmatch(name)
        # What bears our own number is of one that had it before us.
        if match is None or (int(match[1]) != os.getpid() and _keeps(int(match[1]))):
            continue
        remove(name)
        swept.append(name if groups.remove(name) else f"{name} (busy)")
    return swept


def _keeps(pid: int) -> bool:
    """Whether a process is a keeper that still runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return KEEPER.encode() in words
