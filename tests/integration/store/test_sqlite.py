"""The SQLite driver's cursors: the same rows as ever, however many there are and however they are fetched."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from adapter_store.engine import AsyncEngine
from gateway.database import open_engine
from gateway.sqlite import AT_ONCE

COUNTS = (0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path}/rows.db")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE numbers (number INTEGER PRIMARY KEY)"))
        rows = [{"number": number} for number in range(max(COUNTS))]
        await connection.execute(text("INSERT INTO numbers VALUES (:number)"), rows)
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("count", COUNTS)
async def test_all_rows_come_in_order(count: int, engine: AsyncEngine) -> None:
    """At once and streamed."""
    statement = text("SELECT number FROM numbers WHERE number < :count ORDER BY number")
    async with engine.connect() as connection:
        assert list((await connection.execute(statement, {"count": count})).scalars()) == list(range(count))
        async with connection.stream(statement, {"count": count}) as streamed:
            assert [row.number async for row in streamed] == list(range(count))
        async with connection.stream(statement, {"count": count}) as streamed:
            assert await streamed.scalar() == (0 if count else None)


async def test_a_stream_that_is_left_holds_nothing(engine: AsyncEngine) -> None:
    """A statement that is not at its end would keep its transaction's view, and the table from being dropped."""
    async with engine.connect() as connection:
        async with connection.stream(text("SELECT number FROM numbers")) as streamed:
            assert await streamed.fetchone() is not None
        await connection.rollback()
        await connection.execute(text("DROP TABLE numbers"))


async def test_what_a_statement_did_is_told(engine: AsyncEngine) -> None:
    """Rows changed, rows returned, and errors as the database has them; the connection goes on after one."""
    async with engine.begin() as connection:
        changed = await connection.execute(text("UPDATE numbers SET number = -number WHERE number IN (1, 2)"))
        assert changed.rowcount == 2
        given = await connection.execute(text("INSERT INTO numbers VALUES (-9) RETURNING number"))
        assert given.scalar_one() == -9
        with pytest.raises(IntegrityError, match="UNIQUE"):
            await connection.execute(text("INSERT INTO numbers VALUES (-9)"))
        with pytest.raises(OperationalError, match="no such table"):
            await connection.execute(text("SELECT 1 FROM nowhere"))
        assert (await connection.execute(text("SELECT count(*) FROM numbers"))).scalar() == max(COUNTS) + 1
