"""What the metrics port answers: the status page, its data, probes, and Prometheus."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app, start_http_server

from expertd.server.options.config import Address, InvalidOption
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.status import Status

Answer = tuple[str, str, bytes]
"""Status line, content type, body."""
ALIVE_SECONDS = 5.0
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:",
    ),
]


class Pages:
    """The metrics port and its WSGI application, which runs on threads of its own."""

    def __init__(self, address: Address, status: Status, metrics: Metrics) -> None:
        self.address = address
        self._status = status
        self._registry = metrics.registry
        self._metrics: WSGIApplication = make_wsgi_app(metrics.registry)
        self._page = files("expertd.server.telemetry").joinpath("status.html").read_bytes()
        self._answers: dict[str, Callable[[], Answer]] = {
            "/": lambda: ("200 OK", HTML, self._page),
            "/status.json": lambda: ("200 OK", JSON, json.dumps(self._status.snapshot()).encode()),
            "/healthz": self._alive,
            "/readyz": self._ready,
        }

    def start(self) -> None:
        """Listen; /healthz tells of the running event loop. Raises `InvalidOption`."""
        self._loop = asyncio.get_running_loop()
        try:
            self._server, _ = start_http_server(self.address.port, self.address.host, self._registry)
        except OSError as error:
            raise InvalidOption(f"--metrics {self.address} cannot be bound: {error}") from None
        self._server.set_app(self)
        self.address = dataclasses.replace(self.address, port=self._server.server_port)

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        answer = self._answers.get(path, lambda: ("404 Not Found", TEXT, f"no {path}; try /".encode()))
        status, content_type, body = answer()
        start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(body))), *HEADERS])
        return [body]

    def _alive(self) -> Answer:
        """Whether the event loop still runs; a restart is the cure when it does not."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(ALIVE_SECONDS)
        except (TimeoutError, RuntimeError):
            message = f"the event loop has not answered within {ALIVE_SECONDS:g} s; restart the server\n"
            return "503 Service Unavailable", TEXT, message.encode()
        return "200 OK", TEXT, b"alive\n"

    def _ready(self) -> Answer:
        """Whether requests are accepted."""
        reason = self._status.closed_because()
        return (
            ("200 OK", TEXT, b"ready\n")
            if reason is None
            else ("503 Service Unavailable", TEXT, f"{reason}\n".encode())
        )
