"""The coordinator: routed tokens in, summed expert outputs out, over any number of servers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from expertd.client.base.blocks import BLOCK_TOKENS, start_blocks
from expertd.client.call.activations import Activations
from expertd.client.call.arguments import as_rows, as_tokens, check_choice
from expertd.client.call.dispatch import Work, combine, contributions, renormalize
from expertd.client.call.failover import Answer, Caller, Effort, LayerCall
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
from expertd.proto.codec import StageTimings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What one server did for one call."""

    address: str
    tokens: int
    pairs: int
    round_trip: float
    """Seconds from sending to the decoded answer; of a split batch, the longest part's."""
    timings: StageTimings
    """The server's own account; of a split batch, the slowest part's."""


@dataclass(frozen=True, slots=True)
class MoeResult:
    """The output of one layer with how it came about."""

    output: Tensor
    """[..., H] of the coordinator's output dtype: sum over each token's experts of weight * expert(hidden)."""
    servers: tuple[ServerReport, ...]
    effort: Effort
    degraded_tokens: int = 0
    """Tokens that lack experts because nobody computed them; 0 unless `on_missing` is "renormalize"."""
    missing_experts: tuple[int, ...] = ()
    """Global ids of the experts that they lack."""

    def __repr__(self) -> str:
        servers = ", ".join(f"{server.address} {server.round_trip * 1e3:.1f} ms" for server in self.servers)
        degraded = f"; {self.degraded_tokens} tokens lack experts" if self.degraded_tokens else ""
        return f"MoeResult(output {list(self.output.shape)} {self.output.dtype}; {servers}{degraded})"


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
        await _combine_all(sums, answers)
        degraded = renormalize(sums, ids, weights, call.missing) if call.missing else 0
        lost = _experts(call.missing)
        if degraded:
            log.warning("layer %d: %d of %d tokens lack %s", layer, degraded, len(tokens), name_experts(lost))
        output = sums.to(self.config.output_dtype).reshape(hidden.shape)
        return MoeResult(output, _report(answers), call.effort, degraded, lost)

    @property
    def sharing_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors reach through shared memory."""
        return frozenset(address for address, devices in self._shared_devices().items() if HOST in devices)

    @property
    def sharing_gpu_memory(self) -> frozenset[str]:
        """Addresses of the servers that tensors of a GPU have reached without leaving it."""
        return frozenset(address for address, devices in self._shared_devices().items() if devices - {HOST})

    def _shared_devices(self) -> dict[str, frozenset[torch.device]]:
        transports = [member.transport for member in self._connected().membership.members.values()]
        return {transport.address: transport.shared_devices for transport in transports}

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


def _experts(parts: Sequence[Work]) -> tuple[int, ...]:
    """Global ids, ascending."""
    return tuple(sorted({expert for part in parts for expert in part.expected_receipt()}))


async def _combine_all(sums: Tensor, answers: Sequence[Answer]) -> None:
    """Write what `answers` give to each token to `sums` [T, H]."""
    parts, num_tokens = [(answer.dispatch, answer.result) for answer in answers], len(sums)
    if sums.is_cuda:
        combine(sums, contributions(parts, num_tokens, num_tokens)[0])
        return
    blocks = contributions(parts, num_tokens, BLOCK_TOKENS)
    await asyncio.gather(
        *start_blocks(num_tokens, lambda rows: combine(sums[rows], blocks[rows.start // BLOCK_TOKENS]))
    )


def _report(answers: Sequence[Answer]) -> tuple[ServerReport, ...]:
    """The answers by server, in the order in which the servers first occur."""
    reports = []
    for address in dict.fromkeys(answer.address for answer in answers):
        mine = [answer for answer in answers if answer.address == address]
        reports.append(
            ServerReport(
                address=address,
                tokens=sum(len(answer.dispatch.tokens) for answer in mine),
                pairs=sum(sum(answer.result.receipt.values()) for answer in mine),
                round_trip=max(answer.round_trip for answer in mine),
                timings=max((answer.result.timings for answer in mine), key=lambda timings: timings.total),
            )
        )
    return tuple(reports)
