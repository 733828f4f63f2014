"""Bearer key → caller. The tenant is the key: nothing else in a request says who asks."""

import time
from hashlib import sha256

from adapter_store.ids import TenantId
from gateway.errors import KeyInvalid, ScopeMissing
from gateway.fresh_cache import FreshCache
from gateway.tenants import ApiKey, Scope, Tenants

_REFUSAL = (
    "The API key is missing or not valid. Send 'Authorization: Bearer <key>' with a key that your operator gave you."
)


class Auth:
    """Looks keys up by their SHA-256, so that no comparison depends on a secret's bytes; a known key costs no query."""

    def __init__(self, tenants: Tenants, *, cache_limit: int = 100_000) -> None:
        self._tenants = tenants
        self._cache: FreshCache[str, ApiKey] = FreshCache(cache_limit)

    async def caller(self, authorization: bytes | None, scope: Scope) -> ApiKey:
        """The live key behind an `Authorization` header.

        Raises:
            KeyInvalid: as in `live_key`. ScopeMissing: it is for other things.
        """
        key = await self.live_key(authorization)
        if scope not in key.scopes:
            raise ScopeMissing(f"This key may not be used here: it lacks the scope '{scope}'.")
        return key

    async def live_key(self, authorization: bytes | None) -> ApiKey:
        """The live key behind an `Authorization` header, whatever it is for.

        Raises:
            KeyInvalid: no such key, or it is expired or revoked.
        """
        if authorization is None or authorization[:7].lower() != b"bearer " or len(authorization) > 256:
            raise KeyInvalid(_REFUSAL)
        digest = sha256(authorization[7:].strip()).hexdigest()
        key = self._cache.get(digest)
        if key is None:
            key = await self._look_up(digest)
        if not key.is_live(time.time()):
            raise KeyInvalid(_REFUSAL)
        return key

    async def tenant(self, authorization: bytes | None, scope: Scope) -> TenantId:
        """The tenant behind an `Authorization` header; an operator's key stands for none.

        Raises:
            KeyInvalid, ScopeMissing: as in `caller`.
        """
        key = await self.caller(authorization, scope)
        if key.tenant_id is None:
            raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
        return key.tenant_id

    async def _look_up(self, digest: str) -> ApiKey:
        async def read() -> ApiKey:
            key = await self._tenants.key_by_hash(digest)
            if key is None:
                raise KeyInvalid(_REFUSAL)
            return key

        return await self._cache.fill(digest, read)

    def forget(self, digest: str) -> None:
        """A key has changed: ask the database again."""
        self._cache.forget(digest)

    def clear(self) -> None:
        """Ask the database again for every key."""
        self._cache.clear()
