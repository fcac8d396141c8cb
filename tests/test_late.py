"""Late binding in the executor: tables on the wire, in a node's core, and over real processes."""

import math
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_nodes import until
from test_nodecore import DIGEST, SPEC, core

from executor._compute import FairQueue, Outcome
from executor._hop import Hop
from executor._json import decode_json
from executor._nodecore import CoreConfig, NodeCore
from executor.energy import ConstantPowerMeter
from executor.errors import ConfigError, WireError
from executor.late import MAX_ROWS, MAX_TABLES, CutTable, pack_tables, parse_tables, rebound
from executor.link import PassiveEstimator
from executor.model import build_chain, sample_input
from executor.plan import Plan
from executor.recovery import Recovery
from executor.testbed import Testbed, TestbedHop, TestbedNode
from executor.wire import Header, Kind, array_body, pack, parse, parse_header, seal

N = 21
DEADLINE_S = 60.0
LIMITS = st.lists(
    st.floats(0.0, allow_nan=False, allow_infinity=True), min_size=1, max_size=MAX_ROWS, unique=True
).map(sorted)


@st.composite
def tables(draw):
    nodes = draw(st.lists(st.integers(1, 255), min_size=1, max_size=MAX_TABLES, unique=True))
    made = []
    for node in nodes:
        limits = draw(LIMITS)
        cuts = draw(st.lists(st.integers(0, 65535), min_size=len(limits), max_size=len(limits)))
        made.append(CutTable(node, tuple(zip(limits, cuts, strict=True))))
    return tuple(made)


@given(given_=tables(), cuts=st.lists(st.integers(0, 65535), max_size=5).map(tuple))
@settings(deadline=None, max_examples=100)
def test_tables_come_back_as_they_went(given_, cuts):
    assert parse_tables(pack_tables(given_)) == given_
    got = parse_header(pack(Header(Kind.INFER, cuts=cuts, late=given_)))
    assert got.late == given_ and got.cuts == cuts


@given(
    given_=tables(),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut_at=st.integers(0, 400),
    extra=st.binary(max_size=20),
)
@settings(deadline=None, max_examples=300)
def test_whatever_the_bytes_they_are_tables_or_a_wire_error(given_, edits, cut_at, extra):
    raw = bytearray(pack(Header(Kind.INFER, cuts=(2, 5), late=given_)))
    for position, value in edits:
        raw[-1 - position % len(raw)] = value
    raw = raw[:cut_at] + extra if cut_at < len(raw) else raw + extra
    for read in (lambda: parse_header(seal(bytes(raw))), lambda: parse_tables(bytes(raw[200:]))):
        try:
            read()
        except WireError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("node", "rows", "message"),
    [
        (0, ((1.0, 3),), "after the first"),
        (1, (), r"1\.\.16 rows, got 0"),
        (1, tuple((float(k), k) for k in range(MAX_ROWS + 1)), "1..16 rows, got 17"),
        (1, ((0.2, 3), (0.2, 4)), "rise"),
        (1, ((math.inf, 3), (math.inf, 4)), "rise"),
        (1, ((-0.1, 3),), ">= 0 s"),
        (1, ((math.nan, 3),), ">= 0 s"),
        (1, ((0.1, -3),), "cuts"),
    ],
)
def test_what_is_no_table_is_refused_with_the_reason(node, rows, message):
    with pytest.raises(ConfigError, match=message):
        CutTable(node, rows)


