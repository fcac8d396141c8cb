"""One node of the chain: `python -m executor.node --role fog --cluster cluster.toml`.

One thread moves frames, one computes. Prints "READY port" once it serves; ends with 0: on SIGTERM
after it has finished what it had taken, on SIGINT or a second SIGTERM at once. Ends with 2 and one
line on stderr when its settings are wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import platform
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any

import torch
import zmq

from executor._compute import ComputeThread, FairQueue, Outcome
from executor._hop import Hop, Parts
from executor._http import add_metrics_arguments
from executor._load import HostLoad
from executor._nodecore import CoreConfig
from executor._sockets import (
    HandshakeMonitor,
    authenticate,
    bind_router,
    connect_dealer,
    link_changes,
    watch_link,
)
from executor._watched import WatchedCore
from executor.arguments import Parser
from executor.backends import build_backend
from executor.cluster import Cluster, NodeConfig
from executor.energy import best_meter
from executor.errors import ConfigError
from executor.logs import add_log_arguments, configure_logging
from executor.model import UnitChain, sample_input
from executor.pacing import LoadTrace, Pacer

__all__ = ["Node", "main"]

_log = logging.getLogger("executor.node")  # also where it is __main__

_MAX_WAIT_MS = 100
_MESSAGES_PER_TURN = 16
_END_WAIT_S = 5.0
_DRAIN_S = 10.0
# A drained node stays for a moment: its last answers leave, and late requests are told why.
_DRAIN_REST_S = 0.2
_LINGER_MS = 1000


class _Dialled:
    """A dealer towards a node further on, and the socket that watches its connection."""

    def __init__(
        self, ctx: zmq.Context[zmq.Socket[bytes]], cluster: Cluster, target: NodeConfig, role: str
    ) -> None:
        self.endpoint = target.connect_endpoint()
        self.dealer = connect_dealer(ctx, cluster, target, role)
        self.monitor = watch_link(self.dealer)

    def renew(self) -> None:
        """Drop the connection and make another."""
        self.dealer.disconnect(self.endpoint)
        self.dealer.connect(self.endpoint)

    def close(self) -> None:
        """Close both sockets."""
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(0)


class Node:
    """A serving node: sockets, protocol core and compute thread."""

    def __init__(
        self,
        cluster: Cluster,
        role: str,
        *,
        torch_device: str | None = None,
        backend: str | None = None,
        ratio: float | None = None,
        insecure: bool = False,
        chain: UnitChain | None = None,
    ) -> None:
        """Bind, build the model and start computing; `serve` then moves frames.

        Args:
            cluster: The chain.
            role: This node's name in it.
            torch_device: Overrides the cluster's device for this node.
            backend: Overrides the cluster's backend for this node.
            ratio: Emulated slowness, see `executor.pacing.Pacer`; None runs at full speed.
            insecure: Allow listening off loopback without keys.
            chain: The model, where it is built already (eager); else it is built here.

        Raises:
            ConfigError: A setting is wrong, or the port is taken.
        """
        index = cluster.index(role)
        config = cluster.nodes[index]
        cluster.check_exposure(config, insecure)
        device = torch_device or config.torch_device
        self._pacer = Pacer(ratio)
        self._host_load = HostLoad()
        self._stopping = False
        self._drain_until_s: float | None = None
        self._busy_s = 0.0
        self._questions: collections.deque[Future[dict[str, Any]]] = collections.deque()
        self._router: zmq.Socket[bytes] | None = None
        self._dialled: list[_Dialled] = []
        self._compute: ComputeThread | None = None
        self._outcomes: collections.deque[Outcome] = collections.deque()
        self._jobs = FairQueue(cluster.max_queue)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._ctx: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth = None
        self._handshakes: HandshakeMonitor | None = None
        try:
            meter = best_meter(config.device, emulated=ratio is not None, torch_device=device)
            self._auth = authenticate(self._ctx, cluster, config)
            self._router, self.port = bind_router(self._ctx, cluster, config)
            self._handshakes = HandshakeMonitor(self._ctx, self._router)
            following = cluster.nodes[index + 1 : index + 2]
            direct = cluster.direct_target(index)
            for target in (*following, *([direct] if direct else [])):
                self._dialled.append(_Dialled(self._ctx, cluster, target, role))
            if chain is None:
                chain, backend = build_backend(
                    backend or cluster.backend, cluster.model, cluster.weights, device=device
                )
            # The first pass builds kernels; no request should pay for that.
            x = sample_input(0, chain.spec.input_shape).to(chain.device)
            chain.run(x, 0, chain.spec.n_units)
            hello = {
                "name": role,
                "model": chain.spec.name,
                "digest": chain.digest,
                "n_units": chain.spec.n_units,
                "input_bytes": chain.spec.cut_bytes[0],
                "device": config.device,
                "torch_device": device,
                "backend": backend or "eager",
                "torch": torch.__version__,
                "machine": platform.machine(),
                "ratio": ratio,
                "meter": meter.name,
                "pid": os.getpid(),
                "boot": uuid.uuid4().hex[:16],
            }
            core_config = CoreConfig(
                index=index,
                n_nodes=cluster.n_nodes,
                spec=chain.spec,
                digest=bytes.fromhex(chain.digest),
                max_queue=cluster.max_queue,
                hello=hello,
                peer_rate_rps=cluster.peer_rate_rps,
                direct=cluster.direct_links.get(index),
            )
            self._core = WatchedCore(core_config, self._jobs, self._measure, meter)
            self._links: list[tuple[_Dialled, Hop]] = list(
                zip(self._dialled, self._core.links, strict=True)
            )
            self._compute = ComputeThread(
                chain, self._pacer, self._jobs, chain.device, self._on_done
            )
            self._compute.start()
        except BaseException:
            self.close()
            raise

    def serve(self, control_fd: int | None = None) -> None:
        """Move frames until `stop`, the end of `drain`, or the end of `control_fd` (JSON lines)."""
        poller = zmq.Poller()
        handshakes = self._handshakes.socket if self._handshakes is not None else None
        for source in (self._router, self._wake_read, handshakes, control_fd):
            if source is not None:
                poller.register(source, zmq.POLLIN)
        for end, _ in self._links:
            poller.register(end.monitor, zmq.POLLIN)
        control = b""
        while not self._stopping:
            for end, link in self._links:
                poller.register(end.dealer, zmq.POLLIN | (zmq.POLLOUT if link.outbox else 0))
            wait_s = self._core.due_s(time.monotonic())
            ready = dict(poller.poll(min(_MAX_WAIT_MS, int(wait_s * 1000) + 1)))
            if control_fd is not None and control_fd in ready:
                data = _read(control_fd)
                if not data:
                    return
                *lines, control = (control + data).split(b"\n")
                for line in lines:
                    self._control(line)
            self._turn()
            if self._drain_until_s is not None and self._drain_over(time.monotonic()):
                return

    def stop(self) -> None:
        """Let `serve` return; may be called from a signal handler or another thread."""
        self._stopping = True
        self._wake()

    def drain(self, deadline_s: float) -> None:
        """Refuse new requests, finish those taken, for at most so long, then let `serve` return.

        May be called from a signal handler or another thread; a second call ends at once.
        """
        if self._drain_until_s is not None:
            self.stop()
            return
        self._drain_until_s = time.monotonic() + deadline_s
        self._core.draining = True
        self._wake()

    def facts(self, timeout_s: float = 1.0) -> dict[str, Any] | None:
        """What the node knows of itself now (`NodeCore.facts`); from any thread.

        None if the loop did not answer in `timeout_s`: it has ended, or is stuck.
        """
        question: Future[dict[str, Any]] = Future()
        self._questions.append(question)
        self._wake()
        try:
            return question.result(timeout_s)
        except TimeoutError:
            return None

    def close(self) -> bool:
        """Close every socket; returns whether the compute thread has ended too."""
        self._jobs.close()
        for end in self._dialled:
            end.close()
        if self._router is not None:
            # What was answered last may still be on its way.
            self._router.close(0 if self._drain_until_s is None else _LINGER_MS)
        if self._handshakes is not None:
            self._handshakes.close()
        if self._auth is not None:
            self._auth.stop()
        self._ctx.term()
        ended = True
        if self._compute is not None and self._compute.ident is not None:
            self._compute.join(_END_WAIT_S)
            ended = not self._compute.is_alive()
        if ended:
            self._wake_read.close()
            self._wake_write.close()
        return ended

    def _turn(self) -> None:
        """Take what came in, let the core decide, send what it leaves."""
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass
        while self._outcomes:
            self._feed(self._core.on_outcome, self._outcomes.popleft())
        for end, link in self._links:
            for _ in range(_MESSAGES_PER_TURN):
                parts = _receive(end.dealer)
                if parts is None:
                    break
                self._feed(self._core.on_downstream, parts, link=link)
            # What came over a connection is taken in before the news of its end.
            for up in link_changes(end.monitor):
                self._feed(self._core.on_link, link, up)
        for _ in range(_MESSAGES_PER_TURN):
            parts = _receive(self._router)
            if parts is None:
                break
            self._feed(self._core.on_upstream, bytes(parts[0]), parts[1:])
        if self._handshakes is not None:
            self._handshakes.read()
        self._feed(self._core.tick)
        for end, link in self._links:
            if link in self._core.stuck:
                _log.warning("nothing gets across to %s any more; dialling anew", end.endpoint)
                end.renew()
                self._feed(self._core.on_link, link, False)
        self._core.stuck.clear()
        while self._questions:
            self._questions.popleft().set_result(self._core.facts(time.monotonic()))

    def _drain_over(self, now_s: float) -> bool:
        """Whether what was taken is finished, or the deadline has passed."""
        assert self._drain_until_s is not None
        if not self._core.drained or not self._busy_s:
            self._busy_s = now_s
        if now_s >= self._drain_until_s:
            left = self._core.facts(now_s)["open_requests"]
            _log.warning("drain: out of time with %d requests open", left, extra={"open": left})
            return True
        return now_s - self._busy_s >= _DRAIN_REST_S

    def _feed(self, handle: Callable[..., None], *event: object, **more: object) -> None:
        """Hand one event to the core and send what it leaves."""
        try:
            handle(*event, time.monotonic(), **more)
        except Exception:
            # One frame must never end a node, whatever it turned out to hold.
            self._core.bad_frames += 1
            _log.exception("%s failed; the frame is dropped", handle.__name__)
        while self._core.up and self._router is not None:
            identity, parts = self._core.up.popleft()
            try:
                self._router.send_multipart([identity, *parts], zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:
                # Gone, or so slow that its queue is full: the client's deadline covers both.
                _log.debug("no way up to a peer: %s", error)
                if error.errno != zmq.EAGAIN:
                    self._core.forget(identity)
        for end, link in self._links:
            with contextlib.suppress(zmq.Again):
                while link.outbox:
                    end.dealer.send_multipart(link.outbox[0], zmq.NOBLOCK, copy=False)
                    link.outbox.popleft()

    def _measure(self, now_s: float) -> dict[str, Any]:
        """The compute half of a STATUS."""
        paced = self._pacer.ratio is not None
        load = self._pacer.load.value_at(now_s) if paced else self._host_load.read(now_s)
        backlog_s = self._compute.backlog_s(now_s) if self._compute is not None else 0.0
        return {
            "load": round(load, 4),
            "backlog_s": round(backlog_s, 6),
            "overruns": self._pacer.overruns,
            "stages": self._pacer.stages,
            "unauthenticated": self._handshakes.unauthenticated if self._handshakes else 0,
        }

    def _control(self, line: bytes) -> None:
        """Apply one JSON line from the testbed."""
        if not line.strip():
            return
        try:
            load = json.loads(line)["load"]
            if isinstance(load, dict):
                trace = LoadTrace.from_samples(load["t0"], load["dt_s"], load["values"])
            else:
                trace = LoadTrace.constant(float(load))
            self._pacer.load = trace
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            _log.warning("control line ignored, expected a load: %r", error)

    def _on_done(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._wake()

    def _wake(self) -> None:
        # A full or closed pipe is fine: the loop is then awake, or gone.
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a node; returns the exit code."""
    args = _parser().parse_args(argv)
    configure_logging(args, node=args.role)
    with contextlib.ExitStack() as stack:
        try:
            cluster = Cluster.load(args.cluster)
            threads = args.threads if args.threads is not None else cluster.threads
            if threads is not None:
                if threads < 1:
                    raise ConfigError(f"--threads must be a positive count, got {threads}")
                torch.set_num_threads(threads)
            if not args.drain_s >= 0:
                raise ConfigError(f"--drain-s must be >= 0, got {args.drain_s}")
            watch = _monitor(args, cluster, stack)
            node = Node(
                cluster,
                args.role,
                torch_device=args.device,
                backend=args.backend,
                ratio=args.ratio,
                insecure=args.insecure,
            )
        except ConfigError as error:
            print(f"executor.node: {error}", file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, lambda *_: node.drain(args.drain_s))
        signal.signal(signal.SIGINT, lambda *_: node.stop())
        watch(node)
        print(f"READY {node.port}", flush=True)
        _log.info("serving on port %d", node.port, extra={"port": node.port})
        try:
            node.serve(sys.stdin.fileno() if args.control_stdin else None)
        finally:
            ended = node.close()
        _log.info("ended")
    if not ended:
        # A stage still runs; leaving the interpreter under torch's feet could crash it.
        sys.stderr.flush()
        os._exit(0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m executor.node", description=__doc__)
    parser.add_argument("--role", required=True, help="this node's name in the cluster file")
    parser.add_argument("--cluster", required=True, type=Path, help="cluster.toml")
    parser.add_argument("--device", help="torch device; overrides the cluster file")
    parser.add_argument("--backend", help="auto, eager, tuned or onnx; overrides the cluster file")
    parser.add_argument("--threads", type=int, help="torch threads; overrides the cluster file")
    parser.add_argument("--insecure", action="store_true", help="allow plain TCP off loopback")
    parser.add_argument("--ratio", type=float, help="emulate a node this many times slower")
    parser.add_argument(
        "--control-stdin", action="store_true", help="take load changes on stdin; end with it"
    )
    parser.add_argument(
        "--drain-s", type=float, default=_DRAIN_S, help="seconds to finish in on SIGTERM (10)"
    )
    add_metrics_arguments(parser, "cluster file's, else off")
    add_log_arguments(parser)
    return parser


def _monitor(
    args: argparse.Namespace, cluster: Cluster, stack: contextlib.ExitStack
) -> Callable[[Node], None]:
    """Serve metrics where a port is given; returns what to tell the node to."""
    index = cluster.index(args.role)
    port = args.metrics_port if args.metrics_port is not None else cluster.nodes[index].metrics_port
    if not port:
        return lambda node: None
    from executor.metrics import NodeMonitor  # what only a watched node needs

    following = [node.name for node in cluster.nodes[index + 1 : index + 2]]
    monitor = NodeMonitor(args.role, "".join(following), args.metrics_host, port)
    return stack.enter_context(monitor).watch


def _receive(source: zmq.Socket[bytes] | None) -> Parts | None:
    """The next message as views of ZeroMQ's own memory; None if there is none."""
    if source is None:
        return None
    try:
        frames = source.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    return [frame.buffer for frame in frames]


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
