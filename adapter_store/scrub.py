"""Finds stored bytes that rotted before anybody loads them, and mends them from a second copy where there is one.

A pass reads every blob that a row names (`blob_rows`), at a bounded rate, and compares its SHA-256. Several gateways
share a pass: who notes a blob's turn first reads it. A fault stays noted until the blob is whole again, is published
anew or goes.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from adapter_store.blob_rows import naming_columns, unreferenced
from adapter_store.blobs import Blobs, blob_key
from adapter_store.catalog import adapters, metadata, versions
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import BlobCorrupt, StorageError
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing

log = logging.getLogger("tailor.scrub")
PAGE = 100
A_WEEK_S = 7 * 86_400.0

blob_checks = Table(
    "blob_checks",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("sha256", Text, primary_key=True),
    Column("checked_at", BigInteger, nullable=False),
    Column("fault", Text),  # null: it was whole
    Index("ix_blob_checks_fault", "fault"),
)
_OF_FILES = (blob_checks.c.tenant_id == bindparam("tenant_id")) & blob_checks.c.sha256.in_(
    bindparam("digests", expanding=True)
)
_FAULTS = select(blob_checks.c.sha256).where(_OF_FILES, blob_checks.c.fault.is_not(None))
_FORGET = delete(blob_checks).where(_OF_FILES)


class Outcome(StrEnum):
    """What a look at a blob came to."""

    OK = "ok"
    CORRUPT = "corrupt"
    MISSING = "missing"
    REPAIRED = "repaired"
    UNREADABLE = "unreadable"  # the store did not answer: the next pass looks again


FAULTS = (Outcome.CORRUPT, Outcome.MISSING)


@dataclass(frozen=True, slots=True)
class FaultyBlob:
    """`versions`: what cannot be read any more, as `name@number`; of other things than versions, their ids."""

    tenant_id: TenantId
    sha256: str
    fault: str
    found_at: int
    versions: tuple[str, ...]


class Scrubber:
    """`counts` of outcomes and `read_bytes` grow as long as the process lives; `fault_count` is the last that was seen.

    `copy`: a second store with the same keys, as a backup is. `bytes_per_s`: how fast it reads at most.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        blobs: Blobs,
        copy: Blobs | None,
        *,
        bytes_per_s: int,
        every_s: float = A_WEEK_S,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._copy = copy
        self._bytes_per_s = bytes_per_s
        self._every_s = every_s
        self._clock = clock
        self._sleep = sleep
        self.counts: Counter[Outcome] = Counter()
        self.read_bytes = 0
        self.fault_count = 0

    @property
    def is_on(self) -> bool:
        return self._bytes_per_s > 0

    async def run(self) -> Counter[Outcome]:
        """One pass over what was looked at more than `every_s` ago; what it came to. Raises StorageUnavailable."""
        before = self.counts.copy()
        async for tenant_id, sha256 in self._due():
            outcome = await self._look(tenant_id, sha256)
            self.counts[outcome] += 1
        await self.count_faults()
        return self.counts - before

    async def count_faults(self) -> None:
        async with reading(self._engine) as connection:
            statement = select(func.count()).where(blob_checks.c.fault.is_not(None))
            self.fault_count = (await connection.execute(statement)).scalar_one()

    async def faulty(self, limit: int = 1_000) -> Sequence[FaultyBlob]:
        """What is noted as damaged or gone. Raises StorageUnavailable."""
        statement = select(blob_checks).where(blob_checks.c.fault.is_not(None))
        statement = statement.order_by(blob_checks.c.tenant_id, blob_checks.c.sha256).limit(limit)
        async with reading(self._engine) as connection:
            rows = (await connection.execute(statement)).all()
            return [
                FaultyBlob(row.tenant_id, row.sha256, row.fault, row.checked_at, await _named_by(connection, *row[:2]))
                for row in rows
            ]

    async def _due(self) -> AsyncIterator[tuple[TenantId, str]]:
        """Blobs whose turn it is, each noted as ours before it is given."""
        before = int(self._clock()) - self._every_s
        for column in naming_columns():
            async for tenant_id, sha256 in self._named_in(column):
                if await self._take(tenant_id, sha256, before):
                    yield tenant_id, sha256

    async def _named_in(self, column: Column[Any]) -> AsyncIterator[tuple[TenantId, str]]:
        here = (column.table.c.tenant_id, column)
        statement = select(*here).where(column.is_not(None)).distinct().order_by(*here).limit(PAGE)
        last = ("", "")
        while True:
            async with reading(self._engine) as connection:
                page = (await connection.execute(statement.where(tuple_(*here) > last))).all()
            for tenant_id, sha256 in page:
                yield TenantId(tenant_id), sha256
            if len(page) < PAGE:
                return
            last = (page[-1][0], page[-1][1])

    async def _take(self, tenant_id: TenantId, sha256: str, before: float) -> bool:
        """False: somebody looked at it lately, or does now."""
        here = _row(tenant_id, sha256)
        statement = select(blob_checks.c.checked_at).where(here)
        async with reading(self._engine) as connection:
            seen = (await connection.execute(statement)).scalar_one_or_none()
        if seen is not None and seen >= before:
            return False
        async with writing(self._engine) as connection:
            await take_turn(connection)
            if (await connection.execute(statement)).scalar_one_or_none() != seen:
                return False
            if seen is None:
                row = {"tenant_id": tenant_id, "sha256": sha256, "checked_at": int(self._clock())}
                await connection.execute(insert(blob_checks).values(row))
            else:
                await connection.execute(update(blob_checks).where(here).values(checked_at=int(self._clock())))
        return True

    async def _look(self, tenant_id: TenantId, sha256: str) -> Outcome:
        try:
            outcome = await self._state(tenant_id, sha256)
            if outcome in FAULTS and self._copy is not None:
                outcome = await self._repair(tenant_id, sha256, self._copy, outcome)
            return await self._note(tenant_id, sha256, outcome)
        except StorageError as error:
            log.warning("blob %s could not be checked: %s", blob_key(tenant_id, sha256), error)
            return Outcome.UNREADABLE

    async def _state(self, tenant_id: TenantId, sha256: str) -> Outcome:
        begun, before = time.monotonic(), self.read_bytes

        async def pace(size_bytes: int) -> None:
            self.read_bytes += size_bytes
            await self._sleep(max(0.0, (self.read_bytes - before) / self._bytes_per_s - (time.monotonic() - begun)))

        try:
            found = await self._blobs.sha256(blob_key(tenant_id, sha256), pace)
        except BlobCorrupt:
            return Outcome.MISSING
        return Outcome.OK if found == sha256 else Outcome.CORRUPT

    async def _repair(self, tenant_id: TenantId, sha256: str, copy: Blobs, fault: Outcome) -> Outcome:
        key = blob_key(tenant_id, sha256)
        try:
            await copy.copy(key, sha256, self._blobs)
            repaired = await self._state(tenant_id, sha256)
        except BlobCorrupt as error:
            log.warning("the second copy of blob %s is no help: %s", key, error)
            return fault
        return Outcome.REPAIRED if repaired is Outcome.OK else fault

    async def _note(self, tenant_id: TenantId, sha256: str, outcome: Outcome) -> Outcome:
        """What it comes to: nothing is wrong with a blob that went while it was looked at."""
        fault = outcome.value if outcome in FAULTS else None
        async with writing(self._engine) as connection:
            await take_turn(connection)
            if await unreferenced(connection, tenant_id, [sha256]):
                await forget(connection, tenant_id, [sha256])
                return Outcome.OK
            await connection.execute(update(blob_checks).where(_row(tenant_id, sha256)).values(fault=fault))
        if fault is not None:
            log.error("blob %s is %s: what it belongs to cannot be read", blob_key(tenant_id, sha256), fault)
        elif outcome is Outcome.REPAIRED:
            log.warning("blob %s was damaged and is repaired from the second copy", blob_key(tenant_id, sha256))
        return outcome