def test_what_is_no_table_on_the_wire_is_refused_with_the_reason():
    row = struct.pack("<dH", 0.5, 3)
    for data, message in (
        (b"", "1..16 cut tables, got nothing"),
        (b"\0", "1..16 cut tables, got 0"),
        (b"\x11", "1..16 cut tables, got 17"),
        (b"\1\1\1" + row[:-1], "bad cut table"),
        (b"\1\1\1" + row + b"x", "1 bytes follow"),
        (b"\1\1\xff" + row, "rows, got 255"),
        (b"\1\0\1" + row, "after the first"),
        (b"\1\1\1" + struct.pack("<dH", math.nan, 3), "rise"),
        (b"\2" + 2 * (b"\1\1" + row), "two cut tables for one node"),
    ):
        with pytest.raises(WireError, match=message):
            parse_tables(data)
    table = (CutTable(1, ((1.0, 3),)),)
    with pytest.raises(WireError, match="only an INFER"):
        pack(Header(Kind.RESULT, cuts=(1, 2), late=table))
    raw = bytearray(pack(Header(Kind.INFER, cuts=(1, 2), late=table)))
    raw[5] = Kind.RESULT
    with pytest.raises(WireError, match="only an INFER"):
        parse_header(seal(bytes(raw[:-4])))
    with pytest.raises(WireError, match="layout"):
        pack_tables((CutTable(1, ((1.0, 70_000),)),))


@given(
    cuts=st.lists(st.integers(0, N), min_size=2, max_size=5).map(sorted).map(tuple),
    node=st.integers(0, 4),
    cut=st.integers(0, N),
)
def test_a_rebound_plan_is_a_plan(cuts, node, cut):
    node = min(node, len(cuts) - 1)
    plan = rebound(Plan(cuts), node, cut)
    plan.check(N, len(cuts) + 1)
    assert plan.cuts[:node] == cuts[:node]
    assert plan.cuts[node] == max(cut, cuts[node - 1] if node else 0)
    assert all(a >= b or b == plan.cuts[node] for a, b in zip(cuts, plan.cuts, strict=True))


def test_a_row_holds_up_to_its_backlog_and_the_plan_beyond_the_last():
    table = CutTable(1, ((0.0, 3), (0.5, 7)))
    assert [table.cut_at(b, 9) for b in (0.0, 0.1, 0.5, 0.6, math.inf)] == [3, 7, 7, 9, 9]


