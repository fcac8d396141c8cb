"""Many edge clients against one fog and one cloud: are they served alike, within bounded memory?

python benchmarks/many_clients.py --clients 200

Each client keeps a few requests in flight, and sends a refused one again a little later. Three
rounds: computed on the fog, relayed to the cloud, and cut in between, so that the fog's compute
queue, its hop and the cloud's queue are the bottleneck in turn. Greedy clients (one in ten) keep
eight times as many in flight.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from executor.child import Child
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import RequestError, RequestRefused
from executor.model import sample_input
from executor.plan import Plan

MODEL = "mobilenet_v2"
PLANS = {"fog": (21,), "cloud": (0,), "both": (10,)}
WARM_UP_S = 5.0
Counts = dict[str, Any]


class Load:
    """One client that keeps its requests coming."""

    def __init__(self, client: Client, plan: Plan, in_flight: int, rng: random.Random) -> None:
        """Prepare."""
        self.counts: collections.Counter[str] = collections.Counter()
        self._client, self._plan, self._rng = client, plan, rng
        self._x = sample_input(rng.randrange(4))
        self._due: list[float] = [0.0] * in_flight  # when each idle slot sends again
        self._lock = threading.Lock()

    def send_due(self, now_s: float) -> None:
        """Send what is due."""
        with self._lock:
            due = [t for t in self._due if t <= now_s]
            self._due = [t for t in self._due if t > now_s]
        for _ in due:
            try:
                self._client.submit(self._x, self._plan).add_done_callback(self._done)
            except RequestRefused as error:
                self._end(error)

    def _done(self, future: Future[Any]) -> None:
        self._end(future.exception())

    def _end(self, error: BaseException | None) -> None:
        wait_s = 0.0
        if error is None:
            self.counts["completed"] += 1
        elif isinstance(error, RequestRefused):
            if "send slower" not in str(error):
                self.counts["unclear"] += 1
            self.counts["refused"] += 1
            wait_s = self._rng.uniform(0.05, 0.15)
        elif isinstance(error, RequestError):
            self.counts["failed"] += 1
            self.counts[f"failed: {error}"[:120]] += 1
        with self._lock:
            self._due.append(time.monotonic() + wait_s)


def crowd(
    cluster: Cluster, cuts: tuple[int, ...], flights: list[int], seconds: float, seed: int,
    ready: Barrier, results: Any,
) -> None:  # fmt: skip
    """Some of the clients (a process of its own)."""
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        loads = []
        for in_flight in flights:
            client = stack.enter_context(Client(cluster, max_in_flight=64, timeout_s=60.0))
            client.connect(60.0)
            loads.append(Load(client, Plan(cuts), in_flight, rng))
        ready.wait(120)
        end_s = time.monotonic() + WARM_UP_S + seconds
        before: list[collections.Counter[str]] = []
        while (now_s := time.monotonic()) < end_s:
            if not before and now_s >= end_s - seconds:
                before = [load.counts.copy() for load in loads]
            for load in loads:
                load.send_due(now_s)
            time.sleep(0.005)
        counted = [load.counts.copy() for load in loads]
    results.put([dict(c - b) for c, b in zip(counted, before, strict=True)])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[tuple[Cluster, list[Child]]]:
    """Fog and cloud as processes."""
    chain = tuple(NodeConfig(name, "127.0.0.1", free_port()) for name in ("fog", "cloud"))
    cluster = Cluster(MODEL, "none", chain, threads=1)
    path = folder / "cluster.toml"
    path.write_text(cluster.to_toml())
    with contextlib.ExitStack() as stack:
        children = []
        for node in chain:
            args = ("--role", node.name, "--cluster", str(path), "--control-stdin")
            children.append(child := Child(node.name, "executor.node", args))
            stack.callback(child.close)
            if not child.read_line(120.0).startswith("READY"):
                sys.exit(f"{node.name} did not start: {child.stderr_tail()}")
        yield cluster, children


def measure(cuts: tuple[int, ...], args: argparse.Namespace) -> tuple[list[Counts], list[float]]:
    """One round; returns each client's counts, and MiB each node gained at most."""
    spawn = multiprocessing.get_context("spawn")
    flights = [args.in_flight * (8 if i % 10 == 9 else 1) for i in range(args.clients)]
    with tempfile.TemporaryDirectory() as folder, nodes(Path(folder)) as (cluster, children):
        ready, results = spawn.Barrier(args.processes), spawn.Queue()
        crowds = [
            spawn.Process(
                target=crowd,
                args=(cluster, cuts, flights[p :: args.processes], args.seconds, p, ready, results),
                daemon=True,
            )
            for p in range(args.processes)
        ]
        first = [rss_mib(child.pid) for child in children]
        for one in crowds:
            one.start()
        peak, counts = list(first), []
        while len(counts) < args.clients:
            peak = [max(p, rss_mib(c.pid)) for p, c in zip(peak, children, strict=True)]
            with contextlib.suppress(Exception):
                counts += results.get(timeout=0.5)
            if any(one.exitcode for one in crowds):
                sys.exit("a process of clients failed")
        for one in crowds:
            one.join(60)
    return counts, [p - f for p, f in zip(peak, first, strict=True)]


def main() -> None:
    """Run the rounds; leaves with 1 if one was unfair or a refusal unclear."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=1, help="requests each keeps in flight")
    parser.add_argument("--seconds", type=float, default=30.0, help="per round")
    parser.add_argument("--rounds", nargs="*", default=list(PLANS), choices=list(PLANS))
    args = parser.parse_args()
    failed = []
    for name in args.rounds:
        counts, gained = measure(PLANS[name], args)
        done = sorted(c.get("completed", 0) for c in counts)
        total = collections.Counter[str]()
        for c in counts:
            total.update(c)
        ratio = done[-1] / done[0] if done[0] else float("inf")
        print(
            f"{name:<6} {args.clients} clients: completed {done[0]}..{done[-1]} each "
            f"({sum(done)} in all), max/min {ratio:.2f}; refused {total['refused']}, "
            f"unclear {total['unclear']}, failed {total['failed']}; fog +{gained[0]:.0f} MiB, "
            f"cloud +{gained[1]:.0f} MiB",
            flush=True,
        )
        for reason, n in total.items():
            if reason.startswith("failed:"):
                print(f"   {n} x {reason}")
        if ratio > 1.5 or total["unclear"] or total["failed"]:
            failed.append(name)
    if failed:
        sys.exit(f"not fair, or not clear: {', '.join(failed)}")


if __name__ == "__main__":
    main()
