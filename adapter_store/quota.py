"""What a tenant may keep, and what it keeps: adapters, versions, bytes, and the highest rank."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import bindparam, func, select

from adapter_store.catalog import adapters, versions
from adapter_store.engine import AsyncConnection
from adapter_store.errors import QuotaExceeded
from adapter_store.ids import TenantId
from adapter_store.uploads import reserved_bytes

_ADVICE: Final = "or ask your operator for another plan"
_ADAPTERS: Final = select(func.count(), func.count().filter(adapters.c.name == bindparam("name"))).where(
    adapters.c.tenant_id == bindparam("tenant_id")
)
_VERSIONS: Final = select(
    func.count(), func.coalesce(func.sum(versions.c.config_bytes + versions.c.weights_bytes), 0)
).where(versions.c.tenant_id == bindparam("tenant_id"))


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one tenant; None is no limit. The errors name them as a plan does."""

    adapters: int | None = None
    versions: int | None = None
    stored_bytes: int | None = None
    rank: int | None = None

    @property
    def counts(self) -> bool:
        """Whether what is kept matters."""
        return (self.adapters, self.versions, self.stored_bytes) != (None, None, None)

    def check_rank(self, rank: int) -> None:
        """Raises QuotaExceeded."""
        if self.rank is not None and rank > self.rank:
            raise QuotaExceeded(
                "max_rank",
                f"your plan allows rank {self.rank} and this adapter has {rank}: train it with a lower r, {_ADVICE}",
            )


NO_QUOTA: Final = Quota()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a tenant has. `stored_bytes`: of all versions, and what its uploads that are under way will have."""

    adapters: int
    versions: int
    stored_bytes: int
    has_adapter: bool

    def check(self, quota: Quota, more_bytes: int) -> None:
        """Whether a version more of that size still fits. Raises QuotaExceeded."""
        if quota.adapters is not None and not self.has_adapter and self.adapters >= quota.adapters:
            raise QuotaExceeded("max_adapters", _told(quota.adapters, self.adapters, "adapters", "delete one"))
        if quota.versions is not None and self.versions >= quota.versions:
            raise QuotaExceeded("max_versions", _told(quota.versions, self.versions, "versions", "delete one"))
        left = self.bytes_left(quota)
        if left is not None and more_bytes > left:
            raise bytes_exceeded(quota, self)

    def bytes_left(self, quota: Quota) -> int | None:
        """How large a version more may be; None: of any size."""
        return None if quota.stored_bytes is None else max(0, quota.stored_bytes - self.stored_bytes)


def bytes_exceeded(quota: Quota, kept: Kept) -> QuotaExceeded:
    """The error of an adapter that does not fit beside what is there."""
    told = _told(quota.stored_bytes or 0, kept.stored_bytes, "bytes of adapters", "delete a version")
    return QuotaExceeded("max_stored_bytes", f"this adapter is too large for what is left: {told}")


async def kept_by(
    connection: AsyncConnection, tenant_id: TenantId, name: str | None, *, besides_upload: str | None = None
) -> Kept:
    """What the tenant has, without what the upload `besides_upload` reserves; no name: that of an adapter it has."""
    count, mine = (await connection.execute(_ADAPTERS, {"tenant_id": tenant_id, "name": name})).one()
    numbered, stored = (await connection.execute(_VERSIONS, {"tenant_id": tenant_id})).one()
    reserved = await reserved_bytes(connection, tenant_id, besides=besides_upload)
    return Kept(int(count), int(numbered), int(stored) + reserved, name is None or bool(mine))


def _told(limit: int, used: int, what: str, remedy: str) -> str:
    return f"your plan allows {limit} {what} and {used} are used: {remedy}, {_ADVICE}"
