"""Adapters that an engine has come to harm with: found, held back, told, lifted; and the engine that starts again."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from adapter_store.ids import TenantId
from adapter_store.transactions import writing
from gateway.cli import app
from gateway.database import quarantine as rows
from gateway.quarantine import BACKOFF_S, Quarantine
from gateway.replicas.client import Alarm, Suspect
from gateway.replicas.replica import ReplicaState
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant, error_of
from tests.waiting import until

KEY = (TenantId("t"), "d" * 64)


async def published(tenant: Tenant, folder: Path, seed: int, name: str = "bot") -> str:
    made = await tenant.publish(write_good(folder / f"{tenant.name}-{name}-{seed}", seed=seed), name)
    assert made.status_code == 201, made.text
    digest: str = made.json()["current"]["digest"]
    return digest


async def answered(tenant: Tenant, model: str = "bot") -> str:
    answer = await tenant.ask(model)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def states(gateway: Gateway) -> set[ReplicaState]:
    return set(gateway.parts.pool.states().values())


async def test_nan_is_recycled_and_held_back_within_five_seconds(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, globex: Tenant, tmp_path: Path
) -> None:
    """Guard off: the adapter that makes NaN is held back, its tenant alone; others are answered rightly right after."""
    bad, good = await published(acme, tmp_path, 1), await published(globex, tmp_path, 2)
    assert await answered(globex) == f"I am {good}"
    replica.faults.nan_digests = {bad}
    poisoned = replica.generation
    await acme.ask()
    await until(lambda: replica.recycled == [poisoned] and gateway.parts.quarantine.count == 1, 5)
    assert time.monotonic() - replica.alarmed_at <= 5
    (held,) = (await gateway.operator.get("/admin/v1/quarantine")).json()["data"]
    assert (held["reason"], held["digest"], held["until"]) == ("corrupted", bad, None)
    await until(lambda: replica.generation != poisoned and states(gateway) == {ReplicaState.READY}, 5)
    for _ in range(10):
        assert await answered(globex) == f"I am {good}"
    refused = await acme.ask()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "adapter_quarantined")
    assert refused.headers["x-should-retry"] == "false"
    assert bad not in {known["digest"] for known in replica.adapters.values()}
    assert good in {known["digest"] for known in replica.adapters.values()}


async def test_a_tenant_sees_what_is_held_back_and_an_operator_lifts_it(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """On the version, with the reason; what was lifted is loaded again, and the same alarm does not hold it again."""
    bad = await published(acme, tmp_path, 1)
    replica.faults.nan_digests = {bad}
    await acme.ask()
    await until(lambda: states(gateway) == {ReplicaState.READY} and gateway.parts.quarantine.count == 1, 10)
    await until(lambda: replica.last_alarm is not None and states(gateway) == {ReplicaState.READY}, 10)
    (shown,) = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    assert (shown["quarantine"]["reason"], shown["quarantine"]["until"]) == ("corrupted", None)
    replica.faults.nan_digests = set()
    given = ["--url", gateway.url, "--key", gateway.home.operator_key() or "", "--json"]

    async def tailor(*words: str) -> Any:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["quarantine", *words, *given])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    (held,) = await tailor("list")
    assert (await tailor("lift", held["id"]))["lifted"]
    assert await answered(acme) == f"I am {bad}"
    (shown,) = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    assert shown["quarantine"] is None
    seen = replica.probes
    await until(lambda: replica.probes > seen + 2)
    assert await answered(acme) == f"I am {bad}"


async def test_a_fallback_answers_for_what_is_held_back(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """As for any version that cannot be loaded."""
    bad = await published(acme, tmp_path, 1)
    assert (await acme.client.patch("/v1/adapters/bot", json={"fallback": "base"})).status_code == 200
    replica.faults.nan_digests = {bad}
    await acme.ask()
    await until(lambda: gateway.parts.quarantine.count == 1 and replica.last_alarm is not None)
    await until(lambda: states(gateway) == {ReplicaState.READY})
    assert await answered(acme) == "I am the base"


async def test_an_engine_that_dies_of_a_load_does_not_die_of_it_three_times(
    run_replica: RunReplica, run_gateway: RunGateway, tmp_path: Path
) -> None:
    """Held back for a minute, then once more on trial, then for good; others are answered all the while."""
    replicas = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*replicas, probe_interval_s=1)
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    deadly, good = await published(acme, tmp_path, 1), await published(globex, tmp_path, 2)
    for replica in replicas:
        replica.faults.deadly_digests = {deadly}
    refused = await acme.ask()
    assert refused.status_code == 503
    quarantine = gateway.parts.quarantine
    await until(lambda: quarantine.count == 1, 5)
    (held,) = quarantine.held()
    assert (held.reason, held.strikes) == ("engine_died", 1)
    assert held.until is not None
    refused = await acme.ask()
    assert error_of(refused)["code"] == "adapter_quarantined"
    assert 0 < int(refused.headers["retry-after"]) <= BACKOFF_S
    assert await answered(globex) == f"I am {good}"
    await until(lambda: states(gateway) == {ReplicaState.READY}, 10)
    assert sum(replica.last_alarm is not None for replica in replicas) == 1
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(rows).values(until=int(time.time()) - 1))  # the minute is over
    await quarantine.read()
    await acme.ask()
    await until(lambda: quarantine.count == 1 and states(gateway) == {ReplicaState.READY}, 10)
    (held,) = quarantine.held()
    assert (held.strikes, held.until) == (2, None)
    assert await answered(globex) == f"I am {good}"


async def test_every_gateway_holds_back_and_remembers(
    gateway: Gateway, run_gateway: RunGateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """One that has not heard the alarm, within a second; and one that starts later."""
    other = await run_gateway(replica)
    bad = await published(acme, tmp_path, 1)
    suspect = Suspect("tnt", bad)
    gateway.parts.quarantine.accuse(Alarm("e", time.time(), "corrupted", (suspect,)), "r")
    await until(lambda: other.parts.quarantine.holds((TenantId("tnt"), bad)), 3)
    later = await run_gateway(replica)
    assert later.parts.quarantine.holds((TenantId("tnt"), bad))
    await later.parts.quarantine.lift(later.parts.quarantine.held()[0].id)
    await until(lambda: not gateway.parts.quarantine.holds((TenantId("tnt"), bad)), 3)


def alarm(generation: str, *digests: str, reason: Any = "engine_died", at: float = 1_000) -> Alarm:
    return Alarm(generation, at, reason, tuple(Suspect("t", digest) for digest in digests))


@pytest.fixture
async def quarantine(gateway: Gateway) -> Quarantine:
    """One with a clock of its own."""
    return Quarantine(gateway.parts.engine, clock=lambda: 1_000.0)


async def test_one_death_is_one_strike_however_often_it_is_heard(quarantine: Quarantine) -> None:
    """By the engine's generation."""
    for _ in range(3):
        quarantine.accuse(alarm("e1", KEY[1]), "r")
    assert [row.strikes for row in quarantine.held()] == [1]


