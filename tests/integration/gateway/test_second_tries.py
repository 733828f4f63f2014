"""A request whose replica has gone, or failed on it, before its client heard anything is asked once more, elsewhere."""

from typing import Any

import pytest

from gateway.replicas.replica import ReplicaState
from gateway.replicas.roster import replica_id
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, error_of
from tests.waiting import until

SAID = [{"role": "user", "content": "who are you?"}]
COUNTS: dict[str, dict[str, Any]] = {
    "/v1/tokenize": {"messages": SAID},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/v1/responses/input_tokens": {"input": "who are you?"},
}


async def until_all_ready(gateway: Gateway) -> None:
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})


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
    fakes = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*fakes, probe_interval_s=60)
    await until_all_ready(gateway)
    acme = await gateway.tenant("acme")
    fakes[0].faults.status = 500
    assert (await acme.client.post("/v1/tokenize", json={"model": BASE, "prompt": "x"})).status_code == 200
    fakes[1].faults.status = 500
    before = sum(fake.request_count for fake in fakes)
    told = await acme.client.post("/v1/tokenize", json={"model": BASE, "prompt": "x"})
    assert (told.status_code, error_of(told)["code"]) == (503, "engine_unavailable")
    assert sum(fake.request_count for fake in fakes) == before + 2
