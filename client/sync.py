"""The synchronous twin of the coordinator, for callers without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor

from expertd.client.base.devices import as_device
from expertd.client.base.loop_thread import LoopThread
from expertd.client.call.pending import PendingCall
from expertd.client.call.result import MoeResult
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import Discovery
from expertd.client.transport.interface import Transport
from expertd.kernels.model.config import MoeConfig


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
        self._loop: LoopThread | None = None

    def connect(self) -> Self:
        """See `Coordinator.connect`."""
        if self._loop is not None:
            return self
        self._loop = LoopThread("expertd-coordinator")
        try:
            self._loop.wait(self._coordinator.connect())
        except BaseException:
            self._stop()
            raise
        return self

    def close(self) -> None:
        """See `Coordinator.close`."""
        if self._loop is not None:
            try:
                self._loop.wait(self._coordinator.close())
            finally:
                self._stop()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *_: object) -> None:
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
        return self.submit(layer, hidden, router_logits, topk_ids=topk_ids, topk_weights=topk_weights).result()

    def submit(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> PendingCall:
        """Begin what `execute` does, for a caller who has other things to do before it asks for the `result()`.

            pending = moe.submit(layer, hidden, topk_ids=ids, topk_weights=weights)
            y = shared_expert(hidden) + pending.result().output

        Hidden states must stay as they are until there is a result: what fails is sent again from them. Wrong arguments
        are raised at once, or by `result`.
        """
        loop, hand_over = self._running(), None
        if isinstance(hidden, Tensor) and hidden.is_cuda:
            here, there = torch.cuda.current_stream(hidden.device), torch.cuda.default_stream(hidden.device)
            if here != there:
                # The event loop's thread works on the default stream.
                here.synchronize()
                hand_over = partial(_hand_over, here, there)
        return self._coordinator.submit_here(layer, hidden, router_logits, topk_ids, topk_weights, loop, hand_over)

    def prepare_stream(
        self, max_tokens: int, device: torch.device | str | None = None, *, timeout: float = 1.0
    ) -> None:
        """Get ready for `on_stream` with up to `max_tokens` tokens from `device`, the current GPU if it is not given.

        All that such calls will ever need is allocated and compiled here. `timeout`: seconds after which a server that
        has not answered is given up. Raises `NotPermitted` where a server is on another machine.
        """
        # The current one is this thread's, not the event loop's.
        chosen = as_device(device)
        self._running().wait(self._coordinator.prepare_stream(max_tokens, chosen, timeout=timeout))
        self._coordinator.stream_calls.when_stale = self.check

    def on_stream(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Compute the routed experts of `layer` as work on the current CUDA stream: [..., H] like `hidden`, or `out`.

        Returns at once, before anything is computed; CUDA graphs may capture it, and torch.compile takes it whole.
        `topk_ids` [..., k] int32 or int64, -1 for no expert, and `topk_weights` [..., k] with the model's k are where
        `hidden` [..., H] is. Wrong arguments are raised; what fails later leaves NaN, and `check` raises it.
        """
        return self._coordinator.on_stream(layer, hidden, topk_ids, topk_weights, out)

    @property
    def stream_on_gpu(self) -> frozenset[str]:
        """Addresses of the servers that reach what `on_stream` gives them in the GPU's memory, not the host's."""
        return self._coordinator.stream_calls.on_gpu

    def check(self) -> None:
        """Wait for all calls `on_stream`; raise the first error since the last check, with its server's name.

        `execute`, `close` and, once it is known, `on_stream` raise it as well. From then on calls, and graphs that were
        captured, go to servers that are in use.
        """
        self._running().wait(self._coordinator.check())

    def _running(self) -> LoopThread:
        if self._loop is None:
            raise RuntimeError(
                "the coordinator is not connected; use it in 'with SyncCoordinator(...) as moe:', or connect() first"
            )
        self._loop.check_process()
        return self._loop

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()


def _hand_over(here: torch.cuda.Stream, there: torch.cuda.Stream, result: MoeResult) -> None:
    """Make a result of the stream `there` usable on `here`."""
    there.synchronize()
    result.output.record_stream(here)
