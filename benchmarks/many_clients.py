"""Many edge clients against one fog and one cloud: are they served alike, within bounded memory?

python benchmarks/many_clients.py --clients 200

Each client keeps a request in flight, and sends a refused one again when the node's error says so.
One in ten is greedy: it keeps eight times as many in flight. Rounds: computed on the fog, relayed
to the cloud, cut in between.

The nodes must be the bottleneck, not this program, so all but a few clients are lean: they send
prepared frames over sockets of their own, ping and listen as `executor.client.Client` does, and
compare every output bit for bit. `--real` of them are that class.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq

from executor._json import decode_json
from executor._sockets import connect_dealer
from executor.child import Child
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import RequestRefused
from executor.link import PING_PERIOD_S
from executor.model import build_chain, sample_input
from executor.plan import Plan
from executor.ports import HOST, reserve_port
from executor.wire import Header, Kind, array_body, pack, parse_header

WARM_UP_S = 5.0
TIMEOUT_S = 60.0
INPUTS = 4
GREED = 8
KIND_AT = 5  # a header's sixth byte
CUTS: dict[str, Callable[[int], int]] = {
    "fog": lambda n: n, "cloud": lambda n: 0, "both": lambda n: n // 2,
}  # fmt: skip
Counts = collections.Counter[str]


@dataclass
class Task:
    """What every client asks for: inputs with the outputs that are right, and the way."""

    plan: Plan
    digest: bytes
    inputs: list[np.ndarray]
    outputs: list[bytes]


@dataclass
class Slot:
    """A client's place for one request at a time.

    Attributes:
        counts: Its client's.
        send: Sends a request of the client; raises nothing.
    """

    counts: Counts
    send: Callable[[Slot], None]
    input: int = 0


@dataclass
class Agenda:
    """Slots and when each sends; others' threads may add to it."""

    rng: random.Random
    heap: list[tuple[float, int, Slot]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0

    def add(self, slot: Slot, wait_s: float = 0.0) -> None:
        """Let a slot send in so many seconds."""
        with self.lock:
            self.number += 1
            heapq.heappush(self.heap, (time.monotonic() + wait_s, self.number, slot))

    def refused(self, slot: Slot, reason: str, wait_s: float) -> None:
        """Count a refusal, and let the slot send again when it said so."""
        slot.counts["refused"] += 1
        slot.counts["unclear"] += "send slower" not in reason or not wait_s > 0
        self.add(slot, (wait_s or 0.1) * self.rng.uniform(1.0, 1.2))

    def send_due(self) -> float:
        """Send what is due; returns seconds until more is."""
        while True:
            with self.lock:
                now_s = time.monotonic()
                if not self.heap or self.heap[0][0] > now_s:
                    return self.heap[0][0] - now_s if self.heap else 1.0
                slot = heapq.heappop(self.heap)[2]
            slot.send(slot)


class RealClient:
    """`Client`, as the agent uses it."""

    def __init__(self, client: Client, task: Task, agenda: Agenda) -> None:
        self.counts = Counts()
        self._client, self._task, self._agenda = client, task, agenda

    def send(self, slot: Slot) -> None:
        """Send a request."""
        slot.input = self._agenda.rng.randrange(INPUTS)
        slot.counts["sent"] += 1
        future = self._client.submit(self._task.inputs[slot.input], self._task.plan)
        future.add_done_callback(lambda done: self._done(slot, done))

    def _done(self, slot: Slot, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, RequestRefused):
            self._agenda.refused(slot, str(error), error.wait_s)
            return
        if error is not None:
            slot.counts["failed"] += 1
            slot.counts[f"failed: {error}"[:120]] += 1
        elif np.asarray(future.result().output).tobytes() != self._task.outputs[slot.input]:
            slot.counts["wrong"] += 1
        else:
            slot.counts["completed"] += 1
        self._agenda.add(slot)


class LeanClient:
    """The same on the wire, for little work: frames are packed once per request, bodies never."""

    def __init__(self, dealer: zmq.Socket[bytes], task: Task, agenda: Agenda) -> None:
        self.counts = Counts()
        self.dealer = dealer
        self._task, self._agenda = task, agenda
        self._id, self._seq = uuid.uuid4().bytes, 0
        header = Header(Kind.INFER, client=self._id, cuts=task.plan.cuts, digest=task.digest)
        header.tries, header.left_s = 1, TIMEOUT_S
        headers = [replace(header) for _ in task.inputs]
        self._bodies = [(h, array_body(h, a)) for h, a in zip(headers, task.inputs, strict=True)]
        self._open: dict[int, Slot] = {}
        self._hold_s = 0.0

    def send(self, slot: Slot) -> None:
        """Send a request, unless the node has no room yet."""
        left_s = self._hold_s - time.monotonic()
        if left_s > 0:  # as `Client` does
            self._agenda.add(slot, left_s)
            return
        slot.input = self._agenda.rng.randrange(INPUTS)
        header, body = self._bodies[slot.input]
        self._seq += 1
        header.seq = self._seq
        try:
            self.dealer.send_multipart([pack(header), body], zmq.NOBLOCK, copy=False)
        except zmq.Again:  # what was sent before is still on its way
            self._agenda.add(slot, 0.02)
            return
        slot.counts["sent"] += 1
        self._open[self._seq] = slot

    def ping(self) -> None:
        """Say that this client is there."""
        self._seq += 1
        clock_s = (time.monotonic(), 0.0, 0.0)
        frame = pack(Header(Kind.PING, client=self._id, seq=self._seq, clock_s=clock_s))
        with contextlib.suppress(zmq.Again):
            self.dealer.send(frame, zmq.NOBLOCK)

    def receive(self) -> None:
        """Take what came."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._take(self.dealer.recv_multipart(zmq.NOBLOCK))

    def _take(self, parts: Sequence[bytes]) -> None:
        kind = parts[0][KIND_AT]
        if kind not in (Kind.RESULT, Kind.ERROR):
            self.counts["heartbeats"] += kind in (Kind.STATUS, Kind.BEAT)
            return
        slot = self._open.pop(parse_header(parts[0]).seq)
        if kind == Kind.RESULT:
            right = parts[1] == self._task.outputs[slot.input]
            slot.counts["completed" if right else "wrong"] += 1
            self._agenda.add(slot)
            return
        error = decode_json(parts[1])
        if error["code"] == "refused":
            self._hold_s = time.monotonic() + error["wait_s"]
            self._agenda.refused(slot, error["reason"], error["wait_s"])
        else:
            slot.counts["failed"] += 1
            slot.counts[f"failed: {error['reason']}"[:120]] += 1
            self._agenda.add(slot, 0.5)


def crowd(
    cluster: Cluster, task: Task, flights: list[int], real: int, seconds: float, results: Any
) -> None:
    """All clients (a process of its own); puts what each counted in `seconds` after a warm-up."""
    rng = random.Random(0)
    agenda = Agenda(rng)
    with contextlib.ExitStack() as stack:
        ctx: zmq.Context[zmq.Socket[bytes]] = stack.enter_context(zmq.Context())
        clients: list[RealClient | LeanClient] = []
        poller = zmq.Poller()
        lean: dict[Any, LeanClient] = {}
        for i, in_flight in enumerate(flights):
            one: RealClient | LeanClient
            if i < real:
                client = stack.enter_context(Client(cluster, max_in_flight=64, timeout_s=TIMEOUT_S))
                client.connect(60.0)
                one = RealClient(client, task, agenda)
            else:
                dealer = connect_dealer(ctx, cluster, cluster.nodes[0], cluster.client)
                stack.callback(dealer.close, 0)
                one = lean[dealer] = LeanClient(dealer, task, agenda)
                poller.register(dealer, zmq.POLLIN)
            clients.append(one)
            for _ in range(in_flight):
                agenda.add(Slot(one.counts, one.send), rng.random())
        begun_s = time.monotonic() + WARM_UP_S
        cpu_s, before = 0.0, [one.counts.copy() for one in clients]
        pings = [(time.monotonic() + rng.random() * PING_PERIOD_S, i, c)
                 for i, c in enumerate(lean.values())]  # fmt: skip
        heapq.heapify(pings)
        while (now_s := time.monotonic()) < begun_s + seconds:
            if not cpu_s and now_s >= begun_s:
                cpu_s, before = time.process_time(), [one.counts.copy() for one in clients]
            while pings and pings[0][0] <= now_s:
                due_s, i, one = pings[0]
                one.ping()
                heapq.heapreplace(pings, (due_s + PING_PERIOD_S, i, one))
            wait_s = min(agenda.send_due(), 0.02)
            # Not at once for each message: looking at 200 sockets costs as much for one as for all.
            time.sleep(min(0.005, wait_s))
            for dealer, _ in poller.poll(round(1000.0 * max(0.0, wait_s - 0.005))):
                lean[dealer].receive()
        counted = [one.counts.copy() for one in clients]
        cpu_s = time.process_time() - cpu_s
    results.put(([c - b for c, b in zip(counted, before, strict=True)], cpu_s))


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def nodes(folder: Path, model: str) -> Iterator[tuple[Cluster, list[Child]]]:
    """Fog and cloud as processes."""
    path = folder / "cluster.toml"
    with contextlib.ExitStack() as stack:
        ports = {name: reserve_port(stack) for name in ("fog", "cloud")}
        chain = tuple(NodeConfig(name, HOST, port) for name, port in ports.items())
        cluster = Cluster(model, "none", chain, threads=1)
        path.write_text(cluster.to_toml())
        children = []
        for node in chain:
            args = ("--role", node.name, "--cluster", str(path), "--control-stdin")
            children.append(child := Child(node.name, "executor.node", args))
            stack.callback(child.close)
            if not child.read_line(120.0).startswith("READY"):
                sys.exit(f"{node.name} did not start: {child.stderr_tail()}")
        yield cluster, children


def measure(task: Task, args: argparse.Namespace) -> tuple[list[Counts], str]:
    """One round; returns each client's counts, and a line about the processes."""
    spawn = multiprocessing.get_context("spawn")
    flights = [GREED if i % 10 == 9 else 1 for i in range(args.clients)]
    with tempfile.TemporaryDirectory() as folder:
        with nodes(Path(folder), args.model) as (cluster, children):
            results = spawn.Queue()
            process = spawn.Process(
                target=crowd,
                args=(cluster, task, flights, args.real, args.seconds, results),
                daemon=True,
            )
            first = peak = [rss_mib(child.pid) for child in children]
            busy, begun_s = [cpu_s(child.pid) for child in children], time.monotonic()
            process.start()
            while results.empty() and process.is_alive():
                time.sleep(0.5)
                peak = [max(p, rss_mib(c.pid)) for p, c in zip(peak, children, strict=True)]
            if results.empty():
                sys.exit(f"the clients' process ended with {process.exitcode}")
            counts, own_s = results.get()
            took_s = time.monotonic() - begun_s
            shares = [(cpu_s(c.pid) - b) / took_s for c, b in zip(children, busy, strict=True)]
            process.join(60)
    text = "; ".join(
        f"{child.name} +{p - f:.0f} MiB, {share:.0%} of a core"
        for child, f, p, share in zip(children, first, peak, shares, strict=True)
    )
    return counts, f"{text}; clients {own_s / args.seconds:.0%}"


def prepare(model: str) -> tuple[int, bytes, list[np.ndarray], list[bytes]]:
    """The model's units, its digest, and inputs with what the nodes must answer bit for bit."""
    torch.set_num_threads(1)
    chain = build_chain(model)
    inputs = [sample_input(seed) for seed in range(INPUTS)]
    n = chain.spec.n_units
    outputs = [chain.run(x, 0, n).numpy().tobytes() for x in inputs]
    return n, bytes.fromhex(chain.digest), [x.numpy() for x in inputs], outputs


def main() -> None:
    """Run the rounds; leaves with 1 if one was unfair, wrong, or a refusal unclear."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--real", type=int, default=4, help="of them, of the class Client")
    parser.add_argument("--seconds", type=float, default=120.0, help="per round")
    parser.add_argument("--rounds", nargs="*", default=list(CUTS), choices=list(CUTS))
    args = parser.parse_args()
    n, digest, inputs, outputs = prepare(args.model)
    failed = []
    for name in args.rounds:
        task = Task(Plan((CUTS[name](n),)), digest, inputs, outputs)
        counts, processes = measure(task, args)
        done = sorted(c["completed"] for c in counts)
        total = sum(counts, Counts())
        ratio = done[-1] / done[0] if done[0] else float("inf")
        print(
            f"{name:<6} {args.clients} clients, {args.seconds:g} s: completed {done[0]}..{done[-1]}"
            f" each ({total['completed'] / args.seconds:.1f}/s), max/min {ratio:.2f}; sent "
            f"{total['sent'] / max(1, total['completed']):.2f} per completion, refused "
            f"{total['refused']}, unclear {total['unclear']}, failed {total['failed']}, wrong "
            f"{total['wrong']}\n       {processes}; heartbeats "
            f"{total['heartbeats'] / max(1, args.clients - args.real) / args.seconds:.1f}/s each",
            flush=True,
        )
        for reason, times in total.items():
            if reason.startswith("failed:"):
                print(f"   {times} x {reason}")
        if ratio > 1.5 or total["unclear"] or total["failed"] or total["wrong"]:
            failed.append(name)
    if failed:
        sys.exit(f"not fair, not clear or not right: {', '.join(failed)}")


if __name__ == "__main__":
    main()
