"""Adapters that stay loaded: rows, told to every gateway by the change feed.

A pin is an adapter's, by name: whichever version its name stands for is loaded into one replica at least, is evicted
only where every other adapter is busy or pinned too, and is the first to be loaded again after an engine's restart.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete, func, insert, select, update

from adapter_store.aliases import NOUN, main_of
from adapter_store.catalog import Version
from adapter_store.changes import Change, record_change, take_turn
from adapter_store.engine import AsyncEngine
from adapter_store.errors import AdapterNotFound, OtherBaseModel, StorageError
from adapter_store.ids import TenantId
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading, writing
from gateway.database import pins
from gateway.errors import ObjectUnknown, TooManyPins
from gateway.open_set import Key

log = logging.getLogger("tailor.pins")
PIN_CHANGE: Final = "pin"
RETRY_S: Final = 1.0
TENANT: Final = "tenant"
OPERATOR: Final = "operator"


@dataclass(frozen=True, slots=True)
class Pin:
    """`pinned_by` is `tenant`, within its plan, or `operator`; `at` in Unix seconds."""

    tenant_id: TenantId
    adapter: str
    pinned_by: str
    at: int


class Pins:
    """`tell` is given the versions to keep loaded whenever they have changed."""

    def __init__(self, engine: AsyncEngine, store: AdapterStore, tell: Callable[[Mapping[Key, Version]], None]) -> None:
        self._engine = engine
        self._store = store
        self._tell = tell
        self._tenants: frozenset[TenantId] = frozenset()
        self._changed = asyncio.Event()

    async def pin(self, tenant_id: TenantId, adapter: str, *, by: str, most: int | None = None) -> Pin:
        """Keep an adapter loaded; pinned twice is pinned once, and an operator's pin replaces the tenant's.

        Raises:
            AdapterNotFound: the tenant has none of that name. TooManyPins: it has `most` already.
        """
        await self._store.show(tenant_id, adapter)
        row = Pin(tenant_id, adapter, by, int(time.time()))
        mine = (pins.c.tenant_id == tenant_id) & (pins.c.adapter == adapter)
        async with writing(self._engine) as connection:
            await take_turn(connection)
            found = (await connection.execute(select(pins.c.pinned_by, pins.c.at).where(mine))).one_or_none()
            if found is not None and (found.pinned_by == by or by == TENANT):
                return Pin(tenant_id, adapter, found.pinned_by, found.at)
            if most is not None:
                own = (pins.c.tenant_id == tenant_id) & (pins.c.pinned_by == TENANT)
                count = (await connection.execute(select(func.count()).select_from(pins).where(own))).scalar_one()
                if count >= most:
                    raise TooManyPins(
                        f"Your plan lets you pin {most} adapters: unpin another one, or ask the operator."
                    )
            await record_change(connection, PIN_CHANGE, tenant_id, adapter)
            if found is None:
                values = {"tenant_id": tenant_id, "adapter": adapter, "pinned_by": by, "at": row.at}
                await connection.execute(insert(pins).values(values))
            else:
                await connection.execute(update(pins).where(mine).values(pinned_by=by, at=row.at))
        self._changed.set()
        return row

    async def unpin(self, tenant_id: TenantId, adapter: str, *, by: str) -> None:
        """Let an adapter go when room is needed; a tenant cannot take an operator's pin away.

        Raises:
            ObjectUnknown: it is not pinned.
        """
        mine = (pins.c.tenant_id == tenant_id) & (pins.c.adapter == adapter)
        if by == TENANT:
            mine &= pins.c.pinned_by == TENANT
        async with writing(self._engine) as connection:
            await record_change(connection, PIN_CHANGE, tenant_id, adapter)
            if not (await connection.execute(delete(pins).where(mine))).rowcount:
                raise ObjectUnknown("That adapter is not pinned, or an operator has pinned it.", param="name")
        self._changed.set()

    async def forget(self, tenant_id: TenantId, adapter: str) -> None:
        """The adapter has been deleted."""
        if tenant_id not in self._tenants:
            return
        mine = (pins.c.tenant_id == tenant_id) & (pins.c.adapter == adapter)
        async with writing(self._engine) as connection:
            await connection.execute(delete(pins).where(mine))
            await record_change(connection, PIN_CHANGE, tenant_id, adapter)
        self._changed.set()

    async def all(self) -> list[Pin]:
        """By tenant and name."""
        async with reading(self._engine) as connection:
            found = await connection.execute(select(pins).order_by(pins.c.tenant_id, pins.c.adapter))
            return [Pin(row.tenant_id, row.adapter, row.pinned_by, row.at) for row in found]

    def on_change(self, change: Change) -> None:
        """A listener of the change feed: of pins, and of what pinned adapters' names stand for."""
        if change.noun == PIN_CHANGE or (change.noun == NOUN and change.tenant_id in self._tenants):
            self._changed.set()

    def on_reset(self) -> None:
        """The change feed has a gap."""
        self._changed.set()

    async def follow(self) -> None:
        """Tell what is to be kept loaded, for ever; meant to run as one task."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                self._tell(await self._versions())
            except StorageError as error:
                log.warning("the pins cannot be read: %s", type(error).__name__)
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            except Exception:  # following must never end: pins would be what they were for ever
                log.exception("the pins could not be followed")

    async def _versions(self) -> Mapping[Key, Version]:
        rows = await self.all()
        self._tenants = frozenset(row.tenant_id for row in rows)
        found: dict[Key, Version] = {}
        for row in rows:
            try:
                version = main_of(await self._store.resolve(row.tenant_id, row.adapter))
            except (AdapterNotFound, OtherBaseModel):
                continue
            found[row.tenant_id, version.digest] = version
        return found
