"""The usage ledger: what every ended request used, in the database exactly once; and how it is read.

Requests are counted in memory, with a line in the journal. Every second one transaction writes what came together: the
batch's id into `usage_batches` and the sums into `usage`. A batch whose commit was ambiguous is found by its id and not
counted again; a dead process's journal is counted by the next process that starts, or by a living sibling.

The database away: batches wait in memory and in the journal. The journal full or not writable: they wait in memory
alone, which is logged and counted (`lost_by_kill`). Nothing is dropped.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Select, case, cast, delete, func, select, tuple_
from sqlalchemy.dialects import sqlite

from adapter_store.engine import AsyncEngine
from adapter_store.errors import StorageError
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.database import tenants, usage, usage_batches
from gateway.journal import Journal, Rows, Segment
from gateway.left_journals import STALE_S, LeftSegment, left_segments
from gateway.limits.terms import month_of

log = logging.getLogger("tailor.usage")
DAY_S: Final = 86_400
LOOK_AROUND_S: Final = 60.0  # for journals of dead siblings
PRUNE_S: Final = 3_600.0
CHUNK: Final = 250  # rows that are prepared without letting others run
COUNTS: Final = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")


class Ledger:
    """Writes what its journal has counted; `start` before the first request, `close` after the last."""

    def __init__(
        self,
        engine: AsyncEngine,
        folder: Path,
        *,
        flush_s: float = 1.0,
        journal_limit_bytes: int = 1 << 30,
        fsync: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.journal = Journal(folder, limit_bytes=journal_limit_bytes, fsync=fsync, wall_clock=wall_clock)
        self._engine = engine
        self._folder = folder
        self._flush_s = flush_s
        self._wall_clock = wall_clock
        self._flushing = asyncio.Lock()
        self._sealed: Segment | None = None  # being written into the database, until that is known to have it
        self._looked_at = self._pruned_at = 0.0
        self._is_away = False
        self._task: asyncio.Task[None] | None = None

    @property
    def backlog(self) -> int:
        """Rows that the database does not have yet."""
        return self.journal.open.row_count + (self._sealed.row_count if self._sealed else 0)

    @property
    def lost_by_kill(self) -> int:
        """Requests not yet in the database that are in no journal either."""
        return self.journal.open.lost_by_kill + (self._sealed.lost_by_kill if self._sealed else 0)

    async def start(self) -> None:
        """Counts what dead processes left, then writes every second. A database that is away is no hindrance."""
        self.journal.begin()
        await self._pass()
        self._task = asyncio.create_task(self._flush_for_ever())

    async def close(self) -> None:
        """Writes what is there; what the database does not take stays in the journal for the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pass()
        if self.journal.open.row_count:
            self.journal.open.close()
        else:
            self.journal.open.delete()
        if self._sealed is not None:
            self._sealed.close()

    async def tokens_since(self, tenant_id: TenantId, begin: int) -> int:
        """Tokens of a tenant's requests that have ended since `begin`, a full hour: those not yet written too.

        Raises:
            StorageUnavailable: the database does not answer.
        """
        tokens = usage.c.prompt_tokens + usage.c.completion_tokens
        query = select(func.sum(tokens)).where(usage.c.tenant_id == tenant_id, usage.c.hour >= begin)
        async with self._flushing:  # nothing moves from memory to the database in between
            async with reading(self._engine) as connection:
                written = int((await connection.execute(query)).scalar() or 0)
            waiting = [self.journal.open.sum_up(), self._sealed.sum_up() if self._sealed else {}]
            return written + sum(
                prompt + completion
                for rows in waiting
                for (hour, tenant, _, _), (_, _, prompt, _, completion) in rows.items()
                if tenant == tenant_id and hour >= begin
            )

    async def flush(self) -> None:
        """Writes what has come together so far.

        Raises:
            StorageError: the database does not take it; it is kept and written the next time.
        """
        async with self._flushing:
            await self._write_sealed()
            if self.journal.open.row_count:
                self._sealed = self.journal.seal()
                await self._write_sealed()

    async def _write_sealed(self) -> None:
        if self._sealed is not None:
            await count_batch(self._engine, self._sealed.id, self._sealed.sum_up())
            self._sealed.delete()
            self._sealed = None

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._flush_s)
            await self._pass()

    async def _pass(self) -> None:
        """One round of the work; must never end it."""
        try:
            await self._work()
        except StorageError as error:
            if not self._is_away:
                log.warning("usage cannot be written and is kept: %s", error)
            self._is_away = True
        except Exception:  # the same: nothing is lost, and the next round tries again
            log.exception("usage could not be written and is kept")
        else:
            self._is_away = False

    async def _work(self) -> None:
        await self.flush()
        now = time.monotonic()
        if now >= self._looked_at:
            self._looked_at = now + LOOK_AROUND_S
            await self._count_left()
        if now >= self._pruned_at:
            async with writing(self._engine) as connection:
                before = int(self._wall_clock()) - STALE_S
                await connection.execute(delete(usage_batches).where(usage_batches.c.at < before))
            self._pruned_at = now + PRUNE_S

    async def _count_left(self) -> None:
        for segment in left_segments(self._folder):
            try:
                await self._count_segment(segment)
            except StorageError:
                self._looked_at = 0.0  # not the file's fault: every round asks the database again
                raise
            except Exception:  # one file's fault holds up neither the others nor what comes after them
                log.exception("%s is not counted, or not taken away: it is tried again in a minute", segment.path)

    async def _count_segment(self, segment: LeftSegment) -> None:
        rows = await asyncio.to_thread(segment.read)
        if segment.is_stale():
            requests = sum(row[0] for row in rows.values())
            log.error("%s: %d requests of over a week ago are set aside, maybe counted already", segment.id, requests)
            segment.set_aside()
            return
        if await count_batch(self._engine, segment.id, rows):
            log.info("%s: what a dead process left is counted", segment.id)
        segment.delete()


