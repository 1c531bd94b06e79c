"""How gRPC is to serve callers, and what of their messages is not read."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertd.kernels.model.config import MoeConfig
from expertd.proto import codec
from expertd.server.options.config import InvalidOption, ServerConfig

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details: TypeAlias = grpc.HandlerCallDetails
Next: TypeAlias = "Callable[[Details], Awaitable[Handler | None]]"
Read: TypeAlias = Callable[[bytes, Context], Awaitable[Any]]
MOST_BYTES = 64 * 1024
"""Of a request without tensors."""
WITH_TENSORS = (f"/{codec.SERVICE}/Execute", f"/{codec.SERVICE}/ExecuteStream")
"""Their parser has bounds of its own."""

WINDOW_BYTES = 1 << 20
"""Received by gRPC ahead of the handlers, for each stream; a message that is waited for may be larger."""

HANDSHAKE_MS = 5_000
"""For TLS, and for HTTP/2's first words."""
IDLE_MS = 60_000
"""Without a call or stream; whoever watches health has one. Clients connect anew when they need to."""
MAX_INT = 2**31 - 1
"""Of gRPC's options, and bytes of a message."""


def check_largest_request(config: ServerConfig, model: MoeConfig) -> None:
    """Raise `InvalidOption` where no message could carry the largest request or its answer, or no queue hold it."""
    tokens, width, top_k = config.max_tokens_per_request, model.hidden_size, model.num_experts_per_tok
    largest = codec.message_bytes(tokens, width, top_k)
    if largest > MAX_INT:
        raise InvalidOption(
            f"--max-tokens-per-request is {tokens}: with the model's hidden size of {width} messages would have up to"
            f" {largest} bytes; at most {MAX_INT} can be sent"
        )
    tensors = codec.tensor_bytes(tokens, width, top_k)
    if tensors > config.max_queued_bytes:
        raise InvalidOption(
            f"--max-queued-bytes is {config.max_queued_bytes}; it must be at least {tensors}, what a request of"
            f" --max-tokens-per-request {tokens} has with the model's hidden size of {width}"
        )


def server_options(config: ServerConfig, max_message_bytes: int) -> list[tuple[str, int]]:
    """Options of a server's `grpc.aio.server`."""
    return [
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A few KiB that were compressed can be as many MiB.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Of what nobody has read yet, each stream may send so much; gRPC's own estimate allows 16 MiB and more.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Clients find out in seconds that a server is cut off; a ping costs nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        # Who connects and says nothing, or asks for nothing, gives up the place to others.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        # With it a second server on the same port would silently share its calls.
        ("grpc.so_reuseport", 0),
    ]


class SmallMessages(grpc.aio.ServerInterceptor):
    """Refuses requests that are too long for their parser, and those that it cannot read."""

    async def intercept_service(self, continuation: Next, handler_call_details: Details) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method in WITH_TENSORS:
            return handler
        read = partial(_read, handler.request_deserializer or bytes)
        behaviors = {
            "unary_unary": handler.unary_unary and _of_one(handler.unary_unary, read),
            "unary_stream": handler.unary_stream and _of_one(handler.unary_stream, read),
            "stream_stream": handler.stream_stream and _of_many(handler.stream_stream, read),
        }
        return handler._replace(request_deserializer=None, **behaviors)  # type: ignore[attr-defined, no-any-return]


async def _read(parse: Callable[[bytes], Any], data: bytes, context: Context) -> Any:  # noqa: ANN401
    text = f"the request has {len(data)} bytes; at most {MOST_BYTES} are read"
    if len(data) <= MOST_BYTES:
        try:
            return parse(data)
        except DecodeError as error:
            text = f"the {len(data)} bytes received cannot be read: {error}"
    # Here and below: gRPC keeps the frames of what aborts a call until garbage is collected.
    del data
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    return None


def _of_one(behavior: Callable[..., Any], read: Read) -> Callable[..., Any]:
    async def call(data: bytes, context: Context) -> Any:  # noqa: ANN401
        reading = read(data, context)
        del data
        return await behavior(await reading, context)

    return call


def _of_many(behavior: Callable[..., Any], read: Read) -> Callable[..., Any]:
    async def requests_of(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async for data in messages:
            reading = read(data, context)
            del data
            yield await reading

    async def generate(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        async for response in behavior(requests_of(messages, context), context):
            yield response

    async def call(messages: AsyncIterator[bytes], context: Context) -> Any:  # noqa: ANN401
        return await behavior(requests_of(messages, context), context)

    return generate if inspect.isasyncgenfunction(behavior) else call
