"""Activations as fp16 and int8: how far off they may be, what is refused, and their frames."""

import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from executor._compute import FairQueue, Outcome
from executor._json import decode_json
from executor._nodecore import CoreConfig, NodeCore
from executor.codec import (
    TRANSFERS,
    Affine,
    as_float32,
    channels,
    check_affine,
    coded_bytes,
    encode,
    form_of,
    parse_transfers,
)
from executor.energy import ConstantPowerMeter
from executor.errors import ConfigError, FrameDamaged, WireError
from executor.plan import ModelSpec
from executor.wire import (
    Header,
    Kind,
    array_body,
    array_of,
    pack,
    parse,
    parse_header,
    payload_of,
    seal,
)

SPEC = ModelSpec("toy", ("a", "b", "c"), (192, 96, 48, 40), (True,) * 3, 2, (1, 2))
DIGEST = b"\xab" * 8

shapes = arrays.array_shapes(min_dims=1, max_dims=5, min_side=1, max_side=6)
values = st.floats(-60000.0, 60000.0, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32)
tensors = shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=values))


def by_channel(x):
    """The channels of a tensor as rows."""
    c = channels(x.shape)
    return np.moveaxis(x, 1, 0).reshape(c, -1) if c > 1 else x.reshape(1, -1)


@given(x=tensors)
@settings(deadline=None, max_examples=120)
def test_int8_is_off_by_at_most_half_a_step_of_its_channel(x):
    kept = x.copy()
    coded = encode(x, "int8")
    assert np.array_equal(x, kept)
    assert coded.body.nbytes == coded_bytes("int8", x.shape) == x.size + 8 * channels(x.shape)
    y = as_float32(coded)
    assert y.shape == x.shape and y.dtype == np.float32
    rows, got = by_channel(x).astype(np.float64), by_channel(y).astype(np.float64)
    low, high = rows.min(axis=1), rows.max(axis=1)
    step = (high - low) / 255
    # Beyond half a step only float32's own rounding of low + q x scale.
    slack = 4 * np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))
    assert np.all(np.abs(got - rows) <= (0.5 * step * (1 + 1e-4) + slack + 3e-36)[:, None])


@given(x=tensors)
@settings(deadline=None, max_examples=100)
def test_fp16_is_numpy_s_half_precision(x):
    coded = encode(x, "fp16")
    assert coded.dtype == np.float16 and coded.nbytes == coded_bytes("fp16", x.shape)
    assert np.array_equal(coded, x.astype(np.float16))
    error = np.abs(as_float32(coded).astype(np.float64) - x)
    assert np.all(error <= np.maximum(2.0**-11 * np.abs(x), 2.0**-25))


@given(value=values, shape=shapes)
@settings(deadline=None, max_examples=60)
def test_constants_are_exact_as_int8(value, shape):
    x = np.full(shape, value, np.float32)
    assert np.array_equal(as_float32(encode(x, "int8")), x)


def test_each_channel_has_its_own_scale():
    x = np.zeros((2, 3, 4, 4), np.float32)
    x[:, 1], x[1, 2] = 1000.0, np.linspace(-1, 1, 16).reshape(4, 4)
    scale, low = check_affine(encode(x, "int8"))
    np.testing.assert_allclose(scale, [0.0, 0.0, 2 / 255], rtol=1e-6)
    assert low.tolist() == [0.0, 1000.0, -1.0]
    # Another shape of the same values has but one, and the small ones are lost in it.
    flat = encode(x.reshape(2, -1), "int8")
    assert len(check_affine(flat)[0]) == 1
    assert np.abs(as_float32(flat) - x.reshape(2, -1)).max() > 0.5


def test_int8_is_no_larger_than_float32_even_for_channels_of_one_value():
    for shape in ((1, 64, 1, 1), (1, 64, 1, 3), (1, 64, 2, 2), (4, 64, 1, 1), (1, 64), (1, 5, 7)):
        assert coded_bytes("int8", shape) < coded_bytes("float32", shape)
    assert [channels(s) for s in ((1, 64, 1, 3), (1, 64, 2, 2), (4, 64, 1, 1))] == [1, 64, 64]


