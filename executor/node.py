"""One node of the chain: `python -m executor.node --role fog --cluster cluster.toml`.

The thread that computes moves the frames itself while it has nothing to compute, so that a request
is computed, and its output sent, on the thread that took it in; while it computes, the main thread
stands in. Prints "READY port" once it serves; ends with 0: on SIGTERM
after it has finished what it had taken, on SIGINT or a second SIGTERM at once. Ends with 2 and one
line on stderr when its settings are wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import logging
import os
import platform
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any

import torch
import zmq

from executor._compute import Computer, FairQueue, Job
from executor._http import add_metrics_arguments
from executor._load import HostLoad
from executor._mover import Dialled, Mover
from executor._nodecore import CoreConfig
from executor._sockets import HandshakeMonitor, authenticate, bind_router
from executor._wake import Wake, polling
from executor._watched import WatchedCore
from executor.arguments import Parser
from executor.backends import build_backend
from executor.cluster import Cluster
from executor.codec import TRANSFERS
from executor.energy import best_meter
from executor.errors import ConfigError
from executor.logs import add_log_arguments, configure_logging
from executor.model import UnitChain, sample_input
from executor.pacing import LoadTrace, Pacer

__all__ = ["Node", "main"]

_log = logging.getLogger("executor.node")  # also where it is __main__

_END_WAIT_S = 5.0
_DRAIN_S = 10.0
# A drained node stays for a moment: its last answers leave, and late requests are told why.
_DRAIN_REST_S = 0.2
_LINGER_MS = 1000
_ASIDE_MS = 100


class Node:
    """A serving node: sockets, protocol core and two threads."""

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
        """Bind and build the model; `serve` then moves frames and computes.

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
        self._dialled: list[Dialled] = []
        self._compute: threading.Thread | None = None
        self._computer: Computer | None = None
        self._jobs = FairQueue(cluster.max_queue)
        self._lock = threading.Lock()  # whoever holds it may use sockets and core
        self._standing_in = False
        self._main_wake, self._compute_wake = Wake(), Wake()
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
                self._dialled.append(Dialled(self._ctx, cluster, target, role))
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
                "transfer": config.transfer,
                "reads": list(TRANSFERS),
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
                transfer=config.transfer,
            )
            self._core = WatchedCore(core_config, self._jobs, self._measure, meter)
            self._computer = Computer(
                chain,
                self._pacer,
                self._jobs,
                chain.device,
                transfer=config.transfer,
                forms=tuple(t for t in TRANSFERS[1:] if t in cluster.transfers),
            )
            self._mover = Mover(self._core, self._router, self._handshakes, self._dialled)
        except BaseException:
            self.close()
            raise

    def serve(self, control_fd: int | None = None) -> None:
        """Serve until `stop`, the end of `drain`, or the end of `control_fd` (JSON lines)."""
        self._compute = threading.Thread(target=self._run, name="compute", daemon=True)
        self._compute.start()
        always = (self._main_wake.fd, *([] if control_fd is None else [control_fd]))
        aside, standing_in = polling(*always), polling(*always, *self._mover.fds)
        control = b""
        wait_ms = 0
        try:
            while not self._stopping:
                here = self._standing_in
                events = (standing_in if here else aside).poll(wait_ms if here else _ASIDE_MS)
                ready = {fd for fd, _ in events}
                if control_fd is not None and control_fd in ready:
                    data = _read(control_fd)
                    if not data:
                        return
                    *lines, control = (control + data).split(b"\n")
                    for line in lines:
                        self._control(line)
                if self._main_wake.fd in ready:
                    self._main_wake.clear()
                wait_ms = 0
                if not (self._standing_in or self._questions or self._drain_until_s is not None):
                    continue
                with self._lock:
                    if self._standing_in:
                        wait_ms = self._mover.turn()
                    if len(self._jobs) and not self._standing_in:
                        self._compute_wake.set()
                    while self._questions:
                        self._questions.popleft().set_result(self._core.facts(time.monotonic()))
                    if self._drain_until_s is not None and self._drain_over(time.monotonic()):
                        return
        finally:
            self.stop()

    def _run(self) -> None:
        """Compute what there is to compute, and move frames meanwhile (the compute thread)."""
        poller = polling(self._compute_wake.fd, *self._mover.fds)
        try:
            while True:
                with self._lock:
                    if self._stopping:
                        return
                    wait_ms = self._mover.turn(until_job=True)
                    job = self._jobs.get(time.monotonic())
                if job is not None:
                    self._work(job)
                    continue
                if self._standing_in:
                    # What was computed has been sent. The main thread is not woken to be told: the
                    # next node needs the core more, and it will see when something comes.
                    self._standing_in = False
                    continue
                if wait_ms and (self._compute_wake.fd, select.POLLIN) in poller.poll(wait_ms):
                    self._compute_wake.clear()
        except BaseException:
            _log.exception("the compute thread failed; the node ends")
            self.stop()

    def _work(self, job: Job) -> None:
        """Run jobs until none waits; only the last one's output is left to this thread to send."""
        assert self._computer is not None
        following: Job | None = job
        while following is not None:
            if not self._standing_in and (following is not job or not self._computer.is_short(job)):
                self._standing_in = True
                self._main_wake.set()
            self._mover.outcomes.append(self._computer.run(following))
            following = self._jobs.get(time.monotonic())
            if following is not None and following.choose is not None:
                with self._lock:  # it chooses by what lies on the hop, so that must be there first
                    if not self._stopping:
                        self._mover.turn()
            elif following is not None:
                self._main_wake.set()

    def stop(self) -> None:
        """Let `serve` return; may be called from a signal handler or another thread."""
        self._stopping = True
        self._main_wake.set()
        self._compute_wake.set()

    def drain(self, deadline_s: float) -> None:
        """Refuse new requests, finish those taken, for at most so long, then let `serve` return.

        May be called from a signal handler or another thread; a second call ends at once.
        """
        if self._drain_until_s is not None:
            self.stop()
            return
        self._drain_until_s = time.monotonic() + deadline_s
        self._core.draining = True
        self._main_wake.set()

    def facts(self, timeout_s: float = 1.0) -> dict[str, Any] | None:
        """What the node knows of itself now (`NodeCore.facts`); from any thread.

        None if the loop did not answer in `timeout_s`: it has ended, or is stuck.
        """
        question: Future[dict[str, Any]] = Future()
        self._questions.append(question)
        self._main_wake.set()
        try:
            return question.result(timeout_s)
        except TimeoutError:
            return None

    def close(self) -> bool:
        """Close every socket; returns whether the compute thread has ended too."""
        self._stopping = True
        self._compute_wake.set()
        self._jobs.close()
        with self._lock:
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
        if self._compute is not None:
            self._compute.join(_END_WAIT_S)
            ended = not self._compute.is_alive()
        if ended:
            self._main_wake.close()
            self._compute_wake.close()
        return ended

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

    def _measure(self, now_s: float) -> dict[str, Any]:
        """The compute half of a STATUS."""
        paced = self._pacer.ratio is not None
        load = self._pacer.load.value_at(now_s) if paced else self._host_load.read(now_s)
        backlog_s = self._computer.backlog_s(now_s) if self._computer is not None else 0.0
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
        # A full collection would go through all of torch: tens of ms in the middle of a request.
        gc.collect()
        gc.freeze()
        _give_back_memory()
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


def _give_back_memory() -> None:
    """Return to the system what building the model took for a while (glibc keeps it otherwise)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
