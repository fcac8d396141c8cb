"""A whole chain on one machine: nodes as paced processes, hops as shaped links, traces played.

    with Testbed("mobilenet_v2") as testbed:
        client = testbed.client()
        testbed.set_rate(0, 5.0)
        reply = client.submit(sample_input(0), Plan((0, 21))).result()

Times of traces are `time.monotonic()` seconds, which all processes of a Linux machine share.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from executor.child import Child
from executor.cluster import Cluster, DirectLink, NodeConfig
from executor.codec import check_transfer
from executor.errors import ConfigError, HandshakeError
from executor.modelref import absolute_model
from executor.pacing import LoadTrace, Pacer
from executor.ports import HOST, reserve_port
from executor.shaping import DelayTrace, RateTrace, check_delay

if TYPE_CHECKING:
    from executor.client import Client

__all__ = ["DEFAULT_HOPS", "DEFAULT_NODES", "Relay", "Testbed", "TestbedHop", "TestbedNode"]

START_TIMEOUT_S = 120.0
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


@dataclass(frozen=True)
class TestbedHop:
    """An emulated hop, the same in both directions.

    Attributes:
        mbps: Bandwidth in Mbit/s, positive.
        delay_s: One-way propagation delay in seconds.
    """

    __test__: ClassVar[bool] = False

    mbps: float
    delay_s: float

    def __post_init__(self) -> None:
        RateTrace.constant(self.mbps)
        check_delay(self.delay_s)


DEFAULT_NODES = (
    TestbedNode("edge", 12.0, "pi4"),
    TestbedNode("fog", 3.0, "laptop"),
    TestbedNode("cloud", 1.0, "server"),
)
DEFAULT_HOPS = (TestbedHop(40.0, 0.005), TestbedHop(60.0, 0.010))


class Relay:
    """The relay process (`executor.relay`) from its parent's side. A context manager.

    Settings are checked here, so a bad one raises before it is sent. A change is felt within
    milliseconds of the call.
    """

    def __init__(self) -> None:
        self._child = Child("relay", "executor.relay")
        self._hops = 0

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the relay."""
        return self._child.pid

    def add_hop(self, target_port: int, hop: TestbedHop) -> int:
        """Relay the next hop (0, 1, ...) to a port of this machine; returns the port to dial.

        Raises:
            ConfigError: The relay refuses; carries its words.
            HandshakeError: The relay has ended or does not answer.
        """
        index = self._hops
        target = f"{HOST}:{target_port}"
        self._child.send(
            {"hop": index, "listen": 0, "target": target, "mbps": hop.mbps, "delay_s": hop.delay_s}
        )
        line = self._child.read_line(START_TIMEOUT_S)
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise ConfigError(f"relay: {answer['error']}")
            port = int(answer["port"])
        except (ValueError, TypeError, KeyError) as error:
            raise HandshakeError(f"the relay should name a port, got {line!r}") from error
        self._hops += 1
        return port

    def set_rate(self, hop: int, mbps: float) -> None:
        """Change a hop's bandwidth now, for bytes not yet sent.

        Raises:
            ConfigError: No such hop, or the bandwidth is not positive.
            HandshakeError: The relay has ended.
        """
        RateTrace.constant(mbps)
        self._send(hop, mbps=mbps)

    def play_rate(self, hop: int, t0_s: float, dt_s: float, mbps: Sequence[float]) -> None:
        """Let a hop's bandwidth follow a trace; 0 is an outage, and the last value stays.

        Args:
            hop: Index of the hop.
            t0_s: Monotonic time at which the trace starts (its first value holds before).
            dt_s: Seconds per sample.
            mbps: Bandwidths in Mbit/s, finite and >= 0.

        Raises:
            ConfigError: No such hop, or the trace is not as said above.
            HandshakeError: The relay has ended.
        """
        rates = [float(rate) for rate in mbps]
        RateTrace.from_samples(t0_s, dt_s, rates)
        self._send(hop, trace={"t0": float(t0_s), "dt_s": float(dt_s), "mbps": rates})

    def set_delay(self, hop: int, delay_s: float) -> None:
        """Change a hop's one-way delay, for bytes that leave from now on; order is kept.

        Raises:
            ConfigError: No such hop, or the delay is negative or not finite.
            HandshakeError: The relay has ended.
        """
        self._send(hop, delay_s=check_delay(delay_s))

    def play_delay(self, hop: int, t0_s: float, dt_s: float, delay_s: Sequence[float]) -> None:
        """Let a hop's one-way delay follow a trace, in seconds; else as `play_rate`.

        Raises:
            ConfigError: No such hop, or a delay is negative or not finite.
            HandshakeError: The relay has ended.
        """
        delays = [float(value) for value in delay_s]
        DelayTrace.from_samples(t0_s, dt_s, delays)
        self._send(hop, delay_trace={"t0": float(t0_s), "dt_s": float(dt_s), "delay_s": delays})

    def set_cut(self, hop: int, cut: bool) -> None:
        """Drop a hop's connections and all new ones (true), or let them in again (false).

        Raises:
            ConfigError: No such hop.
            HandshakeError: The relay has ended.
        """
        self._send(hop, cut=bool(cut))

    def set_flips(self, hop: int, flip_bytes: float) -> None:
        """Flip one random bit per so many bytes on average, both ways; 0 flips none.

        Raises:
            ConfigError: No such hop, or the number is negative.
            HandshakeError: The relay has ended.
        """
        if not flip_bytes >= 0:
            raise ConfigError(f"flip_bytes must be >= 0, got {flip_bytes}")
        self._send(hop, flip_bytes=float(flip_bytes))

    def _send(self, hop: int, **settings: Any) -> None:
        if not 0 <= hop < self._hops:
            raise ConfigError(f"there is no hop {hop}; the chain has hops 0..{self._hops - 1}")
        self._child.send({"hop": hop, **settings})

    def close(self) -> None:
        """End the process. May be called again."""
        self._child.close()


