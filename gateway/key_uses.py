"""When each key was last used: kept in memory, written in batches, never while a request waits."""

import asyncio
import logging
from itertools import islice
from typing import Final

from adapter_store.errors import StorageError
from gateway.keys import Keys
from gateway.tenants import KeyId

log = logging.getLogger("tailor.keys")
EVERY_S: Final = 30.0
BATCH: Final = 500  # rows in one transaction: other writers wait for it
LIMIT: Final = 100_000
"""Notes kept while the database is away; the uses of further keys are not noted then."""


class KeyUses:
    """The newest use of each key that is not in the database yet."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._uses: dict[KeyId, int] = {}

    def note(self, key_id: KeyId, used_at: int) -> None:
        """The key was used; in Unix seconds."""
        if len(self._uses) < LIMIT or key_id in self._uses:
            self._uses[key_id] = used_at

    async def follow(self) -> None:
        """Write every 30 s, for ever; meant to run as one task."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.flush()
            except StorageError as error:
                log.warning("the last uses of keys are written later: %s", error)
            except Exception:  # a fault here must not end the writing for good
                log.exception("the last uses of keys were not written")

    async def flush(self) -> None:
        """Write what is noted; what cannot be written stays noted. Raises StorageUnavailable, StorageFull."""
        while self._uses:
            batch = list(islice(self._uses.items(), BATCH))
            await self._keys.note_uses(batch)
            for key_id, used_at in batch:
                if self._uses.get(key_id) == used_at:
                    del self._uses[key_id]
