"""The coordinator: routed tokens in, summed expert outputs out, over any number of servers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from expertd.client.call.activations import Activations
from expertd.client.call.arguments import as_rows, as_tokens, check_choice
from expertd.client.call.dispatch import renormalize
from expertd.client.call.failover import Caller, LayerCall
from expertd.client.call.result import MoeResult, combine_all, experts_of, report
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.discovery import Discovery, as_discovery
from expertd.client.fleet.membership import Membership
from expertd.client.fleet.ownership import name_experts
from expertd.client.telemetry.tracing import call_span
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import route, router_logits
from expertd.proto.base.errors import ExpertdError, InvalidBatch
from expertd.proto.base.tasks import Tasks

log = logging.getLogger(__name__)


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

    async def connect(self) -> Self:
        """Connect, for callers without an `async with` block; `close()` is then theirs. Connected already: do nothing.

        Raises `Unavailable`, `ModelMismatch`, or `UnknownExpert` naming the experts without an owner.
        """
        if self._caller is not None:
            return self
        config = self.config
        tasks = Tasks(config.metrics.background_failed)
        membership = Membership(self._discovery, self._open_transport, tasks, complete=config.on_missing == "error")
        try:
            await membership.connect(config.connect_timeout)
        except BaseException:
            await membership.close()
            raise
        self._caller = Caller(membership, config)
        return self

    async def close(self) -> None:
        """Disconnect; calls in flight fail. It can be connected again."""
        caller, self._caller = self._caller, None
        if caller is not None:
            await caller.membership.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "connected" if self._caller else "not connected"
        return f"Coordinator({self._discovery}, {state})"

    @property
    def model(self) -> MoeConfig:
        """The model that the servers hold."""
        return self._connected().membership.ownership.config

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that can be called."""
        return self._connected().membership.ownership.layers

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
        metrics, started = self.config.metrics, time.perf_counter()
        try:
            with call_span(self.config.tracer, layer):
                result = await self._execute(layer, hidden, router_logits, topk_ids, topk_weights)
        except ExpertdError as error:
            metrics.failed(error.code.name.lower())
            raise
        except asyncio.CancelledError:
            metrics.failed("cancelled")
            raise
        metrics.answered(math.prod(hidden.shape[:-1]), result.degraded_tokens, time.perf_counter() - started)
        return result

    async def _execute(
        self,
        layer: int,
        hidden: Tensor,
        logits: Tensor | None,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
    ) -> MoeResult:
        caller = self._connected()
        caller.membership.ownership.check_layer(layer)
        tokens = as_tokens("hidden", hidden, self.model.hidden_size)
        ids, weights = self._route(layer, tokens, logits, topk_ids, topk_weights)
        call = LayerCall(caller, layer, Activations(tokens, self.config.hidden_dtype))
        answers = await call.run(ids, weights)
        dtype = torch.float32 if call.missing else self.config.output_dtype
        sums = torch.empty(tokens.shape, dtype=dtype, device=tokens.device if tokens.is_cuda else None)
        await combine_all(sums, answers)
        degraded = renormalize(sums, ids, weights, call.missing) if call.missing else 0
        lost = experts_of(call.missing)
        if degraded:
            log.warning("layer %d: %d of %d tokens lack %s", layer, degraded, len(tokens), name_experts(lost))
        output = sums.to(self.config.output_dtype).reshape(hidden.shape)
        return MoeResult(output, report(answers), call.effort, degraded, lost)

    @property
    def sharing_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors reach through shared memory."""
        return frozenset(transport.address for transport in self._transports() if HOST in transport.shared_devices)

    @property
    def sharing_gpu_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors of a GPU have reached without leaving it."""
        return frozenset(transport.address for transport in self._transports() if transport.shared_devices - {HOST})

    def _transports(self) -> list[Transport]:
        return [member.transport for member in self._connected().membership.members.values()]

    def _transport(self, address: str) -> Transport:
        config = self.config
        grpc = GrpcTransport(address, config.channels, config.security, config.chunk_bytes)
        most = config.shared_memory_bytes
        return SharedMemoryTransport(grpc, most, config.shared_memory_chunk_bytes) if most else grpc

    def _connected(self) -> Caller:
        if self._caller is None:
            raise RuntimeError(
                "the coordinator is not connected; use it in 'async with Coordinator(...) as moe:', or connect() first"
            )
        return self._caller

    def _route(
        self, layer: int, tokens: Tensor, logits: Tensor | None, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids [T, k] int32 and weights [T, k] float32 from whatever the caller gave."""
        model = self.model
        if ids is not None or weights is not None:
            if ids is None or weights is None or logits is not None:
                raise InvalidBatch("give topk_ids and topk_weights together, and no router_logits with them")
            ids = as_rows("topk_ids", ids, len(tokens)).cpu()
            weights = as_rows("topk_weights", weights, len(tokens)).cpu()
            check_choice(ids, weights, model)
            return ids.to(torch.int32), weights.float()
        gate = self.config.gates.get(layer)
        if gate is None:
            raise InvalidBatch(
                f"layer {layer} has no gate; give gates in CoordinatorConfig, or topk_ids and topk_weights"
            )
        if logits is None:
            logits = router_logits(tokens, gate.weight.to(tokens.device))
        logits = as_tokens("router_logits", logits, model.n_routed_experts).cpu()
        if len(logits) != len(tokens):
            raise InvalidBatch(f"router_logits has {len(logits)} rows; hidden has {len(tokens)} tokens")
        if not logits.isfinite().all():
            raise InvalidBatch("router_logits holds NaN or infinity; they must be finite")
        return route(logits, gate.correction_bias.cpu(), model)
