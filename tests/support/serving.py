"""Building blocks of tests: servers in this process, batches, weights."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from expertd.kernels.numerics.backend import LayerWeights, TokenBatch, Underway
from expertd.kernels.numerics.quantize import dequantize_weights, quantize_activations, quantize_weights
from expertd.kernels.weights.experts import ExpertMatrices
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.codec import ExecuteCall, ShardInfo
from expertd.server.app import Server
from expertd.server.assembly import assemble
from expertd.server.options.config import Address, ServerConfig
from expertd.server.rpc.incoming import Call, Incoming
from expertd.server.telemetry.metrics import Metrics
from tests.support.model.requests import parse_request

D = TypeVar("D")
ANY_PORT = Address("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def running_server(model: Path, experts: range, **options: Any) -> AsyncIterator[Server]:  # noqa: ANN401
    """A server in this process, ready to be called; drained at the end."""
    parts = {name: options.pop(name) for name in ("tracer", "choose", "open_gpu") if name in options}
    defaults: dict[str, Any] = {"listen": ANY_PORT, "metrics": ANY_PORT, "backend": "torch"}
    config = ServerConfig(model=model, experts=tuple(experts), **(defaults | options))
    server = assemble(config, Metrics(CollectorRegistry()), **parts)
    running = asyncio.create_task(server.run())
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
    try:
        if running.done():
            running.result()
        yield server
    finally:
        ready.cancel()
        server.stop()
        await running


class Gate:
    """Keeps what has reached a server's device from being computed until it is opened."""

    def __init__(self, server: Server) -> None:
        self.reached: list[int] = []
        """The layer of every request."""
        self._opened = threading.Event()
        submit = server.device.submit

        def wait_then_submit(layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> Underway:
            self.reached += [layer] * len(requests)
            assert self._opened.wait(30)
            return submit(layer, requests, reply_dtype)

        server.device.submit = wait_then_submit

    def open(self) -> None:
        self._opened.set()


class Answers:
    """Stands before a server's engine: `answer` says what a request gets, or raises its error."""

    def __init__(self, server: Server, answer: Callable[[Incoming], Awaitable[bytes]]) -> None:
        self._answer = answer
        self._executor = server.executor
        self._submit = server.executor.submit
        server.executor.submit = self.submit  # type: ignore[method-assign]

    def submit(self, incoming: Incoming) -> Call:
        request = parse_request(incoming.message)
        if request.cancels is not None:
            return self._submit(incoming)
        answer = asyncio.ensure_future(self._answer(incoming))
        return Call(request.request_id, None, answer, answer.cancel)

    def leave(self) -> None:
        self._executor.submit = self._submit  # type: ignore[method-assign]

    async def real(self, incoming: Incoming) -> bytes:
        """What the server answers by itself."""
        return await self._submit(incoming).answer


def door(server: Server, kind: type[D]) -> D:
    """The one of a server's doors that is of this kind."""
    (found,) = (door for door in server.doors if isinstance(door, kind))
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def count_of(server: Server, outcome: str) -> float:
    """Requests with this outcome."""
    return server.metrics.registry.get_sample_value("expertd_requests_total", {"outcome": outcome}) or 0.0


def shadow_checks(server: Server, outcome: str) -> float:
    """Shadow checks with this outcome, of a server that makes any."""
    value = server.metrics.registry.get_sample_value("expertd_shadow_checks_total", {"outcome": outcome})
    assert value is not None
    return value


@contextlib.asynccontextmanager
async def open_channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(str(server.address), options) as channel:
        yield channel


def execute_method(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401
    """The unary call with the generated classes, as another implementation of the contract would make it."""
    return channel.unary_unary(
        f"/{codec.SERVICE}/Execute", pb.ExecuteRequest.SerializeToString, pb.ExecuteResponse.FromString
    )


def stream_method(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401
    """The stream with the generated classes."""
    return channel.stream_stream(
        f"/{codec.SERVICE}/ExecuteStream", pb.ExecuteRequest.SerializeToString, pb.ExecuteResponse.FromString
    )


def random_weights(experts: int, hidden: int, inner: int, seed: int = 0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        # Columns of very different size, so that a scale taken from another block shows.
        size = torch.logspace(-1, 1, columns) * columns**-0.5
        return quantize_weights(torch.randn(experts, rows, columns, generator=generator) * size)

    return LayerWeights(*matrix(2 * inner, hidden), *matrix(hidden, inner))


def matrices_of(weights: LayerWeights, local: int) -> ExpertMatrices:
    """One expert of a layer as plain numbers."""
    up, gate = dequantize_weights(weights.up_gate[local], weights.up_gate_scales[local]).chunk(2)
    return ExpertMatrices(up, gate, dequantize_weights(weights.down[local], weights.down_scales[local]))


def random_batch(tokens: int, hidden: int, experts: int, top_k: int, seed: int = 0, absent: float = 0.3) -> TokenBatch:
    """Each token with `top_k` distinct experts, a share `absent` of them elsewhere (-1); not all, if less than 1."""
    generator = torch.Generator().manual_seed(seed)
    values, scales = quantize_activations(torch.randn(tokens, hidden, generator=generator))
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    ids = chosen.masked_fill(torch.rand(tokens, top_k, generator=generator) < absent, -1)
    if absent < 1 and not (ids >= 0).any():
        ids[0, 0] = chosen[0, 0]
    return TokenBatch(values, scales, ids, torch.rand(tokens, top_k, generator=generator) + 0.1)


def request_for(server: Server | ShardInfo, batch: TokenBatch, **changes: Any) -> pb.ExecuteRequest:  # noqa: ANN401
    """The message of `call_for`, in the generated class."""
    return pb.ExecuteRequest.FromString(codec.encode_call(call_for(server, batch, **changes)))


def call_for(server: Server | ShardInfo, batch: TokenBatch, **changes: Any) -> ExecuteCall:  # noqa: ANN401
    """A call that `server`, or the one that said this of itself, accepts, for `batch` with global expert ids."""
    shard = server.info if isinstance(server, Server) else server
    fields: dict[str, Any] = {
        "model_fingerprint": shard.model_fingerprint,
        "placement_epoch": shard.placement_epoch,
        "layer": shard.layers[0],
    }
    return call_of(batch, **(fields | changes))


def call_of(batch: TokenBatch, **changes: Any) -> ExecuteCall:  # noqa: ANN401
    """A call for `batch` of layer 1 of "model", under any placement, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "request_id": 7,
        "model_fingerprint": "model",
        "placement_epoch": None,
        "layer": 1,
        "hidden": batch.hidden,
        "scales": batch.scales,
        "expert_ids": batch.expert_ids,
        "weights": batch.weights,
        "reply_dtype": torch.float32,
    }
    return ExecuteCall(**(fields | changes))


def forked_processes(count: int) -> ProcessPoolExecutor:
    """Processes that leave alone what they inherit: gRPC objects of earlier tests cannot be finalised there."""
    gc.collect()
    return ProcessPoolExecutor(count, initializer=gc.freeze)