def test_zero_of_an_activation_that_was_cut_off_at_zero_stays_zero():
    x = np.maximum(np.random.default_rng(0).normal(size=(1, 8, 9, 9)), 0).astype(np.float32)
    for form in ("fp16", "int8"):
        assert np.all(as_float32(encode(x, form))[x == 0.0] == 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_crosses_as_fp16_and_is_refused_as_int8(bad):
    x = np.ones((1, 2, 3, 3), np.float32)
    x[0, 1, 2, 2] = bad
    assert np.array_equal(as_float32(encode(x, "fp16")), x, equal_nan=True)
    with pytest.raises(WireError, match="int8 holds finite values only"):
        encode(x, "int8")


def test_what_a_form_cannot_hold_is_refused():
    x = np.array([1.0, 65504.0, -65504.0], np.float32)
    assert as_float32(encode(x, "fp16")).tolist() == x.tolist()
    with pytest.raises(WireError, match=r"up to 65504, the activation has -70000; send float32"):
        encode(np.array([1.0, -70000.0, np.inf], np.float32), "fp16")
    with pytest.raises(WireError, match="finite"):
        encode(np.array([3e38, -3e38], np.float32), "int8")
    for form in ("fp16", "int8"):
        with pytest.raises(WireError, match="without values"):
            encode(np.zeros((1, 0, 3, 3), np.float32), form)
    empty = np.zeros((0,), np.float32)
    assert encode(empty, "float32") is empty


def test_an_option_names_one_transfer_or_one_per_hop():
    assert parse_transfers("fp16", 2) == ("fp16", "fp16")
    assert parse_transfers("int8, float32", 2) == ("int8", "float32")
    for bad, words in (("fp8", "must be one of"), ("fp16,int8,fp16", "each of 2"), ("", "one of")):
        with pytest.raises(ConfigError, match=words):
            parse_transfers(bad, 2)


def frame(x, form, cuts=(1, 2)):
    header = Header(Kind.INFER, client=b"c" * 16, seq=1, cuts=cuts, digest=DIGEST, tries=1)
    return header, array_body(header, encode(x, form))


@given(x=tensors, form=st.sampled_from(TRANSFERS))
@settings(deadline=None, max_examples=60)
def test_a_frame_of_any_form_round_trips(x, form):
    header, body = frame(x, form)
    got = parse([pack(header), body])
    assert pack(got.header) == pack(header) and got.header.shape == x.shape
    assert form_of(got.header.dtype, got.header.affine) == form
    coded = payload_of(got.header, got.body)
    assert np.array_equal(as_float32(coded), as_float32(encode(x, form)))
    # Written again it is the same frame: nothing is decoded on the way.
    again = Header(Kind.INFER, client=b"c" * 16, seq=1, cuts=(1, 2), digest=DIGEST, tries=1)
    assert bytes(array_body(again, coded)) == bytes(body) and pack(again) == pack(header)
    if form == "int8":
        with pytest.raises(WireError, match="plain tensor"):
            array_of(got.header, got.body)


def test_damaged_and_unknown_bodies_are_refused():
    header, body = frame(np.ones((1, 4, 2, 3), np.float32), "int8")
    with pytest.raises(FrameDamaged, match="body is 55 bytes, the header says 56"):
        parse([pack(header), body[:-1]])
    header.body_bytes -= 8  # as for one channel less
    with pytest.raises(WireError, match="56 bytes, header: 48"):
        parse_header(pack(header))
    header, body = frame(np.ones((1, 4, 2, 3), np.float32), "int8")
    raw = bytearray(pack(header))
    raw[6] = 9
    with pytest.raises(WireError, match="unknown dtype code 9"):
        parse_header(seal(bytes(raw[:-4])))
    header.kind = Kind.RESULT
    with pytest.raises(WireError, match="only an INFER carries an int8 activation"):
        parse_header(pack(header))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_scales_that_are_none_are_refused(scale):
    coded = encode(np.ones((1, 4, 2, 3), np.float32), "int8")
    coded.body[8:12] = np.frombuffer(struct.pack("<f", scale), np.uint8)
    with pytest.raises(WireError, match="scales of an int8 body must be finite"):
        as_float32(coded)
    with pytest.raises(WireError, match="has not 55 bytes"):
        as_float32(Affine(coded.body[:-1], coded.shape))


def core(index, transfer="float32"):
    queue = FairQueue(4)
    config = CoreConfig(
        index, 3, SPEC, DIGEST, 4, {"name": f"n{index}", "boot": "b"}, transfer=transfer
    )
    return NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter()), queue


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("own", TRANSFERS)
def test_a_node_that_only_relays_leaves_the_body_alone(form, own):
    node, queue = core(1, own)
    header, body = frame(np.arange(24, dtype=np.float32).reshape(1, 4, 2, 3), form, (1, 1))
    node.on_upstream(b"edge", [pack(header), bytes(body)], 1.0)
    assert len(queue) == 0
    sent = parse(node.hop.outbox.popleft())
    assert bytes(sent.body) == bytes(body)
    assert (sent.header.dtype, sent.header.affine) == (header.dtype, header.affine)
    assert (sent.header.shape, sent.header.body_crc) == (header.shape, header.body_crc)


