"""Bearer key → caller. The tenant is the key: nothing else in a request says who asks."""

import time
from collections.abc import Callable
from hashlib import sha256
from hmac import compare_digest
from typing import Final
from weakref import WeakValueDictionary

from adapter_store.changes import Change
from adapter_store.ids import TenantId
from gateway.api_key import ApiKey
from gateway.errors import KeyInvalid, ScopeMissing
from gateway.fresh_cache import FreshCache
from gateway.freshness import Freshness
from gateway.key_uses import KeyUses
from gateway.keys import KEY_CHANGE, KEY_MADE, SHAPE, Keys
from gateway.plans import PLAN_CHANGE, Plan
from gateway.tenants import TENANT_CHANGE, Scope, Standing

_REFUSAL = (
    "The API key is missing or not valid. Send 'Authorization: Bearer <key>' with a key that your operator gave you."
)
_BEARER: Final = b"bearer "
_LONGEST: Final = 256
_NOTED_EVERY_S: Final = 60.0
_UNKNOWN_S: Final = 2.0
"""For so long a key that does not exist is refused without another query; a key that is made meanwhile ends it."""
_UNKNOWN_LIMIT: Final = 1_024
_OPERATORS: Final = Standing(None, Plan())


class Auth:
    """Looks keys up by their SHA-256 and compares it in constant time; a known key costs no query.

    What is cached is served for as long as `freshness` allows without a word from the change feed. What is not spelled
    like a key is refused unasked, and one that was not found is not asked for again at once.
    """

    def __init__(
        self,
        keys: Keys,
        freshness: Freshness | None = None,
        *,
        cache_limit: int = 100_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.uses = KeyUses(keys)
        self.changes = 0
        """How often something has changed by which a key may be over."""
        self._keys = keys
        self._freshness = freshness or Freshness()
        self._monotonic = self._freshness.clock
        self._clock = clock
        self._cache: FreshCache[bytes, ApiKey] = FreshCache(cache_limit)
        self._standings: WeakValueDictionary[TenantId, Standing] = WeakValueDictionary()
        self._unknown: dict[bytes, float] = {}  # until when, the oldest first
        self._keys_made = 0

    def known(self, authorization: bytes | None) -> ApiKey | None:
        """The live key behind an `Authorization` header, where nothing has to be asked; None: ask `live_key`."""
        if authorization is None or authorization[:7].lower() != _BEARER or len(authorization) > _LONGEST:
            return None
        digest = sha256(authorization[7:].strip()).digest()
        key = self._cache.get(digest)
        if key is None or not compare_digest(key.sha256, digest):
            return None
        tenant = key.tenant
        now = self._monotonic()
        if key.revoked or tenant.suspended or tenant.stale or now >= self._freshness.until:
            return None
        if key.expires_at is not None and self._clock() >= key.expires_at:
            return None
        if now - key.noted_at >= _NOTED_EVERY_S:
            self._note(key, now)
        return key

    async def live_key(self, authorization: bytes | None) -> ApiKey:
        """The live key behind an `Authorization` header, whatever it is for.

        Raises:
            KeyInvalid: no such key, or it is expired, revoked or its tenant suspended.
            StorageUnavailable: the database is away, and nothing in memory is fresh enough.
        """
        key = self.known(authorization)
        if key is not None:
            return key
        if authorization is None or authorization[:7].lower() != _BEARER or len(authorization) > _LONGEST:
            raise KeyInvalid(_REFUSAL)
        secret = authorization[7:].strip()
        if not SHAPE.fullmatch(secret):
            raise KeyInvalid(_REFUSAL)
        self._freshness.check()
        digest = sha256(secret).digest()
        key = self._cache.get(digest)
        if key is None and self._monotonic() < self._unknown.get(digest, 0.0):
            raise KeyInvalid(_REFUSAL)
        if key is None or key.tenant.stale:
            key = await self._look_up(digest)
        if not key.is_live(self._clock()):
            raise KeyInvalid(_REFUSAL)
        self._note(key, self._monotonic())
        return key

    async def caller(self, authorization: bytes | None, scope: Scope) -> ApiKey:
        """The live key behind an `Authorization` header.

        Raises:
            KeyInvalid, StorageUnavailable: as in `live_key`. ScopeMissing: it is for other things.
        """
        key = self.known(authorization) or await self.live_key(authorization)
        if scope not in key.scopes:
            raise ScopeMissing(f"This key may not be used here: it lacks the scope '{scope}'.")
        return key

    async def tenant(self, authorization: bytes | None, scope: Scope) -> TenantId:
        """The tenant behind an `Authorization` header; an operator's key stands for none.

        Raises:
            KeyInvalid, ScopeMissing, StorageUnavailable: as in `caller`.
        """
        key = await self.caller(authorization, scope)
        if key.tenant_id is None:
            raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
        return key.tenant_id

    def take_in(self, change: Change) -> None:
        """A change of a key, a tenant or a plan, from the change feed."""
        if change.noun == KEY_CHANGE and change.name is not None:
            self.forget(change.name)
        elif change.noun == KEY_MADE:
            self.forget_unknown()
        elif change.noun == TENANT_CHANGE and change.tenant_id is not None:
            self.forget_tenant(change.tenant_id)
        elif change.noun == PLAN_CHANGE and change.name is not None:
            self.forget_plan(change.name)

    def forget(self, sha256_hex: str) -> None:
        """A key has changed: ask the database again."""
        self.changes += 1
        self._cache.forget(bytes.fromhex(sha256_hex))

    def forget_unknown(self) -> None:
        """A key was made: ask the database again for those that were not found."""
        self._keys_made += 1
        self._unknown.clear()
        self._cache.outdate()

    def forget_tenant(self, tenant_id: TenantId) -> None:
        """A tenant has changed: ask the database again for each of its keys."""
        self.changes += 1
        self._cache.outdate()
        standing = self._standings.pop(tenant_id, None)
        if standing is not None:
            standing.stale = True

    def forget_plan(self, name: str) -> None:
        """A plan has changed: ask the database again for every key of the tenants on it."""
        self._cache.outdate()
        for standing in list(self._standings.values()):
            if standing.plan.name == name:
                standing.stale = True

    def clear(self) -> None:
        """Ask the database again for every key."""
        self.changes += 1
        self.forget_unknown()
        self._cache.clear()
        self._standings.clear()

    @property
    def cached(self) -> int:
        """Keys in memory."""
        return len(self._cache)

    def _note(self, key: ApiKey, now: float) -> None:
        key.noted_at = now
        self.uses.note(key.id, int(self._clock()))

    async def _look_up(self, digest: bytes) -> ApiKey:
        async def read() -> ApiKey:
            made = self._keys_made
            key = await self._keys.by_hash(digest)
            if key is None:
                if made == self._keys_made:
                    self._note_unknown(digest)
                raise KeyInvalid(_REFUSAL)
            key.tenant = self._shared(key.tenant)
            return key

        return await self._cache.fill(digest, read)

    def _note_unknown(self, digest: bytes) -> None:
        self._unknown.pop(digest, None)
        if len(self._unknown) >= _UNKNOWN_LIMIT:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[digest] = self._monotonic() + _UNKNOWN_S

    def _shared(self, read: Standing) -> Standing:
        """One standing for all keys of a tenant, so that one mark reaches them all."""
        if read.id is None:
            return _OPERATORS
        known = self._standings.get(read.id)
        if known is not None and not known.stale:
            if known.plan == read.plan and known.suspended == read.suspended:
                return known
            known.stale = True  # one of the two was read before a change: the other keys ask again
        self._standings[read.id] = read
        return read
