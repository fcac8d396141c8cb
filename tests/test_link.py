import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor._hop import Hop, ProbeRun
from executor.errors import ConfigError
from executor.link import RATE_MEMORY_S, ClockOffset, PassiveEstimator, two_point
from executor.profile import HopModel
from executor.wire import Header, Kind, array_body, parse

LARGE = 600_000


class SerialHop:
    """A serial link with a one-way delay each way; plays frames through an estimator."""

    def __init__(self, bytes_per_s, delay_s):
        self.bytes_per_s, self.delay_s = bytes_per_s, delay_s
        self.free_s = 0.0
        self.estimator = PassiveEstimator()

    def play(self, frames):
        """frames: (when sent, bytes); events reach the estimator in order of time."""
        events = []
        for sent_s, size in frames:
            self.free_s = max(self.free_s, sent_s) + size / self.bytes_per_s
            received_s = self.free_s + self.delay_s
            events.append((sent_s, 0, size))
            events.append((received_s + self.delay_s, 1, received_s))
        for when_s, kind, value in sorted(events, key=lambda event: event[:2]):
            if kind:
                self.estimator.on_ack(value, when_s)
            else:
                self.estimator.on_sent(value, when_s)
        return events[-1][0]


def test_two_point_recovers_the_line():
    def rtt(size):
        return 0.02 + size / 5e6

    hop = two_point(1000, [rtt(1000)] * 3, 200_000, [rtt(200_000)] * 3)
    assert hop.bytes_per_s == pytest.approx(5e6)
    assert hop.rtt_s == pytest.approx(0.02)
    previous = HopModel(1.0, 1.0, frame_overhead_s=0.004)
    hop = two_point(1000, [rtt(1000)], 200_000, [rtt(200_000)], previous)
    assert hop.frame_overhead_s == 0.004
    assert hop.rtt_s == pytest.approx(0.016)


def test_two_point_uses_means_and_never_a_negative_delay():
    hop = two_point(0, [0.1, 0.3], 1000, [1.0, 1.4])
    assert hop.bytes_per_s == pytest.approx(1000.0)
    assert two_point(1000, [0.01], 2000, [1.0]).rtt_s == 0.0


def test_a_malformed_probe_keeps_the_previous_model():
    previous = HopModel(5e6, 0.01, 0.001)
    for large_rtts_s in ([0.2], [0.1], [math.nan], [math.inf]):
        assert two_point(1000, [0.2], 200_000, large_rtts_s, previous) is previous
    with pytest.raises(ConfigError, match="malformed link probe"):
        two_point(1000, [0.2], 200_000, [0.1])


@pytest.mark.parametrize("arguments", [(2000, [1.0], 1000, [2.0]), (1, [], 2, [1.0])])
def test_a_probe_needs_two_sizes_and_round_trips(arguments):
    with pytest.raises(ConfigError, match="two-point probe needs"):
        two_point(*arguments)


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(
    st.floats(1e5, 1e9),
    st.floats(0.0, 0.1),
    st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(200, 2_000_000)), min_size=1, max_size=20),
)
def test_on_a_constant_hop_the_estimate_is_exact(bytes_per_s, delay_s, gaps):
    hop = SerialHop(bytes_per_s, delay_s)
    sent_s, frames = 1.0, []
    for gap_s, size in gaps:
        sent_s += gap_s
        frames.append((sent_s, size))
    end_s = hop.play(frames)
    assert hop.estimator.unacked_bytes == 0
    if delay_s > 1e-6:
        assert hop.estimator.rtt_s == pytest.approx(2 * delay_s, rel=1e-3)
    # Below this a service is lost in a float's last digits of a time of day.
    if all(size / bytes_per_s > 1e-4 for _, size in frames if size >= 16 * 1024):
        estimate = hop.estimator.estimate(end_s)
        if any(size >= 16 * 1024 for _, size in frames):
            assert estimate.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)
            assert estimate.age_s >= 0
        else:
            assert estimate is None


def test_waiting_behind_other_frames_is_not_service():
    hop = SerialHop(5e6, 0.01)
    end_s = hop.play([(1.0, LARGE), (1.0, 100), (1.001, LARGE), (1.002, LARGE)])
    assert hop.estimator.estimate(end_s).bytes_per_s == pytest.approx(5e6, rel=1e-3)
    assert hop.estimator.estimate(end_s + 2.0).age_s == pytest.approx(2.01, rel=1e-3)