async def test_of_several_suspects_none_is_held_back(quarantine: Quarantine) -> None:
    """At most one tenant is in quarantine for one alarm."""
    quarantine.accuse(alarm("e1", "a" * 64, "b" * 64), "r")
    quarantine.accuse(alarm("e2"), "r")
    assert quarantine.held() == []


async def test_who_an_engine_has_lived_with_is_cleared(quarantine: Quarantine) -> None:
    """The next death near it is a first one again."""
    quarantine.accuse(alarm("e1", KEY[1]), "r")
    assert quarantine.is_on_trial(KEY)
    quarantine.acquit(KEY)
    assert not quarantine.holds(KEY)
    quarantine.accuse(alarm("e2", KEY[1]), "r")
    (held,) = quarantine.held()
    assert held.strikes == 1


async def test_a_fault_ends_neither_writing_nor_reading(
    gateway: Gateway, quarantine: Quarantine, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that the database cannot take, a listener that fails: told in the log, and later ones are taken in."""
    now = 1e30  # no integer of a database
    writer = Quarantine(gateway.parts.engine, clock=lambda: now)
    told: list[str] = []

    def on_held(key: tuple[TenantId, str]) -> None:
        told.append(key[1])
        if len(told) == 1:
            raise LookupError(key)

    quarantine.on_held = on_held
    works = [asyncio.create_task(writer.write()), asyncio.create_task(quarantine.follow())]
    writer.accuse(alarm("e0", "0" * 64, at=now), "r")
    await until(lambda: f"adapter {'0' * 64} of tenant t is held back here alone" in caplog.text)
    now = 1_000.0
    for number in (1, 2):
        writer.accuse(alarm(f"e{number}", str(number) * 64), "r")
        await until(lambda: len(writer._unwritten) == 1)  # the first, for good
        quarantine.on_reset()
        await until(lambda told_so_far=number: len(told) == told_so_far)  # type: ignore[misc]
    assert told == ["1" * 64, "2" * 64]
    assert "the quarantine cannot be read" in caplog.text
    for work in works:
        assert not work.done()
        work.cancel()
    await asyncio.gather(*works, return_exceptions=True)


async def test_an_old_alarm_says_nothing(quarantine: Quarantine) -> None:
    """A note of last week's engine must not hold back what serves today."""
    quarantine.accuse(alarm("e1", KEY[1], at=1_000 - 7_200), "r")
    assert quarantine.held() == []
