"""Training files as rows and blobs, on both kinds of storage: whole or not at all, and seen by what looks at blobs."""

import asyncio
import time
from hashlib import sha256
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.blobs import Blobs, blob_key
from adapter_store.engine import AsyncConnection
from adapter_store.erasure import Erasures, State
from adapter_store.errors import BlobCorrupt, QuotaExceeded
from adapter_store.scrub import Scrubber
from adapter_store.store import AdapterStore
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from gateway.backup import back_up, restore
from tests.integration.store.conftest import OTHER, TENANT
from tests.storage import Shelf
from training.errors import FileDamaged, FileNotKnown
from training.files import (
    File,
    FileQuota,
    Files,
    NewFile,
    Purpose,
    copy_to,
    create_result,
    find,
    keep_blob,
    read,
)

DATA = b'{"messages": []}\n' * 1_000
LATER = 10 * 86_400.0


class PowerCut(Exception):
    """Raised where a process would have died."""


class Cut(Together[File]):
    """Ends the transaction just before its commit."""

    async def after(self, connection: AsyncConnection, made: File) -> None:
        raise PowerCut


@pytest.fixture
def files(engine: AsyncEngine, blobs: Blobs) -> Files:
    return Files(engine, blobs)


def new(data: bytes = DATA, tenant_id: str = TENANT) -> NewFile:
    return NewFile(
        TENANT if tenant_id == TENANT else OTHER, Purpose.FINE_TUNE, "a", sha256(data).hexdigest(), len(data)
    )


async def keep(files: Files, folder: Path, data: bytes = DATA, tenant_id: str = TENANT) -> File:
    path = folder / sha256(data).hexdigest()[:8]
    path.write_bytes(data)
    return await files.create(new(data, tenant_id), path)


async def content(blobs: Blobs, file: File) -> bytes:
    async with read(blobs, file) as pieces:
        return b"".join([piece async for piece in pieces])


async def test_a_file_is_read_as_it_was_sent(files: Files, blobs: Blobs, engine: AsyncEngine, tmp_path: Path) -> None:
    """By its tenant, in a transaction of the caller's, whole or into a file of its own; to others it is missing."""
    kept = await keep(files, tmp_path)
    async with reading(engine) as connection:
        found = await find(connection, TENANT, kept.id)
        with pytest.raises(FileNotKnown):
            await find(connection, OTHER, kept.id)
    assert found == kept
    assert await content(blobs, found) == DATA
    await copy_to(blobs, found, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


async def test_damage_is_told_before_the_last_byte(
    files: Files, blobs: Blobs, shelf: Shelf, engine: AsyncEngine, tmp_path: Path
) -> None:
    """A reader gets no end, a copy is refused, and the scrubber notes it; sent again it is whole again."""
    kept = await keep(files, tmp_path)
    shelf.flip(kept.blob.key, 5)
    with pytest.raises(FileDamaged):
        await content(blobs, kept)
    with pytest.raises(FileDamaged):
        await copy_to(blobs, kept, tmp_path / "copy")
    scrubber = Scrubber(engine, blobs, None, bytes_per_s=1 << 30)
    await scrubber.run()
    assert [(fault.fault, fault.versions) for fault in await scrubber.faulty()] == [("corrupt", (kept.id,))]
    await keep(files, tmp_path)
    assert await content(blobs, kept) == DATA
    assert await scrubber.faulty() == []


async def test_a_crash_before_the_row_leaves_a_blob_that_is_collected(
    files: Files, store: AdapterStore, shelf: Shelf, tmp_path: Path
) -> None:
    """A blob that no row names goes, one that a row names stays, however old they are."""
    kept = await keep(files, tmp_path)
    shelf.write(blob_key(TENANT, "0" * 64), b"a process died after this")
    store._clock = lambda: time.time() + LATER
    assert await store.collect_orphans(3_600) == 1
    assert shelf.keys() == [kept.blob.key]


async def test_a_failure_before_the_commit_leaves_nothing(files: Files, shelf: Shelf, tmp_path: Path) -> None:
    """Neither row nor blob; and where another file has the same bytes, these stay."""
    path = tmp_path / "data"
    path.write_bytes(DATA)
    with pytest.raises(PowerCut):
        await files.create(new(), path, together=Cut())
    assert shelf.keys() == []
    assert await files.page(TENANT) == []
    kept = await files.create(new(), path)
    with pytest.raises(PowerCut):
        await files.create(new(), path, together=Cut())
    assert shelf.keys() == [kept.blob.key]


async def test_quotas_hold_at_the_same_time(files: Files, tmp_path: Path) -> None:
    """Of ten at once as many are kept as fit; another tenant's do not count."""
    await keep(files, tmp_path, tenant_id=OTHER)
    (tmp_path / "data").write_bytes(DATA)
    quota = FileQuota(files=3, stored_bytes=10 * len(DATA))
    tries = (files.create(new(), tmp_path / "data", quota) for _ in range(10))
    done = await asyncio.gather(*tries, return_exceptions=True)
    assert [type(one) for one in done if not isinstance(one, File)] == [QuotaExceeded] * 7
    with pytest.raises(QuotaExceeded, match="too large"):
        await files.create(new(), tmp_path / "data", FileQuota(stored_bytes=4 * len(DATA) - 1))


async def test_the_same_bytes_go_with_their_last_file(
    files: Files, blobs: Blobs, engine: AsyncEngine, shelf: Shelf, tmp_path: Path
) -> None:
    """The first receipt says kept, the second erased; each is completed though no replica is asked."""
    erasures = Erasures(engine, blobs, None)
    first, second = [await keep(files, tmp_path) for _ in range(2)]
    for file, told in ((first, "kept"), (second, "erased")):
        erasure = await files.erase(TENANT, file.id, requested_by="key_1")
        await erasures.drop_blobs(erasure)
        done = await erasures.complete(erasure.id)
        assert done.state is State.COMPLETED
        assert [blob["blob"] for blob in done.statement()["files"]] == [told]
    assert shelf.keys() == []
    with pytest.raises(FileNotKnown):
        await files.erase(TENANT, second.id)


async def test_a_result_is_a_row_of_the_jobs_own_transaction(
    files: Files, blobs: Blobs, engine: AsyncEngine, tmp_path: Path
) -> None:
    """Its blob comes before; without it there is no row."""
    (tmp_path / "result.csv").write_bytes(b"step,train_loss\n")
    blob = await keep_blob(engine, blobs, TENANT, tmp_path / "result.csv")
    async with writing(engine) as connection:
        made = await create_result(connection, blobs, TENANT, "step_metrics.csv", blob, 1_000)
    assert (made.purpose, made.report, made.created_by) == (Purpose.RESULTS, None, None)
    assert await content(blobs, await files.find(TENANT, made.id)) == b"step,train_loss\n"
    await blobs.delete(blob.key)
    with pytest.raises(BlobCorrupt):
        async with writing(engine) as connection:
            await create_result(connection, blobs, TENANT, "step_metrics.csv", blob, 1_000)


async def test_files_are_in_the_backup(
    files: Files, blobs: Blobs, engine: AsyncEngine, shelf: Shelf, tmp_path: Path
) -> None:
    """Restored over what was lost, they are read again."""
    kept = await keep(files, tmp_path)
    backups = Blobs.open(str(tmp_path / "backups"))
    assert (await back_up(engine, blobs, backups)).blobs == 1
    await files.erase(TENANT, kept.id)
    await blobs.delete(kept.blob.key)
    await restore(engine, blobs, backups, force=True)
    assert await files.find(TENANT, kept.id) == kept
    assert await content(blobs, kept) == DATA
