"""How spans are sent to a collector, and what becomes of them where it does not take them."""

import gzip
import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from gateway.home import ConfigurationError
from gateway.telemetry.otlp import Exporter

TAKEN, LOST = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
SECRET = "collector-says-secret"


class Collector(ThreadingHTTPServer):
    """Keeps what it was asked; answers with the statuses given, and then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[tuple[int, str]] = []  # status, Retry-After

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that breaks off is part of a test."""

    def url(self, scheme: str = "http") -> str:
        return f"{scheme}://localhost:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.path, headers, self.rfile.read(int(headers["content-length"]))))
        status, retry_after = self.server.answers.pop(0) if self.server.answers else (200, "")
        self.send_response(status)
        if retry_after:
            self.send_header("retry-after", retry_after)
        self.end_headers()
        self.wfile.write(SECRET.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def spans() -> list[ReadableSpan]:
    span = TracerProvider(shutdown_on_exit=False).get_tracer("t").start_span("asked")
    span.end()
    assert isinstance(span, ReadableSpan)
    return [span]


@pytest.mark.parametrize(
    ("ends", "path"),
    [
        ({"ENDPOINT": "/"}, "/v1/traces"),
        ({"ENDPOINT": "/base"}, "/base/v1/traces"),
        ({"TRACES_ENDPOINT": ""}, "/"),
        ({"TRACES_ENDPOINT": "/own?a=b", "ENDPOINT": "/base"}, "/own?a=b"),
    ],
)
def test_the_path_is_the_specification_s(
    collector: Collector, spans: list[ReadableSpan], ends: dict[str, str], path: str
) -> None:
    """A base gets `/v1/traces`; what is meant for traces is left as it is, and comes first."""
    environ = {f"OTEL_EXPORTER_OTLP_{name}": collector.url() + end for name, end in ends.items()}
    assert Exporter(environ).export(spans) == TAKEN
    [(asked, headers, body)] = collector.asked
    assert asked == path
    assert headers["content-type"] == "application/x-protobuf"
    assert "content-encoding" not in headers
    [group] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert group.scope_spans[0].spans[0].name == "asked"


def test_headers_and_compression_are_the_environment_s(collector: Collector, spans: list[ReadableSpan]) -> None:
    """URL-decoded; those for traces instead of the general ones."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url(),
        "OTEL_EXPORTER_OTLP_HEADERS": "general=1",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "api-key = a%20b%3D%2C , Authorization=Basic YQ==,",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    assert Exporter(environ).export(spans) == TAKEN
    [(_, headers, body)] = collector.asked
    assert (headers["api-key"], headers["authorization"]) == ("a b=,", "Basic YQ==")
    assert "general" not in headers
    assert headers["content-encoding"] == "gzip"
    assert ExportTraceServiceRequest.FromString(gzip.decompress(body)).resource_spans


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_collector_that_is_busy_is_asked_again(collector: Collector, spans: list[ReadableSpan], status: int) -> None:
    """When it says, or after a second."""
    collector.answers = [(status, "0"), (status, "0")]
    assert Exporter({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url()}).export(spans) == TAKEN
    assert len(collector.asked) == 3


def test_a_try_waits_longer_each_time_within_the_time(collector: Collector, spans: list[ReadableSpan]) -> None:
    """Tries at 0, about 1 and about 3 s; the next would be after the 5.5 s given, so it is not waited for."""
    collector.answers = [(503, "")] * 9
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url(), "OTEL_EXPORTER_OTLP_TIMEOUT": "5.5"}
    waits: list[float] = []
    exporter = Exporter(environ, clock=lambda: sum(waits), pause=waits.append)
    assert exporter.export(spans) == LOST
    assert waits == [pytest.approx(1, abs=0.2), pytest.approx(2, abs=0.4)]
    assert len(collector.asked) == 3


@pytest.mark.parametrize("answer", [(400, ""), (404, "0"), (307, ""), (503, "60")])
def test_what_will_not_help_is_not_tried(
    collector: Collector, spans: list[ReadableSpan], answer: tuple[int, str]
) -> None:
    """Another try at what was refused, or one that comes after the time given."""
    collector.answers = [answer]
    begin = time.monotonic()
    assert Exporter({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url()}).export(spans) == LOST
    assert time.monotonic() - begin < 5
    assert len(collector.asked) == 1


def test_an_outage_is_told_once(
    collector: Collector, spans: list[ReadableSpan], caplog: pytest.LogCaptureFixture
) -> None:
    """And its end; nothing of what the collector wrote."""
    caplog.set_level(logging.INFO, logger="tailor.tracing")
    exporter = Exporter({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url()})
    collector.answers = [(400, ""), (500, ""), (200, ""), (200, ""), (401, "")]
    assert [exporter.export(spans) for _ in range(5)] == [LOST, LOST, TAKEN, TAKEN, LOST]
    said = [record.getMessage() for record in caplog.records if record.name == "tailor.tracing"]
    assert [message.rpartition(" ")[2] for message in said] == ["400", "again", "401"]
    assert SECRET not in caplog.text


def test_the_end_waits_for_no_further_try(collector: Collector, spans: list[ReadableSpan]) -> None:
    """Nor is anything sent after it."""
    collector.answers = [(503, "30")] * 2
    exporter = Exporter({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url(), "OTEL_EXPORTER_OTLP_TIMEOUT": "60"})
    begin = time.monotonic()
    threading.Timer(0.2, exporter.shutdown).start()
    assert exporter.export(spans) == LOST
    assert time.monotonic() - begin < 5
    assert exporter.export(spans) == LOST
    assert len(collector.asked) == 1


def test_a_collector_that_is_away_or_breaks_off_is_a_loss(spans: list[ReadableSpan]) -> None:
    """Nothing is raised."""
    with Collector() as gone:
        url = gone.url()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"}
    assert Exporter(environ).export(spans) == LOST
    assert Exporter(environ).export([object()]) == LOST  # type: ignore[list-item]


def test_both_sides_of_tls_can_show_a_certificate(
    collector: Collector, spans: list[ReadableSpan], tmp_path: Path
) -> None:
    """The collector's is checked against the file given, and it may ask for ours."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    collector.socket = context.wrap_socket(collector.socket, server_side=True, do_handshake_on_connect=False)
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url("https"),
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificate),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(certificate),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(key),
    }
    assert Exporter(environ).export(spans) == TAKEN
    stranger = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url("https"), "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"}
    assert Exporter(stranger).export(spans) == LOST
    assert len(collector.asked) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ENDPOINT", "localhost:4318"),
        ("ENDPOINT", "http://"),
        ("ENDPOINT", "http://host:port"),
        ("ENDPOINT", f"http://user:{SECRET}@host"),
        ("TIMEOUT", "soon"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "nan"),
        ("COMPRESSION", "deflate"),
        ("HEADERS", SECRET),
        ("HEADERS", f"a={SECRET}%0d%0ab: c"),
        ("CERTIFICATE", "/nowhere/ca.pem"),
        ("CLIENT_CERTIFICATE", "/nowhere/client.pem"),
    ],
)
def test_a_variable_that_cannot_be_followed_ends_the_start(variable: str, value: str) -> None:
    """By name, and without what may be a key."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://x", f"OTEL_EXPORTER_OTLP_{variable}": value}
    with pytest.raises(ConfigurationError, match=variable) as refused:
        Exporter(environ)
    assert SECRET not in str(refused.value)
