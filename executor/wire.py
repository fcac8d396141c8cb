"""Frames: what one node says to the next, and what is refused.

A message has one or two parts: a fixed-layout header, then the body (a tensor's bytes, or a small
JSON object). Nothing is pickled, every size is bounded, and whatever the bytes are, reading them
gives a frame or a `WireError`. Header and body each carry a CRC-32, because TCP's checksum does not
cover what a relay or a machine between two connections does to the bytes; a wrong one is
`FrameDamaged`. (It finds accidents, not forgeries: those are for CURVE.)

Header, little-endian:

    magic "SPLT", version, kind, dtype code, number of dims, number of cuts (u16), try, flags
    request id: client uuid (16 bytes), sequence number (u64); model digest (8 bytes)
    shape (8 x u32, unused ones 0); three clock readings (f64); seconds left to answer in (f64)
    body length (u64), body CRC (u32)
    then the plan's cuts (u16 each)
    then, for INFER and RESULT: 4 f64 per node (`StageStamp`) and 3 f64 per hop (`HopStamp`)
    then, for INFER with that flag: the cut tables (`executor.late`)
    then the CRC of all that (u32)

A BEAT, which comes ten times a second, is shorter: magic, version, kind, node (u16), CRC.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor._checksum import crc32
from executor._json import MAX_JSON_BYTES
from executor.codec import Affine, coded_bytes
from executor.errors import FrameDamaged, WireError
from executor.late import CutTable, pack_tables, parse_tables

__all__ = [
    "MAX_BODY_BYTES",
    "NO_CLIENT",
    "NO_DIGEST",
    "Frame",
    "Header",
    "HopStamp",
    "Kind",
    "StageStamp",
    "array_body",
    "array_of",
    "attach",
    "check_body",
    "message",
    "pack",
    "parse",
    "parse_header",
    "payload_of",
    "seal",
]

VERSION = 4
MAX_BODY_BYTES = 64 * 2**20
MAX_CUTS = 63
MAX_DIMS = 8
MAX_TRY = 255
NO_CLIENT = bytes(16)
NO_DIGEST = bytes(8)

_MAGIC = b"SPLT"
_FIXED = struct.Struct("<4sBBBBHBB16sQ8s8I4dQI")
_CRC = struct.Struct("<I")
_BEAT = struct.Struct("<4sBBH")
_DIRECT, _LATE = 1, 2  # the flags
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    3: np.dtype("<f8"),
    4: np.dtype("u1"),
    5: np.dtype("i1"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_AFFINE = 8  # the dtype code of bodies that begin with their scales


class Kind(IntEnum):
    """What a frame is for. Requests go down the chain, the rest comes back up."""

    HELLO = 1
    HELLO_REPLY = 2
    INFER = 3
    RESULT = 4
    ERROR = 5
    ACK = 6
    STATUS = 7
    PING = 8
    PONG = 9
    PROBE = 10
    PROBE_REPLY = 11
    PROFILE = 12
    PROFILE_REPLY = 13
    BEAT = 14  # the last STATUS of node `seq` still holds


_STAMPED = frozenset({Kind.INFER, Kind.RESULT})
_KINDS = {kind.value: kind for kind in Kind}


class StageStamp(NamedTuple):
    """One node's part of a request; all 0 where the request did not come by.

    Attributes:
        arrive_s: When the whole frame was there (the node's clock; the reader's after conversion).
        start_s: When its compute began; 0 if the node only relayed.
        end_s: When its compute ended; 0 if the node only relayed.
        work_s: Unloaded seconds of work that the compute was.
    """

    arrive_s: float = 0.0
    start_s: float = 0.0
    end_s: float = 0.0
    work_s: float = 0.0


class HopStamp(NamedTuple):
    """One hop's part of a request; all 0 where it was not crossed.

    Attributes:
        sent_s: When the sender handed the frame to the hop.
        received_s: When the receiver had all of it.
        free_s: When the hop could first have delivered: the receiver fills in when the frame
            before was there; on the way back the sender raises it to sent + one-way delay.
    """

    sent_s: float = 0.0
    received_s: float = 0.0
    free_s: float = 0.0


@dataclass(slots=True)
class Header:
    """A frame's header.

    Attributes:
        kind: What the frame is for.
        client: The asking client's uuid, 16 bytes.
        seq: The client's sequence number; with `client` the request's id.
        cuts: The plan, one cut per hop; empty for frames that follow none.
        digest: First 8 bytes of the weights' digest.
        dtype: The body's dtype; None for JSON or no body.
        shape: The body's shape; empty for JSON or no body.
        affine: Whether the body is an activation as int8, scales first (`executor.codec`); its
            dtype is then u1, and its shape the activation's (INFER only).
        body_bytes: The body's length; 0 means that there is no body part.
        body_crc: CRC-32 of the body, 0 without one; a relay passes it on as it came.
        tries: Which sending of the request this is, from 1; 0 for what is not sent again.
        direct: Whether to take a direct link past nodes that the plan leaves empty.
        clock_s: Readings for the clock exchange: sender's send, receiver's receipt and reply.
        left_s: Seconds from its sending on after which nobody waits for the answer any more; 0
            where that is not said. As a duration, because no two nodes have the same clock; so the
            time on the hop itself is not taken off.
        stages: Per node, N values (INFER and RESULT only).
        hops: Per hop, N - 1 values (INFER and RESULT only).
        late: From what nodes may pick another cut than the plan's (INFER only).
    """

    kind: Kind
    client: bytes = NO_CLIENT
    seq: int = 0
    cuts: tuple[int, ...] = ()
    digest: bytes = NO_DIGEST
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    body_bytes: int = 0
    body_crc: int = 0
    tries: int = 0
    direct: bool = False
    clock_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    left_s: float = 0.0
    stages: list[StageStamp] = field(default_factory=list)
    hops: list[HopStamp] = field(default_factory=list)
    late: tuple[CutTable, ...] = ()
    affine: bool = False

    def reply(self, kind: Kind) -> Header:
        """An empty header of `kind` with this request's id and try."""
        return Header(kind, client=self.client, seq=self.seq, tries=self.tries)


