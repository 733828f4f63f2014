"""A snapshot: all rows of one moment as a file, the same for SQLite and PostgreSQL.

Gzipped lines of JSON: a head with the schema's revision; for each table a line with its name and columns, then a line
for each row; a last line with their number. The name holds the file's SHA-256, so a torn or changed one is found. As
rows are written by the schema of their revision and read into the same, a snapshot of one database fits the other.
"""

import base64
import gzip
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import LargeBinary, MetaData, Table, select, text
from sqlalchemy.engine import Connection

from adapter_store.blob_rows import NamedBlob, fleeting_blobs, named_blobs
from adapter_store.catalog import metadata
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import AdapterStoreError
from adapter_store.transactions import reading
from adapter_store.uploads import upload_parts, uploads
from gateway.database import HEAD, stored_revision
from training.files import file_upload_parts, file_uploads

FORMAT = 1
NAME = re.compile(r"snapshots/([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-([0-9a-f]{64})\.jsonl\.gz")
BATCH_ROWS = 500
UNDER_WAY = (
    uploads,
    upload_parts,
    file_uploads,
    file_upload_parts,
)  # their bytes are in no backup, so neither are the rows that vouch for them
ENCODER = msgspec.json.Encoder()


class SnapshotInvalid(AdapterStoreError):
    """The snapshot is torn, changed, or of a schema that this version does not know."""


Keep = Callable[[NamedBlob], Awaitable[bool]]
"""Whether a blob that may go at any time could be copied."""


async def write_snapshot(engine: AsyncEngine, path: Path, keep: Keep) -> set[NamedBlob]:
    """Writes all rows of one moment, while others write on; the blobs that they name.

    A row that goes on from one fleeting blob to the next is written without what `keep` cannot have any more.

    Raises SnapshotInvalid (the database is of another schema than this code), StorageUnavailable.
    """
    named: set[NamedBlob] = set()
    async with reading(engine) as connection:
        if connection.dialect.name == "postgresql":  # SQLite shows one moment to every transaction
            await connection.execution_options(isolation_level="REPEATABLE READ")
        revision = await connection.run_sync(stored_revision)
        if revision != HEAD:
            raise SnapshotInvalid(
                f"the database's schema is {revision or 'none'}, this version's {HEAD}: `tailor store migrate` first"
            )
        count = 0
        with gzip.open(path, "wb", compresslevel=6) as file:
            file.write(_line({"tailor_snapshot": FORMAT, "revision": revision, "created_at": int(time.time())}))
            for table in metadata.sorted_tables:
                if table in UNDER_WAY:
                    continue
                file.write(_line({"table": str(table.name), "columns": _columns(table)}))
                async for values in _rows(connection, table):
                    row = dict(zip(_columns(table), values, strict=True))
                    for column, blob in fleeting_blobs(str(table.name), row):
                        if not await keep(blob):
                            row[column] = None
                    file.write(_line(list(row.values())))
                    count += 1
                    named.update(named_blobs(str(table.name), row))
            file.write(_line({"rows": count}))
    return named


async def _rows(connection: AsyncConnection, table: Table) -> AsyncIterator[list[Any]]:
    binary = [index for index, column in enumerate(table.columns) if isinstance(column.type, LargeBinary)]
    async with connection.stream(select(table)) as result:
        async for found in result:
            row = list(found)
            for index in binary:
                row[index] = row[index] and base64.b64encode(row[index]).decode()
            yield row


def _columns(table: Table) -> list[str]:
    return [str(column.name) for column in table.columns]


def _line(value: Any) -> bytes:
    return ENCODER.encode(value) + b"\n"


def snapshot_name(path: Path) -> str:
    """Under which key it is kept: the moment, and what the file must hash to."""
    with path.open("rb") as file:
        return f"snapshots/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{_sha256(file)}.jsonl.gz"


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


class Snapshot:
    """A snapshot's file on this machine, found to be whole.

    Raises SnapshotInvalid.
    """

    def __init__(self, name: str, path: Path) -> None:
        found = NAME.fullmatch(name)
        with path.open("rb") as file:
            if found is None or _sha256(file) != found[2]:
                raise SnapshotInvalid(f"{name} is not what its name says: take another snapshot")
        self.name = name
        self._path = path
        head = next(self._lines())
        if head.get("tailor_snapshot") != FORMAT:
            raise SnapshotInvalid(f"{name} is of format {head.get('tailor_snapshot')}, this version reads {FORMAT}")
        self.revision: str = head["revision"]
        self.row_count = 0
        self.blobs: set[NamedBlob] = set()
        self._take_stock()

    def _lines(self) -> Iterator[Any]:
        with gzip.open(self._path, "rb") as file:
            for line in file:
                yield msgspec.json.decode(line)

    def _take_stock(self) -> None:
        for table, columns, row in self.rows():
            self.row_count += 1
            self.blobs.update(named_blobs(table, dict(zip(columns, row, strict=True))))

    def rows(self) -> Iterator[tuple[str, list[str], list[Any]]]:
        """(table, columns, values), in an order in which they can be written. Raises SnapshotInvalid at a torn end."""
        table, columns, count = "", list[str](), 0
        for line in self._lines():
            if isinstance(line, list):
                count += 1
                yield table, columns, line
            elif "table" in line:
                table, columns = line["table"], line["columns"]
            elif "rows" in line:
                if line["rows"] != count:
                    break
                return
        raise SnapshotInvalid(f"{self.name} has no end: take another snapshot")

    def write_to(self, connection: Connection) -> None:
        """Inserts all rows into the tables of the snapshot's own revision, which are empty."""
        tables = MetaData()
        tables.reflect(connection)
        for name, columns, rows in _batches(self.rows()):
            table = tables.tables[name]
            connection.execute(table.insert(), [_values(table, columns, row) for row in rows])
        if connection.dialect.name == "postgresql":
            for table in tables.tables.values():
                _move_sequences(connection, table)


def _batches(
    rows: Iterator[tuple[str, list[str], list[Any]]],
) -> Iterator[tuple[str, list[str], Sequence[list[Any]]]]:
    """Rows of one table together, so many at most."""
    batch: list[list[Any]] = []
    here: tuple[str, list[str]] | None = None
    for name, columns, row in rows:
        if here is not None and (here[0] != name or len(batch) == BATCH_ROWS):
            yield *here, batch
            batch = []
        here = name, columns
        batch.append(row)
    if here is not None and batch:
        yield *here, batch


def _values(table: Table, columns: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip(columns, row, strict=True))
    for name, value in values.items():
        if value is not None and isinstance(table.c[name].type, LargeBinary):
            values[name] = base64.b64decode(value)
    return values


def _move_sequences(connection: Connection, table: Table) -> None:
    """PostgreSQL counts numbers that it gives out, not those that are written."""
    for column in table.primary_key:
        if "nextval" in str(getattr(column.server_default, "arg", "")):
            highest = connection.execute(select(column).order_by(column.desc()).limit(1)).scalar()
            move = text("SELECT setval(pg_get_serial_sequence(:table, :column), :highest)")
            if highest:
                connection.execute(move, {"table": table.name, "column": column.name, "highest": highest})
