"""The recovery by itself: what is promised of every request, whatever happens to the nodes."""

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor.model import model_spec
from executor.plan import Plan, candidate_plans, find_route, plan_mask
from executor.recovery import MAX_TRIES, SILENT_AFTER_S, Complete, Fail, Greet, Recovery, Send

N = 21
NAMES = ("edge", "fog", "cloud")
DIRECT = {0: 2}
PLANS = [Plan(c) for c in [(3, 10), (0, 0), (0, N), (N, N), (5, N), (7, 7), (0, 9)]]


def started(direct=None):
    machine = Recovery(NAMES, N, direct)
    for node in range(3):
        machine.hello(node, f"b{node}", "", 0.0)
    return machine


def hear(machine, nodes, now_s, **boots):
    out = []
    for node in nodes:
        out += machine.status(node, boots.get(NAMES[node], f"b{node}"), {}, 0.0, now_s)
    return out


def hear_until(machine, nodes, start_s, end_s):
    """Their heartbeats ten times a second, and the last at the end."""
    for k in range(1, int(10 * (end_s - start_s)) + 1):
        hear(machine, nodes, start_s + k / 10)
    hear(machine, nodes, end_s)


def sent(instructions):
    return [(i.seq, i.plan.cuts, i.tries, i.direct) for i in instructions if isinstance(i, Send)]


