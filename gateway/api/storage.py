"""`/admin/v1/storage`: what is wrong with stored adapters, for operators."""

from fastapi import APIRouter
from pydantic import BaseModel

from adapter_store.scrub import FaultyBlob
from gateway.dependencies import AppParts, Operator

router = APIRouter(prefix="/admin/v1/storage", tags=["storage"])


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
