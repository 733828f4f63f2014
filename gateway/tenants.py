"""Tenants and their keys: the rows, and the rules of who may be made."""

import hashlib
import re
import secrets
import string
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from sqlalchemy import Row, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.changes import record_change
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.database import api_keys, migrate, open_engine, tenants
from gateway.errors import NameTaken, ObjectUnknown, RequestInvalid

KeyId = NewType("KeyId", str)
KEY_PREFIX = "sk-tailor-"
_ALPHABET = string.ascii_letters + string.digits  # a double click selects all of it
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
KEY_CHANGE = "key"


class Scope(StrEnum):
    """What a key may be used for."""

    INFERENCE = "inference"
    ADAPTERS = "adapters"
    OPERATOR = "operator"


TENANT_SCOPES = frozenset({Scope.INFERENCE, Scope.ADAPTERS})


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer; `created_at` in Unix seconds."""

    id: TenantId
    name: str
    created_at: int


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `tenant_id` is None for an operator's key; times in Unix seconds."""

    id: KeyId
    tenant_id: TenantId | None
    prefix: str
    scopes: frozenset[Scope]
    label: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None

    def is_live(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new_secret() -> str:
    """256 random bits, spelled so that they can be told for a key of ours."""
    return KEY_PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(43))


def hash_key(secret: bytes) -> str:
    """What is stored of a key: 256 random bits need no slow hash."""
    return hashlib.sha256(secret).hexdigest()


class Tenants:
    """Tenants and keys in the database; every change is put into the change feed in the same transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(self, name: str) -> Tenant:
        """A new tenant.

        Raises:
            RequestInvalid: the name breaks the rule. NameTaken: another tenant has it.
        """
        if not _NAME.fullmatch(name):
            raise RequestInvalid(
                "A tenant's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit.",
                param="name",
            )
        tenant = Tenant(TenantId(f"tnt_{secrets.token_hex(12)}"), name, int(time.time()))
        try:
            async with writing(self._engine) as connection:
                await connection.execute(
                    insert(tenants).values(id=tenant.id, name=tenant.name, created_at=tenant.created_at)
                )
        except IntegrityError:
            raise NameTaken(f"A tenant named '{name}' exists.", param="name") from None
        return tenant

    async def all(self) -> list[Tenant]:
        async with reading(self._engine) as connection:
            rows = await connection.execute(select(tenants).order_by(tenants.c.name))
            return [Tenant(TenantId(row.id), row.name, row.created_at) for row in rows]

    async def named(self, name: str) -> Tenant:
        """The tenant of that name or id.

        Raises:
            ObjectUnknown: there is none.
        """
        async with reading(self._engine) as connection:
            query = select(tenants).where((tenants.c.name == name) | (tenants.c.id == name))
            row = (await connection.execute(query)).first()
        if row is None:
            raise ObjectUnknown(f"There is no tenant '{name[:64]}'.", param="tenant")
        return Tenant(TenantId(row.id), row.name, row.created_at)

    async def create_key(
        self,
        tenant_id: TenantId | None,
        scopes: Iterable[Scope],
        *,
        label: str = "",
        expires_at: int | None = None,
        secret: str | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is shown this once and stored only as a hash."""
        secret = secret or new_secret()
        key = ApiKey(
            id=KeyId(f"key_{secrets.token_hex(12)}"),
            tenant_id=tenant_id,
            prefix=secret[: len(KEY_PREFIX) + 4],
            scopes=frozenset(scopes),
            label=label,
            created_at=int(time.time()),
            expires_at=expires_at,
            revoked_at=None,
        )
        async with writing(self._engine) as connection:
            await connection.execute(
                insert(api_keys).values(
                    id=key.id,
                    tenant_id=tenant_id,
                    sha256=hash_key(secret.encode()),
                    prefix=key.prefix,
                    scopes=" ".join(sorted(key.scopes)),
                    label=label,
                    created_at=key.created_at,
                    expires_at=expires_at,
                )
            )
        return key, secret

    async def keys(self, tenant_id: TenantId | None) -> list[ApiKey]:
        async with reading(self._engine) as connection:
            query = select(api_keys).where(api_keys.c.tenant_id == tenant_id).order_by(api_keys.c.created_at)
            return [_key_of(row) for row in await connection.execute(query)]

    async def key_by_hash(self, sha256: str) -> ApiKey | None:
        async with reading(self._engine) as connection:
            query = select(api_keys).where(api_keys.c.sha256 == sha256)
            row = (await connection.execute(query)).first()
        return None if row is None else _key_of(row)

    async def has_operator(self) -> bool:
        async with reading(self._engine) as connection:
            query = select(api_keys.c.id).where(api_keys.c.tenant_id.is_(None), api_keys.c.revoked_at.is_(None))
            return (await connection.execute(query.limit(1))).first() is not None

    async def revoke_key(self, key_id: str) -> str:
        """Revoke a key for good and return its hash; revoking twice is no error.

        Raises:
            ObjectUnknown: there is no such key.
        """
        async with writing(self._engine) as connection:
            found = (await connection.execute(select(api_keys).where(api_keys.c.id == key_id))).first()
            if found is None:
                raise ObjectUnknown(f"There is no key '{key_id[:64]}'.", param="key")
            await connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=int(time.time()))
            )
            await record_change(connection, KEY_CHANGE, found.tenant_id, found.sha256)
        return str(found.sha256)


def _key_of(row: Row[tuple[object, ...]]) -> ApiKey:
    return ApiKey(
        id=KeyId(row.id),
        tenant_id=None if row.tenant_id is None else TenantId(row.tenant_id),
        prefix=row.prefix,
        scopes=frozenset(Scope(scope) for scope in row.scopes.split()),
        label=row.label,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


async def make_operator_key(database_url: str) -> str:
    """The secret of a new operator's key, made straight in the database; for whoever owns that machine."""
    engine = open_engine(database_url)
    try:
        await migrate(engine)
        _, secret = await Tenants(engine).create_key(None, [Scope.OPERATOR], label="made on the machine")
    finally:
        await engine.dispose()
    return secret