async def known_faults(connection: AsyncConnection, tenant_id: TenantId, digests: Collection[str]) -> set[str]:
    """Those of the tenant's files that are noted as damaged or gone."""
    asked = {"tenant_id": tenant_id, "digests": list(digests)}
    return set((await connection.execute(_FAULTS, asked)).scalars())


async def forget(connection: AsyncConnection, tenant_id: TenantId, digests: Collection[str]) -> None:
    """The files were written anew, or went."""
    await connection.execute(_FORGET, {"tenant_id": tenant_id, "digests": list(digests)})


def _row(tenant_id: TenantId, sha256: str):  # type: ignore[no-untyped-def]  # SQLAlchemy's type of it is long
    return (blob_checks.c.tenant_id == tenant_id) & (blob_checks.c.sha256 == sha256)


async def _named_by(connection: AsyncConnection, tenant_id: TenantId, sha256: str) -> tuple[str, ...]:
    either = or_(versions.c.config_sha256 == sha256, versions.c.weights_sha256 == sha256)
    statement = (
        select(adapters.c.name, versions.c.number)
        .join(adapters, versions.c.adapter_id == adapters.c.id)
        .where(versions.c.tenant_id == tenant_id, either)
        .order_by(adapters.c.name, versions.c.number)
    )
    found = [f"{row.name}@{row.number}" for row in await connection.execute(statement)]
    for column in naming_columns():
        table = column.table
        if table is not versions:
            others = select(table.c.id).where(table.c.tenant_id == tenant_id, column == sha256).order_by(table.c.id)
            found += (await connection.execute(others)).scalars()
    return tuple(found)
