"""Backup and restore, within one kind of storage and from each to the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.aliases import main_of
from adapter_store.blobs import Blobs
from adapter_store.catalog import metadata
from adapter_store.errors import AdapterNotFound
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading
from gateway.backup import BackupIncomplete, NotEmpty, back_up, check, keep_newest, restore, snapshots_in
from gateway.database import HEAD, SchemaUnknown, migrate, open_engine, replace_schema
from gateway.snapshots import SnapshotInvalid
from tests.bad_adapters import write_good
from tests.integration.store.conftest import OTHER, TENANT, Publish
from tests.storage import Kind, Place, Servers, Shelf, local_place
from tests.waiting import until

Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture
def backups(tmp_path: Path) -> Blobs:
    return Blobs.open(str(tmp_path / "backups"))


@pytest.fixture
def backup_shelf(backups: Blobs, tmp_path: Path) -> Shelf:
    return Shelf(backups, tmp_path / "backups")


@pytest.fixture(params=list(Kind))
def second(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Any:
    """Another place, of either kind, with nothing in it."""
    if request.param == Kind.LOCAL:
        (tmp_path / "second").mkdir()
        yield local_place(tmp_path / "second")
    else:
        with servers.place() as place:
            yield place


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[tuple[AsyncEngine, Blobs]]:
    engine = open_engine(place.database_url)
    try:
        yield engine, Blobs.open(place.blobs_url)
    finally:
        await engine.dispose()


async def rows_of(engine: AsyncEngine) -> Rows:
    async with reading(engine) as connection:
        return {
            table.name: sorted((tuple(row) for row in await connection.execute(select(table))), key=repr)
            for table in metadata.sorted_tables
        }


async def test_what_is_restored_is_what_was_backed_up(
    publish: Publish,
    engine: AsyncEngine,
    blobs: Blobs,
    shelf: Shelf,
    inspector: Inspector,
    backups: Blobs,
    second: Place,
    tmp_path: Path,
) -> None:
    """Every row of every table and every blob, whatever kind of storage either side is; and it lives on."""
    await publish(write_good(tmp_path / "one", seed=1))
    two = await publish(write_good(tmp_path / "two", seed=2))
    await publish(tmp_path / "two", tenant=OTHER)
    done = await back_up(engine, blobs, backups)
    assert (done.blobs, done.copied) == (len(shelf.keys()), len(shelf.keys()))
    assert (await check(backups)).rows == done.rows
    async with opened(second) as (new_engine, new_blobs):
        restored = await restore(new_engine, new_blobs, backups)
        assert (restored.rows, restored.copied) == (done.rows, done.blobs)
        assert await rows_of(new_engine) == await rows_of(engine)
        new_shelf = Shelf(new_blobs, second.folder)
        assert new_shelf.content() == shelf.content()
        await migrate(new_engine)
        store = AdapterStore(new_engine, new_blobs, inspector)
        assert await store.resolve(TENANT, "bot") == two
        await store.delete(TENANT, "bot")
        assert len(new_shelf.keys()) == 2


async def test_a_snapshot_is_of_one_moment(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, store: AdapterStore, backups: Blobs, tmp_path: Path
) -> None:
    """While adapters come and go, three backups are whole each: no version without its blobs."""
    folders = [write_good(tmp_path / f"good{seed}", seed=seed) for seed in range(1, 4)]
    enough = asyncio.Event()
    wrote = dict.fromkeys(("a", "b"), 0)

    async def come_and_go(writer: str) -> None:
        """The next adapter comes before the last one goes, so that there always is one."""
        while not enough.is_set():
            number = wrote[writer]
            await publish(folders[number % 3], name=f"{writer}{number % 2}")
            if number:
                await store.delete(TENANT, f"{writer}{(number - 1) % 2}")
            wrote[writer] += 1

    async def back_up_between() -> str:
        """Of what was there at the one before, nothing is left."""
        before = dict(wrote)
        await until(lambda: all(wrote[writer] >= before[writer] + 2 for writer in wrote))
        return (await back_up(engine, blobs, backups)).snapshot

    async with asyncio.TaskGroup() as writers:
        for writer in wrote:
            writers.create_task(come_and_go(writer))
        names = [await back_up_between() for _ in range(3)]
        enough.set()
    seen = set[str]()
    for number, name in enumerate(names):
        (tmp_path / str(number)).mkdir()
        async with opened(local_place(tmp_path / str(number))) as (restored, restored_blobs):
            await restore(restored, restored_blobs, backups, name)
            adapters = await AdapterStore(restored, restored_blobs, store._inspector).list(TENANT)
            assert {adapter.name[0] for adapter in adapters} == set(wrote)
            for adapter in adapters:
                assert all([await restored_blobs.exists(file.key, file.size_bytes) for file in adapter.default.files])
            seen.update(adapter.id for adapter in adapters)
    assert len(seen) >= 6


async def test_a_backup_copies_what_is_new(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, store: AdapterStore, backups: Blobs, tmp_path: Path
) -> None:
    """The second costs the blobs that came since; old snapshots go with those that they alone name."""
    await publish(write_good(tmp_path / "one", seed=1))
    assert (await back_up(engine, blobs, backups)).copied == 2
    await publish(write_good(tmp_path / "two", seed=2))
    second = await back_up(engine, blobs, backups)
    assert (second.blobs, second.copied) == (3, 1)
    await store.delete(TENANT, "bot")
    await publish(tmp_path / "two")
    await back_up(engine, blobs, backups)
    assert await keep_newest(backups, 1) == 1
    assert len(await snapshots_in(backups)) == 1
    assert (await check(backups)).blobs == 2


@pytest.mark.local
@pytest.mark.parametrize("what", ["a blob", "the snapshot", "the snapshot's end", "a blob that is gone"])
async def test_a_damaged_backup_restores_nothing(
    what: str,
    publish: Publish,
    engine: AsyncEngine,
    blobs: Blobs,
    good: Path,
    backups: Blobs,
    backup_shelf: Shelf,
    local: Place,
    tmp_path: Path,
) -> None:
    """A flipped bit anywhere, a torn or a missing file: told before anything is written, and no blob stays behind."""
    version = await publish(good)
    done = await back_up(engine, blobs, backups)
    key = done.snapshot if "snapshot" in what else version.files[1].key
    if what == "a blob that is gone":
        await backups.delete(key)
    elif what == "the snapshot's end":
        backup_shelf.write(key, backup_shelf.read(key)[:-20])
    else:
        backup_shelf.flip(key, len(backup_shelf.read(key)) // 2)
    (tmp_path / "new").mkdir()
    place = local_place(tmp_path / "new")
    async with opened(place) as (new_engine, new_blobs):
        for call in (check(backups), restore(new_engine, new_blobs, backups)):
            with pytest.raises((SnapshotInvalid, BackupIncomplete)):
                await call
        assert Shelf(new_blobs, place.folder).keys() == []
        async with reading(new_engine) as connection:
            assert (await connection.execute(text("SELECT count(*) FROM sqlite_master"))).scalar() == 0


@pytest.mark.local
async def test_a_damaged_blob_makes_no_snapshot(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, backups: Blobs, tmp_path: Path
) -> None:
    """It is named, the rest is copied, and the last good snapshot stays the newest."""
    await publish(write_good(tmp_path / "one", seed=1))
    version = await publish(write_good(tmp_path / "two", seed=2))
    shelf.flip(version.files[1].key, 9)
    with pytest.raises(BackupIncomplete, match=version.files[1].key):
        await back_up(engine, blobs, backups)
    assert await snapshots_in(backups) == []
    assert len(await backups.names("adapters")) == 2


async def test_what_is_there_is_not_overwritten(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, store: AdapterStore, backups: Blobs, tmp_path: Path
) -> None:
    """A database with somebody's rows is refused; with force it becomes what the backup says."""
    first = await publish(write_good(tmp_path / "one", seed=1))
    await back_up(engine, blobs, backups)
    rows = await rows_of(engine)
    await publish(write_good(tmp_path / "two", seed=2))
    with pytest.raises(NotEmpty, match="--force"):
        await restore(engine, blobs, backups)
    assert main_of(await store.resolve(TENANT, "bot")).number == 2
    await restore(engine, blobs, backups, force=True)
    assert await store.resolve(TENANT, "bot") == first
    assert await rows_of(engine) == rows
    with pytest.raises(AdapterNotFound):
        await store.resolve(TENANT, "bot@2")


async def test_a_restore_that_fails_changes_nothing(
    publish: Publish, engine: AsyncEngine, store: AdapterStore, good: Path
) -> None:
    """An error in the middle of the rows: the tables, and what was in them, are as before."""
    await publish(good)
    rows = await rows_of(engine)

    def fail(_: object) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await replace_schema(engine, HEAD, fail)
    with pytest.raises(SchemaUnknown, match="9999"):
        await replace_schema(engine, "9999", lambda _: None)
    assert await rows_of(engine) == rows


async def test_an_old_schema_is_brought_forward(engine: AsyncEngine) -> None:
    """A snapshot of the first schema is written into that, then migrated: what it had is there, what is new too."""
    tenant = "INSERT INTO tenants (id, name, created_at) VALUES ('t', 'acme', 7)"

    def fill(connection: Connection) -> None:
        connection.execute(text(tenant))

    await replace_schema(engine, "0001", fill)
    async with reading(engine) as connection:
        assert (await connection.execute(text("SELECT name, plan FROM tenants"))).all() == [("acme", "default")]
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).all() == [(HEAD,)]
