"""Opening the database, and its schema."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.catalog import Version, metadata
from adapter_store.changes import KEPT, changes_since, last_change, record_change, take_turn
from adapter_store.errors import StorageUnavailable
from adapter_store.ids import TenantId
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading, writing
from gateway.database import CONNECTIONS, HEAD, MIGRATIONS, downgrade, migrate, open_engine
from tests.integration.store.conftest import TENANT, Publish
from tests.storage import Place


def schema(connection: Connection) -> set[str]:
    rows = connection.execute(text("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))
    return {" ".join(row.sql.split()).replace('"', "") for row in rows}


async def schema_of(engine: AsyncEngine) -> set[str]:
    async with reading(engine) as connection:
        return await connection.run_sync(schema)


@pytest.mark.local
async def test_a_commit_survives_a_power_cut(engine: AsyncEngine) -> None:
    """Every connection runs in WAL mode, with full synchronisation and foreign keys."""
    async with reading(engine) as connection:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        found = [(await connection.execute(text(f"PRAGMA {name}"))).scalar() for name in names]
    assert found == ["wal", 2, 1, 5_000]


@pytest.mark.local
async def test_the_schema_goes_down_and_up(engine: AsyncEngine) -> None:
    """Down to nothing and up by migrations gives what a new database is given at once."""
    fresh = await schema_of(engine)
    await downgrade(engine, "base")
    assert {sql.split("(")[0].strip() for sql in await schema_of(engine)} == {"CREATE TABLE alembic_version"}
    await migrate(engine)
    assert {normal(sql) for sql in await schema_of(engine)} == {normal(sql) for sql in fresh}
    async with reading(engine) as connection:
        assert await last_change(connection) == 0


def normal(sql: str) -> str:
    """Alembic names and orders a constraint's parts as SQLAlchemy does, but for spaces."""
    return sql.replace(" ", "").replace("PRIMARYKEY", "")


