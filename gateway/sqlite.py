"""SQLite's driver with one trip to the connection's thread for a statement, and connections that wait for their mode.

SQLAlchemy 2.1 makes a cursor, executes, fetches all rows and closes the cursor, and aiosqlite 0.22 makes a trip of
each: a queue, a thread that wakes and contends for the interpreter, a wake-up of the loop.

A new file is switched to WAL mode by whoever connects first. Two that do it at once both hold the lock of a reader and
want a writer's: SQLite tells one of them at once that the file is locked, without its busy time. That one asks again.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from sqlite3 import Connection as Opened
from sqlite3 import Cursor as Found
from sqlite3 import OperationalError, connect
from typing import Any, Final, Self, TypeVar

import aiosqlite

AT_ONCE: Final = 1_000
"""Rows that come with the statement; a cursor that has more stays open for them."""
PRAGMAS: Final = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON")
ASKED_AGAIN_S: Final = 0.01
BUSY: Final = frozenset({"SQLITE_BUSY", "SQLITE_BUSY_RECOVERY"})
T = TypeVar("T")


class Cursor:
    """What SQLAlchemy's adapter asks of a cursor."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._rows = deque[Any]()
        self._open: Found | None = None
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self.arraysize = 1

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> Self:
        """Runs the statement, and has its first rows at hand."""
        await self._connection.in_its_thread(partial(self._run, Found.execute, sql, parameters))
        return self

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> Self:
        """The same for many sets of parameters."""
        await self._connection.in_its_thread(partial(self._run, Found.executemany, sql, parameters))
        return self

    def _run(self, way: Callable[[Found, str, Any], Found], sql: str, parameters: Any) -> None:
        cursor = self._connection.in_use.cursor()
        try:
            way(cursor, sql, parameters)
            self.description, self.rowcount, self.lastrowid = cursor.description, cursor.rowcount, cursor.lastrowid
            self._rows.extend(cursor.fetchmany(AT_ONCE) if cursor.description else ())
        except BaseException:
            cursor.close()
            raise
        if len(self._rows) < AT_ONCE:
            cursor.close()
        else:
            self._open = cursor

    async def fetchone(self) -> Any:
        """The next row; None after the last."""
        return next(iter(await self.fetchmany(1)), None)

    async def fetchmany(self, size: int | None = None) -> Sequence[Any]:
        """The next rows."""
        wanted = size or self.arraysize
        if len(self._rows) < wanted and self._open is not None:
            self._rows.extend(await self._connection.in_its_thread(partial(self._open.fetchmany, wanted)))
        return [self._rows.popleft() for _ in range(min(wanted, len(self._rows)))]

    async def fetchall(self) -> Sequence[Any]:
        """The rows that are left."""
        if self._open is not None:
            self._rows.extend(await self._connection.in_its_thread(self._open.fetchall))
        rows, self._rows = self._rows, deque()
        return rows

    async def close(self) -> None:
        """Ends a statement whose rows were not all fetched."""
        if self._open is not None:
            cursor, self._open = self._open, None
            await self._connection.in_its_thread(cursor.close)


class Connection(aiosqlite.Connection):
    """A connection with such cursors."""

    def cursor(self) -> Cursor:  # type: ignore[override]
        return Cursor(self)

    @property
    def in_use(self) -> Any:
        """SQLite's own connection. Raises ValueError where it is closed."""
        return self._conn

    async def in_its_thread(self, work: Callable[[], T]) -> T:
        """What the work gives, once it has run after all that was asked before it."""
        run: Callable[[Callable[[], T]], Awaitable[T]] = self._execute
        return await run(work)


def open_connection(path: str, *, timeout: float, **options: Any) -> Connection:
    """As `aiosqlite.connect`: to be awaited. `timeout`: seconds to wait for other processes, here and in transactions.

    In WAL mode, fully synchronised, with foreign keys, and without transactions of the driver's own.
    """
    connection = Connection(partial(_open, path, timeout, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy does it with those that it makes
    return connection


def _open(path: str, timeout: float, **options: Any) -> Opened:
    deadline = time.monotonic() + timeout
    connection: Opened = connect(path, timeout=timeout, isolation_level=None, **options)
    try:
        while not _is_set_up(connection, until=deadline):
            time.sleep(ASKED_AGAIN_S)  # of the connection's own thread
    except BaseException:
        connection.close()
        raise
    return connection


def _is_set_up(connection: Opened, until: float) -> bool:
    """False where another connection is in the way; past `until` that is raised."""
    try:
        for pragma in PRAGMAS:
            connection.execute(pragma).close()
    except OperationalError as error:
        if error.sqlite_errorname not in BUSY or time.monotonic() > until:
            raise
        return False
    return True
