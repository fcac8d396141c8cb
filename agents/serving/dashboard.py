"""The live page: one static file that polls `data.json`, served by the agent itself."""

from __future__ import annotations

from importlib import resources

from agents.serving.telemetry import Telemetry
from executor._http import Response, Route, json_response

__all__ = ["DEFAULT_PORT", "dashboard_routes"]

DEFAULT_PORT = 8600


def dashboard_routes(telemetry: Telemetry) -> dict[str, Route]:
    """`/`: the page; `/data.json?since=N`: what it shows, with the intervals after number N."""
    page = resources.files("agents.serving").joinpath("dashboard.html").read_bytes()

    def data(since: str) -> Response:
        if not since.isdecimal():
            return json_response({"error": f"since: expected a number, got {since[:40]!r}"}, 400)
        return json_response(telemetry.page(int(since[:12])))

    return {
        "/": lambda query: Response(page, "text/html; charset=utf-8"),
        "/data.json": lambda query: data(query.get("since", "0")),
    }
