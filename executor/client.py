"""The client: hands inferences to the chain, and learns what they and the nodes measure.

    with Client(cluster) as client:
        client.connect()
        reply = client.submit(x, Plan((10, 19))).result()

Every submitted request ends in an output or in a raised error. Calls may come from any thread; one
background thread moves the frames.
"""

from __future__ import annotations

import concurrent.futures
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from executor._json import encode_json
from executor._pending import Pending, PendingTable
from executor._records import (
    NodeStatus,
    Reply,
    RequestRecord,
    conversions,
    durations,
    hello_problem,
    transfer_problem,
)
from executor._session import Session
from executor.cluster import Cluster
from executor.errors import ConfigError, HandshakeError, RequestError
from executor.late import CutTable, check_tables
from executor.plan import Plan
from executor.recovery import MOST_PATIENCE_S, SILENT_AFTER_S, Counts, Recovery
from executor.wire import Header, Kind, array_body, attach, pack

if TYPE_CHECKING:
    import torch

    from executor.profile import Conversion, Profile

__all__ = ["Client", "Counts", "NodeStatus", "Reply", "RequestRecord"]

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
        self._requests = PendingTable(max_in_flight)
        self._session: Session | None = None
        self._digest = b""
        self._closed = False

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
        return [dict(node) for node in self._session.nodes] if self._session else []

    @property
    def counts(self) -> Counts:
        """What became of the inferences so far: completed, retried, failed, ..."""
        return self._session.counts() if self._session else Counts()

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
        session = self._open()
        nodes = self.cluster.nodes
        deadline_s = time.monotonic() + timeout_s
        pending = Pending(deadline_s)
        seq = self._requests.register(pending)
        header = Header(Kind.HELLO, client=self._uuid, seq=seq)
        # A node that is up may have neighbours that are not yet: ask until all have answered.
        while not pending.future.done() and time.monotonic() < deadline_s:
            session.post([pack(header)])
            concurrent.futures.wait([pending.future], timeout=_HELLO_PERIOD_S)
        self._requests.settle(seq)
        replies = dict(pending.replies)
        for index, node in enumerate(nodes):
            if index not in replies:
                raise HandshakeError(
                    f"node {node.name} at {node.connect_host}:{node.connect_port} did not answer "
                    f"in {timeout_s:g} s; is it running, and reachable from the node before it?"
                )
        expected = {"model": self.cluster.model_name}
        expected |= {key: replies[0][key] for key in ("digest", "n_units")}
        for index, node in enumerate(nodes):
            problem = hello_problem(replies[index], {"name": node.name, **expected})
            before = self.cluster.transfers[:index]
            problem = problem or transfer_problem(replies[index], node.transfer, before)
            if problem:
                raise HandshakeError(f"node {node.name}: {problem}")
        session.accept([replies[index] for index in range(len(nodes))], expected)
        self._digest = bytes.fromhex(expected["digest"])
        return self.nodes

    def submit(
        self,
        x: torch.Tensor | NDArray[np.generic],
        plan: Plan,
        scheduled_s: float | None = None,
        *,
        timeout_s: float | None = None,
        late: Sequence[CutTable] = (),
    ) -> concurrent.futures.Future[Reply]:
        """Hand an inference to the chain.

        A request whose plan cannot be served, now or any more, is sent under another one that can
        (see `executor.recovery`); the record tells the plan that was executed, and the tries. If
        the first node is away, the request waits for it.

        Args:
            x: Input, float32, on the CPU; copied, so it may be reused at once.
            plan: Where to cut. It goes with the request: later plans do not touch it.
            scheduled_s: When the request was due (`time.monotonic`), if not now.
            timeout_s: Seconds until it is given up; the client's unless given.
            late: From what middle nodes may pick another cut than the plan's, by the backlog of
                their hop when the request's turn comes (`executor.late`). A request that has to be
                sent again goes without.

        Returns:
            A future with the reply. It raises RequestTimeout after the timeout, RequestRefused
            when a node's bound was reached, RequestError for anything else a node reports.

        Raises:
            RequestRefused: `max_in_flight` is reached; nothing was sent.
            HandshakeError: There is no connection; call `connect` first.
            ConfigError: The plan or a cut table does not fit the model or the chain.
            RequestError: The input is not what the model takes.
        """
        return self._submit(x, plan, scheduled_s, timeout_s, late, attend=False)

    def infer(
        self,
        x: torch.Tensor | NDArray[np.generic],
        plan: Plan,
        scheduled_s: float | None = None,
        *,
        timeout_s: float | None = None,
        late: Sequence[CutTable] = (),
    ) -> Reply:
        """`submit`, and wait for the reply.

        While it waits, the calling thread does what else the client's own thread would have to be
        woken for; the input is not copied. Raises what `submit` and its future raise.
        """
        return self._submit(x, plan, scheduled_s, timeout_s, late, attend=True).result()

    def _submit(
        self,
        x: torch.Tensor | NDArray[np.generic],
        plan: Plan,
        scheduled_s: float | None,
        timeout_s: float | None,
        late: Sequence[CutTable],
        attend: bool,
    ) -> concurrent.futures.Future[Reply]:
        now_s = time.monotonic()
        session = self._connected()
        first = session.nodes[0]
        plan.check(first["n_units"], self.cluster.n_nodes)
        check_tables(late, first["n_units"], self.cluster.n_nodes)
        tensor = not isinstance(x, np.ndarray)
        array = x if isinstance(x, np.ndarray) else x.detach().numpy()
        # Whoever waits for the reply does not write to it. (Where the wait ends early and the input
        # is still on its way, its checksum keeps it from being served half changed.)
        array = np.ascontiguousarray(array) if attend else np.array(array, order="C")
        if array.dtype != np.float32 or array.nbytes != first["input_bytes"]:
            raise RequestError(
                f"{self.cluster.model_name} takes {first['input_bytes']} bytes of float32, got "
                f"{array.nbytes} bytes of {array.dtype}"
            )
        if timeout_s is not None and not timeout_s > 0:
            raise RequestError(f"timeout_s must be positive, got {timeout_s}")
        deadline_s = now_s + (self.timeout_s if timeout_s is None else timeout_s)
        header = Header(Kind.INFER, client=self._uuid, digest=self._digest, late=tuple(late))
        pending = Pending(
            deadline_s=deadline_s,
            plan=plan,
            scheduled_s=now_s if scheduled_s is None else scheduled_s,
            submitted_s=now_s,
            header=header,
            body=array_body(header, array),
            tensor=tensor,
        )
        attended = pending.future if attend else None
        session.submit(self._requests.register(pending), plan, deadline_s, bool(late), attended)
        return pending.future

    def prefer(self, plans: Sequence[Plan]) -> None:
        """Plans to fall back on, best first, for requests whose own plan cannot be served.

        Raises:
            HandshakeError: There is no connection; call `connect` first.
            ConfigError: A plan does not fit the model or the chain.
        """
        session = self._connected()
        for plan in plans:
            plan.check(session.nodes[0]["n_units"], self.cluster.n_nodes)

        def change(recovery: Recovery) -> None:
            recovery.preferred = tuple(plans)

        session.with_recovery(change)

    def be_patient(self, patience_s: Sequence[float]) -> None:
        """For how long each hop may be silent before requests go around it (0.7 s unless told).

        Of use where the way around costs much, and silences are short. A hop whose connection
        breaks is gone around at once all the same.

        Args:
            patience_s: Per hop, `SILENT_AFTER_S` to `MOST_PATIENCE_S` of `executor.recovery`.

        Raises:
            HandshakeError: There is no connection; call `connect` first.
            ConfigError: Another number of hops, or a number out of range.
        """
        session, n_hops = self._connected(), self.cluster.n_nodes - 1
        right = all(SILENT_AFTER_S <= s <= MOST_PATIENCE_S for s in patience_s)
        if len(patience_s) != n_hops or not right:
            raise ConfigError(
                f"patience_s takes {n_hops} numbers from {SILENT_AFTER_S} to {MOST_PATIENCE_S} s, "
                f"got {list(patience_s)}"
            )

        def change(recovery: Recovery) -> None:
            recovery.patience_s = tuple(patience_s)

        session.with_recovery(change)

    def status(self) -> dict[int, NodeStatus]:
        """Every node's newest heartbeat; one that cannot be used now is `down`."""
        if self._session is None:
            return {i: NodeStatus(node=i) for i in range(self.cluster.n_nodes)}
        return self._session.status()

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
        return self.profile_times(node, repeats)[0]

    def profile_times(
        self, node: int, repeats: int = 10
    ) -> tuple[tuple[float, ...], tuple[Conversion, ...]]:
        """As `profile_node`, and what the forms of transfer in use on the chain take there.

        Raises:
            RequestError: The node failed or refused; RequestTimeout if it did not answer.
        """
        reply = self._ask(Kind.PROFILE, {"node": node, "repeats": repeats}, _PROFILE_TIMEOUT_S)
        n_units = self._connected().nodes[node]["n_units"]
        return durations(reply, "unit_s", n_units), conversions(reply, n_units)

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
        if self._session is not None:
            self._session.close()

    def _ask(self, kind: Kind, request: _Json, timeout_s: float) -> _Json:
        """Send a control request and wait for its reply."""
        session = self._connected()
        pending = Pending(time.monotonic() + timeout_s)
        header = Header(kind, client=self._uuid, seq=self._requests.register(pending))
        body = attach(header, encode_json(request))
        session.post([pack(header), body])
        reply: _Json = pending.future.result()
        return reply

    def _open(self) -> Session:
        """The session, which is started the first time."""
        if self._closed:
            raise HandshakeError("this client is closed; make a new one")
        if self._session is None:
            self._session = Session(self.cluster, self._uuid, self._requests)
        return self._session

    def _connected(self) -> Session:
        if self._closed:
            raise HandshakeError("this client is closed; make a new one")
        if self._session is None or not self._session.nodes:
            raise HandshakeError("not connected; call connect() first")
        return self._session
