"""What tenants are sending to this process: how many uploads at once, and how many bytes of them lie in staging.

A quota counts what is stored. What is still coming is counted here, so that uploads that run at the same time are held
to the quota together, and not each by itself. Every process counts for itself; what is stored in the end is held to the
quota in the database's transaction, for all of them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Final
from weakref import WeakValueDictionary

from adapter_store.bundle import Beside, StagedBundle, Staging
from adapter_store.ids import TenantId
from gateway.errors import UploadsUnderWay

RETRY_AFTER_S: Final = 2


class Kind(StrEnum):
    """Which quota the bytes count against; those of a declared upload are in what is stored already."""

    ADAPTER = "adapter"
    FILE = "file"
    DECLARED = "declared"


class Arrivals:
    """Stages what tenants send, at most `most_at_once` uploads of one tenant at a time."""

    def __init__(self, staging: Staging, *, most_at_once: int) -> None:
        self._staging = staging
        self._most_at_once = most_at_once
        self._under_way: dict[TenantId, tuple[_Arrival, ...]] = {}  # tuples: threads read them
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def stage(
        self, tenant_id: TenantId, kind: Kind, limits: dict[str, int] | None = None
    ) -> AsyncIterator[StagedBundle]:
        """As `Staging.stage`, counted until the folder is gone. Raises UploadsUnderWay, StorageError."""
        async with self.place(tenant_id, kind) as arrival, self._staging.stage(limits) as bundle:
            arrival.bundle = bundle
            yield bundle

    @asynccontextmanager
    async def complete(
        self, tenant_id: TenantId, upload_id: str, limits: dict[str, int] | None = None
    ) -> AsyncIterator[StagedBundle]:
        """The same for a declared upload that is put together: one is never in staging twice at a time."""
        async with (
            self.place(tenant_id, Kind.DECLARED),
            self._turns.setdefault(upload_id, asyncio.Lock()),
            self._staging.stage(limits) as bundle,
        ):
            yield bundle

    @asynccontextmanager
    async def place(self, tenant_id: TenantId, kind: Kind) -> AsyncIterator["_Arrival"]:
        """One of the tenant's places. Raises UploadsUnderWay."""
        before = self._under_way.get(tenant_id, ())
        if len(before) >= self._most_at_once:
            raise UploadsUnderWay(
                f"{len(before)} uploads of yours are under way here, and no more run at once: send this one when one "
                "of them has ended.",
                retry_after_s=RETRY_AFTER_S,
            )
        arrival = _Arrival(kind)
        self._under_way[tenant_id] = (*before, arrival)
        try:
            yield arrival
        finally:
            left = tuple(other for other in self._under_way[tenant_id] if other is not arrival)
            if left:
                self._under_way[tenant_id] = left
            else:
                del self._under_way[tenant_id]

    def size_bytes(self, tenant_id: TenantId, kind: Kind, *, besides: StagedBundle | None = None) -> int:
        """What the tenant has under way of that kind."""
        return sum(
            other.bundle.counted_bytes
            for other in self._under_way.get(tenant_id, ())
            if other.kind is kind and other.bundle is not None and other.bundle is not besides
        )

    def beside(self, tenant_id: TenantId, kind: Kind, bundle: StagedBundle, most_bytes: int) -> Beside:
        """For `StagedBundle.cap`: this one and the others under way have so many bytes together."""
        return Beside(most_bytes, lambda: self.size_bytes(tenant_id, kind, besides=bundle), _no_room())

    def check_room(self, tenant_id: TenantId, kind: Kind, size_bytes: int, left_bytes: int | None) -> None:
        """Whether what is declared fits beside what is under way, where it fits at all. Raises UploadsUnderWay."""
        if left_bytes is not None and left_bytes - self.size_bytes(tenant_id, kind) < size_bytes <= left_bytes:
            raise _no_room()


class _Arrival:
    """One upload; `bundle`: where its bytes lie, once there are any."""

    __slots__ = ("bundle", "kind")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.bundle: StagedBundle | None = None


def _no_room() -> UploadsUnderWay:
    return UploadsUnderWay(
        "Your plan has no room for this beside the uploads that are under way: send it when they have ended.",
        retry_after_s=RETRY_AFTER_S,
    )
