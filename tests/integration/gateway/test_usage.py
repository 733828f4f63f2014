"""The usage ledger on SQLite and PostgreSQL: nothing lost, nothing counted twice, and how it is read."""

import asyncio
import csv
import io
import os
import random
import resource
import signal
import string
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from adapter_store.errors import StorageUnavailable
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.database import migrate, open_engine, usage, usage_batches
from gateway.journal import Meter
from gateway.left_journals import STALE_S, left_segments
from gateway.spreadsheet import csv_of
from gateway.tenants import Tenants
from gateway.usage import Ledger, UsageQuestion, read_usage
from tests.integration.gateway.conftest import Gateway, error_of
from tests.servers import PostgresServer, empty_postgres, postgres_server

HOUR = 3_600
NOON = 1_793_534_400  # 2026-11-01 12:00 UTC
TENANT = "tnt_" + "a" * 24
LEFT = f"{NOON}\t{TENANT}\tbot\t1\t0\t10\t4\t5\n".encode()
PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").url
        await empty_postgres(url)
        engine = open_engine(url)  # there the time is that of a connection, which a busy machine makes slowly
    else:
        engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'tailor.db'}", busy_timeout_s=0.05)
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
async def lite(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """SQLite alone, where the database makes no difference."""
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'tailor.db'}", busy_timeout_s=0.05)
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "usage"


