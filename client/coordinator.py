"""The coordinator: routed tokens in, summed expert outputs out, over any number of servers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from expertd.client.arguments import as_rows, as_tokens, check_choice
from expertd.client.dispatch import Dispatch, check_receipt, combine, plan_dispatch
from expertd.client.gate import Gate
from expertd.client.ownership import Ownership, resolve_ownership
from expertd.client.security import ClientSecurity
from expertd.client.transport import GrpcTransport, Transport
from expertd.kernels.config import MoeConfig
from expertd.kernels.quantize import quantize_activations
from expertd.kernels.routing import route, router_logits
from expertd.proto.codec import HIDDEN_DTYPES, REPLY_DTYPES, ExecuteCall, ExecuteResult, ShardInfo, StageTimings
from expertd.proto.errors import InvalidBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """How a coordinator talks to its servers. Times are in seconds."""

    gates: Mapping[int, Gate] = field(default_factory=dict)
    """Router by layer, for calls that give hidden states alone and for `router_logits` (whose bias is the gate's)."""
    hidden_dtype: torch.dtype = torch.float8_e4m3fn
    """What hidden states are sent as: float8_e4m3fn, or bfloat16 (no quantisation, twice the bytes)."""
    reply_dtype: torch.dtype = torch.bfloat16
    """What servers send partial sums as: bfloat16, or float32 (twice the bytes)."""
    output_dtype: torch.dtype = torch.bfloat16
    """What calls return; sums are FP32 whatever it is."""
    chunk_bytes: int = 1 << 20
    """Batches are split by tokens so that no message exceeds this, and sending, computing and receiving overlap."""
    channels: int = 2
    """Connections to each server; chunks go to the one with the least in flight."""
    connect_timeout: float = 10.0
    call_timeout: float = 60.0
    security: ClientSecurity | None = None
    """Certificates and token; without it, plaintext."""

    def __post_init__(self) -> None:
        if self.hidden_dtype not in HIDDEN_DTYPES:
            raise ValueError(f"hidden_dtype is {self.hidden_dtype}; choose from {HIDDEN_DTYPES}")
        if self.reply_dtype not in REPLY_DTYPES:
            raise ValueError(f"reply_dtype is {self.reply_dtype}; choose from {REPLY_DTYPES}")
        if self.chunk_bytes < 1 or self.channels < 1:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}, channels {self.channels}; both must be at least 1")

    def chunk_tokens(self, hidden_size: int) -> int:
        """Tokens of a chunk: as many as keep both the request and the reply within `chunk_bytes`, at least one."""
        widest = max(self.hidden_dtype.itemsize, self.reply_dtype.itemsize)
        return max(1, self.chunk_bytes // (hidden_size * widest))


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


class Coordinator:
    """Runs the routed experts of a Mixture-of-Experts model on expertd servers.

        async with Coordinator(["host1:50051", "host2:50051"]) as moe:
            y = await moe(layer, hidden, topk_ids=ids, topk_weights=weights)

    Every (token, expert) pair is in the result exactly once, or the call raises an `ExpertdError`.
    """

    def __init__(self, servers: Sequence[str], config: CoordinatorConfig | None = None) -> None:
        """`servers` are `host:port` addresses that together own every expert."""
        if not servers:
            raise ValueError("servers is empty; give at least one host:port")
        self.config = config or CoordinatorConfig()
        self._addresses = tuple(servers)
        self._transports: tuple[Transport, ...] = ()
        self._shards: tuple[ShardInfo, ...] = ()
        self._ownership: Ownership | None = None
        self._request_ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        """Connect. Raises `Unavailable`, `ModelMismatch`, or `UnknownExpert` naming the experts without an owner."""
        channels, security = self.config.channels, self.config.security
        self._transports = tuple(GrpcTransport(address, channels, security) for address in self._addresses)
        try:
            found = (transport.get_shard(self.config.connect_timeout) for transport in self._transports)
            self._shards = tuple(await asyncio.gather(*found))
            self._ownership = resolve_ownership(self._addresses, self._shards)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self._transports))
        self._transports = ()
        self._ownership = None

    def __repr__(self) -> str:
        state = "connected" if self._ownership else "not connected"
        return f"Coordinator({list(self._addresses)}, {state})"

    @property
    def model(self) -> MoeConfig:
        """The model that the servers hold."""
        return self._connected().config

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that can be called."""
        return self._connected().layers

    @property
    def backends(self) -> frozenset[str]:
        """Compute backends of the servers."""
        return frozenset(shard.backend for shard in self._shards)

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
        """Compute the routed experts of `layer` for `hidden` [..., H], a float tensor.

        Routing comes from `topk_ids` [..., k] (global ids, any integer dtype, -1 for no expert) with `topk_weights`
        [..., k], or from `router_logits` [..., E] with the layer's gate for its bias, or from the gate alone.
        Raises `InvalidBatch` for unusable arguments, or what the servers answered.
        """
        ownership = self._connected()
        owner = ownership.of_layer(layer)
        tokens = as_tokens("hidden", hidden, self.model.hidden_size)
        ids, weights = self._route(layer, tokens, router_logits, topk_ids, topk_weights)
        sent, scales = self._quantize(tokens)
        chunk = self.config.chunk_tokens(self.model.hidden_size)
        limits = [min(chunk, shard.max_tokens_per_request) for shard in self._shards]
        dispatches = [
            part for dispatch in plan_dispatch(ids, weights, owner) for part in dispatch.split(limits[dispatch.server])
        ]
        answers = await _all_or_error([self._send(layer, sent, scales, dispatch) for dispatch in dispatches])
        parts = [(dispatch, result) for dispatch, (result, _) in zip(dispatches, answers, strict=True)]
        sums = combine(len(tokens), tokens.shape[1], parts)
        reports = self._report(dispatches, answers)
        return MoeResult(sums.to(self.config.output_dtype).reshape(hidden.shape), reports)

    async def _send(
        self, layer: int, hidden: Tensor, scales: Tensor | None, dispatch: Dispatch
    ) -> tuple[ExecuteResult, float]:
        """One server's part: the checked result and the seconds that it took."""
        shard, transport = self._shards[dispatch.server], self._transports[dispatch.server]
        call = ExecuteCall(
            request_id=next(self._request_ids),
            model_fingerprint=shard.model_fingerprint,
            placement_epoch=shard.placement_epoch,
            layer=layer,
            hidden=hidden[dispatch.tokens],
            scales=None if scales is None else scales[dispatch.tokens],
            expert_ids=dispatch.expert_ids,
            weights=dispatch.weights,
            reply_dtype=self.config.reply_dtype,
            timeout=self.config.call_timeout,
        )
        started = time.perf_counter()
        result = await transport.execute(call)
        seconds = time.perf_counter() - started
        check_receipt(dispatch, result.receipt, transport.address)
        return result, seconds

    def _connected(self) -> Ownership:
        if self._ownership is None:
            raise RuntimeError("the coordinator is not connected; use it in 'async with Coordinator(...) as moe:'")
        return self._ownership

    def _route(
        self, layer: int, tokens: Tensor, logits: Tensor | None, ids: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ids [T, k] int32 and weights [T, k] float32 from whatever the caller gave."""
        model = self.model
        if ids is not None or weights is not None:
            if ids is None or weights is None or logits is not None:
                raise InvalidBatch("give topk_ids and topk_weights together, and no router_logits with them")
            ids, weights = as_rows("topk_ids", ids, len(tokens)), as_rows("topk_weights", weights, len(tokens))
            check_choice(ids, weights, model)
            return ids.to(torch.int32), weights.float()
        gate = self.config.gates.get(layer)
        if gate is None:
            raise InvalidBatch(
                f"layer {layer} has no gate; give gates in CoordinatorConfig, or topk_ids and topk_weights"
            )
        if logits is None:
            logits = router_logits(tokens, gate.weight)
        logits = as_tokens("router_logits", logits, model.n_routed_experts)
        if len(logits) != len(tokens):
            raise InvalidBatch(f"router_logits has {len(logits)} rows; hidden has {len(tokens)} tokens")
        if not logits.isfinite().all():
            raise InvalidBatch("router_logits holds NaN or infinity; they must be finite")
        return route(logits, gate.correction_bias, model)

    def _quantize(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.hidden_dtype == torch.bfloat16:
            return tokens.to(torch.bfloat16), None
        return quantize_activations(tokens)

    def _report(
        self, dispatches: Sequence[Dispatch], answers: Sequence[tuple[ExecuteResult, float]]
    ) -> tuple[ServerReport, ...]:
        reports = []
        for server in sorted({dispatch.server for dispatch in dispatches}):
            mine = [(d, *answer) for d, answer in zip(dispatches, answers, strict=True) if d.server == server]
            reports.append(
                ServerReport(
                    address=self._addresses[server],
                    tokens=sum(len(dispatch.tokens) for dispatch, _, _ in mine),
                    pairs=sum(sum(result.receipt.values()) for _, result, _ in mine),
                    round_trip=max(seconds for _, _, seconds in mine),
                    timings=max((result.timings for _, result, _ in mine), key=lambda timings: timings.total),
                )
            )
        return tuple(reports)


async def _all_or_error(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """All results, in order; or the first error, with the other calls cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
