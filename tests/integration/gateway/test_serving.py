"""Requests through the whole gateway to a replica and back."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapter_store.ids import TenantId
from gateway.limits.memory import MemoryLimits
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, Tenant, error_of, until_ready


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    said: str = response.json()["choices"][0]["message"]["content"]
    return said


async def events(tenant: Tenant, **more: object) -> list[str]:
    """The data of every event of a streamed answer."""
    body = {"model": "bot", "messages": [{"role": "user", "content": "x"}], "stream": True, **more}
    async with tenant.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        return [line[6:] async for line in response.aiter_lines() if line]


async def test_an_adapter_answers_right_after_its_upload(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """The first request for a published adapter loads it; the next one does not."""
    published = await acme.publish(good)
    assert published.status_code == 201, published.text
    digest = published.json()["current"]["digest"]
    assert content(await acme.ask()) == f"I am {digest}"
    assert content(await acme.ask()) == f"I am {digest}"
    assert len(replica.loads) == 1


async def test_the_engine_sees_opaque_names_and_gateway_fields_only(
    acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Model, salt and request id are the gateway's; what the client says of itself stays behind."""
    await acme.publish(good)
    await acme.ask(user="mallory", metadata={"a": "b"})
    (asked,) = replica.requests
    assert asked["body"]["model"] == asked["headers"]["x-tailor-adapter"] == replica.loads[0]
    assert len(asked["body"]["cache_salt"]) == 64
    assert asked["body"]["max_tokens"] == replica.max_model_len
    assert not {"user", "metadata"} & set(asked["body"])
    assert set(asked["headers"]) == {
        "host", "authorization", "accept", "content-type", "content-length", "x-request-id", "x-tailor-adapter",
        "x-vllm-priority",
    }  # fmt: skip


