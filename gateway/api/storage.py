"""`/admin/v1/storage`: what is stored, whose it is, and what is wrong with it, for operators."""

from pydantic import BaseModel

from adapter_store.scrub import FaultyBlob
from gateway.api.keys import After, Limit
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator
from gateway.stored import Stored, stored_by

router = LazyRouter(prefix="/admin/v1/storage", tags=["storage"])


class FaultObject(BaseModel):
    """`fault`: `corrupt` or `missing`; `versions`: what cannot be loaded. Times in Unix seconds."""

    object: str = "blob_fault"
    tenant_id: str
    sha256: str
    fault: str
    found_at: int
    versions: list[str]


class FaultList(BaseModel):
    object: str = "list"
    data: list[FaultObject]


class StoredObject(BaseModel):
    """What a tenant keeps, as it counts against its plan; `uploads` are under way, `upload_bytes` what they declare."""

    object: str = "tenant_storage"
    tenant_id: str
    tenant: str
    adapters: int
    versions: int
    adapter_bytes: int
    files: int
    file_bytes: int
    uploads: int
    upload_bytes: int


class StoredList(BaseModel):
    """A page; `has_more` says whether `?after=<the last tenant's name>` has another."""

    object: str = "list"
    data: list[StoredObject]
    has_more: bool


@router.get("/tenants")
async def list_stored(_: Operator, parts: AppParts, after: After = None, limit: Limit = 100) -> StoredList:
    """What each tenant keeps, by its name."""
    page = await parts.tenants.page(after, limit + 1)
    found = await stored_by(parts.engine, page[:limit])
    return StoredList(data=[_stored(stored) for stored in found], has_more=len(page) > limit)


def _stored(stored: Stored) -> StoredObject:
    return StoredObject(
        tenant_id=stored.tenant.id,
        tenant=stored.tenant.name,
        adapters=stored.adapters,
        versions=stored.versions,
        adapter_bytes=stored.adapter_bytes,
        files=stored.files,
        file_bytes=stored.file_bytes,
        uploads=stored.uploads,
        upload_bytes=stored.upload_bytes,
    )


@router.get("/faults")
async def list_faults(_: Operator, parts: AppParts) -> FaultList:
    """Stored files that are damaged or gone, as the scrubber last saw them; at most 1,000."""
    return FaultList(data=[_object(found) for found in await parts.scrubber.faulty()])


def _object(found: FaultyBlob) -> FaultObject:
    return FaultObject(
        tenant_id=found.tenant_id,
        sha256=found.sha256,
        fault=found.fault,
        found_at=found.found_at,
        versions=list(found.versions),
    )
