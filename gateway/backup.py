"""`tailor backup` and `tailor restore`: the rows of one moment and every blob that they name, in a store of their own.

A backup's store has the blobs under the same keys as the live one, shared by all its snapshots, so that each costs what
is new. A snapshot appears last: where it is, all that it names is. It can be taken while gateways run.
"""

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, MetaData, inspect

from adapter_store.blob_rows import NamedBlob
from adapter_store.blobs import Blobs
from adapter_store.engine import AsyncEngine
from adapter_store.errors import AdapterStoreError, BlobCorrupt
from adapter_store.transactions import reading
from gateway.database import replace_schema
from gateway.snapshots import NAME, Snapshot, SnapshotInvalid, snapshot_name, write_snapshot

SNAPSHOTS = "snapshots"
TELLING = ("tenants", "adapters", "api_keys")  # a database with rows in none of these holds nothing of anybody's


class NotEmpty(AdapterStoreError):
    """There is something where a restore would write."""


class BackupIncomplete(AdapterStoreError):
    """Blobs are damaged or gone: the snapshot names them, and cannot be trusted without them."""

    def __init__(self, keys: Collection[str], where: str) -> None:
        first = "\n".join(f"  {key}" for key in sorted(keys)[:10])
        super().__init__(f"{len(keys)} blobs are damaged or gone in {where}:\n{first}")
        self.keys = keys


@dataclass(frozen=True, slots=True)
class Done:
    """What a backup or a restore came to; `copied` counts blobs that were not there yet."""

    snapshot: str
    rows: int
    blobs: int
    copied: int
    copied_bytes: int


async def back_up(engine: AsyncEngine, blobs: Blobs, target: Blobs) -> Done:
    """Copies what is missing, then the rows.

    A blob that goes while this runs belongs to an adapter that was deleted: the rows are taken anew. What a job saves
    goes with its next save, so that is copied with its row; without it the job begins anew.
    Raises BackupIncomplete (a blob is damaged: the rest is copied, no snapshot is made), SnapshotInvalid, StorageError.
    """
    copied = copied_bytes = 0

    async def copy(blob: NamedBlob) -> bool:
        nonlocal copied, copied_bytes
        if not await target.exists(blob.key, blob.size_bytes):
            try:
                await blobs.copy(blob.key, blob.sha256, target)
            except BlobCorrupt:
                return False
            copied, copied_bytes = copied + 1, copied_bytes + blob.size_bytes
        return True

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot"
        faulty: set[str] = set()
        while True:
            named = await write_snapshot(engine, path, copy)
            before = faulty
            faulty = {blob.key for blob in sorted(named, key=lambda blob: blob.key) if not await copy(blob)}
            if faulty <= before:
                break
        if faulty:
            raise BackupIncomplete(faulty, "the blob store; `tailor store scrub` says more. No snapshot was made")
        name = snapshot_name(path)
        snapshot = Snapshot(name, path)
        await target.put(name, path)
        return Done(name, snapshot.row_count, len(named), copied, copied_bytes)


async def snapshots_in(source: Blobs) -> Sequence[str]:
    """Oldest first."""
    return [name for name in await source.names(SNAPSHOTS) if NAME.fullmatch(name)]


async def keep_newest(target: Blobs, count: int) -> int:
    """Removes older snapshots, then the blobs that none of the rest names; how many blobs."""
    found = await snapshots_in(target)
    for name in found[:-count]:
        await target.delete(name)
    named: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in found[-count:]:
            named |= {blob.key for blob in (await _fetch(target, name, Path(folder))).blobs}
    loose = [blob.key async for blob in target.list() if blob.key not in named]
    for key in loose:
        await target.delete(key)
    return len(loose)


async def check(source: Blobs, name: str | None = None) -> Done:
    """Reads the snapshot and every blob that it names, and writes nothing.

    Raises SnapshotInvalid, BackupIncomplete, StorageError.
    """
    with tempfile.TemporaryDirectory() as folder:
        snapshot = await _fetch(source, name, Path(folder))
        faulty = {blob.key for blob in snapshot.blobs if not await _is_whole(source, blob)}
        if faulty:
            raise BackupIncomplete(faulty, "the backup")
        return Done(snapshot.name, snapshot.row_count, len(snapshot.blobs), 0, 0)


async def restore(
    engine: AsyncEngine, blobs: Blobs, source: Blobs, name: str | None = None, *, force: bool = False
) -> Done:
    """Makes database and blobs what they were: all of it, or nothing. No gateway may run meanwhile.

    Blobs come first, each verified, then all rows in one transaction; where that fails, what was copied is removed.
    `force` replaces what is in the database. Raises NotEmpty, SnapshotInvalid, BackupIncomplete, StorageError.
    """
    if not force:
        await _check_empty(engine)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = await _fetch(source, name, Path(folder))
        copied: list[NamedBlob] = []
        try:
            await _fill(blobs, source, snapshot.blobs, copied)
            await replace_schema(engine, snapshot.revision, snapshot.write_to)
        except BaseException:
            for blob in copied:
                await blobs.delete(blob.key)
            raise
        size_bytes = sum(blob.size_bytes for blob in copied)
        return Done(snapshot.name, snapshot.row_count, len(snapshot.blobs), len(copied), size_bytes)


async def _check_empty(engine: AsyncEngine) -> None:
    def holds_something(connection: Connection) -> bool:
        there = set(inspect(connection).get_table_names())
        found = MetaData()
        found.reflect(connection, only=[name for name in TELLING if name in there])
        return any(connection.execute(table.select().limit(1)).first() for table in found.tables.values())

    async with reading(engine) as connection:
        if await connection.run_sync(holds_something):
            raise NotEmpty("the database is not empty: stop its gateways and give --force to replace what is there")


async def _fetch(source: Blobs, name: str | None, folder: Path) -> Snapshot:
    """The named snapshot, or the newest, read and found to be whole."""
    found = await snapshots_in(source)
    if name is None and found:
        name = found[-1]
    if name is None or name not in found:
        raise SnapshotInvalid(f"there is no snapshot {name or ''}: {len(found)} are in {SNAPSHOTS}/")
    path = folder / "snapshot"
    with path.open("wb") as file:
        async with source.read(name) as chunks:
            async for chunk in chunks:
                file.write(chunk)
    return Snapshot(name, path)


async def _fill(blobs: Blobs, source: Blobs, named: Collection[NamedBlob], copied: list[NamedBlob]) -> None:
    """Copies what is not there whole; goes on to the end, so that all faults are told at once."""
    faulty: set[str] = set()
    for blob in sorted(named, key=lambda blob: blob.key):
        if await _is_whole(blobs, blob):
            continue
        try:
            await source.copy(blob.key, blob.sha256, blobs)
        except BlobCorrupt:
            faulty.add(blob.key)
        else:
            copied.append(blob)
    if faulty:
        raise BackupIncomplete(faulty, "the backup: nothing was restored")


async def _is_whole(blobs: Blobs, blob: NamedBlob) -> bool:
    return await blobs.exists(blob.key, blob.size_bytes) and await blobs.sha256(blob.key) == blob.sha256
