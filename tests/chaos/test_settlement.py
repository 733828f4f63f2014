"""What limits and ledger say of requests that failed or were left: the same, and what the engine counted."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from gateway.limits.memory import MemoryLimits
from gateway.limits.redis import RedisLimits
from gateway.settings import Settings
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import TOKEN, FakeReplica, Faults
from tests.chaos.client import BREAKS, DIALECTS, Client, request
from tests.chaos.conftest import NewClient
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, Tenant, serving, until_ready
from tests.servers import redis_server
from tests.waiting import until

SILENCES = ("hang_before_answer", "head_then_nothing")


@pytest.fixture
async def replica(run_replica: RunReplica) -> FakeReplica:
    return await run_replica()


@pytest.fixture(params=["memory", "redis"])
def redis_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "memory":
        yield None
        return
    with redis_server() as server:
        yield server.url


@pytest.mark.parametrize(("silent", "first_byte_s"), [(False, 300), (True, 0.3)], ids=["breaks", "silences"])
async def test_limits_and_ledger_agree_on_every_failure(
    run_gateway: RunGateway,
    run_replica: RunReplica,
    new_client: NewClient,
    redis_url: str | None,
    silent: bool,
    first_byte_s: float,
) -> None:
    """In every dialect, however an engine fails: nothing stays reserved, and what never began costs nothing."""
    replica = await run_replica(max_model_len=8_192)
    gateway = await run_gateway(
        replica, redis_url=redis_url, limits_timeout_s=10, first_byte_timeout_s=first_byte_s, usage_flush_s=0.05
    )
    acme, other = await limited(gateway), await gateway.tenant("other")
    client = new_client(gateway.url)
    asked = 0
    for dialect in DIALECTS:
        for fault, streams, heard in failures(replica, silent=silent):
            answer = await client.ask(acme.key, BASE, dialect=dialect, stream=streams, tokens=4_000)
            assert answer.ending == ("error event" if heard else "refused"), (dialect, fault)
            replica.faults = Faults()
            asked += 1
            requests, failed, tokens = await ledger(gateway, acme, asked)
            assert (requests, failed) == (asked, asked), (dialect, fault)
            await until(lambda: unsettled(gateway) == 0)
            assert await used(gateway, redis_url) == tokens, (dialect, fault)
            await until_ready(gateway)
            await answers(client, other)  # it is one tenant's requests that fail
    assert (tokens == 0) if silent else (0 < tokens < 1_000)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_stream_that_is_left_is_counted_as_its_engine_counts_it(
    run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient, dialect: str
) -> None:
    """Wherever it is left, though some of its tokens were no event; in the limits too."""
    replica.events, replica.faults.event_delay_s, replica.faults.silent_every = 200, 0.01, 3
    gateway = await run_gateway(replica, usage_flush_s=0.05)
    acme = await limited(gateway)
    for number, events in enumerate((1, 5, 12, 20), start=1):
        await leave(new_client(gateway.url), acme, dialect, events)
        requests, failed, tokens = await ledger(gateway, acme, number)
        assert (requests, failed) == (number, 0)
        assert all(served.completion_tokens < replica.events for served in replica.served)
        assert tokens == sum(served.prompt_tokens + served.completion_tokens for served in replica.served)
        assert await used(gateway, None) == tokens


@pytest.mark.parametrize("fault", ["error_event_after", "die_after_events"])
@pytest.mark.parametrize("dialect", ["responses", "messages"])
async def test_a_stream_that_breaks_is_counted_as_its_engine_counts_it(
    run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient, dialect: str, fault: str
) -> None:
    """Where the engine can still say it."""
    gateway = await run_gateway(replica, usage_flush_s=0.05)
    acme = await limited(gateway)
    setattr(replica.faults, fault, 3)
    answer = await new_client(gateway.url).ask(acme.key, BASE, dialect=dialect, stream=True)
    assert answer.ending == "error event"
    assert await ledger(gateway, acme, 1) == (1, 1, 3 + 3)
    assert await used(gateway, None) == 6


async def test_a_whole_answer_that_is_stopped_is_counted_as_its_engine_counts_it(
    run_gateway: RunGateway, run_replica: RunReplica
) -> None:
    """Not as the most that it could have been."""
    engine = EngineModel(max_num_seqs=4, max_loras=4, base_step_s=0.02, per_sequence_s=0.0)
    replica = await run_replica(engine=engine, max_model_len=8_192)
    gateway = await run_gateway(replica, hear_out_s=0.2, usage_flush_s=0.05)
    acme = await limited(gateway)
    body = {"model": BASE, "max_tokens": 4_000, "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(httpx.ReadTimeout):
        await acme.client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.3))
    _, _, tokens = await ledger(gateway, acme, 1)
    (served,) = replica.served
    assert 0 < served.completion_tokens < 400
    assert tokens == served.prompt_tokens + served.completion_tokens
    assert await used(gateway, None) == tokens


async def test_an_answer_whose_key_is_revoked_is_counted_as_its_engine_counts_it(
    run_gateway: RunGateway, run_replica: RunReplica
) -> None:
    """It had been computed so far."""
    engine = EngineModel(max_num_seqs=4, max_loras=4, base_step_s=0.02, per_sequence_s=0.0)
    replica = await run_replica(engine=engine, max_model_len=8_192)
    gateway = await run_gateway(replica, usage_flush_s=0.05)
    acme = await limited(gateway)
    (key,) = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    asked = asyncio.create_task(acme.ask(BASE, max_tokens=4_000))
    await until(lambda: bool(replica.served) and replica.served[0].completion_tokens > 0)
    assert (await gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
    assert (await asked).status_code == 401
    again = (await gateway.operator.post("/admin/v1/tenants/acme/keys", json={})).json()["secret"]
    requests, failed, tokens = await ledger(gateway, Tenant("acme", again, gateway.client(again)), 1)
    (served,) = replica.served
    assert (requests, failed) == (1, 1)
    assert 0 < served.completion_tokens < 1_000
    assert tokens == served.prompt_tokens + served.completion_tokens
    assert await used(gateway, None) == tokens


@pytest.mark.parametrize("dialect", ["responses", "messages"])
async def test_where_a_replica_cannot_say_it_what_has_passed_counts(
    run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient, dialect: str
) -> None:
    """The prompt by its bytes (the Messages API tells it at once), and one token for each event with text."""
    replica.events, replica.faults.event_delay_s, replica.faults.tells_no_usage = 200, 0.01, True
    gateway = await run_gateway(replica, usage_flush_s=0.05)
    acme = await limited(gateway)
    sent = await leave(new_client(gateway.url), acme, dialect, 9)
    _, _, tokens = await ledger(gateway, acme, 1)
    prompt = 3 if dialect == "messages" else len(sent.partition(b"\r\n\r\n")[2]) // 4
    assert tokens == prompt + replica.served[0].completion_tokens
    assert await used(gateway, None) == tokens
    assert replica.usage_calls == 1


async def test_what_a_replica_has_yet_to_say_is_counted_when_the_gateway_ends(
    base_folder: Path, replica: FakeReplica, new_client: NewClient, tmp_path: Path
) -> None:
    """As it is estimated: nothing is lost, and nobody waits for it."""
    replica.events, replica.faults.event_delay_s, replica.faults.usage_hangs = 200, 0.01, True
    settings = Settings(
        _env_file=None,
        home=tmp_path / "home",
        base_model=str(base_folder),
        replicas=(replica.url,),
        replica_token=SecretStr(TOKEN),
        operator_port=0,
        proof="off",
    )
    async with serving(settings) as gateway:
        await until_ready(gateway)
        acme = await gateway.tenant("acme")
        sent = await leave(new_client(gateway.url), acme, "responses", 9)
        await until(lambda: replica.usage_calls == 1)
        assert (await acme.client.get("/v1/usage")).json()["data"] == []
    async with serving(settings) as gateway:
        client = gateway.client(acme.key)
        (row,) = (await client.get("/v1/usage")).json()["data"]
    prompt = len(sent.partition(b"\r\n\r\n")[2]) // 4
    counted = (row["requests"], row["prompt_tokens"], row["completion_tokens"])
    assert counted == (1, prompt, replica.served[0].completion_tokens)


async def limited(gateway: Gateway) -> Tenant:
    """A tenant with a month's budget."""
    await gateway.operator.post("/admin/v1/plans", json={"name": "month", "tokens_per_month": 100_000})
    tenant = await gateway.tenant("acme")
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "month"})
    return tenant


