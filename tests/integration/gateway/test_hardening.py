"""What strangers, slow clients and unlucky moments can do to a gateway: little."""

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.replicas.residency import Residency
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import BAD, write_good
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant, error_of, live_routes
from tests.waiting import until


async def test_connections_to_a_replica_are_kept(acme: Tenant, replica: FakeReplica) -> None:
    """One after another, requests share one connection; opening one each cost a third of their CPU."""
    await acme.ask(BASE)
    before = replica.connections
    for _ in range(20):
        assert (await acme.ask(BASE)).status_code == 200
    assert replica.connections - before <= 3  # the probes' own


async def test_a_frozen_engine_leaves_rotation_under_traffic(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """An API server that still answers heads and refusals is no proof of tokens."""
    gateway = await run_gateway(replica, probe_deadline_s=1.0)
    acme = await gateway.tenant("acme")
    replica.faults.probe_hangs = True
    replica.faults.head_then_nothing = True
    streams = [asyncio.create_task(acme.ask(BASE, stream=True)) for _ in range(5)]
    async with asyncio.timeout(60):
        while any(state.value == "ready" for state in gateway.parts.pool.states().values()):
            await acme.ask(BASE, logit_bias={"999999999": 1})
            await asyncio.sleep(0.05)
    for answer in await asyncio.gather(*streams):
        assert answer.status_code >= 500 or "error" in answer.text


async def test_a_request_in_the_moment_a_load_ends_gets_its_answer(
    acme: Tenant, good: Path, gateway: Gateway, replica: FakeReplica
) -> None:
    """Many waves of cold requests, each while the load before ends: none waits for a load that is over."""
    await acme.publish(good)
    residency: Residency = next(iter(gateway.parts.pool._replicas.values())).residency
    for _ in range(20):
        residency.start_over()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(acme.ask() for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200}
    assert len(replica.loads) > 1  # where the report was faster than the requests, there was nothing to load


async def test_a_load_that_nobody_waits_for_is_not_made(
    acme: Tenant, good: Path, tmp_path: Path, replica: FakeReplica
) -> None:
    """Clients that ask for cold adapters and leave cost the engine nothing."""
    await acme.publish(good, "first")
    for number in range(4):
        await acme.publish(write_good(tmp_path / f"cold-{number}", seed=number + 10), f"cold-{number}")
    replica.faults.load_delay_s = 5
    holding = asyncio.create_task(acme.ask("first"))
    await until(lambda: bool(replica.used_names))
    for number in range(4):
        with pytest.raises(httpx.ReadTimeout):
            await acme.client.post(
                "/v1/chat/completions",
                json={"model": f"cold-{number}", "messages": [{"role": "user", "content": "x"}]},
                timeout=httpx.Timeout(30, read=0.05),
            )
    replica.faults.load_delay_s = 0
    assert (await holding).status_code == 200
    await asyncio.sleep(0.3)
    assert len(replica.used_names) <= 2


async def test_work_in_the_background_that_ends_is_told(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    """With its name and its fault: nobody else waits for it."""
    metrics: Any = gateway.parts.metrics
    metrics._lag = None  # a fault that nobody has thought of
    await until(lambda: "has ended, and goes on with a restart alone" in caplog.text)
    assert "Metrics.sample_lag" in caplog.text
    assert "AttributeError" in caplog.text


async def test_a_refusal_keeps_the_connection_and_says_nothing_in_the_log(
    acme: Tenant, good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenant's fault is no fault of the server's, and a tenant's words are not for its log."""
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            answer = await acme.publish(BAD[0].make(good, tmp_path / f"bad-{number}"), "canary-name")
            assert answer.status_code == 422
            assert (await acme.client.get("/v1/adapters/canary-missing")).status_code == 404
    assert "canary" not in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_stranger_learns_and_costs_nothing(gateway: Gateway) -> None:
    """Without a key every path but two is 401, whatever the method, body or path."""
    stranger = gateway.client()
    for method, path in (
        ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/v1/adapters/"), ("GET", "/x"), ("GET", "/v1/models"),
        ("POST", "/v1/adapters"), ("POST", "/admin/v1/tenants"), ("GET", "/v1/chat/completions"), ("DELETE", "/v1/x"),
        ("POST", "/v1/chat/completions"),
    ):  # fmt: skip
        answer = await stranger.request(method, path, content=b"{not json")
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key"), path
        assert "location" not in answer.headers
    for path in ("/health", "/ready"):
        assert (await stranger.get(path)).status_code == 200


async def test_control_bodies_are_bounded(gateway: Gateway) -> None:
    """An operator's body has a limit too, and what is not JSON is told plainly."""
    big = await gateway.operator.post("/admin/v1/tenants", content=b'{"name": "' + b"x" * 100_000 + b'"}')
    assert (big.status_code, error_of(big)["code"]) == (413, "request_too_large")
    broken = await gateway.operator.post(
        "/admin/v1/tenants", content=b"{", headers={"content-type": "application/json"}
    )
    assert (broken.status_code, error_of(broken)["code"], error_of(broken)["param"]) == (400, "invalid_json", None)
    late = await gateway.operator.post("/admin/v1/tenants/none/keys", json={"expires_at": 10**30})
    assert late.status_code == 400


async def test_a_wrong_method_is_told(acme: Tenant, gateway: Gateway) -> None:
    """405 on the hot paths as on the others, with all methods that the path has."""
    hot = await acme.client.get("/v1/chat/completions")
    assert (hot.status_code, hot.headers["allow"]) == (405, "POST")
    methods: dict[str, set[str]] = {}
    for method, path in live_routes(gateway.front):
        methods.setdefault(re.sub(r"\{[^}]*\}", "1", path), set()).add(method)
    assert methods["/v1/files"] == {"GET", "POST"}
    several = {path: taken for path, taken in methods.items() if len(taken) > 1}
    for path, taken in several.items():
        client = gateway.operator if path.startswith("/admin") else acme.client
        other = await client.request("PUT" if "PUT" not in taken else "POST", path)
        assert (other.status_code, set(other.headers["allow"].split(", "))) == (405, taken), path


async def test_a_path_with_a_fragment_is_no_path(acme: Tenant, gateway: Gateway) -> None:
    """No client sends one; where it is sent all the same, nobody is told that POST is the method to use."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/chat/completions#x HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: 0\r\n\r\n"
        % acme.key.encode()
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
    writer.close()


async def test_an_oversized_chat_body_is_told(acme: Tenant) -> None:
    """413 that the client gets to read, though it was still sending."""
    answer = await acme.ask(BASE, user="x" * (4 << 20))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")


async def test_an_endless_head_is_cut_off(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Headers without end cost no memory."""
    gateway = await run_gateway(replica)
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\n")

    async def send_on() -> None:
        for _ in range(1_000):
            writer.write(b"x-a: " + b"b" * 8_000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        assert await reader.read() == b"", "it was answered"
        raise ConnectionResetError

    with pytest.raises(ConnectionError):
        await send_on()
    writer.close()


async def test_a_restarted_gateway_takes_over_what_the_replica_holds(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """Loaded once, served by both: the report says whose and what each name is."""
    first = await run_gateway(replica)
    acme = await first.tenant("acme")
    await acme.publish(good)
    await acme.ask()
    second = await run_gateway(replica)
    elsewhere = Tenant("acme", acme.key, second.client(acme.key))
    assert (await elsewhere.ask()).status_code == 200
    assert len(replica.loads) == 1


async def test_a_first_stream_event_is_waited_for_within_bounds(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """A head without a token is no answer: 503, and the engine is told to stop."""
    gateway = await run_gateway(replica, first_byte_timeout_s=0.5)
    acme = await gateway.tenant("acme")
    replica.faults.head_then_nothing = True
    answer = await acme.ask(BASE, stream=True)
    assert answer.status_code == 503
    assert json.loads(answer.text)["error"]["code"] == "engine_unavailable"
