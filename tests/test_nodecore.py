"""The node's parts without sockets: fairness, backlog, clocks, relaying."""

import numpy as np
import pytest

from executor._compute import FairQueue, Outcome
from executor._hop import Hop, ProbeRun, localise
from executor._json import decode_json, encode_json
from executor._nodecore import CoreConfig, NodeCore
from executor._pending import Pending, PendingTable
from executor._records import NodeStatus, RequestRecord
from executor.energy import ConstantPowerMeter
from executor.errors import HandshakeError, RequestRefused, WireError
from executor.model import model_spec
from executor.plan import Plan
from executor.wire import Header, HopStamp, Kind, StageStamp, array_body, attach, pack, parse

SPEC = model_spec("mobilenet_v2")
DIGEST = b"d" * 8


def infer(cuts, seq=1):
    header = Header(Kind.INFER, client=b"c" * 16, seq=seq, cuts=cuts, digest=DIGEST)
    body = array_body(header, np.zeros((1, 3, 224, 224), np.float32))
    return header, body


def core(index, max_queue=2, measure=lambda now_s: {"load": 0.0}):
    queue = FairQueue(max_queue)
    config = CoreConfig(index, 3, SPEC, DIGEST, max_queue, {"name": f"n{index}"})
    meter = ConstantPowerMeter()
    return NodeCore(config, queue, measure, meter), queue, meter


def kinds(node):
    acks = [header.kind for _, header in node.acks]
    return acks + [parse(parts).header.kind for _, parts in node.up]


def ack(hop, header, received_s, now_s, kind=Kind.ACK):
    reply = header.reply(kind)
    reply.clock_s = (header.clock_s[0], received_s, received_s)
    (hop.on_ack if kind is Kind.ACK else hop.on_pong)(reply, now_s)


def test_a_hop_counts_backlog_until_it_is_acknowledged():
    hop = Hop(b"me" * 8)
    frames = [infer((0, 0), seq)[0] for seq in range(3)]
    for header in frames:
        hop.send(header, None, 0.0)
    assert (hop.backlog_bytes, hop.backlog_frames) == (3 * 602112, 3)
    ack(hop, frames[0], 0.1, 0.1)
    assert (hop.backlog_bytes, hop.backlog_frames) == (2 * 602112, 2)
    ack(hop, frames[0], 0.1, 0.2)
    assert hop.backlog_frames == 2
    # The second was lost with its connection: the third's receipt says so.
    ack(hop, frames[2], 0.3, 0.3)
    assert (hop.backlog_bytes, hop.backlog_frames) == (0, 0)


def test_pings_find_the_clocks_offset_and_stop_while_one_is_out():
    hop = Hop(b"me" * 8)
    hop.tick(0.0)
    ping = parse(hop.outbox.popleft()).header
    hop.tick(0.9)
    assert ping.kind is Kind.PING and not hop.outbox
    ack(hop, ping, 100.01, 0.02, Kind.PONG)
    assert hop.clock.offset_s == pytest.approx(100.0)
    assert hop.one_way_s == pytest.approx(0.01)
    hop.tick(1.0)
    hop.outbox.clear()
    hop.tick(1.5)
    assert not hop.outbox
    hop.tick(2.1)
    assert len(hop.outbox) == 1


def test_probes_run_one_after_the_other_and_are_given_up():
    hop = Hop(b"me" * 8)
    request = Header(Kind.PROBE, client=b"c" * 16, seq=5)
    hop.probe(ProbeRun(request, 1000, 2), 0.0)
    hop.probe(ProbeRun(request, 50, 1), 0.0)
    replies, ended = [], []
    for now_s in (1.0, 3.0, 3.5):
        ping = parse(hop.outbox.popleft())
        assert not hop.outbox
        replies.append(ping.body.nbytes)
        pong = ping.header.reply(Kind.PONG)
        pong.clock_s = (ping.header.clock_s[0], now_s, now_s)
        run = hop.on_pong(pong, now_s)
        ended += [run.rtts_s] if run else []
    assert replies == [1000, 1000, 50]
    assert ended == [[1.0, 2.0], [0.5]]
    hop.probe(ProbeRun(request, 50, 1), 4.0)
    assert hop.tick(30.0) is None
    assert hop.tick(70.0).request is request


