"""Limits per peer, without sockets: rates, bounded tables, who is pushed out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor._limits import PeerLimits, Routes, TokenBucket


def test_a_bucket_gives_its_burst_and_then_its_rate():
    bucket = TokenBucket(rate_per_s=10.0, burst=5.0, tokens=5.0, filled_s=0.0)
    assert [bucket.take(0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [bucket.take(0.1), bucket.take(0.1)] == [True, False]
    assert [bucket.take(100.0) for _ in range(6)] == [True] * 5 + [False]


@given(
    st.floats(0.5, 100.0),
    st.integers(1, 20),
    st.lists(st.floats(-0.5, 1.0), max_size=200),
)
def test_no_sequence_of_times_gets_more_than_burst_and_rate(rate, burst, gaps):
    bucket = TokenBucket(rate, burst, burst, 0.0)
    now_s, forward_s, taken = 0.0, 0.0, 0
    for gap in gaps:
        now_s += gap
        forward_s += max(0.0, gap)
        taken += bucket.take(now_s)
        assert taken <= burst + rate * forward_s + 1e-6
        assert 0.0 <= bucket.tokens <= burst


def test_one_peer_s_flood_costs_another_nothing():
    limits = PeerLimits(rate_per_s=5.0, max_peers=10)
    assert sum(limits.admit(b"flood", 0.0) for _ in range(1000)) == 10
    assert limits.admit(b"quiet", 0.0)


def test_peers_are_bounded_and_the_silent_are_forgotten():
    limits = PeerLimits(rate_per_s=1.0, max_peers=3)
    for peer in (b"a", b"b", b"c", b"a", b"d"):
        limits.admit(peer, 0.0)
    assert len(limits) == 3
    assert [limits.admit(b"a", 0.0) for _ in range(2)] == [False, False]  # it was not forgotten
    limits.forget(b"a")
    assert len(limits) == 2 and limits.admit(b"a", 0.0)


def test_a_route_follows_its_client_and_made_up_clients_push_out_only_their_own():
    routes = Routes(8)
    routes.learn(b"good", b"peer 1")
    routes.learn(b"good", b"peer 2")
    assert routes.get(b"good") == b"peer 2" and len(routes) == 1
    for i in range(100):
        routes.learn(b"fake %d" % i, b"flood")
    assert routes.get(b"good") == b"peer 2" and len(routes) == 8
    assert routes.get(b"fake 99") == b"flood" and routes.get(b"fake 0") is None


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=200), st.integers(1, 6))
def test_routes_stay_consistent(messages, bound):
    routes = Routes(bound)
    for client, peer in messages:
        routes.learn(bytes([client]), bytes([peer]))
        assert len(routes) <= bound
        known = sum(len(clients) for clients in routes._clients.values())
        assert known == len(routes) and all(routes._clients.values())
        for p, clients in routes._clients.items():
            assert all(routes.get(c) == p for c in clients)


@pytest.mark.parametrize("bound", [1, 2])
def test_the_newest_client_of_the_fullest_peer_stays(bound):
    routes = Routes(bound)
    for client in (b"a", b"b", b"c"):
        routes.learn(client, b"p")
    assert routes.get(b"c") == b"p" and len(routes) == bound
