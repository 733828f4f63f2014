"""What jobs have saved: a blob of their tenant's like any other, for the scrubber and for backups."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from adapter_store.blobs import Blobs
from adapter_store.engine import AsyncEngine
from adapter_store.scrub import Outcome, Scrubber
from adapter_store.store import AdapterStore
from gateway.backup import back_up, restore
from tests.integration.store.test_backup import opened
from tests.integration.store.test_jobs import BASE, TENANT, new_job
from tests.storage import Place, Shelf, local_place
from training import queue, saved_runs
from training.errors import LeaseLost
from training.jobs import Jobs, Saved
from training.queue import Claimed


@pytest.fixture
def jobs(engine: AsyncEngine) -> Jobs:
    return Jobs(engine)


@pytest.fixture
async def claimed(engine: AsyncEngine, jobs: Jobs) -> Claimed:
    await jobs.create(new_job())
    return (await queue.claim(engine, "w1", base_fingerprint=BASE, now=1, most=1))[0]


async def keep(engine: AsyncEngine, blobs: Blobs, claimed: Claimed, step: int, folder: Path) -> Saved:
    path = folder / f"step-{step}"
    path.write_bytes(bytes([step]) * 10_000)
    return await saved_runs.keep(engine, blobs, claimed, step, path)


async def test_a_save_takes_the_place_of_the_one_before(
    engine: AsyncEngine, blobs: Blobs, shelf: Shelf, jobs: Jobs, claimed: Claimed, tmp_path: Path
) -> None:
    """The job names one blob, and there is one."""
    for step in (1, 2, 2):
        saved = await keep(engine, blobs, claimed, step, tmp_path)
        assert (await jobs.find(TENANT, claimed.job.id)).saved == saved
        assert shelf.keys() == [saved.blob(TENANT).key]
    assert await saved_runs.fetch(blobs, TENANT, saved, tmp_path)
    assert (tmp_path / "step-2").read_bytes() == b"\2" * 10_000


async def test_a_worker_that_lost_its_lease_leaves_no_save(
    engine: AsyncEngine, blobs: Blobs, shelf: Shelf, jobs: Jobs, claimed: Claimed, tmp_path: Path
) -> None:
    """What is noted stays, what came too late goes."""
    saved = await keep(engine, blobs, claimed, 1, tmp_path)
    await jobs.cancel(TENANT, claimed.job.id)
    with pytest.raises(LeaseLost):
        await keep(engine, blobs, claimed, 2, tmp_path)
    assert shelf.keys() == [saved.blob(TENANT).key]
    assert await saved_runs.drop(engine, blobs, TENANT, claimed.job.id)
    assert shelf.keys() == []


async def test_a_save_that_is_needed_is_no_orphan(
    engine: AsyncEngine, blobs: Blobs, shelf: Shelf, store: AdapterStore, claimed: Claimed, tmp_path: Path
) -> None:
    """However old it is; and no sweep takes it from a job that may go on."""
    await keep(engine, blobs, claimed, 1, tmp_path)
    assert await store.collect_orphans(older_than_s=-1) == 0
    assert await saved_runs.sweep(engine, blobs) == 0
    assert len(shelf.keys()) == 1


async def test_a_save_that_rotted_is_found_and_named(
    engine: AsyncEngine, blobs: Blobs, shelf: Shelf, claimed: Claimed, tmp_path: Path
) -> None:
    """By its job's id."""
    saved = await keep(engine, blobs, claimed, 1, tmp_path)
    shelf.flip(saved.blob(TENANT).key, 77)
    scrubber = Scrubber(engine, blobs, None, bytes_per_s=1 << 30)
    await scrubber.run()
    (found,) = await scrubber.faulty()
    assert (found.sha256, found.versions) == (saved.sha256, (claimed.job.id,))
    (tmp_path / "fetched").mkdir()
    assert not await saved_runs.fetch(blobs, TENANT, saved, tmp_path / "fetched")
    assert list((tmp_path / "fetched").iterdir()) == []


class Replacing(Blobs):
    """Before one is read, `replace` is called."""

    replace: Callable[[], Awaitable[object]]

    async def sha256(self, key: str, on_read: Callable[[int], Awaitable[None]] | None = None) -> str:
        await self.replace()
        return await super().sha256(key, on_read)


async def test_a_save_that_is_replaced_while_it_is_looked_at_is_no_fault(
    engine: AsyncEngine, blobs: Blobs, place: Place, jobs: Jobs, claimed: Claimed, tmp_path: Path
) -> None:
    """The scrubber has chosen it, and the next save is there before it reads."""
    await keep(engine, blobs, claimed, 1, tmp_path)
    read = Replacing.open(place.blobs_url)
    read.replace = lambda: keep(engine, blobs, claimed, 2, tmp_path)
    scrubber = Scrubber(engine, read, None, bytes_per_s=1 << 30)
    assert await scrubber.run() == {Outcome.OK: 1}
    assert await scrubber.faulty() == []
    saved = (await jobs.find(TENANT, claimed.job.id)).saved
    assert saved is not None
    assert saved.step == 2


async def test_a_save_is_backed_up_with_its_job(
    engine: AsyncEngine, blobs: Blobs, claimed: Claimed, tmp_path: Path
) -> None:
    """A restored job goes on from it; one whose save went while its row was read begins anew."""
    saved = await keep(engine, blobs, claimed, 1, tmp_path)
    backups = Blobs.open(str(tmp_path / "backups"))
    assert (await back_up(engine, blobs, backups)).copied == 1
    (tmp_path / "second").mkdir()
    async with opened(local_place(tmp_path / "second")) as (restored, restored_blobs):
        await restore(restored, restored_blobs, backups)
        assert (await Jobs(restored).find(TENANT, claimed.job.id)).saved == saved
        assert await saved_runs.fetch(restored_blobs, TENANT, saved, tmp_path)
        await backups.delete(saved.blob(TENANT).key)
        await blobs.delete(saved.blob(TENANT).key)
        assert (await back_up(engine, blobs, backups)).blobs == 0
        await restore(restored, restored_blobs, backups, force=True)
        assert (await Jobs(restored).find(TENANT, claimed.job.id)).saved is None
