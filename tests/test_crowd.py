"""Many clients at one node, without sockets: who is told, refused, and when each comes again."""

import heapq
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor._compute import FairQueue, Outcome
from executor._fairness import Crowd
from executor._hop import Hop
from executor._json import decode_json, encode_json
from executor._listeners import KEPT_S, PER_TURN, Listeners, silent_after_s
from executor._nodecore import CoreConfig, NodeCore
from executor.energy import ConstantPowerMeter
from executor.plan import ModelSpec, Plan
from executor.recovery import SILENT_AFTER_S, Fail, Recovery, Send
from executor.wire import Header, Kind, array_body, attach, pack, parse

SPEC = ModelSpec("toy", ("a", "b"), (48, 48, 40), (True, True), 1, (1, 1))
DIGEST = b"\xab" * 8


def node(index=0, n_nodes=2, max_queue=64):
    queue = FairQueue(max_queue)
    config = CoreConfig(index, n_nodes, SPEC, DIGEST, max_queue, {"name": "fog"}, None, 1e6)
    return NodeCore(config, queue, lambda now_s: {}, ConstantPowerMeter()), queue


def request(client, seq, cuts=(2,)):
    header = Header(Kind.INFER, client=client, seq=seq, cuts=cuts, digest=DIGEST, tries=1)
    body = array_body(header, np.zeros(12, np.float32))
    return [pack(header), body]


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 100))
def test_everybody_is_told_in_turn_and_no_turn_is_long(n_peers, per_turn, before):
    listeners = Listeners(2, per_turn)
    peers = [b"%d" % i for i in range(n_peers)]
    for peer in peers:
        listeners.heard(peer, 0.0)
    for _ in range(before):
        listeners.turn(1)
    turns = max(1, -(-n_peers // per_turn))
    assert listeners.every_s == pytest.approx(0.1 * turns)
    told = [listeners.turn(0) for _ in range(turns)]
    assert all(len(turn) <= per_turn and len(set(turn)) == len(turn) for turn in told)
    assert set(itertools.chain(*told)) == set(peers) == set(listeners.everybody())


def test_peers_that_left_are_told_no_more():
    listeners = Listeners(1, 4, bound=6)
    for i in range(8):
        listeners.heard(b"%d" % i, float(i))
    assert len(listeners) == 6 and listeners.last_heard_s == 5.0
    listeners.forget(b"5")
    listeners.heard(b"1", 3.0 + KEPT_S)
    listeners.forget_silent(2.5 + KEPT_S)
    assert sorted(listeners.everybody()) == [b"1", b"3", b"4"]
    listeners.heard(b"8", 40.0)
    assert b"8" in listeners.turn(0)


def test_a_node_with_many_clients_tells_each_less_often_and_says_so():
    core, _ = node(0, 3)
    n_peers = 2 * PER_TURN
    for i in range(n_peers):
        core.on_upstream(b"%d" % i, [pack(Header(Kind.PING))], 0.0)
    core.up.clear()
    header = Header(Kind.STATUS)
    body = attach(header, encode_json({"node": 2, "every_s": 0.1}))
    own, passed_on = set(), set()
    for tick in range(1, 3):
        core.tick(0.1 * tick)
        assert len(core.up) == PER_TURN
        assert decode_json(parse(core.up[0][1]).body)["every_s"] == 0.2
        own |= {peer for peer, _ in core.up}
        core.up.clear()
        core.on_downstream([pack(header), body], 0.1 * tick)
        assert len(core.up) == PER_TURN
        passed_on |= {peer for peer, _ in core.up}
        core.up.clear()
    assert len(own) == len(passed_on) == n_peers
    # A broken link is told to all at once: their requests have to find another way.
    core.on_link(core.hop, False, 0.25)
    core.tick(0.25)
    assert len(core.up) == n_peers
    assert decode_json(parse(core.up[0][1]).body)["hop_up"] is False


@pytest.mark.parametrize(
    "body",
    [{}, {"node": 0, "every_s": 0.1}, {"node": 3, "every_s": 0.1}, {"node": 1, "every_s": -1}],
)
def test_a_bad_status_from_downstream_goes_nowhere(body):
    core, _ = node(0, 3)
    core.on_upstream(b"peer", [pack(Header(Kind.PING))], 0.0)
    core.up.clear()
    header = Header(Kind.STATUS)
    core.on_downstream([pack(header), attach(header, encode_json(body))], 0.0)
    assert not core.up and core.bad_frames == 1


def test_silence_is_judged_by_how_often_a_node_speaks():
    assert [silent_after_s(0.7, s) for s in (0.0, 0.1, 0.2, 0.4)] == [0.7, 0.7, 0.7, 1.4]
    hop = Hop(b"me" * 8)
    hop.on_connected(0.0)
    assert hop.is_up(0.59) and not hop.is_up(0.61)
    hop.every_s = 0.4
    assert hop.is_up(1.19) and not hop.is_up(1.21)

    machine = Recovery(("edge", "cloud"), 2)
    for k in range(2):
        machine.hello(k, f"b{k}", "", 0.0)
        # The cloud tells one peer ten times a second; the edge passes that on to many, seldom.
        machine.status(k, f"b{k}", {}, 0.0, 0.0, every_s=0.4 if k == 0 else 0.1)
    machine.tick(2 * SILENT_AFTER_S - 0.01)
    assert machine.down == frozenset()
    machine.tick(2 * SILENT_AFTER_S + 0.01)
    assert machine.down == {0, 1}


def test_a_connection_without_a_word_is_dialled_anew_but_not_after_a_pause_of_ones_own():
    hop = Hop(b"me" * 8)
    hop.on_connected(0.0)
    for tenth in range(39):
        hop.tick(0.1 * tenth)
    assert not hop.is_silent(3.9) and hop.is_silent(4.1)
    hop.on_heard(4.1)
    hop.tick(4.1)
    hop.tick(20.0)  # this process was stopped meanwhile; what came is not read yet
    assert not hop.is_silent(20.0) and not hop.is_silent(23.9) and hop.is_silent(24.1)


def test_a_node_survives_peers_that_leave_while_it_does_not_read():
    """In a process of its own: what libzmq does about it else is to abort."""
    trial = subprocess.run(
        [sys.executable, "-c", _FULL_INBOX], capture_output=True, text=True, timeout=120
    )
    assert (trial.returncode, trial.stdout) == (0, "read\n"), trial.stderr


_FULL_INBOX = """
import time
import zmq
from executor._sockets import bind_router, connect_dealer
from executor.cluster import Cluster, NodeConfig

ctx, far = zmq.Context(), zmq.Context()
nodes = NodeConfig("n", "127.0.0.1", 0), NodeConfig("m", "127.0.0.1", 1)
cluster = Cluster("alexnet", "none", nodes)
router, port = bind_router(ctx, cluster, nodes[0])
target = NodeConfig("n", "127.0.0.1", port)
dealer = connect_dealer(far, cluster, target, "client")
for _ in range(7):  # with heartbeats every second in between, the node's process would end
    time.sleep(0.5)
    if dealer.poll(0, zmq.POLLOUT):
        dealer.send(b"x", zmq.NOBLOCK)
dealer.close(0)
time.sleep(0.2)
while router.poll(300):
    router.recv_multipart()
print("read")
router.close(0)
ctx.term()
far.term()
"""


def test_the_refused_come_back_as_places_get_free():
    crowd = Crowd()
    assert crowd.refuse(b"first", 0.0) == pytest.approx(0.1)
    for i in range(21):  # 20 answers a second
        crowd.answered(b"other", 0.05 * i)
    waits = [crowd.refuse(b"%d" % i, 1.0) for i in range(39)]
    assert waits[0] == pytest.approx(2 / 20) and waits[-1] == pytest.approx(40 / 20)
    crowd.answered(b"7", 1.0)
    assert len(crowd) == 39
    for i in range(1000):
        assert crowd.refuse(b"new %d" % i, 1.0) <= 15.0
    # Who does not come back is not waited for.
    crowd.refuse(b"late", 32.0)
    assert len(crowd) == 1


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans(), st.floats(-1.0, 20.0)), max_size=80))
def test_no_wait_is_endless_or_negative(events):
    crowd, now_s = Crowd(), 0.0
    for client, answered, gap_s in events:
        now_s += gap_s
        if answered:
            crowd.answered(bytes([client]), now_s)
        else:
            assert 0.0 < crowd.refuse(bytes([client]), now_s) <= 15.0
        assert len(crowd) <= 51