def test_stamps_are_converted_hop_by_hop_into_the_readers_clock():
    header = Header(Kind.RESULT, client=b"c" * 16, cuts=(1, 2))
    # True times: arrive 1, run 2..3, cross 3..5, run 5..6, cross 6..8, run 8..9. Each clock is
    # ahead of the one before it: edge by 10 s, fog by 110 s, cloud by 1110 s.
    header.stages = [
        StageStamp(11, 12, 13, 0.5),
        StageStamp(115, 115, 116, 0.5),
        StageStamp(1118, 1118, 1119, 0.5),
    ]
    header.hops = [HopStamp(13, 115, 111), HopStamp(116, 1118, 1117)]
    localise(header, 1, 1000.0, 0.25)
    localise(header, 0, 100.0, 0.25)
    localise(header, -1, 10.0, 0.0)
    record = RequestRecord.from_header(header, 0.0, 0.5, 10.0)
    assert record.stage_s == (1, 1, 1) and record.work_s == (0.5, 0.5, 0.5)
    assert record.queue_s == (1, 0, 0) and record.hop_s == (2, 2)
    assert record.transmit_s == (1.75, 1.0)
    assert record.latency_s == 10.0
    assert [s.arrive_s for s in header.stages] == [1, 5, 8]


def test_a_crossed_hop_takes_its_propagation_at_least_however_wrong_the_clock():
    header = Header(Kind.RESULT, client=b"c" * 16, cuts=(1, 2))
    header.hops = [HopStamp(1.0, 1.5, 1.5), HopStamp()]
    localise(header, 0, 0.75, 0.25)  # read back, it was received at 0.75: before it was sent
    record = RequestRecord.from_header(header, 0.0, 0.5, 10.0)
    assert record.hop_s == (0.25, 0.0) and record.transmit_s == (0.0, 0.0)


def test_an_empty_stage_relays_without_the_compute_queue():
    node, queue, _ = core(1)
    header, body = infer((0, 0))
    node.on_upstream(b"up", [pack(header), body], 5.0)
    assert len(queue) == 0 and kinds(node) == [Kind.ACK]
    relayed = parse(node.hop.outbox.popleft())
    assert relayed.header.stages[1] == StageStamp(arrive_s=5.0)
    assert relayed.header.hops[0].received_s == 5.0
    assert relayed.header.hops[1].sent_s == 5.0
    assert node.hop.backlog_bytes == 602112


def test_the_last_node_of_a_plan_replies_and_goes_no_further():
    node, queue, meter = core(1)
    header, body = infer((0, 21))
    node.on_upstream(b"up", [pack(header), body], 1.0)
    taken = queue.get()
    assert (taken.start, taken.stop) == (0, 21)
    output = np.ones((1, 1000), np.float32)
    node.on_outcome(Outcome(taken, 2.0, 4.0, 1.5, output), 4.0)
    assert kinds(node) == [Kind.ACK, Kind.RESULT] and not node.hop.outbox
    result = parse(node.up[-1][1])
    assert result.header.stages[1] == StageStamp(1.0, 2.0, 4.0, 1.5)
    assert meter.read_j() == pytest.approx(12.0 * 1.5)