def record(ledger: Ledger, tenant: str = "tnt_a", adapter: str = "bot", version: int = 1, **counts: Any) -> None:
    given = {"failed": False, "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5, **counts}
    ledger.journal.record(ledger.journal.meter_of(tenant, adapter, version), **given)


@asynccontextmanager
async def ledger_of(engine: Any, folder: Path, **options: Any) -> AsyncIterator[Ledger]:
    """A ledger that writes when it is told to."""
    ledger = Ledger(engine, folder, **{"flush_s": 3_600.0, **options})
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.close()


async def requests_in(engine: AsyncEngine) -> int:
    async with reading(engine) as connection:
        return int((await connection.execute(select(func.sum(usage.c.requests)))).scalar() or 0)


async def batches_in(engine: AsyncEngine) -> int:
    async with reading(engine) as connection:
        return int((await connection.execute(select(func.count()).select_from(usage_batches))).scalar_one())


async def test_what_was_recorded_is_written_by_hour(engine: AsyncEngine, folder: Path) -> None:
    """Sums by hour, tenant, adapter and version; a later batch adds to the same rows; nothing stays in the journal."""
    now = float(NOON)
    async with ledger_of(engine, folder, wall_clock=lambda: now) as ledger:
        for _ in range(3):
            record(ledger)
        record(ledger, version=2, failed=True, completion_tokens=0)
        record(ledger, "tnt_b", "", 0)
        await ledger.flush()
        record(ledger)
        now += HOUR
        record(ledger, prompt_tokens=2**40)
        await ledger.flush()
        await ledger.flush()
        assert await batches_in(engine) == 2
    async with reading(engine) as connection:
        rows = (
            await connection.execute(select(usage).order_by(usage.c.hour, usage.c.tenant_id, usage.c.version))
        ).all()
    assert [tuple(row) for row in rows] == [
        (NOON, "tnt_a", "bot", 1, 4, 0, 40, 16, 20),
        (NOON, "tnt_a", "bot", 2, 1, 1, 10, 4, 0),
        (NOON, "tnt_b", "", 0, 1, 0, 10, 4, 5),
        (NOON + HOUR, "tnt_a", "bot", 1, 1, 0, 2**40, 4, 5),
    ]
    assert list(folder.iterdir()) == []


async def test_a_tab_that_is_kept_counts_on_in_the_next_batch(lite: AsyncEngine, folder: Path) -> None:
    """A replica keeps one for as long as it holds the version, and two replicas have two."""
    counts: dict[str, Any] = {"failed": False, "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}
    async with ledger_of(lite, folder) as ledger:
        kept, other = (Meter("tnt_a", "bot", 1) for _ in range(2))
        for batch in range(1, 4):
            for meter in (kept, other, kept, ledger.journal.meter_of("tnt_a", "bot", 1)):
                ledger.journal.record(meter, **counts)
            assert await ledger.tokens_since(TenantId("tnt_a"), 0) == 10 * batch - 2
            ledger.journal.record(kept, **counts)
            await ledger.flush()
            assert await requests_in(lite) == 5 * batch
            assert await ledger.tokens_since(TenantId("tnt_a"), 0) == 10 * batch


async def test_it_writes_by_itself(engine: AsyncEngine, folder: Path) -> None:
    """Within its interval, without being told."""
    async with ledger_of(engine, folder, flush_s=0.02) as ledger:
        record(ledger)
        async with asyncio.timeout(5):
            while await requests_in(engine) == 0:
                await asyncio.sleep(0.01)


class CommitsAndFails:
    """An engine whose connection breaks when the commit has been done and before it is told."""

    def __init__(self, engine: AsyncEngine, times: int) -> None:
        self._engine = engine
        self.times = times

    def execution_options(self, **options: Any) -> "CommitsAndFails":
        return self

    def get_execution_options(self) -> Any:
        return {}

    def connect(self) -> Any:
        return self._engine.connect()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.execution_options(writes=True).begin() as connection:
            yield connection
        if self.times:
            self.times -= 1
            raise StorageUnavailable("the connection broke")


async def test_an_ambiguous_commit_counts_once(engine: AsyncEngine, folder: Path) -> None:
    """The same batch is sent again, found by its id, and not added again."""
    broken = CommitsAndFails(engine, 0)
    async with ledger_of(broken, folder) as ledger:
        broken.times = 2
        record(ledger)
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                await ledger.flush()
            record(ledger)
        await ledger.flush()
    assert await requests_in(engine) == 3


async def test_a_kill_between_commit_and_deletion_counts_once(engine: AsyncEngine, folder: Path) -> None:
    """The journal is found by the next process, which sees that the database has the batch."""
    async with ledger_of(engine, folder) as ledger:
        record(ledger)
        (path,) = folder.glob("*.journal")
        kept = path.read_bytes()
        await ledger.flush()
        path.write_bytes(kept)
    async with ledger_of(engine, folder):
        assert await requests_in(engine) == 1
        assert not path.exists()


RECORDER = """
import asyncio, os, sys
from pathlib import Path
from gateway.database import open_engine
from gateway.usage import Ledger

async def record(home, url):
    ledger = Ledger(open_engine(url), home, flush_s=0.02)
    await ledger.start()
    journal, counts = ledger.journal, dict(failed=False, prompt_tokens=7, cached_tokens=0, completion_tokens=3)
    while True:
        for _ in range(20):
            journal.record(journal.meter_of("tnt_" + "a" * 24, "bot", 1), **counts)
            os.write(1, b".")
        await asyncio.sleep(0.001)

for _ in sys.stdin:  # a new process for every line; the imports are done once
    child = os.fork()
    if child == 0:
        asyncio.run(record(Path(sys.argv[1]), sys.argv[2]))
    os.write(2, b"%d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"|")
"""


@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.full)])
async def test_kill_9_loses_and_doubles_nothing(engine: AsyncEngine, folder: Path, kills: int) -> None:
    """Killed at random moments: the sum is what was acknowledged, plus at most the one record that a kill cut."""
    chance = random.Random(3)
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        RECORDER,
        str(folder),
        engine.url.render_as_string(hide_password=False),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=PROJECT,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stderr is not None
    acknowledged = 0
    for _ in range(kills):
        parent.stdin.write(b"next\n")
        pid = int(await parent.stderr.readline())
        assert await parent.stdout.readexactly(1) == b"."
        acknowledged += 1
        await asyncio.sleep(chance.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        acknowledged += len(await parent.stdout.readuntil(b"|")) - 1
    parent.stdin.close()
    await parent.wait()
    async with ledger_of(engine, folder):
        found = await requests_in(engine)
        async with reading(engine) as connection:
            tokens = (await connection.execute(select(func.sum(usage.c.prompt_tokens)))).scalar()
    assert acknowledged <= found <= acknowledged + kills
    assert acknowledged > kills
    assert tokens == 7 * found
    assert list(folder.glob("*.journal")) == []


async def test_a_journal_that_got_no_name_is_taken_away(lite: AsyncEngine, folder: Path) -> None:
    """Its process died in the moment of making it; one that is just being made stays."""
    folder.mkdir()
    for name, age_s in ((".1-old.7", 3_600), (".2-new.8", 0)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    async with ledger_of(lite, folder):
        assert [path.name for path in folder.glob(".*")] == [".2-new.8"]


async def test_two_workers_share_a_home(engine: AsyncEngine, folder: Path) -> None:
    """A living sibling's journal is left alone; both count; a dead one's is taken over by the living."""
    async with ledger_of(engine, folder) as first:
        record(first)
        async with ledger_of(engine, folder) as second:
            assert await requests_in(engine) == 0
            assert list(left_segments(folder)) == []
            record(second)
            await second.flush()
            assert await requests_in(engine) == 1
            await first.flush()
    assert await requests_in(engine) == 2


async def test_a_torn_line_is_dropped_and_a_damaged_one_skipped(
    engine: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes before and after is counted, and it is told."""
    folder.mkdir()
    (folder / "left.journal").write_bytes(LEFT + b"\0\0\0\n" + LEFT + LEFT[:-1])
    async with ledger_of(engine, folder):
        assert await requests_in(engine) == 2
    assert "1 damaged lines" in caplog.text
    assert f"{len(LEFT) - 1} torn bytes" in caplog.text


DAMAGED = (
    (b"tnt_a", b"tnt_\xff"),
    (b"tnt_a", b"tnt_\0"),
    (b"tnt_aa", b"tnt_a"),
    (b"\tbot", b"\tb\xc3\xb6t"),
    (b"\tbot", b"\tBot"),
    (b"\tbot", b"\tb\0t"),
    (b"\tbot", b"\t" + b"b" * 65),
    (b"\t1\t", b"\t2147483648\t"),
    (b"\t10\t", b"\t" + b"9" * 19 + b"\t"),
    (b"\t10\t", b"\t-1\t"),
    (b"\t10\t", b"\t\xd9\xa1\t"),
    (b"%d" % NOON, b"%d" % (NOON % 10**9)),
)


async def test_a_damaged_line_holds_up_nothing(
    engine: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever has become of it: the file's other lines and the files behind it are counted once, nothing else is."""
    folder.mkdir()
    for number, (written, read) in enumerate(DAMAGED):
        damaged = LEFT.replace(written, read, 1)
        assert damaged != LEFT
        (folder / f"{number:02}.journal").write_bytes(LEFT + damaged + LEFT)
    for _ in range(2):
        async with ledger_of(engine, folder):
            assert list(folder.glob("0*.journal")) == []
    async with reading(engine) as connection:
        rows = (await connection.execute(select(usage))).all()
    many = 2 * len(DAMAGED)
    assert [tuple(row) for row in rows] == [(NOON, TENANT, "bot", 1, many, 0, 10 * many, 4 * many, 5 * many)]
    assert caplog.text.count(": 1 damaged lines and 0 torn bytes are not counted") == len(DAMAGED)


def test_a_page_that_a_power_cut_took_joins_no_lines(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It reads as zeros. Exactly the lines that lie outside of it are read, wherever its ends cut one."""
    folder.mkdir()
    page = range(4_096, 8_192)
    begin_after_it = 0
    for length in range(1, 65):
        lines = [f"{NOON}\t{TENANT}\t{'s' * length}\t{1 + at}\t0\t1000\t40\t777\n".encode() for at in range(400)]
        written, intact = bytearray(), []
        for at, line in enumerate(lines):
            if len(written) + len(line) <= page.start or len(written) >= page.stop:
                intact.append(1 + at)
                begin_after_it += len(written) == page.stop
            written += line
        written[page.start : page.stop] = bytes(len(page))
        (folder / "left.journal").write_bytes(written)
        (segment,) = left_segments(folder)
        assert segment.read() == {(NOON, TENANT, "s" * length, version): [1, 0, 1000, 40, 777] for version in intact}
    assert begin_after_it
    assert caplog.text.count(": 1 damaged lines") == 64


async def test_whatever_a_gateway_writes_is_read(
    lite: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real tenant's id, every letter of a name, one that was lent, the base model, the last version, many tokens."""
    tenant = await Tenants(lite).create("acme")
    lent = f"ft:Qwen/Qwen3-0.6B::bot:{'0f' * 12}"
    names = [
        "",
        "0",
        "a" * 64,
        lent,
        f"{lent}:ckpt-step-3",
        *(f"a{letter}" for letter in string.ascii_lowercase + string.digits + "._-"),
    ]
    async with ledger_of(lite, folder) as ledger:
        for name in names:
            version = 999_999_999 if name else 0
            record(ledger, tenant.id, name, version, prompt_tokens=2**40, cached_tokens=0, failed=True)
        (path,) = folder.glob("*.journal")
        copied = folder.parent / "copied"
        copied.mkdir()
        (copied / path.name).write_bytes(path.read_bytes())
        (segment,) = left_segments(copied)
        assert segment.read() == ledger.journal.open.sum_up()
    assert "not counted" not in caplog.text


async def written_rounds(ledger: Ledger, engine: AsyncEngine, rounds: int) -> None:
    """Waits until the ledger has done at least so many."""
    for _ in range(rounds):
        before = await requests_in(engine)
        record(ledger)
        async with asyncio.timeout(10):
            while await requests_in(engine) == before:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("refused", ["open", "read"])
async def test_a_file_that_cannot_be_read_holds_up_nothing(
    engine: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """It is told once, by its name; what is behind it is counted, old batches go; the next start tries it again."""
    folder.mkdir()
    path = folder / "1-refused.journal"
    if refused == "open":
        path.symlink_to(path)  # refused to root too
    else:
        path.mkdir()
    (folder / "2-left.journal").write_bytes(LEFT)
    async with writing(engine) as connection:
        await connection.execute(usage_batches.insert(), [{"id": "old", "at": int(time.time()) - STALE_S - 60}])
    ledger = Ledger(engine, folder, flush_s=0.01)
    await ledger.start()
    try:
        assert await requests_in(engine) == 1
        async with reading(engine) as connection:
            assert "old" not in (await connection.execute(select(usage_batches.c.id))).scalars().all()
        await written_rounds(ledger, engine, 3)
    finally:
        await ledger.close()
    told = [entry.getMessage() for entry in caplog.records if entry.name == "tailor.usage" and entry.levelno >= 30]
    assert len(told) == 1
    assert str(path) in told[0]
    if refused == "open":
        path.unlink()
    else:
        path.rmdir()
    path.write_bytes(LEFT)
    async with ledger_of(engine, folder):
        assert await requests_in(engine) == 5
    assert list(folder.iterdir()) == []


async def test_a_journal_too_old_to_be_sure_of_is_set_aside(
    lite: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The database forgets after a week what it has counted: a person decides."""
    folder.mkdir()
    path = folder / "old.journal"
    path.write_bytes(LEFT)
    os.utime(path, (0, time.time() - STALE_S - 60))
    async with ledger_of(lite, folder):
        assert await requests_in(lite) == 0
    assert (folder / "old.stale").exists()
    assert "1 requests of over a week ago" in caplog.text


async def test_old_batches_are_forgotten(engine: AsyncEngine, folder: Path) -> None:
    """After a week; younger ones stay."""
    now = int(time.time())
    async with writing(engine) as connection:
        rows = [{"id": "old", "at": now - STALE_S - 60}, {"id": "young", "at": now - STALE_S + 60}]
        await connection.execute(usage_batches.insert(), rows)
    async with ledger_of(engine, folder), reading(engine) as connection:
        assert (await connection.execute(select(usage_batches.c.id))).scalars().all() == ["young"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A SQLite database that somebody else is writing to."""
    import sqlite3

    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


async def test_a_locked_database_is_waited_out(lite: AsyncEngine, folder: Path, tmp_path: Path) -> None:
    """What was recorded meanwhile is written afterwards, once, and a month's tokens never miss it."""
    async with ledger_of(lite, folder) as ledger:
        with locked(tmp_path / "tailor.db"):
            for _ in range(3):
                record(ledger)
                with pytest.raises(StorageUnavailable):
                    await ledger.flush()
            assert len(list(folder.glob("*.journal"))) == 2
            assert await ledger.tokens_since(TenantId("tnt_a"), 0) == 45
        await ledger.flush()
        assert await ledger.tokens_since(TenantId("tnt_a"), 0) == 45
        assert await ledger.tokens_since(TenantId("tnt_b"), 0) == 0
        assert await ledger.tokens_since(TenantId("tnt_a"), int(time.time()) + HOUR) == 0
    assert await requests_in(lite) == 3


async def test_a_left_journal_is_counted_once_the_database_is_back(
    lite: AsyncEngine, folder: Path, tmp_path: Path
) -> None:
    """By the same process, which looked at it while the database was away: nothing of that look holds it back."""
    folder.mkdir()
    (folder / "left.journal").write_bytes(LEFT)
    with locked(tmp_path / "tailor.db"):
        ledger = Ledger(lite, folder, flush_s=0.05)
        await ledger.start()
    try:
        async with asyncio.timeout(10):
            while await requests_in(lite) == 0:
                await asyncio.sleep(0.05)
    finally:
        await ledger.close()
    assert list(folder.iterdir()) == []


async def test_postgresql_gone_and_back(tmp_path: Path, folder: Path) -> None:
    """A gateway that starts without it and one that loses it both write everything when it is there."""
    with postgres_server() as server:
        engine = open_engine(server.url)
        await migrate(engine)
        async with ledger_of(engine, folder) as ledger:
            record(ledger)
            await ledger.flush()
            server.stop()
            record(ledger)
            with pytest.raises(StorageUnavailable):
                await ledger.flush()
            async with ledger_of(engine, tmp_path / "other") as other:
                record(other)
                server.start()
                await other.flush()
            await ledger.flush()
        assert await requests_in(engine) == 3
        await engine.dispose()


async def test_a_full_journal_goes_on_in_memory(
    lite: AsyncEngine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once, counted, and written to the database all the same."""
    async with ledger_of(lite, folder, journal_limit_bytes=60) as ledger:
        for _ in range(5):
            record(ledger)
        assert ledger.lost_by_kill > 0
        assert caplog.text.count("kept in memory alone") == 1
        await ledger.flush()
        assert ledger.lost_by_kill == 0
    assert await requests_in(lite) == 5


async def test_a_full_disk_leaves_no_half_line(lite: AsyncEngine, folder: Path) -> None:
    """No room for more: what is there is whole lines, and further requests are in memory alone."""
    async with ledger_of(lite, folder) as ledger:
        record(ledger)
        (path,) = folder.glob("*.journal")
        line = path.read_bytes().rstrip(b"\0")
        recorded = 1
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            while ledger.lost_by_kill < 2:
                record(ledger)
                recorded += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes().rstrip(b"\0") == line * (recorded - 2)
        await ledger.flush()
    assert await requests_in(lite) == recorded


async def test_without_a_disk_it_counts_in_memory(lite: AsyncEngine, folder: Path) -> None:
    """No file can be made: requests are served and counted."""
    async with ledger_of(lite, folder) as ledger:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        record(ledger)
        await ledger.flush()
        record(ledger)
        assert ledger.lost_by_kill == 1
        folder.mkdir()
        await ledger.flush()
    assert await requests_in(lite) == 2


async def test_a_month_is_read_in_one_piece(lite: AsyncEngine, folder: Path) -> None:
    """While batches move from memory to the database, no moment misses or doubles one."""
    async with ledger_of(lite, folder) as ledger:
        recorded = 0

        async def move() -> None:
            for _ in range(40):
                await ledger.flush()

        moving = asyncio.create_task(move())
        while not moving.done():
            record(ledger)
            recorded += 15
            before = recorded
            found = await ledger.tokens_since(TenantId("tnt_a"), 0)
            assert before <= found <= recorded
        await moving


async def test_usage_is_read_by_page(engine: AsyncEngine, folder: Path) -> None:
    """Hours, days, months; every tenant or one; pages without gap or overlap."""
    now = 0.0
    times = [NOON, NOON + HOUR, NOON + 86_400, NOON + 30 * 86_400]  # the last in December
    async with ledger_of(engine, folder, wall_clock=lambda: now) as ledger:
        for second in times:
            now = float(second)
            for tenant in ("tnt_a", "tnt_b"):
                for adapter, version in (("", 0), ("bot", 1), ("bot", 2)):
                    record(ledger, tenant, adapter, version)
        await ledger.flush()

    async def read(by: str, **more: Any) -> list[tuple[int, str, str, int]]:
        rows = await read_usage(engine, UsageQuestion(NOON - HOUR, NOON + 40 * 86_400, by, **more))
        return [(row.start, row.tenant_id, row.adapter, row.requests) for row in rows]

    midnight, november, december = NOON - 12 * HOUR, NOON - 12 * HOUR, NOON - 12 * HOUR + 30 * 86_400
    one = {"tenant_id": "tnt_a"}
    assert len(await read("hour")) == 16
    assert await read("day", **one) == [
        (at, "tnt_a", adapter, times * (1 if adapter == "" else 2))
        for at, times in ((midnight, 2), (midnight + 86_400, 1), (december, 1))
        for adapter in ("", "bot")
    ]
    assert await read("month", adapter="bot") == [
        (november, "tnt_a", "bot", 6), (november, "tnt_b", "bot", 6),
        (december, "tnt_a", "bot", 2), (december, "tnt_b", "bot", 2),
    ]  # fmt: skip
    for by in ("hour", "day", "month"):
        paged: list[tuple[int, str, str, int]] = []
        while page := await read(by, limit=3, after=paged[-1][:3] if paged else None):
            paged += page
        assert paged == await read(by)


# over HTTP

Ask = Callable[..., Awaitable[httpx.Response]]


async def spend(gateway: Gateway, tenant: str, adapter: str, *, at: int | None = None) -> str:
    """Puts one request of a tenant into the ledger's table; the tenant's id."""
    tenants = (await gateway.operator.get("/admin/v1/tenants")).json()["data"]
    (tenant_id,) = [one["id"] for one in tenants if one["name"] == tenant]
    hour = int(at or time.time()) // HOUR * HOUR
    counts = {"requests": 1, "failed": 0, "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5}
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(
            usage.insert().values(hour=hour, tenant_id=tenant_id, adapter=adapter, version=1, **counts)
        )
    return str(tenant_id)


async def test_a_tenant_sees_its_own_use(gateway: Gateway) -> None:
    """Of this month, by day and adapter; of other tenants nothing."""
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    await spend(gateway, "acme", "bot")
    await spend(gateway, "acme", "", at=NOON - 365 * 86_400)
    await spend(gateway, "globex", "other")
    answer = await acme.client.get("/v1/usage")
    assert answer.status_code == 200
    today = int(time.time()) // 86_400 * 86_400
    counts = {"requests": 1, "failed": 0, "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5}
    expected = {"start": today, "adapter": "bot", **counts}
    assert answer.json() == {"object": "list", "data": [expected], "next_page": None}
    assert (await globex.client.get("/v1/usage?adapter=bot")).json()["data"] == []
    old = await acme.client.get("/v1/usage", params={"start": 0, "end": 10 * 86_400})
    assert old.json()["data"] == []


async def test_an_operator_sees_all_use(gateway: Gateway) -> None:
    """With the tenants' names; one alone by name or id; page by page."""
    await gateway.tenant("acme")
    await gateway.tenant("globex")
    tenant_id = await spend(gateway, "acme", "bot")
    await spend(gateway, "globex", "bot")
    found = (await gateway.operator.get("/admin/v1/usage")).json()["data"]
    assert {(row["tenant"], row["adapter"]) for row in found} == {("acme", "bot"), ("globex", "bot")}
    for name in ("acme", tenant_id):
        one = (await gateway.operator.get("/admin/v1/usage", params={"tenant": name})).json()["data"]
        assert [row["tenant_id"] for row in one] == [tenant_id]
    assert (await gateway.operator.get("/admin/v1/usage?tenant=nobody")).status_code == 404
    first = (await gateway.operator.get("/admin/v1/usage?limit=1")).json()
    second = (await gateway.operator.get("/admin/v1/usage", params={"limit": 1, "page": first["next_page"]})).json()
    assert first["data"] + second["data"] == found


async def test_use_comes_as_csv(gateway: Gateway) -> None:
    """By parameter or by Accept; the same rows."""
    acme = await gateway.tenant("acme")
    tenant_id = await spend(gateway, "acme", "bot")
    for answer in (
        await acme.client.get("/v1/usage?format=csv"),
        await acme.client.get("/v1/usage", headers={"accept": "text/csv"}),
    ):
        assert answer.headers["content-type"].startswith("text/csv")
        assert [row["adapter"] for row in csv.DictReader(io.StringIO(answer.text))] == ["bot"]
    everybody = await gateway.operator.get("/admin/v1/usage?format=csv&limit=1")
    (row,) = csv.DictReader(io.StringIO(everybody.text))
    assert (row["tenant_id"], row["tenant"], row["completion_tokens"]) == (tenant_id, "acme", "5")
    assert everybody.headers["x-tailor-next-page"].endswith(f":{tenant_id}:bot")


def test_a_cell_is_no_formula() -> None:
    """What a spreadsheet would execute is marked as text; quotes and line ends stay inside their cell."""
    hostile = ["=1+1", "+1", "-1", "@x", "\tx", 'a"b\n,c']
    (_, row) = list(csv.reader(io.StringIO(csv_of(["a"] * 7, [[*hostile, 5]]))))
    assert row == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", 'a"b\n,c', "5"]


SENSELESS = (
    "start=5&end=5",
    "start=9&end=3",
    "start=-1",
    "start=x",
    "end=999999999999999",
    "start=0&end=253402300799",
    "by=year",
    "limit=0",
    "limit=10001",
    "format=xml",
    "page=bot",
    "page=²:a:b",
    "page=99999999999999999999:a:b",
)


async def test_a_question_that_makes_no_sense_is_a_400(gateway: Gateway, subtests: pytest.Subtests) -> None:
    """In the envelope, naming the parameter."""
    for query in SENSELESS:
        with subtests.test(query=query):
            answer = await gateway.operator.get(f"/admin/v1/usage?{query}")
            assert answer.status_code == 400
            assert error_of(answer)["param"] is not None


@pytest.mark.parametrize("query", ["page=1:a%00:b", "adapter=a%00b"])
async def test_a_question_with_a_nul_is_a_400(gateway: Gateway, query: str) -> None:
    """The front door refuses it for every path and parameter."""
    assert error_of(await gateway.operator.get(f"/admin/v1/usage?{query}"))["code"] == "invalid_value"


async def test_keys_without_the_scope_see_nothing(gateway: Gateway) -> None:
    """For adapters only: 403; an administrator's and an inference key: yes; an operator's stands for no tenant."""
    await gateway.tenant("acme")
    for scopes, status in ((["adapters"], 403), (["admin"], 200), (["inference"], 200)):
        made = await gateway.operator.post("/admin/v1/tenants/acme/keys", json={"scopes": scopes})
        client = gateway.client(made.json()["secret"])
        assert (await client.get("/v1/usage")).status_code == status
        assert (await client.get("/admin/v1/usage")).status_code == 403
    assert (await gateway.operator.get("/v1/usage")).status_code == 403


async def test_the_command_shows_use(gateway: Gateway, tmp_path: Path) -> None:
    """A tenant with its key, an operator with the home folder's; as a table, as JSON, as CSV."""
    acme = await gateway.tenant("acme")
    await spend(gateway, "acme", "bot")

    async def tailor(*arguments: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}
        given = {"TAILOR_HOME": str(gateway.home.path), "TAILOR_URL": gateway.url, "TAILOR_API_KEY": acme.key}
        command = [sys.executable, "-m", "gateway.cli", "usage", *arguments]
        child = await asyncio.create_subprocess_exec(
            *command, env={**kept, **given, "PYTHONPATH": str(PROJECT)}, cwd=tmp_path, stdout=subprocess.PIPE
        )
        out, _ = await child.communicate()
        assert child.returncode == 0
        return out.decode()

    assert "bot" in await tailor()
    assert '"adapter": "bot"' in await tailor("--json")
    (row,) = csv.DictReader(io.StringIO(await tailor("--operator", "--tenant", "acme", "--csv")))
    assert (row["tenant"], row["adapter"], row["requests"]) == ("acme", "bot", "1")
