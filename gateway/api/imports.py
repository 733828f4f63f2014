"""`/admin/v1/tenants/{tenant}/adapters/{name}/import`: an operator publishes for a tenant."""

from typing import Annotated

from pydantic import BaseModel, Field

from adapter_store.catalog import Provenance
from gateway.api.adapters import PublishedVersion, published_version
from gateway.api.lazy import LazyRouter
from gateway.api.publishing import current
from gateway.dependencies import AppParts, Operator
from gateway.errors import RequestInvalid

router = LazyRouter(prefix="/admin/v1/tenants/{tenant}/adapters", tags=["admin"])

Place = Annotated[str, Field(min_length=1, max_length=1_024)]


class NewImport(BaseModel, extra="forbid"):
    """One of the two: a folder below the import root, or a prefix below `imports/` in the blob store."""

    folder: Place | None = None
    blobs: Place | None = None


@router.post("/{name}/import", status_code=201)
async def import_adapter(
    tenant: str, name: str, body: NewImport, operator: Operator, parts: AppParts
) -> PublishedVersion:
    """Publish an adapter that lies on the server or in the blob store; checked as an upload is, within its plan."""
    if (body.folder is None) == (body.blobs is None):
        raise RequestInvalid("Name either a folder or blobs.", param="folder")
    parts.store.check_name(name)
    owner = await parts.tenants.named(tenant)
    plan = await parts.plans.named(owner.plan)
    async with parts.staging.stage() as bundle:
        if body.folder is not None:
            await parts.imports.from_folder(body.folder, bundle)
        elif body.blobs is not None:
            await parts.imports.from_blobs(body.blobs, bundle)
        old = await current(parts, owner.id, name)
        version = await parts.store.publish(
            owner.id, name, bundle, provenance=Provenance.IMPORT, published_by=operator.id, quota=plan.quota
        )
    parts.models.forget_tenant(owner.id)
    parts.pool.replace(old, version, plan)
    return published_version(version, parts, await parts.proofs.statuses([version.id]))
