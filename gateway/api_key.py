"""What a request needs of a key; a module of its own, because it is compiled."""

import math

from adapter_store.ids import TenantId
from gateway.plans import Plan
from gateway.tenants import KeyId, Scope, Standing


class ApiKey:
    """Compact, because a gateway keeps as many as there are. Times in Unix seconds.

    `noted_at` is when its use was last noted, on this process's monotonic clock.
    """

    __slots__ = ("expires_at", "id", "noted_at", "revoked", "scopes", "sha256", "tenant")

    def __init__(
        self,
        id: KeyId,  # noqa: A002
        sha256: bytes,
        tenant: Standing,
        scopes: frozenset[Scope],
        expires_at: int | None,
        *,
        revoked: bool,
    ) -> None:
        self.id = id
        self.sha256 = sha256
        self.tenant = tenant
        self.scopes = scopes
        self.expires_at = expires_at
        self.revoked = revoked
        self.noted_at = -math.inf

    @property
    def tenant_id(self) -> TenantId | None:
        """None for an operator's key."""
        return self.tenant.id

    @property
    def plan(self) -> Plan:
        """The tenant's, as it is now."""
        return self.tenant.plan

    def is_live(self, now: float) -> bool:
        return not (self.revoked or self.tenant.suspended or self.has_expired(now))

    def has_expired(self, now: float) -> bool:
        """Whether it has expired."""
        return self.expires_at is not None and now >= self.expires_at
