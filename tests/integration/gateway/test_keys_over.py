"""What runs when its key is over: revoked, expired, or its tenant suspended."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from adapter_store.transactions import reading
from gateway.database import usage as counted
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant, error_of
from tests.waiting import until

EFFECTIVE_S = 5.0
SAID = [{"role": "user", "content": "who are you?"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "who are you?"},
    "/v1/messages": {"messages": SAID, "max_tokens": 200},
    "/v1/responses": {"input": "who are you?"},
}


async def new_key(gateway: Gateway, tenant: str, **more: Any) -> dict[str, Any]:
    made = await gateway.operator.post(f"/admin/v1/tenants/{tenant}/keys", json=more)
    assert made.status_code == 201, made.text
    return dict(made.json())


async def end(gateway: Gateway, how: str, key: dict[str, Any]) -> None:
    if how == "revoked":
        assert (await gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
    elif how == "suspended":
        suspended = await gateway.operator.patch("/admin/v1/tenants/acme", json={"suspended": True})
        assert suspended.status_code == 200


def slow(replica: FakeReplica) -> None:
    """An answer takes 60 s, an event at a time."""
    replica.events, replica.faults.event_delay_s = 600, 0.1


async def begun(lines: AsyncIterator[str]) -> None:
    async for line in lines:
        if "I am the base" in line:
            return
    raise AssertionError("the stream has ended")


async def rest_of(lines: AsyncIterator[str]) -> list[str]:
    async with asyncio.timeout(30):
        return [line async for line in lines if line]


@pytest.mark.parametrize("how", ["revoked", "suspended", "expired"])
async def test_a_running_stream_ends_with_its_key(
    gateway: Gateway, acme: Tenant, globex: Tenant, replica: FakeReplica, how: str
) -> None:
    """In an error event, on the engine too; those of other tenants, and of a tenant's other keys, go on."""
    slow(replica)
    lasts_s = 6
    key = await new_key(gateway, "acme", **({"expires_at": int(time.time()) + lasts_s} if how == "expired" else {}))
    asked = {"model": BASE, "messages": SAID, "stream": True}
    path = "/v1/chat/completions"
    async with (
        gateway.client(key["secret"]).stream("POST", path, json=asked) as ending,
        acme.client.stream("POST", path, json=asked) as beside,
        globex.client.stream("POST", path, json=asked) as other,
    ):
        ends, goes_on = ending.aiter_lines(), (beside if how != "suspended" else other).aiter_lines()
        await begun(ends)
        await begun(goes_on)
        begin = time.monotonic()
        await end(gateway, how, key)
        rest = await rest_of(ends)
        took_s = time.monotonic() - begin
        assert took_s < EFFECTIVE_S + (lasts_s if how == "expired" else 0)
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
        assert not any("[DONE]" in line for line in rest)
        await until(lambda: replica.cancelled == (2 if how == "suspended" else 1))
        for _ in range(20):
            assert "error" not in await anext(goes_on)
    async with asyncio.timeout(10):  # their engine is asked first what they used
        while await failed(gateway) != (2 if how == "suspended" else 1):
            await asyncio.sleep(0.02)


async def failed(gateway: Gateway) -> int:
    """Failed requests, as the ledger has them."""
    await gateway.parts.ledger.flush()
    async with reading(gateway.parts.engine) as connection:
        rows = (await connection.execute(select(counted.c.tenant_id, counted.c.requests, counted.c.failed))).all()
    return sum(row.failed for row in rows)


async def test_every_dialect_tells_a_running_stream_in_its_own_words(
    gateway: Gateway, acme: Tenant, replica: FakeReplica
) -> None:
    """The last event is an error, and no end mark follows."""
    slow(replica)
    key = await new_key(gateway, "acme")
    client = gateway.client(key["secret"])

    async def last_events(path: str, asked: dict[str, Any], has_begun: asyncio.Event) -> list[str]:
        async with client.stream("POST", path, json={"model": BASE, "stream": True, **asked}) as answer:
            lines = answer.aiter_lines()
            await begun(lines)
            has_begun.set()
            return await rest_of(lines)

    marks = [asyncio.Event() for _ in STREAMS]
    streams = [
        asyncio.create_task(last_events(path, asked, mark))
        for (path, asked), mark in zip(STREAMS.items(), marks, strict=True)
    ]
    await asyncio.gather(*(mark.wait() for mark in marks))
    await end(gateway, "revoked", key)
    chat, completion, message, response = await asyncio.gather(*streams)
    for rest in (chat, completion):
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    assert message[-2] == response[-2] == "event: error"
    assert json.loads(message[-1].removeprefix("data: "))["error"]["type"] == "authentication_error"
    assert json.loads(response[-1].removeprefix("data: "))["code"] == "invalid_api_key"
    assert not any("[DONE]" in line or "_stop" in line or "completed" in line for line in chat + message + response)


async def test_a_running_stream_ends_at_every_gateway(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Also where the key was revoked at another."""
    slow(replica)
    here, there = await run_gateway(replica), await run_gateway(replica)
    await here.tenant("acme")
    key = await new_key(here, "acme")
    asked = {"model": BASE, "messages": SAID, "stream": True}
    async with there.client(key["secret"]).stream("POST", "/v1/chat/completions", json=asked) as answer:
        lines = answer.aiter_lines()
        await begun(lines)
        begin = time.monotonic()
        await end(here, "revoked", key)
        rest = await rest_of(lines)
        assert time.monotonic() - begin < EFFECTIVE_S
        assert "invalid_api_key" in rest[-1]


async def test_a_whole_answer_that_has_not_begun_is_refused(
    gateway: Gateway, acme: Tenant, replica: FakeReplica
) -> None:
    """With the status that the key's next request has; the engine stops."""
    replica.faults.hang_before_answer = True
    key = await new_key(gateway, "acme")
    asked = {"model": BASE, "messages": SAID}
    answer = asyncio.create_task(gateway.client(key["secret"]).post("/v1/chat/completions", json=asked))
    await until(lambda: replica.in_flight == 1)
    begin = time.monotonic()
    await end(gateway, "revoked", key)
    refused: httpx.Response = await answer
    assert time.monotonic() - begin < EFFECTIVE_S
    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    await until(lambda: replica.cancelled == 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/tokenize"])
async def test_who_waits_for_a_place_is_asked_for_the_key_again(
    run_gateway: RunGateway, replica: FakeReplica, path: str
) -> None:
    """No engine is asked for it, though its place is free the moment after the key was revoked."""
    gateway = await run_gateway(replica, replica_concurrency=1, hear_out_s=0)
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    replica.faults.hang_before_answer = True
    running = asyncio.create_task(globex.ask(BASE))
    await until(lambda: replica.in_flight == 1)
    waiting = asyncio.create_task(acme.client.post(path, json={"model": BASE, "messages": SAID}))
    [member] = gateway.parts.pool.members()
    await until(lambda: member.replica.gate.waiting == 1)
    (key,) = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    await end(gateway, "revoked", key)
    running.cancel()
    refused: httpx.Response = await waiting
    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert replica.request_count == 1
    assert member.replica.gate.load == 0
