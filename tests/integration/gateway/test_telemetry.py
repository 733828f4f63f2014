"""The operator port, scraped over a socket, and traces as a collector receives them."""

import asyncio
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from gateway.home import ConfigurationError
from gateway.operator_port import HEAD_LIMIT_BYTES, MAX_CONNECTIONS, OperatorPort
from gateway.telemetry import names
from gateway.telemetry.asgi import Counted
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.observation import Observation
from gateway.telemetry.tracing import Tracing, open_tracing
from tests.integration.gateway.conftest import BASE, RunGateway, RunReplica
from tests.ports import free_port
from tests.waiting import until

CHAT = "/v1/chat/completions"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01".encode()


def observation(**more: Any) -> Observation:
    """A stream that has just ended: queued 20 ms, loaded 200 ms, first token 100 ms after it was sent."""
    began = time.monotonic() - 1.0
    seen = Observation(CHAT, began)
    seen.request_id, seen.tenant_id, seen.adapter_id, seen.version = "5f" * 16, "tnt_a", "adp_a", 3
    seen.replica, seen.tier, seen.streamed, seen.status = "unix:/run/r0.sock", "cold", True, 200
    seen.placing_at, seen.queue_s, seen.load_s = began + 0.01, 0.02, 0.2
    seen.sent_at, seen.first_at, seen.ended = began + 0.25, began + 0.35, began + 0.95
    seen.prompt_tokens, seen.cached_tokens, seen.completion_tokens = 20, 5, 11
    for name, value in more.items():
        setattr(seen, name, value)
    return seen


@asynccontextmanager
async def operator_port(metrics: Metrics, **more: Any) -> AsyncIterator[OperatorPort]:
    port = OperatorPort("127.0.0.1", 0, metrics.page, **more)
    port.bind()
    await port.start()
    yield port
    await port.stop()


