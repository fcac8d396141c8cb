"""Mutated frames in short form; `benchmarks/fuzz_wire.py` feeds a million."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_wire
from executor._fairness import FairBuffer


def test_some_thousand_mutated_frames_are_survived():
    n = fuzz_wire.CHUNK
    seen = fuzz_wire.run(n, seed=1)[1] + fuzz_wire.run(n, seed=1, first=n)[1]
    # Checksums keep out accidents; most mutants must get past them to test what comes behind.
    assert sum(seen.values()) == 2 * n and len(seen) == 3
    assert seen["stopped by checksum or length"] < n


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_no_short_sequence_of_frames_ends_a_node(rng):
    chain = fuzz_wire.Chain()
    for step in range(rng.randrange(1, 12)):
        chain.feed(rng, fuzz_wire.mutate(rng), float(step))


def test_the_corpus_is_valid_and_the_mutations_are_not_all_noise():
    """Each kind comes up, most mutated frames are refused, some pass: both sides are tested."""
    rng, kinds, passed = random.Random(0), set(), 0
    for _ in range(2000):
        message = fuzz_wire.mutate(rng)
        try:
            kinds.add(fuzz_wire.parse(message).header.kind)
            passed += 1
        except fuzz_wire.WireError:
            pass
    assert kinds == set(fuzz_wire.Kind) and 400 < passed < 1600


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ptdx")), max_size=120))
def test_a_fair_buffer_loses_nothing_and_keeps_each_client_s_order(steps):
    buffer, model, number = FairBuffer(), {}, 0
    for client, what in steps:
        key = bytes([client])
        waiting = sum(map(len, model.values()))
        assert len(buffer) == waiting == len(buffer.items())
        if what == "p":
            buffer.put(key, (key, number))
            model.setdefault(key, []).append(number)
            number += 1
        elif what == "t" and waiting:
            assert buffer.peek() == (taken := buffer.take())
            assert model[taken[0]].pop(0) == taken[1]
        elif what == "d":
            lost = buffer.displace(key)
            if lost is not None:
                assert len(model[lost[0]]) > len(model.get(key, []))
                assert model[lost[0]].pop() == lost[1]
        elif what == "x":
            gone = buffer.discard(lambda item: item[1] % 2 == 0, key)
            assert gone == [(key, n) for n in model.get(key, []) if n % 2 == 0]
            model[key] = [n for n in model.get(key, []) if n % 2]
