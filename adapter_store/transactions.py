"""Transactions on the store's database, and its failures in the words of `errors.py`."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import StorageFull, StorageUnavailable

# Read by the hook in gateway/database.py: SQLite then begins with BEGIN IMMEDIATE, so that a transaction that
# reads before it writes waits its turn instead of failing with "database is locked".
WRITES = {"writes": True}
TURNS = "turns"  # the option of an engine whose writers take turns
# PostgreSQL's classes of SQLSTATE: connection, rolled back for others' sake, resources, operator (starting, stopping)
BUSY_OR_AWAY = ("08", "40", "53", "57")


class Turns:
    """One writer at a time, in the order in which they came.

    SQLite alone has waiting writers look again every 100 ms: of five that wrote without pause, one found it locked each
    time for 5 s. And each of them kept a connection from those who read.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def next(self) -> AsyncIterator[None]:
        """Raises StorageUnavailable: it was not this one's turn in time."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._lock.acquire()
        except TimeoutError as error:
            raise StorageUnavailable("the database is busy: others were still writing") from error
        try:
            yield
        finally:
            self._lock.release()


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction, committed at the end. Raises StorageFull, StorageUnavailable."""
    with database_errors():
        async with AsyncExitStack() as held:
            turns: Turns | None = engine.get_execution_options().get(TURNS)
            if turns is not None:
                await held.enter_async_context(turns.next())
            with _connecting():
                connection = await held.enter_async_context(engine.execution_options(**WRITES).begin())
            yield connection


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One consistent view, never committed. Raises StorageUnavailable."""
    with database_errors():
        async with AsyncExitStack() as held:
            with _connecting():
                connection = await held.enter_async_context(engine.connect())
            yield connection


@contextmanager
def _connecting() -> Iterator[None]:
    """A server that is not there: asyncpg tells it in the words of its socket, not of the database."""
    try:
        yield
    except OSError as error:
        raise StorageUnavailable("the database does not answer") from error


@contextmanager
def database_errors() -> Iterator[None]:
    """The driver's errors → StorageFull or StorageUnavailable; faults of our own SQL pass through."""
    try:
        yield
    except PoolTimeout as error:
        raise StorageUnavailable("the database is busy: no connection became free") from error
    except TimeoutError as error:  # asyncpg's own, of a server that hangs
        raise StorageUnavailable("the database does not answer in time") from error
    except DBAPIError as error:
        reason = str(error.orig)
        if "is full" in reason or "No space left" in reason:
            raise StorageFull("no space left for the database") from error
        is_away = type(error).__name__ in ("OperationalError", "InterfaceError") or error.connection_invalidated
        if is_away or str(getattr(error.orig, "sqlstate", None))[:2] in BUSY_OR_AWAY:
            raise StorageUnavailable("the database does not answer") from error
        raise
