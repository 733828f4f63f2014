"""A bounded cache that the change feed keeps fresh: entries stay until a change names them."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FreshCache(Generic[K, V]):
    """Least recently used entries leave first; a value read before a change is never kept after it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._epoch = 0

    def get(self, key: K) -> V | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    async def fill(self, key: K, read: Callable[[], Awaitable[V]]) -> V:
        """Read a missing value and keep it, unless something was forgotten meanwhile."""
        epoch = self._epoch
        value = await read()
        if epoch == self._epoch:
            self._entries[key] = value
            if len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return value

    def forget(self, key: K) -> None:
        self._epoch += 1
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._epoch += 1
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
