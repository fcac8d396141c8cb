"""SIGTERM: a node finishes what it has, an agent ends with its summary."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from local_nodes import SMALL_NET, free_ports
from prometheus_client.parser import text_string_to_metric_families
from test_metrics import get

from executor._compute import FairQueue, Job, Outcome
from executor._json import decode_json
from executor._nodecore import CoreConfig
from executor._watched import WatchedCore
from executor._ways import Way
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.energy import ConstantPowerMeter
from executor.errors import RequestRefused
from executor.model import build_chain, model_spec, sample_input
from executor.node import Node, main
from executor.plan import Plan
from executor.wire import Header, Kind, array_body, pack, parse

MODEL = "mobilenet_v2"
N = 21
ROOT = Path(__file__).resolve().parent.parent
SPEC = model_spec(MODEL)
DIGEST = b"d" * 8


def infer(cuts: tuple[int, ...], seq: int, digest: bytes = DIGEST) -> list[Any]:
    header = Header(Kind.INFER, client=b"c" * 16, seq=seq, cuts=cuts, digest=digest)
    body = array_body(header, np.zeros((1, 3, 224, 224), np.float32))
    return [pack(header), body]


def replies(core: WatchedCore) -> list[tuple[Kind, int, str]]:
    """What lies ready for the client: kind, request and error code."""
    found = []
    while core.up:
        frame = parse(core.up.popleft()[1])
        code = decode_json(frame.body)["code"] if frame.header.kind is Kind.ERROR else ""
        found.append((frame.header.kind, frame.header.seq, code))
    return found


@pytest.fixture
def core() -> tuple[WatchedCore, FairQueue]:
    queue = FairQueue(8)
    config = CoreConfig(0, 3, SPEC, DIGEST, 8, {"name": "edge"})
    return WatchedCore(config, queue, lambda now_s: {"load": 0.0}, ConstantPowerMeter()), queue


def test_a_draining_core_refuses_and_waits_for_all_it_took(
    core: tuple[WatchedCore, FairQueue],
) -> None:
    node, queue = core
    node.on_upstream(b"peer", infer((N, N), 1), 1.0)  # computed here
    node.on_upstream(b"peer", infer((0, 0), 2), 1.0)  # relayed: its result comes back through here
    node.draining = True
    node.on_upstream(b"peer", infer((N, N), 3), 1.1)
    assert replies(node) == [(Kind.ERROR, 3, "draining")]
    assert node.refused == 1 and not node.drained
    facts = node.facts(1.2)
    assert facts["draining"] and facts["open_requests"] == 2 and facts["requests"] == 3
    job = queue.get()
    assert isinstance(job, Job)
    node.on_outcome(Outcome(job, 1.2, 1.3, 0.1, np.zeros((1, 1000), np.float32)), 1.3)
    assert not node.drained
    result = Header(Kind.RESULT, client=b"c" * 16, seq=2, cuts=(0, 0), digest=DIGEST)
    body = array_body(result, np.zeros((1, 1000), np.float32))
    node.on_downstream([pack(result), body], 1.4)
    assert not node.drained  # its answers are not sent yet
    assert [kind for kind, _, _ in replies(node)] == [Kind.RESULT, Kind.RESULT]
    assert node.drained


def test_a_request_that_fails_is_not_waited_for(core: tuple[WatchedCore, FairQueue]) -> None:
    node, queue = core
    node.on_upstream(b"peer", infer((N, N), 1), 1.0)
    job = queue.get()
    assert isinstance(job, Job)
    node.on_outcome(Outcome(job, 1.0, 1.1, error="out of memory"), 1.1)
    assert replies(node) == [(Kind.ERROR, 1, "failed")] and node.drained


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the nodes have it: with more, a sum's order differs and so do its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster() -> Cluster:
    ports = free_ports(2)
    nodes = tuple(
        NodeConfig(n, "127.0.0.1", p) for n, p in zip(("edge", "cloud"), ports, strict=True)
    )
    return Cluster(MODEL, "none", nodes, threads=1)


@pytest.fixture
def processes(cluster: Cluster, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two nodes, so slow that requests are surely under way when the signal comes."""
    file = tmp_path / "cluster.toml"
    file.write_text(cluster.to_toml())
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "executor.node", "--role", node.name, "--cluster", str(file),
             "--ratio", "15"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in cluster.nodes
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("READY")
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_nodes_finish_what_they_took_and_refuse_the_rest(
    cluster: Cluster, processes: list[subprocess.Popen[str]]
) -> None:
    chain = build_chain(MODEL)
    wanted = chain.run(sample_input(0), 0, N)
    edge, cloud = processes
    with Client(cluster, timeout_s=60.0) as client:
        client.connect(20.0)
        open_ = [client.submit(sample_input(0), Plan((0,))) for _ in range(3)]
        await_queue(client, 1)
        cloud.send_signal(signal.SIGTERM)
        # A new request finds its way around the node that drains, and is not lost.
        deadline = time.monotonic() + 30
        while True:
            open_.append(client.submit(sample_input(0), Plan((0,))))
            if open_[-1].result().record.plan == (N,):
                break
            assert time.monotonic() < deadline
        assert all(torch.equal(future.result().output, wanted) for future in open_)
        assert cloud.wait(30) == 0
        # The edge has lost its neighbour, and drains all the same.
        open_ = [client.submit(sample_input(0), Plan((N,))) for _ in range(2)]
        await_queue(client, 0)
        edge.send_signal(signal.SIGTERM)
        assert refusal(client, Plan((N,)), open_).startswith("node edge: is draining")
        assert all(torch.equal(future.result().output, wanted) for future in open_)
        assert edge.wait(30) == 0


