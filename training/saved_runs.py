"""Runs at rest in the blob store, under `training/<tenant>/<job>/`, for any worker to go on with.

The blob comes first, then the job's row that names it (`queue.report`). So a crash leaves at most blobs that no job
names, which `sweep` removes; what a job has saved goes when it ends.
"""

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy import select

from adapter_store.blobs import PLAIN, Blobs
from adapter_store.bundle import storage_errors
from adapter_store.catalog import BlobFile
from adapter_store.content import hashed
from adapter_store.engine import AsyncEngine
from adapter_store.errors import BlobCorrupt
from adapter_store.threads import in_thread
from adapter_store.transactions import reading
from training.jobs import Job, JobId, Saved, SavedFile, jobs

PREFIX: Final = "training"
KEY: Final = re.compile(rf"{PREFIX}/([A-Za-z0-9_-]{{1,64}})/([A-Za-z0-9_-]{{1,64}})/[A-Za-z0-9._-]{{1,128}}")
ORPHANS_AFTER_S: Final = 3_600.0  # far above the time between a blob and the row that names it


async def put(blobs: Blobs, job: Job, step: int, path: Path) -> Saved:
    """Stores a file that nobody writes to any more as where the job is after `step`.

    Raises StorageFull, StorageUnavailable; FileNotFoundError where it has made place for a newer one.
    """
    sha256, size_bytes = await in_thread(hashed, path)
    file = SavedFile(path.name, f"{_folder(job)}/{path.name}", sha256, size_bytes)
    await blobs.adopt(file.key, path)
    return Saved(step, (file,))


async def fetch(blobs: Blobs, saved: Saved, folder: Path) -> bool:
    """Writes what was saved into `folder`; False, and nothing there, where it is gone or damaged.

    Raises StorageFull, StorageUnavailable.
    """
    for file in saved.files:
        path = folder / Path(file.name).name
        if not await fetch_blob(blobs, file, path):
            await in_thread(path.unlink, missing_ok=True)
            return False
    return True


async def fetch_blob(blobs: Blobs, file: SavedFile | BlobFile, path: Path) -> bool:
    """Writes a blob to `path`; False where it is gone, or not what its digest says.

    Raises StorageFull, StorageUnavailable.
    """
    digest = hashlib.sha256()
    try:
        with storage_errors(), path.open("wb") as target:
            async with blobs.read(file.key) as pieces:
                async for piece in pieces:
                    digest.update(piece)
                    await in_thread(target.write, piece)
    except BlobCorrupt:
        return False
    return digest.hexdigest() == file.sha256


async def drop(blobs: Blobs, job: Job, *, but: Saved | None = None) -> None:
    """Removes what the job has saved, but for what `but` names. Raises StorageUnavailable."""
    kept = _keys(but)
    for key in await blobs.names(_folder(job)):
        if key not in kept:
            await blobs.delete(key)


async def sweep(
    engine: AsyncEngine,
    blobs: Blobs,
    *,
    older_than_s: float = ORPHANS_AFTER_S,
    clock: Callable[[], float] = time.time,
) -> int:
    """Removes blobs of that age that no job names; how many. Raises StorageUnavailable."""
    stale: dict[str, set[str]] = defaultdict(set)
    async for key, put_at in blobs.list_keys(PREFIX):
        if put_at < clock() - older_than_s and (parts := KEY.fullmatch(key)) is not None:
            stale[parts[2]].add(key)
    removed = 0
    for job_id, keys in stale.items():
        loose = keys - await _named(engine, JobId(job_id))
        for key in loose:
            await blobs.delete(key)
        removed += len(loose)
    return removed


async def _named(engine: AsyncEngine, job_id: JobId) -> set[str]:
    async with reading(engine) as connection:
        found = (await connection.execute(select(jobs.c.saved).where(jobs.c.id == job_id))).scalar_one_or_none()
    return _keys(None if found is None else Saved.decoded(found))


def _keys(saved: Saved | None) -> set[str]:
    return set() if saved is None else {file.key for file in saved.files}


def _folder(job: Job) -> str:
    if not PLAIN.fullmatch(job.tenant_id) or not PLAIN.fullmatch(job.id):
        raise ValueError(f"{job.tenant_id[:80]!r}, {job.id[:80]!r}: not ids of a tenant and a job")
    return f"{PREFIX}/{job.tenant_id}/{job.id}"