def test_both_bounds_refuse_with_an_error():
    node, queue, _ = core(0, max_queue=1)
    for cuts, seq in (((3, 3), 1), ((3, 3), 2), ((0, 0), 3), ((0, 0), 4)):
        header, body = infer(cuts, seq)
        node.on_upstream(b"up", [pack(header), body], 0.0)
    errors = [parse(parts) for _, parts in node.up]
    assert [e.header.seq for e in errors] == [2, 4] and node.refused == 2
    assert [decode_json(e.body)["code"] for e in errors] == ["refused", "refused"]
    # A computed stage that finds the hop full is refused too, not lost.
    taken = queue.get()
    node.on_outcome(Outcome(taken, 0.0, 1.0, 1.0, np.ones(3, np.float32)), 1.0)
    assert parse(node.up[-1][1]).header.seq == 1 and node.refused == 3


def test_a_request_that_comes_twice_is_computed_once():
    node, queue, _ = core(1, max_queue=4)
    header, body = infer((0, 9))
    header.tries = 1
    node.on_upstream(b"up", [pack(header), body], 0.0)
    node.on_upstream(b"again", [pack(header), body], 0.1)
    assert len(queue) == 1 and node.duplicates == 1
    taken = queue.get()
    # The second try wants the same stage here, and another one after it.
    header.tries, header.cuts = 2, (0, 21)
    node.on_upstream(b"again", [pack(header), body], 0.2)
    assert len(queue) == 1 and taken.abandoned  # units 0..21 are another stage
    node.on_outcome(Outcome(taken, 0.0, 1.0, 1.0, np.ones(3, np.float32)), 1.0)
    assert not node.hop.outbox
    second = queue.get()
    header.tries = 3
    node.on_upstream(b"third", [pack(header), body], 1.1)
    assert len(queue) == 0 and node.duplicates == 2 and not second.abandoned
    node.on_outcome(Outcome(second, 1.0, 2.0, 1.0, np.ones((1, 1000), np.float32)), 2.0)
    identity, parts = node.up[-1]
    assert identity == b"third" and parse(parts).header.tries == 3


def test_an_older_try_does_not_wait_for_its_hop_any_more():
    """It would take the hop's time from those that somebody waits for."""
    node, queue, _ = core(1, max_queue=4)
    node.on_link(node.hop, True, 0.0)
    for seq in (1, 2, 3):
        header, body = infer((0, 0), seq)
        header.tries = 1
        node.on_upstream(b"up", [pack(header), body], 0.0)
    node.hop.outbox.popleft()
    assert node.hop.backlog_frames == 3 and len(node.hop.outbox) == 2
    # Run here instead: the first is on its way already, the second is not.
    for seq in (1, 2):
        header, body = infer((0, 21), seq)
        header.tries = 2
        node.on_upstream(b"up", [pack(header), body], 0.1)
    assert len(queue) == 2 and node.hop.backlog_frames == 2
    assert parse([*node.hop.outbox.popleft()[:1], bytes(602112)]).header.seq == 3
    assert not node.hop.outbox
    # One whose older try was answered after all does not wait either.
    header, body = infer((0, 0), 4)
    header.tries = 2
    node.on_upstream(b"up", [pack(header), body], 0.2)
    assert node.hop.backlog_frames == 3
    answer = header.reply(Kind.RESULT)
    answer.tries, answer.cuts = 1, (0, 0)
    output = array_body(answer, np.zeros((1, 1000), np.float32))
    node.on_downstream([pack(answer), output], 0.3)
    assert not node.hop.outbox and node.hop.backlog_frames == 2