class Chain(RuleBasedStateMachine):
    """Random events on a chain of three with a direct link, against what is promised."""

    def __init__(self):
        super().__init__()
        self.machine = started(DIRECT)
        self.now_s = 0.0
        self.deadlines = {}
        self.tries = {}
        self.seq = 0

    def obey(self, instructions):
        for i in instructions:
            if isinstance(i, Send):
                assert i.seq in self.deadlines
                assert i.tries == self.tries.get(i.seq, 0) + 1 <= MAX_TRIES
                self.tries[i.seq] = i.tries
                route = find_route(
                    i.plan,
                    N,
                    down=self.machine.down,
                    broken=self.machine._broken,
                    direct=DIRECT,
                )
                assert route is not None, "sent where it cannot arrive"
                assert i.direct == any(b > a + 1 for a, b in pairwise(route)) or i.direct
            elif isinstance(i, Complete | Fail):
                del self.deadlines[i.seq]  # a second end is a KeyError
                self.tries.pop(i.seq, None)
            else:
                assert isinstance(i, Greet)

    @rule(plan=st.sampled_from(PLANS), patience_s=st.floats(0.0, 10.0))
    def submit(self, plan, patience_s):
        self.seq += 1
        self.deadlines[self.seq] = self.now_s + patience_s
        self.obey(self.machine.submitted(self.seq, plan, self.deadlines[self.seq], self.now_s))

    @precondition(lambda self: self.seq)
    @rule(data=st.data())
    def reply(self, data):
        seq = data.draw(st.integers(1, self.seq))
        was_open = seq in self.deadlines
        instructions = self.machine.result(seq)
        assert bool(instructions) == was_open
        self.obey(instructions)

    @precondition(lambda self: self.seq)
    @rule(
        data=st.data(),
        code=st.sampled_from(["hop_down", "lost", "damaged", "wrong_model", "failed", "refused"]),
        node=st.integers(0, 2),
        to=st.integers(0, 2),
        wait_s=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def error(self, data, code, node, to, wait_s):
        seq = data.draw(st.integers(1, self.seq))
        tries = data.draw(st.integers(0, self.tries.get(seq, 0) + 1))
        self.obey(self.machine.error(seq, tries, code, "why", node, to, self.now_s, wait_s))

    @rule(
        node=st.integers(0, 2),
        boot=st.sampled_from(["b", "b", "b", "c"]),
        up=st.booleans(),
        direct_up=st.booleans(),
        stalled_s=st.sampled_from([0.0, 0.0, 3.0]),
        every_s=st.sampled_from([0.1, 0.1, 0.4]),
    )
    def heartbeat(self, node, boot, up, direct_up, stalled_s, every_s):
        links = {node + 1: up} if node < 2 else {}
        if node == 0:
            links[2] = direct_up
        boot = f"{boot}{node}"
        self.obey(self.machine.status(node, boot, links, stalled_s, self.now_s, every_s))

    @rule(
        node=st.integers(0, 2),
        boot=st.sampled_from("bc"),
        problem=st.sampled_from(["", "", "expected digest"]),
    )
    def handshake(self, node, boot, problem):
        self.obey(self.machine.hello(node, f"{boot}{node}", problem, self.now_s))

    @rule(up=st.booleans())
    def first_link(self, up):
        self.obey(self.machine.link(up, self.now_s))

    @rule()
    def damage(self):
        self.obey(self.machine.damaged(self.now_s))

    @rule(dt_s=st.floats(0.0, 1.5))
    def tick(self, dt_s):
        self.now_s += dt_s
        self.obey(self.machine.tick(self.now_s))
        assert all(deadline_s > self.now_s for deadline_s in self.deadlines.values())

    @invariant()
    def what_is_open_is_what_has_not_ended(self):
        assert self.machine.in_flight == len(self.deadlines)
        counts = self.machine.counts
        assert counts.submitted == counts.completed + counts.failed + len(self.deadlines)

    def teardown(self):
        self.now_s += 20.0
        self.obey(self.machine.tick(self.now_s))
        assert not self.deadlines and self.machine.in_flight == 0


TestChain = Chain.TestCase
TestChain.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_silent_node_is_gone_around_and_used_again():
    machine = started()
    assert sent(machine.submitted(1, Plan((3, 10)), 30.0, 0.0)) == [(1, (3, 10), 1, False)]
    late_s = SILENT_AFTER_S + 0.01
    hear_until(machine, [0, 1], 0.0, late_s)
    # Without the cloud the fog runs the rest; without the fog the edge does.
    assert sent(machine.tick(late_s)) == [(1, (3, N), 2, False)]
    hear_until(machine, [0], late_s, 2 * late_s)
    assert machine.down == {2}  # silence is judged once all that came was taken in
    assert sent(machine.tick(2 * late_s)) == [(1, (N, N), 3, False)]
    assert machine.down == {1, 2}
    hear(machine, [0, 1, 2], 2.0)
    assert machine.down == frozenset()
    assert sent(machine.submitted(2, Plan((3, 10)), 30.0, 2.0)) == [(2, (3, 10), 1, False)]
    assert machine.result(1) == [Complete(1, 3)] and machine.result(1) == []
    assert (machine.counts.late_replies, machine.counts.retried) == (1, 1)


def test_a_silent_hop_is_gone_around_when_patience_ends():
    machine = started()
    machine.patience_s = (2.0, 0.7)
    machine.submitted(1, Plan((3, 10)), 30.0, 0.0)
    for now_s in (0.8, 1.9):
        # Nothing comes over the first hop, so nothing is known of what lies behind the second.
        hear(machine, [0], now_s)
        machine.status(0, "b0", {1: False}, 0.0, now_s)
        assert sent(machine.tick(now_s)) == [] and machine.down == frozenset()
    assert sent(hear(machine, [0], 2.1) + machine.tick(2.1)) == [(1, (N, N), 2, False)]
    assert machine.down == {1, 2}


def test_heartbeats_that_end_one_after_the_other_end_with_the_same_hop():
    machine = started()
    machine.patience_s = (2.0, 0.7)
    machine.submitted(1, Plan((0, 0)), 30.0, 0.0)
    hear(machine, [1], 0.3)  # the cloud's last came 0.3 s before the fog's
    for tenth in range(4, 20):
        hear(machine, [0], tenth / 10)
        assert sent(machine.tick(tenth / 10)) == [] and machine.down == frozenset()
    hear(machine, [0], 2.4)
    assert sent(machine.tick(2.4)) == [(1, (N, N), 2, False)]


def test_nodes_that_are_heard_again_one_after_the_other_were_silent_with_the_same_hop():
    machine = started()
    machine.patience_s = (3.5, SILENT_AFTER_S)
    machine.submitted(1, Plan((0, 0)), 30.0, 0.0)
    hear_until(machine, [0], 0.0, 2.5)
    for now_s in (2.51, 2.56):  # what the fog said comes before what the cloud said
        hear(machine, [0, 1], now_s)
        assert sent(machine.tick(now_s)) == [] and machine.down == frozenset()
    hear(machine, [2], 2.57)
    hear_until(machine, [0, 1], 2.57, 3.2)
    assert sent(machine.tick(3.2)) == [] and machine.down == frozenset()
    hear(machine, [0, 1], 3.3)  # this silence is the second hop's, the fog was heard through it
    assert sent(machine.tick(3.3)) == [(1, (0, N), 2, False)]


def test_the_second_hop_has_a_patience_of_its_own():
    machine = started()
    machine.patience_s = (0.7, 2.0)
    machine.submitted(1, Plan((3, 10)), 30.0, 0.0)
    for start_s, now_s, plans in ((0.0, 1.9, []), (1.9, 2.1, [(1, (3, N), 2, False)])):
        hear_until(machine, [0, 1], start_s, now_s)
        assert sent(machine.tick(now_s)) == plans


def test_a_link_that_a_node_calls_down_breaks_when_patience_ends_or_it_fails():
    machine = started(DIRECT)
    machine.patience_s = (2.0, 2.0)
    machine.submitted(1, Plan((3, 10)), 30.0, 0.0)
    hear(machine, [1, 2], 1.0)
    assert sent(machine.status(0, "b0", {1: False, 2: True}, 0.0, 1.0)) == []
    hear(machine, [0, 1, 2], 2.2)
    assert sent(machine.status(0, "b0", {1: False, 2: True}, 0.0, 2.2)) == []
    # It said so first at 1.0, and what a node calls down has been silent for 0.7 s.
    assert sent(hear(machine, [1], 2.31)) == [(1, (3, 3), 2, True)]
    machine.status(0, "b0", {1: True, 2: True}, 0.0, 2.5)
    machine.submitted(2, Plan((3, 10)), 30.0, 2.5)
    assert sent(machine.error(2, 1, "hop_down", "gone", 0, 1, 2.5)) == [(2, (3, 3), 2, True)]


def test_a_direct_link_leads_past_the_dead_node():
    machine = started(DIRECT)
    machine.submitted(1, Plan((3, 10)), 30.0, 0.0)
    out = machine.error(1, 1, "hop_down", "gone", 0, 1, 0.0)
    assert sent(out) == [(1, (3, 3), 2, True)]
    # The cloud is still reached, so the fog alone is down.
    assert machine.down == {1}
    assert sent(machine.submitted(2, Plan((5, 5)), 30.0, 0.0)) == [(2, (5, 5), 1, True)]
    machine.preferred = (Plan((8, 8)),)
    assert sent(machine.submitted(3, Plan((5, 9)), 30.0, 0.0)) == [(3, (8, 8), 1, True)]


def test_requests_wait_for_the_first_node_until_their_deadline():
    machine = started()
    machine.submitted(1, Plan((3, 10)), 30.0, 0.0)
    machine.link(False, 0.1)
    assert machine.submitted(2, Plan((N, N)), 1.0, 0.1) == []
    (ended,) = machine.tick(1.0)
    assert (ended.seq, ended.code) == (2, "timeout") and "edge" in ended.reason
    machine.link(True, 1.1)
    # The first node is heard first, and may do it alone.
    assert sent(hear(machine, [0, 1, 2], 1.2)) == [(1, (N, N), 2, False)]


def test_another_process_is_asked_who_it_is_before_it_is_used():
    machine = started()
    machine.submitted(1, Plan((0, N)), 30.0, 0.0)
    out = hear(machine, [0, 1, 2], 0.1, fog="other")
    assert Greet() in out and sent(out) == [(1, (N, N), 2, False)]
    machine.hello(1, "other", "expected digest 'a', got 'b'", 0.2)
    machine.hello(1, "other", "expected digest 'a', got 'b'", 0.4)
    assert machine.counts.refused_nodes == 1 and 1 in machine.down
    assert Greet() not in hear(machine, [0, 1, 2], 1.0, fog="other")
    assert sent(machine.submitted(2, Plan((0, N)), 30.0, 1.0)) == [(2, (N, N), 1, False)]
    hear(machine, [0, 1, 2], 1.1, fog="third")
    machine.hello(1, "third", "", 1.2)
    assert sent(machine.submitted(3, Plan((0, N)), 30.0, 1.2)) == [(3, (0, N), 1, False)]


def test_a_hop_that_moves_nothing_is_avoided_after_half_the_time():
    machine = started()
    machine.submitted(1, Plan((0, N)), 10.0, 0.0)
    for now_s, stalled_s, plans in ((4.0, 4.0, []), (5.5, 5.5, [(1, (N, N), 2, False)])):
        hear(machine, [1, 2], now_s)
        assert sent(machine.status(0, "b0", {1: True}, stalled_s, now_s)) == plans


def test_losses_are_tried_again_then_avoided_and_other_errors_end_it():
    machine = started()
    machine.submitted(1, Plan((0, N)), 10.0, 0.0)
    assert sent(machine.error(1, 1, "lost", "x", 0, 1, 0.0)) == [(1, (0, N), 2, False)]
    assert machine.error(1, 1, "lost", "x", 0, 1, 0.0) == []  # of the first try: known
    assert sent(machine.error(1, 2, "damaged", "x", 1, 1, 0.0)) == [(1, (N, N), 3, False)]
    assert machine.error(1, 3, "failed", "no", 0, 0, 0.0) == [Fail(1, "failed", "no")]
    machine.submitted(2, Plan((N, N)), 10.0, 0.0)
    for tries in range(1, MAX_TRIES):
        assert sent(machine.error(2, tries, "damaged", "x", 0, 0, 0.0))
    (ended,) = machine.error(2, MAX_TRIES, "damaged", "x", 0, 0, 0.0)
    assert ended.code == "failed" and "gave up" in ended.reason


def test_a_refusal_that_comes_after_the_deadline_is_a_timeout():
    machine = started()
    for seq, now_s, code in ((1, 9.9, "refused"), (2, 10.0, "timeout")):
        machine.submitted(seq, Plan((N, N)), 10.0, 0.0)
        (end,) = machine.error(seq, 1, "refused", "no room", 0, 0, now_s)
        assert (end.seq, end.code) == (seq, code)


@pytest.mark.parametrize("direct", [{}, DIRECT])
def test_the_mask_is_what_the_recovery_routes(direct):
    spec = model_spec("mobilenet_v2")
    plans = candidate_plans(spec)
    for down in ((), (1,), (2,), (1, 2), (0,)):
        mask = plan_mask(plans, spec, down=down, direct=direct)
        for plan, ok in zip(plans, mask, strict=True):
            needed = set(range(plan.last_node(N) + 1))
            if direct and plan.cuts[0] == plan.cuts[1] < N:
                needed_direct = needed - {1}
            else:
                needed_direct = needed
            assert ok == (needed.isdisjoint(down) or needed_direct.isdisjoint(down)), (plan, down)
