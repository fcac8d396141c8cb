"""This executor, as it ships: `executor.node.Node` in each process, and `executor.client`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from executor.bench.cases import NODE_NAMES
from executor.bench.systems import DEADLINE_S, Place, System, pump_futures
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.node import Node
from executor.ports import HOST

__all__ = ["SYSTEM", "Link", "missing"]


def missing() -> str:
    """It is always there."""
    return ""


def _cluster(place: Place) -> Cluster:
    nodes = tuple(
        NodeConfig(name=name, host=HOST, port=port, connect_host=HOST, connect_port=dial)
        for name, port, dial in zip(NODE_NAMES, place.listens, place.dials, strict=False)
    )
    return Cluster(place.chain.spec.name, "none", nodes, threads=1)


class _Serving:
    def __init__(self, place: Place) -> None:
        self._node = Node(_cluster(place), NODE_NAMES[place.index], chain=place.chain)
        self._thread = threading.Thread(target=self._node.serve)
        self._thread.start()

    def close(self) -> None:
        self._node.stop()
        self._thread.join()
        self._node.close()


class Link:
    """A client of this executor.

    Attributes:
        plan: Where the next requests are cut.
    """

    def __init__(self, place: Place) -> None:
        self.plan = place.plan
        self._client = Client(_cluster(place), timeout_s=DEADLINE_S)
        self._client.connect(DEADLINE_S)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Run one inference and wait for its output."""
        output = self._client.infer(x, self.plan).output
        assert isinstance(output, torch.Tensor)
        return output

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        """Run all of them, so many at a time."""

        def submit(x: torch.Tensor) -> Any:
            return self._client.submit(x, self.plan)

        return pump_futures(submit, xs, in_flight)

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


SYSTEM = System("executor", _Serving, Link)
