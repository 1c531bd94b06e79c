"""What became of each request to a server: which link is slow, or fails, and how."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Histogram

MOST_SERVERS = 128
"""Whose series there are: of more, those go that were asked longest ago."""


class Attempts:
    """Their seconds by server, by how it is reached, and by outcome. Any thread."""

    def __init__(self, registry: CollectorRegistry | None, buckets: tuple[float, ...]) -> None:
        self._seconds = Histogram(
            "expertd_coordinator_attempt_duration_seconds",
            "Seconds of each request to a server, repeated and hedged ones too, from sending it to what became of it.",
            ["server", "transport", "outcome"],
            buckets=buckets,
            registry=registry,
        )
        self._lock = threading.Lock()
        self._known: dict[str, dict[tuple[str, str], Histogram]] = {}
        """By server, the one asked last at the end."""

    def ended(self, server: str, transport: str, outcome: str, seconds: float, trace: str) -> None:
        """In a trace, if `trace` is the id of a sampled one."""
        with self._lock:
            known = self._known[server] = self._known.pop(server, {})
            if (transport, outcome) not in known:
                known[transport, outcome] = self._seconds.labels(server, transport, outcome)
                self._forget()
        known[transport, outcome].observe(seconds, {"trace_id": trace} if trace else None)

    def _forget(self) -> None:
        """Servers come and go under ever new addresses."""
        while len(self._known) > MOST_SERVERS:
            oldest = next(iter(self._known))
            for labels in self._known.pop(oldest):
                self._seconds.remove(oldest, *labels)
