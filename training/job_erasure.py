"""Erasing a job that is over: its row and story, its checkpoints, its result files, what it had saved.

All rows go in one transaction, with the erasure that sees to blobs and replicas (`adapter_store/erasure.py`). What is
the adapter's by now stays, and is erased as the adapter's: the job's result, a checkpoint that an alias stands for, and
one that another job has made as well.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select

from adapter_store import aliases, catalog
from adapter_store.catalog import Provenance, Version
from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.erasure import ErasedBlob, Erasure, Scope, leaving, note_erasure, remove_versions
from adapter_store.errors import VersionInUse
from adapter_store.ids import TenantId, VersionId
from adapter_store.transactions import reading, writing
from training import files
from training.errors import StateConflict
from training.jobs import OVER, Job, find_in, job_checkpoints, job_events, job_metadata, jobs

SAVED_RUN = "saved-run"

OnErase = Callable[[AsyncConnection, Job], Awaitable[None]]
"""Removes what else is kept of a job that goes, in the same transaction."""


async def _nothing_else(_: AsyncConnection, __: Job) -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Doomed:
    """A job, all versions that its adapter has, and those of them that go with it."""

    job: Job
    found: Sequence[Version]
    gone: list[Version]


class JobErasures:
    """Every call names the tenant, and raises JobNotFound, StateConflict (the job is not over), StorageUnavailable."""

    def __init__(
        self, engine: AsyncEngine, *, on_erase: OnErase = _nothing_else, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._on_erase = on_erase
        self._clock = clock

    async def leaving(self, tenant_id: TenantId, job_id: str) -> list[str]:
        """The digests that would leave the replicas with the job."""
        async with reading(self._engine) as connection:
            return await leaving(connection, tenant_id, (await _doomed(connection, tenant_id, job_id)).gone)

    async def erase(
        self,
        tenant_id: TenantId,
        job_id: str,
        *,
        requested_by: str | None = None,
        force: bool = False,
        running: int = 0,
        replicas: Iterable[str] = (),
    ) -> Erasure:
        """Removes the rows and notes what is still to be done. `running`: requests on what goes, just now.

        Raises VersionInUse, without `force`; StorageFull.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            doomed = await _doomed(connection, tenant_id, job_id)
            job = doomed.job
            if running and not force:
                raise VersionInUse(job.adapter, None, [], running)
            blobs = await files.remove(connection, tenant_id, job.result_files)
            if job.saved is not None:
                blobs.append(ErasedBlob(job.id, SAVED_RUN, job.saved.sha256, job.saved.size_bytes))
            for table in (job_events, job_checkpoints, job_metadata):
                await connection.execute(delete(table).where(table.c.job_id == job.id))
            await connection.execute(delete(jobs).where(jobs.c.id == job.id))
            await self._on_erase(connection, job)
            if doomed.gone:
                await record_change(connection, aliases.NOUN, tenant_id, job.adapter)
            return await note_erasure(
                connection,
                tenant_id,
                Scope.JOB,
                job.id,
                blobs,
                requested_by=requested_by,
                forced=force,
                now=int(self._clock()),
                adapter=job.adapter,
                erased=await remove_versions(connection, doomed.found, doomed.gone),
                replicas=replicas if doomed.gone else (),
            )


async def _doomed(connection: AsyncConnection, tenant_id: TenantId, job_id: str) -> _Doomed:
    job = await find_in(connection, tenant_id, job_id)
    if job.status not in OVER:
        raise StateConflict(job.id, job.status, "erased: cancel it first")
    found = await catalog.list_versions(connection, tenant_id, job.adapter)
    mine = select(job_checkpoints.c.version_id).where(job_checkpoints.c.job_id == job.id)
    made = set((await connection.execute(mine)).scalars()) - await _others(connection, job)
    gone = [
        version
        for version in found
        if version.id in made
        and version.id != job.version_id
        and version.provenance is Provenance.JOB
        and not await aliases.standing_for(connection, version)
    ]
    return _Doomed(job, found, gone)


async def _others(connection: AsyncConnection, job: Job) -> set[VersionId]:
    """What other jobs of the adapter have made."""
    theirs = (jobs.c.tenant_id == job.tenant_id) & (jobs.c.adapter == job.adapter) & (jobs.c.id != job.id)
    points = select(job_checkpoints.c.version_id).join(jobs, jobs.c.id == job_checkpoints.c.job_id).where(theirs)
    results = select(jobs.c.version_id).where(theirs, jobs.c.version_id.is_not(None))
    return set((await connection.execute(points.union(results))).scalars())
