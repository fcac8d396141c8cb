"""Frames survive the wire, and whatever else comes over it is a WireError."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor._json import decode_json, encode_json
from executor.errors import FrameDamaged, WireError
from executor.wire import (
    MAX_BODY_BYTES,
    Frame,
    Header,
    HopStamp,
    Kind,
    StageStamp,
    array_body,
    array_of,
    pack,
    parse,
    parse_header,
    seal,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
CUTS = st.lists(st.integers(0, 65535), max_size=5).map(tuple)


def infer(shape=(1, 3, 4, 4), cuts=(2, 5)):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    header = Header(Kind.INFER, client=b"c" * 16, seq=7, cuts=cuts, digest=b"d" * 8)
    body = array_body(header, array)
    return header, body, array


def test_a_tensor_frame_round_trips():
    header, body, array = infer()
    header.stages = [StageStamp(1.0, 2.0, 3.0, 0.5), StageStamp(), StageStamp(4.0)]
    header.hops = [HopStamp(3.0, 4.0, 3.5), HopStamp()]
    frame = parse([pack(header), body])
    assert frame.header == header
    assert np.array_equal(array_of(frame.header, frame.body), array)


@given(
    kind=st.sampled_from(sorted(set(Kind) - {Kind.BEAT})),
    client=st.binary(min_size=16, max_size=16),
    seq=st.integers(0, 2**64 - 1),
    cuts=CUTS,
    clock=st.tuples(FINITE, FINITE, FINITE),
    left_s=st.floats(0.0, allow_nan=False, allow_infinity=False),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_any_header_round_trips(kind, client, seq, cuts, clock, left_s, data):
    header = Header(kind, client=client, seq=seq, cuts=cuts, clock_s=clock)
    header.left_s = left_s
    if kind in (Kind.INFER, Kind.RESULT):
        four, three = st.tuples(*[FINITE] * 4), st.tuples(*[FINITE] * 3)
        header.stages = [StageStamp(*data.draw(four)) for _ in range(len(cuts) + 1)]
        header.hops = [HopStamp(*data.draw(three)) for _ in cuts]
    assert parse_header(pack(header)) == header


@given(st.integers(0, 63))
def test_a_beat_is_a_node_and_little_more(node):
    beat = pack(Header(Kind.BEAT, seq=node))
    assert len(beat) == 12 and parse_header(beat) == Header(Kind.BEAT, seq=node)
    with pytest.raises(FrameDamaged, match="checksum"):
        parse_header(beat[:6] + bytes([beat[6] ^ 1]) + beat[7:])
    for code, value in ((Kind.BEAT, 64), (Kind.PING, node), (0, node)):
        with pytest.raises(WireError, match="a frame of 12 bytes is a node's BEAT"):
            parse_header(seal(beat[:5] + bytes([code, value, 0])))
    with pytest.raises(WireError, match=f"no frame of this length is of kind {Kind.BEAT}"):
        parse_header(seal(b"".join((beat[:5], beat[5:6], pack(Header(Kind.PING))[6:-4]))))
    for wrong in (Header(Kind.BEAT, seq=64), Header(Kind.BEAT, tries=1)):
        with pytest.raises(WireError, match="a BEAT carries a node of 0 to 63, and nothing else"):
            pack(wrong)


@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut_at=st.integers(0, 400),
    extra=st.binary(max_size=20),
    body_change=st.integers(-4, 4),
    sealed=st.booleans(),
)
@settings(deadline=None, max_examples=600)
def test_mutated_bytes_give_a_frame_or_a_wire_error(edits, cut_at, extra, body_change, sealed):
    header, body, _ = infer()
    raw = bytearray(pack(header))
    for position, value in edits:
        raw[position % len(raw)] = value
    raw = raw[:cut_at] + extra if cut_at < len(raw) else raw + extra
    if sealed:  # as a peer would that means to do harm: the checksum stops it no more
        raw = seal(bytes(raw[:-4]))
    data = bytes(body)[: len(body) + min(body_change, 0)] + bytes(max(body_change, 0))
    try:
        frame = parse([bytes(raw), data])
        assert isinstance(frame, Frame)
        if frame.header.dtype is not None:
            assert array_of(frame.header, frame.body).shape == frame.header.shape
    except WireError as error:
        assert str(error)


@given(parts=st.lists(st.binary(max_size=300), max_size=3))
@settings(deadline=None, max_examples=200)
def test_random_bytes_give_a_frame_or_a_wire_error(parts):
    try:
        parse(parts)
    except WireError as error:
        assert str(error)


@given(body=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(deadline=None, max_examples=200)
def test_a_json_body_is_an_object_or_a_wire_error(body):
    try:
        assert isinstance(decode_json(body), dict)
    except WireError as error:
        assert str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"[1]",
        b"1" * 5000,
        b"",
        None,
        b'{"a": %s}' % (b"1" * 40),
    ],
)
def test_hostile_json_is_refused(body):
    with pytest.raises(WireError):
        decode_json(body)


def test_json_round_trips_and_refuses_nan():
    assert decode_json(encode_json({"a": [1, 2.5, None, "x"]})) == {"a": [1, 2.5, None, "x"]}
    with pytest.raises(WireError):
        encode_json({"a": float("nan")})
    with pytest.raises(WireError):
        encode_json({"a": "x" * 2**20})


def test_errors_name_the_field():
    raw = bytearray(pack(infer()[0]))
    with pytest.raises(WireError, match="magic"):
        parse_header(b"NOPE" + bytes(raw[4:]))
    raw[4] = 9
    with pytest.raises(WireError, match="wire version 4, got 9"):
        parse_header(bytes(raw))
    with pytest.raises(WireError, match="1 or 2 parts, got 3"):
        parse([b"", b"", b""])
    with pytest.raises(WireError, match="needs at least"):
        parse([b"SPLT"])


def test_sizes_are_bounded_before_anything_is_allocated():
    header, _, _ = infer()
    header.shape, header.body_bytes = (2**31, 2**31, 1, 1), 2**64 - 1
    with pytest.raises(WireError, match="bound"):
        parse_header(pack(header))
    header.body_bytes = MAX_BODY_BYTES
    with pytest.raises(WireError, match="shape"):
        parse_header(pack(header))


def test_body_must_match_the_header():
    header, body, _ = infer()
    with pytest.raises(WireError, match="body is 188 bytes, the header says 192"):
        parse([pack(header), body[:-4]])
    with pytest.raises(WireError, match="body is 0 bytes"):
        parse([pack(header)])


@given(position=st.integers(0, 2**20), bit=st.integers(0, 7), in_body=st.booleans())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_is_damage(position, bit, in_body):
    header, body, _ = infer()
    parts = [bytearray(pack(header)), bytearray(body)]
    part = parts[in_body]
    part[position % len(part)] ^= 1 << bit
    with pytest.raises(WireError) as caught:
        parse([bytes(part) for part in parts])
    plain = not in_body and position % len(part) < 5  # the magic and version are read first
    assert plain or isinstance(caught.value, FrameDamaged)


def test_the_try_and_the_way_are_in_the_header():
    header, body, _ = infer()
    header.tries, header.direct = 3, True
    got = parse([pack(header), body]).header
    assert (got.tries, got.direct, got.body_crc) == (3, True, header.body_crc)
    assert header.reply(Kind.ERROR).tries == 3
    raw = bytearray(pack(header))
    raw[11] = 0x80
    with pytest.raises(WireError, match="flags"):
        parse_header(seal(bytes(raw[:-4])))


def test_timestamps_must_be_finite():
    header = infer()[0]
    header.hops = [HopStamp(), HopStamp(free_s=float("nan"))]
    with pytest.raises(WireError, match="finite"):
        parse_header(pack(header))


def test_what_has_no_place_in_the_layout_is_not_packed():
    for bad in (
        Header(Kind.INFER, client=b"c", cuts=(1,), seq=-1),
        Header(Kind.INFER, cuts=(70_000,)),
        Header(Kind.INFER, cuts=(1,), stages=[StageStamp()]),
        Header(Kind.RESULT, dtype=np.dtype(np.complex64), shape=(1,), body_bytes=8),
    ):
        with pytest.raises(WireError):
            pack(bad)


def test_reading_is_zero_copy_where_the_memory_allows():
    header, _, array = infer()
    memory = bytearray(array.tobytes())
    same = array_of(header, memoryview(memory))
    memory[:4] = struct.pack("<f", 99.0)
    assert same.flat[0] == 99.0
    shifted = memoryview(bytearray(1) + memory)[1:]
    copied = array_of(header, shifted)
    assert copied.flags.aligned and copied.flags.writeable
    readonly = array_of(header, memoryview(bytes(memory)))
    assert readonly.flags.writeable


def test_big_endian_arrays_are_sent_little_endian():
    header = Header(Kind.RESULT, cuts=(1,))
    body = array_body(header, np.array([1.5, -2.0], dtype=">f4"))
    assert array_of(parse_header(pack(header)), body).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("left_s", [-1.0, float("nan"), float("inf")])
def test_a_time_left_that_is_none_is_refused(left_s):
    with pytest.raises(WireError, match="seconds left"):
        parse_header(pack(Header(Kind.INFER, cuts=(1,), left_s=left_s)))