async def test_migrations_and_tables_agree(engine: AsyncEngine) -> None:
    """What the migrations make is what the code's tables say."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    await downgrade(engine, "base")
    await migrate(engine)
    async with reading(engine) as connection:
        found = await connection.run_sync(lambda sync: compare_metadata(MigrationContext.configure(sync), metadata))
    assert found == []


def test_head_is_the_newest_migration() -> None:
    """HEAD moves with every new file."""
    newest = max(path.name for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
    assert newest.startswith(HEAD)


async def test_many_processes_may_migrate_at_once(tmp_path: Path) -> None:
    """Eight engines on one new database: all succeed, the schema is there once."""
    engines = [open_engine(f"sqlite+aiosqlite:///{tmp_path / 'new' / 'tailor.db'}") for _ in range(8)]
    await asyncio.gather(*(migrate(engine) for engine in engines))
    async with reading(engines[0]) as connection:
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).all() == [(HEAD,)]
    await asyncio.gather(*(engine.dispose() for engine in engines))


async def test_a_new_file_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """Not in WAL mode yet, and another holds its lock: SQLite itself would not wait; past the busy time it is told."""
    path = tmp_path / "tailor.db"
    hasty, patient = (open_engine(f"sqlite+aiosqlite:///{path}", busy_timeout_s=seconds) for seconds in (0.05, 5.0))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable):
            await migrate(hasty)
        waiting = asyncio.create_task(migrate(patient))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        other.execute("ROLLBACK")
        await waiting
    await asyncio.gather(hasty.dispose(), patient.dispose())


MIGRATE = "import asyncio, sys; from gateway.database import *; asyncio.run(migrate(open_engine(sys.argv[1])))"


async def test_processes_that_start_at_once_migrate_once(engine: AsyncEngine, place: Place) -> None:
    """Three processes on a database of the first schema with rows in it: all succeed, the rows are there, once."""
    await downgrade(engine, "0001")
    async with writing(engine) as connection:
        await connection.execute(text("INSERT INTO tenants (id, name, created_at) VALUES ('t', 'acme', 7)"))
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", MIGRATE, place.database_url) for _ in range(3)
    ]
    assert await asyncio.gather(*(process.wait() for process in processes)) == [0, 0, 0]
    async with reading(engine) as connection:
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).all() == [(HEAD,)]
        assert (await connection.execute(text("SELECT name, plan FROM tenants"))).all() == [("acme", "default")]


async def test_adapters_survive_the_way_back_and_forward(
    engine: AsyncEngine, publish: Publish, store: AdapterStore, good: Path
) -> None:
    """Down to the first schema and up again: what that could hold is as it was, and can be asked for."""
    version = await publish(good)
    await downgrade(engine, "0001")
    await migrate(engine)
    found = await store.resolve(TENANT, "bot@1")
    assert isinstance(found, Version)
    assert (found.id, found.digest, found.files) == (version.id, version.digest, version.files)
    assert [adapter.name for adapter in await store.list(TENANT)] == ["bot"]


async def test_writers_wait_their_turn(engine: AsyncEngine) -> None:
    """Twenty transactions that read before they write all commit, in the order of the feed."""

    async def write(number: int) -> int:
        async with writing(engine) as connection:
            await take_turn(connection)
            before = await last_change(connection)
            await asyncio.sleep(0)
            seq = await record_change(connection, "adapter", TenantId("t"), str(number))
            assert seq == before + 1
            return seq

    numbers = await asyncio.gather(*(write(number) for number in range(20)))
    assert sorted(numbers) == list(range(1, 21))
    async with reading(engine) as connection:
        assert len(await changes_since(connection, 0, limit=15)) == 15
        assert [change.seq for change in await changes_since(connection, 15)] == [16, 17, 18, 19, 20]


async def test_the_feed_is_bounded(engine: AsyncEngine) -> None:
    """The oldest changes go; a reader that is too far behind sees the gap."""
    async with writing(engine) as connection:
        await record_change(connection, "adapter", None, None)
        await connection.execute(text("UPDATE change_counter SET value = :value"), {"value": KEPT})
        await record_change(connection, "adapter", None, None)
        assert [change.seq for change in await changes_since(connection, 0)] == [KEPT + 1]


@pytest.mark.local
async def test_a_writer_that_gets_no_turn_is_told(engine: AsyncEngine, tmp_path: Path) -> None:
    """Past the busy time: StorageUnavailable; once the lock is free it works again."""
    hasty = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'tailor.db'}", busy_timeout_s=0.05)
    async with writing(engine):
        with pytest.raises(StorageUnavailable):
            async with writing(hasty):
                pass
    async with writing(hasty) as connection:
        assert await record_change(connection, "adapter", None, None) == 1
    await hasty.dispose()


@pytest.mark.local
async def test_writers_take_turns_in_the_order_in_which_they_came(engine: AsyncEngine) -> None:
    """More of them than there are connections: the first that waits is the next, and who reads waits for none."""
    count = 2 * CONNECTIONS
    served: list[int] = []

    async def write(number: int) -> None:
        async with writing(engine) as connection:
            served.append(number)
            await record_change(connection, "adapter", None, str(number))

    async with asyncio.TaskGroup() as group, writing(engine) as connection:
        await record_change(connection, "adapter", None, "first")
        for number in range(count):
            group.create_task(write(number))
        async with asyncio.timeout(4), reading(engine) as reader:
            assert await last_change(reader) == 0
    assert served == list(range(count))


async def test_a_failed_transaction_leaves_no_change(engine: AsyncEngine) -> None:
    """The feed rolls back with the work it tells of."""

    async def record_and_fail() -> None:
        async with writing(engine) as connection:
            await record_change(connection, "adapter", TenantId("t"), "bot")
            raise KeyError

    with pytest.raises(KeyError):
        await record_and_fail()
    async with reading(engine) as connection:
        assert await last_change(connection) == 0
        assert await changes_since(connection, 0) == []


async def test_foreign_keys_hold(engine: AsyncEngine) -> None:
    """A key of a tenant that does not exist cannot be written."""
    statement = "INSERT INTO api_keys VALUES ('k', 'nobody', 'aa', 'p', '', '', 0, NULL, NULL, NULL, NULL, NULL)"
    with pytest.raises(IntegrityError):
        async with writing(engine) as connection:
            await connection.execute(text(statement))


async def test_a_database_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    """A folder in the database's place is StorageUnavailable, not a driver's error."""
    (tmp_path / "tailor.db").mkdir()
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'tailor.db'}")
    with pytest.raises(StorageUnavailable):
        await migrate(engine)
    await engine.dispose()


def test_the_store_imports_nothing_heavy() -> None:
    """The gateway's process gets by without numpy, torch, PEFT, vLLM and Alembic."""
    program = (
        "import sys, gateway.database, adapter_store.store, adapter_store.inspection\n"
        "heavy = {'numpy', 'torch', 'peft', 'vllm', 'transformers', 'safetensors', 'alembic'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