@dataclass(frozen=True, slots=True)
class Frame:
    """A header and its body, both checked."""

    header: Header
    body: memoryview | None


def pack(header: Header) -> bytes:
    """The header's bytes.

    Raises:
        WireError: A value has no place in the layout.
    """
    if header.kind is Kind.BEAT:
        return _pack_beat(header)
    dims = header.shape + (0,) * (MAX_DIMS - len(header.shape))
    code = 0
    if header.affine:
        code = _AFFINE
    elif header.dtype is not None:
        code = _DTYPE_CODES.get(header.dtype, 0)
        if not code:
            raise WireError(f"dtype {header.dtype} cannot be sent; use float32")
    n = len(header.cuts)
    stages: Sequence[StageStamp] = ()
    hops: Sequence[HopStamp] = ()
    stamped = header.kind in _STAMPED
    if stamped:
        stages = header.stages or [StageStamp()] * (n + 1)
        hops = header.hops or [HopStamp()] * n
        if len(stages) != n + 1 or len(hops) != n:
            raise WireError(f"{n} cuts need {n + 1} stage stamps and {n} hop stamps")
    try:
        data = _FIXED.pack(
            _MAGIC,
            VERSION,
            header.kind,
            code,
            len(header.shape),
            n,
            header.tries,
            (_DIRECT if header.direct else 0) | (_LATE if header.late else 0),
            header.client,
            header.seq,
            header.digest,
            *dims,
            *header.clock_s,
            header.left_s,
            header.body_bytes,
            header.body_crc,
        ) + _rest(n, stamped).pack(
            *header.cuts, *chain.from_iterable(stages), *chain.from_iterable(hops)
        )
    except struct.error as error:
        raise WireError(f"header does not fit the wire's layout: {error}") from error
    if header.late:
        if header.kind is not Kind.INFER:
            raise WireError(f"only an INFER carries cut tables, not a {header.kind.name}")
        data += pack_tables(header.late)
    return seal(data)


def _pack_beat(header: Header) -> bytes:
    if header != Header(Kind.BEAT, seq=header.seq) or not 0 <= header.seq <= MAX_CUTS:
        raise WireError(f"a BEAT carries a node of 0 to {MAX_CUTS}, and nothing else")
    return seal(_BEAT.pack(_MAGIC, VERSION, header.kind, header.seq))


@functools.lru_cache(maxsize=2 * MAX_CUTS)
def _rest(n_cuts: int, stamped: bool) -> struct.Struct:
    """The layout of what follows the fixed part: cuts, then stamps where there are any."""
    n_values = 4 * (n_cuts + 1) + 3 * n_cuts if stamped else 0
    return struct.Struct(f"<{n_cuts}H{n_values}d")


