"""The client's background thread: moves frames and carries out what the recovery says.

Other threads hand it events through a queue; what it learns they read from snapshots.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq
from numpy.typing import NDArray

from executor._hop import Hop, Parts, localise
from executor._json import decode_json
from executor._pending import Pending, PendingTable
from executor._records import (
    NodeStatus,
    Reply,
    RequestRecord,
    hello_problem,
    node_index,
    place_of,
    transfer_problem,
)
from executor._requests import seconds, split
from executor._sockets import (
    connect_dealer,
    link_changes,
    receive_parts,
    send_parts,
    watch_link,
)
from executor._wake import Wake, polling
from executor.cluster import Cluster
from executor.errors import RequestError, RequestRefused, RequestTimeout, WireError
from executor.plan import Plan
from executor.recovery import Complete, Counts, Fail, Instruction, Recovery, Send
from executor.wire import Header, Kind, array_of, check_body, pack

if TYPE_CHECKING:
    import torch

__all__ = ["Session"]

_log = logging.getLogger(__name__)

_TICK_S = 0.05
_ATTEND_MS = 1000
_OWN_BYTES = 64 * 1024
# As plain numbers: combining pyzmq's flags takes longer than asking.
_IN = int(zmq.POLLIN)
_IN_OUT = int(zmq.POLLIN | zmq.POLLOUT)
_FAILURES: dict[str, type[RequestError]] = {
    "timeout": RequestTimeout,
    "refused": RequestRefused,
    "draining": RequestRefused,
}

_Json = dict[str, Any]


class Session:
    """One connection of a client.

    Attributes:
        nodes: Per node its accepted handshake; empty until the chain was accepted.
    """

    def __init__(self, cluster: Cluster, client_id: bytes, requests: PendingTable) -> None:
        """Dial the first node and start the thread.

        Raises:
            ConfigError: The first node's address cannot be dialled, or a key is missing.
        """
        self.nodes: list[_Json] = []
        self._cluster = cluster
        self._id = client_id
        self._requests = requests
        self._expected: _Json = {}
        self._recovery: Recovery | None = None
        self._hop = Hop(client_id)
        self._endpoint = cluster.nodes[0].connect_endpoint()
        self._events: deque[Callable[[float], None]] = deque()
        self._control: deque[Parts] = deque()
        self._inputs: deque[Send] = deque()
        self._lock = threading.Lock()
        self._lock_sockets = threading.Lock()  # whoever holds it may use sockets and recovery
        self._status: dict[int, NodeStatus] = {}
        self._closed = False
        self._ctx: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._dealer = connect_dealer(self._ctx, cluster, cluster.nodes[0], cluster.client)
        except BaseException:
            self._ctx.term()
            raise
        self._poller = zmq.Poller()
        self._monitor = watch_link(self._dealer)
        for source in (self._dealer, self._monitor):
            self._poller.register(source, _IN)
        self._blocked = False
        self._wake = Wake()
        # A caller that waits may move the frames itself: then the thread stands aside, and goes on
        # doing so while nothing is under way, but for its ticks.
        self._attended = self._aside = False
        self._attendant_wake = Wake()
        # ZeroMQ's descriptors, not its sockets, so that others may use those meanwhile. They signal
        # only the edge: whoever lets go of the sockets leaves nothing to take in.
        fds = (self._dealer.FD, self._monitor.FD)
        self._here, self._there = polling(self._wake.fd, *fds), polling(self._wake.fd)
        self._attending = polling(self._attendant_wake.fd, *fds)
        self._thread = threading.Thread(target=self._serve, name="splitpilot-client", daemon=True)
        self._thread.start()

    def post(self, parts: Parts) -> None:
        """Send a control frame."""
        self._control.append(parts)
        self._wake.set()

    def accept(self, replies: Sequence[_Json], expected: _Json) -> None:
        """Take the chain's handshakes as checked; `expected` is what they must say ever after."""
        self.nodes = [dict(reply) for reply in replies]

        def event(now_s: float) -> None:
            self._expected = expected
            if self._recovery is None:
                names = [node.name for node in self._cluster.nodes]
                direct = self._cluster.direct_links
                self._recovery = Recovery(names, int(expected["n_units"]), direct)
            for index, reply in enumerate(replies):
                self._carry_out(self._recovery.hello(index, reply["boot"], "", now_s))

        self._post_event(event)

    def submit(
        self,
        seq: int,
        plan: Plan,
        deadline_s: float,
        late: bool = False,
        attend: Future[Reply] | None = None,
    ) -> None:
        """Run a registered inference, with its header's cut tables if `late`.

        This thread sends it, unless the session's is at work. With its future as `attend` this
        thread also stays to take in the answer, where no other does: one thread less to wake.
        """

        def event(now_s: float) -> None:
            assert self._recovery is not None
            self._carry_out(self._recovery.submitted(seq, plan, deadline_s, now_s, late))

        self._events.append(event)
        # Never waited for: a future's callback may submit, on the thread that holds it.
        if not self._lock_sockets.acquire(blocking=False):
            self._wake.set()
            return
        try:
            if self._closed:
                return
            self._run_events()
            self._send_everything()
            # What came in while sending is not signalled any more.
            more = bool(self._ready())
            attends = attend is not None and not self._attended
            away = self._aside and not self._attended
            if attends:
                self._attended = self._aside = True
        finally:
            self._lock_sockets.release()
        if attends and attend is not None:
            self._attend(attend, more)
        elif more or away or self._events:
            self._wake.set()

    def _attend(self, future: Future[Reply], more: bool) -> None:
        """Move frames on this thread until the future is done; `more` if there are some now."""
        try:
            while not (future.done() or self._closed):
                if not more:
                    self._attending.poll(_ATTEND_MS)
                    self._attendant_wake.clear()
                with self._lock_sockets:
                    if not self._closed:
                        self._move()
                more = False
        finally:
            self._attended = False
            if self._requests.in_flight or self._events:
                self._wake.set()

    def with_recovery(self, change: Callable[[Recovery], None]) -> None:
        """Change how requests recover, on the thread that holds the machine."""

        def event(now_s: float) -> None:
            if self._recovery is not None:
                change(self._recovery)

        self._post_event(event)

    def status(self) -> dict[int, NodeStatus]:
        """Every node's newest heartbeat."""
        with self._lock:
            known = dict(self._status)
        down = self._recovery.down if self._recovery is not None else range(self._cluster.n_nodes)
        statuses = (known.get(i, NodeStatus(node=i)) for i in range(self._cluster.n_nodes))
        return {s.node: replace(s, down=s.down or s.node in down) for s in statuses}

    def counts(self) -> Counts:
        """What became of the inferences so far."""
        return replace(self._recovery.counts) if self._recovery is not None else Counts()

    def close(self) -> None:
        """End the thread; open requests raise RequestError."""
        self._closed = True
        self._wake.set()
        self._attendant_wake.set()
        self._thread.join()
        self._wake.close()
        self._attendant_wake.close()

    def _post_event(self, event: Callable[[float], None]) -> None:
        self._events.append(event)
        self._wake.set()

    def _serve(self) -> None:
        """Move frames until the session is closed (background thread)."""
        tick_s = 0.0
        try:
            while not self._closed:
                wait_s = max(0.0, tick_s - time.monotonic())
                # A pong is taken in at once: the clocks are compared by it.
                away = self._aside and not self._hop.expects
                events = (self._there if away else self._here).poll(int(1000 * wait_s) + 1)
                if (self._wake.fd, select.POLLIN) in events:
                    self._wake.clear()
                with self._lock_sockets:
                    if not self._attended and (self._requests.in_flight or self._events):
                        self._aside = False
                    if time.monotonic() >= tick_s:
                        # What came is taken in before time is: after a pause of this process, too.
                        self._turn()
                        self._tick(time.monotonic())
                        tick_s = time.monotonic() + _TICK_S
                    self._move()
                if self._attended:  # it may have been its answer, or its deadline
                    self._attendant_wake.set()
        finally:
            with self._lock_sockets:
                self._closed = True
                self._dealer.disable_monitor()
                self._monitor.close(0)
                self._dealer.close(0)
                self._ctx.term()
            for pending in self._requests.close():
                pending.future.set_exception(RequestError("the client was closed"))

    def _move(self) -> None:
        """Send what waits, and take in what came, until there is nothing left of it."""
        self._send_everything()
        while self._turn():
            self._send_everything()

    def _turn(self) -> bool:
        """Take in what came, then news of the connection, then what others want; whether any."""
        ready = self._ready()
        if not ready and not self._events:
            return False
        while ready.get(self._dealer, 0) & _IN:
            self._receive()
            ready = {**ready, self._dealer: 0, **self._ready()}
        for up in link_changes(self._monitor) if self._monitor in ready else ():
            self._on_link(up)
        self._run_events()
        return True

    def _ready(self) -> dict[Any, int]:
        """Sockets that have something, or can take something that waits."""
        waiting = bool(self._hop.outbox or self._control or self._inputs)
        if waiting != self._blocked:
            self._blocked = waiting
            self._poller.register(self._dealer, _IN_OUT if waiting else _IN)
        return dict(self._poller.poll(0))

    def _run_events(self) -> None:
        while self._events:
            self._events.popleft()(time.monotonic())

    def _tick(self, now_s: float) -> None:
        """Do what is due by the clock."""
        self._hop.tick(now_s)
        if self._hop.connected and self._hop.is_silent(now_s):
            _log.warning("nothing comes from %s any more; dialling anew", self._endpoint)
            self._dealer.disconnect(self._endpoint)
            self._dealer.connect(self._endpoint)
            self._on_link(False)
        if self._recovery is not None:
            self._carry_out(self._recovery.tick(now_s))
        for seq, pending in self._requests.late(now_s):
            pending.future.set_exception(
                RequestTimeout(f"request {seq}: no answer before its deadline")
            )

    def _send_everything(self) -> None:
        with contextlib.suppress(zmq.Again):  # what waits for one of them waits for all
            for queue in (self._hop.outbox, self._control):
                while queue:
                    send_parts(self._dealer, queue[0])
                    queue.popleft()
            while self._inputs:
                parts = self._input(self._inputs[0])
                if parts is not None:
                    send_parts(self._dealer, parts)
                self._inputs.popleft()

    def _input(self, instruction: Send) -> Parts | None:
        """A request as it is sent now; None if it has ended meanwhile, or is about to."""
        pending = self._requests.get(instruction.seq)
        if pending is None or pending.header is None:
            return None
        header, tables = pending.header, pending.header.late
        header.left_s = pending.deadline_s - time.monotonic()
        if header.left_s <= 0.0:
            return None
        header.seq, header.cuts = instruction.seq, instruction.plan.cuts
        header.tries, header.direct = instruction.tries, instruction.direct
        header.late = tables if instruction.late else ()
        parts: Parts = [pack(header), pending.body or b""]
        header.late = tables
        return parts

    def _on_link(self, up: bool) -> None:
        """The connection to the first node was made, or broke with all that was under way on it."""
        now_s = time.monotonic()
        if up:
            self._hop.on_connected(now_s)
        else:
            self._hop.on_disconnected()
            self._inputs.clear()
        if self._recovery is not None:
            self._carry_out(self._recovery.link(up, now_s))

    def _receive(self) -> None:
        """Take one message, which must be there."""
        parts = receive_parts(self._dealer)
        now_s = time.monotonic()
        self._hop.on_heard(now_s)
        try:
            header, body = split(parts)
            check_body(header, body)
        except WireError as error:
            self._log_bad(error)
            if self._recovery is not None:
                self._carry_out(self._recovery.damaged(now_s))
            return
        try:
            self._take(header, body, now_s)
        except WireError as error:
            self._log_bad(error)

    def _log_bad(self, error: WireError) -> None:
        _log.warning("bad frame from node %s: %s", self._cluster.nodes[0].name, error)

    def _take(self, header: Header, body: memoryview | None, now_s: float) -> None:
        """Take one frame from the first node."""
        if header.kind is Kind.STATUS:
            self._take_status(NodeStatus.from_json(decode_json(body), now_s, down=False), now_s)
        elif header.kind is Kind.BEAT and header.seq in self._status:
            self._take_status(self._status[header.seq].at(now_s), now_s)
        elif header.kind is Kind.PONG:
            self._hop.on_pong(header, now_s)
        elif header.client == self._id and header.kind is Kind.HELLO_REPLY:
            self._take_hello(header, decode_json(body), now_s)
        elif header.client == self._id:
            pending = self._requests.get(header.seq)
            if pending is None or pending.plan is not None:
                self._take_answer(pending, header, body, now_s)
            elif self._requests.settle(header.seq) is not None:
                raw = decode_json(body)
                if header.kind is Kind.ERROR:
                    failure = _FAILURES.get(str(raw.get("code")), RequestError)
                    pending.future.set_exception(failure(str(raw.get("reason"))))
                else:
                    pending.future.set_result(raw)

    def _take_status(self, status: NodeStatus, now_s: float) -> None:
        node = status.node
        if node == 0:
            self._hop.every_s = status.every_s
        if not 0 <= node < self._cluster.n_nodes:
            raise WireError(f"status of node {node}, which the chain does not have")
        with self._lock:
            self._status[node] = status
        if self._recovery is not None:
            ends = (
                (node + 1, status.hop_up),
                (self._cluster.direct_links.get(node), status.direct_up),
            )
            links = {far: up for far, up in ends if far is not None and up is not None}
            self._carry_out(
                self._recovery.status(
                    node, status.boot, links, status.stalled_s, now_s, status.every_s
                )
            )

    def _take_hello(self, header: Header, reply: _Json, now_s: float) -> None:
        """A node's handshake: one of `connect`, or of a node that came back."""
        index = node_index(reply, self._cluster.n_nodes)
        pending = self._requests.get(header.seq)
        if pending is not None:
            with self._lock:
                pending.replies[index] = reply
                complete = len(pending.replies) == self._cluster.n_nodes
            if complete and self._requests.settle(header.seq) is not None:
                pending.future.set_result(None)
        elif self._recovery is not None:
            node = self._cluster.nodes[index]
            expected = {"name": node.name, **self._expected}
            problem = hello_problem(reply, expected)
            forms = self._cluster.transfers[:index]
            problem = problem or transfer_problem(reply, node.transfer, forms)
            before = self._recovery.counts.refused_nodes
            instructions = self._recovery.hello(index, reply["boot"], problem, now_s)
            if self._recovery.counts.refused_nodes > before:
                _log.warning("node %s came back and is refused: %s", expected["name"], problem)
            if not problem:
                self.nodes[index] = reply
            self._carry_out(instructions)

    def _take_answer(
        self, pending: Pending | None, header: Header, body: memoryview | None, now_s: float
    ) -> None:
        """An inference's output or error; `pending` is None where it ended before."""
        if self._recovery is None:
            return
        seq, tries = header.seq, header.tries
        if header.kind is Kind.ERROR:
            raw = decode_json(body)
            node = place_of(raw.get("node"), self._cluster.n_nodes)
            to = place_of(raw.get("to"), self._cluster.n_nodes)
            code, reason = str(raw.get("code")), str(raw.get("reason"))
            wait_s = seconds(raw, "wait_s", 60.0)
            instructions = self._recovery.error(seq, tries, code, reason, node, to, now_s, wait_s)
            self._carry_out(instructions)
            return
        output = None
        if pending is not None:
            try:
                output = self._output(header, body)
            except WireError as error:
                text = f"bad reply: {error}"
                self._carry_out(self._recovery.error(seq, tries, "failed", text, 0, 0, now_s))
                return
        for instruction in self._recovery.result(seq):
            done = self._requests.settle(seq)
            if done is None or output is None or not isinstance(instruction, Complete):
                continue
            record = RequestRecord.from_header(
                header, done.scheduled_s, done.submitted_s, now_s, instruction.tries
            )
            value: torch.Tensor | NDArray[np.generic] = output
            if done.tensor:
                import torch

                value = torch.from_numpy(output)
            done.future.set_result(Reply(value, record))

    def _output(self, header: Header, body: memoryview | None) -> NDArray[np.generic]:
        """The output of a RESULT, whose stamps are put into this process's clock."""
        if header.kind is not Kind.RESULT or len(header.hops) != self._cluster.n_nodes - 1:
            raise WireError(f"expected a RESULT, got {header.kind.name} with cuts {header.cuts}")
        if header.digest.hex() != self._expected["digest"]:
            raise WireError(f"a result of weights {header.digest.hex()}")
        localise(header, -1, self._hop.clock.offset_s, self._hop.one_way_s)
        output: NDArray[np.generic] = array_of(header, body)
        # A small one may lie in a buffer of ZeroMQ's with others, and its reader keep it for long.
        return output if output.nbytes >= _OWN_BYTES else output.copy()

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Send):
                self._inputs.append(instruction)
            elif isinstance(instruction, Fail):
                ended = self._requests.settle(instruction.seq)
                if ended is not None:
                    error = _FAILURES.get(instruction.code, RequestError)(instruction.reason)
                    if isinstance(error, RequestRefused):
                        error.wait_s = instruction.wait_s
                    ended.future.set_exception(error)
            else:
                self._control.append([pack(Header(Kind.HELLO, client=self._id))])
