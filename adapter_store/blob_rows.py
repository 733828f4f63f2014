"""Which rows name which blobs: what decides that a blob stays, is read again by the scrubber, and is backed up.

A column that holds the SHA-256 of one of its tenant's blobs says so where it is declared:

    Column("sha256", Text, nullable=False, info=names_blob("bytes"))

with the column of the blob's size. Its table has an `id`, a `tenant_id`, and an index over tenant and digest. So
versions, training files and saved runs are treated alike. Whoever removes blobs must have imported every module that
declares such a column. `fleeting`: the row goes on to other blobs while others read, and is worth keeping without one;
null names none.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import BindParameter, Column, CompoundSelect, bindparam, select, union_all

from adapter_store.blobs import FLEETING, SIZE_COLUMN, blob_key
from adapter_store.catalog import metadata
from adapter_store.engine import AsyncConnection
from adapter_store.ids import TenantId

_MOST: Final = 8  # sets of tables in one process: tests import them one by one


@dataclass(frozen=True, slots=True)
class NamedBlob:
    """A file that some row has."""

    key: str
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, tenant_id: TenantId, sha256: str, size_bytes: int) -> "NamedBlob":
        """The tenant's blob of that content."""
        return cls(blob_key(tenant_id, sha256), sha256, size_bytes)


@lru_cache(maxsize=_MOST)
def _columns_of(_table_count: int) -> tuple[Column[Any], ...]:
    return tuple(column for table in metadata.sorted_tables for column in table.columns if SIZE_COLUMN in column.info)


def naming_columns() -> tuple[Column[Any], ...]:
    """Every column that names blobs, of the tables that are known by now."""
    return _columns_of(len(metadata.tables))


def named_blobs(table: str, row: Mapping[str, Any]) -> Iterator[NamedBlob]:
    """The blobs that a row of the table names; columns that a table of an older schema lacks name none."""
    for _, blob in _named(table, row):
        yield blob


def fleeting_blobs(table: str, row: Mapping[str, Any]) -> Iterator[tuple[str, NamedBlob]]:
    """Those that may go at any time, each with the name of its column."""
    for column, blob in _named(table, row):
        if column.info[FLEETING]:
            yield column.name, blob


def _named(table: str, row: Mapping[str, Any]) -> Iterator[tuple[Column[Any], NamedBlob]]:
    for column in naming_columns():
        sha256 = row.get(column.name) if column.table.name == table else None
        if sha256 is not None:
            yield column, NamedBlob.of(TenantId(row["tenant_id"]), sha256, row[column.info[SIZE_COLUMN]])


@lru_cache(maxsize=_MOST)
def _used(_table_count: int) -> CompoundSelect[Any]:
    """Built once: building a statement costs ten times what running it does."""
    digests: BindParameter[Any] = bindparam("digests", expanding=True)
    return union_all(
        *(
            select(column).where(column.table.c.tenant_id == bindparam("tenant_id"), column.in_(digests))
            for column in naming_columns()
        )
    )


async def unreferenced(connection: AsyncConnection, tenant_id: TenantId, digests: Collection[str]) -> Sequence[str]:
    """Those of the tenant's blobs that no row names."""
    asked = {"tenant_id": tenant_id, "digests": list(digests)}
    used = set((await connection.execute(_used(len(metadata.tables)), asked)).scalars())
    return sorted(set(digests) - used)
