"""How long what is cached may be served without a word from the database."""

import math
from collections.abc import Callable
from time import monotonic

from adapter_store.errors import StorageUnavailable


class Freshness:
    """Shared by the change feed, which confirms it, and the caches, which serve nothing past `until`."""

    __slots__ = ("_limit_s", "clock", "fresh_at", "until")

    def __init__(self, limit_s: float = math.inf, *, clock: Callable[[], float] = monotonic) -> None:
        self._limit_s = limit_s
        self.clock = clock  # what `fresh_at` and `until` are read on
        self.fresh_at = -math.inf  # when every cached value was known to be true
        self.until = -math.inf if math.isfinite(limit_s) else math.inf

    def confirm(self, at: float) -> None:
        """Every change made before `at` has been taken in."""
        self.fresh_at = at
        self.until = at + self._limit_s

    def check(self) -> None:
        """Raises StorageUnavailable where the changes of too long a time are unknown."""
        if self.clock() >= self.until:
            raise StorageUnavailable("the change feed has not been read for too long")
