"""`/metrics` and `/healthz` of the agent (`docs/operations.md` lists the names)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from agents.serving.telemetry import Telemetry
from executor._http import Response, Route, json_response
from executor.metrics import Samples, family, histogram_family, metrics_route

__all__ = ["AgentCollector", "agent_routes"]

PREFIX = "splitpilot_agent_"


class AgentCollector(Collector):
    """A deployment's telemetry as Prometheus metrics, read at every scrape."""

    def __init__(self, telemetry: Telemetry) -> None:
        """Report what `telemetry` holds."""
        self._telemetry = telemetry

    def collect(self) -> Iterable[Metric]:
        """The metrics; only `serving` before the first interval has ended."""
        serving = float(self._telemetry.state == "serving")
        yield _gauge("serving", "1 while requests are submitted.", [], [([], serving)])
        known = self._telemetry.metrics()
        if known is None:
            return
        about, now, totals = known
        names = [node["name"] for node in about["nodes"]]
        hops = [f"{a}-{b}" for a, b in pairwise(names)]
        info = InfoMetricFamily(PREFIX[:-1], "What is deployed.")
        info.add_metric([], {"model": about["model"], "controller": about["controller"]})
        yield info
        plan = InfoMetricFamily(PREFIX + "plan", "The split in force.")
        cuts = ",".join(map(str, now["cuts"]))
        plan.add_metric([], {"cuts": cuts, "split": now["split"], "decided_by": now["by"]})
        yield plan
        text = "Cut on a hop: the first unit that runs after it."
        yield _gauge("cut_unit", text, ["hop"], _each(hops, now["cuts"]))
        yield _gauge("in_flight", "Requests without an answer.", [], [([], now["in_flight"])])
        text = "Arrivals, smoothed."
        yield _gauge("arrival_requests_per_second", text, [], [([], now["arrival_rps"])])
        for name, text, key in (
            ("hop_bytes_per_second", "Bandwidth that the controller sees.", "bytes_per_s"),
            ("hop_age_seconds", "Age of that measurement.", "age_s"),
            ("hop_backlog_bytes", "Bytes sent and not acknowledged.", "backlog_bytes"),
        ):
            yield _gauge(name, text, ["hop"], _each(hops, [hop[key] for hop in now["hops"]]))
        nodes = now["nodes"]
        for name, text, key in (
            ("node_backlog_seconds", "Unloaded seconds of work queued at a node.", "backlog_s"),
            ("node_load_ratio", "Share of a node's compute that others use, 0 to 1.", "load"),
            ("node_heartbeat_age_seconds", "Seconds since a node was heard.", "heard_ago_s"),
        ):
            yield _gauge(name, text, ["node"], _each(names, [node[key] for node in nodes]))
        up = [float(not node["down"]) for node in nodes]
        yield _gauge("node_up", "0 where a node is silent.", ["node"], _each(names, up))
        record = totals.record
        for name, text, count in (
            ("submitted", "Requests that arrived.", record.arrived),
            ("completed", "Requests whose output came back.", record.completed),
            ("lost", "Requests refused or failed.", record.lost),
            ("late", "Requests completed after the deadline.", record.late),
        ):
            yield _counter(name, text, [], [([], float(count[0]))])
        text = "Decisions by who made them (policy, solver or controller) and why not the policy."
        decisions = [([by, reason], float(n)) for (by, reason), n in totals.decisions.items()]
        yield _counter("decisions", text, ["by", "reason"], decisions)
        text = "Decisions taken from the policy, by reason."
        falls = [([reason], float(n)) for (_, reason), n in totals.decisions.items() if reason]
        yield _counter("fallbacks", text, ["reason"], falls)
        yield _counter("switches", "Changes of the plan.", [], [([], float(totals.switches))])
        text = "Cost of all requests; 1.1 is about one edge-only request, unloaded."
        yield _counter("cost", text, [], [([], totals.cost)])
        text = "Joules by the power model, of the edge or of all nodes, in both accountings."
        joules = [([*key], j) for key, j in totals.energy_j.items()]
        yield _counter("energy_joules", text, ["scope", "accounting"], joules)
        served = max(1.0, float(record.completed[0]))
        text = "The same per completed request, since the start."
        per_request = [([*key], j / served) for key, j in totals.energy_j.items()]
        yield _gauge("energy_per_request_joules", text, ["scope", "accounting"], per_request)
        text = "Seconds from a request's scheduled arrival to its output."
        yield histogram_family(PREFIX + "latency_seconds", text, {}, totals.latency_s)
        text = "Seconds that a decision took."
        yield histogram_family(PREFIX + "decide_seconds", text, {}, totals.decide_s)


def agent_routes(telemetry: Telemetry) -> dict[str, Route]:
    """`/metrics` and `/healthz`: 200 while it serves and hears the edge, else 503."""

    def health() -> Response:
        well, facts = telemetry.health()
        return json_response(facts, 200 if well else 503)

    return {
        "/metrics": metrics_route(AgentCollector(telemetry)),
        "/healthz": lambda query: health(),
    }


def _each(names: list[str], values: Sequence[float | None]) -> list[tuple[list[str], float | None]]:
    return [([name], value) for name, value in zip(names, values, strict=True)]


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return family(GaugeMetricFamily, PREFIX + name, text, labels, samples)


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    return family(CounterMetricFamily, PREFIX + name, text, labels, samples)
