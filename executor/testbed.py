"""A whole chain on one machine: nodes as paced processes, hops as shaped links, traces played.

    with Testbed("mobilenet_v2") as testbed:
        client = testbed.client()
        testbed.set_rate(0, 5.0)
        reply = client.submit(sample_input(0), Plan((0, 21))).result()

Times of traces are `time.monotonic()` seconds, which all processes of a Linux machine share.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from executor.child import Child
from executor.cluster import Cluster, DirectLink, NodeConfig, is_loopback
from executor.codec import check_transfer
from executor.errors import ConfigError, HandshakeError
from executor.hops import START_TIMEOUT_S, Relay, TestbedHop
from executor.modelref import absolute_model
from executor.netns import open_relay
from executor.pacing import LoadTrace, Pacer

if TYPE_CHECKING:
    from executor.client import Client

__all__ = ["DEFAULT_HOPS", "DEFAULT_NODES", "Relay", "Testbed", "TestbedHop", "TestbedNode"]

CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class TestbedNode:
    """An emulated node.

    Attributes:
        name: Role.
        ratio: How many times slower than a core of this machine it is, positive.
        device: Device class (picks the power figures).
        load: Background load it starts with, clipped to [0, 0.9].
        transfer: How activations leave it (`executor.cluster.NodeConfig`).
    """

    __test__: ClassVar[bool] = False  # not a test class, whatever pytest makes of the name

    name: str
    ratio: float
    device: str
    load: float = 0.0
    transfer: str = "float32"

    def __post_init__(self) -> None:
        try:
            Pacer(self.ratio)
            LoadTrace.constant(self.load)
        except ConfigError as error:
            raise ConfigError(f"testbed node {self.name}: {error}") from error
        check_transfer(self.transfer, f"testbed node {self.name}")


DEFAULT_NODES = (
    TestbedNode("edge", 12.0, "pi4"),
    TestbedNode("fog", 3.0, "laptop"),
    TestbedNode("cloud", 1.0, "server"),
)
DEFAULT_HOPS = (TestbedHop(40.0, 0.005), TestbedHop(60.0, 0.010))


class Testbed:
    """Node processes chained over relayed hops, on loopback or as hosts. A context manager.

    The children read their parent's end from their stdin, so none outlives it.

    Attributes:
        cluster: The chain as a client sees it; each `connect` port but the first is the relay's.
    """

    __test__: ClassVar[bool] = False

    cluster: Cluster

    def __init__(
        self,
        model: str,
        *,
        weights: str = "none",
        nodes: Sequence[TestbedNode] = DEFAULT_NODES,
        hops: Sequence[TestbedHop] = DEFAULT_HOPS,
        max_queue: int = 64,
        direct: TestbedHop | None = None,
        isolation: str = "none",
    ) -> None:
        """Start the processes and wait until every node serves.

        Args:
            model: A torchvision classification model's name, or `FILE.py:FUNCTION`.
            weights: "none" (seeded), "DEFAULT", or a path (relative to the working directory).
            nodes: The chain, N >= 2 nodes.
            hops: The N - 1 hops between them.
            max_queue: Requests a node queues before it refuses.
            direct: A link from the first node to the last, past those between; it is hop N - 1 of
                the relay. None: there is none.
            isolation: "netns" makes each node a host of its own (`executor.netns`); "none" chains
                them over loopback.

        Raises:
            ConfigError: A setting is wrong; a node's refusal carries the node's words.
            HandshakeError: A process died or did not serve in time.
        """
        self.nodes = tuple(nodes)
        self.hops = tuple(hops)
        if len(self.nodes) < 2 or len(self.hops) != len(self.nodes) - 1:
            raise ConfigError(
                f"a testbed needs N >= 2 nodes and N - 1 hops, got {len(self.nodes)} nodes and "
                f"{len(self.hops)} hops"
            )
        if weights not in ("none", "DEFAULT"):
            weights = str(Path(weights).absolute())
        model = absolute_model(model)
        self._stack = ExitStack()
        self._children: list[Child] = []
        self._serving: set[int] = set()
        self._stopped: set[int] = set()
        self._clients: list[Client] = []
        try:
            self._start(model, weights, max_queue, direct, isolation)
        except BaseException:
            for child in self._children:
                child.kill()  # still importing or loading weights, they would not notice a request
            self.close()
            raise

    def _start(
        self, model: str, weights: str, max_queue: int, direct: TestbedHop | None, isolation: str
    ) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="splitpilot-"))
        names, n = [node.name for node in self.nodes], len(self.nodes)
        ways = [(k, k + 1) for k in range(n - 1)]
        hops = self.hops
        if direct is not None:
            ways, hops = [*ways, (0, n - 1)], (*hops, direct)
        relay = open_relay(isolation, names, [node.ratio for node in self.nodes], ways)
        self._relay = self._stack.enter_context(relay)
        with ExitStack() as reserved:
            ports = [relay.node_port(reserved) for _ in self.nodes]
            dials = [(relay.client_host, ports[0])]
            for index, ((_, target), hop) in enumerate(zip(ways, hops, strict=True)):
                dials.append((relay.dial_host(index), relay.add_hop(ports[target], hop)))
            links = tuple(DirectLink(names[0], names[-1], *dial) for dial in dials[n:])
            self.cluster = Cluster(
                model=model,
                weights=weights,
                nodes=tuple(
                    NodeConfig(
                        name=node.name,
                        host=relay.bind_host,
                        port=port,
                        connect_host=host,
                        connect_port=dial,
                        device=node.device,
                        transfer=node.transfer,
                    )
                    for node, port, (host, dial) in zip(self.nodes, ports, dials[:n], strict=True)
                ),
                max_queue=max_queue,
                threads=1,
                direct=links,
            )
            self._file = Path(folder) / "cluster.toml"
            self._file.write_text(self.cluster.to_toml(), encoding="utf-8")
            for index in range(n):
                self._children.append(self._spawn(index))
            for index in range(n):
                self._await_ready(index)

    def _spawn(self, index: int, weights: str | None = None) -> Child:
        node, file = self.nodes[index], self._file
        if weights is not None:
            file = self._file.with_name(f"{node.name}-other-weights.toml")
            file.write_text(replace(self.cluster, weights=weights).to_toml(), encoding="utf-8")
        args = ["--role", node.name, "--cluster", str(file), "--threads", "1"]
        args += ["--ratio", repr(float(node.ratio)), "--control-stdin"]
        if not is_loopback(self.cluster.nodes[index].host):
            args.append("--insecure")  # its network is this testbed's alone
        with self._relay.inside(index):
            return Child(f"node {node.name}", "executor.node", args)

    def _await_ready(self, index: int) -> None:
        child, node = self._children[index], self.nodes[index]
        line = child.read_line(START_TIMEOUT_S)
        if not line.startswith("READY"):
            raise HandshakeError(f'{child.name} should print "READY port", got {line!r}')
        self._relay.admit(index, child.pid)
        self._serving.add(child.pid)
        if node.load:
            self.set_load(index, node.load)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by node name, once they serve, and the relay's under "relay"."""
        nodes = zip(self.nodes, self._children, strict=True)
        serving = {node.name: child.pid for node, child in nodes if child.pid in self._serving}
        return {**serving, "relay": self._relay.pid}

    def inside(self) -> AbstractContextManager[None]:
        """Where the calling thread must open sockets to reach the nodes at `address`."""
        return self._relay.inside()

    def address(self, node: int | str) -> tuple[str, int]:
        """Where a node can be reached past every hop, from `inside`."""
        index = self._index(node)
        return self._relay.node_host(index), self.cluster.nodes[index].port

    def client(self, **options: Any) -> Client:
        """A connected client; closed with the testbed at the latest.

        Args:
            options: Passed to `executor.client.Client` (max_in_flight, timeout_s).

        Raises:
            HandshakeError: A node does not answer; the nodes that ended are named.
        """
        from executor.client import Client  # torch is not needed to shape hops

        client = Client(self.cluster, **options)
        self._clients.append(client)
        try:
            with self._relay.inside():
                client.connect(timeout_s=CONNECT_TIMEOUT_S)
        except HandshakeError as error:
            ended = [child.name for child in self._children if not child.alive]
            detail = f" ({', '.join(ended)} ended)" if ended else ""
            raise HandshakeError(f"{error}{detail}") from error
        return client

    def set_rate(self, hop: int, mbps: float) -> None:
        """Change a hop's bandwidth now (see `Relay.set_rate`)."""
        self._relay.set_rate(hop, mbps)

    def play_rate(self, hop: int, t0_s: float, dt_s: float, mbps: Sequence[float]) -> None:
        """Let a hop's bandwidth follow a trace (see `Relay.play_rate`)."""
        self._relay.play_rate(hop, t0_s, dt_s, mbps)

    def set_delay(self, hop: int, delay_s: float) -> None:
        """Change a hop's one-way delay (see `Relay.set_delay`)."""
        self._relay.set_delay(hop, delay_s)

    def play_delay(self, hop: int, t0_s: float, dt_s: float, delay_s: Sequence[float]) -> None:
        """Let a hop's one-way delay follow a trace (see `Relay.play_delay`)."""
        self._relay.play_delay(hop, t0_s, dt_s, delay_s)

    def set_cut(self, hop: int, cut: bool) -> None:
        """Cut a hop, or mend it (see `Relay.set_cut`)."""
        self._relay.set_cut(hop, cut)

    def set_flips(self, hop: int, flip_bytes: float) -> None:
        """Damage what crosses a hop (see `Relay.set_flips`)."""
        self._relay.set_flips(hop, flip_bytes)

    def set_load(self, node: int | str, value: float) -> None:
        """Change a node's background load, from its next stage on; clipped to [0, 0.9].

        Raises:
            ConfigError: No such node, or the value is not finite.
            HandshakeError: The node has ended.
        """
        LoadTrace.constant(value)
        self._child(node).send({"load": float(value)})

    def play_load(self, node: int | str, t0_s: float, dt_s: float, values: Sequence[float]) -> None:
        """Let a node's load follow a trace from its next stage on; the last value stays.

        Args:
            node: Index or name.
            t0_s: Monotonic time at which the trace starts (its first value holds before).
            dt_s: Seconds per sample.
            values: Loads, clipped to [0, 0.9].

        Raises:
            ConfigError: No such node, or no trace.
            HandshakeError: The node has ended.
        """
        loads = [float(value) for value in values]
        LoadTrace.from_samples(t0_s, dt_s, loads)
        trace = {"t0": float(t0_s), "dt_s": float(dt_s), "values": loads}
        self._child(node).send({"load": trace})

    def kill(self, node: int | str) -> None:
        """End a node's process at once, as a crash would.

        Raises:
            ConfigError: No such node.
        """
        self._child(node).kill()

    def restart(self, node: int | str, weights: str | None = None) -> None:
        """Start a node's process again on the same port; its load starts over.

        Args:
            node: Index or name.
            weights: Other weights than the chain's, which a client must refuse; a path, or None.

        Raises:
            ConfigError: No such node.
            HandshakeError: It does not serve in time.
        """
        index = self._index(node)
        self.resume(index)
        self._children[index].close()
        self._children[index] = self._spawn(index, weights)
        self._await_ready(index)

    def pause(self, node: int | str) -> None:
        """Stop a node's process where it stands (SIGSTOP); its sockets stay open.

        Raises:
            ConfigError: No such node.
        """
        self._child(node).signal(signal.SIGSTOP)
        self._stopped.add(self._index(node))

    def resume(self, node: int | str) -> None:
        """Let a paused process go on (SIGCONT).

        Raises:
            ConfigError: No such node.
        """
        index = self._index(node)
        if index in self._stopped:
            self._stopped.discard(index)
            self._children[index].signal(signal.SIGCONT)

    def limit_files(self, node: int | str, n_bytes: int) -> None:
        """Let none of a node's files (its log) grow past `n_bytes`; -1 lifts the limit.

        Raises:
            ConfigError: No such node.
        """
        self._child(node).limit_files(n_bytes)

    def _index(self, node: int | str) -> int:
        if isinstance(node, str):
            return self.cluster.index(node)
        if not 0 <= node < len(self.nodes):
            raise ConfigError(
                f"there is no node {node}; the chain has nodes 0..{len(self.nodes) - 1}"
            )
        return node

    def _child(self, node: int | str) -> Child:
        return self._children[self._index(node)]

    def close(self) -> None:
        """Close the clients, end all processes, remove the files. May be called again."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for index in tuple(self._stopped):
            self.resume(index)
        for child in self._children:
            child.end_input()  # all at once: they take a moment to end
        for child in self._children:
            child.close()
        self._stack.close()
