"""Are the testbed's links what they say? And what do nodes take them for?

    PYTHONPATH=. python benchmarks/links.py                       # the relay's links
    PYTHONPATH=. python benchmarks/links.py --isolation netns     # the kernel's (root)
    PYTHONPATH=. python benchmarks/links.py --estimates           # a node's estimate of its hop

The first two send bare TCP through one hop, with threads of this process and with iperf3 where it
is installed, and exit with 1 if a rate is off by more than 3 %, an added delay by more than 1 ms,
or a step of a trace by more than 200 ms. A rate is of payload bytes, as in scenarios.
"""

from __future__ import annotations

import bisect
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agents.cli import numbers
from env.scenario import Probing
from executor.arguments import Parser
from executor.errors import SplitpilotError
from executor.files import write_json
from executor.hops import Relay, TestbedHop
from executor.netns import add_isolation_argument, check_isolation, open_relay
from executor.shaping import BYTES_PER_MBIT

RATE_OFF, DELAY_OFF_S, STEP_OFF_S = 0.03, 0.001, 0.2
HOLD_S, STEP_S = 3.0, 1.0  # of a stream's first rate, and of each one after
WARM_S = 1.0  # TCP's start, and what the buffers took at once
WINDOW_S = 0.1
TIMEOUT_S = 30.0
DELAYS_S = (0.005, 0.05)
MESSAGES, MESSAGE_BYTES = 30, 64
SHARES = (1.0, 0.5, 1.0, 0.25)  # of the rate, one step each
BUFFER_BYTES = 64 * 1024

Samples = list[tuple[float, int]]
"""When so many bytes had arrived in all."""


@dataclass
class Row:
    """One measurement against what was asked for."""

    mbps: float
    what: str
    tool: str
    asked: float
    measured: float
    off: float
    allowed: float
    unit: str

    @property
    def ok(self) -> bool:
        """Whether it is as near as it must be."""
        return abs(self.off) <= self.allowed


