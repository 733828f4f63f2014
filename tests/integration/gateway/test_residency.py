"""An adapter's way through the tiers: disk before it is asked for, engine before an alias moves, and out again."""

import asyncio
import json
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from typer.testing import CliRunner

from adapter_store.ids import TenantId
from gateway.cli import app
from gateway.replicas.holdings import Resident
from gateway.replicas.replica import Replica, ReplicaState
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant, error_of
from tests.integration.gateway.test_replicas import RunPool, replica_of, run_pool, version
from tests.servers import redis_server
from tests.storage import settings_at
from tests.waiting import until

__all__ = ["run_pool"]


async def test_what_is_published_is_on_the_homes_disk_before_it_is_asked_for(
    run_replica: RunReplica, run_gateway: RunGateway, good: Path
) -> None:
    """On the first two of its homes, in the background; the first request then loads it where it lies."""
    replicas = [await run_replica() for _ in range(3)]
    gateway = await run_gateway(*replicas)
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})
    acme = await gateway.tenant("acme")
    digest = (await acme.publish(good)).json()["current"]["digest"]
    await until(lambda: sum(digest in replica.disk for replica in replicas) == 2)
    assert sum(len(replica.prefetched) for replica in replicas) == 2
    assert not any(replica.loads for replica in replicas)
    assert (await acme.ask()).status_code == 200
    (home,) = [replica for replica in replicas if replica.loads]
    assert digest in home.prefetched


async def test_a_publish_waits_for_no_replica(gateway: Gateway, replica: FakeReplica, acme: Tenant, good: Path) -> None:
    """One that does not answer makes the prefetch fail, nothing else."""
    await replica.stop()
    made = await acme.publish(good)
    assert made.status_code == 201
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.UNREACHABLE})
    await replica.start()


async def test_a_new_version_is_loaded_where_the_old_one_is(run_replica: RunReplica, run_pool: RunPool) -> None:
    """Before the alias moves; where the old one is not, nobody waits for a load."""
    fakes = [await run_replica() for _ in range(3)]
    caller = await run_pool(*fakes)
    old, new = version(1, "t"), version(2, "t")
    await caller.ask(old)
    (home,) = [fake for fake in fakes if fake.loads]
    assert await caller.pool.prewarm(old, new) == 1
    assert new.digest in {known["digest"] for known in home.adapters.values()}
    assert sum(len(fake.loads) for fake in fakes) == 2
    assert (await caller.ask(new)).place.tier == "gpu"
    assert await caller.pool.prewarm(version(3, "t"), version(4, "t")) == 0
    await until(lambda: sum(version(4, "t").digest in fake.disk for fake in fakes) == 2)
    assert sum(len(fake.loads) for fake in fakes) == 2


async def test_a_load_that_hangs_holds_no_move_up(run_replica: RunReplica, run_pool: RunPool) -> None:
    """Pre-warming is bounded in time, and a failure is no failure of the move."""
    fake = await run_replica()
    caller = await run_pool(fake)
    await caller.ask(version(1, "t"))
    fake.faults.load_hangs = 1
    async with asyncio.timeout(2):
        assert await caller.pool.prewarm(version(1, "t"), version(2, "t"), within_s=0.2) == 0
    fake.faults.load_status = 500
    assert await caller.pool.prewarm(version(1, "t"), version(3, "t")) == 0


async def test_a_version_nobody_asks_for_any_more_leaves_the_engine(run_replica: RunReplica, run_pool: RunPool) -> None:
    """Once it has been quiet; never under a request."""
    fake = await run_replica()
    fake.faults.latency_s = 0.5
    caller = await run_pool(fake)
    running = asyncio.create_task(caller.ask(version(1, "t")))
    await until(lambda: any(known["in_flight"] for known in fake.adapters.values()))
    caller.pool.retire(version(1, "t"), quiet_s=0.2)
    await running
    await until(lambda: not fake.adapters)
    assert running.result().text == f"I am {version(1, 't').digest}"
    assert version(1, "t").digest in fake.disk
    assert not replica_of(caller, fake).holds((TenantId("t"), version(1, "t").digest))