def test_a_small_frame_measures_nothing_and_a_probe_of_that_size_does():
    estimator = PassiveEstimator()
    for sent_s, size, probe in ((1.0, 5000, False), (2.0, 1000, True), (3.0, 5000, True)):
        assert estimator.estimate(sent_s) is None
        estimator.on_sent(size, sent_s, probe=probe)
        estimator.on_ack(sent_s + 0.02, sent_s + 0.02)
    assert estimator.estimate(3.02).bytes_per_s == pytest.approx(250_000)
    estimator.on_sent(5000, 4.0, probe=True)  # overdue, so the hop is slower than this
    assert estimator.estimate(5.0).bytes_per_s == pytest.approx(5000)


def test_a_hop_measures_by_its_own_probes():
    hop = Hop(b"me" * 8)
    for at_s, size in ((1.0, 0), (2.0, 5000)):  # a ping, and a probe
        run = ProbeRun(Header(Kind.PROBE), size, 1)
        assert hop.probe(run, at_s) and hop.backlog_bytes == size
        pong = Header(
            Kind.PONG, client=b"me" * 8, seq=run.seq, clock_s=(at_s, at_s + 0.02, at_s + 0.02)
        )
        assert hop.on_pong(pong, at_s + 0.02) is run
    assert hop.rate.estimate(2.02).bytes_per_s == pytest.approx(250_000)


def test_older_frames_count_exponentially_less():
    hop = SerialHop(1e6, 0.0)
    first_s = hop.play([(1.0, LARGE)])
    hop.bytes_per_s = 1e7
    second_s = hop.play([(first_s + 1.0, LARGE)])
    left = math.exp(-(second_s - first_s) / RATE_MEMORY_S)
    expected = (left * LARGE + LARGE) / (left * LARGE / 1e6 + LARGE / 1e7)
    assert hop.estimator.estimate(second_s).bytes_per_s == pytest.approx(expected, rel=1e-3)
    third_s = hop.play([(second_s + 12.0, LARGE)])
    assert hop.estimator.estimate(third_s).bytes_per_s == pytest.approx(1e7, rel=1e-3)


def test_an_acknowledgement_kept_back_does_not_make_the_hop_longer():
    estimator = PassiveEstimator()
    estimator.on_sent(100, 1.0)
    estimator.on_ack(1.01, 1.05, held_s=0.03)
    assert estimator.rtt_s == pytest.approx(0.02)


def test_backlog_counts_what_is_not_acknowledged():
    estimator = PassiveEstimator()
    assert estimator.estimate(0.0) is None
    assert estimator.rtt_s is None
    estimator.on_ack(0.0, 0.0)  # an acknowledgement of nothing
    estimator.on_sent(LARGE, 1.0)
    estimator.on_sent(100, 1.0)
    assert estimator.unacked_bytes == LARGE + 100
    estimator.on_ack(1.2, 1.2)
    assert estimator.unacked_bytes == 100
    estimator.on_lost()
    assert estimator.unacked_bytes == 0
    estimator.on_ack(1.3, 1.3)
    assert estimator.unacked_bytes == 0


def test_an_outage_shows_before_it_is_over():
    hop = SerialHop(6e6, 0.005)
    end_s = hop.play([(1.0, LARGE)])
    hop.estimator.on_sent(LARGE, end_s)
    on_time = hop.estimator.estimate(end_s + 0.05)
    assert on_time.bytes_per_s == pytest.approx(6e6, rel=1e-3)
    overdue = hop.estimator.estimate(end_s + 3.0)
    assert overdue.bytes_per_s == pytest.approx(LARGE / 2.99, rel=1e-3)
    assert overdue.age_s == 0.0


def test_a_clock_a_little_off_gives_no_negative_service():
    estimator = PassiveEstimator()
    estimator.on_sent(LARGE, 1.0)
    estimator.on_ack(0.9, 1.2)  # received before it was sent, says the peer's clock
    assert estimator.estimate(1.2) is None
    estimator.on_sent(LARGE, 2.0)
    estimator.on_ack(2.3, 2.2)
    assert estimator.rtt_s == 0.0


def test_the_clock_offset_is_of_the_least_round_trip():
    clock = ClockOffset()
    assert clock.offset_s == 0.0
    assert clock.rtt_s is None
    # The peer is 100 s ahead; the first exchange queued 0.3 s on its way out.
    clock.add(1.0, 101.31, 101.32, 1.33)
    assert clock.offset_s == pytest.approx(100.15)
    clock.add(2.0, 102.01, 102.02, 2.03)
    assert clock.offset_s == pytest.approx(100.0)
    assert clock.rtt_s == pytest.approx(0.02)
    clock.add(3.0, 103.01, 103.02, 3.53)
    assert clock.offset_s == pytest.approx(100.0)
    assert clock.to_local(105.0) == pytest.approx(5.0)


