"""Sends spans to a collector by OTLP over HTTP, with the standard library.

The exporter of `opentelemetry-exporter-otlp-proto-http` does the same by way of `requests`, which is 5 MiB of every
worker. The variables are the same ones, `OTEL_EXPORTER_OTLP_*`, and `OTEL_EXPORTER_OTLP_TRACES_*` before them; the time
is in seconds, as in that exporter. A collector is called directly: proxies of the environment are not looked for.
"""

import gzip
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from math import isfinite
from random import uniform
from typing import Final
from urllib.parse import unquote, urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway.home import ConfigurationError
from gateway.telemetry.otlp_bytes import encode_spans

ENDPOINT: Final = "http://localhost:4318"
TIMEOUT_S: Final = 10.0
PATIENCE_S: Final = 1.0  # before the second try; doubled before each further one
RETRIED: Final = (429, 502, 503, 504)
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

log = logging.getLogger("tailor.tracing")


class Exporter(SpanExporter):
    """Sends each batch on a connection of its own, within the time given, in the thread that asks for it.

    `clock` in seconds; `pause` waits for that many before a further try.

    Raises:
        ConfigurationError: a variable does not say what it should.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        said = _Said(environ)
        self._clock = clock
        self._connect, self._target = _collector(said)
        self._timeout_s = _timeout_s(said)
        self._zipped = _zipped(said)
        self._headers = {
            "user-agent": "tailor-gateway",
            **_headers(said),
            "content-type": "application/x-protobuf",
            "connection": "close",
        }
        if self._zipped:
            self._headers["content-encoding"] = "gzip"
        self._ended = threading.Event()
        self._pause = pause or self._ended.wait
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send these; a failure is told in the log, once until spans are taken again."""
        try:
            fault = self._send(encode_spans(spans))
        except Exception as error:  # noqa: BLE001  whatever it is, it must not end the thread
            fault = type(error).__name__
        if fault and not self._away:
            log.warning("spans are lost, the collector does not take them: %s", fault)
        elif self._away and not fault:
            log.info("the collector takes spans again")
        self._away = bool(fault)
        return SpanExportResult.FAILURE if fault else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """No further try: what waits for one is given up now."""
        self._ended.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here."""
        return True

    def _send(self, body: bytes) -> str:
        """Why the spans were not taken; empty where they were."""
        if self._zipped:
            body = gzip.compress(body)
        last = self._clock() + self._timeout_s
        patience_s, fault = PATIENCE_S, "shut down"
        while not self._ended.is_set() and (left_s := last - self._clock()) > 0:
            wait_s = patience_s * uniform(0.8, 1.2)
            try:
                status, asked_s = self._try(body, left_s)
            except (OSError, HTTPException) as error:
                fault = type(error).__name__
            else:
                if 200 <= status < 300:
                    return ""
                fault = f"status {status}"
                if status not in RETRIED:
                    break
                wait_s = wait_s if asked_s is None else asked_s
            if self._clock() + wait_s >= last:
                break
            self._pause(wait_s)
            patience_s *= 2
        return fault

    def _try(self, body: bytes, timeout_s: float) -> tuple[int, float | None]:
        """The answer's status, and the seconds that it asks us to wait."""
        connection = self._connect(timeout_s)
        try:
            connection.request("POST", self._target, body, self._headers)
            answer = connection.getresponse()
            asked = answer.getheader("retry-after", "").strip()
            return answer.status, float(asked) if re.fullmatch("[0-9]{1,9}", asked) else None
        finally:
            connection.close()


class _Said:
    """The variables, by the end of their names; one for traces comes before the general one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __getitem__(self, name: str) -> str:
        return self.of_traces(name) or self._environ.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()

    def of_traces(self, name: str) -> str:
        return self._environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "").strip()


def _collector(said: _Said) -> tuple[Callable[[float], HTTPConnection], str]:
    """How to connect with a timeout, and what to ask for."""
    endpoint = said.of_traces("ENDPOINT") or f"{(said['ENDPOINT'] or ENDPOINT).rstrip('/')}/v1/traces"
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or url.scheme not in ("http", "https") or url.username is not None:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT: give http:// or https://, host and port; credentials belong into "
            "OTEL_EXPORTER_OTLP_HEADERS."
        )
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if url.scheme == "http":
        return lambda timeout_s: HTTPConnection(host, port or 80, timeout=timeout_s), target
    context = _tls(said)
    return lambda timeout_s: HTTPSConnection(host, port or 443, timeout=timeout_s, context=context), target


def _tls(said: _Said) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=said["CERTIFICATE"] or None)
        if certificate := said["CLIENT_CERTIFICATE"]:
            context.load_cert_chain(certificate, said["CLIENT_KEY"] or None)
    except OSError as error:
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY: one cannot be used ({error})."
        ) from None
    return context


def _timeout_s(said: _Said) -> float:
    try:
        timeout_s = float(said["TIMEOUT"] or TIMEOUT_S)
    except ValueError:
        timeout_s = 0.0
    if not (isfinite(timeout_s) and timeout_s > 0):
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_TIMEOUT={said['TIMEOUT']}: give seconds, more than 0.")
    return timeout_s


def _zipped(said: _Said) -> bool:
    compression = said["COMPRESSION"].lower() or "none"
    if compression not in ("none", "gzip"):
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_COMPRESSION={compression}: there are gzip and none.")
    return compression == "gzip"


def _headers(said: _Said) -> dict[str, str]:
    """Pairs of name=value between commas, both URL-encoded. What they say is told nowhere: it may be a key."""
    headers = {}
    for pair in filter(None, (each.strip() for each in said["HEADERS"].split(","))):
        name, is_pair, value = (unquote(part).strip() for part in pair.partition("="))
        if not (is_pair and _NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise ConfigurationError("OTEL_EXPORTER_OTLP_HEADERS: give name=value, URL-encoded, with commas between.")
        headers[name.lower()] = value
    return headers
