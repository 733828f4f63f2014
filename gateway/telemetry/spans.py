"""Spans of requests that are over, through the OpenTelemetry SDK; imported only where traces are exported.

A span is made with its start and end at once, so that nothing is open while a request runs. The SDK's batch processor
holds 2,048 of them (`OTEL_BSP_MAX_QUEUE_SIZE`) and drops what is more: a collector that is away costs no memory and
makes no request wait.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from gateway.telemetry import names
from gateway.telemetry.observation import NOT_LOADED, Observation
from gateway.telemetry.otlp import Exporter
from gateway.telemetry.tracing import Trace, random_id

SERVICE: Final = "tailor-gateway"
Attributes = Mapping[str, str | int | float | bool]


class Spans:
    """Makes the spans of traced requests and has them sent by a thread.

    `base_model` is what a request for no adapter names as its model; for one with an adapter it is the adapter's id.

    Raises:
        ConfigurationError: a variable of the exporter does not say what it should.
    """

    def __init__(self, base_model: str, environ: Mapping[str, str]) -> None:
        self._base_model = base_model
        self._exporter = Exporter(environ)
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what comes here has been chosen before
            resource=_resource(),
            id_generator=self._ids,
            shutdown_on_exit=False,  # it would wait for a collector that is away
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(names.SCOPE)

    def record(self, trace: Trace, seen: Observation) -> None:
        """The gateway's span, and below it queue, load and upstream, where the request came so far."""
        wall = time.time() - time.monotonic()
        gateway = self._span(
            f"POST {seen.route}",
            SpanKind.SERVER,
            _caller(trace),
            trace.span_id,
            (wall + seen.began, wall + seen.ended),
            _of_gateway(seen),
            trace_id=trace.trace_id,
            failed=seen.status >= 500,
        )
        inside = set_span_in_context(NonRecordingSpan(gateway), Context())
        began = wall + seen.placing_at
        placed = began + seen.queue_s
        if seen.queue_s:
            self._span(names.QUEUE_SPAN, SpanKind.INTERNAL, inside, random_id(), (began, placed), {})
        if seen.load_s:
            loaded = (placed, placed + seen.load_s)
            self._span(
                names.LOAD_SPAN,
                SpanKind.INTERNAL,
                inside,
                random_id(),
                loaded,
                _of_load(seen),
                failed=not seen.tier and seen.status >= 500,
            )
        if seen.sent_at:
            model = seen.adapter_id or self._base_model
            self._span(
                f"{_operation(seen)} {model}",
                SpanKind.CLIENT,
                inside,
                trace.upstream_id,
                (wall + seen.sent_at, wall + seen.ended),
                _of_upstream(seen, model),
                failed=seen.status >= 500,
            )

    async def close(self, patience_s: float) -> None:
        """Send what waits, and give it up after this time."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True, name="tailor-last-spans")
        last.start()
        await asyncio.to_thread(last.join, patience_s)
        self._exporter.shutdown()

    def _span(
        self,
        name: str,
        kind: SpanKind,
        parent: Context,
        span_id: int,
        times_s: tuple[float, float],
        attributes: Attributes,
        *,
        trace_id: int = 0,
        failed: bool = False,
    ) -> SpanContext:
        begin_ns, end_ns = (int(moment * 1e9) for moment in times_s)
        self._ids.give(trace_id, span_id)
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=begin_ns)
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)
        return span.get_span_context()


class _GivenIds(IdGenerator):
    """Gives the next span the ids that were chosen for it: the engine was told of them before there was a span."""

    def __init__(self) -> None:
        self._trace_id = self._span_id = 0

    def give(self, trace_id: int, span_id: int) -> None:
        self._trace_id, self._span_id = trace_id, span_id

    def generate_trace_id(self) -> int:
        return self._trace_id

    def generate_span_id(self) -> int:
        return self._span_id


def _resource() -> Resource:
    """What the environment says the process is; our name where it says none."""
    found = Resource.create()
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: SERVICE}))
    return found


def _caller(trace: Trace) -> Context:
    if trace.parent_id is None:
        return Context()
    caller = SpanContext(trace.trace_id, trace.parent_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _operation(seen: Observation) -> str:
    return names.OPERATIONS.get(seen.route, names.CHAT)


def _of_gateway(seen: Observation) -> Attributes:
    attributes: dict[str, str | int | float | bool] = {
        names.HTTP_METHOD: "POST",
        names.HTTP_ROUTE: seen.route,
        names.HTTP_STATUS: seen.status,
        names.REQUEST_ID: seen.request_id,
    }
    if seen.status >= 500:
        attributes[names.ERROR_TYPE] = str(seen.status)
    if seen.tenant_id:
        attributes[names.TENANT_ID] = seen.tenant_id
    if seen.adapter_id:
        attributes |= {names.ADAPTER_ID: seen.adapter_id, names.ADAPTER_VERSION: seen.version}
    if seen.tier:
        attributes |= {names.ADAPTER_TIER: seen.tier, names.REPLICA_ID: seen.replica}
    return attributes


def _of_load(seen: Observation) -> Attributes:
    attributes = {names.ADAPTER_ID: seen.adapter_id, names.ADAPTER_TIER: seen.tier or NOT_LOADED}
    return {**attributes, names.REPLICA_ID: seen.replica} if seen.replica else attributes


def _of_upstream(seen: Observation, model: str) -> Attributes:
    attributes: dict[str, str | int | float | bool] = {
        names.GEN_AI_OPERATION: _operation(seen),
        names.GEN_AI_PROVIDER: names.PROVIDER,
        names.GEN_AI_REQUEST_MODEL: model,
        names.GEN_AI_REQUEST_STREAM: seen.streamed,
        names.GEN_AI_INPUT_TOKENS: seen.prompt_tokens,
        names.GEN_AI_OUTPUT_TOKENS: seen.completion_tokens,
        names.GEN_AI_CACHED_TOKENS: seen.cached_tokens,
        names.REPLICA_ID: seen.replica,
    }
    if seen.first_at:
        attributes[names.GEN_AI_FIRST_CHUNK] = seen.first_at - seen.sent_at
    if seen.status >= 500:
        attributes[names.ERROR_TYPE] = str(seen.status)
    return attributes
