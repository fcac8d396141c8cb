"""torch.distributed.rpc: TensorPipe over TCP.

Each node answers with the future of the next node's answer (`functions.async_execution`), the
documented way not to hold a worker thread meanwhile. A lock keeps it to one stage at a time, as in
PyTorch's tutorial on pipelines over RPC.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.rpc.functions import async_execution

from executor.bench.cases import NODE_NAMES
from executor.bench.systems import DEADLINE_S, Place, System, pump_futures
from executor.ports import HOST

__all__ = ["SYSTEM", "infer", "missing"]

# A process is one node, and RPC calls module-level functions: this is where they find the stage.
_place: Place
_lock = threading.Lock()


def missing() -> str:
    """Why it cannot be used; empty if it can."""
    if not torch.distributed.is_available() or not _rpc().is_available():
        return "this build of torch has no torch.distributed.rpc"
    return ""


def _rpc() -> Any:
    from torch.distributed import rpc

    return rpc


def _join(place: Place) -> None:
    global _place
    _place = place
    rpc = _rpc()
    rank = place.index + 1  # the client is rank 0
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://{HOST}:{place.store}",
        rpc_timeout=DEADLINE_S,
        # Left alone it would take shared memory between processes of one machine.
        _transports=["uv"],
        _channels=["mpt_uv", "basic"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated torch functions that it uses itself
        rpc.init_rpc(
            "client" if rank == 0 else NODE_NAMES[place.index],
            rank=rank,
            world_size=place.n_nodes + 1,
            rpc_backend_options=options,
        )


@async_execution  # type: ignore[untyped-decorator]  # torch leaves it untyped
def infer(x: torch.Tensor) -> Any:
    """One node's part (runs on the node): a future of the chain's output."""
    with _lock:
        y = _place.run(x)
    if not _place.last:
        return _rpc().rpc_async(NODE_NAMES[_place.index + 1], infer, args=(y,))
    done: Any = torch.futures.Future()
    done.set_result(y)
    return done


class _Serving:
    def __init__(self, place: Place) -> None:
        _join(place)

    def close(self) -> None:
        _rpc().shutdown(graceful=False)


class _Link:
    def __init__(self, place: Place) -> None:
        _join(place)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _rpc().rpc_sync(NODE_NAMES[0], infer, args=(x,))
        return output

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        def submit(x: torch.Tensor) -> Any:
            return _Waited(_rpc().rpc_async(NODE_NAMES[0], infer, args=(x,)))

        return pump_futures(submit, xs, in_flight)

    def close(self) -> None:
        _rpc().shutdown(graceful=False)


class _Waited:
    """A torch future with `concurrent.futures`' name for waiting."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        return self._future.wait()  # RPC has its own timeout


SYSTEM = System(
    "torch rpc",
    _Serving,
    _Link,
    together=True,
    unshaped="its workers find each other by themselves, past the relay",
)
