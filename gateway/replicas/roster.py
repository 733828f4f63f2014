"""The replicas that operators have added or drained at run time: the rows, told to every gateway by the change feed."""

import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapter_store.changes import record_change
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.transactions import reading, writing
from gateway.database import replicas
from gateway.errors import NameTaken, ObjectUnknown

REPLICA_CHANGE: Final = "replica"


@dataclass(frozen=True, slots=True)
class RosterRow:
    """Times in Unix seconds."""

    url: str
    created_at: int
    drained_at: int | None


def replica_id(url: str) -> str:
    """What a replica is called wherever its address has no business: receipts, metrics, paths of the API."""
    return f"r-{sha256(url.encode()).hexdigest()[:8]}"


class Roster:
    """Rows of replicas; one of the settings has a row while it is drained."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def all(self) -> list[RosterRow]:
        async with reading(self._engine) as connection:
            rows = await connection.execute(select(replicas).order_by(replicas.c.created_at, replicas.c.url))
            return [RosterRow(row.url, row.created_at, row.drained_at) for row in rows]

    async def add(self, url: str) -> RosterRow:
        """A new row.

        Raises:
            NameTaken: there is one.
        """
        row = RosterRow(url, int(time.time()), None)
        try:
            async with writing(self._engine) as connection:
                await connection.execute(insert(replicas).values(url=url, created_at=row.created_at))
                await _tell(connection, url)
        except IntegrityError:
            raise NameTaken("That replica is in the pool already.", param="url") from None
        return row

    async def drain(self, url: str) -> None:
        """Note that requests keep away; drained twice is drained once."""
        now = int(time.time())
        async with writing(self._engine) as connection:
            found = await connection.execute(
                update(replicas).where(replicas.c.url == url, replicas.c.drained_at.is_(None)).values(drained_at=now)
            )
            known = (await connection.execute(select(replicas.c.url).where(replicas.c.url == url))).first()
            if known is None:
                await connection.execute(insert(replicas).values(url=url, created_at=now, drained_at=now))
            if known is None or found.rowcount:
                await _tell(connection, url)

    async def resume(self, url: str, *, keep: bool) -> None:
        """Note that requests may come again; `keep` the row where the replica is known by it alone."""
        async with writing(self._engine) as connection:
            if keep:
                await connection.execute(update(replicas).where(replicas.c.url == url).values(drained_at=None))
            else:
                await connection.execute(delete(replicas).where(replicas.c.url == url))
            await _tell(connection, url)

    async def remove(self, url: str) -> None:
        """Remove the row.

        Raises:
            ObjectUnknown: there is none.
        """
        async with writing(self._engine) as connection:
            found = await connection.execute(delete(replicas).where(replicas.c.url == url))
            if not found.rowcount:
                raise ObjectUnknown("There is no such replica.", param="replica")
            await _tell(connection, url)


async def _tell(connection: AsyncConnection, url: str) -> None:
    await record_change(connection, REPLICA_CHANGE, None, replica_id(url))
