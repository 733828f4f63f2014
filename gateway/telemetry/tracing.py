"""W3C trace context in and on, and the decision which requests are traced: before any object of an SDK exists.

A request that is not traced, 99 in 100 by default, costs about a microsecond here. A traced one carries four integers
(`Trace`) and becomes spans after its end, in `spans.py`, with which the OpenTelemetry SDK is imported: 4 MiB and
0.09 s that a gateway without an exporter never pays.
"""

import re
from binascii import hexlify
from collections.abc import Mapping
from dataclasses import dataclass
from random import getrandbits
from typing import TYPE_CHECKING, Final

from gateway.home import ConfigurationError
from gateway.telemetry.observation import Observation

if TYPE_CHECKING:
    from gateway.telemetry.spans import Spans

DEFAULT_RATIO: Final = 0.01
CLOSE_PATIENCE_S: Final = 5.0
_PARENT_BYTES: Final = 256
_PARENT_V0_BYTES: Final = 55
_PARENT: Final = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_ODD_DIGITS: Final = b"13579bdf"  # the last bit of the flags is "sampled"
_STATE_BYTES: Final = 512
_STATE_ENTRY: Final = rb"[a-z0-9][a-z0-9_*/@-]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{1,256}"
_STATE: Final = re.compile(_STATE_ENTRY + rb"(?:,[ \t]*" + _STATE_ENTRY + rb"){0,31}")
_RANGE: Final = 1 << 64
_RATIOS: Final = {"always_on": 1.0, "always_off": 0.0, "traceidratio": None}
_PARENT_BASED: Final = "parentbased_"


@dataclass(slots=True)
class Parent:
    """A caller's place in its own trace: `ids` is trace id, dash, span id in hexadecimal, as they came."""

    ids: bytes
    sampled: bool

    @property
    def trace_id(self) -> int:
        return int(self.ids[:32], 16)

    @property
    def span_id(self) -> int:
        return int(self.ids[33:], 16)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which requests are traced: a share of them, or where `parent_based`, what a trusted parent has decided."""

    ratio: float
    parent_based: bool


class Trace:
    """One traced request; its spans' ids are known from the start, the spans are made at its end.

    A request that only counts has no upstream span: what the engine does for it belongs to the gateway's own.
    """

    __slots__ = ("_spans", "parent_id", "span_id", "trace_id", "upstream_id")

    def __init__(self, spans: "Spans", trace_id: int, parent_id: int | None, *, counts: bool) -> None:
        self._spans = spans
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.span_id = random_id()
        self.upstream_id = self.span_id if counts else random_id()

    @property
    def id(self) -> str:
        """As log lines and other tools spell it."""
        return f"{self.trace_id:032x}"

    @property
    def header(self) -> bytes:
        """The line by which the engine's spans become children of this request's upstream span."""
        return b"traceparent: 00-%032x-%016x-01\r\n" % (self.trace_id, self.upstream_id)

    def finish(self, seen: Observation) -> None:
        """Make the request's spans; they are sent later, by a thread."""
        self._spans.record(self, seen)


