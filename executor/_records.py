"""What the client hands out: a reply, what it measured, and the nodes' latest status."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from executor._bulletin import GROWING
from executor.errors import ConfigError, RequestError, WireError
from executor.profile import Conversion
from executor.wire import Header

if TYPE_CHECKING:
    import torch

__all__ = [
    "NodeStatus",
    "Reply",
    "RequestRecord",
    "conversions",
    "durations",
    "hello_problem",
    "node_index",
    "place_of",
    "transfer_problem",
]


@dataclass(frozen=True)
class RequestRecord:
    """What one finished request measured; all times in the client's clock (`time.monotonic`).

    Attributes:
        request_id: The client's sequence number.
        plan: The cuts that were executed.
        scheduled_s: When the request was due; latency counts from here.
        submitted_s: When it was handed to the client.
        completed_s: When its output was there.
        stage_s: Per node, wall seconds of its compute; 0 where it ran nothing.
        work_s: Per node, unloaded seconds of that compute.
        queue_s: Per node, seconds from arrival to compute.
        hop_s: Per hop, seconds from hand-over to whole receipt, waiting included; 0 if not crossed.
        transmit_s: Per hop, seconds the hop served this frame: neither the wait behind earlier
            frames nor propagation.
        tries: How often it was sent; more than 1 where a node or hop failed it.
    """

    request_id: int
    plan: tuple[int, ...]
    scheduled_s: float
    submitted_s: float
    completed_s: float
    stage_s: tuple[float, ...]
    work_s: tuple[float, ...]
    queue_s: tuple[float, ...]
    hop_s: tuple[float, ...]
    transmit_s: tuple[float, ...]
    tries: int = 1

    @property
    def latency_s(self) -> float:
        """Seconds from the scheduled arrival to the output."""
        return self.completed_s - self.scheduled_s

    @classmethod
    def from_header(
        cls,
        header: Header,
        scheduled_s: float,
        submitted_s: float,
        completed_s: float,
        tries: int = 1,
    ) -> RequestRecord:
        """Read the record off a RESULT whose stamps are in the client's clock."""
        ran = header.stages
        return cls(
            request_id=header.seq,
            plan=header.cuts,
            scheduled_s=scheduled_s,
            submitted_s=submitted_s,
            completed_s=completed_s,
            stage_s=tuple(max(0.0, s.end_s - s.start_s) for s in ran),
            work_s=tuple(s.work_s for s in ran),
            queue_s=tuple(max(0.0, s.start_s - s.arrive_s) if s.start_s else 0.0 for s in ran),
            hop_s=tuple(max(0.0, h.received_s - h.sent_s) for h in header.hops),
            transmit_s=tuple(max(0.0, h.received_s - h.free_s) for h in header.hops),
            tries=tries,
        )


@dataclass(frozen=True)
class Reply:
    """An inference's output and its record.

    Attributes:
        output: The model's output, a torch tensor if the input was one, else a numpy array.
        record: What the request measured.
    """

    output: torch.Tensor | NDArray[np.generic]
    record: RequestRecord


@dataclass(frozen=True)
class NodeStatus:
    """A node's newest heartbeat.

    Attributes:
        node: Index in the chain.
        received_s: When it came, client's clock; -inf if none ever did.
        down: Whether it cannot be used: silent for 0.7 s, out of reach, or another process whose
            handshake has not been checked or does not fit.
        load: Share of its compute that others use, 0..1.
        backlog_s: Unloaded seconds of work queued, with what remains of the current stage.
        queue_len: Jobs queued.
        hop_backlog_bytes: Bytes handed to the hop after this node, not yet acknowledged.
        hop_bytes_per_s: Bandwidth of that hop, from production frames and probes; None if unknown.
        hop_rtt_s: Least recent round trip of a small frame on it; None if unknown.
        hop_age_s: Age of `hop_bytes_per_s`; None if unknown.
        hop_up: Whether it is connected to the node after it, and hears it; None if unknown, and on
            the last.
        direct_up: The same of its direct link; None without one, too.
        stalled_s: For how long that hop has moved nothing while something waits on it.
        boot: Names the node's process; another one after a restart.
        refused: Requests refused over a bound, so far.
        bad_frames: Frames that could not be accepted, so far.
        unauthenticated: Connections that were not admitted, so far.
        duplicates: Requests that came again while they were under way, so far.
        every_s: How often it says that its STATUS comes; less often where many listen.
        overruns: Paced stages that missed their deadline, so far.
        stages: Stages run, so far.
        meter: Name of the energy meter.
        energy_j: Its reading, joules since the node started; None if it has none.
    """

    node: int
    received_s: float = float("-inf")
    down: bool = True
    load: float = 0.0
    backlog_s: float = 0.0
    queue_len: int = 0
    hop_backlog_bytes: int = 0
    hop_bytes_per_s: float | None = None
    hop_rtt_s: float | None = None
    hop_age_s: float | None = None
    hop_up: bool | None = None
    direct_up: bool | None = None
    stalled_s: float = 0.0
    boot: str = ""
    refused: int = 0
    bad_frames: int = 0
    unauthenticated: int = 0
    duplicates: int = 0
    every_s: float = 0.1
    overruns: int = 0
    stages: int = 0
    meter: str = ""
    energy_j: float | None = None

    @classmethod
    def from_json(cls, raw: dict[str, Any], received_s: float, down: bool) -> NodeStatus:
        """Read a STATUS body.

        Raises:
            WireError: A field is missing or has the wrong type.
        """
        values: dict[str, Any] = {"received_s": received_s, "down": down}
        for field in fields(cls):
            if field.name in values:
                continue
            value = raw.get(field.name)
            wanted = _TYPES[str(field.type)]
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise WireError(f"status: {field.name} must be {field.type}, got {value!r}")
            values[field.name] = value
        return cls(**values)

    def at(self, now_s: float) -> NodeStatus:
        """What it is now that a BEAT said that it still holds: what grows with time has grown."""
        elapsed_s = now_s - self.received_s
        grown = {name: getattr(self, name) for name in GROWING}
        grown = {name: value + elapsed_s for name, value in grown.items() if value}
        return replace(self, received_s=now_s, **grown)