def seal(data: bytes) -> bytes:
    """A header's bytes with their CRC behind them."""
    return data + _CRC.pack(crc32(data))


def parse_header(data: bytes | memoryview) -> Header:
    """Read a header.

    Raises:
        WireError: The bytes are no header of this version; names the field.
        FrameDamaged: They were one, but changed on their way.
    """
    if len(data) == _BEAT.size + _CRC.size:
        return _parse_beat(data)
    least = _FIXED.size + _CRC.size
    if len(data) < least:
        raise WireError(f"header needs at least {least} bytes, got {len(data)}")
    (
        magic,
        version,
        kind_code,
        dtype_code,
        n_dims,
        n_cuts,
        tries,
        flags,
        client,
        seq,
        digest,
        *dims_clock,
        left_s,
        body_bytes,
        body_crc,
    ) = _FIXED.unpack_from(data)
    _check_seal(data, magic, version)
    if flags & ~(_DIRECT | _LATE):
        raise WireError(f"unknown header flags {flags:#x}")
    kind = _KINDS.get(kind_code)
    if kind is None or kind is Kind.BEAT:
        raise WireError(f"no frame of this length is of kind {kind_code}")
    clock_s = tuple(dims_clock[MAX_DIMS:])
    if not all(map(math.isfinite, clock_s)):
        raise WireError(f"clock readings must be finite, got {clock_s}")
    if not 0.0 <= left_s < math.inf:
        raise WireError(f"seconds left must be finite and not negative, got {left_s}")
    header = Header(
        kind,
        client,
        seq,
        digest=digest,
        body_bytes=body_bytes,
        body_crc=body_crc,
        tries=tries,
        direct=bool(flags & _DIRECT),
        clock_s=clock_s,
        left_s=left_s,
    )
    _parse_shape(header, dtype_code, n_dims, dims_clock[:MAX_DIMS])
    _parse_plan(header, n_cuts, data, bool(flags & _LATE))
    return header


def _parse_beat(data: bytes | memoryview) -> Header:
    magic, version, kind_code, node = _BEAT.unpack_from(data)
    _check_seal(data, magic, version)
    if kind_code != Kind.BEAT or node > MAX_CUTS:
        raise WireError(f"a frame of {len(data)} bytes is a node's BEAT, got {kind_code}, {node}")
    return Header(Kind.BEAT, seq=node)