def test_a_node_with_a_transfer_encodes_what_it_relays_as_float32():
    node, queue = core(0, "int8")
    x = np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4)
    header, body = frame(x, "float32", (0, 0))
    node.on_upstream(b"client", [pack(header), bytes(body)], 1.0)
    job = queue.get()
    assert (job.start, job.stop) == (0, 0) and not node.hop.outbox
    node.on_outcome(Outcome(job, 2.0, 3.0, 1.0, encode(x, "int8"), stop=0), 3.0)
    sent = parse(node.hop.outbox.popleft())
    assert sent.header.affine and sent.header.body_bytes == 48 + 3 * 8
    assert np.abs(as_float32(payload_of(sent.header, sent.body)) - x).max() <= 7.5 / 255
    assert sent.header.stages[0].work_s == 1.0


def test_a_stage_s_output_leaves_in_its_form_and_the_last_one_as_float32():
    node, queue = core(1, "fp16")
    header, body = frame(np.ones((1, 4, 2, 3), np.float32), "int8", (1, 3))
    node.on_upstream(b"edge", [pack(header), bytes(body)], 1.0)
    node.on_outcome(Outcome(queue.get(), 2.0, 3.0, 1.0, np.ones(10, np.float32), stop=3), 3.0)
    result = parse(node.up[-1][1])
    assert result.header.kind is Kind.RESULT and not result.header.affine
    assert array_of(result.header, result.body).dtype == np.float32


def test_a_body_that_does_not_fit_its_cut_or_has_no_scales_gets_an_error():
    node, queue = core(1)
    bad = encode(np.ones((1, 4, 2, 3), np.float32), "int8")
    bad.body[:4] = np.frombuffer(struct.pack("<f", float("nan")), np.uint8)
    for seq, (coded, words) in enumerate(
        [
            (encode(np.ones((1, 4, 2, 2), np.float32), "int8"), "cut 1 carries 96 bytes"),
            (np.ones((1, 4, 2, 3), np.float64), "cut 1 carries 96 bytes of float32 .*float64"),
            (np.ones((1, 4, 2, 3), np.uint8), "of uint8"),
            (bad, "scales of an int8 body"),
        ]
    ):
        header = Header(Kind.INFER, client=b"c" * 16, seq=seq, cuts=(1, 2), digest=DIGEST, tries=1)
        body = array_body(header, coded)
        before = node.bad_frames
        node.on_upstream(b"edge", [pack(header), bytes(body)], 1.0)
        error = decode_json(parse(node.up[-1][1]).body)
        assert error["code"] == "bad_body" and node.bad_frames == before + 1
        assert re.search(words, error["reason"])
    assert len(queue) == 0
