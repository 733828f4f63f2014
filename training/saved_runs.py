"""Runs at rest, one blob of its tenant's for each job, for any worker to go on with.

The blob comes first, then the job's row that names it; the one before goes then. So a crash leaves at most a blob that
no row names, which `AdapterStore.collect_orphans` removes. What a job has saved goes when it is over: its worker drops
it, or `sweep` does.
"""

from collections.abc import Collection
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from sqlalchemy import select, update

from adapter_store.blobs import Blobs
from adapter_store.changes import take_turn
from adapter_store.content import PUT_TRIES, all_stored, drop_unreferenced, hashed, put_missing
from adapter_store.engine import AsyncEngine
from adapter_store.errors import BlobCorrupt, StorageError
from adapter_store.ids import TenantId
from adapter_store.threads import in_thread
from adapter_store.transactions import reading, writing
from training.jobs import NOT_SAVED, OVER, JobId, Saved, jobs
from training.queue import Claimed, note_saved

IS_LEFT = jobs.c.saved_sha256.is_not(None) & jobs.c.status.in_([status.value for status in OVER])


async def keep(engine: AsyncEngine, blobs: Blobs, claimed: Claimed, step: int, path: Path) -> Saved:
    """Stores a file that nobody writes to any more as where the job goes on from after `step`.

    Raises LeaseLost, BlobCorrupt, StorageFull, StorageUnavailable; FileNotFoundError where the file has made place for
    a newer one.
    """
    tenant_id = claimed.job.tenant_id
    sha256, size_bytes = await in_thread(hashed, path)
    saved = Saved(step, path.name, sha256, size_bytes)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(_drop_blobs, engine, blobs, tenant_id, [sha256])
        before = await _put_and_note(engine, blobs, claimed, saved, path)
        undo.pop_all()
    if before is not None:
        await _drop_blobs(engine, blobs, tenant_id, [before])
    return saved


async def _put_and_note(engine: AsyncEngine, blobs: Blobs, claimed: Claimed, saved: Saved, path: Path) -> str | None:
    """The digest of what was noted before."""
    tenant_id = claimed.job.tenant_id
    blob = saved.blob(tenant_id)
    for _ in range(PUT_TRIES):
        await put_missing(engine, blobs, tenant_id, [(blob, path)])
        async with writing(engine) as connection:
            await take_turn(connection)
            if await all_stored(blobs, [blob]):
                return await note_saved(connection, claimed, saved)
    raise BlobCorrupt(f"blob {blob.key} vanishes as fast as it is stored")


async def fetch(blobs: Blobs, tenant_id: TenantId, saved: Saved, folder: Path) -> bool:
    """Writes what was saved into `folder`; False, and nothing there, where it is gone or damaged.

    Raises StorageFull, StorageUnavailable.
    """
    path = folder / Path(saved.name).name
    try:
        await blobs.fetch(saved.blob(tenant_id).key, saved.sha256, path)
    except BlobCorrupt:
        await in_thread(path.unlink, missing_ok=True)
        return False
    return True


async def drop(engine: AsyncEngine, blobs: Blobs, tenant_id: TenantId, job_id: JobId) -> bool:
    """Removes what a job that is over had saved; False where there is nothing. Raises StorageError."""
    here = (jobs.c.tenant_id == tenant_id) & (jobs.c.id == job_id) & IS_LEFT
    async with writing(engine) as connection:
        await take_turn(connection)
        sha256 = (await connection.execute(select(jobs.c.saved_sha256).where(here))).scalar_one_or_none()
        await connection.execute(update(jobs).where(here).values(NOT_SAVED))
    if sha256 is None:
        return False
    await drop_unreferenced(engine, blobs, tenant_id, [sha256])
    return True


async def sweep(engine: AsyncEngine, blobs: Blobs) -> int:
    """Removes what jobs had saved that are over; how many there were. Raises StorageError."""
    async with reading(engine) as connection:
        found = (await connection.execute(select(jobs.c.tenant_id, jobs.c.id).where(IS_LEFT))).all()
    return sum([await drop(engine, blobs, tenant_id, job_id) for tenant_id, job_id in found])


async def _drop_blobs(engine: AsyncEngine, blobs: Blobs, tenant_id: TenantId, digests: Collection[str]) -> None:
    with suppress(StorageError):  # collect_orphans does the rest
        await drop_unreferenced(engine, blobs, tenant_id, digests)