def test_the_clock_offset_follows_drift_and_ignores_nonsense():
    clock = ClockOffset(window_s=10.0)
    clock.add(1.0, 101.01, 101.01, 1.02)
    clock.add(2.0, 50.0, 60.0, 2.5)  # replied later than we had the reply
    assert clock.offset_s == pytest.approx(100.0)
    clock.add(30.0, 130.12, 130.12, 30.04)
    assert clock.offset_s == pytest.approx(100.1)


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(
    st.floats(-1e4, 1e4),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=20),
)
def test_the_offset_is_off_by_at_most_half_the_round_trip(offset_s, delays):
    clock = ClockOffset()
    now_s = 0.0
    for out_s, back_s in delays:
        peer_s = now_s + out_s + offset_s
        clock.add(now_s, peer_s, peer_s + 0.001, now_s + out_s + 0.001 + back_s)
        now_s += 2.0
    assert abs(clock.offset_s - offset_s) <= clock.rtt_s / 2 + 1e-6


class FarNode:
    """What answers a `executor._hop.Hop`: over a link with a rate and a delay, by its own clock."""

    def __init__(self, hop, clock, bytes_per_s, delay_s):
        self.hop, self.clock, self.delay_s = hop, clock, delay_s
        self.bytes_per_s = bytes_per_s
        self.free_s = 0.0

    def take(self, now_s):
        """Everything that the hop wants sent; returns when the last answer came back."""
        answered_s = now_s
        while self.hop.outbox:
            frame = parse(self.hop.outbox.popleft())
            header, size = frame.header, frame.header.body_bytes
            self.free_s = max(self.free_s, now_s) + size / self.bytes_per_s
            received_s = self.free_s + self.delay_s
            far_s, answered_s = self.clock(received_s), received_s + self.delay_s
            if header.kind is Kind.PING:
                pong = header.reply(Kind.PONG)
                pong.clock_s = (header.clock_s[0], far_s, far_s)
                self.hop.on_pong(pong, answered_s)
            else:
                ack = header.reply(Kind.ACK)
                ack.clock_s = (0.0, far_s, far_s)
                self.hop.on_ack(ack, answered_s)
        return answered_s


@pytest.mark.parametrize("ahead_s", [0.0, 4321.0, -86400.0])
def test_frames_alone_measure_a_hop_whatever_the_far_clock_says(ahead_s):
    """A clock elsewhere, which runs 50 ppm fast; the hop's rate steps down and up again."""
    hop = Hop(b"me" * 8)
    hop.on_connected(0.0)
    far = FarNode(hop, lambda t: 1.00005 * t + ahead_s, 5e6, 0.02)
    now_s, seq = 0.0, 0
    for bytes_per_s in (5e6, 1e6, 2.5e7):
        far.bytes_per_s = bytes_per_s
        end_s = now_s + 8.0  # of what was before, 1 / 3000 is left
        while now_s < end_s:
            hop.tick(now_s)
            now_s = far.take(now_s) + 0.05
            seq += 1
            header = Header(Kind.INFER, client=b"client" + bytes(10), seq=seq, digest=b"d" * 8)
            body = array_body(header, np.zeros(LARGE // 4, np.float32))
            hop.send(header, body, now_s)
            now_s = far.take(now_s) + 0.05
        estimate = hop.rate.estimate(now_s)
        assert estimate.bytes_per_s == pytest.approx(bytes_per_s, rel=0.02)
        assert estimate.age_s < 0.2
    assert hop.rate.rtt_s == pytest.approx(0.04, abs=0.003)
    assert hop.probe_bytes == 0  # nothing but frames and bodiless pings was needed


def test_pings_do_not_measure_an_idle_hop_and_a_probe_does():
    hop = Hop(b"me" * 8)
    hop.on_connected(0.0)
    far = FarNode(hop, lambda t: t + 7.0, 5e6, 0.01)
    for tenth in range(100):
        hop.tick(0.1 * tenth)
        far.take(0.1 * tenth)
    assert hop.rate.estimate(10.0) is None and hop.rate.rtt_s == pytest.approx(0.02)
    run = ProbeRun(Header(Kind.PROBE, client=b"c" * 16, seq=1), 65536, 2)
    assert hop.probe(run, 10.0)
    far.take(10.0)
    assert len(run.rtts_s) == 2 and hop.probe_bytes == 2 * 65536
    assert hop.rate.estimate(10.1).bytes_per_s == pytest.approx(5e6, rel=1e-3)