class Site:
    """One hop between two hosts, or two ports of this one."""

    def __init__(self, relay: Relay, reserved: ExitStack) -> None:
        self.relay = relay
        self.port = relay.node_port(reserved)
        self.dial = (relay.dial_host(0), relay.add_hop(self.port, TestbedHop(100.0, 0.0)))

    @contextmanager
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A connection over the hop: its near end and its far end."""
        with ExitStack() as stack:
            with self.relay.inside(1):
                server = stack.enter_context(
                    socket.create_server((self.relay.bind_host, self.port))
                )
            server.settimeout(TIMEOUT_S)
            with self.relay.inside(0):
                near = stack.enter_context(socket.create_connection(self.dial, TIMEOUT_S))
            far = stack.enter_context(server.accept()[0])
            for end in (near, far):
                end.settimeout(TIMEOUT_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            yield near, far


def stream(source: socket.socket, sink: socket.socket, until_s: float) -> Samples:
    """Send as fast as the hop takes it, until then; what arrived when."""
    chunk = bytes(BUFFER_BYTES)

    def send() -> None:
        while time.monotonic() < until_s:
            source.sendall(chunk)
        source.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    samples, total = [(time.monotonic(), 0)], 0
    while data := sink.recv(BUFFER_BYTES):
        total += len(data)
        samples.append((time.monotonic(), total))
    sender.join(TIMEOUT_S)
    return samples


def iperf3(site: Site, seconds: float) -> Samples:
    """The same by iperf3, whose server tells what arrived in every tenth of a second."""
    with site.relay.inside(1):
        server = subprocess.Popen(
            ["iperf3", *f"-s -1 -4 -p {site.port} -i 0.1 -f k --forceflush".split()],
            stdout=subprocess.PIPE,
            text=True,
        )
    with server:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        host, port = site.dial
        command = ["iperf3", "-c", host, "-p", str(port), "-t", f"{seconds:.0f}", "-i", "0"]
        with site.relay.inside(0):
            client = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        samples: Samples = []
        total = 0
        # "[  5]   0.10-0.20   sec  61.1 KBytes  5004 Kbits/sec"
        row = re.compile(r"\]\s+([\d.]+)-([\d.]+)\s+sec\s+\S+ \S+\s+([\d.]+) Kbits/sec\s*$")
        for line in server.stdout:
            match = row.search(line)
            if match is None:
                continue
            begin, end, kbps = map(float, match.groups())
            if end - begin > 1.0:
                continue  # the summary
            now_s = time.monotonic()
            if not samples:
                samples.append((now_s - (end - begin), 0))
            total += round(kbps * 125.0 * (end - begin))
            samples.append((now_s, total))
        client.wait(TIMEOUT_S)
    return samples


def bytes_at(samples: Samples, t_s: float) -> int:
    """Bytes that had arrived by then."""
    k = bisect.bisect_right(samples, (t_s, sys.maxsize))
    return samples[k - 1][1] if k else 0


def rate_mbps(samples: Samples, begin_s: float, end_s: float) -> float:
    """Mean rate between the arrivals nearest to two times."""
    inside = [sample for sample in samples if begin_s <= sample[0] <= end_s]
    (first_s, first), (last_s, last) = inside[0], inside[-1]
    return (last - first) / (last_s - first_s) / BYTES_PER_MBIT


def step_off_s(samples: Samples, step_s: float, before: float, after: float) -> float:
    """How late the rate crossed the middle of two rates (bytes/s); a whole step if it never did."""
    middle = (before + after) / 2.0
    tick_s = 0.005
    for k in range(int(0.9 * STEP_S / tick_s)):
        # Outwards from the step, so that the crossing nearest to it is found.
        for off_s in (k * tick_s, -k * tick_s):
            rates = [
                bytes_at(samples, t + WINDOW_S / 2) - bytes_at(samples, t - WINDOW_S / 2)
                for t in (step_s + off_s - tick_s, step_s + off_s + tick_s)
            ]
            early, late = (rate / WINDOW_S for rate in rates)
            if (early - middle) * (late - middle) <= 0 and (late - early) * (after - before) > 0:
                return off_s
    return STEP_S


def check_stream(
    site: Site, mbps: float, tool: str, run: Callable[[float], Samples]
) -> Iterator[Row]:
    """A rate, then steps; `run` streams for so many seconds."""
    site.relay.set_delay(0, 0.0)
    t0_s = time.monotonic() + HOLD_S
    levels = [mbps * share for share in (*SHARES, 1.0)]
    # The first level holds until t0, being what a trace begins with.
    site.relay.play_rate(0, t0_s - STEP_S, STEP_S, levels)
    samples = run(HOLD_S + STEP_S * (len(levels) - 1))
    measured = rate_mbps(samples, samples[0][0] + WARM_S, t0_s - 0.1)
    yield Row(mbps, "rate", tool, mbps, measured, measured / mbps - 1, RATE_OFF, "Mbit/s")
    worst = 0.0
    for k, (before, after) in enumerate(pairwise(levels)):
        at_s = t0_s + k * STEP_S
        off_s = step_off_s(samples, at_s, before * BYTES_PER_MBIT, after * BYTES_PER_MBIT)
        worst = max(worst, off_s, key=abs)
    yield Row(mbps, f"{len(levels) - 1} steps", tool, 0.0, worst, worst, STEP_OFF_S, "s")


def check_back(site: Site, mbps: float) -> Row:
    """The rate of the way back."""
    site.relay.set_rate(0, mbps)
    with site.pair() as (near, far):
        samples = stream(far, near, time.monotonic() + HOLD_S)
    measured = rate_mbps(samples, samples[0][0] + WARM_S, samples[0][0] + HOLD_S)
    off = measured / mbps - 1
    return Row(mbps, "rate back", "bare TCP", mbps, measured, off, RATE_OFF, "Mbit/s")


def check_delay(site: Site, mbps: float, delay_s: float) -> Row:
    """One-way time of a small message on an idle hop, less its own transmission."""
    site.relay.set_rate(0, mbps)
    site.relay.set_delay(0, delay_s)
    time.sleep(0.1)
    took_s = []
    with site.pair() as (near, far):
        for k in range(MESSAGES):
            source, sink = (near, far) if k % 2 else (far, near)
            begun_s = time.monotonic()
            source.sendall(bytes(MESSAGE_BYTES))
            left = MESSAGE_BYTES
            while left:
                left -= len(sink.recv(left))
            took_s.append(time.monotonic() - begun_s)
            time.sleep(0.01)
    measured = statistics.median(took_s[4:]) - MESSAGE_BYTES / (mbps * BYTES_PER_MBIT)
    off = measured - delay_s
    return Row(mbps, "added delay", "bare TCP", delay_s, measured, off, DELAY_OFF_S, "s")


def check(isolation: str, rates: Sequence[float], tell: Callable[[str], object]) -> list[Row]:
    """Every rate's rows."""
    rows: list[Row] = []
    with ExitStack() as stack:
        relay = open_relay(isolation, ["near", "far"], [1.0, 1.0], [(0, 1)])
        stack.enter_context(relay)
        with ExitStack() as reserved:
            site = Site(relay, reserved)
        for mbps in rates:

            def bare(seconds: float) -> Samples:
                with site.pair() as (near, far):
                    return stream(near, far, time.monotonic() + seconds)

            rows += check_stream(site, mbps, "bare TCP", bare)
            rows.append(check_back(site, mbps))
            rows += [check_delay(site, mbps, delay_s) for delay_s in DELAYS_S]
            if shutil.which("iperf3"):
                rows += check_stream(site, mbps, "iperf3", lambda seconds: iperf3(site, seconds))
            tell(f"{mbps:g} Mbit/s: done")
    return rows


