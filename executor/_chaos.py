"""The chaos suite's load, the faults it injects, and how long service takes to recover."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from executor.client import Client, Reply, RequestRecord
from executor.errors import RequestError, RequestRefused, RequestTimeout
from executor.plan import Plan
from executor.testbed import Testbed
from executor.wire import Header, Kind, array_body, pack

__all__ = ["FAULTS", "Fault", "Load", "Outcome", "Ticket", "full_disk_problem", "inject"]

SLOW_MBPS = 0.05
FLIP_BYTES = 400_000.0
NORMAL_TIMEOUT_S = 20.0

Pairs = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass
class Ticket:
    """One request of the load and its end; `end` is "" while it has none.

    Attributes:
        plan: The plan asked for.
        submitted_s: When it was submitted.
        ended_s: When it ended.
        end: "completed", "wrong", "refused", "timeout" or "failed".
        ends: How often it ended; anything but 1 is a broken promise.
        record: What it measured, if it completed.
    """

    plan: Plan
    submitted_s: float
    ended_s: float = float("inf")
    end: str = ""
    ends: int = 0
    record: RequestRecord | None = None

    def avoided(self, hop: int) -> bool:
        """Whether it completed without crossing a hop of the chain."""
        if self.record is None:
            return False
        hop_s = self.record.hop_s
        # A direct link's time stands at the last hop it leads past, with nothing before it.
        direct = hop > 0 and hop_s[hop] > 0 and not any(hop_s[:hop])
        return hop_s[hop] == 0 or direct


class Load(threading.Thread):
    """Submits requests open loop, at random moments, and checks every output bit for bit."""

    def __init__(
        self, client: Client, pairs: Pairs, plans: Sequence[Plan], rate_rps: float, seed: int
    ) -> None:
        """Prepare; `start` begins.

        Args:
            client: Connected.
            pairs: Inputs, each with the whole model's output.
            plans: The plans asked for, in turn at random.
            rate_rps: Mean requests per second.
            seed: Of arrivals and plans.
        """
        super().__init__(name="chaos-load", daemon=True)
        self.tickets: list[Ticket] = []
        self.n_units = int(client.nodes[0]["n_units"])
        self._client, self._pairs, self._plans = client, pairs, list(plans)
        self._rate_rps, self._random = rate_rps, random.Random(seed)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Submit until `finish`."""
        due_s = time.monotonic()
        while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self._random.expovariate(self._rate_rps), time.monotonic() - 1.0)
            self._submit()

    def _submit(self) -> None:
        x, expected = self._pairs[len(self.tickets) % len(self._pairs)]
        ticket = Ticket(self._random.choice(self._plans), time.monotonic())
        self.tickets.append(ticket)

        def done(future: Any) -> None:
            error = future.exception()
            ticket.ends += 1
            if error is None:
                reply: Reply = future.result()
                ticket.record = reply.record
                same = np.array_equal(np.asarray(reply.output), expected)
                ticket.end = "completed" if same else "wrong"
            else:
                ticket.end = _kind(error)
            ticket.ended_s = time.monotonic()

        try:
            future = self._client.submit(x, ticket.plan)
        except RequestError as error:
            ticket.ends, ticket.end, ticket.ended_s = 1, _kind(error), time.monotonic()
        else:
            future.add_done_callback(done)

    def finish(self, timeout_s: float) -> None:
        """Submit no more, and wait until all that was submitted has ended."""
        self._stopping.set()
        self.join()
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not all(t.ends for t in self.tickets):
            time.sleep(0.05)

    def first(
        self,
        since_s: float,
        timeout_s: float,
        asks: Callable[[Ticket], bool],
        serves: Callable[[Ticket], bool],
    ) -> tuple[float | None, Ticket | None]:
        """The first completion that `serves`, of a request that `asks`.

        Returns:
            Seconds from `since_s`, or from when the first request that asks came, if later;
            infinite if none was served within `timeout_s`, None if none asked. And the request.
        """
        deadline_s = since_s + timeout_s
        while True:
            asking = [t for t in tuple(self.tickets) if t.ended_s >= since_s and asks(t)]
            if asking:
                asked_s = max(since_s, min(t.submitted_s for t in asking))
                deadline_s = asked_s + timeout_s
                served = [t for t in asking if t.end == "completed" and serves(t)]
                if served:
                    first = min(served, key=lambda t: t.ended_s)
                    return first.ended_s - asked_s, first
            if time.monotonic() > deadline_s:
                return float("inf") if asking else None, None
            time.sleep(0.01)


def _kind(error: BaseException) -> str:
    if isinstance(error, RequestRefused):
        return "refused"
    return "timeout" if isinstance(error, RequestTimeout) else "failed"