def test_a_crowd_is_served_alike_and_sends_little_for_nothing():
    """100 clients, ten of them greedy, at a node with 32 places that serves 25 a second."""
    core, queue = node(max_queue=32)
    clients = {bytes([i]) * 16: 8 if i % 10 == 9 else 1 for i in range(100)}
    hold_s = dict.fromkeys(clients, 0.0)
    done, sent = dict.fromkeys(clients, 0), 0
    numbers = itertools.count(1)
    due = [(0.001 * i, next(numbers), c) for i, c in enumerate(clients) for _ in range(clients[c])]
    heapq.heapify(due)
    now_s, served, n_served = 0.0, 0, 3000
    while served < n_served:
        end_s = now_s + 0.04
        job = queue.get() if len(queue) else None
        while due and due[0][0] <= end_s:
            now_s, _, client = heapq.heappop(due)
            if now_s < hold_s[client]:  # what `Recovery` does
                heapq.heappush(due, (hold_s[client], next(numbers), client))
                continue
            sent += 1
            core.on_upstream(client, request(client, next(numbers)), now_s)
            again(core, now_s, due, numbers, hold_s, done)
        now_s = end_s
        if job is not None:
            served += 1
            output = np.zeros(10, np.float32)
            core.on_outcome(Outcome(job, now_s, now_s, 0.04, output), now_s)
            again(core, now_s, due, numbers, hold_s, done)
    assert sum(done.values()) == n_served
    assert max(done.values()) <= 1.2 * min(done.values())
    assert sent <= 2.5 * n_served


