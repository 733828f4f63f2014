"""What a tenant's `model` means: the base model, or one of its own adapters' versions."""

from typing import Final

from adapter_store.catalog import Version
from adapter_store.changes import Change
from adapter_store.errors import AdapterNotFound
from adapter_store.ids import TenantId
from adapter_store.store import NOUN, AdapterStore
from gateway.errors import ModelUnknown
from gateway.fresh_cache import FreshCache

BASE: Final = "base"


class Models:
    """Resolves names; what is known costs no query, what has changed is forgotten by the change feed."""

    def __init__(self, store: AdapterStore, base_name: str, *, cache_limit: int = 20_000) -> None:
        self.base_name = base_name
        self._store = store
        self._cache: FreshCache[TenantId, dict[str, Version]] = FreshCache(cache_limit)

    async def resolve(self, tenant_id: TenantId, model: str) -> Version | None:
        """The version that answers for `model`; None for the base model itself.

        Raises:
            ModelUnknown: the tenant has no such model; another tenant's and a missing one look the same.
        """
        if model == self.base_name:
            return None
        known = self._cache.get(tenant_id)
        version = known.get(model) if known else None
        if version is not None:
            return version

        async def read() -> dict[str, Version]:
            return {**(self._cache.get(tenant_id) or {}), model: await self._store.resolve(tenant_id, model)}

        try:
            return (await self._cache.fill(tenant_id, read))[model]
        except AdapterNotFound:
            raise ModelUnknown(model) from None

    def forget(self, change: Change) -> None:
        """Some adapter of a tenant changed: all names of that tenant are asked for again."""
        if change.noun == NOUN and change.tenant_id is not None:
            self._cache.forget(change.tenant_id)

    def forget_tenant(self, tenant_id: TenantId) -> None:
        """This gateway itself changed something of the tenant's: no need to wait for the feed."""
        self._cache.forget(tenant_id)

    def clear(self) -> None:
        """Ask the database again for every name."""
        self._cache.clear()