def test_a_broken_hop_is_told_and_what_was_on_it_is_lost():
    node, _, _ = core(1, max_queue=4)
    node.on_link(node.hop, True, 0.0)
    for seq in (1, 2):
        header, body = infer((0, 0), seq)
        header.tries = 1
        node.on_upstream(b"up", [pack(header), body], 0.0)
    node.hop.outbox.clear()
    node.up.clear()
    # A later acknowledgement shows that the first was lost on the way.
    ack(node.hop, infer((0, 0), 9)[0], 0.1, 0.1)
    reply = Header(Kind.ACK, client=b"c" * 16, seq=2, tries=1, clock_s=(0.0, 0.1, 0.1))
    node.on_downstream([pack(reply)], 0.1)
    (lost,) = (parse(parts) for _, parts in node.up)
    assert (lost.header.seq, decode_json(lost.body)["code"]) == (1, "lost")
    node.up.clear()
    node.on_link(node.hop, False, 0.2)
    node.tick(0.2)
    header, body = infer((0, 0), 3)
    node.on_upstream(b"up", [pack(header), body], 0.3)
    frames = [parse(parts) for _, parts in node.up]
    errors = [(f.header.seq, decode_json(f.body)) for f in frames if f.header.kind is Kind.ERROR]
    assert [(seq, e["code"], e["to"]) for seq, e in errors] == [
        (2, "hop_down", 2),
        (3, "hop_down", 2),
    ]
    status = next(decode_json(f.body) for f in frames if f.header.kind is Kind.STATUS)
    assert status["hop_up"] is False and not node.hop.outbox
    node.on_link(node.hop, True, 1.0)
    node.tick(1.0)
    assert parse(node.hop.outbox.popleft()).header.kind is Kind.PING


def test_damage_on_the_way_back_is_told():
    node, _, _ = core(0, max_queue=4)
    for seq in (1, 2):
        header, body = infer((0, 0), seq)
        node.on_upstream(b"up", [pack(header), body], 0.0)
    header.kind = Kind.RESULT
    result = array_body(header, np.ones((1, 1000), np.float32))
    damaged = bytes([result[0] ^ 1]) + bytes(result[1:])
    node.on_downstream([pack(header), damaged], 0.5)
    node.on_downstream([b"SPLT" + bytes(300), bytes(result)], 0.6)
    lost = [(parse(p).header.seq, decode_json(parse(p).body)["code"]) for _, p in node.up]
    assert lost == [(2, "lost"), (1, "lost")]


def test_a_direct_link_is_taken_where_the_plan_permits():
    queue = FairQueue(4)
    config = CoreConfig(0, 3, SPEC, DIGEST, 4, {"name": "edge"}, direct=2)
    node = NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter())
    for cuts, seq, link in (((0, 0), 1, node.direct), ((0, 5), 2, node.hop)):
        header, body = infer(cuts, seq)
        header.direct = True
        node.on_upstream(b"up", [pack(header), body], 1.0)
        sent = parse(link.outbox.popleft()).header
        assert sent.seq == seq and sent.hops[link.target - 1].sent_s == 1.0
        assert not node.hop.outbox and not node.direct.outbox


def test_a_silent_link_counts_as_down():
    node, _, _ = core(0)
    assert node._status(0.0)["hop_up"] is None
    node.on_link(node.hop, True, 1.0)
    assert node._status(1.5)["hop_up"] is True
    assert node._status(1.7)["hop_up"] is False
    node.on_downstream([pack(Header(Kind.ACK))], 2.0)
    assert node._status(2.1)["hop_up"] is True


def test_a_connection_that_moves_nothing_is_made_anew():
    node, _, _ = core(0)
    node.on_link(node.hop, True, 0.0)
    node.tick(0.0)
    node.tick(3.0)
    assert not node.stuck
    node.tick(5.0)
    assert node.stuck == [node.hop]


def test_a_failed_stage_is_answered():
    node, queue, _ = core(2)
    header, body = infer((0, 0))
    node.on_upstream(b"up", [pack(header), body], 0.0)
    node.on_outcome(Outcome(queue.get(), 0.0, 1.0, error="ValueError: no"), 1.0)
    answer = decode_json(parse(node.up[-1][1]).body)
    assert answer == {
        "code": "failed",
        "reason": "node n2: ValueError: no",
        "node": 2,
        "to": 2,
        "wait_s": 0.0,
    }


