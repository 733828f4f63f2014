"""What an answer says of itself, who stands in for an adapter, and that each request is counted once, come what may."""

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from adapter_store.transactions import reading
from gateway.database import usage as counted
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, Tenant, error_of
from tests.waiting import until

TIMING = re.compile(r'queue;dur=(\d+\.\d{3}), load;dur=(\d+\.\d{3}), adapter;desc="(\w+)"')


async def plan_of(gateway: Gateway, tenant: Tenant, **limits: Any) -> None:
    """Put the tenant on a plan of its own."""
    made = await gateway.operator.post("/admin/v1/plans", json={"name": f"of-{tenant.name}", **limits})
    assert made.status_code == 201, made.text
    moved = await gateway.operator.patch(f"/admin/v1/tenants/{tenant.name}", json={"plan": f"of-{tenant.name}"})
    assert moved.status_code == 200, moved.text


async def usage(gateway: Gateway) -> dict[str, int]:
    """The ledger's sums, once it has written what there is."""
    await gateway.parts.ledger.flush()
    rows = (await gateway.operator.get("/admin/v1/usage")).json()["data"]
    return {
        name: sum(row[name] for row in rows) for name in ("requests", "failed", "prompt_tokens", "completion_tokens")
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_says_which_version_served_it(
    acme: Tenant, good: Path, gateway: Gateway, stream: bool
) -> None:
    """Adapter, version and digest, replica, and how long it waited for what; cold first, then from the device."""
    digest = (await acme.publish(good)).json()["current"]["digest"]
    (replica,) = [member.replica for member in gateway.parts.pool.members()]
    for tier in ("cold", "gpu"):
        headers = (await acme.ask(stream=stream)).headers
        assert headers["x-tailor-adapter"] == "bot"
        assert headers["x-tailor-version"] == f"1; sha256={digest}"
        assert headers["x-tailor-replica"] == replica.id
        assert "127.0.0.1" not in headers["x-tailor-replica"]
        timing = TIMING.fullmatch(headers["server-timing"])
        assert timing is not None
        assert timing[3] == tier
        assert (float(timing[2]) > 0) == (tier == "cold")
        assert "x-tailor-fallback" not in headers


async def test_the_base_model_has_a_receipt_too(acme: Tenant, gateway: Gateway) -> None:
    """No adapter can be called '-', and the version is the base's fingerprint."""
    headers = (await acme.ask(BASE)).headers
    assert headers["x-tailor-adapter"] == "-"
    assert headers["x-tailor-version"] == f"base; sha256={gateway.parts.base.fingerprint}"


@pytest.mark.parametrize("given", ["abc-1.2_3:4", "x" * 64])
async def test_a_safe_request_id_is_kept(acme: Tenant, replica: FakeReplica, given: str) -> None:
    """The client finds it in its answer; the engine gets one of its own, since a client may repeat itself."""
    answers = [
        await acme.client.post(
            "/v1/chat/completions",
            json={"model": BASE, "messages": [{"role": "user", "content": "x"}]},
            headers={"x-request-id": given},
        )
        for _ in range(2)
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == [given, given]
    upstream = [asked["headers"]["x-request-id"] for asked in replica.requests]
    assert len({*upstream, given}) == 3


async def test_an_unsafe_request_id_is_replaced(acme: Tenant, subtests: pytest.Subtests) -> None:
    """Nothing of it comes back."""
    for given in ("", "a b", "x" * 65, 'a"b', "é", "a;b"):
        with subtests.test(given=given):
            answer = await acme.client.post(
                "/v1/chat/completions",
                json={"model": BASE, "messages": [{"role": "user", "content": "x"}]},
                headers=[(b"x-request-id", given.encode())],
            )
            assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_errors_carry_the_request_id(acme: Tenant) -> None:
    """A tenant that asks for help can name its request."""
    for body in ({"model": "none", "messages": []}, {"model": BASE}):
        answer = await acme.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
        assert answer.status_code in (400, 404)
        assert answer.headers["x-request-id"] == "mine-1"


async def test_a_declared_fallback_answers_and_says_so(
    acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """`base`: the base model; `previous`: the version before; `fail`, the default: 503. Never silently."""
    first = (await acme.publish(good)).json()["current"]["digest"]
    assert (await acme.ask()).status_code == 200
    replica.faults.load_status = 422  # before the publish, which loads the new version where the old one is
    await acme.publish(other_good)
    refused = await acme.ask()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "adapter_unavailable")
    for fallback, said, version in (("base", "I am the base", "base;"), ("previous", f"I am {first}", "1;")):
        changed = await acme.client.patch("/v1/adapters/bot", json={"fallback": fallback})
        assert changed.status_code == 200, changed.text
        answer = await acme.ask()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == said
        assert answer.headers["x-tailor-fallback"] == fallback
        assert answer.headers["x-tailor-version"].startswith(version)
    replica.faults.load_status = None
    answer = await acme.ask()
    assert "x-tailor-fallback" not in answer.headers
    assert answer.headers["x-tailor-version"].startswith("2;")


async def test_a_fallback_answers_for_what_is_loaded_and_not_there(
    acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """Loads succeed, and the engine says twice that it does not hold the adapter: as good as a load that failed."""
    first = (await acme.publish(good)).json()["current"]["digest"]
    assert (await acme.ask()).status_code == 200
    replica.faults.load_absent = True
    await acme.publish(other_good)
    refused = await acme.ask()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "adapter_unavailable")
    assert "x-tailor-fallback" not in refused.headers
    for stream in (False, True):
        for fallback, said, version in (("base", "I am the base", "base;"), ("previous", f"I am {first}", "1;")):
            assert (await acme.client.patch("/v1/adapters/bot", json={"fallback": fallback})).status_code == 200
            loads = len(replica.loads)
            answer = await acme.ask(stream=stream)
            assert answer.status_code == 200, answer.text
            assert said in answer.text
            assert answer.headers["x-tailor-fallback"] == fallback
            assert answer.headers["x-tailor-version"].startswith(version)
            assert len(replica.loads) == loads + 2
    replica.adapters.clear()  # who stands in is not there either: nobody stands in for it
    assert (await acme.ask()).status_code == 503


async def test_who_stands_in_is_counted_though_it_fails_too(
    acme: Tenant, good: Path, other_good: Path, replica: FakeReplica, gateway: Gateway
) -> None:
    """Whose version the engine has lost, and can load no more, goes to the version before: it is that one's then."""
    await acme.publish(good)
    await acme.publish(other_good)
    await acme.client.patch("/v1/adapters/bot", json={"fallback": "previous"})
    assert (await acme.ask()).headers["x-tailor-version"].startswith("2;")
    replica.adapters.clear()
    replica.faults.load_status = 422
    assert (await acme.ask()).status_code == 503
    await gateway.parts.ledger.flush()
    async with reading(gateway.parts.engine) as connection:
        rows = (await connection.execute(select(counted.c.version, counted.c.requests, counted.c.failed))).all()
    assert sorted(tuple(row) for row in rows) == [(1, 1, 1), (2, 1, 0)]


async def test_limits_are_told_with_every_answer(acme: Tenant, gateway: Gateway) -> None:
    """OpenAI's headers on a good answer, Retry-After on a refused one."""
    await plan_of(gateway, acme, requests_per_minute=2, tokens_per_minute=10_000)
    answers = [await acme.ask(BASE, max_tokens=8) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert int(answers[0].headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert error_of(answers[2])["code"] == "rate_limit_exceeded"
    assert int(answers[2].headers["retry-after"]) >= 1


async def test_token_ids_are_reserved_by_their_number(acme: Tenant, gateway: Gateway) -> None:
    """However many digits they have; of a text, each four bytes of the body are reserved as one."""
    await plan_of(gateway, acme, tokens_per_minute=100_000)
    left = 100_000
    for ids in ([7] * 26_000, [123_456] * 26_000):
        told = await acme.client.post("/v1/completions", json={"model": BASE, "prompt": ids, "max_tokens": 10})
        assert told.status_code == 200
        assert abs(int(told.headers["x-ratelimit-remaining-tokens"]) - (left - 26_010)) < 6_000  # time gives some back
        left = 100_000 - told.json()["usage"]["total_tokens"]
    text = await acme.client.post("/v1/completions", json={"model": BASE, "prompt": "word " * 16_000, "max_tokens": 10})
    assert abs(int(text.headers["x-ratelimit-remaining-tokens"]) - (left - 20_030)) < 6_000


async def test_a_tenant_at_its_limit_is_refused_before_its_request_is_read(acme: Tenant, gateway: Gateway) -> None:
    """A body that is no JSON is not looked at: the answer is the limit's, with its headers."""
    await plan_of(gateway, acme, requests_per_minute=2)
    broken = [await acme.client.post("/v1/chat/completions", content=b"{") for _ in range(3)]
    assert [answer.status_code for answer in broken] == [400, 400, 400]
    good = [await acme.ask(BASE, max_tokens=8) for _ in range(3)]
    assert [answer.status_code for answer in good] == [200, 200, 429]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/tokenize"):
        held = await acme.client.post(path, content=b"{")
        assert held.status_code == 429
        assert held.headers["x-ratelimit-remaining-requests"] == "0"
        assert abs(int(held.headers["retry-after"]) - int(good[2].headers["retry-after"])) <= 1


async def test_a_plan_bounds_one_request(acme: Tenant, gateway: Gateway, replica: FakeReplica) -> None:
    """Its own max_tokens above the plan's is told; one that was not set is cut; a prompt too large is refused."""
    await plan_of(gateway, acme, max_output_tokens=16, max_prompt_bytes=2_000)
    assert error_of(await acme.ask(BASE, max_tokens=17))["param"] == "max_tokens"
    assert (await acme.ask(BASE)).status_code == 200
    assert replica.requests[-1]["body"]["max_tokens"] == 16
    large = await acme.ask(BASE, messages=[{"role": "user", "content": "x" * 2_000}])
    assert (large.status_code, error_of(large)["code"]) == (413, "request_too_large")


async def test_requests_are_counted_as_the_engine_counts_them(
    acme: Tenant, good: Path, gateway: Gateway, replica: FakeReplica
) -> None:
    """Whole answers, streams, refusals, streams that break and clients that leave: the ledger is the engine's count."""
    await acme.publish(good)
    for _ in range(3):
        assert (await acme.ask()).status_code == 200
        assert (await acme.ask(stream=True)).status_code == 200
    replica.faults.die_after_events = 2
    await acme.ask(stream=True)
    replica.faults.die_after_events = None
    replica.faults.status = 400
    assert (await acme.ask()).status_code == 400
    replica.faults.status = None
    replica.events, replica.faults.event_delay_s = 200, 0.01
    for _ in range(3):
        async with acme.client.stream("POST", "/v1/chat/completions", json=streaming()) as response:
            lines = response.aiter_lines()
            for _ in range(8):
                await anext(lines)
    async with asyncio.timeout(10):
        while (counted := await usage(gateway))["requests"] < 11:  # the engine is asked for the last ones
            await asyncio.sleep(0.02)
    assert counted["requests"] == 11
    assert counted["failed"] == 2
    assert counted["completion_tokens"] == sum(served.completion_tokens for served in replica.served)


async def test_a_stream_that_its_client_leaves_gives_everything_back(
    acme: Tenant, good: Path, gateway: Gateway, replica: FakeReplica
) -> None:
    """Concurrency, adapter slot and connection are free again, and the tokens not used are returned."""
    await plan_of(gateway, acme, concurrent_requests=1, tokens_per_minute=100_000)
    await acme.publish(good)
    replica.events, replica.faults.event_delay_s = 500, 0.01
    for _ in range(3):
        async with acme.client.stream("POST", "/v1/chat/completions", json=streaming()) as response:
            assert response.status_code == 200
            await anext(response.aiter_lines())
        await until(lambda: all(member.replica.load == 0 for member in gateway.parts.pool.members()))
    assert replica.in_flight == 0
    replica.events = 4
    last = await acme.ask(max_tokens=4)
    assert last.status_code == 200
    assert int(last.headers["x-ratelimit-remaining-tokens"]) > 95_000


async def test_pipelined_requests_are_answered_in_order(acme: Tenant, gateway: Gateway) -> None:
    """Three requests in one write, on the short way and on FastAPI's, get their answers one after the other."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model": "base", "messages": [{"role": "user", "content": "x"}]}'
    chat = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nx-request-id: %b\r\n"
        b"content-length: %d\r\n\r\n%b"
    )
    key = acme.key.encode()
    health = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: health\r\n\r\n"
    writer.write(chat % (key, b"one", len(body), body) + health + chat % (key, b"two", len(body), body))
    seen = []
    for _ in range(3):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200"), head
        found = re.search(r"x-request-id: (\w+)", head)
        assert found is not None
        seen.append(found[1])
        length = re.search(r"content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
    assert seen == ["one", "health", "two"]
    writer.close()


async def test_a_body_is_waited_for_and_continued(acme: Tenant, gateway: Gateway) -> None:
    """`Expect: 100-continue` is answered once the key is known; a body in pieces is put together."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model": "base", "messages": [{"role": "user", "content": "x"}]}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nexpect: 100-continue\r\n"
        b"content-length: %d\r\n\r\n" % (acme.key.encode(), len(body))
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    for place in range(0, len(body), 10):
        writer.write(body[place : place + 10])
        await writer.drain()
        await asyncio.sleep(0.01)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_slow_reader_holds_the_engine_not_a_pile_of_bytes(
    acme: Tenant, gateway: Gateway, replica: FakeReplica
) -> None:
    """What the gateway keeps for a client that does not read stays below 256 KiB a side."""
    replica.events = 60_000
    host, port = gateway.url.removeprefix("http://").split(":")
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    small.setblocking(False)
    await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=small, limit=1_024)
    body = b'{"model": "base", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
        % (acme.key.encode(), len(body), body)
    )
    await reader.readuntil(b"\r\n\r\n")

    def held() -> int:
        sizes: list[int] = [each.transport.get_write_buffer_size() for each in gateway.parts.connections]
        return max(sizes)

    await until(lambda: held() > 0)
    most = 0
    for _ in range(40):
        await asyncio.sleep(0.025)
        most = max(most, held())
    assert 0 < most < 262_144
    writer.close()


def streaming() -> dict[str, Any]:
    return {"model": "bot", "stream": True, "max_tokens": 250, "messages": [{"role": "user", "content": "x"}]}