# What nodes take a hop for.

# What a hop plays, by what it is measured by.
TRACES_MBPS = {
    "frames": (40.0, 10.0, 60.0, 20.0, 5.0, 40.0),
    "probes": (40.0, 10.0, 60.0, 2.0, 0.5, 5.0, 40.0),
}
TRACE_STEP_S = 4.0
WITHIN = 0.1


def small_model() -> Any:
    """Takes a photograph's 602 KB, and next to no time."""
    from torch import nn

    conv = nn.Conv2d(3, 4, 7, stride=8)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 9))


def estimates(isolation: str, by: str) -> dict[str, Any]:
    """Play a trace on a hop, and compare a node's estimate with it.

    Args:
        isolation: As `Testbed` takes it.
        by: "frames": production frames, two in flight; "probes": one a second, as large as what
            is known of the hop asks for (`env.scenario.Probing`).
    """
    from executor.model import sample_input
    from executor.plan import Plan
    from executor.testbed import Testbed, TestbedNode

    nodes = (TestbedNode("edge", 1.0, "pi4"), TestbedNode("cloud", 1.0, "server"))
    trace, probing = TRACES_MBPS[by], Probing()
    hops = (TestbedHop(trace[0], 0.005),)
    model = f"{Path(__file__).resolve()}:small_model"
    x, plan = sample_input(0), Plan((0,))
    seen: list[tuple[float, float]] = []
    with (
        Testbed(model, nodes=nodes, hops=hops, isolation=isolation) as testbed,
        testbed.client() as client,
    ):
        client.submit(x, plan).result()
        t0_s = time.monotonic() + 1.0
        end_s = t0_s + TRACE_STEP_S * len(trace)
        testbed.play_rate(0, t0_s, TRACE_STEP_S, trace)

        def work() -> None:
            flight = [client.submit(x, plan) for _ in range(2)] if by == "frames" else []
            while time.monotonic() < end_s:
                if flight:
                    flight.pop(0).result()
                    flight.append(client.submit(x, plan))
                else:
                    begun_s = time.monotonic()
                    known = client.status()[0].hop_bytes_per_s or trace[0] * BYTES_PER_MBIT
                    client.probe(0, int(probing.size_bytes(np.array(known))), 1)
                    time.sleep(max(0.0, begun_s + 1.0 - time.monotonic()))
            for future in flight:
                future.result()

        worker = threading.Thread(target=work)
        worker.start()
        while time.monotonic() < end_s:
            status = client.status().get(0)
            if status is not None and status.hop_bytes_per_s and time.monotonic() >= t0_s:
                seen.append((time.monotonic(), status.hop_bytes_per_s / BYTES_PER_MBIT))
            time.sleep(0.02)
        worker.join(TIMEOUT_S)
    settled, settle_s = [], []
    for k, mbps in enumerate(trace):
        begin_s = t0_s + k * TRACE_STEP_S
        step = [(t - begin_s, e / mbps - 1) for t, e in seen if 0 <= t - begin_s < TRACE_STEP_S]
        settled += [off for t, off in step if t >= TRACE_STEP_S / 2]
        if k:
            outside = [t for t, off in step if abs(off) > WITHIN]
            settle_s.append(max(outside, default=0.0))
    offs = sorted(map(abs, settled))
    return {
        "isolation": isolation,
        "by": by,
        "bias": statistics.median(settled),
        "off_p50": statistics.median(offs),
        "off_p90": offs[int(0.9 * (len(offs) - 1))],
        "settle_s": [round(s, 2) for s in settle_s],
    }