class Testbed:
    """Node processes chained over relayed loopback hops. A context manager.

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
        self._stopped: set[int] = set()
        self._clients: list[Client] = []
        try:
            self._start(model, weights, max_queue, direct)
        except BaseException:
            for child in self._children:
                child.kill()  # still importing or loading weights, they would not notice a request
            self.close()
            raise

    def _start(self, model: str, weights: str, max_queue: int, direct: TestbedHop | None) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="splitpilot-"))
        self._relay = self._stack.enter_context(Relay())
        with ExitStack() as reserved:
            ports = [reserve_port(reserved) for _ in self.nodes]
            dials = [ports[0]]
            for port, hop in zip(ports[1:], self.hops, strict=True):
                dials.append(self._relay.add_hop(port, hop))
            links: tuple[DirectLink, ...] = ()
            if direct is not None:
                dial = self._relay.add_hop(ports[-1], direct)
                links = (DirectLink(self.nodes[0].name, self.nodes[-1].name, HOST, dial),)
            self.cluster = Cluster(
                model=model,
                weights=weights,
                nodes=tuple(
                    NodeConfig(
                        name=node.name,
                        host=HOST,
                        port=port,
                        connect_host=HOST,
                        connect_port=dial,
                        device=node.device,
                        transfer=node.transfer,
                    )
                    for node, port, dial in zip(self.nodes, ports, dials, strict=True)
                ),
                max_queue=max_queue,
                threads=1,
                direct=links,
            )
            self._file = Path(folder) / "cluster.toml"
            self._file.write_text(self.cluster.to_toml(), encoding="utf-8")
            self._children += [self._spawn(node) for node in self.nodes]
            for index in range(len(self.nodes)):
                self._await_ready(index)

    def _spawn(self, node: TestbedNode, weights: str | None = None) -> Child:
        file = self._file
        if weights is not None:
            file = self._file.with_name(f"{node.name}-other-weights.toml")
            file.write_text(replace(self.cluster, weights=weights).to_toml(), encoding="utf-8")
        args = ["--role", node.name, "--cluster", str(file), "--threads", "1"]
        args += ["--ratio", repr(float(node.ratio)), "--control-stdin"]
        return Child(f"node {node.name}", "executor.node", args)

    def _await_ready(self, index: int) -> None:
        child, node = self._children[index], self.nodes[index]
        line = child.read_line(START_TIMEOUT_S)
        if not line.startswith("READY"):
            raise HandshakeError(f'{child.name} should print "READY port", got {line!r}')
        if node.load:
            self.set_load(index, node.load)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by node name, and the relay's under "relay"."""
        pids = {node.name: c.pid for node, c in zip(self.nodes, self._children, strict=True)}
        return {**pids, "relay": self._relay.pid}

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
        self._children[index] = self._spawn(self.nodes[index], weights)
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
