"""gRPC with raw bytes: unary calls without a message class, each node calling the next.

The generic handlers and the synchronous server of gRPC's own examples; the body is the tensor's
bytes, and every process knows the shapes. A lock keeps it to one stage at a time.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import torch

from executor.bench.systems import DEADLINE_S, Place, System, pump_futures
from executor.ports import HOST

__all__ = ["SYSTEM", "missing"]

_METHOD = "/bench/Infer"
_N_WORKERS = 16
# Its bound of 4 MiB on a message is the one default that has to be changed.
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def missing() -> str:
    """Why it cannot be used; empty if it can."""
    if importlib.util.find_spec("grpc") is None:
        return 'not installed: pip install "splitpilot[bench]"'
    return ""


def _tensor(data: bytes, place: Place, cut: int) -> torch.Tensor:
    shape = place.shapes[cut]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes are not writable; no stage writes to its input
        return torch.frombuffer(data, dtype=torch.float32).reshape(shape)


def _dial(place: Place, index: int) -> tuple[Any, Any]:
    import grpc

    channel = grpc.insecure_channel(f"{HOST}:{place.dials[index]}", options=_OPTIONS)
    grpc.channel_ready_future(channel).result(DEADLINE_S)
    return channel, channel.unary_unary(_METHOD)


class _Serving:
    def __init__(self, place: Place) -> None:
        import grpc

        lock = threading.Lock()
        self._channel: Any = None
        following: Any = None
        if not place.last:
            self._channel, following = _dial(place, place.index + 1)
        cut = place.stage[0]

        def infer(request: bytes, context: object) -> bytes:
            with lock:
                y = place.run(_tensor(request, place, cut))
            body = y.numpy().tobytes()
            answer: bytes = following(body, timeout=DEADLINE_S) if following else body
            return answer

        self._server = grpc.server(futures.ThreadPoolExecutor(_N_WORKERS), options=_OPTIONS)
        handler = grpc.unary_unary_rpc_method_handler(infer)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bench", {"Infer": handler}),)
        )
        self._server.add_insecure_port(f"{HOST}:{place.listens[place.index]}")
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        if self._channel is not None:
            self._channel.close()


class _Link:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._channel, self._first = _dial(place, 0)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        data = self._first(x.numpy().tobytes(), timeout=DEADLINE_S)
        return _tensor(data, self._place, -1)

    def pump(self, xs: Sequence[torch.Tensor], in_flight: int) -> list[float]:
        def submit(x: torch.Tensor) -> Any:
            return self._first.future(x.numpy().tobytes(), timeout=DEADLINE_S)

        return pump_futures(submit, xs, in_flight)

    def close(self) -> None:
        self._channel.close()


SYSTEM = System("grpc", _Serving, _Link)