def show_rows(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for name in ("Mbit/s", "what", "with", "asked", "measured", "off", "allowed", ""):
        table.add_column(name, justify="left" if name in ("what", "with", "") else "right")
    for r in rows:
        if r.unit == "Mbit/s":
            cells = [f"{r.asked:g}", f"{r.measured:.2f}", f"{r.off:+.1%}", f"{r.allowed:.0%}"]
        else:
            cells = [f"{1e3 * v:.2f} ms" for v in (r.asked, r.measured, r.off, r.allowed)]
        table.add_row(f"{r.mbps:g}", r.what, r.tool, *cells, "" if r.ok else "MISS")
    return table


def show_estimates(found: list[dict[str, Any]]) -> Table:
    table = Table(title="a node's estimate of its hop")
    for name in ("isolation", "by", "bias", "off, p50", "off, p90", f"s until within {WITHIN:.0%}"):
        table.add_column(name)
    for f in found:
        offs = (f"{f['bias']:+.1%}", f"{f['off_p50']:.1%}", f"{f['off_p90']:.1%}")
        table.add_row(f["isolation"], f["by"], *offs, ", ".join(f"{s:g}" for s in f["settle_s"]))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 1 if a link is not what it says, 2 if it cannot be had."""
    parser = Parser(prog="python benchmarks/links.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mbps", default="5,20,60,200", help="rates, comma-separated")
    parser.add_argument("--estimates", action="store_true", help="compare a node's estimates")
    add_isolation_argument(parser)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    console = Console(width=100)
    try:
        rates = numbers("--mbps", args.mbps, "rates", "5,20")
        check_isolation(args.isolation, testbed=True)
        if args.estimates:
            found = [estimates(args.isolation, by) for by in ("frames", "probes")]
            console.print(show_estimates(found))
            if args.json:
                write_json(args.json, found)
            return 0
        rows = check(args.isolation, rates, console.print)
        title = "the kernel's links" if args.isolation == "netns" else "the relay's links"
        console.print(show_rows(rows, title))
        if not shutil.which("iperf3"):
            console.print("iperf3: skipped, it is not installed (apt-get install iperf3)")
        if args.json:
            write_json(args.json, [{**asdict(r), "ok": r.ok} for r in rows])
    except SplitpilotError as error:
        print(f"links: {error}", file=sys.stderr)
        return 2
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
