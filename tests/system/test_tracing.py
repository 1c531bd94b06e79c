"""Spans from a coordinator's call to the stages of the servers; none where nobody traces."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from expertd.client.coordinator import Coordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.proto.base.errors import Unavailable
from expertd.server.rpc.incoming import Incoming
from expertd.server.telemetry.metrics import STAGES
from expertd.server.telemetry.tracing import RequestTracer
from tests.support.coordinators import EXACT, LAYER, call, routing, tokens
from tests.support.fleets import addresses
from tests.support.model.requests import parse_request
from tests.support.serving import Answers, execute_method, open_channel, random_batch, request_for, running_server

HALVES = (range(8), range(8, 16))
OVER_GRPC = replace(EXACT, shared_memory_bytes=0)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)


@dataclass(frozen=True)
class Recorder:
    """OpenTelemetry in this process."""

    provider: TracerProvider
    exporter: InMemorySpanExporter

    @property
    def tracer(self) -> Tracer:
        return self.provider.get_tracer("test")

    @property
    def servers(self) -> RequestTracer:
        return RequestTracer(self.provider)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Recorder(provider, exporter)
    provider.shutdown()


async def test_a_call_its_attempts_and_their_stages_are_one_trace(small_model: Path, recorder: Recorder) -> None:
    async with (
        running_server(small_model, HALVES[0], tracer=recorder.servers) as first,
        running_server(small_model, HALVES[1], tracer=recorder.servers) as second,
        Coordinator(addresses([first, second]), replace(EXACT, tracer=recorder.tracer)) as moe,
    ):
        ids, weights = routing(20)
        result = await moe.execute(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)
    pairs = {report.address: report.pairs for report in result.servers}
    (root,) = recorder.spans("expertd.call")
    attempts, requests = recorder.spans("expertd.attempt"), recorder.spans("expertd.request")
    assert root.parent is None
    assert {dict(span.attributes or {})["server.address"] for span in attempts} == pairs.keys()
    assert [span.kind for span in (*attempts, *requests)] == [SpanKind.CLIENT] * 2 + [SpanKind.SERVER] * 2
    assert {_parent(span) for span in attempts} == {_id(root)}
    assert {_parent(span) for span in requests} == {_id(span) for span in attempts}
    for request in requests:
        stages = [
            span
            for stage in STAGES[:-1]
            for span in recorder.spans(f"expertd.{stage}")
            if _parent(span) == _id(request)
        ]
        assert [span.name for span in stages] == [f"expertd.{stage}" for stage in STAGES[:-1]]
        assert _start(stages[0]) == _start(request)
        assert all(_end(before) == _start(after) for before, after in itertools.pairwise(stages))
        assert _end(stages[-1]) <= _end(request)
        attributes = dict(request.attributes or {})
        assert (attributes["layer"], attributes["outcome"]) == (1, "ok")
    assert {dict(span.attributes or {})["pairs"] for span in requests} == set(pairs.values())
    traces = {span.context.trace_id for span in recorder.exporter.get_finished_spans() if span.context}
    assert len(traces) == 1


async def test_a_failed_attempt_and_a_refused_request_say_so(small_model: Path, recorder: Recorder) -> None:
    async with (
        running_server(small_model, range(16), tracer=recorder.servers) as server,
        Coordinator(addresses([server]), replace(EXACT, tracer=recorder.tracer, max_attempts=1)) as moe,
    ):
        server.engine.close("the server is draining; use another replica")
        with pytest.raises(Unavailable):
            await call(moe)
    for name in ("expertd.call", "expertd.attempt", "expertd.request"):
        (span,) = recorder.spans(name)
        assert span.status.status_code == StatusCode.ERROR
        assert "the server is draining" in str(span.status.description)


async def test_unary_calls_carry_the_context_in_their_metadata_and_nonsense_is_none(
    small_model: Path, recorder: Recorder
) -> None:
    async with (
        running_server(small_model, range(16), tracer=recorder.servers) as server,
        open_channel(server) as channel,
    ):
        request = request_for(server, random_batch(3, 256, 16, 4))
        for metadata in (None, UNSAMPLED, (("traceparent", "nonsense"),)):
            await execute_method(channel)(request, metadata=metadata)
        request.traceparent = "\u00ff" * 1000
        await execute_method(channel)(request)
        request.traceparent = ""
        await execute_method(channel)(request, metadata=TRACED)
    (span,) = recorder.spans("expertd.request")
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{_parent(span):016x}") == (TRACE, PARENT)


async def test_what_is_not_sampled_is_not_sent_along(small_model: Path, recorder: Recorder) -> None:
    off = TracerProvider(sampler=ALWAYS_OFF)
    seen: list[str] = []
    async with (
        running_server(small_model, range(16), tracer=recorder.servers) as server,
        Coordinator(addresses([server]), replace(OVER_GRPC, tracer=off.get_tracer("off"))) as unsampled,
        Coordinator(addresses([server]), OVER_GRPC) as untraced,
    ):

        async def watch(incoming: Incoming) -> bytes:
            seen.append(incoming.traceparent + str(parse_request(incoming.message).traceparent, "ascii"))
            return await answers.real(incoming)

        answers = Answers(server, watch)
        await call(unsampled)
        await call(untraced)
    assert seen == ["", ""]
    assert recorder.exporter.get_finished_spans() == ()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: object) -> Message:  # noqa: ANN401, N802
        for resource in request.resource_spans:
            self.services |= {
                pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"
            }
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_server_process_sends_its_spans_to_a_collector(small_model: Path, recorder: Recorder) -> None:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = ["--backend", "torch", "--trace-endpoint", f"http://127.0.0.1:{port}"]
    async with (
        LocalCluster(small_model, ["0-15"], options) as cluster,
        Coordinator(cluster.addresses, replace(EXACT, tracer=recorder.tracer)) as moe,
    ):
        await call(moe)
    assert cluster.exit_codes == [0]
    assert sorted(collector.names) == sorted(["expertd.request", *(f"expertd.{stage}" for stage in STAGES[:-1])])
    assert collector.services == {"expertd"}
    await server.stop(None)


async def test_a_collector_out_of_reach_changes_nothing(small_model: Path, recorder: Recorder) -> None:
    options = ["--backend", "torch", "--trace-endpoint", "http://127.0.0.1:1"]
    async with (
        LocalCluster(small_model, ["0-15"], options) as cluster,
        Coordinator(cluster.addresses, replace(EXACT, tracer=recorder.tracer)) as moe,
    ):
        await asyncio.gather(*(call(moe, seed) for seed in range(5)))
    assert cluster.exit_codes == [0]


def _id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def _parent(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def _start(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return span.start_time


def _end(span: ReadableSpan) -> int:
    assert span.end_time is not None
    return span.end_time