def await_queue(client: Client, node: int) -> None:
    """Until a node says that it has work queued."""
    deadline = time.monotonic() + 30
    while not client.status()[node].queue_len:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refusal(client: Client, plan: Plan, taken: list[Any]) -> str:
    """What new requests are told, once the node drains; those still taken are added to `taken`."""
    tried: list[Any] = []
    deadline = time.monotonic() + 30
    while not any(future.done() and future.exception() for future in tried):
        assert time.monotonic() < deadline, "nothing was refused"
        tried.append(client.submit(sample_input(0), plan))
        time.sleep(0.05)
    taken += [future for future in tried if future.exception(30) is None]
    errors = [future.exception() for future in tried if future.exception() is not None]
    assert all(isinstance(error, RequestRefused) for error in errors)
    assert len({str(error) for error in errors}) == 1
    return str(errors[0])


def test_draining_ends_at_its_deadline(cluster: Cluster) -> None:
    """The next node takes what is relayed to it, and never answers."""
    node = Node(cluster, "edge")
    thread = threading.Thread(target=node.serve)
    with zmq.Context() as ctx, ctx.socket(zmq.ROUTER) as silent, ctx.socket(zmq.DEALER) as client:
        silent.linger = client.linger = 0
        silent.bind(cluster.nodes[1].bind_endpoint())
        client.connect(cluster.nodes[0].connect_endpoint())
        thread.start()
        try:
            client.send_multipart(infer((0,), 1, node._core.config.digest))
            deadline = time.monotonic() + 20
            while not (node.facts(10.0) or {}).get("open_requests"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            node.drain(0.3)
            thread.join(20)
            assert not thread.is_alive()
        finally:
            node.stop()
            thread.join()
            assert node.close()
    assert node.facts(0.01) is None


def test_a_second_signal_ends_at_once(cluster: Cluster) -> None:
    node = Node(cluster, "cloud")
    node._core._ways.enter(Way(b"peer", Header(Kind.INFER, client=b"c" * 16, seq=1)))
    thread = threading.Thread(target=node.serve)
    thread.start()
    node.drain(600.0)
    thread.join(0.5)
    assert thread.is_alive()
    node.drain(600.0)
    thread.join(20)
    assert not thread.is_alive() and node.close()


def test_a_negative_deadline_is_refused(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(cluster.to_toml())
    assert main(["--role", "edge", "--cluster", str(file), "--drain-s", "-1"]) == 2
    assert "--drain-s must be >= 0, got -1.0" in capsys.readouterr().err


def test_an_agent_on_sigterm_ends_with_its_summary(tmp_path: Path) -> None:
    """The real command with all that an operator turns on."""
    metrics, page = free_ports(2)
    out = tmp_path / "summary.json"
    with subprocess.Popen(
        [sys.executable, "-m", "agents.deploy", "--model", SMALL_NET, "--controller", "cloud",
         "--rate", "4", "--json", str(out), "--runs", str(tmp_path), "--metrics-port", str(metrics),
         "--dashboard", str(page), "--log-format", "json", "--log-level", "info"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if sum("in flight" in line for line in lines) == 2:
                    break
            assert any(f"live page: http://127.0.0.1:{page}/" in line for line in lines)
            status, body = get(f"http://127.0.0.1:{metrics}/healthz")
            facts = json.loads(body)
            assert status == 200 and [n["name"] for n in facts["nodes"]] == ["edge", "fog", "cloud"]
            with urllib.request.urlopen(f"http://127.0.0.1:{page}/data.json", timeout=10) as answer:
                data = json.load(answer)
            assert data["now"]["cuts"] == [0, 0] and data["events"][0]["by"] == "cloud"
            _, body = get(f"http://127.0.0.1:{metrics}/metrics")
            families = {f.name for f in text_string_to_metric_families(body.decode())}
            assert "splitpilot_agent_latency_seconds" in families
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            watchdog.cancel()
            process.kill()
    assert process.returncode == 0, stderr[-2000:]
    assert "summary" in stdout
    summary = json.loads(out.read_text())
    assert summary["interrupted"] is True
    requests = summary["requests"]
    assert requests["submitted"] == requests["completed"] + requests["lost"] > 0
    logged = [json.loads(line) for line in stderr.splitlines()]
    intervals = [line for line in logged if line["message"] == "interval"]
    assert len(intervals) == summary["decisions"] and intervals[0]["cuts"] == [0, 0]
    assert logged[-1]["message"] == "ended"
    assert logged[-1]["summary"]["requests"] == requests
