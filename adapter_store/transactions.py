"""Transactions on the store's database, and its failures in the words of `errors.py`."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from adapter_store.errors import StorageFull, StorageUnavailable

# Read by the hook in gateway/database.py: SQLite then begins with BEGIN IMMEDIATE, so that a transaction that
# reads before it writes waits its turn instead of failing with "database is locked".
WRITES = {"writes": True}


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction, committed at the end. Raises StorageFull, StorageUnavailable."""
    with database_errors():
        async with engine.execution_options(**WRITES).begin() as connection:
            yield connection


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One consistent view, never committed. Raises StorageUnavailable."""
    with database_errors():
        async with engine.connect() as connection:
            yield connection


@contextmanager
def database_errors() -> Iterator[None]:
    """The driver's errors → StorageFull or StorageUnavailable; faults of our own SQL pass through."""
    try:
        yield
    except PoolTimeout as error:
        raise StorageUnavailable("the database is busy: no connection became free") from error
    except DBAPIError as error:
        reason = str(error.orig)
        if "is full" in reason or "No space left" in reason:
            raise StorageFull("no space left for the database") from error
        if type(error).__name__ in ("OperationalError", "InterfaceError") or error.connection_invalidated:
            raise StorageUnavailable("the database does not answer") from error
        raise