def _check_seal(data: bytes | memoryview, magic: bytes, version: int) -> None:
    """Hold a header against what all begin and end with."""
    if magic != _MAGIC:
        raise WireError(f"expected magic {_MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise WireError(f"expected wire version {VERSION}, got {version}; update the older side")
    if crc32(data[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
        raise FrameDamaged(f"the header's checksum is wrong ({len(data)} bytes)")


def _parse_shape(header: Header, code: int, n_dims: int, dims: Sequence[int]) -> None:
    """Fill in dtype and shape, and hold the body's length against them."""
    length = header.body_bytes
    if length > MAX_BODY_BYTES:
        raise WireError(f"body of {length} bytes is over the bound of {MAX_BODY_BYTES}")
    if code == 0:
        if n_dims or any(dims):
            raise WireError(f"a frame without a dtype has no shape, got {n_dims} dims")
        if length > MAX_JSON_BYTES:
            raise WireError(f"JSON body of {length} bytes is over the bound of {MAX_JSON_BYTES}")
        return
    affine = code == _AFFINE
    dtype = _DTYPES[4] if affine else _DTYPES.get(code)
    if dtype is None:
        raise WireError(f"unknown dtype code {code}")
    if affine and header.kind is not Kind.INFER:
        raise WireError(f"only an INFER carries an int8 activation, not a {header.kind.name}")
    if not 1 <= n_dims <= MAX_DIMS or min(dims[:n_dims]) < 1 or any(dims[n_dims:]):
        raise WireError(f"expected 1..{MAX_DIMS} positive dims, got {n_dims} of {list(dims)}")
    size = math.prod(dims[:n_dims]) * dtype.itemsize
    expected = coded_bytes("int8", dims[:n_dims]) if affine else size
    if expected != length:
        raise WireError(f"shape {dims[:n_dims]} of {dtype} is {expected} bytes, header: {length}")
    header.dtype, header.affine = dtype, affine
    header.shape = tuple(dims[:n_dims])


def _parse_plan(header: Header, n_cuts: int, data: bytes | memoryview, late: bool) -> None:
    """Fill in the cuts, stamps and cut tables from what follows the fixed part."""
    if n_cuts > MAX_CUTS:
        raise WireError(f"a plan has at most {MAX_CUTS} cuts, got {n_cuts}")
    rest = _rest(n_cuts, header.kind in _STAMPED)
    expected = _FIXED.size + rest.size + _CRC.size
    if late:
        if header.kind is not Kind.INFER:
            raise WireError(f"only an INFER carries cut tables, not a {header.kind.name}")
        header.late = parse_tables(data[expected - _CRC.size : len(data) - _CRC.size])
    elif len(data) != expected:
        raise WireError(f"header with {n_cuts} cuts is {expected} bytes, got {len(data)}")
    values = rest.unpack_from(data, _FIXED.size)
    header.cuts, stamps = values[:n_cuts], values[n_cuts:]
    if stamps:
        if not all(map(math.isfinite, stamps)):
            raise WireError("timestamps must be finite")
        of_stage, of_hop = iter(stamps[: 4 * (n_cuts + 1)]), iter(stamps[4 * (n_cuts + 1) :])
        header.stages = list(map(StageStamp, of_stage, of_stage, of_stage, of_stage))
        header.hops = list(map(HopStamp, of_hop, of_hop, of_hop))


def check_body(header: Header, body: memoryview | None) -> None:
    """Hold a body against its header.

    Raises:
        FrameDamaged: The length or the checksum is not what the header says.
    """
    _check_length(header, body)
    if body is not None and crc32(body) != header.body_crc:
        raise FrameDamaged(f"the checksum of {body.nbytes} bytes of body is wrong")


def _check_length(header: Header, body: memoryview | None) -> None:
    got = 0 if body is None else body.nbytes
    if got != header.body_bytes:
        raise FrameDamaged(f"body is {got} bytes, the header says {header.body_bytes}")


def message(header: Header, body: memoryview | None) -> list[bytes | memoryview]:
    """The parts of a message, of which the header describes the body already."""
    return [pack(header)] if body is None else [pack(header), body]


def parse(parts: Sequence[bytes | memoryview]) -> Frame:
    """Read a whole message.

    Args:
        parts: One part (header) or two (header, body).

    Raises:
        WireError: Wrong number of parts, or a part that cannot be accepted.
    """
    if len(parts) not in (1, 2):
        raise WireError(f"a message has 1 or 2 parts, got {len(parts)}")
    header = parse_header(parts[0])
    body = memoryview(parts[1]) if len(parts) == 2 else None
    check_body(header, body)
    return Frame(header, body)


def attach(header: Header, body: bytes | memoryview) -> memoryview:
    """Write a body's length and checksum into its header; returns the body."""
    view = memoryview(body)
    header.body_bytes, header.body_crc = view.nbytes, crc32(view)
    return view


def array_body(header: Header, array: NDArray[Any] | Affine) -> memoryview:
    """Describe `array` in the header and give its bytes, without copying if it is contiguous.

    Describing it takes its checksum (2 GB/s on one core of a 2020s x86 machine, 7 GB/s by ISA-L).

    The view keeps the array alive; nothing may write to the array until the view is sent.
    """
    header.affine = isinstance(array, Affine)
    values = array.body if isinstance(array, Affine) else array
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    header.dtype, header.shape = values.dtype, array.shape
    return attach(header, values.data.cast("B"))


def array_of(header: Header, body: memoryview | None) -> NDArray[Any]:
    """The body as a writable array of the header's dtype and shape.

    It shares the body's memory where that is writable and aligned (ZeroMQ hands small bodies out
    at any offset), else it is a copy.

    Raises:
        WireError: The header describes no plain tensor, or the body does not fit it.
    """
    if header.dtype is None or body is None or header.affine:
        got = "int8 with scales" if header.affine else "none"
        raise WireError(f"expected a plain tensor body, got {got}")
    _check_length(header, body)
    array = np.frombuffer(body, header.dtype).reshape(header.shape)
    if not (array.flags.writeable and array.flags.aligned):
        array = array.copy()
    return array


def payload_of(header: Header, body: memoryview | None) -> NDArray[Any] | Affine:
    """The body in the form it crossed the hop in (`executor.codec.as_float32` reads any).

    Raises:
        WireError: As `array_of`.
    """
    if not header.affine or body is None:
        return array_of(header, body)
    _check_length(header, body)
    return Affine(np.frombuffer(body, np.uint8), header.shape)
