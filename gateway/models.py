"""What a tenant's `model` means: the base model, or one of its own adapters' versions."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from adapter_store.catalog import Version
from adapter_store.changes import Change
from adapter_store.errors import AdapterNotFound
from adapter_store.ids import TenantId
from adapter_store.store import NOUN, AdapterStore
from gateway.errors import ModelUnknown
from gateway.fresh_cache import SharedReads
from gateway.freshness import Freshness

BASE: Final = "base"


class Models:
    """Resolves names; what is known costs no query, what has changed is forgotten by the change feed.

    What is cached is served for as long as `freshness` allows without a word from the change feed. The names of one
    tenant lie together: 35 bytes a name beside the version itself, and one lookup to forget them all.
    """

    def __init__(
        self, store: AdapterStore, base_name: str, freshness: Freshness | None = None, *, cache_limit: int = 200_000
    ) -> None:
        self.base_name = base_name
        self._store = store
        self._freshness = freshness or Freshness()
        self._monotonic = self._freshness.clock
        self._limit = cache_limit
        self._size = 0
        self._tenants: OrderedDict[TenantId, dict[str, Version]] = OrderedDict()  # least recently used first
        self._reads = SharedReads[tuple[TenantId, str], Version | None]()

    def known(self, tenant_id: TenantId, model: str) -> Version | None:
        """The version that answers for `model`, where nothing has to be asked; None: ask `resolve`."""
        names = self._tenants.get(tenant_id)
        if names is None or self._monotonic() >= self._freshness.until:
            return None
        self._tenants.move_to_end(tenant_id)
        return names.get(model)

    async def resolve(self, tenant_id: TenantId, model: str) -> Version | None:
        """The version that answers for `model`; None for the base model itself.

        Raises:
            ModelUnknown: the tenant has no such model; another tenant's and a missing one look the same.
            OtherBaseModel: it was made for another one.
            StorageUnavailable: the database is away, and nothing in memory is fresh enough.
        """
        if model == self.base_name:
            return None
        try:
            return await self._asked(tenant_id, model, lambda: self._store.resolve(tenant_id, model))
        except AdapterNotFound:
            raise ModelUnknown(model) from None

    async def previous(self, version: Version) -> Version | None:
        """The version of the same adapter that came before, for whoever falls back to it.

        Raises:
            StorageUnavailable: as in `resolve`.
        """
        name = f"{version.adapter_name}@<{version.number}"  # no model can be called that
        return await self._asked(version.tenant_id, name, lambda: self._store.previous(version))

    async def _asked(
        self, tenant_id: TenantId, name: str, read: Callable[[], Awaitable[Version | None]]
    ) -> Version | None:
        version = self.known(tenant_id, name)
        if version is not None:
            return version
        self._freshness.check()

        def keep(found: Version | None) -> None:
            if found is not None:
                self._keep(tenant_id, name, found)

        return await self._reads.share((tenant_id, name), read, keep)

    def _keep(self, tenant_id: TenantId, name: str, version: Version) -> None:
        names = self._tenants.setdefault(version.tenant_id, {})
        self._tenants.move_to_end(tenant_id)
        if name == version.adapter_name:
            name = version.adapter_name  # the one string serves as key too
        self._size += name not in names
        names[name] = version
        while self._size > self._limit and len(self._tenants) > 1:
            self._size -= len(self._tenants.popitem(last=False)[1])
        while self._size > self._limit:  # a single tenant with more names than there is room for: its oldest go
            del names[next(iter(names))]
            self._size -= 1

    def take_in(self, change: Change) -> None:
        """A change of an adapter, from the change feed: its name and its versions are asked for again."""
        if change.noun != NOUN or change.tenant_id is None:
            return
        if change.name is None:
            self.forget_tenant(change.tenant_id)
            return
        self._reads.outdate()
        names = self._tenants.get(change.tenant_id, {})
        version = f"{change.name}@"
        for name in [name for name in names if name == change.name or name.startswith(version)]:
            del names[name]
            self._size -= 1
        if not names:
            self._tenants.pop(change.tenant_id, None)

    def forget_tenant(self, tenant_id: TenantId) -> None:
        """This gateway itself changed something of the tenant's: no need to wait for the feed."""
        self._reads.outdate()
        self._size -= len(self._tenants.pop(tenant_id, ()))

    def clear(self) -> None:
        """Ask the database again for every name."""
        self._reads.outdate()
        self._tenants.clear()
        self._size = 0