async def test_who_wants_to_know_is_told_of_every_load(run_replica: RunReplica, run_pool: RunPool) -> None:
    """Once for each load of this gateway's, restored ones too; a listener that fails breaks nothing."""
    fake = await run_replica()
    caller = await run_pool(fake)
    told: list[tuple[str, str]] = []

    async def note(replica: Replica, resident: Resident) -> None:
        told.append((replica.id, resident.key[1]))

    async def fail(replica: Replica, resident: Resident) -> None:
        raise RuntimeError("no")

    caller.pool.when_loaded(fail)
    caller.pool.when_loaded(note)
    await asyncio.gather(*(caller.ask(version(1)) for _ in range(5)))
    mine = replica_of(caller, fake)
    await until(lambda: told == [(mine.id, version(1).digest)])
    await fake.restart()
    await until(lambda: told == [(mine.id, version(1).digest)] * 2)


async def test_a_deleted_adapter_leaves_the_disk_too(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """Engine first, then files."""
    digest = (await acme.publish(write_good(tmp_path / "a", seed=3))).json()["current"]["digest"]
    assert (await acme.ask()).status_code == 200
    assert digest in replica.disk
    assert (await acme.client.delete("/v1/adapters/bot")).status_code == 200
    assert not replica.adapters
    assert not replica.disk


async def test_a_publish_brings_the_new_version_where_the_old_one_was(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """Nobody's request loads it; what was hot stays hot."""
    await acme.publish(write_good(tmp_path / "v1", seed=1))
    assert (await acme.ask()).status_code == 200
    new = (await acme.publish(write_good(tmp_path / "v2", seed=2))).json()["current"]["digest"]
    await until(lambda: new in digests_in(replica))
    assert 'desc="gpu"' in (await acme.ask()).headers["server-timing"]


async def test_a_move_brings_the_version_first_within_the_plan(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """Past the plan's loads a minute the files alone are brought, and the alias moves all the same."""
    digests = [
        (await acme.publish(write_good(tmp_path / f"v{seed}", seed=seed))).json()["current"]["digest"]
        for seed in (1, 2, 3)
    ]
    assert (await acme.ask()).status_code == 200
    assert digests_in(replica) == {digests[2]}
    moved = await acme.client.put("/v1/adapters/bot/aliases/default", json={"version": 1})
    assert moved.status_code == 200
    assert digests_in(replica) == {digests[2], digests[0]}
    assert (await acme.ask()).status_code == 200
    await gateway.operator.patch("/admin/v1/plans/default", json={"loads_per_minute": 1})
    replica.adapters.clear()
    await until(lambda: not gateway.parts.pool.members()[0].replica.residency.residents())
    assert (await acme.ask()).status_code == 200
    moved = await acme.client.put("/v1/adapters/bot/aliases/default", json={"version": 2})
    assert moved.status_code == 200
    assert digests_in(replica) == {digests[0]}


# warm


async def test_a_warmed_adapter_is_there_for_its_first_request(
    run_replica: RunReplica, run_gateway: RunGateway, tmp_path: Path
) -> None:
    """In its home, or everywhere; each load counts among those of the plan."""
    replicas = [await run_replica() for _ in range(2)]
    gateway = await run_gateway(*replicas)
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})
    acme = await gateway.tenant("acme")
    for seed in (1, 2):
        assert (await acme.publish(write_good(tmp_path / f"v{seed}", seed=seed))).status_code == 201
    done = await acme.client.post("/v1/adapters/bot/warm", json={"version": 1})
    assert (done.status_code, done.json()["version"]) == (200, 1)
    assert [place["tier"] for place in done.json()["replicas"]] == ["gpu"]
    answer = await acme.ask("bot@1")
    assert 'desc="gpu"' in answer.headers["server-timing"]
    done = await acme.client.post("/v1/adapters/bot/warm", json={"everywhere": True})
    assert [place["tier"] for place in done.json()["replicas"]] == ["gpu", "gpu"]
    assert sum(len(replica.loads) for replica in replicas) == 3
    again = await acme.client.post("/v1/adapters/bot/warm", json={"everywhere": True})
    assert again.status_code == 200
    assert sum(len(replica.loads) for replica in replicas) == 3
    for body in ({"version": 3}, {"version": 9}):
        missing = await acme.client.post("/v1/adapters/bot/warm", json=body)
        assert missing.status_code == 404, missing.text
    await gateway.operator.patch("/admin/v1/plans/default", json={"loads_per_minute": 1})
    await acme.publish(write_good(tmp_path / "v3", seed=3))
    limited = await acme.client.post("/v1/adapters/bot/warm", json={"everywhere": True})
    assert (limited.status_code, error_of(limited)["code"]) == (429, "adapter_load_limit")


async def test_loads_of_all_gateways_count_together_in_redis(
    run_gateway: RunGateway, replica: FakeReplica, tmp_path: Path
) -> None:
    """As workers of one gateway do: n of them give no n-fold `loads_per_minute`."""
    with redis_server() as redis:
        shared = {"redis_url": SecretStr(redis.url), "limits_timeout_s": 5.0}
        here = await run_gateway(replica, **shared)
        there = await run_gateway(replica, home=tmp_path / "second", **settings_at(here.home.path), **shared)
        await here.operator.post("/admin/v1/plans", json={"name": "few", "loads_per_minute": 2})
        acme = await here.tenant("acme")
        assert (await here.operator.patch("/admin/v1/tenants/acme", json={"plan": "few"})).status_code == 200
        elsewhere = Tenant("acme", acme.key, there.client(acme.key))
        for seed in (1, 2, 3):
            await acme.publish(write_good(tmp_path / f"v{seed}", seed=seed))
        assert (await acme.ask("bot@1")).status_code == 200
        assert (await elsewhere.ask("bot@2")).status_code == 200
        for tenant, loaded in ((acme, "bot@1"), (elsewhere, "bot@2")):
            limited = await tenant.ask("bot@3")
            assert (limited.status_code, error_of(limited)["code"]) == (429, "adapter_load_limit")
            assert (await tenant.ask(loaded)).status_code == 200
        assert len(replica.loads) == 2


async def test_a_slow_warm_up_answers_while_it_goes_on(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, good: Path
) -> None:
    """202, and loaded later; 503 where it is held back or no engine is there."""
    digest = (await acme.publish(good)).json()["current"]["digest"]
    replica.faults.load_delay_s = 0.5
    slow = await acme.client.post("/v1/adapters/bot/warm", json={"wait_s": 0.05})
    assert (slow.status_code, slow.json()["replicas"][0]["tier"]) == (202, "loading")
    await until(lambda: bool(replica.adapters))
    assert (await acme.client.post("/v1/adapters/bot/warm", json={})).status_code == 200
    replica.faults.nan_digests = {digest}
    await acme.ask()
    await until(lambda: gateway.parts.quarantine.count == 1)
    held = await acme.client.post("/v1/adapters/bot/warm", json={})
    assert (held.status_code, error_of(held)["code"]) == (503, "adapter_quarantined")


async def test_the_tiers_of_every_version_are_told(
    gateway: Gateway, replica: FakeReplica, acme: Tenant, tmp_path: Path
) -> None:
    """Blob, disk, host, GPU: from published to asked for."""

    async def tiers() -> list[list[str]]:
        told = (await acme.client.get("/v1/adapters/bot/residency")).json()["data"]
        return [[place["tier"] for place in version["replicas"]] for version in told]

    await acme.publish(write_good(tmp_path / "v1", seed=1))
    await until(lambda: len(replica.disk) == 1)
    assert await tiers() == [["disk"]]
    await acme.publish(write_good(tmp_path / "v2", seed=2))
    await until(lambda: len(replica.disk) == 2)
    assert (await acme.ask("bot@1")).status_code == 200
    assert await tiers() == [["disk"], ["gpu"]]
    for known in replica.adapters.values():
        known["tier"] = "host"
    seen = replica.probes
    await until(lambda: replica.probes > seen + 2)
    replica.disk.clear()
    assert await tiers() == [[], ["host"]]


# pins


async def test_a_pinned_adapter_stays_loaded(gateway: Gateway, replica: FakeReplica, tmp_path: Path) -> None:
    """Loaded without a request, evicted last, back first after a restart, and its successor takes its place."""
    replica.capacity = replica.max_loras = 2
    await replica.restart()
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    await gateway.operator.patch("/admin/v1/plans/default", json={"pinned_adapters": 1})
    digest = (await acme.publish(write_good(tmp_path / "pinned", seed=1))).json()["current"]["digest"]
    for seed in range(2, 6):
        await globex.publish(write_good(tmp_path / f"other-{seed}", seed=seed), f"bot-{seed}")
    assert (await acme.client.put("/v1/adapters/bot/pin")).status_code == 200
    await until(lambda: digests_in(replica) == {digest})
    await until(lambda: [pin["digest"] for pin in replica.pins] == [digest])
    for seed in range(2, 6):
        assert (await globex.ask(f"bot-{seed}")).status_code == 200
        assert digest in digests_in(replica)
    before = len(replica.loads)
    await replica.restart()
    await until(lambda: len(replica.loads) == before + 2)
    assert next(iter(replica.adapters.values()))["digest"] == digest
    successor = (await acme.publish(write_good(tmp_path / "next", seed=9))).json()["current"]["digest"]
    await until(lambda: successor in digests_in(replica))
    assert (await acme.client.delete("/v1/adapters/bot/pin")).status_code == 204
    await until(lambda: replica.pins == [])


def digests_in(replica: FakeReplica) -> set[str]:
    return {known["digest"] for known in replica.adapters.values()}


async def test_a_plan_says_how_many_a_tenant_may_pin(gateway: Gateway, acme: Tenant, tmp_path: Path) -> None:
    """None by default; operators may pin any, and a tenant cannot take such a pin away."""
    for seed in (1, 2):
        await acme.publish(write_good(tmp_path / f"{seed}", seed=seed), f"bot-{seed}")
    refused = await acme.client.put("/v1/adapters/bot-1/pin")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "too_many_pins")
    await gateway.operator.patch("/admin/v1/plans/default", json={"pinned_adapters": 1})
    assert (await acme.client.put("/v1/adapters/bot-1/pin")).json()["pinned_by"] == "tenant"
    assert (await acme.client.put("/v1/adapters/bot-1/pin")).status_code == 200
    assert (await acme.client.put("/v1/adapters/bot-2/pin")).status_code == 409
    assert (await gateway.operator.put("/admin/v1/tenants/acme/pins/bot-2")).json()["pinned_by"] == "operator"
    assert (await acme.client.delete("/v1/adapters/bot-2/pin")).status_code == 404
    listed = (await gateway.operator.get("/admin/v1/pins")).json()["data"]
    assert [row["name"] for row in listed] == ["bot-1", "bot-2"]
    assert (await acme.client.delete("/v1/adapters/bot-1")).status_code == 200
    listed = (await gateway.operator.get("/admin/v1/pins")).json()["data"]
    assert [row["name"] for row in listed] == ["bot-2"]
    assert (await gateway.operator.delete("/admin/v1/tenants/acme/pins/bot-2")).status_code == 204


async def test_the_command_warms_and_pins(gateway: Gateway, acme: Tenant, replica: FakeReplica, good: Path) -> None:
    """What the API does, for people."""
    await acme.publish(good)
    await gateway.operator.patch("/admin/v1/plans/default", json={"pinned_adapters": 1})
    given = ["--url", gateway.url, "--key", acme.key, "--json"]

    async def tailor(*words: str) -> Any:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["adapter", *words, *given])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    assert (await tailor("warm", "bot"))["replicas"][0]["tier"] == "gpu"
    assert (await tailor("pin", "bot"))["pinned_by"] == "tenant"
    (shown,) = await tailor("where", "bot")
    assert shown["replicas"][0]["tier"] == "gpu"
    assert not (await tailor("unpin", "bot"))["pinned"]