async def test_tenants_never_share_a_salt_or_an_engine_name(
    acme: Tenant, globex: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Equal bytes under equal names are two adapters, loaded twice, with two salts."""
    for tenant in (acme, globex):
        await tenant.publish(good)
        await tenant.ask()
    first, second = replica.requests
    assert first["body"]["model"] != second["body"]["model"]
    assert first["body"]["cache_salt"] != second["body"]["cache_salt"]


async def test_a_foreign_adapter_looks_like_one_that_never_existed(acme: Tenant, globex: Tenant, good: Path) -> None:
    """Status and body are the same, but for the name asked for; so with every call that names an adapter."""
    await acme.publish(good)
    asks: list[Callable[[str], Awaitable[httpx.Response]]] = [
        globex.ask,
        lambda name: globex.client.get(f"/v1/adapters/{name}"),
        lambda name: globex.client.delete(f"/v1/adapters/{name}"),
        lambda name: globex.client.get(f"/v1/models/{name}"),
    ]
    for ask in asks:
        foreign, missing = await ask("bot"), await ask("nil")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace("bot", "nil") == missing.text
    assert content(await acme.ask()).startswith("I am ")


async def test_the_base_model_is_served_by_its_name(acme: Tenant, replica: FakeReplica) -> None:
    """Base traffic goes to the engine under the base's own name."""
    assert content(await acme.ask(BASE)) == "I am the base"
    assert replica.requests[0]["body"]["model"] == BASE


async def test_base_traffic_goes_through_the_null_adapter_where_there_is_one(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """A CPU replica's null adapter carries it, and its name stays hidden."""
    replica = await run_replica(null_adapter="a-00000000")
    acme = await (await run_gateway(replica)).tenant("acme")
    answer = await acme.ask(BASE)
    assert content(answer) == "I am the base"
    assert replica.requests[0]["body"]["model"] == "a-00000000"
    assert answer.json()["model"] == BASE


async def test_no_engine_on_a_cpu_is_asked_for_logprobs_of_a_prompt(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Whatever the operator allows: such a request ends vLLM there for all."""
    chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    plain = {"model": BASE, "prompt": "x"}
    asked: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("/v1/chat/completions", chat, {"prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/chat/completions", chat, {"echo": True}, "echo"),
        ("/v1/completions", plain, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", plain, {"echo": True, "logprobs": 0}, "echo"),
    ]
    on_cpu = await run_replica(null_adapter="a-00000000")
    acme = await (await run_gateway(on_cpu, allowed_fields=("echo", "prompt_logprobs"))).tenant("acme")
    for path, body, more, field in asked:
        answer = await acme.client.post(path, json={**body, **more})
        refused = error_of(answer)
        assert (answer.status_code, refused["param"], refused["code"]) == (400, field, "unsupported_parameter")
    assert on_cpu.requests == []
    harmless: list[dict[str, Any]] = [{"echo": True}, {"echo": False, "logprobs": 1}, {"logprobs": 1}]
    for more in harmless:
        assert (await acme.client.post("/v1/completions", json={**plain, **more})).status_code == 200


async def test_an_engine_on_a_gpu_is_asked_for_logprobs_of_a_prompt(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Where the operator allows it."""
    replica = await run_replica()
    acme = await (await run_gateway(replica, allowed_fields=("echo",))).tenant("acme")
    answer = await acme.client.post("/v1/completions", json={"model": BASE, "prompt": "x", "echo": True, "logprobs": 0})
    assert answer.status_code == 200
    assert replica.requests[0]["body"]["echo"] is True


async def test_a_stream_is_whole_and_names_the_tenants_model(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """Events come as they are sent, under the tenant's name, without the usage that was not asked for."""
    await acme.publish(good)
    got = await events(acme)
    assert got[-1] == "[DONE]"
    chunks = [json.loads(event) for event in got[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"bot"}
    assert len(chunks) == replica.events + 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_with_a_stream_when_asked_for(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """OpenAI's stream_options.include_usage adds one last chunk without choices."""
    await acme.publish(good)
    got = await events(acme, stream_options={"include_usage": True})
    assert json.loads(got[-2])["usage"]["completion_tokens"] == replica.events


async def test_the_openai_client_streams(acme: Tenant, good: Path, gateway: Gateway) -> None:
    """The official client needs no more than another base URL."""
    await acme.publish(good)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=acme.key) as client:
        stream = await client.chat.completions.create(
            model="bot", messages=[{"role": "user", "content": "x"}], stream=True
        )
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said.startswith("I am ")
        assert [model.id async for model in client.models.list()] == [BASE, "bot"]


async def test_a_new_version_answers_from_the_upload_on(
    acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """The name moves to the new version; the old one stays reachable by number."""
    first = (await acme.publish(good)).json()["current"]
    assert content(await acme.ask()) == f"I am {first['digest']}"
    second = (await acme.publish(other_good)).json()["current"]
    assert (first["number"], second["number"]) == (1, 2)
    assert content(await acme.ask()) == f"I am {second['digest']}"
    assert content(await acme.ask("bot@1")) == f"I am {first['digest']}"
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    assert [version["number"] for version in shown["versions"]] == [2, 1]


async def test_a_deleted_adapter_is_gone_everywhere(
    acme: Tenant, good: Path, gateway: Gateway, replica: FakeReplica
) -> None:
    """No answer, no row, no file, no place in the engine."""
    await acme.publish(good)
    await acme.ask()
    assert (await acme.client.delete("/v1/adapters/bot")).status_code == 200
    assert (await acme.ask()).status_code == 404
    assert replica.adapters == {}
    assert (await acme.client.get("/v1/adapters")).json()["data"] == []
    assert gateway.shelf.keys() == []


async def test_a_change_at_one_gateway_reaches_the_other_within_a_second(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path
) -> None:
    """Publishing, deleting and revoking work across gateways on one database."""
    here, there = await run_gateway(replica), await run_gateway(replica)
    acme = await here.tenant("acme")
    elsewhere = Tenant("acme", acme.key, there.client(acme.key))
    first = (await acme.publish(good)).json()["current"]["digest"]
    assert content(await elsewhere.ask()) == f"I am {first}"
    second = (await acme.publish(other_good)).json()["current"]["digest"]
    async with asyncio.timeout(5):  # half a second is promised; a slow machine gets more
        while content(await elsewhere.ask()) != f"I am {second}":
            await asyncio.sleep(0.05)
    (key,) = (await here.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    assert (await here.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
    assert (await acme.ask()).status_code == 401
    async with asyncio.timeout(5):
        while (await elsewhere.ask()).status_code != 401:
            await asyncio.sleep(0.05)


async def test_many_first_requests_are_one_load(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """Loads are single-flight."""
    replica.faults.load_delay_s = 0.2
    await acme.publish(good)
    answers = await asyncio.gather(*(acme.ask() for _ in range(20)))
    assert {content(answer) for answer in answers} == {content(answers[0])}
    assert len(replica.loads) == 1


async def test_a_client_that_leaves_cancels_upstream(run_gateway: RunGateway, good: Path, replica: FakeReplica) -> None:
    """Streaming or not, the engine stops working for nobody; a whole answer has its time to end first."""
    acme = await (await run_gateway(replica, hear_out_s=0.5)).tenant("acme")
    await acme.publish(good)
    await acme.ask()
    replica.faults.hang_before_answer = True
    with pytest.raises(httpx.ReadTimeout):
        await acme.client.post(
            "/v1/chat/completions",
            json={"model": "bot", "messages": [{"role": "user", "content": "x"}]},
            timeout=httpx.Timeout(30, read=0.3),
        )
    assert replica.cancelled == 0
    await _until(lambda: replica.cancelled == 1)
    replica.faults.hang_before_answer = False
    replica.faults.event_delay_s, replica.events = 0.05, 200
    body = {"model": "bot", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with acme.client.stream("POST", "/v1/chat/completions", json=body) as response:
        await anext(response.aiter_lines())
    await _until(lambda: replica.cancelled == 2)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("size", [100_000, 900_000])
async def test_a_client_that_leaves_behind_a_large_body_cancels_upstream(
    run_gateway: RunGateway, replica: FakeReplica, size: int, stream: bool
) -> None:
    """Reading, which pauses while a large body comes, goes on once that is whole, or nobody sees the client leave."""
    acme = await (await run_gateway(replica, hear_out_s=0.1)).tenant("acme")
    replica.faults.hang_before_answer = True
    with pytest.raises(httpx.ReadTimeout):
        await acme.client.post(
            "/v1/chat/completions",
            json={"model": BASE, "messages": [{"role": "user", "content": "x" * size}], "stream": stream},
            timeout=httpx.Timeout(30, read=0.5),
        )
    await _until(lambda: replica.cancelled == 1)


@pytest.mark.parametrize(
    ("hear_out_s", "context", "asked", "counted"),
    [(60, 8_192, {"max_tokens": 200}, None), (0.1, 8_192, {"max_tokens": 200}, 200), (0.1, 2_000, {}, None)],
    ids=["heard out", "stopped", "stopped, of no length"],
)
async def test_a_whole_answer_whose_client_has_left_is_counted(
    run_gateway: RunGateway,
    run_replica: RunReplica,
    hear_out_s: float,
    context: int,
    asked: dict[str, int],
    counted: int | None,
) -> None:
    """As the engine counted it; where it did not end in time, as the most it could have given.

    That is what was reserved, or what the context still held.
    """
    replica = await run_replica(max_model_len=context)
    gateway = await run_gateway(replica, hear_out_s=hear_out_s, usage_flush_s=0.05)
    await gateway.operator.post("/admin/v1/plans", json={"name": "month", "tokens_per_month": 100_000})
    acme = await gateway.tenant("acme")
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "month"})
    hears_out = hear_out_s > 1
    replica.faults.latency_s = 1.0 if hears_out else 30.0
    body = {"model": BASE, **asked, "messages": [{"role": "user", "content": "x" * 4_000}]}
    with pytest.raises(httpx.ReadTimeout):
        await acme.client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.3))

    async def told() -> list[dict[str, Any]]:
        return list((await acme.client.get("/v1/usage")).json()["data"])

    async with asyncio.timeout(10):
        while not (rows := await told()):
            await asyncio.sleep(0.05)
    used = (rows[0]["prompt_tokens"], rows[0]["completion_tokens"])
    if hears_out:
        assert used == (replica.served[0].prompt_tokens, replica.served[0].completion_tokens)
    else:
        prompt = len(json.dumps(body, separators=(",", ":"))) // 4
        assert used == (prompt, counted or context - prompt)
    assert (rows[0]["requests"], rows[0]["failed"]) == (1, 0)
    limits = gateway.parts.limits
    assert isinstance(limits, MemoryLimits)
    assert [account.used for account in limits._tenants.values()] == [sum(used)]


@pytest.mark.parametrize("silence", ["head_then_nothing", "hang_before_answer"])
async def test_a_stream_left_before_its_first_token_counts_its_prompt(
    run_gateway: RunGateway, replica: FakeReplica, silence: str
) -> None:
    """Nothing of the answer that was never begun, in the ledger or in the limits."""
    replica.max_model_len = 8_192
    gateway = await run_gateway(replica, hear_out_s=0.2, usage_flush_s=0.05)
    await gateway.operator.post("/admin/v1/plans", json={"name": "month", "tokens_per_month": 100_000})
    acme = await gateway.tenant("acme")
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "month"})
    setattr(replica.faults, silence, True)
    body = {"model": BASE, "max_tokens": 200, "stream": True, "messages": [{"role": "user", "content": "x" * 4_000}]}
    with pytest.raises(httpx.ReadTimeout):
        await acme.client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.3))
    async with asyncio.timeout(10):
        while not (rows := (await acme.client.get("/v1/usage")).json()["data"]):
            await asyncio.sleep(0.05)
    prompt = len(json.dumps(body, separators=(",", ":"))) // 4
    assert (rows[0]["requests"], rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (1, prompt, 0)
    limits = gateway.parts.limits
    assert isinstance(limits, MemoryLimits)
    assert [account.used for account in limits._tenants.values()] == [prompt]


async def test_an_adapter_that_the_replica_forgot_is_loaded_again(
    acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """The replica is the owner of what is resident: its 404 means load afresh, under a new name."""
    await acme.publish(good)
    await acme.ask()
    replica.adapters.clear()
    assert content(await acme.ask()).startswith("I am ")
    assert len(set(replica.loads)) == 2


async def test_a_restarted_replica_gets_its_adapters_back_before_it_takes_traffic(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """After a crash nobody has to call anything: the first request afterwards finds the adapter loaded."""
    await acme.publish(good)
    await acme.ask()
    await replica.stop()
    gone = await acme.ask()
    assert gone.status_code == 503
    assert int(gone.headers["retry-after"]) >= 1
    assert error_of(gone)["code"] == "engine_unavailable"
    replica.loads.clear()
    await replica.restart()
    await until_ready(gateway)
    assert len(replica.loads) == 1
    assert content(await acme.ask()).startswith("I am ")


async def test_a_second_replica_takes_over_unheard_requests(
    run_replica: RunReplica, run_gateway: RunGateway, good: Path
) -> None:
    """A request whose replica is gone before its first byte is answered by another one."""
    replicas = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*replicas, probe_interval_s=5)
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    await _until(lambda: len([s for s in gateway.parts.pool.states().values() if s.value == "ready"]) == 2)
    await acme.ask()
    (used,) = [replica for replica in replicas if replica.requests]
    await used.stop()
    assert content(await acme.ask()).startswith("I am ")


@pytest.mark.parametrize("fault", ["die_after_events", "error_event_after", "garble_after"])
async def test_a_stream_that_breaks_ends_in_one_error_event(
    acme: Tenant, good: Path, replica: FakeReplica, fault: str
) -> None:
    """What came is whole events; then one error in OpenAI's form, no [DONE], no word of the engine's own."""
    await acme.publish(good)
    setattr(replica.faults, fault, 2)
    got = await events(acme)
    assert len(got) == 3
    assert [json.loads(event)["choices"][0]["delta"]["content"][:4] for event in got[:2]] == ["I am", "."]
    assert set(json.loads(got[2])["error"]) == {"message", "type", "param", "code"}
    assert "CUDA" not in got[2]


@pytest.mark.parametrize("field", [{"logit_bias": {"3": 1, "400": 1}}, {"stop_token_ids": [400, 3]}], ids=str)
async def test_a_token_id_that_the_engine_has_not_is_refused(
    run_gateway: RunGateway, run_replica: RunReplica, field: dict[str, Any]
) -> None:
    """Before the engine is asked, which would look only when it streams; the highest one that there is passes."""
    replica = await run_replica(vocab_size=400)
    acme = await (await run_gateway(replica)).tenant("acme")
    prompts: Any = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
    }
    for path, prompt in prompts.items():
        for stream in (False, True):
            body = {"model": BASE, "stream": stream, **prompt}
            refused = await acme.client.post(path, json={**body, **field})
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == next(iter(field))
            assert "vocabulary" in refused.json()["error"]["message"]
            known = json.loads(json.dumps(field).replace("400", "399"))
            assert (await acme.client.post(path, json={**body, **known})).status_code == 200
    assert replica.request_count == 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_what_an_engine_refuses_within_a_stream_is_the_requests_fault(
    run_gateway: RunGateway, run_replica: RunReplica, path: str
) -> None:
    """A 400 that names the field; no other engine is asked, none leaves rotation, and nothing stays reserved."""
    replicas = [await run_replica(), await run_replica()]
    for replica in replicas:
        replica.faults.error_event_after = 0
        replica.faults.error_event = json.dumps(
            {"error": {"message": "out-of-vocab: 7 /opt/vllm", "type": "x", "param": "logit_bias", "code": 400}}
        ).encode()
    gateway = await run_gateway(*replicas)
    made = await gateway.operator.post("/admin/v1/plans", json={"name": "small", "tokens_per_minute": 10_000})
    assert made.status_code == 201, made.text
    acme = await gateway.tenant("acme")
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "small"})
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body = {"model": BASE, "stream": True, "logit_bias": {"7": 1}, "max_tokens": 100, **prompt}
    for _ in range(8):
        refused = await acme.client.post(path, json=body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("logit_bias", "invalid_value")
        assert "vocabulary" in error["message"]
        assert "/opt" not in refused.text
        assert int(refused.headers["x-ratelimit-remaining-tokens"]) > 9_500
    assert sum(replica.request_count for replica in replicas) == 8
    assert {state.value for state in gateway.parts.pool.states().values()} == {"ready"}


async def test_a_frozen_engine_leaves_rotation(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """`/health` may say what it likes: without a token in time no request goes there."""
    gateway = await run_gateway(replica, probe_deadline_s=1.0)
    acme = await gateway.tenant("acme")
    replica.faults.probe_hangs = True
    await _until(lambda: all(state.value == "unreachable" for state in gateway.parts.pool.states().values()))
    assert (await acme.ask(BASE)).status_code == 503
    assert (await gateway.client().get("/ready")).status_code == 503
    replica.faults.probe_hangs = False
    await until_ready(gateway)
    assert (await acme.ask(BASE)).status_code == 200


async def test_an_engine_that_serves_another_base_gets_nothing(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """The fingerprint decides, not the name."""
    replica = await run_replica()
    replica.fingerprint = "0" * 64
    gateway = await run_gateway()
    assert gateway.parts.pool.states() == {}
    other = await run_gateway(replicas=(replica.url,))
    await _until(lambda: [s.value for s in other.parts.pool.states().values()] == ["mismatched"])
    assert (await (await other.tenant("acme")).ask(BASE)).status_code == 503


@pytest.mark.parametrize(("status", "code"), [(503, "adapter_unavailable"), (422, "adapter_unavailable")])
async def test_a_refused_load_is_told_and_tried_again(
    acme: Tenant, good: Path, replica: FakeReplica, status: int, code: str
) -> None:
    """The client gets 503 with Retry-After; once the engine takes it, the adapter answers."""
    await acme.publish(good)
    replica.faults.load_status = status
    refused = await acme.ask()
    assert (refused.status_code, error_of(refused)["code"]) == (503, code)
    assert "retry-after" in refused.headers
    replica.faults.load_status = None
    assert content(await acme.ask()).startswith("I am ")


async def test_no_text_of_the_engine_reaches_a_tenant(acme: Tenant, replica: FakeReplica) -> None:
    """Paths and inner names in an engine's error stay inside."""
    for status, expected in ((500, 503), (400, 400), (429, 503), (503, 503)):
        replica.faults.status = status
        answer = await acme.ask(BASE)
        assert answer.status_code == expected
        assert "/secret" not in answer.text
        assert "a-0000" not in answer.text


@pytest.mark.local
async def test_resolving_a_known_model_costs_no_query(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """The hot path touches no database: it answers with the database gone."""
    await acme.publish(good)
    await acme.ask()
    tenant_id = TenantId((await gateway.operator.get("/admin/v1/tenants")).json()["data"][0]["id"])
    await gateway.parts.changes.catch_up()  # what the upload has changed is taken in, and asked for no more
    assert await gateway.parts.models.resolve(tenant_id, "bot")
    await gateway.parts.engine.dispose()
    (gateway.home.path / "tailor.db").rename(gateway.home.path / "away.db")
    assert content(await acme.ask()).startswith("I am ")


async def _until(holds: Callable[[], bool], deadline_s: float = 10) -> None:
    async with asyncio.timeout(deadline_s):
        while not holds():
            await asyncio.sleep(0.02)
