"""What is sent of a STATUS: all of it where it is news, else a BEAT; what a client makes of it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_nodecore import DIGEST
from test_nodecore import core as core_of

from executor._bulletin import WHOLE_EVERY_S, Bulletin, is_news
from executor._json import decode_json, encode_json
from executor._records import NodeStatus
from executor.wire import Header, Kind, array_body, attach, message, pack, parse

PING = [pack(Header(Kind.PING))]


def node(index, load=lambda: 0.0):
    own = {"backlog_s": 0.0, "overruns": 0, "stages": 0, "unauthenticated": 0}
    return core_of(index, measure=lambda now_s: {**own, "load": load()})[0]


def said(core):
    """What it sent since, as (peer, kind)."""
    out = [(peer, parse(parts).header.kind) for peer, parts in core.up]
    core.up.clear()
    return out


def status(node=1, **values):
    header = Header(Kind.STATUS)
    return message(header, attach(header, encode_json({"node": node, "every_s": 0.1, **values})))


def test_a_node_at_rest_sends_one_status_a_second_and_beats_between():
    core = node(2)
    core.on_upstream(b"up", PING, 0.0)
    sent, now_s, n_bytes = [], 0.0, 0
    while now_s < 3.05:
        core.tick(now_s)
        n_bytes += sum(len(part) for _, parts in core.up for part in parts)
        sent += said(core)
        now_s += core.due_s(now_s) + 1e-9
    kinds = [kind for _, kind in sent]
    assert len(kinds) == 31 and kinds[0] is Kind.STATUS
    assert 3 <= kinds.count(Kind.STATUS) <= 4 and kinds.count(Kind.BEAT) >= 27
    assert n_bytes < 1000 * now_s  # ten STATUS a second were some 5 kB


def test_what_changes_is_told_at_once_and_to_a_newcomer_all_of_it():
    load = 0.2
    core = node(2, lambda: load)
    core.on_upstream(b"one", PING, 0.0)
    core.tick(0.0)
    assert said(core) == [(b"one", Kind.STATUS)]
    load = 0.215
    core.on_upstream(b"two", PING, 0.1)
    core.tick(0.1)
    assert said(core) == [(b"one", Kind.BEAT), (b"two", Kind.STATUS)]
    load = 0.23  # against what was told, not against the reading before
    core.tick(0.21)
    assert said(core) == [(b"one", Kind.STATUS), (b"two", Kind.STATUS)]
    core.tick(0.32)
    assert said(core) == [(b"one", Kind.BEAT), (b"two", Kind.BEAT)]


def test_a_broken_link_is_news():
    core = node(1)
    core.on_link(core.hop, False, 0.0)
    core.on_upstream(b"up", PING, 0.0)
    for now_s, kind in ((0.0, Kind.STATUS), (0.15, Kind.BEAT)):
        core.tick(now_s)
        assert said(core) == [(b"up", kind)]
    core.on_link(core.hop, True, 0.16)
    core.tick(0.16)
    assert decode_json(parse(core.up[0][1]).body)["hop_up"] is True
    assert said(core) == [(b"up", Kind.STATUS)]


def test_beats_are_passed_on_and_a_newcomer_gets_what_they_stand_for():
    core = node(0)
    beat = [pack(Header(Kind.BEAT, seq=2))]
    core.on_upstream(b"one", PING, 0.0)
    core.on_downstream(beat, 0.0)
    assert said(core) == [] and core.bad_frames == 0  # of a node whose STATUS has not come yet
    core.on_downstream(status(2, load=0.5), 0.1)
    core.on_downstream(beat, 0.2)
    assert said(core) == [(b"one", Kind.STATUS), (b"one", Kind.BEAT)]
    core.on_upstream(b"two", PING, 0.25)
    core.on_downstream(beat, 0.3)
    assert decode_json(parse(core.up[1][1]).body)["load"] == 0.5
    assert said(core) == [(b"one", Kind.BEAT), (b"two", Kind.STATUS)]
    for wrong in (0, 3):
        core.on_downstream([pack(Header(Kind.BEAT, seq=wrong))], 0.4)
    assert said(core) == [] and core.bad_frames == 2


def test_a_beat_does_not_come_from_upstream():
    core = node(1)
    core.on_upstream(b"up", [pack(Header(Kind.BEAT, seq=1))], 0.0)
    assert core.bad_frames == 1


@given(st.lists(st.tuples(st.sampled_from("fbl.."), st.integers(1, 30)), max_size=40))
def test_a_client_knows_what_a_node_would_say(events):
    """Frames, bytes acknowledged and load move a node; its last STATUS and beats say as much."""
    load = 0.0
    core, seq = node(0, lambda: load), 0
    core.on_upstream(b"up", PING, 0.0)
    core.on_link(core.hop, True, 0.0)
    bulletin, now_s, known = Bulletin(0), 0.0, None
    for event, hundredths in events:
        now_s += hundredths / 100
        if event == "f":
            seq += 1
            header = Header(Kind.INFER, client=b"c" * 16, seq=seq, cuts=(0, 0), digest=DIGEST)
            core.hop.send(header, array_body(header, np.zeros(12, np.float32)), now_s)
        elif event == "b" and seq:
            reply = Header(Kind.ACK, client=b"c" * 16, seq=seq, clock_s=(0.0, now_s, now_s))
            core.hop.on_ack(reply, now_s)
        elif event == "l":
            load = (load + 0.01 * hundredths) % 0.9
        true = NodeStatus.from_json(core._status(now_s), now_s, down=False)
        bulletin.report(core._status(now_s), now_s)
        ((_, parts),) = bulletin.messages([b"up"])
        frame = parse(parts)
        if frame.header.kind is Kind.STATUS:
            known = NodeStatus.from_json(decode_json(frame.body), now_s, down=False)
        else:
            known = known.at(now_s)
        assert known.load == pytest.approx(true.load, abs=0.021)
        assert known.stalled_s == pytest.approx(true.stalled_s, abs=0.051)
        assert (known.hop_age_s is None) is (true.hop_age_s is None)
        assert known.hop_age_s == pytest.approx(true.hop_age_s, abs=0.051)
        assert known.energy_j == pytest.approx(true.energy_j, abs=1.01 * 12.0 * WHOLE_EVERY_S)
        same = {n: getattr(true, n) for n in ("load", "stalled_s", "hop_age_s", "energy_j")}
        assert dataclasses.replace(known, **same) == true


def test_durations_are_news_only_where_they_do_not_just_grow():
    told = {"hop_age_s": 2.0, "stalled_s": 0.0, "queue_len": 0}
    assert not is_news({**told, "hop_age_s": 2.5, "energy_j": 9.0}, told, 0.5)
    assert is_news(told, told, 0.5)  # measured anew meanwhile
    assert is_news({**told, "hop_age_s": None}, told, 0.0)
    assert is_news({**told, "hop_age_s": 2.1, "stalled_s": 0.1}, told, 0.1)
    assert is_news({**told, "queue_len": 1}, told, 0.0)