class Tracing:
    """The decision for each request. `spans` is None where nothing is exported: then no request is traced here.

    A caller's valid context goes on to the engine all the same. `trust_parent`: with its own decision, not with ours.
    """

    def __init__(self, spans: "Spans | None", sampler: Sampler, *, trust_parent: bool) -> None:
        self._spans = spans
        self._bound = round(sampler.ratio * _RANGE)
        self._parent_based = sampler.parent_based
        self._trust_parent = trust_parent

    def begin(
        self, traceparent: bytes | None = None, tracestate: bytes | None = None, *, counts: bool = False
    ) -> tuple[Trace | None, bytes]:
        """The request's trace, None where it is not traced, and the header lines that tell the engine of it.

        The lines end in CRLF; there are none where the gateway has nothing to say. `counts`: nothing is generated.
        """
        parent = None if traceparent is None else parse(traceparent)
        if parent is not None:
            return self._go_on(parent, tracestate, counts=counts)
        if self._spans is None:
            return None, b""
        number = getrandbits(192)  # trace id and span id
        trace_id = number >> 64
        if trace_id % _RANGE >= self._bound:
            digits = hexlify(number.to_bytes(24, "big"))  # half the time that `%x` takes
            return None, b"traceparent: 00-%b-%b-00\r\n" % (digits[:32], digits[32:])
        trace = Trace(self._spans, trace_id or 1, None, counts=counts)
        return trace, trace.header

    async def close(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """Send the spans that wait, and give them up after this time: a collector that is away delays no stop."""
        if self._spans is not None:
            await self._spans.close(patience_s)

    def _go_on(self, parent: Parent, tracestate: bytes | None, *, counts: bool) -> tuple[Trace | None, bytes]:
        state = b""
        if self._trust_parent and tracestate is not None and _is_state(tracestate):
            state = b"tracestate: %b\r\n" % tracestate
        if self._spans is None:  # a trusted parent's own word, else ours: the engine may export
            return None, _passed_on(
                parent, sampled=parent.sampled if self._trust_parent else self._samples(parent)
            ) + state
        if not self._samples(parent):
            return None, _passed_on(parent, sampled=False) + state
        trace = Trace(self._spans, parent.trace_id, parent.span_id, counts=counts)
        return trace, trace.header + state

    def _samples(self, parent: Parent) -> bool:
        if not self._trust_parent:  # a stranger chooses flag and trace id alike: neither may choose what we pay for
            return getrandbits(64) < self._bound
        if self._parent_based:
            return parent.sampled
        return parent.trace_id % _RANGE < self._bound


def parse(traceparent: bytes) -> Parent | None:
    """What a `traceparent` header says; None where it breaks the W3C's rules in anything."""
    if len(traceparent) > _PARENT_BYTES:
        return None
    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    version = traceparent[:2]
    if version == b"ff" or (version == b"00" and len(traceparent) != _PARENT_V0_BYTES):  # a later one may say more
        return None
    return Parent(traceparent[3:52], traceparent[54] in _ODD_DIGITS)


def open_tracing(environ: Mapping[str, str], *, base_model: str, trust_parent: bool) -> Tracing:
    """Tracing as the standard `OTEL_*` variables want it; what SDK and exporter read is left to them.

    Who sets a sampler that goes by its parent has said that parents are trusted; the default one is not set by anybody.

    Raises:
        ConfigurationError: a variable asks for what this gateway does not do.
    """
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    sampler = _sampler(name or "parentbased_traceidratio", environ)
    trust_parent = trust_parent or name.startswith(_PARENT_BASED)
    if not _exports(environ):
        return Tracing(None, sampler, trust_parent=trust_parent)
    from gateway.telemetry.spans import Spans

    return Tracing(Spans(base_model, environ), sampler, trust_parent=trust_parent)


def _exports(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporter == "none" or not (exporter or endpoint):
        return False
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER={exporter}: the gateway exports by otlp, or not at all (none).")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ConfigurationError("The OTLP endpoint must begin with http:// or https://.")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: the gateway speaks http/protobuf only.")
    return True


def _sampler(name: str, environ: Mapping[str, str]) -> Sampler:
    kind = name.removeprefix(_PARENT_BASED)
    if kind not in _RATIOS:
        known = ", ".join([*_RATIOS, *(_PARENT_BASED + each for each in _RATIOS)])
        raise ConfigurationError(f"OTEL_TRACES_SAMPLER={name} is not known; there are {known}.")
    ratio = _RATIOS[kind]
    if ratio is None:
        ratio = _ratio(environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip())
    return Sampler(ratio, parent_based=kind != name)


def _ratio(value: str) -> float:
    if not value:
        return DEFAULT_RATIO
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigurationError(f"OTEL_TRACES_SAMPLER_ARG={value}: give the share of requests to trace, 0 to 1.")
    return ratio


def _passed_on(parent: Parent, *, sampled: bool) -> bytes:
    return b"traceparent: 00-%b-%b\r\n" % (parent.ids, b"01" if sampled else b"00")


def random_id() -> int:
    """A span's id."""
    return getrandbits(64) or 1  # 0 is none


def _is_state(tracestate: bytes) -> bool:
    return len(tracestate) <= _STATE_BYTES and _STATE.fullmatch(tracestate) is not None
