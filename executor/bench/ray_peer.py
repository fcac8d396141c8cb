"""Ray: an actor per node, each given the future of the one before it, as Ray chains actors.

Ray hands activations of over 100 kB on through memory that the processes of a machine share, and
smaller ones over TCP. Its processes are its own: they are started by whoever asks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from executor.bench.hosts import Report, open_files, resident_mib
from executor.bench.systems import DEADLINE_S, Place, System, pump_futures

__all__ = ["SYSTEM", "missing"]

_STORE_BYTES = 2**30


def missing() -> str:
    """Why it cannot be used; empty if it can."""
    if importlib.util.find_spec("ray") is None:
        return 'not installed: pip install "splitpilot[ray]"'
    return ""


class _Stage:
    """The actor of one node."""

    def __init__(self, place: Place, index: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # arrays from Ray are not writable; no stage writes to them
        self._place = replace(place, index=index)

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the stage."""
        y: NDArray[np.float32] = self._place.run(torch.from_numpy(x)).numpy()
        return y

    def report(self) -> Report:
        """What a node has to say of itself; its stages' seconds start anew."""
        taken_s = list(self._place.chain.taken_s)
        self._place.chain.taken_s.clear()
        return Report(taken_s, resident_mib(), open_files())


class _ActorNode:
    """An actor, asked as the process of a node is."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._answer: Any = None

    def ask(self, what: str) -> None:
        self._answer = self.actor.report.remote()

    def answer(self, timeout_s: float = DEADLINE_S) -> Any:
        import ray

        return ray.get(self._answer, timeout=timeout_s)


class _Link:
    def __init__(self, place: Place) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        ray.init(
            num_cpus=place.n_nodes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_STORE_BYTES,
        )
        stage, shared = ray.remote(num_cpus=1)(_Stage), ray.put(place)
        self.nodes = [_ActorNode(stage.remote(shared, k)) for k in range(place.n_nodes)]
        for node in self.nodes:
            node.ask("drain")
            node.answer()

    def _submit(self, x: torch.Tensor) -> Any:
        y: Any = x.numpy()
        for node in self.nodes:
            y = node.actor.infer.remote(y)
        return y

    def call(self, x: torch.Tensor) -> torch.Tensor:
        import ray

        return _tensor(ray.get(self._submit(x), timeout=DEADLINE_S))

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        return pump_futures(lambda x: self._submit(x).future(), xs, in_flight)

    def close(self) -> None:
        import ray

        ray.shutdown()


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


SYSTEM = System(
    "ray",
    None,
    _Link,
    unshaped="its objects go through shared memory, not over the relay",
)
