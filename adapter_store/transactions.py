"""Transactions on the store's database, and its failures in the words of `errors.py`."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import StorageFull, StorageUnavailable

# Read by the hook in gateway/database.py: SQLite then begins with BEGIN IMMEDIATE, so that a transaction that
# reads before it writes waits its turn instead of failing with "database is locked".
WRITES = {"writes": True}
# PostgreSQL's classes of SQLSTATE: connection, rolled back for others' sake, resources, operator (starting, stopping)
BUSY_OR_AWAY = ("08", "40", "53", "57")


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction, committed at the end. Raises StorageFull, StorageUnavailable."""
    with database_errors():
        async with AsyncExitStack() as held:
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
