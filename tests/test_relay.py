import json
import math
import os
import random
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.child import Child
from executor.errors import ConfigError, HandshakeError
from executor.relay import RelayServer, _serve, main
from executor.shaping import BYTES_PER_MBIT, DelayTrace, RateTrace, SerialLink
from executor.testbed import Relay, TestbedHop

DEADLINE_S = 20.0


# The link by itself, in virtual time.


def drain(link):
    """Every piece with the time it arrives at, by following the link's own events."""
    out = []
    while (now := link.next_event_s()) < math.inf:
        out += [(now, piece) for piece in link.take_due(now)]
    return out


def test_bytes_take_their_time_then_travel():
    link = SerialLink(RateTrace.constant(8.0), 0.25)  # 1 MB/s
    link.offer(10.0, 1_000_000, "a")
    link.offer(10.0, 500_000, "b")
    assert link.queued_bytes == 1_500_000
    assert link.take_due(11.2) == []
    assert link.queued_bytes == 500_000  # a travels, b is being sent meanwhile
    assert drain(link) == [(pytest.approx(11.25), "a"), (pytest.approx(11.75), "b")]
    link.offer(20.0, 1000, "c")  # the link was idle
    assert drain(link) == [(pytest.approx(20.251), "c")]


def test_a_rate_change_keeps_what_was_sent():
    link = SerialLink(RateTrace.constant(8.0), 0.0)
    link.offer(0.0, 1_000_000, "a")
    link.offer(0.0, 1_000_000, "b")
    link.set_trace(0.5, RateTrace.constant(4.0))
    assert drain(link) == [(pytest.approx(1.5), "a"), (pytest.approx(3.5), "b")]


def test_an_outage_stalls_until_the_rate_returns():
    link = SerialLink(RateTrace.from_samples(0.0, 1.0, [8.0, 0.0, 0.0, 8.0]), 0.1)
    link.offer(0.5, 1_000_000, "a")
    assert drain(link) == [(pytest.approx(3.6), "a")]
    link.set_trace(5.0, RateTrace.from_samples(0.0, 1.0, [0.0]))
    link.offer(5.0, 1, "b")
    assert link.next_event_s() == math.inf
    link.set_trace(9.0, RateTrace.constant(8.0))
    assert drain(link) == [(pytest.approx(9.1, abs=1e-5), "b")]


def test_a_shorter_delay_does_not_reorder():
    link = SerialLink(RateTrace.constant(8.0), 1.0)
    link.offer(0.0, 1000, "a")
    assert link.take_due(0.002) == []
    link.delay = DelayTrace.constant(0.0)
    link.offer(0.002, 1000, "b")
    assert drain(link) == [(pytest.approx(1.001), "a"), (pytest.approx(1.001), "b")]


@settings(deadline=None)
@given(
    pieces=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 50_000)), max_size=30),
    mbps=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=8),
    delay_s=st.floats(0.0, 0.5),
)
def test_the_link_is_a_serial_server(pieces, mbps, delay_s):
    trace = RateTrace.from_samples(0.3, 0.25, mbps)
    link = SerialLink(trace, delay_s)
    arrived = sorted(pieces)
    due, free_s = [], 0.0
    out = []
    for index, (at_s, n_bytes) in enumerate(arrived):
        out += [(t, p) for t in [link.next_event_s()] if t <= at_s for p in link.take_due(t)]
        link.offer(at_s, n_bytes, index)
        free_s = trace.finish_time(max(free_s, at_s), n_bytes)
        due.append(free_s + delay_s)
    out += drain(link)
    assert [piece for _, piece in out] == list(range(len(arrived)))
    assert link.queued_bytes == 0
    for (t_s, _), expected_s in zip(out[-1:], due[-1:], strict=True):
        assert t_s == pytest.approx(expected_s, abs=1e-6)


def test_cleared_links_forget():
    link = SerialLink(RateTrace.constant(8.0), 0.0)
    link.offer(0.0, 1_000_000, "a")
    link.clear()
    assert (link.queued_bytes, link.next_event_s()) == (0, math.inf)
    link.offer(0.1, 1000, "b")
    assert drain(link) == [(pytest.approx(0.101), "b")]


