"""A node's compute: the same bits wherever in a frame the input lies; no more than is wanted.

And the queue before it.
"""

import threading

import numpy as np
import pytest
import torch
from local_nodes import one_thread
from torch import nn

from executor._compute import Computer, FairQueue, Job
from executor.model import UnitChain
from executor.pacing import Pacer
from executor.plan import ModelSpec
from executor.wire import Header, Kind

__all__ = ["one_thread"]  # a fixture that holds here

WIDE, NARROW = 100, 10
SPEC = ModelSpec(
    "linear",
    ("flatten", "head"),
    (4 * WIDE, 4 * WIDE, 4 * NARROW),
    (False, True),
    1,
    (1, 1),
    (1, WIDE),
)


def computer_of(*units):
    chain = UnitChain(SPEC, list(units), [False, False], "0" * 16)
    return Computer(chain, Pacer(), FairQueue(4), torch.device("cpu"))


@pytest.mark.parametrize("offset", [1, 4, 8, 60])
def test_an_input_gives_the_same_bits_at_every_place_in_a_frame(offset):
    torch.manual_seed(0)
    layer = nn.Linear(WIDE, NARROW).eval()
    computer = computer_of(nn.Flatten(1), layer)
    header = Header(Kind.INFER, dtype="float32", shape=(1, WIDE), body_bytes=4 * WIDE)
    inputs = np.random.default_rng(0).standard_normal((50, 1, WIDE)).astype(np.float32)
    for x in inputs:
        frame = np.empty(x.nbytes + 128, np.uint8)
        begin = -frame.ctypes.data % 64 + offset
        frame[begin : begin + x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
        body = memoryview(frame.data)[begin : begin + x.nbytes]
        outcome = computer.run(Job(header, body, 1, 2))
        with torch.inference_mode():
            expected = layer(torch.from_numpy(x).clone()).numpy()
        assert not outcome.error
        assert np.array_equal(outcome.output, expected)


def test_a_stage_that_nobody_wants_ends_before_its_next_unit():
    ran = []

    class Unit(nn.Module):
        def forward(self, x):
            ran.append(self)
            job.abandoned = len(ran) == 1
            return x + 1

    computer = computer_of(Unit(), Unit())
    x = np.zeros((1, WIDE), np.float32)
    header = Header(Kind.INFER, dtype="float32", shape=x.shape, body_bytes=x.nbytes)
    job = Job(header, memoryview(x.tobytes()), 0, 2)
    outcome = computer.run(job)
    assert len(ran) == 1 and outcome.output is None and not outcome.error
    job = Job(header, memoryview(x.tobytes()), 0, 2)
    assert np.array_equal(computer.run(job).output, x + 2) and len(ran) == 3


def job(client, seq=0):
    return Job(Header(Kind.INFER, client=client * 16, seq=seq))


def test_the_queue_is_fair_between_clients_and_ordered_within_one():
    queue = FairQueue(10)
    for client, seq in ((b"a", 1), (b"a", 2), (b"a", 3), (b"b", 1), (b"c", 1), (b"b", 2)):
        assert queue.put(job(client, seq)) is None
    served = [queue.get().header for _ in range(6)]
    assert [(h.client[:1], h.seq) for h in served] == [
        (b"a", 1),
        (b"b", 1),
        (b"c", 1),
        (b"a", 2),
        (b"b", 2),
        (b"a", 3),
    ]


def test_the_queue_is_bounded_and_closing_wakes_the_reader():
    queue = FairQueue(2)
    third = job(b"c")
    assert not queue.put(job(b"a")) and not queue.put(job(b"b")) and queue.put(third) is third
    assert len(queue) == len(queue.snapshot()) == 2
    queue.close()
    assert queue.get() is None and queue.put(third) is third and len(queue) == 0
    waiting = FairQueue(1)
    got = []
    thread = threading.Thread(target=lambda: got.append(waiting.get()))
    thread.start()
    waiting.close()
    thread.join(10)
    assert got == [None]


def test_with_more_clients_than_places_they_take_turns():
    queue = FairQueue(2)
    clients = [bytes([c]) for c in range(6)]
    served = dict.fromkeys(clients, 0)
    for seq in range(200):
        for client in clients:  # the first ones always come first
            queue.put(job(client, seq))
        served[queue.get().header.client[:1]] += 1
    assert max(served.values()) <= 1.5 * min(served.values())
