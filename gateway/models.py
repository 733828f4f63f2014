"""What a tenant's `model` means: the base model, or one of its own adapters' versions."""

from collections.abc import Awaitable, Callable
from typing import Final

from adapter_store.aliases import NOUN, Split, main_of
from adapter_store.catalog import Version
from adapter_store.changes import Change
from adapter_store.errors import AdapterNotFound
from adapter_store.ids import TenantId
from adapter_store.store import AdapterStore
from gateway.errors import ModelUnknown
from gateway.fresh_cache import SharedReads
from gateway.freshness import Freshness

Answering = Version | Split
"""What stands for a name: one version, or several of which each request is given one."""
_NO_TEXT: Final = chr(0xDC00)
"""Half of a pair: what clients send is UTF-8, which has none."""


class Models:
    """Resolves names; what is known costs no query, what has changed is forgotten by the change feed.

    What is cached is served for as long as `freshness` allows without a word from the change feed. The names of one
    tenant lie together: little memory beside the versions themselves, and one lookup to forget them all.
    """

    def __init__(
        self, store: AdapterStore, base_name: str, freshness: Freshness | None = None, *, cache_limit: int = 200_000
    ) -> None:
        self.base_name = base_name
        self._store = store
        self._freshness = freshness or Freshness()
        self._monotonic = self._freshness.clock
        self._half = cache_limit // 2
        self._young: dict[TenantId, dict[str, Answering]] = {}  # two generations, as in FreshCache
        self._old: dict[TenantId, dict[str, Answering]] = {}
        self._young_names = 0
        self._reads = SharedReads[tuple[TenantId, str], Answering | None]()

    def known(self, tenant_id: TenantId, model: str) -> Answering | None:
        """What answers for `model`, where nothing has to be asked; None: ask `resolve`."""
        names = self._young.get(tenant_id)
        if names is None:
            names = self._promoted(tenant_id)
        if names is None or self._monotonic() >= self._freshness.until:
            return None
        return names.get(model)

    async def resolve(self, tenant_id: TenantId, model: str) -> Answering | None:
        """What answers for `model`; None for the base model itself.

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
        name = f"{version.adapter_name}@{_NO_TEXT}{version.number}"
        found = await self._asked(version.tenant_id, name, lambda: self._store.previous(version))
        return None if found is None else main_of(found)

    async def _asked(
        self, tenant_id: TenantId, name: str, read: Callable[[], Awaitable[Answering | None]]
    ) -> Answering | None:
        known = self.known(tenant_id, name)
        if known is not None:
            return known
        self._freshness.check()

        def keep(found: Answering | None) -> None:
            if found is not None:
                self._keep(tenant_id, name, found)

        return await self._reads.share((tenant_id, name), read, keep)

    def _keep(self, tenant_id: TenantId, name: str, found: Answering) -> None:
        self._make_room(1)
        names = self._young.get(tenant_id)
        if names is None:
            names = self._promoted(tenant_id)
        if names is None:
            names = self._young[_one_string(tenant_id, found)] = {}
        elif len(names) >= self._half:  # a single tenant has more names than there is room for
            self._young_names -= len(names)
            names.clear()
        self._young_names += name not in names
        names[found.adapter_name if name == found.adapter_name else name] = found  # one string for both

    def _promoted(self, tenant_id: TenantId) -> dict[str, Answering] | None:
        names = self._old.pop(tenant_id, None)
        if names is not None:
            self._make_room(len(names))
            self._young[tenant_id] = names
            self._young_names += len(names)
        return names

    def _make_room(self, count: int) -> None:
        """For so many names in the younger generation: where it is full the older one goes."""
        if self._young_names + count > self._half and self._young_names:
            self._old, self._young, self._young_names = self._young, {}, 0

    def take_in(self, change: Change) -> None:
        """A change of an adapter, from the change feed: its name and its versions are asked for again."""
        if change.noun != NOUN or change.tenant_id is None:
            return
        if change.name is None:
            self.forget_tenant(change.tenant_id)
            return
        self._reads.outdate()
        for generation in (self._young, self._old):
            names = generation.get(change.tenant_id, {})
            for name in [name for name, found in names.items() if found.adapter_name == change.name]:
                del names[name]
                self._young_names -= generation is self._young

    def forget_tenant(self, tenant_id: TenantId) -> None:
        """This gateway itself changed something of the tenant's: no need to wait for the feed."""
        self._reads.outdate()
        self._young_names -= len(self._young.pop(tenant_id, ()))
        self._old.pop(tenant_id, None)

    def clear(self) -> None:
        """Ask the database again for every name."""
        self._reads.outdate()
        self._young.clear()
        self._old.clear()
        self._young_names = 0

    def __len__(self) -> int:
        return sum(len(names) for generation in (self._young, self._old) for names in generation.values())


def _one_string(tenant_id: TenantId, found: Answering) -> TenantId:
    """The tenant's id, as its own versions have it; not that of who has lent it one."""
    return main_of(found).tenant_id if main_of(found).tenant_id == tenant_id else tenant_id
