"""Keeps this gateway's caches true: follows the database's change feed, which every writer appends to."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from adapter_store.changes import Change, changes_since, last_change
from adapter_store.engine import AsyncEngine
from adapter_store.errors import StorageError, StorageUnavailable
from adapter_store.transactions import reading
from gateway.freshness import Freshness

log = logging.getLogger("tailor.changes")
POLL_S: Final = 0.5
ANSWER_S: Final = 2.0
"""Patience with one read: a connection that has died silently must not hide a revocation."""
PAGE: Final = 1_000


class ChangeFeed:
    """Tells listeners of every change, in order, at most half a second late; confirms `freshness` with each read.

    `engine` should be the feed's own: behind writers that wait for a locked database it would read nothing, though it
    could.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        listeners: Sequence[Callable[[Change], None]],
        resets: Sequence[Callable[[], None]],
        freshness: Freshness | None = None,
    ) -> None:
        self._engine = engine
        self._listeners = listeners
        self._resets = resets  # called where the feed, which keeps its newest entries only, has a gap for us
        self._freshness = freshness or Freshness()
        self._seen = 0

    async def start(self) -> None:
        """Take what is now as the beginning; to be called before anything is cached."""
        asked_at = self._freshness.clock()
        async with reading(self._engine) as connection:
            self._seen = await last_change(connection)
        self._freshness.confirm(asked_at)

    async def close(self) -> None:
        """Give the connection back; the next read opens another."""
        await self._engine.dispose()

    async def follow(self) -> None:
        """Poll for ever; meant to run as one task. A database that is away is asked again."""
        away = False
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.catch_up()
                if away:
                    log.warning("the change feed is read again")
                away = False
            except StorageError as error:
                if not away:
                    log.warning("the change feed cannot be read: %s", type(error).__name__)
                away = True
            except Exception:  # following must never end: a revoked key would work for ever
                log.exception("a change could not be taken in: every cache starts empty")
                self._reset()

    async def catch_up(self) -> None:
        """Take in every change so far.

        Raises:
            StorageUnavailable: the database does not answer; what it has told is taken in.
        """
        while True:
            asked_at = self._freshness.clock()
            changes, last = await self._read()
            if last < self._seen:
                log.warning("the database is older than what was read from it: every cache starts empty")
                self._reset()
                self._seen = last
            elif changes and changes[0].seq > self._seen + 1:
                log.warning("changes were missed: every cache starts empty")
                self._reset()
            for change in changes:
                self._seen = change.seq  # before it is told: one that cannot be taken in must not come for ever
                for tell in self._listeners:
                    tell(change)
            if len(changes) < PAGE:
                break
        self._freshness.confirm(asked_at)

    async def _read(self) -> tuple[Sequence[Change], int]:
        try:
            async with asyncio.timeout(ANSWER_S), reading(self._engine) as connection:
                changes = await changes_since(connection, self._seen, limit=PAGE)
                return changes, await last_change(connection)
        except TimeoutError as error:
            raise StorageUnavailable("the database does not answer") from error

    def _reset(self) -> None:
        for drop in self._resets:
            drop()
