"""What a worker writes of a job: how far it is, its checkpoints, its end. Nothing where the lease is another's by now.

A finished adapter goes through the same door as an upload: staged, inspected, published; the version, the result file
and the end of the job are one transaction.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapter_store import aliases
from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, StagedBundle, Staging, storage_errors
from adapter_store.catalog import Provenance, Version, select_versions, version_of, versions
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import BlobCorrupt, StorageError
from adapter_store.store import AdapterStore
from adapter_store.threads import in_thread
from adapter_store.transactions import reading
from training import evaluations, files, queue, saved_runs
from training.evaluations import Evaluated
from training.jobs import JobError, Saved, Told
from training.queue import CheckpointWith, Claimed, EndWith, Metrics

RESULT_FILE = "step_metrics.csv"
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Results:
    """Calls raise LeaseLost where the job is not this worker's any more, StorageError where they may be repeated."""

    engine: AsyncEngine
    blobs: Blobs
    store: AdapterStore
    staging: Staging
    clock: Callable[[], float]

    @property
    def now(self) -> int:
        return int(self.clock())

    async def tell(
        self, claimed: Claimed, metrics: Sequence[Metrics], told: Sequence[Told], total_steps: int | None
    ) -> None:
        """Steps and messages, in one transaction."""
        await queue.report(self.engine, claimed, now=self.now, metrics=metrics, told=told, total_steps=total_steps)

    async def save(self, claimed: Claimed, step: int, path: Path) -> Saved | None:
        """Where any worker can go on from; None where a newer file has taken the place of the one at `path`."""
        try:
            return await saved_runs.keep(self.engine, self.blobs, claimed, step, path)
        except FileNotFoundError:
            return None

    async def checkpoint(self, claimed: Claimed, step: int, metrics: Mapping[str, float | None], adapter: Path) -> None:
        """A version that is served by its own name alone. Raises what `AdapterStore.publish` raises."""
        together = CheckpointWith(claimed, step, metrics, now=self.clock, name_of=self.store.fine_tuned_name)
        await self._publish(claimed, adapter, None, together)

    async def succeed(self, claimed: Claimed, made: Evaluated) -> None:
        """The end of the job: its version behind its alias, its result file. Raises what `publish` raises."""
        job = claimed.job
        async with reading(self.engine) as connection:
            content = await queue.result_csv(connection, job.id)
        path = made.adapter.with_suffix(".csv")
        with storage_errors():
            await in_thread(path.write_bytes, content)
        blob = await files.keep_blob(self.engine, self.blobs, job.tenant_id, path)

        async def result_file(connection: AsyncConnection, version: Version) -> Sequence[str]:
            if made.report is not None:
                await evaluations.keep(connection, version.id, made.report)
            return [(await files.create_result(connection, self.blobs, job.tenant_id, RESULT_FILE, blob, self.now)).id]

        together = EndWith(claimed, now=self.clock, name_of=self.store.fine_tuned_name, also=result_file)
        await self._publish(claimed, made.adapter, job.alias, together)

    async def fail(self, claimed: Claimed, error: JobError) -> None:
        """The end of the job without a result."""
        await queue.fail(self.engine, claimed, error, now=self.now)

    async def give_back(self, claimed: Claimed) -> None:
        """For another worker, or for its owner who has asked for a pause."""
        await queue.release(self.engine, claimed, now=self.now)

    async def forget_if_over(self, claimed: Claimed) -> None:
        """Removes what a job had saved that is over; where that fails, `saved_runs.sweep` does it later."""
        with suppress(StorageError):
            await saved_runs.drop(self.engine, self.blobs, claimed.job.tenant_id, claimed.job.id)

    async def fetch_file(self, claimed: Claimed, file_id: str, path: Path) -> None:
        """One of the job's files. Raises FileNotKnown, FileDamaged."""
        async with reading(self.engine) as connection:
            file = await files.find(connection, claimed.job.tenant_id, file_id)
        await files.copy_to(self.blobs, file, path)

    async def fetch_adapter(self, claimed: Claimed, folder: Path) -> bool:
        """The version that the job goes on from; False where it is gone or damaged."""
        job = claimed.job
        query = select_versions().where(versions.c.tenant_id == job.tenant_id, versions.c.id == job.warm_start)
        async with reading(self.engine) as connection:
            row = (await connection.execute(query)).one_or_none()
        return row is not None and await self._fetch_version(version_of(row), folder)

    async def fetch_served(self, claimed: Claimed, folder: Path) -> bool:
        """What the job's result is to take the place of; False where there is nothing, or it is damaged."""
        job = claimed.job
        async with reading(self.engine) as connection:
            found = await aliases.find(connection, job.tenant_id, job.adapter, job.alias)
        return found is not None and await self._fetch_version(aliases.main_of(found), folder)

    async def _fetch_version(self, version: Version, folder: Path) -> bool:
        await in_thread(folder.mkdir, exist_ok=True)
        try:
            for file in version.files:
                await self.blobs.fetch(file.key, file.sha256, folder / file.name)
        except BlobCorrupt:
            return False
        return True

    async def _publish(
        self, claimed: Claimed, adapter: Path, alias: str | None, together: CheckpointWith | EndWith
    ) -> None:
        job = claimed.job
        async with self.staging.stage() as bundle:
            await _stage(adapter, bundle)
            await self.store.publish(
                job.tenant_id,
                job.adapter,
                bundle,
                alias=alias,
                provenance=Provenance.JOB,
                published_by=job.created_by,
                quota=job.quota,
                together=together,
                provisional=alias is None,
            )


async def _stage(adapter: Path, bundle: StagedBundle) -> None:
    for name in BUNDLE_FILES:
        await bundle.write(name, _pieces(adapter / name))


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with storage_errors(), path.open("rb") as file:
        while piece := await in_thread(file.read, READ_BYTES):
            yield piece
