"""Permissions: a tenant lets another ask one of its versions, by the version's fine-tuned name.

A permission is a row that the owner makes, of one version for one tenant; nothing is inherited, and there is no list
from which the other could learn of it. The other's requests are its own in everything: key, limits, ledger, prefix
cache. It may ask, and nothing else: not list, load, publish, train on or see anything of the owner's.
A permission goes with its version.
"""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Row, Table, Text, UniqueConstraint, delete, insert, select

from adapter_store import catalog
from adapter_store.aliases import NOUN
from adapter_store.catalog import Version, adapters, metadata, version_of, versions
from adapter_store.changes import record_change
from adapter_store.engine import AsyncConnection
from adapter_store.errors import PermissionNotFound, TooManyPermissions
from adapter_store.ids import TenantId, VersionId

MOST: Final = 1_000
"""Of one version."""

grants = Table(
    "grants",
    metadata,
    Column("id", Text, primary_key=True),  # in the order of time
    Column("tenant_id", Text, nullable=False),  # the version's owner
    Column("version_id", Text, ForeignKey("versions.id", name="fk_grants_version_id"), nullable=False),
    Column("granted_to", Text, nullable=False),  # no foreign key: nobody learns from it which tenants there are
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    UniqueConstraint("version_id", "granted_to", name="uq_grants_version_id_granted_to"),
    Index("ix_grants_granted_to", "granted_to"),
)


@dataclass(frozen=True, slots=True)
class Grant:
    """One tenant's permission to ask one version."""

    id: str
    version_id: VersionId
    granted_to: TenantId
    created_at: int


async def find_lent(connection: AsyncConnection, tenant_id: TenantId, name: str, hex_id: str) -> Version | None:
    """The version of another tenant's adapter `name` whose id ends so, if this tenant may ask it."""
    statement = (
        catalog.select_versions()
        .join(grants, grants.c.version_id == versions.c.id)
        .where(adapters.c.name == name, versions.c.id == f"ver_{hex_id}", grants.c.granted_to == tenant_id)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else version_of(row)


async def allow(
    connection: AsyncConnection, version: Version, tenants: Sequence[TenantId], *, by: str, now: float
) -> list[Grant]:
    """Lets each of the tenants ask the version; a permission that is there stays. The caller holds the writers' turn.

    Raises TooManyPermissions.
    """
    there = {grant.granted_to: grant for grant in await page(connection, version, limit=MOST)}
    wanted = list(dict.fromkeys(tenants))
    new = [tenant for tenant in wanted if tenant not in there]
    if len(there) + len(new) > MOST:
        raise TooManyPermissions(f"a version is lent to {MOST} projects at most: delete a permission first")
    for tenant in new:
        grant = Grant(f"cp_{int(now * 1_000):012x}{secrets.token_hex(6)}", version.id, tenant, int(now))
        there[tenant] = grant
        row = {
            "id": grant.id,
            "tenant_id": version.tenant_id,
            "version_id": version.id,
            "granted_to": tenant,
            "created_at": grant.created_at,
            "created_by": by,
        }
        await connection.execute(insert(grants).values(row))
    return [there[tenant] for tenant in wanted]


async def page(
    connection: AsyncConnection,
    version: Version,
    *,
    after: str | None = None,
    limit: int = 100,
    newest_first: bool = True,
    granted_to: str | None = None,
) -> list[Grant]:
    """The version's; the next page starts `after` the last id of this one."""
    statement = select(grants).where(grants.c.version_id == version.id).limit(limit)
    statement = statement.order_by(grants.c.id.desc() if newest_first else grants.c.id)
    if after is not None:
        statement = statement.where(grants.c.id < after if newest_first else grants.c.id > after)
    if granted_to is not None:
        statement = statement.where(grants.c.granted_to == granted_to)
    return [_grant(row) for row in await connection.execute(statement)]


async def take_back(connection: AsyncConnection, version: Version, grant_id: str) -> Grant:
    """From the commit on the other's requests find nothing. Raises PermissionNotFound."""
    here = (grants.c.id == grant_id) & (grants.c.version_id == version.id)
    row = (await connection.execute(select(grants).where(here))).one_or_none()
    if row is None:
        raise PermissionNotFound(grant_id)
    await connection.execute(delete(grants).where(here))
    await record_change(connection, NOUN, row.granted_to, None)
    return _grant(row)


async def tell_holders(connection: AsyncConnection, gone: Collection[VersionId]) -> None:
    """Those who could ask versions that are about to go must look for them again."""
    statement = select(grants.c.granted_to).where(grants.c.version_id.in_(list(gone))).distinct()
    for tenant_id in (await connection.execute(statement)).scalars().all():
        await record_change(connection, NOUN, tenant_id, None)


def _grant(row: Row[Any]) -> Grant:
    return Grant(row.id, row.version_id, row.granted_to, row.created_at)
