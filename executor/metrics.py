"""What an operator sees of a node: `/metrics` for Prometheus, and whether it is well.

Nothing is counted for Prometheus: at a scrape the node's loop is asked for the facts it keeps
anyway, and an unanswered question is itself the news that the loop is stuck.

- `/metrics`: the names, units and help texts below (`docs/operations.md` lists them).
- `/healthz`: 200 while the node serves and hears the node after it; else 503. JSON says why.
- `/readyz`: 200 while it takes requests, whatever its neighbours do: a silent cloud must not take
  the fog out of service.
- `/livez`: 200 while the loop answers at all; a restart helps only where this fails.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from executor._counters import Histogram
from executor._http import HttpServer, Response, Route, json_response

__all__ = ["NodeCollector", "NodeMonitor", "Samples", "family", "histogram_family", "metrics_route"]

PREFIX = "splitpilot_node_"
_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

# Label values, and the value; one that is None is left out.
Samples = Iterable[tuple[Sequence[str], float | None]]

_Facts = Mapping[str, Any]

# Name, help text, key of the node's facts; a fact that is None is left out.
_GAUGES = (
    ("queue_length", "Requests waiting for compute.", "queue_len"),
    ("backlog_seconds", "Unloaded seconds of work queued and under way.", "backlog_s"),
    ("load_ratio", "Share of the node's compute that others use, 0 to 1.", "load"),
    ("open_requests", "Requests taken and not answered yet.", "open_requests"),
)
_COUNTERS = (
    ("requests", "Inference requests received, refused ones included.", "requests"),
    ("relayed", "Requests passed on without computing.", "relayed"),
    ("refused", "Requests refused over a bound or because the node drains.", "refused"),
    ("bad_frames", "Frames that could not be accepted.", "bad_frames"),
    ("duplicates", "Requests that came again while they were under way.", "duplicates"),
    ("unauthenticated", "Connections that were not admitted.", "unauthenticated"),
    ("stages", "Stages computed.", "stages"),
    ("overruns", "Paced stages that ended late (emulated nodes only).", "overruns"),
)
_HOP_GAUGES = (
    ("hop_bytes_per_second", "Bandwidth measured on the hop to the next node.", "hop_bytes_per_s"),
    ("hop_age_seconds", "Age of that measurement.", "hop_age_s"),
    ("hop_rtt_seconds", "Least recent round trip of a small frame.", "hop_rtt_s"),
    ("hop_backlog_bytes", "Bytes sent and not acknowledged by the next node.", "hop_backlog_bytes"),
)
_HISTOGRAMS = (
    ("stage_seconds", "Wall seconds computing a stage.", "stage_s"),
    ("queue_wait_seconds", "Seconds from a request's arrival to its compute.", "queue_wait_s"),
)


_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


class Monitored(Protocol):
    """What can be watched: `executor.node.Node`."""

    def facts(self, timeout_s: float = 1.0) -> dict[str, Any] | None:
        """What the node knows of itself now; None if its loop does not answer in time."""
        ...


class NodeCollector(Collector):
    """A node's facts as Prometheus metrics, read at every scrape."""

    def __init__(self, node: str, facts: Callable[[], _Facts | None]) -> None:
        """Report for `node`; `facts` gives None while it does not answer."""
        self._node = node
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        """The metrics; only `up` while the node does not answer."""
        facts = self._facts()
        up = GaugeMetricFamily(
            PREFIX + "up", "Whether the node's loop answers (1) or not (0).", labels=["node"]
        )
        up.add_metric([self._node], float(facts is not None))
        yield up
        if facts is None:
            return
        about = InfoMetricFamily(PREFIX[:-1], "What the node runs.", labels=["node"])
        info = {key: str(facts[key]) for key in ("model", "digest", "device", "torch_device")}
        about.add_metric([self._node], info)
        yield about
        for name, text, key in _GAUGES:
            yield self._gauge(name, text, [], [([], facts[key])])
        yield self._gauge(
            "draining", "1 while it finishes what it has.", [], [([], facts["draining"])]
        )
        heard = [([peer], facts[f"{peer}_heard_ago_s"]) for peer in ("next", "previous")]
        text = "Seconds since the neighbour was heard (never: no sample)."
        yield self._gauge("peer_heartbeat_age_seconds", text, ["peer"], heard)
        if facts["next_node"]:
            for name, text, key in _HOP_GAUGES:
                yield self._gauge(name, text, ["to"], [([facts["next_node"]], facts[key])])
            text = "Bytes of probes sent over the hop, which serve no request."
            probed = [([facts["next_node"]], facts["hop_probe_bytes"])]
            yield self._counter("hop_probe_bytes", text, ["to"], probed)
        for name, text, key in _COUNTERS:
            yield self._counter(name, text, [], [([], facts[key])])
        text = "Error replies by code (refused, draining, wrong_model, bad_plan, failed, ...)."
        yield self._counter("errors", text, ["code"], [([c], n) for c, n in facts["errors"]])
        energy = [([facts["meter"]], facts["energy_j"])]
        text = "Joules since the start, as the named meter counts."
        yield self._counter("energy_joules", text, ["meter"], energy)
        for name, text, key in _HISTOGRAMS:
            yield histogram_family(PREFIX + name, text, {"node": self._node}, facts[key])

    def _gauge(self, name: str, text: str, labels: list[str], samples: Samples) -> Metric:
        return self._family(GaugeMetricFamily, name, text, labels, samples)

    def _counter(self, name: str, text: str, labels: list[str], samples: Samples) -> Metric:
        return self._family(CounterMetricFamily, name, text, labels, samples)

    def _family(
        self, kind: _Family, name: str, text: str, labels: list[str], samples: Samples
    ) -> Metric:
        own = (([self._node, *values], value) for values, value in samples)
        return family(kind, PREFIX + name, text, ["node", *labels], own)