# The process, with sockets. Deadlines are generous: the machine may be busy.


@pytest.fixture
def sockets():
    """Sockets made through this list are closed at the end, whatever happens."""
    opened = []
    yield opened
    for sock in opened:
        sock.close()


def listen(sockets):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(DEADLINE_S)
    sockets.append(server)
    return server


def dial(sockets, port):
    sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    sockets.append(sock)
    return sock


def accept(sockets, server):
    sock, _ = server.accept()
    sock.settimeout(DEADLINE_S)
    sockets.append(sock)
    return sock


def receive(sock, n_bytes):
    parts = []
    while n_bytes:
        part = sock.recv(min(n_bytes, 1 << 16))
        assert part, "the connection ended early"
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


@pytest.fixture
def hop(sockets):
    """A relay of one fast hop, and a pair of sockets at its two ends."""
    server = listen(sockets)
    with Relay() as relay:
        port = relay.add_hop(server.getsockname()[1], TestbedHop(mbps=400.0, delay_s=0.001))
        near = dial(sockets, port)
        yield relay, near, accept(sockets, server), server, port


def test_bytes_pass_in_order_and_intact_in_both_directions(hop):
    _, near, far, _, _ = hop
    payloads = {sock: random.Random(k).randbytes(3_000_001) for k, sock in enumerate((near, far))}
    senders = [threading.Thread(target=s.sendall, args=(d,)) for s, d in payloads.items()]
    for sender in senders:
        sender.start()
    got = {}
    reader = threading.Thread(target=lambda: got.setdefault(near, receive(near, 3_000_001)))
    reader.start()
    got[far] = receive(far, 3_000_001)
    for thread in (*senders, reader):
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert got[far] == payloads[near]
    assert got[near] == payloads[far]


def test_the_rate_and_the_delay_are_felt(hop):
    relay, near, far, _, _ = hop
    relay.set_rate(0, 4.0)
    relay.set_delay(0, 0.2)
    start_s = time.monotonic()
    near.sendall(bytes(100_000))
    receive(far, 100_000)
    elapsed_s = time.monotonic() - start_s
    assert elapsed_s >= 0.39  # 0.2 s for the bytes, then 0.2 s under way; never faster
    assert elapsed_s < DEADLINE_S


def test_a_played_delay_is_felt_and_order_is_kept(hop):
    relay, near, far, _, _ = hop
    # 0.5 s under way for what leaves within the first half second, nothing after.
    t0_s = time.monotonic()
    relay.play_delay(0, t0_s, 0.5, [0.5, 0.0])
    near.sendall(b"first")
    assert receive(far, 5) == b"first"
    assert time.monotonic() - t0_s >= 0.5
    start_s = time.monotonic()
    near.sendall(b"second")
    assert receive(far, 6) == b"second"
    assert start_s - t0_s < DEADLINE_S
    with pytest.raises(ConfigError, match="delay must be finite"):
        relay.play_delay(0, 0.0, 1.0, [0.1, -0.1])
    with pytest.raises(ConfigError, match="no hop 7"):
        relay.play_delay(7, 0.0, 1.0, [0.1])


def test_pieces_never_overtake_when_the_delay_falls():
    link = SerialLink(RateTrace.constant(8.0), 0.0)  # 1 MB/s
    link.delay = DelayTrace.from_samples(0.0, 0.1, [0.3, 0.0, 0.2])
    for name, at_s in (("a", 0.05), ("b", 0.12), ("c", 0.25)):
        link.offer(at_s, 1000, name)
    link.take_due(0.3)
    assert link.take_due(0.3509) == []
    # a left at 0.051 and is due at 0.351; b, without delay, waits for it.
    assert link.take_due(0.3511) == ["a", "b"]
    assert link.take_due(0.4509) == [] and link.take_due(0.4511) == ["c"]


