"""An adapter's way through the tiers: disk before it is asked for, engine before an alias moves, and out again."""

import asyncio
from pathlib import Path

from adapter_store.ids import TenantId
from gateway.replicas.replica import Replica, ReplicaState
from gateway.replicas.residency import Resident
from tests.bad_adapters import write_good
from tests.fakes.replica import FakeReplica
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant
from tests.integration.gateway.test_replicas import RunPool, replica_of, run_pool, version
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
    caller.pool.retire(version(1, "t"), quiet_s=0.2, look_s=0.05)
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
    assert (await acme.client.delete("/v1/adapters/bot")).status_code == 204
    assert not replica.adapters
    assert not replica.disk
