"""What the collector gets of a request."""

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from expertd.server.telemetry.journal import Journal
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.tracing import RequestTracer
from tests.support.native.hand_turned import HandTurned, message


@pytest.mark.parametrize(
    ("request_id", "told"), [(2**63 - 1, 2**63 - 1), (2**63, str(2**63)), (2**64 - 1, str(2**64 - 1))]
)
def test_every_request_id_reaches_the_collector(
    request_id: int, told: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    turned = HandTurned()
    journal = Journal(Metrics(CollectorRegistry()), turned.tally, ExpertLoads((1, 2), 4), RequestTracer(provider))
    turned.answer(message(request_id), traceparent=f"00-{'ab' * 16}-{'12' * 8}-01")
    journal.read()
    spans = encode_spans(exporter.get_finished_spans()).resource_spans[0].scope_spans[0].spans
    (request,) = (span for span in spans if span.name == "expertd.request")
    attributes = {one.key: one.value for one in request.attributes}
    assert (attributes["request_id"].int_value or attributes["request_id"].string_value) == told
    assert caplog.text == ""
