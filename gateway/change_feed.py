"""Keeps this gateway's caches true: follows the database's change feed, which every writer appends to."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.changes import Change, changes_since, last_change
from adapter_store.errors import StorageError
from adapter_store.transactions import reading

log = logging.getLogger("tailor.changes")
POLL_S = 0.5


class ChangeFeed:
    """Tells listeners of every change, in order, at most half a second late."""

    def __init__(
        self,
        engine: AsyncEngine,
        listeners: Sequence[Callable[[Change], None]],
        resets: Sequence[Callable[[], None]],
    ) -> None:
        self._engine = engine
        self._listeners = listeners
        self._resets = resets  # called where the feed, which keeps its newest entries only, has a gap for us
        self._seen = 0

    async def start(self) -> None:
        async with reading(self._engine) as connection:
            self._seen = await last_change(connection)

    async def follow(self) -> None:
        """Poll for ever; meant to run as one task. A database that is away is asked again."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.catch_up()
            except StorageError as error:
                log.warning("the change feed cannot be read: %s", type(error).__name__)
            except Exception:  # following must never end: a revoked key would work for ever
                log.exception("a change could not be taken in: every cache starts empty")
                for drop in self._resets:
                    drop()

    async def catch_up(self) -> None:
        async with reading(self._engine) as connection:
            changes = await changes_since(connection, self._seen)
        if changes and changes[0].seq > self._seen + 1:
            log.warning("changes were missed: every cache starts empty")
            for drop in self._resets:
                drop()
        for change in changes:
            for tell in self._listeners:
                tell(change)
            self._seen = change.seq
