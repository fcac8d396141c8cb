"""Real nodes over loopback: outputs, refusals, bad frames, deadlines, and clean ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from local_nodes import free_ports, local_nodes, nothing_is_left_behind, one_thread, until

from executor._json import decode_json
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import (
    ConfigError,
    HandshakeError,
    RequestError,
    RequestRefused,
    RequestTimeout,
)
from executor.keys import make_key
from executor.model import build_chain, sample_input
from executor.node import main
from executor.plan import Plan
from executor.wire import Header, Kind, array_body, pack, parse

__all__ = ["nothing_is_left_behind", "one_thread"]  # fixtures that hold here

MODEL = "mobilenet_v2"
N = 21
ROOT = Path(__file__).resolve().parent.parent
PLANS = [(10, 19), (0, 0), (0, N), (N, N), (3, 3), (0, 7), (5, N), (1, 2), (20, 20)]


def make_cluster(names, **settings):
    ports = free_ports(len(names))
    nodes = tuple(NodeConfig(n, "127.0.0.1", p) for n, p in zip(names, ports, strict=True))
    return Cluster(MODEL, "none", nodes, threads=1, **settings)


def start(cluster, role, path, stdin=subprocess.PIPE):
    args = [sys.executable, "-m", "executor.node", "--role", role, "--cluster", str(path)]
    if stdin is subprocess.PIPE:
        args.append("--control-stdin")
    return subprocess.Popen(
        args, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def chain():
    return build_chain(MODEL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Three processes; each is ended in its own way, and each must end with 0."""
    cluster = make_cluster(["edge", "fog", "cloud"], max_queue=64)
    path = tmp_path_factory.mktemp("nodes") / "cluster.toml"
    path.write_text(cluster.to_toml())
    processes = [start(cluster, node.name, path) for node in cluster.nodes]
    try:
        for process, node in zip(processes, cluster.nodes, strict=True):
            assert process.stdout.readline() == f"READY {node.port}\n"
        yield cluster
        processes[0].send_signal(signal.SIGTERM)
        processes[1].send_signal(signal.SIGINT)
        processes[2].stdin.close()
        assert [process.wait(20) for process in processes] == [0, 0, 0]
        assert all("Traceback" not in process.stderr.read() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        client.connect(20.0)
        yield client


@contextmanager
def stranger(cluster):
    """A bare socket to the first node, which may send anything."""
    with zmq.Context() as ctx, ctx.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(cluster.nodes[0].connect_endpoint())

        def answer(kind):
            """The next frame of one of these kinds."""
            while dealer.poll(10_000):
                frame = parse(dealer.recv_multipart())
                if frame.header.kind is kind:
                    return frame
            raise AssertionError(f"no {kind.name} in 10 s")

        yield dealer, answer


def test_the_handshake_tells_what_runs_where(client, chain):
    nodes = client.connect()
    assert [node["name"] for node in nodes] == ["edge", "fog", "cloud"]
    assert {node["digest"] for node in nodes} == {chain.digest}
    assert len({node["pid"] for node in nodes}) == 3


@pytest.mark.parametrize("cuts", PLANS)
def test_split_equals_whole_bit_for_bit(client, chain, cuts):
    x = sample_input(cuts[0])
    reply = client.submit(x, Plan(cuts)).result()
    assert torch.equal(reply.output, chain.run(x, 0, N))
    record, plan = reply.record, Plan(cuts)
    assert record.plan == cuts
    last = plan.last_node(N)
    for node in range(3):
        begin, end = plan.stage(node, N)
        ran = node <= last and begin < end
        assert (record.stage_s[node] > 0) == (record.work_s[node] > 0) == ran
        assert ran or record.queue_s[node] == 0
    for hop in range(2):
        crossed = hop < last
        assert (record.hop_s[hop] > 0) == crossed
        assert 0 <= record.transmit_s[hop] <= record.hop_s[hop]
    parts_s = sum(record.stage_s) + sum(record.queue_s) + sum(record.hop_s)
    assert record.scheduled_s == record.submitted_s
    assert parts_s <= record.latency_s + 0.001


def test_whoever_waits_moves_the_frames_while_others_submit(client, chain):
    inputs = [sample_input(i) for i in range(4)]
    wanted = [chain.run(x, 0, N) for x in inputs]
    wrong, later = [], []

    def one_at_a_time(own):
        for k in range(6):
            reply = client.infer(inputs[own], Plan(PLANS[(own + k) % len(PLANS)]))
            if not torch.equal(reply.output, wanted[own]):
                wrong.append((own, k))

    threads = [threading.Thread(target=one_at_a_time, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    # Answers are taken in for those who do not wait, too, also after the last who did has left.
    futures = [client.submit(inputs[2], Plan(PLANS[k % len(PLANS)])) for k in range(8)]
    futures[0].add_done_callback(lambda _: later.append(client.submit(inputs[3], Plan((0, N)))))
    for thread in threads:
        thread.join()
    for future in futures:
        assert torch.equal(future.result().output, wanted[2])
    until(lambda: later)
    assert torch.equal(later[0].result().output, wanted[3]) and not wrong
    assert torch.equal(client.infer(inputs[0], Plan((0, 0))).output, wanted[0])
    alone = client.submit(inputs[1], Plan((3, 3)))
    until(alone.done)
    assert torch.equal(alone.result().output, wanted[1])


def test_waiting_ends_with_the_deadline_and_with_the_client(cluster):
    with Client(cluster) as client:
        client.connect(20.0)
        with pytest.raises(RequestTimeout):
            client.infer(sample_input(0), Plan((5, N)), timeout_s=0.001)
        asked = threading.Event()
        ended = []

        def wait():
            asked.set()
            try:
                while True:
                    client.infer(sample_input(0), Plan((5, N)))
            except (RequestError, HandshakeError) as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert asked.wait(10)
    thread.join(10)
    assert not thread.is_alive() and len(ended) == 1


def test_numpy_in_numpy_out(client, chain):
    x = sample_input(4).numpy()
    due = time.monotonic() - 1.0
    reply = client.submit(x, Plan((2, 4)), scheduled_s=due).result()
    assert isinstance(reply.output, np.ndarray)
    assert np.array_equal(reply.output, chain.run(torch.from_numpy(x), 0, N).numpy())
    assert reply.record.scheduled_s == due and reply.record.latency_s > 1.0


def test_a_swapped_or_zeroed_reply_would_show(client, chain):
    def error(output, reference):
        return float((output - reference).abs().max() / reference.abs().max())

    inputs = [sample_input(1), sample_input(2)]
    a, b = (client.submit(x, Plan((7, 12))).result().output for x in inputs)
    wanted = [chain.run(x, 0, N) for x in inputs]
    assert error(a, wanted[0]) == error(b, wanted[1]) == 0.0
    assert error(b, wanted[0]) > 0.05 and error(a, wanted[1]) > 0.05
    assert error(torch.zeros_like(a), wanted[0]) > 0.05


def test_plans_switch_while_requests_are_in_flight(client, chain):
    inputs = [sample_input(i) for i in range(3)]
    wanted = [chain.run(x, 0, N) for x in inputs]
    futures = [client.submit(inputs[i % 3], Plan(PLANS[i % len(PLANS)])) for i in range(24)]
    for i, future in enumerate(futures):
        reply = future.result()
        assert reply.record.plan == PLANS[i % len(PLANS)]
        assert torch.equal(reply.output, wanted[i % 3])
    assert client.in_flight == 0


def test_two_clients_are_served(cluster, client, chain):
    with Client(cluster) as other:
        other.connect()
        x, y = sample_input(5), sample_input(6)
        mine = [client.submit(x, Plan((10, 19))) for _ in range(4)]
        theirs = [other.submit(y, Plan((0, 0))) for _ in range(4)]
        assert all(torch.equal(f.result().output, chain.run(x, 0, N)) for f in mine)
        assert all(torch.equal(f.result().output, chain.run(y, 0, N)) for f in theirs)


def test_the_input_may_be_reused_at_once(client, chain):
    x = sample_input(8)
    wanted = chain.run(x, 0, N)
    future = client.submit(x, Plan((0, 0)))
    x.zero_()
    assert torch.equal(future.result().output, wanted)


def test_status_comes_from_every_node(client):
    until(lambda: not any(s.down for s in client.status().values()))
    until(lambda: client.status()[0].hop_rtt_s is not None)
    client.probe(1, 100_000, 2)
    until(lambda: client.status()[1].hop_bytes_per_s is not None)
    status = client.status()
    assert sorted(status) == [0, 1, 2]
    assert status[1].hop_age_s >= 0 and status[1].hop_backlog_bytes == 0
    assert status[2].hop_bytes_per_s is None
    assert all(s.meter and s.energy_j is not None and 0 <= s.load <= 0.9 for s in status.values())


def test_probes_measure_round_trips(client):
    rtts = client.probe(0, 50_000, 4)
    assert len(rtts) == 4 and min(rtts) > 0
    with pytest.raises(RequestError, match="payload_bytes"):
        client.probe(0, 10**9)
    with pytest.raises(RequestError, match=r"hop must be .* 0\.\.1"):
        client.probe(2, 1000)


def test_a_profile_covers_nodes_hops_and_overhead(client, chain):
    profile = client.profile(repeats=1)
    assert profile.spec == chain.spec and profile.weights_digest == chain.digest
    assert [node.name for node in profile.nodes] == ["edge", "fog", "cloud"]
    assert all(sum(node.unit_s) > 0 and node.stage_overhead_s > 0 for node in profile.nodes)
    assert all(hop.bytes_per_s > 0 for hop in profile.hops)


def test_the_client_bounds_what_is_in_flight(cluster):
    with Client(cluster, max_in_flight=2) as client:
        client.connect()
        futures = [client.submit(sample_input(0), Plan((N, N))) for _ in range(2)]
        with pytest.raises(RequestRefused, match="bound is 2"):
            client.submit(sample_input(0), Plan((N, N)))
        assert client.in_flight == 2
        for future in futures:
            future.result()
        client.submit(sample_input(0), Plan((N, N))).result()


def test_what_cannot_run_is_refused_before_it_is_sent(client):
    with pytest.raises(ConfigError, match="1 cuts"):
        client.submit(sample_input(0), Plan((3,)))
    with pytest.raises(ConfigError, match=r"0\.\.21"):
        client.submit(sample_input(0), Plan((3, 22)))
    with pytest.raises(RequestError, match="602112 bytes of float32"):
        client.submit(sample_input(0).double(), Plan((3, 4)))
    assert client.in_flight == 0


def test_garbage_is_counted_and_a_bad_body_is_answered(cluster, client, chain):
    before = client.status()[0].bad_frames
    digest = bytes.fromhex(chain.digest)

    def request(**changes):
        header = Header(Kind.INFER, client=b"s" * 16, seq=1, cuts=(10, 19), digest=digest)
        body = array_body(header, sample_input(0).numpy())
        for name, value in changes.items():
            setattr(header, name, value)
        return header, body

    with stranger(cluster) as (dealer, answer):
        for garbage in ([b"x"], [b"", b""], [b"SPLT" + bytes(200)], [b"a", b"b", b"c"]):
            dealer.send_multipart(garbage)
        dealer.send(pack(Header(Kind.STATUS)))
        until(lambda: client.status()[0].bad_frames >= before + 5)

        header, body = request()
        small = Header(Kind.INFER, client=b"s" * 16, cuts=(10, 19), digest=digest)
        small_body = array_body(small, np.zeros((1, 3, 2, 2), np.float32))
        wide = Header(Kind.INFER, client=b"s" * 16, cuts=(10, 19), digest=digest)
        wide_body = array_body(wide, np.zeros((3, 1, 224, 224), np.float32))
        for message, code, words in (
            ([pack(header), body[:-4]], "damaged", "the header says 602112"),
            ([pack(header)], "damaged", "body is 0 bytes"),
            ([pack(small), small_body], "bad_body", "cut 0 carries 602112 bytes"),
            ([pack(wide), wide_body], "failed", "RuntimeError"),
            ([pack(request(digest=bytes(8))[0]), body], "wrong_model", "asked for 0000"),
            ([pack(request(cuts=(10,))[0]), body], "bad_plan", "2"),
            ([pack(request(cuts=(9, 3))[0]), body], "bad_plan", "not decrease"),
            ([pack(request(cuts=(9, 99))[0]), body], "bad_plan", "0..21"),
            ([pack(Header(Kind.PROFILE, client=b"s" * 16))], "bad_body", "JSON"),
        ):
            dealer.send_multipart(message)
            error = decode_json(answer(Kind.ERROR).body)
            assert error["code"] == code and words in error["reason"], error
            assert error["reason"].startswith("node edge: ")
    x = sample_input(3)
    reply = client.submit(x, Plan((10, 19))).result()
    assert torch.equal(reply.output, chain.run(x, 0, N))


def test_a_node_over_its_bound_refuses_and_goes_on(chain):
    cluster = make_cluster(["edge", "cloud"], max_queue=1)
    with local_nodes(cluster, ratio=4.0), Client(cluster) as client:
        client.connect()
        x = sample_input(0)
        futures = [client.submit(x, Plan((N,))) for _ in range(8)]
        errors = [future.exception() for future in futures]
        refused = [error for error in errors if error is not None]
        assert refused and len(refused) < 8
        assert all(isinstance(e, RequestRefused) and "queue is full" in str(e) for e in refused)
        # Those submitted after a refusal had come back were refused by the client itself.
        until(lambda: 0 < client.status()[0].refused <= len(refused))
        assert all(0 < e.wait_s <= 15.0 for e in refused)
        time.sleep(max(e.wait_s for e in refused))
        assert torch.equal(client.submit(x, Plan((N,))).result().output, chain.run(x, 0, N))


def test_paced_work_is_what_the_pacer_says(chain):
    cluster = make_cluster(["edge", "cloud"])
    with local_nodes(cluster, ratio=3.0) as nodes, Client(cluster) as client:
        client.connect()
        plain = client.submit(sample_input(0), Plan((10,))).result().record
        assert all(0 < w <= s for w, s in zip(plain.work_s, plain.stage_s, strict=True))
        nodes[0]._control(b'{"load": 0.5}')
        nodes[0]._control(b'{"load": "much"}')
        loaded = client.submit(sample_input(0), Plan((10,))).result().record
        assert loaded.stage_s[0] >= 2 * loaded.work_s[0] > 0
        until(lambda: client.status()[0].load == 0.5 and client.status()[0].stages == 2)


def test_a_dead_node_counts_as_down_and_is_gone_around(chain):
    cluster = make_cluster(["edge", "cloud"])
    with local_nodes(cluster) as nodes, Client(cluster) as client:
        client.connect()
        until(lambda: not any(s.down for s in client.status().values()))
        nodes[1].stop()
        x = sample_input(1)
        reply = client.submit(x, Plan((0,))).result(20)
        assert torch.equal(reply.output, chain.run(x, 0, N)) and reply.record.plan == (N,)
        assert [s.down for s in client.status().values()] == [False, True]
        assert client.in_flight == 0
        nodes[0].stop()
        until(lambda: client.status()[0].down)
        with pytest.raises(RequestTimeout, match="silent nodes: edge, cloud"):
            client.submit(x, Plan((0,)), timeout_s=0.3).result(20)
        assert client.counts.completed == client.counts.failed == 1


def test_other_weights_fail_the_handshake(tmp_path, chain):
    weights = str(tmp_path / "other.pt")
    from torchvision.models import get_model

    torch.save(get_model(MODEL).state_dict(), weights)  # executor.model is imported above
    other = build_chain(MODEL, weights)
    cluster = make_cluster(["edge", "cloud"])
    different = Cluster(MODEL, weights, cluster.nodes, threads=1)
    with local_nodes(cluster, clusters=[cluster, different]), Client(cluster) as client:
        with pytest.raises(HandshakeError) as caught:
            client.connect()
        for part in ("node cloud", chain.digest, other.digest):
            assert part in str(caught.value)
        with pytest.raises(HandshakeError, match="connect"):
            client.submit(sample_input(0), Plan((3,)))


def test_an_absent_node_fails_the_handshake():
    cluster = make_cluster(["edge", "cloud"])
    with Client(cluster) as client, pytest.raises(HandshakeError, match="node edge at 127"):
        client.connect(timeout_s=0.3)


def test_closing_ends_open_requests():
    cluster = make_cluster(["edge", "cloud"])
    with local_nodes(cluster, ratio=20.0):
        client = Client(cluster)
        client.connect()
        future = client.submit(sample_input(0), Plan((N,)))
        client.close()
        with pytest.raises(RequestError, match="closed"):
            future.result(5)
        with pytest.raises(HandshakeError, match="closed"):
            client.submit(sample_input(0), Plan((N,)))


def test_curve_admits_the_allow_list_only_and_counts_the_rest(tmp_path, chain):
    keys, others = tmp_path / "keys", tmp_path / "others"
    for name in ("edge", "cloud", "client", "tablet"):
        make_key(keys, name)
    make_key(others, "client")
    (others / "edge.key").write_bytes((keys / "edge.key").read_bytes())
    cluster = make_cluster(["edge", "cloud"], keys_dir=str(keys))
    edge, cloud = cluster.nodes
    cluster = replace(cluster, nodes=(replace(edge, allow=("client", "tablet")), cloud))
    plain = Cluster(MODEL, "none", (edge, cloud))
    with local_nodes(cluster):
        for known in (cluster, replace(cluster, client="tablet")):
            with Client(known) as client:
                client.connect()
                x = sample_input(0)
                reply = client.submit(x, Plan((4,))).result()
                assert torch.equal(reply.output, chain.run(x, 0, N))
        # No keys; a key of that name from elsewhere; a key of the cluster, but not for the edge.
        stranger = replace(cluster, client="cloud2")
        for suffix in ("key", "key_secret"):
            (keys / f"cloud.{suffix}").rename(keys / f"cloud2.{suffix}")
        for unknown in (plain, replace(cluster, keys_dir=str(others)), stranger):
            with Client(unknown) as client, pytest.raises(HandshakeError):
                client.connect(timeout_s=0.7)
        with Client(cluster) as client:
            client.connect()
            until(lambda: client.status()[0].unauthenticated >= 3)
            assert client.status()[1].unauthenticated == 0


def test_a_taken_port_ends_with_2_and_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nodes = (NodeConfig("edge", "127.0.0.1", port), NodeConfig("cloud", "127.0.0.1", 1))
        path = tmp_path / "cluster.toml"
        path.write_text(Cluster(MODEL, "none", nodes).to_toml())
        process = start(None, "edge", path, stdin=subprocess.DEVNULL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1
    assert f"cannot bind 127.0.0.1:{port}" in err and "in use" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--role", "fgo"], "unknown role 'fgo'"),
        (["--role", "edge", "--threads", "0"], "--threads must be"),
        (["--role", "edge", "--ratio", "-1"], "ratio must be positive"),
        (["--role", "edge", "--device", "cuda:99"], "cuda:99"),
        (["--role", "cloud"], "--insecure"),
        (["--role", "edge", "--cluster", "absent.toml"], "absent.toml"),
    ],
)
def test_wrong_settings_end_with_2_and_one_line(tmp_path, capsys, args, words):
    (port,) = free_ports(1)
    nodes = (NodeConfig("edge", "127.0.0.1", port), NodeConfig("cloud", "0.0.0.0", 1, "::1", 1))
    path = tmp_path / "cluster.toml"
    path.write_text(Cluster(MODEL, "none", nodes).to_toml())
    assert main(["--cluster", str(path), *args]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_no_file_descriptor_is_left_open(chain):
    def run():
        cluster = make_cluster(["edge", "cloud"])
        with local_nodes(cluster), Client(cluster) as client:
            client.connect()
            client.submit(sample_input(0), Plan((0,))).result()

    run()  # what is opened once per process is opened here
    before = len(os.listdir("/proc/self/fd"))
    run()
    assert len(os.listdir("/proc/self/fd")) <= before
