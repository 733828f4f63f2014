"""API keys: the rows, and the rules of who may make, rotate and revoke one.

A key never grants more than the one that makes it: no scope that its maker lacks, no day after its maker's end. The
maker's row is read again inside the transaction, so that a key whose revocation has not been heard of everywhere makes
no successor.
"""

import hashlib
import re
import secrets
import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hmac import compare_digest
from sys import intern
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Row,
    RowMapping,
    Select,
    and_,
    bindparam,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.api_key import ApiKey
from gateway.database import api_keys, migrate, open_engine, plans, tenants
from gateway.errors import (
    GrantTooWide,
    KeyInvalid,
    KeyIsOver,
    LastOperatorKey,
    ObjectUnknown,
    RequestInvalid,
    TooManyKeys,
)
from gateway.plans import COLUMNS as PLAN_COLUMNS
from gateway.plans import Plan, plan_of
from gateway.tenants import KeyId, Scope, Standing

KEY_PREFIX: Final = "sk-tailor-"
KEY_CHANGE: Final = "key"  # named by the key's hash
KEY_MADE: Final = "key made"  # likewise; nothing that is known of another changes
LIVE_KEYS_LIMIT: Final = 1_000
"""Of one tenant: what a tenant's own admin can fill the database with has an end."""
_ALPHABET = string.ascii_letters + string.digits  # a double click selects all of it
_CHARACTERS: Final = 43  # of them, after the prefix
SHAPE: Final = re.compile(rb"%b[A-Za-z0-9]{%d}" % (KEY_PREFIX.encode(), _CHARACTERS))
"""Of every key's secret that was ever made: what is spelled otherwise is none."""