def again(core, now_s, due, numbers, hold_s, done):
    """Let whoever got an answer send the next request: at once, or when it was told to."""
    while core.up:
        client, parts = core.up.popleft()
        frame = parse(parts)
        wait_s = 0.0
        if frame.header.kind is Kind.RESULT:
            done[client] += 1
        else:
            error = decode_json(frame.body)
            assert error["code"] == "refused" and "send slower" in error["reason"]
            wait_s = error["wait_s"]
            hold_s[client] = now_s + wait_s
        heapq.heappush(due, (now_s + wait_s, next(numbers), client))


def test_a_full_plan_is_not_sent_again_before_its_time():
    machine = Recovery(("fog", "cloud"), 2)
    for k in range(2):
        machine.hello(k, f"b{k}", "", 0.0)
    (sent,) = machine.submitted(1, Plan((2,)), 30.0, 0.0)
    assert isinstance(sent, Send)
    (fail,) = machine.error(1, 1, "refused", "its queue is full", 0, 0, 0.1, wait_s=2.0)
    assert fail == Fail(1, "refused", "its queue is full", 2.0)
    (fail,) = machine.submitted(2, Plan((2,)), 30.0, 0.6)
    assert isinstance(fail, Fail) and fail.code == "refused" and fail.reason == "its queue is full"
    assert fail.wait_s == pytest.approx(1.5) and machine.in_flight == 0
    # Another plan may find room; and in time the same one.
    assert isinstance(machine.submitted(3, Plan((0,)), 30.0, 0.6)[0], Send)
    for k in range(2):
        machine.status(k, f"b{k}", {}, 0.0, 2.0)
    assert isinstance(machine.submitted(4, Plan((2,)), 30.0, 2.2)[0], Send)
    counts = machine.counts
    assert (counts.submitted, counts.failed) == (4, 2)
