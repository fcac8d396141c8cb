"""Metrics and health of real nodes and of an agent's telemetry, and what asks for them."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from local_nodes import SMALL_NET, free_ports
from prometheus_client.parser import text_string_to_metric_families
from test_dashboard import Feed, get

from agents.serving.metrics import agent_routes
from executor._counters import Histogram
from executor._http import HttpServer
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import ConfigError
from executor.metrics import NodeMonitor
from executor.model import sample_input
from executor.node import main
from executor.plan import Plan
from executor.wire import Header, Kind, array_body, pack, parse

ROOT = Path(__file__).resolve().parent.parent
N = 21
SUFFIXES = {
    "gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"),
}  # fmt: skip


class Scrape:
    """A scrape: its samples by name and labels, and the names that it may have samples of."""

    def __init__(self, url: str) -> None:
        status, body = get(url + "/metrics")
        assert status == 200
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.names: set[str] = set()
        for family in text_string_to_metric_families(body.decode()):
            assert family.documentation and family.type != "unknown", family.name
            self.names |= {family.name + suffix for suffix in SUFFIXES[family.type]}
            for sample in family.samples:
                assert sample.name in self.names
                self.samples[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        return self.samples["splitpilot_" + name, frozenset(labels.items())]


def health(url: str, path: str = "/healthz") -> tuple[int, dict[str, Any]]:
    status, body = get(url + path)
    return status, json.loads(body)


def health_once(wanted: int, url: str) -> tuple[int, dict[str, Any]]:
    """What the node says of itself once it answers with that status."""
    deadline = time.monotonic() + 20
    while (found := health(url))[0] != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


class Chain:
    """Two node processes; the edge's metrics port is in the file, the cloud's on its command."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(4)
        edge = NodeConfig("edge", "127.0.0.1", ports[0], metrics_port=ports[2])
        cloud = NodeConfig("cloud", "127.0.0.1", ports[1])
        self.cluster = Cluster(SMALL_NET, "none", (edge, cloud), threads=1)
        file = folder / "cluster.toml"
        file.write_text(self.cluster.to_toml())
        assert Cluster.load(file) == self.cluster
        self.urls = [f"http://127.0.0.1:{port}" for port in ports[2:]]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "executor.node", "--role", name, "--cluster", str(file),
                 "--log-format", "json", "--log-level", "info", *more],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for name, more in (("edge", []), ("cloud", ["--metrics-port", str(ports[3])]))
        ]  # fmt: skip

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    chain = Chain(tmp_path_factory.mktemp("metrics"))
    try:
        for process in chain.processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("READY")
        yield chain
    finally:
        chain.close()


@pytest.fixture(scope="module")
def agent() -> Scrape:
    """A scrape of an agent that fell back once."""
    feed = Feed()
    feed.begin()
    for _ in range(5):
        feed.step(reason="")
    feed.step(reason="bandwidth stale")
    with HttpServer("metrics", "127.0.0.1", 0, agent_routes(feed.telemetry)) as server:
        return Scrape(server.url)


@pytest.fixture(scope="module")
def nodes(chain: Chain) -> list[Scrape]:
    """Scrapes of both nodes after 5 requests and one that was refused."""
    with Client(chain.cluster) as client:
        client.connect(20.0)
        for cuts in (7, 7, 7, N, 0):
            client.submit(sample_input(0), Plan((cuts,))).result()
        client.probe(0, 20_000, 3)
    with zmq.Context() as ctx, ctx.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(chain.cluster.nodes[0].connect_endpoint())
        header = Header(Kind.INFER, client=b"c" * 16, seq=1, cuts=(7,), digest=b"another!")
        body = array_body(header, sample_input(0).numpy())
        dealer.send_multipart([pack(header), body])
        while True:
            assert dealer.poll(20_000)
            if parse(dealer.recv_multipart()).header.kind is Kind.ERROR:
                return [Scrape(url) for url in chain.urls]


def test_a_node_counts_what_it_did(nodes: list[Scrape]) -> None:
    edge, cloud = nodes
    assert edge.value("node_requests_total", node="edge") == 6
    assert edge.value("node_relayed_total", node="edge") == 1
    assert edge.value("node_stages_total", node="edge") == 4
    assert edge.value("node_stage_seconds_count", node="edge") == 4
    assert edge.value("node_queue_wait_seconds_bucket", node="edge", le="+Inf") == 4
    assert edge.value("node_errors_total", node="edge", code="wrong_model") == 1
    assert edge.value("node_unauthenticated_total", node="edge") == 0
    assert edge.value("node_duplicates_total", node="edge") == 0
    assert edge.value("node_open_requests", node="edge") == 0
    assert edge.value("node_draining", node="edge") == 0
    assert edge.value("node_hop_backlog_bytes", node="edge", to="cloud") == 0
    assert edge.value("node_hop_probe_bytes_total", node="edge", to="cloud") == 60_000
    # Known, but on loopback it lies within the error of the clocks' comparison, and may be 0.
    assert edge.value("node_hop_rtt_seconds", node="edge", to="cloud") >= 0
    assert edge.value("node_peer_heartbeat_age_seconds", node="edge", peer="next") < 60
    energy = [v for (name, _), v in edge.samples.items() if "energy_joules_total" in name]
    assert len(energy) == 1 and energy[0] > 0
    assert cloud.value("node_requests_total", node="cloud") == 4
    assert cloud.value("node_stage_seconds_sum", node="cloud") > 0
    assert not any("_hop_" in name for name in cloud.names)
    assert cloud.samples["process_resident_memory_bytes", frozenset()] > 1e7