def ask(node, cuts, *rows, seq=1, tries=1, now_s=1.0):
    """Hand the core a request with that table."""
    header = Header(Kind.INFER, client=b"c" * 16, seq=seq, cuts=cuts, digest=DIGEST, tries=tries)
    header.late = (CutTable(1, rows),) if rows else ()
    body = array_body(header, np.zeros(SPEC.cut_bytes[cuts[0]] // 4, np.float32))
    node.on_upstream(b"edge", [pack(header), body], now_s)


def fog(backlog_s):
    """A fog's core whose hop holds so much."""
    node, queue, _ = core(1, max_queue=8)
    node.on_link(node.hop, True, 0.0)
    node.hop.backlog_s = lambda now_s: backlog_s
    return node, queue


def run(node, queue, units=1000):
    """Let the compute thread's part happen; returns the units of the stage that ran."""
    job = queue.get()
    stop = job.stop if job.choose is None else job.choose()
    node.on_outcome(Outcome(job, 2.0, 3.0, 1.0, np.ones((1, units), np.float32), stop=stop), 3.0)
    return job.start, stop


def test_the_cut_is_picked_when_the_turn_has_come_and_the_frame_names_it():
    node, queue = fog(0.0)
    ask(node, (3, 14), (0.2, 9), (math.inf, N))
    ask(node, (3, 14), (0.2, 9), (math.inf, N), seq=2)
    assert run(node, queue) == (3, 9)
    sent = parse(node.hop.outbox.popleft()).header
    assert (sent.cuts, sent.seq) == ((3, 9), 1)
    node.hop.backlog_s = lambda now_s: 0.3  # filled up while the second waited
    assert run(node, queue) == (3, N)
    result = parse(node.up[-1][1]).header
    assert (result.kind, result.cuts, result.late) == (Kind.RESULT, (3, N), ())
    assert not node.hop.outbox


def test_what_would_be_relayed_is_computed_where_the_hop_is_full():
    node, queue = fog(0.1)
    ask(node, (0, 0), (0.2, 0), (1.0, 9))
    assert len(queue) == 0 and parse(node.hop.outbox.popleft()).header.cuts == (0, 0)
    node.hop.backlog_s = lambda now_s: 0.5
    ask(node, (0, 0), (0.2, 0), (1.0, 9), seq=2)
    assert len(queue) == 1
    node.hop.backlog_s = lambda now_s: 0.0  # it ran empty while the request waited
    assert run(node, queue) == (0, 0)
    assert parse(node.hop.outbox.popleft()).header.cuts == (0, 0)
    node.hop.backlog_s = lambda now_s: 2.0  # beyond the last row: as planned
    ask(node, (0, 0), (0.2, 0), (1.0, 9), seq=3)
    assert parse(node.hop.outbox.popleft()).header.cuts == (0, 0)


def test_the_plan_stands_where_the_backlog_is_unknown_and_a_cut_never_falls_below_the_last():
    node, queue = fog(None)
    ask(node, (3, 14), (math.inf, 9))
    assert run(node, queue) == (3, 14)
    node.hop.backlog_s = lambda now_s: 0.0
    ask(node, (8, 14), (math.inf, 5), seq=2)
    assert run(node, queue) == (8, 8)


def test_a_hop_that_is_down_is_full():
    node, queue, _ = core(1, max_queue=8)
    node.on_link(node.hop, False, 0.0)
    ask(node, (3, 14), (0.5, 14), (math.inf, N))
    assert run(node, queue) == (3, N)
    assert parse(node.up[-1][1]).header.kind is Kind.RESULT


def test_a_later_try_uses_a_stage_that_was_cut_otherwise():
    node, queue = fog(0.0)
    ask(node, (3, 14), (math.inf, 9))
    job = queue.get()
    ask(node, (3, 14), seq=1, tries=2)
    assert len(queue) == 0 and node.duplicates == 1
    node.on_outcome(Outcome(job, 2.0, 3.0, 1.0, np.ones(8, np.float32), stop=job.choose()), 3.0)
    sent = parse(node.hop.outbox.popleft()).header
    assert (sent.cuts, sent.tries) == ((3, 9), 2)


def test_a_table_that_does_not_fit_is_answered_with_the_reason():
    node, queue = fog(0.0)
    ask(node, (3, 14), (math.inf, N + 1))
    header = Header(Kind.INFER, client=b"c" * 16, seq=2, cuts=(3, 14), digest=DIGEST)
    header.late = (CutTable(2, ((1.0, 3),)),)
    node.on_upstream(b"edge", [pack(header)], 1.0)
    errors = [parse(p) for _, p in node.up if parse(p).header.kind is Kind.ERROR]
    reasons = [decode_json(e.body) for e in errors]
    assert [r["code"] for r in reasons] == ["bad_plan", "bad_plan"]
    assert "0..21" in reasons[0]["reason"] and "nodes 1..1" in reasons[1]["reason"]
    assert len(queue) == 0


def test_the_middle_nodes_of_a_longer_chain_each_pick_their_own():
    queue = FairQueue(8)
    config = CoreConfig(2, 5, SPEC, DIGEST, 8, {"name": "n2"})
    node = NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter())
    node.hop.backlog_s = lambda now_s: 0.0
    header = Header(Kind.INFER, client=b"c" * 16, seq=1, cuts=(2, 5, 7, 9), digest=DIGEST)
    header.late = (CutTable(1, ((9.0, 4),)), CutTable(2, ((0.0, 12),)), CutTable(3, ((9.0, 13),)))
    body = array_body(header, np.zeros(SPEC.cut_bytes[5] // 4, np.float32))
    node.on_upstream(b"n1", [pack(header), body], 1.0)
    assert run(node, queue) == (5, 12)
    sent = parse(node.hop.outbox.popleft()).header
    assert sent.cuts == (2, 5, 12, 12) and sent.late == header.late


def test_a_hops_backlog_in_seconds():
    rate = PassiveEstimator()
    assert rate.backlog_s(0.0) == 0.0
    rate.on_sent(100_000, 0.0)
    assert rate.backlog_s(0.05) is None  # nothing was measured yet
    rate.on_ack(0.1, 0.1)
    rate.on_sent(100_000, 1.0)
    rate.on_sent(50_000, 1.0)
    assert rate.backlog_s(1.05) == pytest.approx(0.15)  # 1 MB/s
    assert rate.backlog_s(1.4) == pytest.approx(0.6)  # the first is overdue: at most 250 kB/s
    assert Hop(b"h" * 16).backlog_s(0.0) == 0.0


def sends(instructions):
    return [(s.plan.cuts, s.tries, s.late) for s in instructions]


def test_tables_go_with_the_first_try_on_a_whole_chain_only():
    machine = Recovery(("edge", "fog", "cloud"), N)
    for node in range(3):
        machine.hello(node, f"b{node}", "", 0.0)
    assert sends(machine.submitted(1, Plan((3, N)), 10.0, 0.0, late=True)) == [((3, N), 1, True)]
    # The plan ends on the fog; but the fog may have sent the request on, over a hop that breaks.
    again = machine.status(1, "b1", {2: False}, 0.0, 0.1)
    assert sends(again) == [((3, N), 2, False)]
    assert sends(machine.submitted(2, Plan((3, N)), 10.0, 0.2, late=True)) == [((3, N), 1, False)]


def test_a_stall_where_the_fog_may_have_sent_it_has_it_sent_again():
    machine = Recovery(("edge", "fog", "cloud"), N)
    for node in range(3):
        machine.hello(node, f"b{node}", "", 0.0)
    machine.submitted(1, Plan((3, N)), 2.0, 0.0, late=True)
    machine.submitted(2, Plan((3, N)), 2.0, 0.0)
    assert not machine.status(1, "b1", {2: True}, 0.5, 0.5)
    again = machine.status(1, "b1", {2: True}, 1.1, 1.1)
    assert [(s.seq, s.tries, s.late) for s in again] == [(1, 2, False)]


def test_the_fog_changes_its_cut_within_the_frame_and_the_output_stays():
    """Over real processes: the hop behind the fog is throttled, and the fog keeps what it can."""
    nodes = (
        TestbedNode("edge", 1.0, "pi4"),
        TestbedNode("fog", 1.0, "laptop"),
        TestbedNode("cloud", 1.0, "server"),
    )
    hops = (TestbedHop(400.0, 0.001), TestbedHop(400.0, 0.001))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chain = build_chain("mobilenet_v2")
    pairs = [(x, chain.run(x, 0, N)) for x in map(sample_input, range(4))]
    torch.set_num_threads(threads)
    # What waits counts by how overdue the first frame is: a fast machine sees little of it yet.
    table = [CutTable(1, ((0.05, 8), (math.inf, N)))]
    with Testbed("mobilenet_v2", nodes=nodes, hops=hops) as testbed:
        client = testbed.client(timeout_s=DEADLINE_S)

        def ask_all():
            futures = [client.submit(x, Plan((3, 14)), late=table) for x, _ in pairs]
            plans = []
            for (_, output), future in zip(pairs, futures, strict=True):
                reply = future.result(DEADLINE_S)
                assert np.array_equal(np.asarray(reply.output), output.numpy())
                plans.append(reply.record.plan)
                ran = [s > 0 for s in reply.record.stage_s]
                assert ran == [True, True, reply.record.plan[1] < N]
            return plans

        client.submit(pairs[0][0], Plan((0, 0))).result(DEADLINE_S)  # measures the hops
        assert ask_all()[0] == (3, 8)  # an idle hop
        testbed.set_rate(1, 0.1)  # seconds per frame
        first = client.submit(pairs[0][0], Plan((3, 14)), late=table)
        # It met an idle hop, and fills it until it is overdue for all that follow.
        until(lambda: client.status()[1].stalled_s > 0.2, DEADLINE_S)
        assert set(ask_all()) == {(3, N)}
        testbed.set_rate(1, 400.0)
        assert first.result(DEADLINE_S).record.plan == (3, 8)
        deadline_s = time.monotonic() + DEADLINE_S
        while ask_all()[0] != (3, 8):  # until a frame has measured the hop anew
            client.submit(pairs[0][0], Plan((0, 0))).result(DEADLINE_S)
            assert time.monotonic() < deadline_s
        with pytest.raises(ConfigError, match="of the nodes"):
            client.submit(pairs[0][0], Plan((3, 14)), late=[CutTable(2, ((1.0, 3),))])
        client.close()