def test_a_sender_feels_back_pressure(hop):
    relay, near, far, _, _ = hop
    relay.play_rate(0, time.monotonic(), 1.0, [0.0])
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    near.setblocking(False)
    sent, quiet_since = 0, time.monotonic()
    while time.monotonic() - quiet_since < 0.3:
        try:
            sent += near.send(bytes(1 << 14))
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 1_000_000
    relay.set_rate(0, 400.0)
    assert receive(far, sent) == bytes(sent)


def test_an_outage_delays_and_loses_nothing(hop):
    relay, near, far, _, _ = hop
    t0_s = time.monotonic()
    relay.play_rate(0, t0_s, 0.4, [0.0, 400.0])
    data = random.Random(1).randbytes(200_000)
    sender = threading.Thread(target=near.sendall, args=(data,))
    sender.start()
    assert receive(far, len(data)) == data
    assert time.monotonic() - t0_s >= 0.39
    sender.join(DEADLINE_S)


def test_flips_damage_single_bits_and_stop(hop):
    relay, near, far, _, _ = hop
    relay.set_flips(0, 5000.0)
    data = bytes(200_000)
    sender = threading.Thread(target=near.sendall, args=(data,))
    sender.start()
    got = receive(far, len(data))
    sender.join(DEADLINE_S)
    flipped = [byte for byte in got if byte]
    assert 10 < len(flipped) < 100 and all(byte.bit_count() == 1 for byte in flipped)
    relay.set_flips(0, 0.0)
    time.sleep(0.1)
    near.sendall(data[:1000])
    assert receive(far, 1000) == data[:1000]
    with pytest.raises(ConfigError, match="flip_bytes"):
        relay.set_flips(0, -1.0)


def test_a_cut_drops_connections_until_mended(hop, sockets):
    relay, near, far, server, port = hop
    near.sendall(b"before")
    assert receive(far, 6) == b"before"
    relay.set_cut(0, True)
    for sock in (near, far):
        with pytest.raises((ConnectionError, AssertionError)):
            receive(sock, 1)
    refused = dial(sockets, port)
    with pytest.raises((ConnectionError, AssertionError)):
        receive(refused, 1)
    relay.set_cut(0, False)
    again = dial(sockets, port)  # a command holds for whatever comes after it
    again.sendall(b"after")
    assert receive(accept(sockets, server), 5) == b"after"


def test_the_end_of_one_direction_passes_after_its_bytes(hop):
    _, near, far, _, _ = hop
    near.sendall(b"request")
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 7) == b"request"
    assert far.recv(1) == b""
    far.sendall(b"reply")
    far.close()
    assert receive(near, 5) == b"reply"
    assert near.recv(1) == b""


def test_a_target_that_is_not_there_closes_the_connection(sockets):
    server = listen(sockets)
    port = server.getsockname()[1]
    server.close()
    with Relay() as relay:
        near = dial(sockets, relay.add_hop(port, TestbedHop(mbps=40.0, delay_s=0.0)))
        with pytest.raises((ConnectionError, AssertionError)):
            receive(near, 1)


