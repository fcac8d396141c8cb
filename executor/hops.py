"""The hops of a testbed, from the side of the process that starts it: a relay on loopback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from executor.child import Child
from executor.errors import ConfigError, HandshakeError
from executor.ports import HOST, reserve_port
from executor.shaping import DelayTrace, RateTrace, check_delay

__all__ = ["Relay", "TestbedHop"]

START_TIMEOUT_S = 120.0


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


class Relay:
    """The relay process (`executor.relay`) from its parent's side. A context manager.

    Settings are checked here, so a bad one raises before it is sent. A change is felt within
    milliseconds of the call.

    Attributes:
        bind_host: Address that nodes are to listen on.
        client_host: Address at which a client finds the first node.
    """

    bind_host: str = HOST
    client_host: str = HOST

    def __init__(self) -> None:
        self._child = Child("relay", "executor.relay")
        self._hops = 0

    def node_port(self, reserved: ExitStack) -> int:
        """A port for one node to listen on, free as long as `reserved` is open."""
        return reserve_port(reserved)

    def node_host(self, node: int) -> str:
        """Address at which the links' side finds a node, past every hop."""
        return HOST

    def dial_host(self, hop: int) -> str:
        """Address at which the node before a hop finds the relay."""
        return HOST

    def target_host(self, hop: int) -> str:
        """Address at which the relay finds the node behind a hop."""
        return HOST

    def inside(self, node: int | None = None) -> AbstractContextManager[None]:
        """Where processes and sockets of a node belong, or of a client (None)."""
        return nullcontext()

    def admit(self, node: int, pid: int) -> None:
        """A node's process has started up: from now on it gets the node's share of the CPU."""

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the relay."""
        return self._child.pid

    def add_hop(self, target_port: int, hop: TestbedHop) -> int:
        """Relay the next hop (0, 1, ...) to its target's port; returns the port to dial.

        Raises:
            ConfigError: The relay refuses; carries its words.
            HandshakeError: The relay has ended or does not answer.
        """
        index = self._hops
        command = {
            "hop": index,
            "host": self.dial_host(index),
            "listen": 0,
            "target": f"{self.target_host(index)}:{target_port}",
        }
        self._child.send({**command, "mbps": hop.mbps, "delay_s": hop.delay_s})
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
