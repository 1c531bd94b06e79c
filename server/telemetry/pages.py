"""What the metrics port answers: the status page, its data, probes, and Prometheus."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs

from prometheus_client.exposition import choose_encoder, gzip_accepted

from expertd.server.options.config import Address, InvalidOption
from expertd.server.telemetry.http_port import Answer, HttpPort, Request
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.pulse import Pulse
from expertd.server.telemetry.status import Status

ALIVE_SECONDS = 5.0
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:",
    ),
)


class Pages:
    """The metrics port and what it answers, on a thread of its own."""

    def __init__(self, address: Address, status: Status, metrics: Metrics) -> None:
        self._port = HttpPort(address, self._answer)
        self.status = status
        self._registry = metrics.registry
        self._page = files("expertd.server.telemetry").joinpath("status.html").read_bytes()
        self._pulses: list[Pulse] = []
        self.alive_seconds = ALIVE_SECONDS

    @property
    def address(self) -> Address:
        return self._port.address

    def start(self) -> None:
        """Listen; /healthz tells of the running event loop. Raises `InvalidOption`."""
        loop = asyncio.get_running_loop()
        self.watch("event loop", lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result())
        try:
            self._port.start()
        except OSError as error:
            raise InvalidOption(f"--metrics {self.address} cannot be bound: {error}") from None

    def watch(self, what: str, sign: Callable[[], object]) -> None:
        """From now on /healthz asks for `sign` too, which returns when `what` gave a sign of life."""
        self._pulses.append(Pulse(what, sign))

    async def stop(self) -> None:
        await asyncio.to_thread(self._port.stop)

    async def _answer(self, request: Request) -> Answer:
        match request.path:
            case "/metrics":
                return self._scrape(request)
            case "/":
                return _page(HTTPStatus.OK, HTML, self._page)
            case "/status.json":
                return _page(HTTPStatus.OK, JSON, json.dumps(self.status.snapshot()).encode())
            case "/healthz":
                return _probe("alive", await self._hung())
            case "/readyz":
                return _probe("ready", await self._hung() or self.status.closed_because())
        return _page(HTTPStatus.NOT_FOUND, TEXT, f"no {request.path}; try /".encode())

    async def _hung(self) -> str | None:
        """What gives no sign of life; a restart is the cure."""
        for pulse in self._pulses:
            if not await pulse.beats(self.alive_seconds):
                return f"the {pulse.what} has not answered within {self.alive_seconds:g} s; restart the server"
        return None

    def _scrape(self, request: Request) -> Answer:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        names = parse_qs(request.query).get("name[]")
        text = encode(self._registry.restricted_registry(names) if names else self._registry)
        headers = (("Content-Type", content_type),)
        if not gzip_accepted(request.headers.get("accept-encoding", "")):
            return Answer(HTTPStatus.OK, headers, text)
        return Answer(HTTPStatus.OK, (*headers, ("Content-Encoding", "gzip")), gzip.compress(text))


def _page(status: HTTPStatus, content_type: str, body: bytes) -> Answer:
    return Answer(status, (("Content-Type", content_type), *HEADERS), body)


def _probe(well: str, trouble: str | None) -> Answer:
    status = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
    return _page(status, TEXT, f"{trouble or well}\n".encode())