async def count_batch(engine: AsyncEngine, batch_id: str, rows: Rows) -> bool:
    """All of it in one transaction; False where the database has the batch already.

    Raises:
        StorageError: it may be counted or not; the same call again settles it.
    """
    async with writing(engine) as connection:
        insert = _postgresql_insert() if connection.dialect.name == "postgresql" else sqlite.insert
        note = insert(usage_batches).values(id=batch_id, at=int(time.time())).on_conflict_do_nothing()
        if (await connection.execute(note.returning(usage_batches.c.id))).first() is None:
            return False
        new = insert(usage)
        sums = {name: usage.c[name] + new.excluded[name] for name in COUNTS}
        names = usage.primary_key.columns.keys() + list(COUNTS)
        upsert = new.on_conflict_do_update(index_elements=usage.primary_key.columns, set_=sums)
        keys = sorted(rows)  # two gateways that write the same rows never wait for one another in a circle
        for begin in range(0, len(keys), CHUNK):
            chunk = keys[begin : begin + CHUNK]
            await connection.execute(upsert, [dict(zip(names, (*key, *rows[key]), strict=True)) for key in chunk])
    return True


def _postgresql_insert() -> Any:
    """Imported where it is used: on SQLite it would cost each process 2 MiB and a twentieth of its start."""
    from sqlalchemy.dialects.postgresql import insert

    return insert


@dataclass(frozen=True, slots=True)
class UsageQuestion:
    """Whole hours that begin in [start, end), by `hour`, `day` or `month` (UTC), at most `limit` rows after `after`."""

    start: int
    end: int
    by: str
    tenant_id: str | None = None  # None: every tenant
    adapter: str | None = None
    after: tuple[int, str, str] | None = None
    limit: int = 1_000


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One adapter's use in one stretch of time; `tenant` is its name, None once it is deleted."""

    start: int
    tenant_id: str
    tenant: str | None
    adapter: str
    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


async def read_usage(engine: AsyncEngine, question: UsageQuestion) -> Sequence[UsageRow]:
    """In order of time, tenant and adapter. Raises StorageUnavailable."""
    async with reading(engine) as connection:
        return [UsageRow(*row) for row in await connection.execute(_query(question))]


def _query(question: UsageQuestion) -> Select[Any]:
    asked = select(_bucket(question).label("start"), usage)
    asked = asked.where(usage.c.hour >= question.start, usage.c.hour < question.end)
    if question.tenant_id is not None:
        asked = asked.where(usage.c.tenant_id == question.tenant_id)
    if question.adapter is not None:
        asked = asked.where(usage.c.adapter == question.adapter)
    found = asked.subquery("asked")
    keys = (found.c.start, found.c.tenant_id, found.c.adapter)
    sums = [cast(func.sum(found.c[name]), BigInteger).label(name) for name in COUNTS]
    grouped = select(*keys, *sums).group_by(*keys).order_by(*keys).limit(question.limit)
    if question.after is not None:
        grouped = grouped.where(tuple_(*keys) > question.after)
    page = grouped.subquery("page")
    columns = (page.c.start, page.c.tenant_id, tenants.c.name, page.c.adapter, *(page.c[name] for name in COUNTS))
    named = select(*columns).select_from(page.outerjoin(tenants, tenants.c.id == page.c.tenant_id))
    return named.order_by(page.c.start, page.c.tenant_id, page.c.adapter)


def _bucket(question: UsageQuestion) -> ColumnElement[int]:
    """The first second of the hour, day or month of a row."""
    hour = usage.c.hour
    if question.by == "hour":
        return hour
    if question.by == "day":
        return hour - hour % DAY_S
    months = []
    begin, end = month_of(question.start)
    while begin < question.end:
        months.append((hour < end, begin))
        begin, end = month_of(end)
    return case(*months, else_=begin)
