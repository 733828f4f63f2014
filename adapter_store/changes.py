"""The change feed: what changed, in commit order, so that every gateway can drop its caches in time.

The counter's row stays locked until the writer commits. So a higher number is never visible before a lower
one, on PostgreSQL too, and a reader that asks for what came after the last number it saw misses nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Integer, Table, Text, delete, insert, select, update

from adapter_store.catalog import metadata
from adapter_store.engine import AsyncConnection
from adapter_store.ids import TenantId

KEPT = 10_000
FORGOTTEN_AT_ONCE = 100

change_counter = Table(
    "change_counter",
    metadata,
    Column("id", Integer, primary_key=True),  # one row, 1
    Column("value", BigInteger, nullable=False),
)
changes = Table(
    "changes",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("noun", Text, nullable=False),
    Column("tenant_id", Text),
    Column("name", Text),
    Column("at", BigInteger, nullable=False),
)

_BUMP = update(change_counter).values(value=change_counter.c.value + 1).returning(change_counter.c.value)
_NEW = insert(changes)


@dataclass(frozen=True, slots=True)
class Change:
    """`noun` of `tenant_id` called `name` was made, changed or removed."""

    seq: int
    noun: str
    tenant_id: TenantId | None
    name: str | None


async def record_change(connection: AsyncConnection, noun: str, tenant_id: TenantId | None, name: str | None) -> int:
    """Notes a change inside the caller's transaction; its number. Every later writer waits for the commit."""
    seq = int((await connection.execute(_BUMP)).scalar_one())
    if seq % FORGOTTEN_AT_ONCE == 1:
        await connection.execute(delete(changes).where(changes.c.seq <= seq - KEPT))
    row = {"seq": seq, "noun": noun, "tenant_id": tenant_id, "name": name, "at": int(time.time())}
    await connection.execute(_NEW, row)
    return seq


async def take_turn(connection: AsyncConnection) -> None:
    """Locks out other writers until the caller's transaction ends; writes nothing: fit for a full disk.

    On PostgreSQL by the row's lock; on SQLite BEGIN IMMEDIATE has done it.
    """
    if connection.dialect.name != "sqlite":
        await connection.execute(select(change_counter.c.value).with_for_update())


async def changes_since(connection: AsyncConnection, seq: int, *, limit: int = 1_000) -> Sequence[Change]:
    """What was recorded after `seq`, oldest first. A full page means: ask again.

    The newest 10,000 or some more are kept: a first one that is not `seq` + 1 tells a reader to drop all it has cached.
    """
    columns = (changes.c.seq, changes.c.noun, changes.c.tenant_id, changes.c.name)
    found = await connection.execute(select(*columns).where(changes.c.seq > seq).order_by(changes.c.seq).limit(limit))
    return [Change(*row) for row in found]


async def last_change(connection: AsyncConnection) -> int:
    """The counter's value now: where a gateway that starts with empty caches begins to read."""
    return int((await connection.execute(select(change_counter.c.value))).scalar_one())