class NodeMonitor:
    """The HTTP side of a node.

    It serves before the node does, so that a node that still builds its model says `starting`;
    `watch` hands it the node.
    """

    def __init__(self, role: str, next_node: str, host: str, port: int) -> None:
        """Listen.

        Args:
            role: The node's name.
            next_node: Name of the node after it; "" for the last.
            host: Address to bind.
            port: Port to bind.

        Raises:
            ConfigError: The address cannot be bound.
        """
        self._role, self._next = role, next_node
        self._node: Monitored | None = None
        self._started_s = time.monotonic()
        routes = {
            "/metrics": metrics_route(NodeCollector(role, self._facts)),
            "/healthz": lambda query: self._health(),
            "/readyz": lambda query: self._answer("starting", "stuck", "draining"),
            "/livez": lambda query: self._answer("starting", "stuck"),
        }
        self._server = HttpServer("metrics", host, port, routes)
        self.port = self._server.port

    def __enter__(self) -> NodeMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, node: Monitored) -> None:
        """The node serves from now on."""
        self._node = node

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    def _facts(self) -> dict[str, Any] | None:
        facts = self._node.facts() if self._node is not None else None
        return None if facts is None else {**facts, "next_node": self._next}

    def _state(self) -> tuple[str, str, dict[str, Any] | None]:
        """In a word, in a sentence, and the facts behind it."""
        if self._node is None:
            return "starting", "building the model and its first pass", None
        facts = self._facts()
        if facts is None:
            return "stuck", "the node's loop does not answer", None
        if facts["draining"]:
            return "draining", f"{facts['open_requests']} requests to finish, none taken", facts
        if self._next and facts["next_silent"]:
            ago_s = facts["next_heard_ago_s"]
            since = "was never heard" if ago_s is None else f"was last heard {ago_s:.1f} s ago"
            return "next node silent", f"node {self._next} {since}", facts
        return "serving", "", facts

    def _health(self) -> Response:
        state, reason, facts = self._state()
        values: dict[str, Any] = {
            "status": state,
            "reason": reason,
            "node": self._role,
            "next": self._next or None,
            "uptime_s": round(time.monotonic() - self._started_s, 3),
        }
        for key in _HEALTH_KEYS if facts is not None else ():
            assert facts is not None
            value = facts[key]
            values[key] = value if not isinstance(value, float) or math.isfinite(value) else None
        return json_response(values, 200 if state == "serving" else 503)

    def _answer(self, *failing: str) -> Response:
        """The state alone; 503 in one of those named."""
        state, reason, _ = self._state()
        return json_response({"status": state, "reason": reason}, 503 if state in failing else 200)


_HEALTH_KEYS = (
    "model", "digest", "queue_len", "backlog_s", "load", "open_requests", "requests", "refused",
    "bad_frames", "next_heard_ago_s", "previous_heard_ago_s", "hop_bytes_per_s",
    "hop_backlog_bytes", "meter", "energy_j",
)  # fmt: skip


def family(kind: _Family, name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    """A gauge or counter with its samples."""
    result = kind(name, text, labels=labels)
    for values, value in samples:
        if value is not None:
            result.add_metric(values, float(value))
    return result


def histogram_family(
    name: str, text: str, labels: Mapping[str, str], histogram: Histogram
) -> HistogramMetricFamily:
    """A histogram of ours as Prometheus's."""
    result = HistogramMetricFamily(name, text, labels=list(labels))
    result.add_metric(list(labels.values()), list(histogram.cumulative()), histogram.total_s)
    return result


def metrics_route(*collectors: Collector) -> Route:
    """`/metrics`: the collectors' metrics, with those of this process and Python."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)
    return lambda query: Response(generate_latest(registry), _TEXT_FORMAT)