def test_hops_are_shaped_apart(sockets):
    servers = [listen(sockets), listen(sockets)]
    with Relay() as relay:
        pairs = []
        for server in servers:
            hop = TestbedHop(mbps=100.0, delay_s=0.0)
            near = dial(sockets, relay.add_hop(server.getsockname()[1], hop))
            pairs.append((near, accept(sockets, server)))
        relay.play_rate(0, 0.0, 1.0, [0.0])
        for near, _ in pairs:
            near.sendall(b"x")
        assert receive(pairs[1][1], 1) == b"x"
        pairs[0][1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            receive(pairs[0][1], 1)


@pytest.mark.parametrize("mbps", [0.0, -3.0, math.nan, math.inf])
def test_a_constant_rate_must_be_positive(mbps, hop):
    relay = hop[0]
    with pytest.raises(ConfigError, match="bandwidth must be positive, got"):
        relay.set_rate(0, mbps)
    with pytest.raises(ConfigError, match="bandwidth must be positive, got"):
        TestbedHop(mbps=mbps, delay_s=0.0)


def test_bad_settings_are_refused_before_they_are_sent(hop):
    relay = hop[0]
    with pytest.raises(ConfigError, match="sample 1"):
        relay.play_rate(0, 0.0, 1.0, [1.0, -1.0])
    with pytest.raises(ConfigError, match="at least one"):
        relay.play_rate(0, 0.0, 1.0, [])
    with pytest.raises(ConfigError, match="delay"):
        relay.set_delay(0, -0.1)
    with pytest.raises(ConfigError, match="hop 7"):
        relay.set_rate(7, 40.0)


def test_closing_ends_the_process_and_its_sockets(sockets):
    server = listen(sockets)
    relay = Relay()
    port = relay.add_hop(server.getsockname()[1], TestbedHop(mbps=40.0, delay_s=0.0))
    pid = relay.pid
    relay.close()
    relay.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ConnectionRefusedError):
        dial(sockets, port)
    with pytest.raises(HandshakeError, match="relay"):
        relay.set_rate(0, 5.0)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"{nonsense", "one line of JSON"),
        (b"[1, 2]", "hop"),
        (b'{"hop": true, "mbps": 4}', "hop"),
        (b'{"hop": 0, "mbps": 4}', "there is no hop 0"),
        (b'{"hop": 0, "speed": 4}', "speed"),
        (b'{"hop": 0, "listen": 0, "target": "127.0.0.1:1", "mbps": 0, "delay_s": 0}', "positive"),
        (b'{"hop": 0, "listen": 0, "target": "127.0.0.1:1", "mbps": 4}', "delay_s"),
        (b'{"hop": 0, "listen": 0, "target": "nowhere", "mbps": 4, "delay_s": 0}', "malformed"),
        (b'{"hop": 0, "listen": 99999, "target": "a:1", "mbps": 4, "delay_s": 0}', "malformed"),
        (b'{"hop": 0, "trace": {"t0": "x"}}', "no hop"),
    ],
)
def test_bad_commands_get_one_line_and_do_no_harm(line, word, capsys):
    read_end, write_end = os.pipe()
    server = RelayServer()
    try:
        os.write(write_end, line + b'\n{"hop": 1, "listen": 0, "target": "127.0.0.1:1", ')
        os.write(write_end, b'"mbps": 4, "delay_s": 0}\n')
        os.close(write_end)
        _serve(server, read_end)
    finally:
        server.close()
        os.close(read_end)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert word in first["error"]
    assert second["ready"] == 1


def test_a_trace_command_must_be_whole():
    server = RelayServer()
    try:
        server.command({"hop": 0, "listen": 0, "target": "127.0.0.1:1", "mbps": 4, "delay_s": 0})
        with pytest.raises(ConfigError, match="malformed"):
            server.command({"hop": 0, "trace": {"t0": 0.0, "mbps": [1]}})
        with pytest.raises(ConfigError, match="already"):
            server.command(
                {"hop": 0, "listen": 0, "target": "127.0.0.1:1", "mbps": 4, "delay_s": 0}
            )
    finally:
        server.close()


def test_rates_are_in_bytes():
    assert RateTrace.constant(8.0).value_at(0.0) == 8 * BYTES_PER_MBIT == 1e6


def test_unknown_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--speed"])
    assert error.value.code == 2
    assert capsys.readouterr().err == "python -m executor.relay: unrecognized arguments: --speed\n"


def test_a_child_that_fails_says_so_in_one_line():
    child = Child("relay", "executor.relay", ["--speed"])
    try:
        with pytest.raises(ConfigError, match="unrecognized arguments: --speed") as error:
            child.read_line(DEADLINE_S)
        assert "\n" not in str(error.value)
    finally:
        child.close()


def test_a_child_that_is_silent_is_reported():
    child = Child("relay", "executor.relay")
    try:
        with pytest.raises(HandshakeError, match="relay said nothing for"):
            child.read_line(0.2)
        assert child.alive
        child.kill()
        with pytest.raises(HandshakeError, match="relay ended with code -9"):
            child.read_line(DEADLINE_S)
    finally:
        child.close()