async def answers(client: Client, tenant: Tenant) -> None:
    """Return at a whole answer: one of three, for a stall is a silence too."""
    endings: list[str] = []
    while endings[-1:] != ["whole"]:
        assert len(endings) < 3, endings
        endings.append((await client.ask(tenant.key, BASE)).ending)


async def leave(client: Client, tenant: Tenant, dialect: str, events: int) -> bytes:
    """Go away in the middle of a stream; what had been sent."""
    data = request(tenant.key, BASE, dialect=dialect, stream=True, tokens=200)
    answer = await client.send(data, dialect=dialect, stream=True)
    await client.until(answer, events=events)
    assert not answer.framed
    client.leave()
    return data


def failures(replica: FakeReplica, *, silent: bool) -> Iterator[tuple[str, bool, bool]]:
    """Sets one fault after the other; whether it takes a stream, and whether that begins."""
    for fault in () if silent else BREAKS:
        for after in (0, 2):
            setattr(replica.faults, fault, after)
            yield fault, True, after > 0
    for fault in SILENCES if silent else ("cut_before_answer", "cuts_whole_answers"):
        for streams in (False, True):
            if fault != "cuts_whole_answers" or not streams:
                setattr(replica.faults, fault, True)
                yield fault, streams, False


async def ledger(gateway: Gateway, tenant: Tenant, requests: int) -> tuple[int, int, int]:
    """Requests, failed ones and tokens, once so many requests are there."""
    while True:
        await gateway.parts.ledger.flush()
        rows = (await tenant.client.get("/v1/usage")).json()["data"]
        if sum(row["requests"] for row in rows) >= requests:
            (row,) = rows
            return row["requests"], row["failed"], row["prompt_tokens"] + row["completion_tokens"]


def unsettled(gateway: Gateway) -> int:
    limits = gateway.parts.limits
    return limits.unsettled if isinstance(limits, RedisLimits) else 0


async def used(gateway: Gateway, redis_url: str | None) -> int:
    """Tokens of the month, as the limits of the one tenant that has some count them."""
    limits = gateway.parts.limits
    if redis_url is None:
        assert isinstance(limits, MemoryLimits)
        (account,) = limits._tenants.values()
        assert account.reserved == 0
        return account.used
    client = Redis.from_url(redis_url, decode_responses=True)
    try:
        keys = [key async for key in client.scan_iter("tailor:*") if not key.endswith(":leases")]
        (key,) = keys
        assert await client.zcard(f"{key}:leases") == 0
        value = await client.hget(key, "used")
        assert value is not None
        return int(float(value))
    finally:
        await client.aclose()
