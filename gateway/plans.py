"""Plans: what a tenant may use, and what share of a busy server is its own."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.quota import Quota
from adapter_store.transactions import reading, writing
from gateway.database import plans, tenants
from gateway.errors import NameTaken, ObjectUnknown, PlanInUse
from training.files import FileQuota

DEFAULT: Final = "default"
PLAN_CHANGE: Final = "plan"


@dataclass(frozen=True, slots=True)
class Plan:
    """Limits of every tenant on it; None is no limit. `weight` is its share of a busy server beside others'.

    `pinned_adapters` is how many adapters a tenant may keep loaded itself.
    """

    name: str = DEFAULT
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    max_output_tokens: int | None = None
    max_prompt_bytes: int | None = None
    tokens_per_month: int | None = None
    loads_per_minute: int | None = None
    pinned_adapters: int = 0
    max_adapters: int | None = None
    max_versions: int | None = None
    max_stored_bytes: int | None = None
    max_rank: int | None = None
    max_files: int | None = None
    max_stored_file_bytes: int | None = None
    max_queued_jobs: int | None = None
    max_running_jobs: int | None = None

    @property
    def quota(self) -> Quota:
        """What the store is to hold the tenant to."""
        return Quota(self.max_adapters, self.max_versions, self.max_stored_bytes, self.max_rank)

    @property
    def file_quota(self) -> FileQuota:
        """What the tenant's training files are held to."""
        return FileQuota(self.max_files, self.max_stored_file_bytes)


COLUMNS: Final = tuple(plans.c[field.name].label(f"plan_{field.name}") for field in fields(Plan))
"""What `plan_of` reads of a row."""


@lru_cache(maxsize=1024)
def _shared(*values: Any) -> Plan:
    """One instance for all keys and tenants that are on it."""
    return Plan(*values)


def plan_of(row: RowMapping) -> Plan:
    """The plan in a row that was selected with `COLUMNS`."""
    return _shared(*(row[column.name] for column in COLUMNS))


class Plans:
    """The plans in the database; every change is put into the change feed in the same transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(self, plan: Plan) -> Plan:
        """A new plan. Raises NameTaken."""
        row = {field.name: getattr(plan, field.name) for field in fields(Plan)}
        try:
            async with writing(self._engine) as connection:
                await connection.execute(insert(plans).values(**row, created_at=int(time.time())))
        except IntegrityError:
            raise NameTaken(f"A plan named '{plan.name}' exists.", param="name") from None
        return plan

    async def all(self) -> list[Plan]:
        """By name."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(select(*COLUMNS).order_by(plans.c.name))
            return [plan_of(row) for row in rows.mappings()]

    async def named(self, name: str) -> Plan:
        """The plan of that name. Raises ObjectUnknown."""
        async with reading(self._engine) as connection:
            return await _find(connection, name)

    async def change(self, name: str, values: Mapping[str, float | int | None]) -> Plan:
        """Set some of its fields; the plan as it is then. Raises ObjectUnknown."""
        async with writing(self._engine) as connection:
            await record_change(connection, PLAN_CHANGE, None, name)
            await _find(connection, name)
            if values:
                await connection.execute(update(plans).where(plans.c.name == name).values(**values))
            return await _find(connection, name)

    async def delete(self, name: str) -> None:
        """Remove a plan that nobody is on. Raises ObjectUnknown, PlanInUse."""
        if name == DEFAULT:
            raise PlanInUse("The plan 'default' is where new tenants begin: change it instead of deleting it.")
        async with writing(self._engine) as connection:
            await take_turn(connection)  # so that no tenant is put on it meanwhile
            await _find(connection, name)
            query = select(func.count()).select_from(tenants).where(tenants.c.plan == name)
            users = (await connection.execute(query)).scalar_one()
            if users:
                raise PlanInUse(f"{users} tenants are on the plan '{name}': move them to another one first.")
            await connection.execute(delete(plans).where(plans.c.name == name))


async def require_plan(connection: AsyncConnection, name: str) -> None:
    """Raises ObjectUnknown. The caller holds the writers' turn, so that the plan cannot go meanwhile."""
    await _find(connection, name)


async def _find(connection: AsyncConnection, name: str) -> Plan:
    row = (await connection.execute(select(*COLUMNS).where(plans.c.name == name))).mappings().first()
    if row is None:
        raise ObjectUnknown(f"There is no plan '{name[:64]}'.", param="plan")
    return plan_of(row)