def test_frames_from_the_wrong_side_are_counted_and_dropped():
    node, _, _ = core(1)
    node.on_upstream(b"up", [pack(Header(Kind.RESULT, cuts=(1, 2)))], 0.0)
    node.on_downstream([pack(Header(Kind.HELLO))], 0.0)
    node.on_downstream([b"junk"], 0.0)
    node.on_downstream([pack(Header(Kind.RESULT, cuts=(1,)))], 0.0)
    header, body = infer((0, 5))
    node_two, _, _ = core(2)
    header.cuts = (0, 21)
    node_two.on_upstream(b"up", [pack(header), body], 0.0)
    assert node.bad_frames == 4 and not node.up
    assert decode_json(parse(node_two.up[-1][1]).body)["code"] == "bad_plan"


def test_status_goes_to_whoever_talks_and_stops_when_they_leave():
    node, _, _ = core(1)
    node.tick(0.0)
    assert not node.up
    node.on_upstream(b"up", [pack(Header(Kind.PING))], 0.05)
    node.tick(0.06)
    assert kinds(node) == [Kind.PONG]
    assert node.due_s(0.06) == pytest.approx(0.04)
    node.tick(0.1)
    assert kinds(node) == [Kind.PONG, Kind.STATUS]
    values = decode_json(parse(node.up[-1][1]).body)
    assert values["node"] == 1 and values["meter"] == "constant-12W"
    node.up.clear()
    node.acks.clear()
    status = Header(Kind.STATUS)
    body = attach(status, encode_json({"node": 2, "every_s": 0.1}))
    node.on_downstream([pack(status), body], 0.15)
    assert kinds(node) == [Kind.STATUS]
    node.tick(40.0)
    node.up.clear()
    node.tick(41.0)
    assert not node.up


def test_a_status_with_a_bad_field_is_refused():
    node, _, _ = core(2)
    good = {
        **node._status(0.0),
        "load": 0,
        "backlog_s": 0.5,
        "overruns": 0,
        "stages": 3,
        "unauthenticated": 0,
    }
    assert NodeStatus.from_json(good, 1.0, False).backlog_s == 0.5
    for change in ({"node": "0"}, {"load": None}, {"stages": True}, {"meter": 3}):
        with pytest.raises(WireError, match=next(iter(change))):
            NodeStatus.from_json({**good, **change}, 1.0, False)


def test_a_request_ends_once_and_is_counted_once():
    table = PendingTable(1)
    seq = table.register(Pending(5.0, plan=Plan((1, 2))))
    with pytest.raises(RequestRefused, match="bound is 1"):
        table.register(Pending(5.0, plan=Plan((1, 2))))
    control = table.register(Pending(1.0))
    assert [entry[0] for entry in table.late(2.0)] == [control]
    assert table.in_flight == 1 and table.settle(seq) is not None
    assert table.settle(seq) is None and table.in_flight == 0
    table.register(Pending(5.0, plan=Plan((1, 2))))
    assert len(table.close()) == 1 and table.in_flight == 0
    with pytest.raises(HandshakeError):
        table.register(Pending(5.0))


def of_client(client, cuts, seq):
    header, body = infer(cuts, seq)
    header.client = client * 16
    return [pack(header), body]


def refusals(node):
    """Whom the node refused, and takes them out of `up`."""
    replies = [parse(parts) for _, parts in node.up]
    node.up.clear()
    return [
        (r.header.client[:1], r.header.seq)
        for r in replies
        if r.header.kind is Kind.ERROR and decode_json(r.body)["code"] == "refused"
    ]