async def exchange(port: OperatorPort, request: bytes) -> bytes:
    """All that comes back until the port closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_a_scrape_reads_what_was_counted() -> None:
    """Over a socket, as Prometheus would; tenants are ids."""
    metrics = Metrics(tenants=10, adapters=10)
    metrics.generation.count(observation())
    async with operator_port(metrics) as port, httpx.AsyncClient() as client:
        scraped = await client.get(f"http://127.0.0.1:{port.port}/metrics")
    assert scraped.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(scraped.text)
        for sample in family.samples
    }
    assert found["tailor_requests_total", ("POST", CHAT, "200")] == 1
    assert found["tailor_tenant_tokens_total", ("tnt_a", "completion")] == 11
    assert found["tailor_load_wait_seconds_sum", ("cold",)] == 0.2


async def test_the_operator_port_serves_two_paths() -> None:
    """And tells of nothing else."""
    async with operator_port(Metrics(tenants=1, adapters=1)) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port.port}"
        assert (await client.get(f"{url}/health")).json() == {"status": "ok"}
        assert (await client.get(f"{url}/metrics?x=1")).status_code == 200
        assert (await client.post(f"{url}/metrics")).status_code == 405
        assert (await client.get(f"{url}/admin/v1/tenants")).status_code == 404
        assert (await exchange(port, b"\x00\xff garbage\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        too_large = b"GET /metrics HTTP/1.1\r\nx: " + b"y" * 2 * HEAD_LIMIT_BYTES
        assert (await exchange(port, too_large + b"\r\n\r\n")).startswith(b"HTTP/1.1 431 ")


async def test_a_peer_that_stalls_is_cut() -> None:
    """One that sends no whole request, and one that reads no answer."""
    metrics = Metrics(tenants=50_000, adapters=50_000)
    async with operator_port(metrics, patience_s=0.2) as port:
        with suppress(ConnectionError):
            assert await exchange(port, b"GET /metrics HTTP/1.1\r\n") == b""
        for n in range(50_000):  # more than the kernel's buffers hold
            metrics.generation.count(observation(tenant_id=f"tnt_{n}", adapter_id=f"adp_{n}"))
    page = b"".join(piece.encode() for piece in metrics.pieces())

    async def written_before() -> bytes:
        return page

    slow = OperatorPort("127.0.0.1", 0, written_before, patience_s=0.2)
    await slow.start()
    with socket.create_connection(("127.0.0.1", slow.port)) as peer:
        peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await exchange(slow, b"GET /health HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        while slow.open_connections:
            await asyncio.sleep(0.05)
        peer.settimeout(10)
        received = 0
        with suppress(ConnectionError):
            while piece := await asyncio.to_thread(peer.recv, 1 << 20):
                received += len(piece)
    assert received < len(page)
    await slow.stop()


async def test_connections_are_bounded() -> None:
    """What is more is closed at once; those that are there are served."""
    async with operator_port(Metrics(tenants=1, adapters=1)) as port:
        held = [await asyncio.open_connection("127.0.0.1", port.port) for _ in range(MAX_CONNECTIONS)]
        while port.open_connections < MAX_CONNECTIONS:
            await asyncio.sleep(0)
        with suppress(ConnectionError):
            assert await exchange(port, b"GET /health HTTP/1.1\r\n\r\n") == b""
        reader, writer = held[0]
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        for _, writer in held:
            writer.close()


async def test_a_port_that_is_taken_is_told_by_name() -> None:
    """Before anything is served, with what to do."""
    async with operator_port(Metrics(tenants=1, adapters=1)) as port:
        with pytest.raises(ConfigurationError, match=rf"Port {port.port} .* TAILOR_OPERATOR_PORT"):
            OperatorPort("127.0.0.1", port.port, Metrics(tenants=1, adapters=1).page).bind()


async def test_control_requests_are_counted_by_template() -> None:
    """With what they came to; what a client typed is no label."""
    metrics = Metrics(tenants=1, adapters=1)
    app = FastAPI()

    @app.get("/v1/adapters/{name}")
    async def adapter(name: str) -> dict[str, str]:
        if name == "gone":
            raise HTTPException(404)
        return {"name": name}

    transport = httpx.ASGITransport(Counted(app, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for path in ("/v1/adapters/canary-name", "/v1/adapters/gone", "/canary-path"):
            await client.get(path)
        await client.request("CANARY", "/canary-path")
    page = "".join(metrics.pieces())
    for labels in (
        'method="GET",route="/v1/adapters/{name}",status="200"',
        'method="GET",route="/v1/adapters/{name}",status="404"',
        'method="GET",route="unmatched",status="404"',
        'method="other",route="unmatched",status="404"',
    ):
        assert f"tailor_requests_total{{{labels}}} 1\n" in page
    assert "canary" not in page.lower()


async def test_lag_of_the_event_loop_is_observed() -> None:
    """A call that blocks the loop shows as a timer that came late."""
    metrics = Metrics(tenants=1, adapters=1)
    task = asyncio.create_task(metrics.sample_lag(every_s=0.01))
    await asyncio.sleep(0)
    time.sleep(0.12)
    while "tailor_event_loop_lag_seconds_count 0\n" in "".join(metrics.pieces()):
        await asyncio.sleep(0.01)
    task.cancel()
    page = "".join(metrics.pieces())
    late = page.split('tailor_event_loop_lag_seconds_bucket{le="0.05"} ')[1].partition("\n")[0]
    everything = page.split("tailor_event_loop_lag_seconds_count ")[1].partition("\n")[0]
    assert int(late) < int(everything)


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector: keeps the spans it is sent; answers only while `open` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Receive(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.set()
        self.server.open.wait(30)
        assert self.path == "/v1/traces"
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(plain(group.resource.attributes))
            for scope in group.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.open.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def otel(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a gateway that exports to the collector."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    return monkeypatch


def opened(*, trust_parent: bool = True) -> Tracing:
    return open_tracing(os.environ, base_model="base", trust_parent=trust_parent)


def plain(attributes: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        kind = pair.value.WhichOneof("value")
        assert kind is not None
        return getattr(pair.value, kind)

    return {pair.key: value(pair) for pair in attributes}


async def test_an_operators_parent_based_sampler_traces_what_its_caller_does(
    collector: Collector, otel: pytest.MonkeyPatch
) -> None:
    """Where `OTEL_TRACES_SAMPLER` names one; by default a caller has no say."""
    otel.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    for named, traced in (("", False), ("parentbased_traceidratio", True)):
        otel.setenv("OTEL_TRACES_SAMPLER", named)
        tracing = opened(trust_parent=False)
        trace, _ = tracing.begin(TRACEPARENT)
        assert (trace is not None) is traced
        assert tracing.begin(TRACEPARENT[:-1] + b"0")[0] is None
        await tracing.close()


async def test_a_counting_request_is_one_span(
    collector: Collector, otel: pytest.MonkeyPatch, run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """The engine is told of it: what it does for a count is below the gateway's own span, never below none."""
    otel.setenv("OTEL_TRACES_SAMPLER", "always_on")
    otel.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    replica = await run_replica()
    tenant = await (await run_gateway(replica)).tenant("acme")
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    for path in ("/v1/tokenize", "/v1/messages/count_tokens"):
        sent = {"traceparent": TRACEPARENT.decode()}
        assert (await tenant.client.post(path, json=body, headers=sent)).status_code == 200
    async with asyncio.timeout(10):
        while len(collector.spans) < 2:
            await asyncio.sleep(0.02)
    assert {span.kind for span in collector.spans} == {Span.SPAN_KIND_SERVER}
    assert {span.parent_span_id.hex() for span in collector.spans} == {SPAN_ID}
    told = {request["headers"]["traceparent"] for request in replica.requests}
    assert told == {f"00-{TRACE_ID}-{span.span_id.hex()}-01" for span in collector.spans}


