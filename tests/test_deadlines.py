"""A node and the time that is left to answer a request."""

import numpy as np
import pytest
from test_nodecore import core, infer, kinds

from executor._compute import Outcome
from executor._json import decode_json
from executor.wire import Kind, pack, parse


def test_a_request_that_waits_for_half_of_its_time_is_refused():
    node, queue, _ = core(0, max_queue=9)
    for seq, left_s in ((1, 4.0), (2, 10.0), (3, 0.0)):
        header, body = infer((3, 3), seq)
        header.left_s = left_s
        node.on_upstream(b"up", [pack(header), body], 1.0)
    node.tick(2.9)
    assert Kind.ERROR not in kinds(node)
    # Its turn comes too late: passed over, then told.
    assert queue.get(3.0).header.seq == 2
    node.tick(3.0)
    (error,) = [f for f in (parse(p) for _, p in node.up) if f.header.kind is Kind.ERROR]
    values = decode_json(error.body)
    assert (error.header.seq, values["code"]) == (1, "refused") and values["wait_s"] > 0
    assert "half of the time" in values["reason"] and node.refused == 1
    node.tick(1e6)
    assert queue.get(1e6).header.seq == 3  # nothing was said of its time


def test_the_time_left_runs_on_in_a_node_and_what_nobody_waits_for_goes_no_further():
    node, queue, _ = core(1, max_queue=9)
    for seq in (1, 2, 3):
        header, body = infer((0, 9), seq)
        header.left_s = 10.0
        node.on_upstream(b"up", [pack(header), body], 1.0)
    jobs = [queue.get(1.0) for _ in range(3)]
    output = np.ones(3, np.float32)
    node.on_outcome(Outcome(jobs[0], 1.0, 4.0, 3.0, output), 4.0)
    assert parse(node.hop.outbox[0]).header.left_s == pytest.approx(7.0)
    node.on_outcome(Outcome(jobs[1], 4.0, 11.5, 3.0, output), 11.5)
    assert len(node.hop.outbox) == 1  # the second's asker has given up
    node.tick(11.5)
    assert not node.hop.outbox and not node.hop.backlog_frames  # so has the first's, meanwhile
    # A later try of the third is due by its own time, its stage being under way.
    header.tries, header.left_s = 1, 2.0
    node.on_upstream(b"up", [pack(header), body], 20.0)
    assert jobs[2].until_s == 21.0 and len(queue) == 0


def test_an_older_try_does_not_end_a_newer_one_by_its_age():
    node, _, _ = core(1, max_queue=9)
    for tries, left_s, now_s in ((1, 1.0, 0.0), (2, 9.0, 0.5)):
        header, body = infer((0, 0))
        header.tries, header.left_s = tries, left_s
        node.on_upstream(b"up", [pack(header), body], now_s)
    node.tick(2.0)
    assert len(node.hop.outbox) == 1
    assert node._ways.get(header).header.tries == 2


def test_a_try_after_one_that_was_passed_over_is_computed():
    node, queue, _ = core(1, max_queue=9)
    for tries, now_s in ((1, 0.0), (2, 1.5)):
        header, body = infer((0, 9))
        header.tries, header.left_s = tries, 2.0
        node.on_upstream(b"up", [pack(header), body], now_s)
        if tries == 1:
            assert queue.get(1.2) is None
    assert queue.get(1.6).header.tries == 2
