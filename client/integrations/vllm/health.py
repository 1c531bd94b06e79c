"""vLLM's `/health` is true to whether every expert can be reached: its engine lives on without them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from expertd.client.fleet.survey import judge, survey
from expertd.client.integrations.vllm.methods import wrap
from expertd.client.integrations.vllm.settings import Settings, read
from expertd.client.transport.security import ClientSecurity

TIMEOUT, KNOWN_SECONDS = 2.0, 1.0
BACK_SECONDS = 2.0
"""In which coordinators, the workers' too, use a server that has come back."""


class ExpertsUnreachable(EngineDeadError):  # type: ignore[misc]
    """What vLLM answers with 503."""

    def __str__(self) -> str:
        return "some experts have no owner among the expertd servers; 'expertd status' says which"


class Watch:
    """Asks all servers what they own, at most once a second."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked = self._broken = float("-inf")

    async def whole(self) -> bool:
        """Whether servers that serve own every expert of one model together, and workers know it."""
        if time.monotonic() - self._asked >= KNOWN_SECONDS:
            whole = await self._ask()
            self._asked = time.monotonic()
            if not whole:
                self._broken = self._asked
        return self._asked - self._broken > BACK_SECONDS

    async def _ask(self) -> bool:
        try:
            addresses = await self._settings.servers.addresses()
        except (OSError, ValueError):
            return False
        seen = await survey(addresses, self._settings.config.security or ClientSecurity(), TIMEOUT)
        replicas = judge([one for one in seen if one.health == "SERVING"]).replicas
        return replicas is not None and replicas[0] > 0


def install() -> None:
    """Have `AsyncLLM.check_health`, which `/health` calls, look at the experts, too."""
    wrap(AsyncLLM, "check_health", _with_experts)


_watches: dict[int, Watch] = {}
"""By the engine's identity."""


async def _with_experts(original: Callable[..., Awaitable[None]], engine: Any) -> None:  # noqa: ANN401
    await original(engine)
    settings = read(engine.vllm_config.additional_config)
    if settings is not None and not await _watches.setdefault(id(engine), Watch(settings)).whole():
        raise ExpertsUnreachable
