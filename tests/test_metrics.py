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
from prometheus_client.parser import text_string_to_metric_families
from test_dashboard import Feed, get

from agents.metrics import agent_routes
from executor._counters import Histogram
from executor._http import HttpServer
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import ConfigError
from executor.metrics import NodeMonitor
from executor.model import sample_input
from executor.node import main
from executor.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
N = 21


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def scrape(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape, by name and sorted labels; help and type must be there."""
    status, body = get(url + "/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def health(url: str, path: str = "/healthz") -> tuple[int, dict[str, Any]]:
    status, body = get(url + path)
    return status, json.loads(body)


class Chain:
    """Two node processes; the edge's metrics port is in the file, the cloud's on its command."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(4)
        edge = NodeConfig("edge", "127.0.0.1", ports[0], metrics_port=ports[2])
        cloud = NodeConfig("cloud", "127.0.0.1", ports[1])
        self.cluster = Cluster("mobilenet_v2", "none", (edge, cloud), threads=1)
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
def agent_samples() -> dict[Any, float]:
    """A scrape of an agent that fell back once."""
    feed = Feed()
    feed.begin()
    for _ in range(5):
        feed.step()
    feed.step(reason="bandwidth stale")
    with HttpServer("metrics", "127.0.0.1", 0, agent_routes(feed.telemetry)) as server:
        return scrape(server.url)


@pytest.fixture(scope="module")
def node_samples(chain: Chain) -> list[dict[Any, float]]:
    """Scrapes of both nodes after 5 requests and one that was refused."""
    with Client(chain.cluster) as client:
        client.connect(20.0)
        for _ in range(3):
            client.submit(sample_input(0), Plan((7,))).result()
        client.submit(sample_input(0), Plan((N,))).result()
        client.submit(sample_input(0), Plan((0,))).result()
        client._digest = b"another!"
        with pytest.raises(Exception, match="runs weights"):
            client.submit(sample_input(0), Plan((7,))).result()
        return [scrape(url) for url in chain.urls]


def test_a_node_counts_what_it_did(node_samples: list[dict[Any, float]]) -> None:
    edge, cloud = node_samples
    p = "splitpilot_node_"
    assert value(edge, p + "requests_total", node="edge") == 6
    assert value(edge, p + "relayed_total", node="edge") == 1
    assert value(edge, p + "stages_total", node="edge") == 4
    assert value(edge, p + "stage_seconds_count", node="edge") == 4
    assert value(edge, p + "queue_wait_seconds_bucket", node="edge", le="+Inf") == 4
    assert value(edge, p + "errors_total", node="edge", code="wrong_model") == 1
    assert value(edge, p + "open_requests", node="edge") == 0
    assert value(edge, p + "draining", node="edge") == 0
    assert value(edge, p + "hop_backlog_bytes", node="edge", to="cloud") == 0
    assert value(edge, p + "hop_rtt_seconds", node="edge", to="cloud") > 0
    assert value(edge, p + "peer_heartbeat_age_seconds", node="edge", peer="next") < 60
    energy = [v for (name, _), v in edge.items() if name == p + "energy_joules_total"]
    assert len(energy) == 1 and energy[0] > 0
    assert value(cloud, p + "requests_total", node="cloud") == 4
    assert value(cloud, p + "stage_seconds_sum", node="cloud") > 0
    assert not any(name.startswith(p + "hop_") for name, _ in cloud)
    assert value(cloud, "process_resident_memory_bytes") > 1e7


def test_an_agent_counts_what_it_decided(agent_samples: dict[Any, float]) -> None:
    a, p = agent_samples, "splitpilot_agent_"
    assert value(a, p + "serving") == 1
    assert value(a, p + "decisions_total", by="policy", reason="") == 5
    assert value(a, p + "decisions_total", by="solver", reason="bandwidth stale") == 1
    assert value(a, p + "fallbacks_total", reason="bandwidth stale") == 1
    completed = value(a, p + "completed_total")
    assert completed == value(a, p + "latency_seconds_count") > 0
    joules = value(a, p + "energy_joules_total", scope="total", accounting="full")
    each = value(a, p + "energy_per_request_joules", scope="total", accounting="full")
    assert each == pytest.approx(joules / completed)
    assert value(a, p + "node_up", node="edge") == 1 and value(a, p + "node_up", node="cloud") == 0
    assert value(a, p + "hop_bytes_per_second", hop="edge-fog") > 0


def names(samples: dict[Any, float]) -> set[str]:
    return {name for name, _ in samples if name.startswith("splitpilot_")}


def test_grafana_asks_only_for_what_there_is(
    node_samples: list[dict[Any, float]], agent_samples: dict[Any, float]
) -> None:
    dashboard = json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    wanted = set(re.findall(r"(?:splitpilot|process)_\w+", " ".join(asked)))
    there = {name for samples in (*node_samples, agent_samples) for name, _ in samples}
    assert len(wanted) > 30 and wanted <= there, wanted - there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_metric_is_in_the_docs_and_no_other(
    node_samples: list[dict[Any, float]], agent_samples: dict[Any, float]
) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"^\| `(splitpilot_\w+)", text, re.MULTILINE))
    found = names(agent_samples) | names(node_samples[0])
    found = {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}
    assert documented == found


def test_health_follows_the_neighbour(chain: Chain, node_samples: object) -> None:
    edge, cloud = chain.urls
    status, facts = health(edge)
    assert status == 200 and facts["status"] == "serving" and facts["next"] == "cloud"
    assert facts["next_heard_ago_s"] < 60 and facts["model"] == "mobilenet_v2"
    assert health(cloud)[0] == 200
    chain.processes[1].kill()
    deadline = time.monotonic() + 20
    while health(edge)[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, facts = health(edge)
    assert status == 503 and facts["status"] == "next node silent"
    assert "node cloud was last heard" in facts["reason"]
    # It lives and takes requests all the same: edge-only plans need nobody else.
    assert health(edge, "/livez")[0] == health(edge, "/readyz")[0] == 200


def test_a_nodes_log_lines_are_json(chain: Chain, node_samples: object) -> None:
    process = chain.processes[0]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert {"serving on port", "ended"} <= {re.sub(r" \d+$", "", x["message"]) for x in lines}
    assert all({"time", "level", "logger", "node"} <= line.keys() for line in lines)
    assert lines[0]["port"] == chain.cluster.nodes[0].port


class StuckNode:
    def facts(self, timeout_s: float = 1.0) -> None:
        return None


def test_a_node_that_starts_or_is_stuck_says_so() -> None:
    with NodeMonitor("fog", "cloud", "127.0.0.1", 0) as monitor:
        url = f"http://127.0.0.1:{monitor.port}"
        status, facts = health(url)
        assert status == 503 and facts["status"] == "starting"
        assert value(scrape(url), "splitpilot_node_up", node="fog") == 0
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
            for _ in range(8):
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