@dataclass
class Ground:
    """What a fault works on.

    Attributes:
        testbed: The chain under load.
        client: The client, to look at.
        random: Seeded.
        other_weights: A state dict of other weights.
        digest: The chain's weights.
        input_shape: Shape of the model's input.
    """

    testbed: Testbed
    client: Client
    random: random.Random
    other_weights: Path
    digest: bytes
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong for a while.

    Attributes:
        name: What it is called.
        hop: The hop of the chain that requests cannot cross meanwhile; None where they can, or
            where, the edge being away, there is no way around.
        inject: A context: entering breaks something, leaving mends it. Leaving returns when the
            node serves again.
        seconds: Least and most seconds it lasts.
        wait_s: Seconds from its start for which the first completion around it is waited for.
        fast: Whether the bounds on recovery hold for it: a dead or stopped node, a cut or stalled
            hop.
    """

    name: str
    hop: int | None
    inject: Callable[[Ground], contextlib.AbstractContextManager[None]]
    seconds: tuple[float, float] = (1.5, 4.0)
    wait_s: float = 10.0
    fast: bool = True


@dataclass
class Outcome:
    """What one fault did.

    Attributes:
        name: The fault.
        at_s: When, since the start of the run.
        held_s: For how long.
        around_s: From its start (or the first request after it that wanted to cross it, if none
            was under way) to the first completion that went around it; None where that has no
            meaning.
        normal_s: From its end until the client saw the chain whole, and from the first such request
            after that to the first completion, at the first try, that crossed what was broken. (In
            between nobody asked.) None likewise.
        plan: The plan that went around.
        normal_plan: The plan of the first completion as asked.
        note: What else was seen.
    """

    name: str
    at_s: float
    held_s: float
    around_s: float | None = None
    normal_s: float | None = None
    plan: tuple[int, ...] | None = None
    normal_plan: tuple[int, ...] | None = None
    note: str = ""
    problems: list[str] = field(default_factory=list)


def inject(fault: Fault, ground: Ground, load: Load, start_s: float) -> Outcome:
    """Let a fault happen under load, mend it, and time both."""
    hop = fault.hop
    outcome = Outcome(fault.name, 0.0, 0.0)
    hold_s = ground.random.uniform(*fault.seconds)
    refused_before = ground.client.counts.refused_nodes
    with fault.inject(ground):
        struck_s = time.monotonic()
        outcome.at_s = struck_s - start_s
        if hop is not None and fault.fast:
            outcome.around_s, first = load.first(
                struck_s,
                fault.wait_s,
                # One that had crossed it already says nothing.
                lambda t: _crosses(t, hop, load) and (t.end != "completed" or t.avoided(hop)),
                lambda t: t.avoided(hop),
            )
            record = first.record if first is not None else None
            outcome.plan = record.plan if record is not None else None
        time.sleep(max(0.0, struck_s + hold_s - time.monotonic()))
        if fault.name.startswith("other weights"):
            refused = ground.client.counts.refused_nodes - refused_before
            outcome.note = f"refused {refused}"
            if not refused:
                outcome.problems.append("a node with other weights was not refused")
            used = [
                t
                for t in tuple(load.tickets)
                if t.submitted_s > struck_s and t.record and t.record.stage_s[1] > 0
            ]
            if used:
                outcome.problems.append(f"a node with other weights was used {len(used)} times")
    mended_s = time.monotonic()
    outcome.held_s = mended_s - struck_s
    # After every fault, so that none is charged with what the one before it left waiting.
    whole_s = _until_whole(ground.client, mended_s + NORMAL_TIMEOUT_S)
    normal_s, first = load.first(
        whole_s,
        NORMAL_TIMEOUT_S,
        lambda t: t.submitted_s >= whole_s and (hop is None or _crosses(t, hop, load)),
        lambda t: _as_asked(t) and (hop is None or not t.avoided(hop)),
    )
    outcome.normal_s = None if normal_s is None else whole_s - mended_s + normal_s
    outcome.normal_plan = first.plan.cuts if first is not None else None
    return outcome


def _until_whole(client: Client, until_s: float) -> float:
    """Wait until the client sees every node and hop up; returns when that was, or `until_s`."""
    while (now_s := time.monotonic()) < until_s:
        nodes = client.status().values()
        if not any(node.down for node in nodes) and all(n.hop_up is not False for n in nodes):
            return now_s
        time.sleep(0.01)
    return until_s


def _crosses(ticket: Ticket, hop: int, load: Load) -> bool:
    """Whether a request wants to cross a hop."""
    return ticket.plan.last_node(load.n_units) > hop


def _as_asked(ticket: Ticket) -> bool:
    record = ticket.record
    return record is not None and record.tries == 1 and record.plan == ticket.plan.cuts


@contextlib.contextmanager
def _kill(ground: Ground, node: str) -> Iterator[None]:
    ground.testbed.kill(node)
    yield
    ground.testbed.restart(node)


@contextlib.contextmanager
def _stop(ground: Ground, node: str) -> Iterator[None]:
    ground.testbed.pause(node)
    yield
    ground.testbed.resume(node)


@contextlib.contextmanager
def _cut(ground: Ground, hop: int) -> Iterator[None]:
    ground.testbed.set_cut(hop, True)
    yield
    ground.testbed.set_cut(hop, False)


@contextlib.contextmanager
def _rate(ground: Ground, hop: int, mbps: float) -> Iterator[None]:
    ground.testbed.play_rate(hop, time.monotonic(), 1.0, [mbps])
    yield
    ground.testbed.set_rate(hop, ground.testbed.hops[hop].mbps)


@contextlib.contextmanager
def _flip(ground: Ground, hop: int) -> Iterator[None]:
    ground.testbed.set_flips(hop, FLIP_BYTES)
    yield
    ground.testbed.set_flips(hop, 0.0)


@contextlib.contextmanager
def _other_weights(ground: Ground, node: str) -> Iterator[None]:
    ground.testbed.kill(node)
    ground.testbed.restart(node, str(ground.other_weights))
    yield
    ground.testbed.kill(node)
    ground.testbed.restart(node)


@contextlib.contextmanager
def _strangers(ground: Ground) -> Iterator[None]:
    """Garbage, truncated and damaged frames, from peers that come and go."""
    for node in ground.testbed.cluster.nodes:
        send_garbage(ground, node.name, 20)
    yield


@contextlib.contextmanager
def _full_disk(ground: Ground, node: str) -> Iterator[None]:
    """The node cannot write its log any more, and is given reasons to."""
    ground.testbed.limit_files(node, 1)
    send_garbage(ground, node, 20)
    yield
    ground.testbed.limit_files(node, -1)


def send_garbage(ground: Ground, node: str, count: int) -> None:
    """Send a node what no neighbour would: bytes over TCP, and bad frames over ZeroMQ."""
    with ground.testbed.inside():
        _send_garbage(ground, *ground.testbed.address(node), count)


def _send_garbage(ground: Ground, host: str, port: int, count: int) -> None:
    rng = ground.random
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0) as raw:
        raw.sendall(rng.randbytes(rng.randrange(1, 4000)))
    header = Header(Kind.INFER, client=rng.randbytes(16), seq=1, cuts=(0, 0), digest=ground.digest)
    body = bytes(array_body(header, np.zeros(ground.input_shape, np.float32)))
    good = pack(header)
    with zmq.Context() as ctx, ctx.socket(zmq.DEALER) as peer:
        peer.linger = 1000
        peer.connect(f"tcp://{host}:{port}")
        for _ in range(count):
            bad, place = bytearray(good), rng.randrange(len(good))
            bad[place] ^= 1 << rng.randrange(8)
            damaged = bytearray(body)
            damaged[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            peer.send_multipart(
                rng.choice(
                    (
                        [bytes(bad), body],
                        [good, bytes(damaged)],
                        [good, body[: rng.randrange(len(body))]],
                        [good[:place]],
                        [good, b"", b""],
                        [rng.randbytes(rng.randrange(1, 400))],
                    )
                )
            )


FAULTS = (
    Fault("kill fog", 0, lambda g: _kill(g, "fog")),
    Fault("kill cloud", 1, lambda g: _kill(g, "cloud")),
    Fault("stop fog", 0, lambda g: _stop(g, "fog")),
    Fault("stop cloud", 1, lambda g: _stop(g, "cloud")),
    Fault("cut hop 0", 0, lambda g: _cut(g, 0)),
    Fault("cut hop 1", 1, lambda g: _cut(g, 1)),
    Fault("stall hop 0", 0, lambda g: _rate(g, 0, 0.0)),
    Fault("stall hop 1", 1, lambda g: _rate(g, 1, 0.0)),
    Fault("slow hop 0", 0, lambda g: _rate(g, 0, SLOW_MBPS), fast=False),
    Fault("slow hop 1", 1, lambda g: _rate(g, 1, SLOW_MBPS), fast=False),
    Fault("flip bits on hop 0", 0, lambda g: _flip(g, 0), fast=False),
    Fault("flip bits on hop 1", 1, lambda g: _flip(g, 1), fast=False),
    Fault("other weights on fog", 0, lambda g: _other_weights(g, "fog"), fast=False),
    Fault("late clock on edge", None, lambda g: _stop(g, "edge"), (0.5, 2.0)),
    Fault("kill edge", None, lambda g: _kill(g, "edge"), (0.5, 2.0)),
    Fault("strangers", None, _strangers),
    Fault("full disk for fog's log", None, lambda g: _full_disk(g, "fog")),
)

_DISK_TRIAL = """
import resource, sys
from pathlib import Path
from executor.errors import ConfigError
from executor.files import write_atomic
path = Path(sys.argv[1])
write_atomic(path, b"old" * 100)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
try:
    write_atomic(path, b"new" * 100_000)
except ConfigError:
    pass
else:
    sys.exit("writing over the limit raised nothing")
if path.read_bytes() != b"old" * 100:
    sys.exit("the old file was damaged")
left = [p.name for p in path.parent.iterdir() if p != path]
if left:
    sys.exit(f"left behind: {left}")
"""


def full_disk_problem(folder: Path) -> str:
    """Write a checkpoint's file where the disk is full, in a child; "" if it does as promised.

    The promise: an error is raised, the old file is whole, nothing else is left behind.
    """
    root = Path(__file__).resolve().parent.parent
    trial = subprocess.run(
        [sys.executable, "-c", _DISK_TRIAL, str(folder / "policy.npz")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = trial.stderr.strip().splitlines()
    return "" if trial.returncode == 0 else (lines[-1] if lines else f"code {trial.returncode}")
