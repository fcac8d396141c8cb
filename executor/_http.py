"""A small read-only HTTP server in a thread: metrics, health and the live page."""

from __future__ import annotations

import argparse
import http.server
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from executor.errors import ConfigError

__all__ = ["HttpServer", "Response", "Route", "add_metrics_arguments", "json_response", "port"]

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_CONNECTION_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Response:
    """What a route answers."""

    body: bytes
    content_type: str
    status: int = 200


Route = Callable[[Mapping[str, str]], Response]
"""Given the query's parameters (the last of each name), the answer."""


def json_response(values: Mapping[str, Any], status: int = 200) -> Response:
    """Plain data as JSON; numbers must be finite."""
    body = json.dumps(values, allow_nan=False).encode()
    return Response(body, "application/json; charset=utf-8", status)


def port(text: str) -> int:
    """An argument type: a TCP port, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port in 0..65535, got {text!r}")
    return int(text)


def add_metrics_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--metrics-port` (None where it is not given; `default` says what then) and its host."""
    parser.add_argument(
        "--metrics-port",
        type=port,
        help=f"/metrics and /healthz; 0: off (default: {default})",
    )
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", help="address for them (default: 127.0.0.1)"
    )


class HttpServer:
    """Answers GET and HEAD on a few fixed paths, until it is closed.

    Each connection has a thread, at most 16 at a time, and 5 s per read: whoever connects and
    says nothing cannot hold it up for long.

    Attributes:
        host: The address it listens on.
        port: The port it listens on.
    """

    def __init__(self, what: str, host: str, port: int, routes: Mapping[str, Route]) -> None:
        """Listen and serve.

        Args:
            what: What it is for, in errors: "metrics".
            host: Address to bind.
            port: Port to bind; 0 takes a free one.
            routes: By path.

        Raises:
            ConfigError: The address cannot be bound.
        """
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._server = _Server(family, (host, port), routes)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{what}: cannot listen on {host}:{port}: {reason}") from None
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name=f"http-{what}", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is, with no path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    """The socket, with a bound on the threads that serve it."""

    daemon_threads = True

    def __init__(
        self, family: socket.AddressFamily, address: tuple[str, int], routes: Mapping[str, Route]
    ) -> None:
        self.address_family = family
        self.routes = dict(routes)
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which can take seconds and is not needed.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("http connection of %s ended early", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection, one request."""

    server: _Server
    timeout = _CONNECTION_TIMEOUT_S
    server_version = "splitpilot"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer from the routes."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """The same without the body."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        url = urlsplit(self.path)
        route = self.server.routes.get(url.path)
        if route is None:
            known = ", ".join(sorted(self.server.routes))
            response = Response(f"no such page; there are: {known}\n".encode(), "text/plain", 404)
        else:
            try:
                response = route({k: v[-1] for k, v in parse_qs(url.query).items()})
            except Exception:
                # The page must not take the node with it; the reason is for the log only.
                _log.exception("%s failed", url.path)
                response = Response(b"failed; see the log\n", "text/plain", 500)
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line per request is for debugging only."""
        _log.debug("%s: " + format, self.address_string(), *args)
