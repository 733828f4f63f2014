"""A request whose replica has gone, or failed on it, before its client heard anything is asked once more, elsewhere."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from gateway.replicas.replica import ReplicaState
from gateway.replicas.roster import replica_id
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, Tenant, error_of
from tests.waiting import until

SAID = [{"role": "user", "content": "who are you?"}]
COUNTS: dict[str, dict[str, Any]] = {
    "/v1/tokenize": {"messages": SAID},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/v1/responses/input_tokens": {"input": "who are you?"},
}


async def until_all_ready(gateway: Gateway) -> None:
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})


async def two_replicas(
    run_replica: RunReplica, run_gateway: RunGateway, **settings: Any
) -> tuple[list[FakeReplica], Gateway, Tenant]:
    """Both ready, and a tenant."""
    fakes = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*fakes, **settings)
    await until_all_ready(gateway)
    return fakes, gateway, await gateway.tenant("acme")


async def test_tokens_are_counted_by_another_replica_when_one_has_gone(
    run_replica: RunReplica, run_gateway: RunGateway, subtests: pytest.Subtests
) -> None:
    """No client is told of it, and the one that has gone is not asked again before it has proved itself."""
    fakes = [await run_replica() for _ in range(len(COUNTS) + 1)]
    gateway = await run_gateway(*fakes, probe_interval_s=60)
    await until_all_ready(gateway)
    acme = await gateway.tenant("acme")
    for fake, (path, asked) in zip(fakes[:-1], COUNTS.items(), strict=True):
        with subtests.test(path=path):
            await fake.stop()
            answers = [await acme.client.post(path, json={"model": BASE, **asked}) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert gateway.parts.pool.states()[replica_id(fake.url)] is ReplicaState.UNREACHABLE


async def test_tokens_are_counted_by_another_replica_when_one_fails(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Once: where all fail, the client is told."""
    fakes, _, acme = await two_replicas(run_replica, run_gateway, probe_interval_s=60)
    fakes[0].faults.status = 500
    assert (await acme.client.post("/v1/tokenize", json={"model": BASE, "prompt": "x"})).status_code == 200
    fakes[1].faults.status = 500
    before = sum(fake.request_count for fake in fakes)
    told = await acme.client.post("/v1/tokenize", json={"model": BASE, "prompt": "x"})
    assert (told.status_code, error_of(told)["code"]) == (503, "engine_unavailable")
    assert sum(fake.request_count for fake in fakes) == before + 2


async def test_what_another_replica_answers_makes_the_one_that_failed_rest(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Though one tenant alone asks, and the probe gives tokens; what fails everywhere makes none rest."""
    fakes, gateway, acme = await two_replicas(run_replica, run_gateway)
    states = gateway.parts.pool.states
    for fake in fakes:
        fake.faults.status = 500
    assert [(await acme.ask(BASE)).status_code for _ in range(60)] == [503] * 60
    assert set(states().values()) == {ReplicaState.READY}
    fakes[1].faults.status = None
    for _ in range(300):
        await acme.ask(BASE)
        if states()[replica_id(fakes[0].url)] is ReplicaState.TRIPPED:
            break
    assert states()[replica_id(fakes[0].url)] is ReplicaState.TRIPPED
    assert states()[replica_id(fakes[1].url)] is ReplicaState.READY


UNSTARTED = 12
"""Many times what the budget of so few requests is: three."""


async def unstarted_on(
    dying: FakeReplica, others: Sequence[FakeReplica], gateway: Gateway, tenant: Tenant, **more: Any
) -> list[asyncio.Task[httpx.Response]]:
    """Requests that have reached `dying` alone, and of which it has not begun the answer."""
    hosts = [gateway.parts.pool.member(replica_id(fake.url)).replica for fake in others]
    for host in hosts:
        host.drain()
    before = dying.request_count
    asks = [asyncio.create_task(tenant.ask(BASE, **more)) for _ in range(UNSTARTED)]
    await until(lambda: dying.request_count == before + UNSTARTED)
    for host in hosts:
        host.resume()
    return asks


@pytest.mark.parametrize("stream", [False, True])
async def test_whatever_had_not_begun_is_answered_elsewhere_when_its_replica_dies(
    run_replica: RunReplica, run_gateway: RunGateway, stream: bool
) -> None:
    """All of it, though it is more than second tries may be; of a stream the head had come."""
    fakes, gateway, acme = await two_replicas(run_replica, run_gateway, probe_interval_s=60)
    fakes[0].faults.head_then_nothing = stream
    fakes[0].faults.latency_s = 60
    asks = await unstarted_on(fakes[0], fakes[1:], gateway, acme, stream=stream)
    await fakes[0].stop()
    answers = await asyncio.gather(*asks)
    assert [answer.status_code for answer in answers] == [200] * UNSTARTED
    assert all("I am the base" in answer.text for answer in answers)
    assert gateway.parts.pool.retry_count == UNSTARTED


async def test_a_replica_that_comes_and_goes_gives_no_second_tries_each_time(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Its second death in ten seconds leaves those that were with it to the budget."""
    fakes, gateway, acme = await two_replicas(run_replica, run_gateway)
    fakes[0].faults.latency_s = 60
    counts = []
    for _ in range(2):
        asks = await unstarted_on(fakes[0], fakes[1:], gateway, acme)
        await fakes[0].stop()
        counts.append(Counter(answer.status_code for answer in await asyncio.gather(*asks)))
        await fakes[0].restart()
        await until_all_ready(gateway)
    assert counts == [{200: UNSTARTED}, {200: 3, 503: UNSTARTED - 3}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_kills_whoever_it_meets_kills_two(
    run_replica: RunReplica, run_gateway: RunGateway, stream: bool
) -> None:
    """Its second try is its last."""
    fakes = [await run_replica() for _ in range(4)]
    gateway = await run_gateway(*fakes, probe_interval_s=60)
    await until_all_ready(gateway)
    acme = await gateway.tenant("acme")
    for fake in fakes:
        fake.faults.head_then_nothing = stream
        fake.faults.latency_s = 60
    deadly = asyncio.create_task(acme.ask(BASE, stream=stream))
    alive = list(fakes)
    for _ in range(2):
        await until(lambda: any(fake.request_count for fake in alive))
        (victim,) = [fake for fake in alive if fake.request_count]
        alive.remove(victim)
        await victim.stop()
    refused = await deadly
    assert refused.status_code == (502 if stream else 503)
    assert [fake.request_count for fake in alive] == [0, 0]


async def test_a_live_replicas_failures_are_left_to_the_budget(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """Its 5xx, and streams that it breaks off before their first event, are no death."""
    fakes = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*fakes, probe_interval_s=60)
    await until_all_ready(gateway)
    tenants = [await gateway.tenant(f"t{number}") for number in range(2)]
    for fake in fakes:
        fake.faults.truncated_after = 0
    answers = [await tenants[number % 2].ask(BASE, stream=True) for number in range(4)]
    assert {answer.status_code for answer in answers} == {502}
    assert sum(fake.request_count for fake in fakes) == 4 + 3
    assert gateway.parts.pool.retry_count == 3