@dataclass(frozen=True, slots=True)
class KeyDetails:
    """A key as its owner sees it, without its secret. `tenant_id` is None for an operator's; times in Unix seconds."""

    id: KeyId
    tenant_id: TenantId | None
    prefix: str
    scopes: frozenset[Scope]
    label: str
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None
    created_by: KeyId | None = None
    replaces: KeyId | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The successor with its secret, and the key that it replaces, as it was."""

    made: KeyDetails
    secret: str
    old: KeyDetails


def new_secret() -> str:
    """256 random bits, spelled so that they can be told for a key of ours."""
    return KEY_PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_CHARACTERS))


def hash_key(secret: bytes) -> str:
    """What is stored of a key: 256 random bits need no slow hash."""
    return hashlib.sha256(secret).hexdigest()


class Keys:
    """Keys in the database; every change is put into the change feed in the same transaction.

    `whose` of a call says whose keys are meant: None for operators' own, `ANYONE` where an operator may touch all.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        live_limit: int = LIVE_KEYS_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._live_limit = live_limit
        self._clock = clock

    async def create(
        self,
        tenant_id: TenantId | None,
        scopes: Iterable[Scope],
        *,
        maker: ApiKey | None,
        label: str = "",
        expires_at: int | None = None,
        secret: str | None = None,
    ) -> tuple[KeyDetails, str]:
        """A new key and its secret, which is shown this once and stored only as a hash.

        `maker` None is the machine's owner. Without `expires_at` the key ends with its maker.
        Raises:
            GrantTooWide: its maker has less. RequestInvalid: it would be over already. TooManyKeys.
        """
        now = self._now()
        if expires_at is not None and expires_at <= now:
            raise RequestInvalid("expires_at is in the past.", param="expires_at")
        secret = secret or new_secret()
        asked = _new_details(tenant_id, frozenset(scopes), secret, label, now, expires_at)
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await self._check_room(connection, tenant_id, now)
            made = await self._bounded(connection, asked, maker)
            await _insert(connection, made)
            await record_change(connection, KEY_MADE, made.tenant_id, made.sha256)
        return made, secret

    async def rotate(
        self, whose: "TenantId | Anyone | None", key_id: str, *, maker: ApiKey, overlap_s: int
    ) -> Rotation:
        """A successor with the same tenant, scopes, label and end; the old key goes on for `overlap_s` at most.

        Raises:
            ObjectUnknown: no such key here. KeyIsOver: it is revoked or expired. GrantTooWide: the maker has less.
            TooManyKeys: the old one would go on beside as many as there may be.
        """
        now = self._now()
        secret = new_secret()
        async with writing(self._engine) as connection:
            await take_turn(connection)
            old = _details_of(await _find(connection, whose, key_id))
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise KeyIsOver("This key is revoked or expired: make a new one.", param="key")
            if overlap_s:  # else the two change places: one key may be rotated again and again
                await self._check_room(connection, old.tenant_id, now)
            asked = _new_details(old.tenant_id, old.scopes, secret, old.label, now, old.expires_at)
            made = replace(await self._bounded(connection, asked, maker), replaces=old.id)
            if made.expires_at != old.expires_at:
                raise GrantTooWide("Your key ends before this one: it makes no successor with the same end.")
            await _insert(connection, made)
            ends_at = now + overlap_s if old.expires_at is None else min(old.expires_at, now + overlap_s)
            await connection.execute(update(api_keys).where(api_keys.c.id == old.id).values(expires_at=ends_at))
            await record_change(connection, KEY_CHANGE, old.tenant_id, old.sha256)
            await record_change(connection, KEY_MADE, made.tenant_id, made.sha256)
        return Rotation(made, secret, old)

    async def revoke(self, whose: "TenantId | Anyone | None", key_id: str) -> KeyDetails:
        """Revoke a key for good; the key as it was. Revoking twice is no error.

        Raises:
            ObjectUnknown: no such key here. LastOperatorKey: no other operator's key is live.
        """
        now = self._now()
        async with writing(self._engine) as connection:
            await take_turn(connection)
            key = _details_of(await _find(connection, whose, key_id))
            if key.revoked_at is not None:
                return key
            if key.tenant_id is None and not await _other_operator(connection, key.id, now):
                raise LastOperatorKey(
                    "This is the last live operator key: make another first (POST /admin/v1/keys, or rotate this one).",
                    param="key",
                )
            await connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(revoked_at=now))
            await record_change(connection, KEY_CHANGE, key.tenant_id, key.sha256)
        return key

    async def page(self, tenant_id: TenantId | None, after: str | None, limit: int) -> list[KeyDetails]:
        """A tenant's keys (or operators' own), revoked ones too, the oldest first; those after the key `after`.

        Raises:
            ObjectUnknown: there is no key `after` here.
        """
        order = (api_keys.c.created_at, api_keys.c.id)
        query = select(api_keys).where(_owned(tenant_id)).order_by(*order).limit(limit)
        async with reading(self._engine) as connection:
            if after is not None:
                anchor = await _find(connection, tenant_id, after)
                query = query.where(tuple_(*order) > tuple_(anchor.created_at, anchor.id))
            return [_details_of(row) for row in await connection.execute(query)]

    async def by_hash(self, sha256: bytes) -> ApiKey | None:
        """The key with that hash and its tenant's standing, as they are now."""
        async with reading(self._engine) as connection:
            row = (await connection.execute(_by_hash(sha256.hex()))).mappings().first()
        if row is None or not compare_digest(bytes.fromhex(row["sha256"]), sha256):
            return None
        return _key_of(row, sha256)

    async def has_operator(self) -> bool:
        async with reading(self._engine) as connection:
            return await _has_operator(connection)

    async def ensure_operator(self, keep: Callable[[str], None]) -> None:
        """Make the first operator's key where there is none; of gateways that start at once, one does.

        `keep` gets its secret first: a key that nobody has ever seen would lock everybody out.
        """
        if await self.has_operator():
            return
        async with writing(self._engine) as connection:
            await take_turn(connection)
            if await _has_operator(connection):
                return
            secret = new_secret()
            keep(secret)
            scopes = frozenset({Scope.OPERATOR})
            await _insert(connection, _new_details(None, scopes, secret, "first operator key", self._now(), None))

    async def note_uses(self, uses: Sequence[tuple[KeyId, int]]) -> None:
        """Keep when keys were last used; an older note than the one that is there changes nothing."""
        statement = (
            update(api_keys)
            .where(
                api_keys.c.id == bindparam("key_id"),
                or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < bindparam("used_at")),
            )
            .values(last_used_at=bindparam("used_at"))
        )
        rows = [{"key_id": key_id, "used_at": used_at} for key_id, used_at in sorted(uses)]  # one order of row locks
        async with writing(self._engine) as connection:
            await connection.execute(statement, rows)

    async def _check_room(self, connection: AsyncConnection, tenant_id: TenantId | None, now: int) -> None:
        query = select(func.count()).select_from(api_keys).where(_owned(tenant_id), _live(now))
        if (await connection.execute(query)).scalar_one() >= self._live_limit:
            raise TooManyKeys(f"There are {self._live_limit} live keys: revoke those that nobody needs.")

    def _now(self) -> int:
        return int(self._clock())

    async def _bounded(self, connection: AsyncConnection, asked: KeyDetails, maker: ApiKey | None) -> KeyDetails:
        """The key as its maker may make it. Raises GrantTooWide, KeyInvalid."""
        if maker is None:
            return asked
        ends_at = await self._end_of(connection, maker)
        if Scope.OPERATOR not in maker.scopes:
            if asked.tenant_id != maker.tenant_id:
                raise GrantTooWide("A key makes keys of its own tenant only.")
            if missing := asked.scopes - maker.scopes:
                raise GrantTooWide(f"Your key lacks the scope '{min(missing)}': it cannot grant it.", param="scopes")
        expires_at = asked.expires_at
        if ends_at is not None:
            if expires_at is not None and expires_at > ends_at:
                raise GrantTooWide(f"Your key ends at {ends_at}: it makes none that outlives it.", param="expires_at")
            expires_at = ends_at if expires_at is None else expires_at
        return replace(asked, expires_at=expires_at, created_by=maker.id)

    async def _end_of(self, connection: AsyncConnection, maker: ApiKey) -> int | None:
        """When the maker's key ends, as the database says now. Raises KeyInvalid where it is over."""
        row = (await connection.execute(_by_hash(maker.sha256.hex()))).mappings().first()
        if row is None or not _key_of(row, maker.sha256).is_live(self._clock()):
            raise KeyInvalid("The API key is not valid any more.")
        ends_at: int | None = row["expires_at"]
        return ends_at