@pytest.mark.parametrize("cuts", [(10, 19), (0, 0)])
def test_a_greedy_client_makes_room_for_the_others(cuts):
    """In the compute queue (10, 19) and on the hop (0, 0)."""
    node, queue, _ = core(0, max_queue=4)
    for seq in range(6):
        node.on_upstream(b"g", of_client(b"g", cuts, seq), 0.0)
    assert refusals(node) == [(b"g", 4), (b"g", 5)]
    node.on_upstream(b"m", of_client(b"m", cuts, 0), 0.0)
    node.on_upstream(b"n", of_client(b"n", cuts, 0), 0.0)
    assert refusals(node) == [(b"g", 3), (b"g", 2)] and node.refused == 4
    node.on_upstream(b"m", of_client(b"m", cuts, 1), 0.0)
    assert refusals(node) == [(b"m", 1)]
    if cuts == (0, 0):
        assert node.hop.backlog_frames == 4
        assert node.hop.backlog_bytes == 4 * SPEC.cut_bytes[0]
        served = [parse(node.hop.outbox.popleft()).header for _ in range(4)]
        assert not node.hop.outbox and node.hop.backlog_frames == 4
    else:
        served = [queue.get().header for _ in range(4)]
    assert [(h.client[:1], h.seq) for h in served] == [(b"g", 0), (b"m", 0), (b"n", 0), (b"g", 1)]


def test_acknowledgements_are_expected_in_the_order_of_sending():
    """Round-robin lets a later request overtake; what it overtook is not taken for lost."""
    hop = Hop(b"me" * 8)
    headers = {}
    for client, seq in ((b"a", 0), (b"a", 1), (b"b", 0)):
        header, _ = infer((0, 0), seq)
        header.client = client * 16
        headers[client, seq] = header
        hop.send(header, None, 0.0)
    assert hop.probe(ProbeRun(Header(Kind.PROBE), 1000, 1), 0.0)
    order = [parse([*hop.outbox.popleft()[:1], bytes(n)]).header for n in (602112,) * 3]
    assert [(h.client[:1], h.seq) for h in order] == [(b"a", 0), (b"b", 0), (b"a", 1)]
    for n, header in enumerate(order):
        ack(hop, header, 0.1, 0.1)
        assert hop.backlog_frames == 3 - n and hop.backlog_bytes == (2 - n) * 602112 + 1000
    assert parse(hop.outbox.popleft()).header.kind is Kind.PING


def test_a_peer_over_its_rate_is_told_so_and_others_are_served():
    config = CoreConfig(2, 3, SPEC, DIGEST, 64, {"name": "n2"}, peer_rate_rps=2.0)
    queue = FairQueue(64)
    node = NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter())
    for seq in range(6):
        node.on_upstream(b"flood", of_client(b"f", (0, 0), seq), 0.0)
    node.on_upstream(b"quiet", of_client(b"q", (0, 0), 0), 0.0)
    replies = [parse(parts) for _, parts in node.up]
    reasons = [decode_json(r.body)["reason"] for r in replies if r.header.kind is Kind.ERROR]
    assert reasons == ["node n2: more than 2 messages/s from one peer; send slower"] * 2
    assert len(queue) == 5 and node.refused == 2
    node.up.clear()
    node.acks.clear()
    node.on_upstream(b"flood", of_client(b"f", (0, 0), 6), 1.0)
    assert kinds(node) == [Kind.ACK] and len(queue) == 6


def test_control_frames_and_probes_are_bounded():
    node, _, _ = core(0)
    for kind in (Kind.HELLO, Kind.PROBE, Kind.PROFILE):
        header = Header(kind, client=b"c" * 16)
        body = array_body(header, np.zeros(100_000, np.uint8))
        node.on_upstream(b"id", [pack(header), body], 0.0)
    errors = [decode_json(parse(parts).body) for _, parts in node.up]
    assert [e["code"] for e in errors] == ["bad_body"] * 3 and not node.hop.outbox
    node.up.clear()
    for seq in range(80):
        body = encode_json({"hop": 0, "payload_bytes": 10, "repeats": 1})
        header = Header(Kind.PROBE, client=b"c" * 16, seq=seq)
        body = attach(header, body)
        node.on_upstream(b"id", [pack(header), body], 0.0)
    assert refusals(node) == [(b"c", seq) for seq in range(65, 80)]
