"""Spans as the bytes that OTLP sends: protobuf's wire format of the few messages that a span needs.

The generated classes of `opentelemetry-proto` write the same, by way of protobuf's runtime, which is 2.4 MiB of every
worker; a test holds one against the other. The gateway's spans have neither events nor links: those are not written.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from struct import Struct
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_DOUBLE: Final = Struct("<d")
_WORD: Final = 1 << 64
_KINDS: Final = {
    SpanKind.INTERNAL: 1,
    SpanKind.SERVER: 2,
    SpanKind.CLIENT: 3,
    SpanKind.PRODUCER: 4,
    SpanKind.CONSUMER: 5,
}
_KNOWS_IF_REMOTE: Final = 0x100  # bits of a span's flags
_IS_REMOTE: Final = 0x200


def encode_spans(spans: Sequence[ReadableSpan]) -> bytes:
    """An `ExportTraceServiceRequest` of these spans, which are in their scopes' and resources' order."""
    return b"".join(
        _message(1, _message(1, _resource(resource)) + _scopes(list(of_resource)) + _text(3, resource.schema_url))
        for resource, of_resource in groupby(spans, lambda span: span.resource)
    )


def _scopes(spans: Sequence[ReadableSpan]) -> bytes:
    return b"".join(
        _message(2, _message(1, _scope(scope)) + b"".join(_message(2, _span(span)) for span in of_scope))
        for scope, of_scope in groupby(spans, lambda span: span.instrumentation_scope)
    )


def _resource(resource: Resource) -> bytes:
    return _attributes(1, resource.attributes)


def _scope(scope: InstrumentationScope | None) -> bytes:
    return b"" if scope is None else _text(1, scope.name) + _text(2, scope.version)


def _span(span: ReadableSpan) -> bytes:
    own: SpanContext = span.get_span_context()  # type: ignore[assignment]  # None in the SDK's type alone
    parent = span.parent
    flags = _KNOWS_IF_REMOTE | (_IS_REMOTE if parent is not None and parent.is_remote else 0)
    return b"".join(
        (
            _message(1, own.trace_id.to_bytes(16)),
            _message(2, own.span_id.to_bytes(8)),
            _text(3, ",".join(f"{key}={value}" for key, value in own.trace_state.items())),
            _message(4, parent.span_id.to_bytes(8)) if parent is not None else b"",
            _text(5, span.name),
            _number(6, _KINDS[span.kind]),
            _key(7, _FIXED64) + (span.start_time or 0).to_bytes(8, "little"),
            _key(8, _FIXED64) + (span.end_time or 0).to_bytes(8, "little"),
            _attributes(9, span.attributes or {}),
            _number(10, span.dropped_attributes),
            _message(15, _status(span.status)),
            _key(16, _FIXED32) + flags.to_bytes(4, "little"),
        )
    )


def _status(status: Status) -> bytes:
    return _text(2, status.description) + _number(3, status.status_code.value)


def _attributes(field: int, attributes: Mapping[str, object]) -> bytes:
    return b"".join(_message(field, _text(1, key) + _message(2, _value(each))) for key, each in attributes.items())


def _value(value: object) -> bytes:
    """An `AnyValue`: of a choice of fields the one that is there is written, whatever it holds."""
    match value:
        case bool():
            return _key(2, _VARINT) + _varint(value)
        case str():
            return _message(1, value.encode())
        case int():
            return _key(3, _VARINT) + _varint(value)
        case float():
            return _key(4, _FIXED64) + _DOUBLE.pack(value)
        case bytes():
            return _message(7, value)
        case Sequence():
            return _message(5, b"".join(_message(1, _value(each)) for each in value))
        case _:
            return b""  # the SDK lets nothing else in


def _text(field: int, text: str | None) -> bytes:
    return _message(field, text.encode()) if text else b""


def _number(field: int, number: int) -> bytes:
    return _key(field, _VARINT) + _varint(number) if number else b""


def _message(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    left = number % _WORD  # negative ones as two's complement
    written = bytearray()
    while left > 0x7F:
        written.append(left & 0x7F | 0x80)
        left >>= 7
    written.append(left)
    return bytes(written)
