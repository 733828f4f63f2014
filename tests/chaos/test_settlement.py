"""What a tenant's limits have left after requests that failed, against what its ledger says: the same count, always."""

from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from gateway.limits.memory import MemoryLimits
from gateway.limits.redis import RedisLimits
from loadtests.fake.replica import FakeReplica
from tests.chaos.client import DIALECTS
from tests.chaos.conftest import NewClient
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, Tenant, until_ready
from tests.servers import redis_server
from tests.waiting import until

STREAM_FAULTS = (
    "die_after_events",
    "truncated_after",
    "reset_after",
    "half_close_after",
    "error_event_after",
    "garble_after",
)
SILENCES = ("cut_before_answer", "hang_before_answer", "head_then_nothing", "cuts_whole_answers")
FIRST_BYTE_S = 0.3


@pytest.fixture(params=["memory", "redis"])
def redis_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "memory":
        yield None
        return
    with redis_server() as server:
        yield server.url


async def test_limits_and_ledger_agree_on_every_failure(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, redis_url: str | None
) -> None:
    """In every dialect, however an engine fails: nothing stays reserved, and what never began costs nothing."""
    replica = await run_replica(max_model_len=8_192)
    gateway = await run_gateway(
        replica, redis_url=redis_url, limits_timeout_s=10, first_byte_timeout_s=FIRST_BYTE_S, usage_flush_s=0.05
    )
    await gateway.operator.post("/admin/v1/plans", json={"name": "month", "tokens_per_month": 100_000})
    acme, other = await gateway.tenant("acme"), await gateway.tenant("other")
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "month"})
    client = new_client(gateway.url)
    asked = 0
    for dialect in DIALECTS:
        for fault, streams, heard in failures(replica):
            answer = await client.ask(acme.key, BASE, dialect=dialect, stream=streams, tokens=4_000)
            assert answer.ending == ("error event" if heard else "refused"), (dialect, fault)
            for name in (*STREAM_FAULTS, *SILENCES):
                setattr(replica.faults, name, getattr(type(replica.faults), name))
            asked += 1
            requests, failed, tokens = await ledger(gateway, acme, asked)
            assert (requests, failed) == (asked, asked), (dialect, fault)
            await until(lambda: unsettled(gateway) == 0)
            assert await used(gateway, redis_url) == tokens, (dialect, fault)
            await until_ready(gateway)
            assert (await client.ask(other.key, BASE)).ending == "whole"  # it is one tenant's requests that fail
    assert 0 < tokens < 1_000


def failures(replica: FakeReplica) -> Iterator[tuple[str, bool, bool]]:
    """Sets one fault after the other; whether it takes a stream, and whether that begins."""
    for fault in STREAM_FAULTS:
        for after in (0, 2):
            setattr(replica.faults, fault, after)
            yield fault, True, after > 0
    for fault in SILENCES:
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
