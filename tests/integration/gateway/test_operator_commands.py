"""Verbs of the command for operators, against a running gateway: what the API does, for people."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant
from tests.waiting import until

Tailor = Callable[..., Awaitable[Any]]


def command(gateway: Gateway) -> Tailor:
    """Runs a verb with the operator's key and gives what it prints as JSON; what failed, where that is expected."""
    given = ["--url", gateway.url, "--json"]
    environment = {"TAILOR_OPERATOR_KEY": gateway.home.operator_key()}

    async def tailor(*words: str, fails: bool = False) -> Any:
        done = await asyncio.to_thread(CliRunner().invoke, app, [*words, *given], env=environment)
        assert done.exit_code == int(fails), done.output
        return done.output if fails else json.loads(done.output)

    return tailor


@pytest.fixture
def tailor(gateway: Gateway) -> Tailor:
    return command(gateway)


async def test_an_operator_pins_for_a_tenant(
    tailor: Tailor, gateway: Gateway, acme: Tenant, replica: FakeReplica, good: Path
) -> None:
    """Beyond its plan; and takes any pin away, the tenant's own too."""
    await acme.publish(good, "one")
    await acme.publish(good, "two")
    assert await tailor("pins", "list") == []
    made = await tailor("pins", "add", "acme", "one")
    assert (made["name"], made["pinned_by"]) == ("one", "operator")
    await until(lambda: bool(replica.pins), 10)
    await gateway.operator.patch("/admin/v1/plans/default", json={"pinned_adapters": 1})
    assert (await acme.client.put("/v1/adapters/two/pin")).status_code == 200
    told = [(row["name"], row["pinned_by"]) for row in await tailor("pins", "list")]
    assert told == [("one", "operator"), ("two", "tenant")]
    for name in ("one", "two"):
        assert not (await tailor("pins", "remove", "acme", name))["pinned"]
    assert await tailor("pins", "list") == []
    assert "tailor: " in await tailor("pins", "remove", "acme", "one", fails=True)
    assert "tailor: " in await tailor("pins", "add", "nobody", "one", fails=True)


async def test_an_operator_vouches_for_a_replica_that_is_gone(
    run_gateway: RunGateway, run_replica: RunReplica, replica: FakeReplica, good: Path
) -> None:
    """And the erasure is complete; of one that is in the pool nobody can say so."""
    gateway, gone = await run_gateway(replica), await run_replica()
    tailor = command(gateway)
    member = await tailor("replicas", "add", gone.url)
    await until(lambda: gateway.parts.pool.states()[member["id"]].value == "ready", 10)
    await gone.stop()
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    pending = (await acme.client.delete("/v1/adapters/bot")).json()
    assert pending["pending"] == [member["id"]]
    words = ("erasure", "vouch", pending["id"], member["id"])
    assert "in the pool" in await tailor(*words, fails=True)
    await tailor("replicas", "remove", member["id"])
    vouched = await tailor(*words)
    assert (vouched["state"], vouched["pending"]) == ("completed", [])


async def test_an_operator_sees_what_is_damaged(tailor: Tailor, gateway: Gateway, acme: Tenant, good: Path) -> None:
    """As the scrubber last saw it, asked of a gateway."""
    assert await tailor("store", "faults") == []
    assert (await acme.publish(good)).status_code == 201
    gateway.shelf.flip(gateway.shelf.keys()[0], 0)
    await gateway.parts.scrubber.run()
    (fault,) = await tailor("store", "faults")
    assert (fault["fault"], fault["versions"]) == ("corrupt", ["bot@1"])