def test_an_agent_counts_what_it_decided(agent: Scrape) -> None:
    assert agent.value("agent_serving") == 1
    assert agent.value("agent_decisions_total", by="policy", reason="") == 5
    assert agent.value("agent_decisions_total", by="solver", reason="bandwidth stale") == 1
    assert agent.value("agent_fallbacks_total", reason="bandwidth stale") == 1
    completed = agent.value("agent_completed_total")
    assert completed == agent.value("agent_latency_seconds_count") > 0
    joules = agent.value("agent_energy_joules_total", scope="total", accounting="full")
    each = agent.value("agent_energy_per_request_joules", scope="total", accounting="full")
    assert each == pytest.approx(joules / completed)
    assert agent.value("agent_node_up", node="edge") == 1
    assert agent.value("agent_node_up", node="cloud") == 0
    assert agent.value("agent_hop_bytes_per_second", hop="edge-fog") > 0


def test_grafana_asks_only_for_what_there_is(nodes: list[Scrape], agent: Scrape) -> None:
    dashboard = json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    wanted = set(re.findall(r"(?:splitpilot|process)_\w+", " ".join(asked)))
    there = nodes[0].names | agent.names
    assert len(wanted) > 30 and wanted <= there, wanted - there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_is_in_the_docs_and_no_other(nodes: list[Scrape], agent: Scrape) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"^\| `(splitpilot_\w+)", text, re.MULTILINE))
    found = {name for name in nodes[0].names | agent.names if name.startswith("splitpilot_")}
    assert documented == {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


def test_health_follows_the_neighbour(chain: Chain, nodes: object) -> None:
    edge, cloud = chain.urls
    # A busy machine may make a node look silent or stuck for a moment.
    _, facts = health_once(200, edge)
    assert facts["status"] == "serving" and facts["next"] == "cloud"
    assert facts["next_heard_ago_s"] < 60 and facts["model"] == "small_net.make"
    health_once(200, cloud)
    chain.processes[1].kill()
    _, facts = health_once(503, edge)
    assert facts["status"] == "next node silent"
    assert "node cloud was last heard" in facts["reason"]
    # It lives and takes requests all the same: edge-only plans need nobody else.
    assert health(edge, "/livez")[0] == health(edge, "/readyz")[0] == 200


def test_a_nodes_log_lines_are_json(chain: Chain, nodes: object) -> None:
    process = chain.processes[0]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert {"serving on port", "ended"} <= {re.sub(r" \d+$", "", x["message"]) for x in lines}
    assert all({"time", "level", "logger", "node"} <= line.keys() for line in lines)
    ports = [line["port"] for line in lines if "port" in line]
    assert ports == [chain.cluster.nodes[0].port]


class StuckNode:
    def facts(self, timeout_s: float = 1.0) -> None:
        return None


def test_a_node_that_starts_or_is_stuck_says_so() -> None:
    with NodeMonitor("fog", "cloud", "127.0.0.1", 0) as monitor:
        url = f"http://127.0.0.1:{monitor.port}"
        status, facts = health(url)
        assert status == 503 and facts["status"] == "starting"
        assert Scrape(url).value("node_up", node="fog") == 0
        monitor.watch(StuckNode())
        status, facts = health(url, "/livez")
        assert status == 503 and facts["status"] == "stuck"
        with pytest.raises(ConfigError, match=f"metrics: cannot listen on .*{monitor.port}"):
            NodeMonitor("fog", "cloud", "127.0.0.1", monitor.port)


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_bad_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--role", "edge", "--cluster", "x.toml", "--metrics-port", port])
    assert ended.value.code == 2
    assert "expected a port in 0..65535" in capsys.readouterr().err


def test_a_bad_metrics_port_in_the_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics_port must be in 0\.\.65535, got 70000"):
        NodeConfig("edge", "127.0.0.1", 1, metrics_port=70000)


def test_a_histogram_counts_by_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    histogram.add(0.1, 0.2, 5.0)
    twin = histogram.copy()
    histogram.add(0.05)
    assert list(twin.cumulative()) == [("0.1", 1), ("1.0", 2), ("+Inf", 3)]
    assert next(iter(histogram.cumulative())) == ("0.1", 2)
    assert twin.count == 3 and twin.total_s == pytest.approx(5.3)


def test_connections_that_say_nothing_do_not_lock_others_out() -> None:
    with HttpServer("test", "127.0.0.1", 0, agent_routes(Feed().telemetry)) as server:
        with ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            assert get(server.url + "/healthz")[0] == 503
            # Over the bound a connection is closed at once, and no thread is made for it.
            for _ in range(12):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with pytest.raises((urllib.error.URLError, OSError)):
                urllib.request.urlopen(server.url + "/healthz", timeout=10)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert get(server.url + "/healthz")[0] == 503
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
