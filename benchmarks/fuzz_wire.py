"""Mutated frames against the frame parser and the whole of a node's protocol, without sockets.

python benchmarks/fuzz_wire.py --frames 1000000
python benchmarks/fuzz_wire.py --first 512000 --frames 488000   # the same frames in pieces

Valid frames of every kind are flipped, cut, spliced and overwritten with extreme values, then fed
to edge, fog and cloud cores as a hostile but admitted peer would: nine in ten with their checksums
made right again, because a checksum would keep out every mutant else. Anything but a clean refusal
fails: an exception, more than a second for one frame, a queue that outgrows its bound, or more than
50 MiB of memory gained. A failure prints the frame. At the end it says how many mutants the
checksums stopped, how many what comes behind them, and how many passed as valid.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import logging
import os
import random
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from executor import wire
from executor._compute import FairQueue, Outcome
from executor._json import decode_json, encode_json
from executor._nodecore import CoreConfig, NodeCore
from executor.codec import TRANSFERS, as_float32, encode
from executor.energy import ConstantPowerMeter
from executor.errors import FrameDamaged, WireError
from executor.late import CutTable
from executor.plan import ModelSpec
from executor.wire import (
    Header,
    HopStamp,
    Kind,
    StageStamp,
    array_body,
    array_of,
    attach,
    pack,
    parse,
    payload_of,
    seal,
)

CHUNK = 4096
MAX_GROWTH_BYTES = 50 * 2**20
MAX_FRAME_S = 1.0
HANG_S = 60
# A small model: what the frames say is tested, not what memory copies cost.
SPEC = ModelSpec(
    "toy",
    tuple("abcdef"),
    (192, 400, 96, 96, 48, 48, 40),
    (True, True, False, True, False, True),
    5,
    (2, 4),
)
DIGEST = b"\xab" * 8
MAX_QUEUE = 16
EXTREMES = {
    1: (0, 1, 2, 13, 63, 64, 127, 128, 255),
    2: (0, 1, 6, 7, 63, 64, 0x7FFF, 0xFFFF),
    4: (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1),
    8: (0, 1, 48, 2**20, 64 * 2**20, 64 * 2**20 + 1, 2**63 - 1, 2**63, 2**64 - 1),
}
FLOATS = (float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -0.0, 0.0, -1.0)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 3, 2**63, 10**30, 1e308, -0.5, "", "x" * 3000, [], {}, [[[[]]]],
    {"a": {"a": {}}}, "../../etc/passwd", "__import__('os')", "\x00", "\ud800",
)  # fmt: skip
HOSTILE_JSON = (
    b"[" * 4000, b'{"hop":' * 600, b'{"hop": NaN}', b'{"hop": 1e999}', b'{"hop": ' + b"9" * 3000,
    b"\xff\xfe", b'"', b"{}", b"null", b'{"node":0,"node":{}}', b'{"repeats":1e2,"node":0.0}',
)  # fmt: skip

Message = list[bytes]


def corpus(rng: random.Random) -> Message:
    """A valid message of a random kind."""
    kind = rng.choice(list(Kind))
    if kind is Kind.BEAT:
        return [pack(Header(kind, seq=rng.randint(0, 3)))]
    header = Header(kind, client=bytes([rng.randrange(40)]) * 16, seq=rng.randrange(50))
    header.tries, header.direct = rng.choice((0, 1, 1, 2, 255)), rng.random() < 0.2
    header.clock_s = (rng.random() * 100, rng.random() * 100, rng.random() * 100)
    header.left_s = rng.choice((0.0, 0.01, 1.0, 15.0))
    body: bytes | memoryview | None = None
    if kind in (Kind.INFER, Kind.RESULT):
        i, j = sorted((rng.randint(0, 6), rng.randint(0, 6)))
        header.cuts, header.digest = (i, j), DIGEST
        header.stages = [StageStamp(*(rng.random() for _ in range(4))) for _ in range(3)]
        header.hops = [HopStamp(*(rng.random() for _ in range(3))) for _ in range(2)]
        cut = rng.choice((0, i, j, 6))
        values = np.linspace(-1.0, 1.0, SPEC.cut_bytes[cut] // 4, dtype=np.float32)
        if kind is Kind.INFER and rng.random() < 0.4:
            shaped = values.reshape(1, 2, -1, 1) if rng.random() < 0.7 else values
            body = array_body(header, encode(shaped, rng.choice(TRANSFERS[1:])))
        else:
            body = array_body(header, values)
        if kind is Kind.INFER and rng.random() < 0.3:
            limits = sorted(rng.sample((0.0, 0.1, 1.0, float("inf")), rng.randint(1, 4)))
            rows = tuple((limit_s, rng.randint(0, 6)) for limit_s in limits)
            header.late = (CutTable(rng.choice((1, 1, 2)), rows),)
    elif kind is Kind.PING and rng.random() < 0.5:
        body = array_body(header, np.zeros(rng.choice((1, 100, 5000)), np.uint8))
    elif kind not in (Kind.HELLO, Kind.ACK, Kind.PING, Kind.PONG):
        value: dict[str, Any] = {
            "hop": rng.randint(0, 2), "node": rng.randint(0, 3), "repeats": rng.choice((1, 5, 100)),
            "payload_bytes": rng.choice((1, 1000)), "code": "refused", "reason": "a reason",
            "rtts_s": [0.1, 0.2], "unit_s": [0.1] * 6, "load": 0.5, "every_s": 0.1, "wait_s": 1.0,
        }  # fmt: skip
        if rng.random() < 0.3:
            value[rng.choice(list(value))] = rng.choice(VALUES)
        try:
            body = encode_json(value)
        except (WireError, UnicodeEncodeError):
            body = json.dumps(value).encode()
        if rng.random() < 0.1:
            body = rng.choice(HOSTILE_JSON)
        body = attach(header, body)
    return [pack(header)] if body is None else [pack(header), bytes(body)]


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 4, 8, len(data)))]


def grow(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 8, 56, 1000)))


def extreme(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((1, 2, 4, 8, 9))
    value = (
        struct.pack("<d", rng.choice(FLOATS))
        if size == 9
        else rng.choice(EXTREMES[size]).to_bytes(size, "little")
    )
    start = rng.randrange(max(1, len(data) - len(value) + 1))
    data[start : start + len(value)] = value


def splice(rng: random.Random, data: bytearray) -> None:
    other = rng.choice(corpus(rng))
    at = rng.randrange(min(len(data), len(other)) + 1)
    data[at:] = other[at:]


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip, flip, extreme, extreme, splice, cut, grow,
)  # fmt: skip


def mutate(rng: random.Random) -> Message:
    """A message that a hostile peer might send; one in ten is valid."""
    parts = [bytearray(part) for part in corpus(rng)]
    if rng.random() < 0.9:
        for _ in range(rng.choice((1, 1, 2, 4))):
            # Mostly the header: a body is checked against it, or just numbers.
            part = parts[0] if rng.random() < 0.8 else rng.choice(parts)
            rng.choice(MUTATIONS)(rng, part)
        if rng.random() < 0.05:
            parts = rng.choice(([], parts * 2, parts[::-1], [*parts, bytearray()], parts[:1]))
        reseal(rng, parts)
    return [bytes(part) for part in parts]


def reseal(rng: random.Random, parts: list[bytearray]) -> None:
    """Mostly make the checksums right again: they keep out accidents, not whoever means it."""
    if not parts or len(parts[0]) < wire._CRC.size:
        return
    if len(parts[0]) > wire._FIXED.size and len(parts) == 2 and rng.random() < 0.8:
        at = wire._FIXED.size - wire._CRC.size
        parts[0][at : at + wire._CRC.size] = wire._CRC.pack(zlib.crc32(parts[1]))
    if rng.random() < 0.9:
        parts[0][:] = seal(bytes(parts[0][: -wire._CRC.size]))


class Chain:
    """Edge, fog and cloud cores without sockets, and a compute thread's stand-in for each."""

    def __init__(self) -> None:
        """Start them."""
        self.seen: collections.Counter[str] = collections.Counter()
        self.cores: list[NodeCore] = []
        self.queues: list[FairQueue] = []
        for index in range(3):
            queue = FairQueue(MAX_QUEUE)
            hello = {"name": f"n{index}", "boot": "b"}
            direct = 2 if index == 0 else None
            form = ("int8", "fp16", "float32")[index]
            config = CoreConfig(index, 3, SPEC, DIGEST, MAX_QUEUE, hello, direct, 1e6, form)
            self.queues.append(queue)
            self.cores.append(NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter()))

    def feed(self, rng: random.Random, message: Message, now_s: float) -> None:
        """One message to one core, from either side; then let time and work go on a little."""
        self.seen[parse_all(message)] += 1
        k = rng.randrange(3)
        core, queue = self.cores[k], self.queues[k]
        parts: list[bytes | memoryview] = list(message)
        if k < 2 and rng.random() < 0.4:
            core.on_downstream(parts, now_s, rng.choice(core.links))
        elif k < 2 and rng.random() < 0.01:
            core.on_link(rng.choice(core.links), rng.random() < 0.7, now_s)
        else:
            core.on_upstream(b"peer%d" % rng.randrange(30), parts, now_s)
        if len(queue) and rng.random() < 0.5:
            self._work(core, queue, now_s)
        if rng.random() < 0.05:
            core.tick(now_s)
        for link in core.links:
            if rng.random() < 0.5:
                while link.outbox:
                    assert link.outbox[0] and link.outbox.popleft()
            # Requests, the probe under way, and a ping.
            assert link.backlog_frames <= MAX_QUEUE + 2, "the hop's backlog is over its bound"
            assert len(link.outbox) <= 1200, "the hop's outbox is over its bound"
        assert len(queue) <= MAX_QUEUE, "the queue is over its bound"
        core.up.clear()
        core.acks.clear()

    def _work(self, core: NodeCore, queue: FairQueue, now_s: float) -> None:
        job = queue.get()
        assert job is not None
        if job.profile_repeats:
            core.on_outcome(Outcome(job, now_s, now_s, unit_s=(0.1,) * 6), now_s)
            return
        try:
            as_float32(payload_of(job.header, job.body))
        except WireError as error:
            core.on_outcome(Outcome(job, now_s, now_s, error=str(error)), now_s)
            return
        output = np.zeros(SPEC.cut_bytes[job.stop] // 4, np.float32)
        form = core.config.transfer if job.stop < SPEC.n_units else "float32"
        coded = encode(output, form)
        core.on_outcome(Outcome(job, now_s, now_s + 0.01, 0.01, coded, stop=job.stop), now_s)


def parse_all(message: Message) -> str:
    """The parser alone: a frame, or a `WireError`; returns what came of it."""
    try:
        frame = parse(message)
        if frame.header.affine:
            values = as_float32(payload_of(frame.header, frame.body))
            assert values.shape == frame.header.shape and np.isfinite(values).all()
        elif frame.header.dtype is not None:
            assert array_of(frame.header, frame.body).nbytes == frame.header.body_bytes
        elif frame.body is not None:
            decode_json(frame.body)
        assert parse([pack(frame.header), *message[1:]]).header == frame.header
    except FrameDamaged as error:
        assert str(error)
        return "stopped by checksum or length"
    except WireError as error:
        assert str(error)
        return "refused behind the checksums"
    return "valid"


def run(
    frames: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
    first: int = 0,
) -> tuple[float, collections.Counter[str]]:
    """Feed the frames from number `first` on; returns the slowest one's CPU seconds, and the ends.

    Every `CHUNK` the chain is made anew, with a seed of its own; `first` must be such a beginning.
    """
    chain, now_s, rng, slowest_s = Chain(), 0.0, random.Random(), 0.0
    seen: collections.Counter[str] = collections.Counter()
    for number in range(first, first + frames):
        if number % CHUNK == 0:
            seen += chain.seen
            chain, now_s = Chain(), 0.0
            rng = random.Random(f"{seed}/{number}")
            on_progress(number - first)
        now_s += rng.choice((0.0, 1e-4, 1e-3, 0.05)) if rng.random() < 0.999 else 100.0
        message = mutate(rng)
        begun_s = time.thread_time()
        try:
            chain.feed(rng, message, now_s)
        except Exception:
            print(f"frame {number} of seed {seed}: {[part.hex() for part in message]}")
            raise
        slowest_s = max(slowest_s, time.thread_time() - begun_s)
    return slowest_s, seen + chain.seen


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run and report; leaves with 1 on the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help=f"number of the first ({CHUNK} * n)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.first % CHUNK:
        parser.error(f"--first must be a multiple of {CHUNK}, got {args.first}")
    logging.getLogger("executor").setLevel(logging.CRITICAL)  # each refusal is a line otherwise
    began_s, first, peak = time.monotonic(), 0, 0

    def hung(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {HANG_S} s")

    def progress(done: int) -> None:
        nonlocal first, peak
        signal.alarm(HANG_S)
        gc.collect()
        if done == CHUNK:
            first = rss_bytes()  # imports and caches are there by now
        peak = max(peak, rss_bytes())
        if done % (25 * CHUNK) == 0:
            rate = done / max(1e-9, time.monotonic() - began_s)
            print(f"{done:>9} frames, {rate:,.0f}/s, {peak / 2**20:.0f} MiB", flush=True)

    signal.signal(signal.SIGALRM, hung)
    slowest_s, seen = run(args.frames, args.seed, progress, args.first)
    signal.alarm(0)
    peak = max(peak, rss_bytes())
    growth = peak - (first or peak)
    print(
        f"{args.frames} frames in {time.monotonic() - began_s:.0f} s: no crash, slowest "
        f"{slowest_s * 1e3:.1f} ms; memory +{growth / 2**20:.1f} MiB (bound "
        f"{MAX_GROWTH_BYTES // 2**20}); {', '.join(f'{n} {what}' for what, n in seen.items())}"
    )
    if growth > MAX_GROWTH_BYTES:
        sys.exit("memory grew over its bound")
    if slowest_s > MAX_FRAME_S:
        sys.exit(f"a frame took {slowest_s:.1f} s")


if __name__ == "__main__":
    main()