class Anyone:
    """Whose keys an operator may touch."""


ANYONE: Final = Anyone()


def _new_details(
    tenant_id: TenantId | None, scopes: frozenset[Scope], secret: str, label: str, now: int, expires_at: int | None
) -> KeyDetails:
    return KeyDetails(
        id=KeyId(f"key_{secrets.token_hex(12)}"),
        tenant_id=tenant_id,
        prefix=secret[: len(KEY_PREFIX) + 4],
        scopes=scopes,
        label=label,
        created_at=now,
        expires_at=expires_at,
        sha256=hash_key(secret.encode()),
    )


async def _insert(connection: AsyncConnection, key: KeyDetails) -> None:
    await connection.execute(
        insert(api_keys).values(
            id=key.id,
            tenant_id=key.tenant_id,
            sha256=key.sha256,
            prefix=key.prefix,
            scopes=" ".join(sorted(key.scopes)),
            label=key.label,
            created_at=key.created_at,
            expires_at=key.expires_at,
            created_by=key.created_by,
            replaces=key.replaces,
        )
    )


def _owned(whose: TenantId | Anyone | None) -> ColumnElement[bool]:
    """The tenant is asked for inside the query: another's key and a missing one are the same."""
    if isinstance(whose, Anyone):
        return api_keys.c.id.is_not(None)
    return api_keys.c.tenant_id.is_(None) if whose is None else api_keys.c.tenant_id == whose


def _live(now: int) -> ColumnElement[bool]:
    return and_(api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now))


async def _find(connection: AsyncConnection, whose: TenantId | Anyone | None, key_id: str) -> Row[Any]:
    row = (await connection.execute(select(api_keys).where(api_keys.c.id == key_id, _owned(whose)))).first()
    if row is None:
        raise ObjectUnknown(f"There is no key '{key_id[:64]}'.", param="key")
    return row


async def _has_operator(connection: AsyncConnection) -> bool:
    query = select(api_keys.c.id).where(_owned(None), api_keys.c.revoked_at.is_(None)).limit(1)
    return (await connection.execute(query)).first() is not None


async def _other_operator(connection: AsyncConnection, key_id: str, now: int) -> bool:
    query = select(api_keys.c.id).where(_owned(None), _live(now), api_keys.c.id != key_id).limit(1)
    return (await connection.execute(query)).first() is not None


def _by_hash(sha256: str) -> Select[Any]:
    return (
        select(
            api_keys.c.id,
            api_keys.c.tenant_id,
            api_keys.c.sha256,
            api_keys.c.scopes,
            api_keys.c.expires_at,
            api_keys.c.revoked_at,
            tenants.c.suspended_at,
            *PLAN_COLUMNS,
        )
        .outerjoin(tenants, tenants.c.id == api_keys.c.tenant_id)
        .outerjoin(plans, plans.c.name == tenants.c.plan)
        .where(api_keys.c.sha256 == sha256)
    )


def _key_of(row: RowMapping, sha256: bytes) -> ApiKey:
    tenant_id = (
        None if row["tenant_id"] is None else TenantId(intern(row["tenant_id"]))
    )  # one string with its versions'
    plan = Plan() if tenant_id is None else plan_of(row)
    return ApiKey(
        id=KeyId(row["id"]),
        sha256=sha256,
        tenant=Standing(tenant_id, plan, suspended=row["suspended_at"] is not None),
        scopes=_scopes_of(row["scopes"]),
        expires_at=row["expires_at"],
        revoked=row["revoked_at"] is not None,
    )


@lru_cache(maxsize=256)
def _scopes_of(spelled: str) -> frozenset[Scope]:
    """One set for all keys that have the same."""
    return frozenset(Scope(scope) for scope in spelled.split())


def _details_of(row: Row[Any]) -> KeyDetails:
    return KeyDetails(
        id=KeyId(row.id),
        tenant_id=row.tenant_id,
        prefix=row.prefix,
        scopes=_scopes_of(row.scopes),
        label=row.label,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        created_by=row.created_by,
        replaces=row.replaces,
        sha256=row.sha256,
    )


async def make_operator_key(database_url: str) -> str:
    """The secret of a new operator's key, made straight in the database; for whoever owns that machine."""
    engine = open_engine(database_url)
    try:
        await migrate(engine)
        _, secret = await Keys(engine).create(None, [Scope.OPERATOR], maker=None, label="made on the machine")
    finally:
        await engine.dispose()
    return secret
