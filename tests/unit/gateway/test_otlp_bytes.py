"""Spans as OTLP's bytes, held against what OpenTelemetry's own encoder makes of them."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as reference
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway.telemetry.otlp_bytes import encode_spans

LETTERS = some.characters(exclude_categories=["Cs"])
TEXT = some.text(LETTERS, max_size=8) | some.just("long " * 60)
NUMBER = some.integers(-(2**63), 2**63 - 1)
ONE = TEXT | some.booleans() | NUMBER | some.floats(allow_nan=False)
VALUE = ONE | some.binary(max_size=8) | some.lists(ONE, max_size=2).map(tuple)
ATTRIBUTES = some.dictionaries(TEXT, VALUE, max_size=2)
STATE = TraceState([("vendor", "one"), ("other", "two")])
CONTEXT = some.builds(
    SpanContext,
    some.integers(1, 2**128 - 1),
    some.integers(1, 2**64 - 1),
    some.booleans(),
    some.just(TraceFlags(1)),
    some.sampled_from([TraceState(), STATE]),
)
STATUS = some.sampled_from([Status(), Status(StatusCode.OK), Status(StatusCode.ERROR), Status(StatusCode.ERROR, "bad")])
TIME_NS = some.integers(0, 2**63 - 1)
RESOURCES = [Resource({"service.name": "tailor-gateway"}, "https://a.test/schema"), Resource({"n": 1})]
SCOPES = [InstrumentationScope("tailor"), InstrumentationScope("other", "1.2"), None]


@some.composite
def spans(draw: some.DrawFn) -> list[ReadableSpan]:
    """In the order of their resources and scopes, as one provider's tracer makes them."""
    places = [(resource, scope) for resource in RESOURCES for scope in SCOPES for _ in range(2)]
    chosen = draw(some.sets(some.integers(0, len(places) - 1), max_size=4))
    return [_span(draw, *places[number]) for number in sorted(chosen)]


def _span(draw: some.DrawFn, resource: Resource, scope: InstrumentationScope | None) -> ReadableSpan:
    more: dict[str, Any] = {"parent": draw(some.none() | CONTEXT), "status": draw(STATUS)}
    return ReadableSpan(
        draw(TEXT),
        draw(CONTEXT),
        resource=resource,
        attributes=draw(ATTRIBUTES),
        kind=draw(some.sampled_from(SpanKind)),
        instrumentation_scope=scope,
        start_time=draw(TIME_NS),
        end_time=draw(TIME_NS),
        **more,
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(spans())
def test_a_collector_reads_what_opentelemetrys_encoder_would_have_sent(made: list[ReadableSpan]) -> None:
    """Every field of every span, whatever it holds."""
    assert ExportTraceServiceRequest.FromString(encode_spans(made)) == reference(made)
