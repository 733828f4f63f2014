"""Adapters that are held back because an engine computed NaN with them, or ended while it loaded them.

What is known and what follows:

    corrupted      The engine's own count says whose answer had NaN logits: held back until an operator lifts it.
    engine_died    One suspect alone: held back for a minute. Dies another engine with it alone before one has lived
                   half a minute with it: held back until an operator lifts it. Several suspects: none is held back, and
                   none is restored; the agent narrows them down where it happens again.

So an adapter that happened to be there serves again after a minute, by itself, and is cleared once an engine has lived
with it. Another version is another digest, and free. Rows are told to every gateway by the change feed; this gateway's
own word holds at once, also while the database is away.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

from sqlalchemy import delete, insert, select

from adapter_store.changes import Change, record_change
from adapter_store.engine import AsyncEngine
from adapter_store.errors import StorageError
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.database import quarantine
from gateway.errors import AdapterQuarantined, ObjectUnknown
from gateway.open_set import Key
from gateway.replicas.client import Alarm

log = logging.getLogger("tailor.quarantine")
QUARANTINE_CHANGE: Final = "quarantine"
BACKOFF_S: Final = 60
LIVED_S: Final = 30.0
FRESH_S: Final = 3_600.0
"""An older alarm says nothing about now."""
RETRY_S: Final = 1.0
RETRY_FAULT_S: Final = 60.0
"""What is no outage of the database may stay: a traceback a minute is enough."""


@dataclass(frozen=True, slots=True)
class Held:
    """One adapter that is or was held back; times in Unix seconds, `generation` of the engine that gave the reason."""

    tenant_id: TenantId
    digest: str
    reason: str
    replica: str
    generation: str
    strikes: int
    at: int
    until: int | None
    lifted_at: int | None = None

    @property
    def key(self) -> Key:
        return (self.tenant_id, self.digest)

    @property
    def id(self) -> str:
        return f"q-{sha256(f'{self.tenant_id} {self.digest}'.encode()).hexdigest()[:16]}"

    def holds(self, now: float) -> bool:
        return self.lifted_at is None and (self.until is None or now < self.until)


class Quarantine:
    """The rows, and this gateway's copy of them, which the hot path asks before a load."""

    def __init__(self, engine: AsyncEngine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock
        self._rows: dict[Key, Held] = {}
        self._unwritten: dict[Key, Held] = {}
        self._changed = asyncio.Event()
        self._writes = asyncio.Event()
        self._turn = asyncio.Lock()  # a read that began before a write would forget what was written
        self.on_held: Callable[[Key], None] = lambda _: None
        """Told of every adapter that is newly held back."""

    # what loads ask

    def holds(self, key: Key) -> bool:
        row = self._rows.get(key)
        return row is not None and row.holds(self._clock())

    def check(self, key: Key) -> None:
        """Raises AdapterQuarantined where the adapter is held back."""
        row = self._rows.get(key)
        if row is not None and row.holds(self._clock()):
            raise AdapterQuarantined(row.reason, row.until, now=self._clock())

    def of(self, tenant_id: TenantId, digest: str) -> Held | None:
        """The row of an adapter that is held back now."""
        row = self._rows.get((tenant_id, digest))
        return row if row is not None and row.holds(self._clock()) else None

    @property
    def count(self) -> int:
        """How many adapters are held back now."""
        now = self._clock()
        return sum(row.holds(now) for row in self._rows.values())

    # what replicas tell

    def accuse(self, alarm: Alarm, replica: str) -> None:
        """Take an alarm in, once however often it is heard, and hold its one suspect back."""
        if len(alarm.suspects) != 1 or self._clock() - alarm.at > FRESH_S:
            return
        suspect = alarm.suspects[0]
        key = (TenantId(suspect.owner), suspect.digest)
        known = self._rows.get(key)
        if known is not None and known.generation == alarm.generation:
            return
        strikes = known.strikes + 1 if known is not None and known.lifted_at is None else 1
        now = int(self._clock())
        certain = alarm.reason == "corrupted" or strikes > 1
        row = Held(
            *key, alarm.reason, replica, alarm.generation, strikes, at=now, until=None if certain else now + BACKOFF_S
        )
        log.error(
            "adapter %s of tenant %s is held back (%s in engine %s of %s, strike %d)",
            row.digest, row.tenant_id, row.reason, row.generation, row.replica, row.strikes,
        )  # fmt: skip
        self._put(row)

    def is_on_trial(self, key: Key) -> bool:
        """Whether an engine must live with the adapter for a while before it is cleared."""
        row = self._rows.get(key)
        return row is not None and row.lifted_at is None and row.until is not None

    def acquit(self, key: Key) -> None:
        """An engine has lived with it: it had nothing to do with the death."""
        row = self._rows.get(key)
        if row is not None and self.is_on_trial(key):
            self._put(replace(row, lifted_at=int(self._clock())))

    def _put(self, row: Held) -> None:
        held_before = self.holds(row.key)
        self._rows[row.key] = self._unwritten[row.key] = row
        self._writes.set()
        if self.holds(row.key) and not held_before:
            self.on_held(row.key)

    # what operators do

    def held(self) -> list[Held]:
        """All that are held back now, the latest first."""
        now = self._clock()
        return sorted((row for row in self._rows.values() if row.holds(now)), key=lambda row: row.at, reverse=True)

    async def lift(self, held_id: str) -> Held:
        """Let an adapter be loaded again, here at once and at every gateway within a second.

        Raises:
            ObjectUnknown: it is not held back.
        """
        async with self._turn:
            await self._read()
            row = next((row for row in self.held() if row.id == held_id), None)
            if row is None:
                raise ObjectUnknown("No adapter is held back under that id.", param="held_id")
            lifted = replace(row, lifted_at=int(self._clock()))
            await self._write(lifted)
            self._unwritten.pop(row.key, None)
            self._rows[row.key] = lifted
        return lifted

    # rows

    def on_change(self, change: Change) -> None:
        """A listener of the change feed."""
        if change.noun == QUARANTINE_CHANGE:
            self._changed.set()

    def on_reset(self) -> None:
        """The change feed has a gap."""
        self._changed.set()

    async def read(self) -> None:
        """Take the database's word, but for what this gateway still has to write.

        Raises:
            StorageUnavailable: all stays as it was.
        """
        async with self._turn:
            await self._read()

    async def _read(self) -> None:
        async with reading(self._engine) as connection:
            found = [Held(*row) for row in await connection.execute(select(quarantine))]
        fresh = {row.key: row for row in found} | self._unwritten
        before, self._rows = self._rows, fresh
        now = self._clock()
        for key, row in fresh.items():
            if row.holds(now) and not (key in before and before[key].holds(now)):
                self.on_held(key)

    async def follow(self) -> None:
        """Read what others have changed, for ever; meant to run as one task."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.read()
            except StorageError as error:
                log.warning("the quarantine cannot be read: %s", type(error).__name__)
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            except Exception:  # following must never end: what other gateways hold back would be loaded here
                log.exception("the quarantine cannot be read")
                asyncio.get_running_loop().call_later(RETRY_FAULT_S, self._changed.set)

    async def write(self) -> None:
        """Write what this gateway has found, for ever; meant to run as one task."""
        while True:
            await self._writes.wait()
            self._writes.clear()
            for key in list(self._unwritten):
                try:
                    await self._write_found(key)
                except StorageError as error:
                    log.warning("the quarantine cannot be written: %s", type(error).__name__)
                    self._writes.set()
                    await asyncio.sleep(RETRY_S)
                except Exception:  # nor may writing, and one row's fault holds up no other
                    log.exception("adapter %s of tenant %s is held back here alone", key[1], key[0])
                    asyncio.get_running_loop().call_later(RETRY_FAULT_S, self._writes.set)

    async def _write_found(self, key: Key) -> None:
        async with self._turn:
            row = self._unwritten.get(key)
            if row is None:
                return  # lifted meanwhile
            await self._write(row)
            if self._unwritten.get(key) is row:
                del self._unwritten[key]

    async def _write(self, row: Held) -> None:
        """As another gateway has heard the same alarm, the row may be there: then it is the same."""
        mine = (quarantine.c.tenant_id == row.tenant_id) & (quarantine.c.digest == row.digest)
        async with writing(self._engine) as connection:
            await record_change(connection, QUARANTINE_CHANGE, row.tenant_id, row.digest)
            await connection.execute(delete(quarantine).where(mine))
            await connection.execute(insert(quarantine).values(**_values(row)))


def _values(row: Held) -> dict[str, object]:
    return {column.name: getattr(row, column.name) for column in quarantine.c}
