"""The client: hands inferences to the chain, and learns what they and the nodes measure.

    with Client(cluster) as client:
        client.connect()
        reply = client.submit(x, Plan((10, 19))).result()

Every submitted request ends in an output or in a raised error. Calls may come from any thread; one
background thread moves the frames.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import socket
import threading
import time
import uuid
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq
from numpy.typing import NDArray

from executor._hop import Hop, Parts, localise
from executor._pending import Pending, PendingTable
from executor._records import NodeStatus, Reply, RequestRecord, durations, is_down, node_index
from executor._sockets import connect_dealer
from executor.cluster import CLIENT_KEY_NAME, Cluster
from executor.errors import (
    HandshakeError,
    RequestError,
    RequestRefused,
    RequestTimeout,
    WireError,
)
from executor.plan import Plan
from executor.wire import (
    Header,
    Kind,
    array_body,
    array_of,
    check_body,
    decode_json,
    encode_json,
    pack,
    parse_header,
)

if TYPE_CHECKING:
    import torch

    from executor.profile import Profile

__all__ = ["Client", "NodeStatus", "Reply", "RequestRecord"]

_log = logging.getLogger(__name__)

_TICK_MS = 50
_HELLO_PERIOD_S = 0.25
_PROBE_TIMEOUT_S = 120.0
_PROFILE_TIMEOUT_S = 1800.0

_Json = dict[str, Any]


class Client:
    """A connection to a chain of nodes, through its first one."""

    def __init__(
        self, cluster: Cluster, *, max_in_flight: int = 32, timeout_s: float = 30.0
    ) -> None:
        """Prepare; `connect` opens the connection.

        Args:
            cluster: The chain.
            max_in_flight: Inferences that may be without an answer; one more is refused.
            timeout_s: Seconds from `submit` until an inference is given up.
        """
        if max_in_flight < 1 or not timeout_s > 0:
            raise ValueError(
                f"max_in_flight and timeout_s must be positive, got {max_in_flight}, {timeout_s}"
            )
        self.cluster = cluster
        self.max_in_flight = max_in_flight
        self.timeout_s = timeout_s
        self._uuid = uuid.uuid4().bytes
        self._lock = threading.Lock()
        self._requests = PendingTable(max_in_flight)
        self._to_send: deque[Parts] = deque()
        self._hop = Hop(self._uuid)
        self._nodes: list[_Json] = []
        self._digest = b""
        self._status: dict[int, NodeStatus] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self._wake_write: socket.socket | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """Inferences submitted and without an answer."""
        return self._requests.in_flight

    @property
    def nodes(self) -> list[_Json]:
        """Per node what it said in the handshake; empty before `connect`."""
        return [dict(node) for node in self._nodes]

    def connect(self, timeout_s: float = 10.0) -> list[_Json]:
        """Open the connection and shake hands with every node.

        Args:
            timeout_s: How long to wait for the nodes, which may still be starting.

        Returns:
            Per node what it says of itself: name, model, digest, n_units, device, meter, ...

        Raises:
            HandshakeError: A node does not answer, or runs another model or other weights.
            ConfigError: The first node's address cannot be dialled, or a key is missing.
        """
        self._open()
        nodes = self.cluster.nodes
        deadline_s = time.monotonic() + timeout_s
        pending = Pending(deadline_s)
        seq = self._requests.register(pending)
        header = Header(Kind.HELLO, client=self._uuid, seq=seq)
        # A node that is up may have neighbours that are not yet: ask until all have answered.
        while not pending.future.done() and time.monotonic() < deadline_s:
            self._post([pack(header)])
            concurrent.futures.wait([pending.future], timeout=_HELLO_PERIOD_S)
        self._requests.settle(seq)
        with self._lock:
            replies = dict(pending.replies)
        for index, node in enumerate(nodes):
            if index not in replies:
                raise HandshakeError(
                    f"node {node.name} at {node.connect_host}:{node.connect_port} did not answer "
                    f"in {timeout_s:g} s; is it running, and reachable from the node before it?"
                )
        first = replies[0]
        for index, node in enumerate(nodes):
            for key, expected in (
                ("name", node.name),
                ("model", self.cluster.model),
                ("digest", first["digest"]),
                ("n_units", first["n_units"]),
            ):
                if replies[index].get(key) != expected:
                    raise HandshakeError(
                        f"node {node.name}: expected {key} {expected!r}, got "
                        f"{replies[index].get(key)!r}"
                    )
        self._nodes = [replies[index] for index in range(len(nodes))]
        self._digest = bytes.fromhex(first["digest"])
        return self.nodes

    def submit(
        self,
        x: torch.Tensor | NDArray[np.generic],
        plan: Plan,
        scheduled_s: float | None = None,
    ) -> concurrent.futures.Future[Reply]:
        """Hand an inference to the chain.

        Args:
            x: Input, float32, on the CPU; copied, so it may be reused at once.
            plan: Where to cut. It goes with the request: later plans do not touch it.
            scheduled_s: When the request was due (`time.monotonic`), if not now.

        Returns:
            A future with the reply. It raises RequestTimeout after `timeout_s`, RequestRefused
            when a node's bound was reached, RequestError for anything else a node reports.

        Raises:
            RequestRefused: `max_in_flight` is reached; nothing was sent.
            HandshakeError: There is no connection; call `connect` first.
            ConfigError: The plan does not fit the model or the chain.
            RequestError: The input is not what the model takes.
        """
        now_s = time.monotonic()
        if not self._nodes:
            raise HandshakeError("not connected; call connect() first")
        first = self._nodes[0]
        plan.check(first["n_units"], self.cluster.n_nodes)
        tensor = not isinstance(x, np.ndarray)
        array = np.array(x if isinstance(x, np.ndarray) else x.detach().numpy(), order="C")
        if array.dtype != np.float32 or array.nbytes != first["input_bytes"]:
            raise RequestError(
                f"{self.cluster.model} takes {first['input_bytes']} bytes of float32, got "
                f"{array.nbytes} bytes of {array.dtype}"
            )
        pending = Pending(
            deadline_s=now_s + self.timeout_s,
            plan=plan,
            scheduled_s=now_s if scheduled_s is None else scheduled_s,
            submitted_s=now_s,
            tensor=tensor,
        )
        header = Header(Kind.INFER, client=self._uuid, cuts=plan.cuts, digest=self._digest)
        body = array_body(header, array)
        header.seq = self._requests.register(pending)
        self._post([pack(header), body])
        return pending.future

    def status(self) -> dict[int, NodeStatus]:
        """Every node's newest heartbeat; a node silent for more than 1 s is `down`."""
        now_s = time.monotonic()
        with self._lock:
            known = dict(self._status)
        statuses = (known.get(i, NodeStatus(node=i)) for i in range(self.cluster.n_nodes))
        return {s.node: replace(s, down=is_down(s.received_s, now_s)) for s in statuses}

    def probe(self, hop: int, payload_bytes: int, repeats: int = 3) -> list[float]:
        """Round trips of a payload over one hop, answered by a small frame.

        Args:
            hop: Index; hop h lies between the nodes h and h + 1.
            payload_bytes: Bytes sent.
            repeats: Round trips, one after the other.

        Returns:
            `repeats` round trips in seconds, measured by the node before the hop.

        Raises:
            RequestError: The node refuses the probe, or got no answer.
            RequestTimeout: No reply from that node.
        """
        request = {"hop": hop, "payload_bytes": payload_bytes, "repeats": repeats}
        reply = self._ask(Kind.PROBE, request, _PROBE_TIMEOUT_S)
        rtts_s = durations(reply, "rtts_s", repeats)
        return list(rtts_s)

    def profile_node(self, node: int, repeats: int = 10) -> tuple[float, ...]:
        """Unloaded seconds of every unit on one node, n values.

        Raises:
            RequestError: The node failed or refused; RequestTimeout if it did not answer.
        """
        reply = self._ask(Kind.PROFILE, {"node": node, "repeats": repeats}, _PROFILE_TIMEOUT_S)
        return durations(reply, "unit_s", self._nodes[node]["n_units"])

    def profile(self, repeats: int = 10) -> Profile:
        """Measure the whole chain: every node's units, every hop, every node's overhead.

        Args:
            repeats: Timed passes per unit, and round trips per probe size (at most 5).

        Raises:
            RequestError: A node failed or refused; RequestTimeout if it did not answer.
            ConfigError: A node's device class is unknown, or a hop could not be measured.
        """
        from executor._measure import measure_profile  # imports torch, which a client can spare

        return measure_profile(self, repeats)

    def close(self) -> None:
        """Close the connection; requests without an answer raise RequestError."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wake()
            thread.join()
            assert self._wake_write is not None
            self._wake_write.close()

    def _ask(self, kind: Kind, request: _Json, timeout_s: float) -> _Json:
        """Send a control request and wait for its reply."""
        if not self._nodes:
            raise HandshakeError("not connected; call connect() first")
        pending = Pending(time.monotonic() + timeout_s)
        body = encode_json(request)
        header = Header(kind, client=self._uuid, seq=self._requests.register(pending))
        header.body_bytes = len(body)
        self._post([pack(header), body])
        reply: _Json = pending.future.result()
        return reply

    def _open(self) -> None:
        """Start the background thread, once."""
        if self._closed:
            raise HandshakeError("this client is closed; make a new one")
        if self._thread is not None:
            return
        ctx: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            dealer = connect_dealer(ctx, self.cluster, self.cluster.nodes[0], CLIENT_KEY_NAME)
        except BaseException:
            ctx.term()
            raise
        wake_read, self._wake_write = socket.socketpair()
        wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(
            target=self._serve, args=(ctx, dealer, wake_read), name="splitpilot-client", daemon=True
        )
        self._thread.start()

    def _post(self, parts: Parts) -> None:
        self._to_send.append(parts)
        self._wake()

    def _wake(self) -> None:
        # A full pipe is fine: the loop is then awake already.
        with contextlib.suppress(OSError):
            if self._wake_write is not None:
                self._wake_write.send(b"\0")

    def _serve(
        self, ctx: zmq.Context[zmq.Socket[bytes]], dealer: zmq.Socket[bytes], wake: socket.socket
    ) -> None:
        """Move frames until the client is closed (background thread)."""
        poller = zmq.Poller()
        poller.register(wake, zmq.POLLIN)
        poller.register(dealer, zmq.POLLIN)
        try:
            while not self._closed:
                waiting = self._hop.outbox or self._to_send
                poller.modify(dealer, zmq.POLLIN | (zmq.POLLOUT if waiting else 0))
                poller.poll(_TICK_MS)
                with contextlib.suppress(BlockingIOError):
                    while wake.recv(4096):
                        pass
                self._receive_all(dealer)
                self._hop.tick(time.monotonic())
                _send_all(dealer, self._hop.outbox)
                _send_all(dealer, self._to_send)
                self._give_up_late()
        finally:
            dealer.close(0)
            wake.close()
            ctx.term()
            for pending in self._requests.close():
                pending.future.set_exception(RequestError("the client was closed"))

    def _receive_all(self, dealer: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            now_s = time.monotonic()
            try:
                if len(frames) not in (1, 2):
                    raise WireError(f"a message has 1 or 2 parts, got {len(frames)}")
                header = parse_header(frames[0].buffer)
                body = frames[1].buffer if len(frames) == 2 else None
                check_body(header, body)
                self._take(header, body, now_s)
            except WireError as error:
                _log.warning("bad frame from node %s: %s", self.cluster.nodes[0].name, error)

    def _take(self, header: Header, body: memoryview | None, now_s: float) -> None:
        """Take one frame from the first node."""
        if header.kind is Kind.STATUS:
            raw = decode_json(body)
            status = NodeStatus.from_json(raw, received_s=now_s, down=False)
            if not 0 <= status.node < self.cluster.n_nodes:
                raise WireError(f"status of node {status.node}, which the chain does not have")
            with self._lock:
                self._status[status.node] = status
        elif header.kind is Kind.PONG:
            self._hop.on_pong(header, now_s)
        elif header.client == self._uuid and header.kind is Kind.HELLO_REPLY:
            self._take_hello(header, decode_json(body))
        elif header.client == self._uuid:
            # One that was given up may still be answered; nobody waits for it any more.
            pending = self._requests.settle(header.seq)
            if pending is not None:
                try:
                    value = self._value(pending, header, body, now_s)
                except (RequestError, WireError) as error:
                    known = isinstance(error, RequestError)
                    pending.future.set_exception(
                        error if known else RequestError(f"bad reply: {error}")
                    )
                else:
                    pending.future.set_result(value)

    def _take_hello(self, header: Header, reply: _Json) -> None:
        pending = self._requests.get(header.seq)
        if pending is None:
            return
        with self._lock:
            pending.replies[node_index(reply, self.cluster.n_nodes)] = reply
            complete = len(pending.replies) == self.cluster.n_nodes
        if complete and self._requests.settle(header.seq) is not None:
            pending.future.set_result(None)

    def _value(
        self, pending: Pending, header: Header, body: memoryview | None, now_s: float
    ) -> Reply | _Json:
        """What a reply completes its future with; raises what it fails with."""
        if header.kind is Kind.ERROR:
            raw = decode_json(body)
            failure = RequestRefused if raw.get("code") == "refused" else RequestError
            raise failure(str(raw.get("reason")))
        if pending.plan is None:
            return decode_json(body)
        if header.kind is not Kind.RESULT or len(header.hops) != self.cluster.n_nodes - 1:
            raise WireError(f"expected a RESULT, got {header.kind.name} with cuts {header.cuts}")
        if header.digest != self._digest:
            raise WireError(f"a result of weights {header.digest.hex()}")
        localise(header, -1, self._hop.clock.offset_s, self._hop.one_way_s)
        # Copied out of ZeroMQ's memory: an output is small, and its reader may keep it for long.
        output: torch.Tensor | NDArray[np.generic] = array_of(header, body).copy()
        if pending.tensor:
            import torch

            output = torch.from_numpy(output)
        record = RequestRecord.from_header(header, pending.scheduled_s, pending.submitted_s, now_s)
        return Reply(output, record)

    def _give_up_late(self) -> None:
        for seq, pending in self._requests.late(time.monotonic()):
            silent = [self.cluster.nodes[i].name for i, s in self.status().items() if s.down]
            hint = f"; silent nodes: {', '.join(silent)}" if silent else ""
            pending.future.set_exception(
                RequestTimeout(f"request {seq}: no answer before its deadline{hint}")
            )


def _send_all(dealer: zmq.Socket[bytes], outbox: deque[Parts]) -> None:
    while outbox:
        try:
            dealer.send_multipart(outbox[0], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        outbox.popleft()
