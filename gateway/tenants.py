"""Tenants: the rows, and what a key of one may do."""

import re
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType

from sqlalchemy import Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.database import tenants
from gateway.errors import NameTaken, ObjectUnknown, RequestInvalid
from gateway.plans import DEFAULT, Plan, require_plan

KeyId = NewType("KeyId", str)
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TENANT_CHANGE: Final = "tenant"
SUSPENDED: Final = select(tenants.c.id).where(tenants.c.suspended_at.is_not(None))
"""The ids of those that are suspended."""


class Scope(StrEnum):
    """What a key may be used for."""

    INFERENCE = "inference"
    ADAPTERS = "adapters"
    TRAINING = "training"
    ADMIN = "admin"  # the keys of its own tenant
    OPERATOR = "operator"  # everything under /admin/v1; stands for no tenant


TENANT_SCOPES: Final = frozenset({Scope.INFERENCE, Scope.ADAPTERS, Scope.TRAINING, Scope.ADMIN})
DEFAULT_SCOPES: Final = TENANT_SCOPES - {Scope.ADMIN}


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer; times in Unix seconds. While `suspended_at` is set none of its keys is good."""

    id: TenantId
    name: str
    created_at: int
    plan: str
    suspended_at: int | None


class Standing:
    """What all keys of one tenant share; of operators' keys, `id` is None.

    `stale`: something of it has changed, and whoever holds it must ask the database again. `salt` is that of the
    tenant's prefix cache, once a request has needed it.
    """

    __slots__ = ("__weakref__", "id", "plan", "salt", "stale", "suspended")

    def __init__(self, tenant_id: TenantId | None, plan: Plan, *, suspended: bool = False) -> None:
        self.id = tenant_id
        self.plan = plan
        self.suspended = suspended
        self.stale = False
        self.salt = ""


class Tenants:
    """Tenants in the database; every change is put into the change feed in the same transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(self, name: str, plan: str = DEFAULT) -> Tenant:
        """A new tenant.

        Raises:
            RequestInvalid: the name breaks the rule. NameTaken: another tenant has it. ObjectUnknown: no such plan.
        """
        check_name(name, "A tenant's")
        tenant = Tenant(TenantId(f"tnt_{secrets.token_hex(12)}"), name, int(time.time()), plan, None)
        row = {"id": tenant.id, "name": name, "created_at": tenant.created_at, "plan": plan}
        try:
            async with writing(self._engine) as connection:
                await take_turn(connection)
                await require_plan(connection, plan)
                await connection.execute(insert(tenants).values(row))
        except IntegrityError:
            raise NameTaken(f"A tenant named '{name}' exists.", param="name") from None
        return tenant

    async def page(self, after: str | None, limit: int) -> list[Tenant]:
        """By name, those that come after `after`."""
        query = select(tenants).order_by(tenants.c.name).limit(limit)
        if after is not None:
            query = query.where(tenants.c.name > after)
        async with reading(self._engine) as connection:
            return [_tenant_of(row) for row in await connection.execute(query)]

    async def named(self, name: str) -> Tenant:
        """The tenant of that name or id. Raises ObjectUnknown."""
        async with reading(self._engine) as connection:
            return await _find(connection, name)

    async def change(self, name: str, *, plan: str | None = None, suspended: bool | None = None) -> Tenant:
        """Put the tenant (name or id) on another plan, suspend it or let it go on; None leaves as it is.

        Raises:
            ObjectUnknown: no such tenant, no such plan.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            tenant = await _find(connection, name)
            values: dict[str, str | int | None] = {}
            if plan is not None:
                await require_plan(connection, plan)
                values["plan"] = plan
            if suspended is not None:
                values["suspended_at"] = (tenant.suspended_at or int(time.time())) if suspended else None
            if values:
                await connection.execute(update(tenants).where(tenants.c.id == tenant.id).values(**values))
                await record_change(connection, TENANT_CHANGE, tenant.id, tenant.name)
            return await _find(connection, tenant.id)


def check_name(name: str, whose: str) -> None:
    """Raises RequestInvalid for what is no name of a tenant or a plan."""
    if not NAME.fullmatch(name):
        raise RequestInvalid(
            f"{whose} name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit.", param="name"
        )


async def _find(connection: AsyncConnection, name: str) -> Tenant:
    """An id is looked for first: nobody takes it over with a tenant that is named like it."""
    for column in (tenants.c.id, tenants.c.name):
        row = (await connection.execute(select(tenants).where(column == name))).first()
        if row is not None:
            return _tenant_of(row)
    raise ObjectUnknown(f"There is no tenant '{name[:64]}'.", param="tenant")


def _tenant_of(row: Row[tuple[object, ...]]) -> Tenant:
    return Tenant(TenantId(row.id), row.name, row.created_at, row.plan, row.suspended_at)
