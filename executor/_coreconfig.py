"""What a node's core must know of the node it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from executor.plan import ModelSpec

__all__ = ["CoreConfig"]


@dataclass(frozen=True)
class CoreConfig:
    """What a node's core must know.

    Attributes:
        index: The node's place in the chain.
        n_nodes: Nodes in the chain.
        spec: The model.
        digest: First 8 bytes of the weights' digest.
        max_queue: Requests that may queue for compute, and that may wait on the hop.
        hello: What the node says of itself in a handshake; `boot` names its process.
        direct: The node it has a direct link to, if any.
        peer_rate_rps: Messages a second taken from one connection in the long run.
        transfer: The form (`executor.codec`) that activations leave this node in, down the chain;
            those that came in another one than float32 are passed on as they came.
    """

    index: int
    n_nodes: int
    spec: ModelSpec
    digest: bytes
    max_queue: int
    hello: Mapping[str, Any]
    direct: int | None = None
    peer_rate_rps: float = 2000.0
    transfer: str = "float32"
