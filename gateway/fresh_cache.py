"""A bounded cache that the change feed keeps fresh: entries stay until a change names them."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FreshCache(Generic[K, V]):
    """What was not used for long leaves first; a value read before a change is never kept after it.

    Two generations instead of a list in order of use: a hit is one lookup and moves nothing, which counts where the
    entries are more than the processor's caches hold. What an older generation is asked for joins the younger one; when
    that holds half of `limit`, the older one is dropped.
    """

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._reads = SharedReads[K, V]()

    def get(self, key: K) -> V | None:
        value = self._young.get(key)
        if value is None and self._old:
            value = self._old.pop(key, None)
            if value is not None:
                self._keep(key, value)
        return value

    async def fill(self, key: K, read: Callable[[], Awaitable[V]]) -> V:
        """Read a missing value and keep it, unless something was forgotten meanwhile; many askers cost one read."""
        return await self._reads.share(key, read, lambda value: self._keep(key, value))

    def _keep(self, key: K, value: V) -> None:
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._old.pop(key, None)
        self._young[key] = value

    def forget(self, key: K) -> None:
        self._reads.outdate()
        self._young.pop(key, None)
        self._old.pop(key, None)

    def outdate(self) -> None:
        """Something that reads depend on has changed: none that is under way may be kept."""
        self._reads.outdate()

    def clear(self) -> None:
        self._reads.outdate()
        self._young.clear()
        self._old.clear()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class SharedReads(Generic[K, V]):
    """Reads under way, each shared by all who ask for its key until a change outdates it."""

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[V]] = {}
        self._epoch = 0

    async def share(self, key: K, read: Callable[[], Awaitable[V]], keep: Callable[[V], None]) -> V:
        """What `read` gives; `keep` is told of it where nothing has changed meanwhile.

        The read belongs to nobody who waits for it: one who leaves takes nothing from the others.
        """
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.ensure_future(self._read(key, read, keep))
            task.add_done_callback(_seen)
        try:
            return await asyncio.shield(task)
        finally:
            del task  # an error that it ends in refers to this frame

    async def _read(self, key: K, read: Callable[[], Awaitable[V]], keep: Callable[[V], None]) -> V:
        epoch = self._epoch
        try:
            value = await read()
            if epoch == self._epoch:
                keep(value)
            return value
        finally:
            if self._running.get(key) is asyncio.current_task():
                del self._running[key]

    def outdate(self) -> None:
        """A change: who asks from now on reads anew, and what is being read is given out but not kept."""
        self._epoch += 1
        self._running.clear()


def _seen(task: "asyncio.Task[V]") -> None:
    """Everybody may have left before it failed: that is no unhandled error."""
    if not task.cancelled():
        task.exception()
