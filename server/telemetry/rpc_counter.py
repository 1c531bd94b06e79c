"""Counting RPCs by method and status, refusals of other interceptors included."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from prometheus_client import Counter

from expertd.server.telemetry.metrics import Metrics

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details: TypeAlias = grpc.HandlerCallDetails
Next: TypeAlias = "Callable[[Details], Awaitable[Handler | None]]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
ByCode: TypeAlias = Callable[[str], Counter]
WORDS = {(0, 0): "unary", (1, 0): "client_stream", (0, 1): "server_stream", (1, 1): "bidi_stream"}
"""Of the gRPC libraries' own metrics, by whether there are many requests and many responses."""
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class RpcCounter(grpc.aio.ServerInterceptor):
    """The outermost interceptor. Only methods of `services` count: callers must not be able to make up series."""

    def __init__(self, metrics: Metrics, services: Sequence[str]) -> None:
        """`services` are full names of services whose descriptors are loaded."""
        self._counters: dict[str, ByCode] = {}
        for name in services:
            for method in descriptor_pool.Default().FindServiceByName(name).methods:
                kind = WORDS[method.client_streaming, method.server_streaming]
                by_code = partial(metrics.rpcs.labels, kind, name, method.name)
                self._counters[f"/{name}/{method.name}"] = by_code
                by_code("OK")

    async def intercept_service(self, continuation: Next, handler_call_details: Details) -> Handler | None:
        handler = await continuation(handler_call_details)
        by_code = self._counters.get(handler_call_details.method)
        if handler is None or by_code is None:
            return handler
        counted = {
            kind: _counted(behavior, by_code) for kind in KINDS if (behavior := getattr(handler, kind)) is not None
        }
        return handler._replace(**counted)  # type: ignore[attr-defined, no-any-return]


def _counted(behavior: Callable[..., Any], by_code: ByCode) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behavior):

        async def generate(request: object, context: Context) -> AsyncIterator[object]:
            with _counting(context, by_code):
                async for response in behavior(request, context):
                    yield response

        return generate

    async def call(request: object, context: Context) -> object:
        with _counting(context, by_code):
            answer = behavior(request, context)
            # gRPC keeps the frames of what aborts a call until garbage is collected.
            del request
            return await answer

    return call


@contextlib.contextmanager
def _counting(context: Context, by_code: ByCode) -> Iterator[None]:
    code = grpc.StatusCode.CANCELLED
    try:
        yield
        code = _code(context) or grpc.StatusCode.OK
    except grpc.aio.AbortError:
        code = _code(context) or grpc.StatusCode.UNKNOWN
        raise
    except Exception:
        code = grpc.StatusCode.UNKNOWN
        raise
    finally:
        by_code(code.name).inc()


def _code(context: Context) -> grpc.StatusCode | None:
    """The status that was set; gRPC keeps it as a number."""
    number = context.code()
    return next((code for code in grpc.StatusCode if number in (code, code.value[0])), None)
