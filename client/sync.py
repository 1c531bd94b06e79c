"""The synchronous twin of the coordinator, for callers without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from expertd.client.call.result import MoeResult
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import Discovery
from expertd.client.transport.interface import Transport
from expertd.kernels.model.config import MoeConfig

T = TypeVar("T")


class SyncCoordinator:
    """A `Coordinator` whose calls block. May be called from several threads at once.

        with SyncCoordinator(["host1:50051", "host2:50051"]) as moe:
            y = moe(layer, hidden, topk_ids=ids, topk_weights=weights)

    Its event loop runs on a thread of its own, so it works where a loop is running already, as in notebooks:
    `moe = SyncCoordinator(servers).connect()` in one cell, calls in others, `moe.close()` in the last.
    """

    def __init__(
        self,
        servers: Sequence[str] | Discovery,
        config: CoordinatorConfig | None = None,
        *,
        open_transport: Callable[[str], Transport] | None = None,
    ) -> None:
        """See `Coordinator`."""
        self._coordinator = Coordinator(servers, config, open_transport=open_transport)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def connect(self) -> Self:
        """See `Coordinator.connect`."""
        if self._loop is not None:
            return self
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="expertd-coordinator", daemon=True)
        self._thread.start()
        try:
            self._wait(self._coordinator.connect())
        except BaseException:
            self._stop()
            raise
        return self

    def close(self) -> None:
        """See `Coordinator.close`."""
        if self._loop is not None:
            self._wait(self._coordinator.close())
            self._stop()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Sync{self._coordinator!r}"

    @property
    def model(self) -> MoeConfig:
        """The model that the servers hold."""
        return self._coordinator.model

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that can be called."""
        return self._coordinator.layers

    @property
    def backends(self) -> frozenset[str]:
        """Compute backends of the servers in use."""
        return self._coordinator.backends

    @property
    def sharing_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors reach through shared memory."""
        return self._coordinator.sharing_memory

    @property
    def sharing_gpu_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors of a GPU have reached without leaving it."""
        return self._coordinator.sharing_gpu_memory

    def __call__(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> Tensor:
        """See `Coordinator.__call__`."""
        return self.execute(layer, hidden, router_logits, topk_ids=topk_ids, topk_weights=topk_weights).output

    def execute(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> MoeResult:
        """See `Coordinator.execute`."""
        call = self._coordinator.execute(layer, hidden, router_logits, topk_ids=topk_ids, topk_weights=topk_weights)
        if not (isinstance(hidden, Tensor) and hidden.is_cuda):
            return self._wait(call)
        here, there = torch.cuda.current_stream(hidden.device), torch.cuda.default_stream(hidden.device)
        if here == there:
            return self._wait(call)
        # The event loop's thread works on the default stream.
        here.synchronize()
        result = self._wait(call)
        there.synchronize()
        result.output.record_stream(here)
        return result

    def _wait(self, call: Coroutine[None, None, T]) -> T:
        if self._loop is None:
            call.close()
            raise RuntimeError(
                "the coordinator is not connected; use it in 'with SyncCoordinator(...) as moe:', or connect() first"
            )
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C while waiting: the call must not go on without anybody who wants it.
            future.cancel()
            raise

    def _stop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
