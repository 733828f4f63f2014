"""What each tenant keeps, for operators: adapters and training files, counts and bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Select, func, literal, select

from adapter_store.catalog import adapters, versions
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.ids import TenantId
from adapter_store.transactions import reading
from adapter_store.uploads import uploads
from gateway.tenants import Tenant
from training.files import file_uploads, files

NOTHING: Final = (0, 0)


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes as each adapter and file counts against the plan; what several share is on disk once.

    `uploads`: under way, with the bytes that they have declared.
    """

    tenant: Tenant
    adapters: int
    versions: int
    adapter_bytes: int
    files: int
    file_bytes: int
    uploads: int
    upload_bytes: int


async def stored_by(engine: AsyncEngine, tenants: Sequence[Tenant]) -> list[Stored]:
    """In the order of `tenants`. Raises StorageUnavailable."""
    ids = [tenant.id for tenant in tenants]
    of_versions = func.sum(versions.c.config_bytes + versions.c.weights_bytes)
    of_uploads = func.sum(uploads.c.config_bytes + uploads.c.weights_bytes)
    async with reading(engine) as connection:
        names = await _by_tenant(connection, select(adapters.c.tenant_id, func.count(), literal(0)), adapters, ids)
        kept = await _by_tenant(connection, select(versions.c.tenant_id, func.count(), of_versions), versions, ids)
        data = await _by_tenant(
            connection, select(files.c.tenant_id, func.count(), func.sum(files.c.bytes)), files, ids
        )
        open_uploads = select(uploads.c.tenant_id, func.count(), of_uploads).where(uploads.c.answer.is_(None))
        coming = await _by_tenant(connection, open_uploads, uploads, ids)
        open_files = select(file_uploads.c.tenant_id, func.count(), func.sum(file_uploads.c.bytes))
        open_files = open_files.where(file_uploads.c.status == "pending")
        more = await _by_tenant(connection, open_files, file_uploads, ids)
    return [
        Stored(
            tenant,
            names.get(tenant.id, NOTHING)[0],
            *kept.get(tenant.id, NOTHING),
            *data.get(tenant.id, NOTHING),
            *(a + b for a, b in zip(coming.get(tenant.id, NOTHING), more.get(tenant.id, NOTHING), strict=True)),
        )
        for tenant in tenants
    ]


async def _by_tenant(
    connection: AsyncConnection, statement: Select[Any], table: Any, ids: Sequence[TenantId]
) -> Mapping[str, tuple[int, int]]:
    """Tenant → count and bytes."""
    found = await connection.execute(statement.where(table.c.tenant_id.in_(ids)).group_by(table.c.tenant_id))
    return {tenant_id: (int(count), int(size_bytes)) for tenant_id, count, size_bytes in found}