_HELLO_TYPES: dict[str, type] = {
    "node": int,
    "name": str,
    "model": str,
    "digest": str,
    "n_units": int,
    "input_bytes": int,
    "device": str,
    "meter": str,
    "boot": str,
}

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "bool | None": (bool, type(None)),
}


def node_index(reply: dict[str, Any], n_nodes: int) -> int:
    """Check what a node says of itself in a handshake; returns its place in the chain.

    Raises:
        WireError: A field is missing or has a bad value.
    """
    for key, kind in _HELLO_TYPES.items():
        if not isinstance(reply.get(key), kind):
            raise WireError(f"handshake: {key} must be {kind.__name__}, got {reply.get(key)!r}")
    index = reply["node"]
    if not 0 <= index < n_nodes or not re.fullmatch("[0-9a-f]{16}", reply["digest"]):
        raise WireError(f"handshake of node {index} with digest {reply['digest']!r}")
    return int(index)


def place_of(value: Any, n_nodes: int) -> int:
    """A node's index from an error's body.

    Raises:
        WireError: It is none.
    """
    if not isinstance(value, int) or not 0 <= value < n_nodes:
        raise WireError(f"an error of node {value!r}")
    return value


def hello_problem(reply: dict[str, Any], expected: dict[str, Any]) -> str:
    """What of a handshake is not as expected, "" if nothing is.

    Args:
        reply: What the node says.
        expected: What must be the same: its name, the model, the weights' digest, ...
    """
    for key, value in expected.items():
        if reply.get(key) != value:
            return f"expected {key} {value!r}, got {reply.get(key)!r}"
    return ""


def transfer_problem(reply: dict[str, Any], own: str, before: Iterable[str]) -> str:
    """What of a handshake keeps the configured transfers from being used, "" if nothing does.

    Args:
        reply: What the node says. One that says nothing of transfers knows float32 only.
        own: How activations are to leave it, one of `executor.codec.TRANSFERS`.
        before: How they leave the nodes before it.
    """
    sends, reads = reply.get("transfer", "float32"), reply.get("reads", ["float32"])
    if sends != own:
        return f"expected transfer {own!r}, got {sends!r}; give every machine the same file"
    unread = [t for t in before if not isinstance(reads, list) or t not in reads]
    if unread:
        return f"it cannot read {unread[0]} activations, which come from a node before; update it"
    return ""


def durations(reply: dict[str, Any], key: str, count: int) -> tuple[float, ...]:
    """A list of `count` durations from a reply.

    Raises:
        RequestError: There is no such list.
    """
    values = reply.get(key)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values)
    ):
        raise RequestError(f"expected {count} durations in {key}, got {values!r}")
    return tuple(map(float, values))


def conversions(reply: dict[str, Any], n_units: int) -> tuple[Conversion, ...]:
    """What a node says that forms of transfer take on it; none where it says nothing.

    Raises:
        RequestError: It is not what it should be.
    """
    found = []
    try:
        for raw in reply.get("conversions", []):
            sizes = raw["cut_bytes"]
            if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
                raise RequestError(f"expected whole numbers in cut_bytes, got {sizes!r}")
            times = (durations(raw, key, n_units) for key in ("encode_s", "decode_s"))
            found.append(Conversion(str(raw["form"]), tuple(sizes), *times))
            found[-1].check(n_units)
    except (TypeError, KeyError, AttributeError, ConfigError) as error:
        raise RequestError(f"not what conversions take: {error!r}") from error
    return tuple(found)