async def test_a_traced_request_arrives_as_spans(collector: Collector, otel: pytest.MonkeyPatch) -> None:
    """Gateway under the caller; queue, load and upstream under the gateway; each with its own times."""
    tracing = opened()
    trace, header = tracing.begin(TRACEPARENT)
    assert trace is not None
    seen = observation()
    wall_ns = (time.time() - time.monotonic()) * 1e9
    trace.finish(seen)
    await tracing.close()

    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {f"POST {CHAT}", names.QUEUE_SPAN, names.LOAD_SPAN, "chat adp_a"}
    gateway, upstream = spans[f"POST {CHAT}"], spans["chat adp_a"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert gateway.parent_span_id.hex() == SPAN_ID
    assert {span.parent_span_id for span in collector.spans if span is not gateway} == {gateway.span_id}
    assert header == f"traceparent: 00-{TRACE_ID}-{upstream.span_id.hex()}-01\r\n".encode()
    assert (gateway.kind, upstream.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    placed = seen.placing_at + seen.queue_s
    for span, begin, end in (
        (gateway, seen.began, seen.ended),
        (spans[names.QUEUE_SPAN], seen.placing_at, placed),
        (spans[names.LOAD_SPAN], placed, placed + seen.load_s),
        (upstream, seen.sent_at, seen.ended),
    ):
        off_by_ns = (span.start_time_unix_nano - wall_ns - begin * 1e9, span.end_time_unix_nano - wall_ns - end * 1e9)
        assert max(map(abs, off_by_ns)) < 5e6, span.name
    assert collector.resources[0]["service.name"] == "tailor-gateway"
    assert plain(gateway.attributes) == {
        names.HTTP_METHOD: "POST",
        names.HTTP_ROUTE: CHAT,
        names.HTTP_STATUS: 200,
        names.REQUEST_ID: "5f" * 16,
        names.TENANT_ID: "tnt_a",
        names.ADAPTER_ID: "adp_a",
        names.ADAPTER_VERSION: 3,
        names.ADAPTER_TIER: "cold",
        names.REPLICA_ID: "unix:/run/r0.sock",
    }
    assert plain(upstream.attributes) == {
        names.GEN_AI_OPERATION: "chat",
        names.GEN_AI_PROVIDER: "vllm",
        names.GEN_AI_REQUEST_MODEL: "adp_a",
        names.GEN_AI_REQUEST_STREAM: True,
        names.GEN_AI_INPUT_TOKENS: 20,
        names.GEN_AI_OUTPUT_TOKENS: 11,
        names.GEN_AI_CACHED_TOKENS: 5,
        names.GEN_AI_FIRST_CHUNK: pytest.approx(0.1),
        names.REPLICA_ID: "unix:/run/r0.sock",
    }


async def test_a_request_that_came_nowhere_is_one_span(collector: Collector, otel: pytest.MonkeyPatch) -> None:
    """A failure is marked as one; what never began has no span; the service has the name it was given."""
    otel.setenv("OTEL_TRACES_SAMPLER", "always_on")
    otel.setenv("OTEL_SERVICE_NAME", "gateway-in-rome")
    tracing = opened(trust_parent=False)
    trace, _ = tracing.begin()
    assert trace is not None
    nowhere = {"tier": "", "placing_at": 0.0, "queue_s": 0.0, "load_s": 0.0, "sent_at": 0.0, "first_at": 0.0}
    trace.finish(observation(status=503, adapter_id="", replica="", **nowhere))
    await tracing.close()
    [span] = collector.spans
    assert span.status.code == 2
    assert span.parent_span_id == b""
    assert span.trace_id.hex() == trace.id
    assert plain(span.attributes)[names.ERROR_TYPE] == "503"
    assert collector.resources[0]["service.name"] == "gateway-in-rome"


async def test_requests_that_are_not_chosen_make_no_span(collector: Collector, otel: pytest.MonkeyPatch) -> None:
    """Nothing is sent for them, however loudly their callers ask."""
    otel.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing = opened(trust_parent=False)
    assert [tracing.begin(header)[0] for header in (None, TRACEPARENT, b"broken")] == [None, None, None]
    await tracing.close()
    assert not collector.asked.is_set()


async def test_a_collector_that_hangs_holds_nothing_up(collector: Collector, otel: pytest.MonkeyPatch) -> None:
    """What is more than the queue holds is dropped, requests never wait, and the end waits for seconds only."""
    collector.open.clear()
    otel.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    otel.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "64")
    tracing = opened()
    slowest_s = 0.0
    for _ in range(1_000):
        trace, _ = tracing.begin(TRACEPARENT)
        assert trace is not None
        begin = time.perf_counter()
        trace.finish(observation(queue_s=0.0, load_s=0.0))
        slowest_s = max(slowest_s, time.perf_counter() - begin)
    assert await asyncio.to_thread(collector.asked.wait, 10)
    assert slowest_s < 1.0
    collector.open.set()
    begin = time.perf_counter()
    await tracing.close()
    assert time.perf_counter() - begin < 7
    assert 0 < len(collector.spans) <= 4 * 64


async def test_a_collector_that_hangs_delays_no_stop(collector: Collector, otel: pytest.MonkeyPatch) -> None:
    """The last spans are given up after the time that they were given."""
    collector.open.clear()
    otel.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
    tracing = opened()
    trace, _ = tracing.begin(TRACEPARENT)
    assert trace is not None
    trace.finish(observation())
    begin = time.perf_counter()
    await tracing.close(patience_s=0.5)
    assert time.perf_counter() - begin < 5


async def test_a_collector_that_is_away_is_no_failure(otel: pytest.MonkeyPatch) -> None:
    """Of a request or of the stop."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        otel.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    tracing = opened()
    trace, _ = tracing.begin(TRACEPARENT)
    assert trace is not None
    trace.finish(observation())
    await tracing.close()


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_gateway_tells_of_a_request_from_client_to_engine(
    collector: Collector,
    otel: pytest.MonkeyPatch,
    run_replica: RunReplica,
    run_gateway: RunGateway,
    good: Path,
    caplog: pytest.LogCaptureFixture,
    streamed: bool,
) -> None:
    """Counted, traced and told to the engine under one id; nothing that a tenant wrote is in any of it."""
    otel.setenv("OTEL_TRACES_SAMPLER", "always_on")
    otel.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    caplog.set_level("DEBUG", logger="tailor")
    replica = await run_replica()
    port = free_port()
    gateway = await run_gateway(replica, operator_port=port)
    tenant = await gateway.tenant("canary-tenant")
    assert (await tenant.publish(good, "canary-bot")).status_code == 201
    asked = {"model": "canary-bot", "messages": [{"role": "user", "content": "canary-prompt"}], "stream": streamed}
    sent = {"traceparent": TRACEPARENT.decode(), "tracestate": "canary=state", "x-canary": "canary-header"}
    answer = await tenant.client.post(CHAT, json=asked, headers=sent)
    assert answer.status_code == 200
    refused = await tenant.client.post(CHAT, json={**asked, "model": "canary-missing"}, headers=sent)
    assert refused.status_code == 404

    page = (await gateway.client().get(f"http://127.0.0.1:{port}/metrics")).text
    assert gateway.parts.metrics.unwatched() == set()
    assert {family.name for family in text_string_to_metric_families(page)} == {
        metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name for metric in names.METRICS
    }
    assert f'tailor_requests_total{{method="POST",route="{CHAT}",status="200"}} 1\n' in page
    assert f'tailor_requests_total{{method="POST",route="{CHAT}",status="404"}} 1\n' in page
    assert 'tailor_requests_total{method="POST",route="/v1/adapters",status="201"} 1\n' in page
    assert 'tailor_slot_requests_total{tier="cold"} 1\n' in page
    assert f'tailor_time_to_first_token_seconds_count{{route="{CHAT}",tier="cold"}} 1\n' in page or not streamed
    [replica_id] = gateway.parts.pool.states()
    assert f'tailor_replica_state{{replica="{replica_id}",state="ready"}} 1.0\n' in page
    assert "tailor_scrape_faults_total 0.0\n" in page

    async with asyncio.timeout(10):
        while sum(span.kind == Span.SPAN_KIND_SERVER for span in collector.spans) < 2:
            await asyncio.sleep(0.02)
    served, missed = sorted(
        (span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER),
        key=lambda span: span.start_time_unix_nano,
    )
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert plain(served.attributes)[names.REQUEST_ID] == answer.headers["x-request-id"]
    assert plain(served.attributes)[names.ADAPTER_TIER] == "cold"
    assert plain(missed.attributes)[names.HTTP_STATUS] == 404
    [upstream] = [span for span in collector.spans if span.kind == Span.SPAN_KIND_CLIENT]
    usage = plain(upstream.attributes)
    assert usage[names.GEN_AI_OUTPUT_TOKENS] > 0 < usage[names.GEN_AI_INPUT_TOKENS]
    assert names.LOAD_SPAN in {span.name for span in collector.spans}
    [heard] = [request["headers"] for request in replica.requests if "canary-prompt" in str(request["body"])]
    assert heard["traceparent"] == f"00-{TRACE_ID}-{upstream.span_id.hex()}-01"
    assert "tracestate" not in heard
    for told in (page, str(collector.spans), caplog.text):
        assert "canary" not in told
        assert tenant.key not in told


async def test_who_waits_in_vain_is_counted_and_traced(
    collector: Collector, otel: pytest.MonkeyPatch, run_replica: RunReplica, run_gateway: RunGateway, good: Path
) -> None:
    """In the queue until its time is over, or for a load that fails; who is refused at once has waited for nothing."""
    otel.setenv("OTEL_TRACES_SAMPLER", "always_on")
    otel.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    replica = await run_replica()
    port = free_port()
    gateway = await run_gateway(
        replica, operator_port=port, replica_concurrency=1, queue_timeout_s=4, tenant_queue_limit=3, hear_out_s=0
    )
    tenant = await gateway.tenant("acme")
    assert (await tenant.publish(good)).status_code == 201

    async def figures(name: str, labels: str = "") -> tuple[int, float]:
        page = (await gateway.client().get(f"http://127.0.0.1:{port}/metrics")).text
        found = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith(name))
        return int(found.get(f"{name}_count{labels}", 0)), float(found.get(f"{name}_sum{labels}", 0))

    replica.faults.latency_s = 60
    running = asyncio.create_task(tenant.ask(BASE))
    await until(lambda: replica.in_flight == 1)
    waiting = [asyncio.create_task(tenant.ask(BASE)) for _ in range(3)]
    [member] = gateway.parts.pool.members()
    await until(lambda: member.replica.gate.waiting == 3)
    assert (await tenant.ask(BASE)).status_code == 429
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [503] * 3
    count, seconds = await figures("tailor_queue_seconds")
    assert count == 3
    assert seconds >= 12
    running.cancel()
    await until(lambda: member.replica.gate.in_flight == 0)

    replica.faults.load_delay_s, replica.faults.load_status = 0.05, 422
    refused = await tenant.ask("bot")
    assert (refused.status_code, refused.headers.get("x-tailor-replica")) == (503, None)
    count, seconds = await figures("tailor_load_wait_seconds", '{tier="cold"}')
    assert count == 1
    assert seconds >= 0.05
    async with asyncio.timeout(10):
        while sum(span.kind == Span.SPAN_KIND_SERVER for span in collector.spans) < 6:
            await asyncio.sleep(0.02)
    inner = Counter(span.name for span in collector.spans if span.kind == Span.SPAN_KIND_INTERNAL)
    assert inner == {names.QUEUE_SPAN: 3, names.LOAD_SPAN: 1}
    [load] = [span for span in collector.spans if span.name == names.LOAD_SPAN]
    assert load.status.code == 2
    assert plain(load.attributes)[names.ADAPTER_TIER] == "cold"
    assert names.REPLICA_ID not in plain(load.attributes)
