"""The coordinator: routed tokens in, summed expert outputs out, over any number of servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from expertd import _native
from expertd.client.base.devices import as_device
from expertd.client.base.loop_thread import LoopThread
from expertd.client.call.arguments import as_layer, as_rows, as_tokens, check_finite
from expertd.client.call.caller import Caller
from expertd.client.call.pending import PendingCall
from expertd.client.call.result import MoeResult, ended
from expertd.client.call.routed import RoutedCall
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.discovery import Discovery, as_discovery
from expertd.client.fleet.membership import Membership
from expertd.client.telemetry.meter import CallMeter
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.security import ClientSecurity
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import route, router_logits
from expertd.proto.base.errors import ExpertdError, InvalidBatch, NotPermitted
from expertd.proto.base.tasks import Tasks

if TYPE_CHECKING:
    from expertd.client.stream.calls import StreamCalls


class Coordinator:
    """Runs the routed experts of a Mixture-of-Experts model on expertd servers.

        async with Coordinator(["host1:50051", "host2:50051"]) as moe:
            y = await moe(layer, hidden, topk_ids=ids, topk_weights=weights)

    Every (token, expert) pair is in the result exactly once, or the call raises an `ExpertdError`.
    """

    def __init__(
        self,
        servers: Sequence[str] | Discovery,
        config: CoordinatorConfig | None = None,
        *,
        open_transport: Callable[[str], Transport] | None = None,
    ) -> None:
        """`servers` are `host:port` or `unix:PATH` addresses that together own every expert, or what finds them.

        `open_transport` makes a connection to an address; without it, they are what `config` asks for.
        """
        self.config = config or CoordinatorConfig()
        self._discovery = as_discovery(servers)
        self._open_transport = open_transport or self._transport
        self._caller: Caller | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stream_calls: StreamCalls | None = None

    async def connect(self) -> Self:
        """Connect, for callers without an `async with` block; `close()` is then theirs. Connected already: do nothing.

        Raises `Unavailable`, `ModelMismatch`, or `UnknownExpert` naming the experts without an owner.
        """
        if self._caller is not None:
            self._check_loop()
            return self
        config = self.config
        if config.spin_us is not None:
            _native.limit_spin(config.spin_us)
        tasks = Tasks(config.metrics.background_failed, config.metrics.background_restarted)
        membership = Membership(
            self._discovery,
            self._open_transport,
            tasks,
            complete=config.on_missing == "error",
            model_fingerprint=config.model_fingerprint,
            locality=config.locality,
        )
        try:
            await membership.connect(config.connect_timeout)
        except BaseException:
            await membership.close()
            raise
        security = config.security or ClientSecurity()
        config.metrics.follow(membership.holdings, security.certificate_ends)
        self._caller, self._loop = Caller(membership, config), asyncio.get_running_loop()
        return self

    async def close(self) -> None:
        """Disconnect; calls in flight fail. It can be connected again.

        Raises what `check` would.
        """
        if self._caller is not None:
            self._check_loop()
        caller, self._caller = self._caller, None
        calls, self._stream_calls = self._stream_calls, None
        try:
            if calls is not None:
                await calls.close()
        finally:
            if caller is not None:
                self.config.metrics.part(caller.membership.holdings)
                await caller.membership.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "connected" if self._caller else "not connected"
        return f"Coordinator({self._discovery}, {state})"

    @property
    def model(self) -> MoeConfig:
        """The model that the servers hold."""
        return self._connected().membership.holdings.ownership.config

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that can be called."""
        return self._connected().membership.holdings.ownership.layers

    @property
    def backends(self) -> frozenset[str]:
        """Compute backends of the servers in use."""
        members = self._connected().membership.members.values()
        return frozenset(member.shard.backend for member in members if member.shard is not None and member.in_use)

    async def __call__(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> Tensor:
        """Like `execute`, but returns the output alone."""
        result = await self.execute(layer, hidden, router_logits, topk_ids=topk_ids, topk_weights=topk_weights)
        return result.output

    async def execute(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> MoeResult:
        """Compute the routed experts of `layer` for `hidden` [..., H], a float tensor; the output is where it is.

        Routing comes from `topk_ids` [..., k] (global ids, any integer dtype, -1 for no expert) with `topk_weights`
        [..., k], or from `router_logits` [..., E] with the layer's gate for its bias, or from the gate alone.
        What fails on one server is repeated on others that own the same experts. Raises `InvalidBatch` for unusable
        arguments, `UnknownExpert` for an unknown layer, or the last error when attempts or time run out.
        """
        self._check_loop()
        meter = self._meter(layer)
        with meter.counting():
            result = await self._routed(layer, hidden, router_logits, topk_ids, topk_weights).execute()
        self._count(meter, result)
        return result

    def submit(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> asyncio.Task[MoeResult]:
        """Begin what `execute` does, for a caller who has other things to do meanwhile: `await` it for the result.

        Hidden states must stay as they are until there is a result: what fails is sent again from them. Wrong arguments
        are raised at once. Cancelling the task gives the call up.
        """
        self._check_loop()
        meter = self._meter(layer)
        with meter.counting():
            call = self._routed(layer, hidden, router_logits, topk_ids, topk_weights)
            straight = None if call.is_long else call.begin()

        async def complete() -> MoeResult:
            with meter.counting():
                result = await (call.execute() if straight is None else call.collect(straight))
            self._count(meter, result)
            return result

        task = asyncio.get_running_loop().create_task(complete())
        if straight is not None:
            # Of a task that is cancelled before it begins, nothing is ever run.
            task.add_done_callback(lambda _: straight.close())
        return task

    async def prepare_stream(
        self, max_tokens: int, device: torch.device | str | None = None, *, timeout: float = 1.0
    ) -> None:
        """See `SyncCoordinator.prepare_stream`."""
        self._check_loop()
        caller = self._connected()
        try:
            # Needs Triton, which callers without a GPU need not have.
            from expertd.client.stream.calls import StreamCalls
        except ImportError as error:
            raise NotPermitted(f"{error}: stream-ordered calls need Triton, which torch for CUDA brings") from None
        calls = StreamCalls(caller, as_device(device), max_tokens, timeout)
        try:
            await calls.renew()
        except BaseException:
            await calls.close()
            raise
        former, self._stream_calls = self._stream_calls, calls
        if former is not None:
            await former.close()

    def on_stream(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """See `SyncCoordinator.on_stream`; calls go on to whom they went until the next `check`."""
        calls = self.stream_calls
        if out is None and torch.compiler.is_compiling():
            output: Tensor = torch.ops.expertd.on_stream(calls.number, layer, hidden, topk_ids, topk_weights)
            return output
        return calls(layer, hidden, topk_ids, topk_weights, out)

    async def check(self) -> None:
        """See `SyncCoordinator.check`."""
        self._check_loop()
        calls = self.stream_calls
        await asyncio.to_thread(calls.synchronize)
        error = calls.take_error()
        calls.report()
        if calls.is_stale:
            try:
                await calls.renew()
            except ExpertdError as another:
                # What came of it first says more.
                error = error or another
        # Others may have failed until then.
        error = error or calls.take_error()
        if error is not None:
            raise error

    @property
    def stream_on_gpu(self) -> frozenset[str]:
        """Addresses of the servers that reach what `on_stream` gives them in the GPU's memory, not the host's."""
        return self.stream_calls.on_gpu

    @property
    def stream_calls(self) -> StreamCalls:
        """What `prepare_stream` has made."""
        if self._stream_calls is None:
            raise RuntimeError("stream-ordered calls are not prepared; call prepare_stream first")
        return self._stream_calls

    def submit_here(
        self,
        layer: int,
        hidden: Tensor,
        router_logits: Tensor | None,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        loop: LoopThread,
        hand_over: Callable[[MoeResult], None] | None = None,
    ) -> PendingCall:
        """Like `submit`, on another thread than `loop`'s, on which the coordinator lives.

        Whoever collects the result calls `hand_over` with it first.
        """
        meter = self._meter(layer)
        with meter.counting():
            call = self._routed(layer, hidden, router_logits, topk_ids, topk_weights)
            return PendingCall(call, loop, meter, hand_over)

    def _meter(self, layer: int) -> CallMeter:
        return CallMeter(self.config.metrics, self.config.tracer, layer)

    def _count(self, meter: CallMeter, result: MoeResult) -> None:
        """The caller does not wait for it."""
        self.config.metrics.later(ended(meter, result))

    def _routed(
        self,
        layer: int,
        hidden: Tensor,
        logits: Tensor | None,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
    ) -> RoutedCall:
        caller = self._connected()
        if self._stream_calls is not None:
            self._stream_calls.check()
        layer = as_layer(layer)
        caller.membership.holdings.ownership.check_layer(layer)
        tokens = as_tokens("hidden", hidden, self.model.hidden_size)
        ids, weights = self._route(layer, tokens, logits, topk_ids, topk_weights)
        return RoutedCall(caller, layer, tokens, ids, weights, hidden.shape)

    @property
    def sharing_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors reach through shared memory."""
        return frozenset(transport.address for transport in self.transports if HOST in transport.shared_devices)

    @property
    def sharing_gpu_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors of a GPU have reached without leaving it."""
        return frozenset(transport.address for transport in self.transports if transport.shared_devices - {HOST})

    @property
    def transports(self) -> list[Transport]:
        """To every server, which calls go through."""
        return [member.transport for member in self._connected().membership.members.values()]

    def _transport(self, address: str) -> Transport:
        config = self.config
        checked = config.checks_all
        grpc = GrpcTransport(address, config.channels, config.security, config.chunk_bytes, checked=checked or None)
        most = config.shared_memory_bytes
        if not most:
            return grpc
        return SharedMemoryTransport(grpc, most, config.shared_memory_chunk_bytes, config.spin_us, checked=checked)

    def _check_loop(self) -> None:
        """Its connections live on the event loop that made them: on another one nothing would ever be answered."""
        if self._caller is not None and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "the coordinator was connected on another event loop; connect and call it within one asyncio.run(...),"
                " or use SyncCoordinator, which works from anywhere"
            )

    def _connected(self) -> Caller:
        if self._caller is None:
            raise RuntimeError(
                "the coordinator is not connected; use it in 'async with Coordinator(...) as moe:', or connect() first"
            )
        return self._caller

    def _route(
        self, layer: int, tokens: Tensor, logits: Tensor | None, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights [T, k] from whatever the caller gave, whose choice is not checked yet."""
        model = self.model
        if ids is not None or weights is not None:
            if ids is None or weights is None or logits is not None:
                raise InvalidBatch("give topk_ids and topk_weights together, and no router_logits with them")
            ids = as_rows("topk_ids", ids, len(tokens)).cpu()
            weights = as_rows("topk_weights", weights, len(tokens)).cpu()
            return ids, weights
        gate = self.config.gates.get(layer)
        if gate is None:
            raise InvalidBatch(
                f"layer {layer} has no gate; give gates in CoordinatorConfig, or topk_ids and topk_weights"
            )
        if gate.table is not None:
            raise InvalidBatch(
                f"layer {layer} chooses experts by token id, not by hidden states: give topk_ids, which its gate's"
                " table has, and topk_weights"
            )
        if logits is None:
            logits = router_logits(tokens, gate.weight.to(tokens.device))
        logits = as_tokens("router_logits", logits, model.n_routed_experts).cpu()
        if len(logits) != len(tokens):
            raise InvalidBatch(f"router_logits has {len(logits)} rows; hidden has {len(tokens)} tokens")
        if not logits.isfinite().all():
            check_finite(tokens)
            raise InvalidBatch("router_logits holds NaN or infinity; they must be finite")
        return route(logits, gate.correction_bias.cpu(), model)
