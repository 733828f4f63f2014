"""`/admin/v1/quarantine`: adapters that are held back, for operators."""

from pydantic import BaseModel

from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator
from gateway.quarantine import Held

router = LazyRouter(prefix="/admin/v1/quarantine", tags=["quarantine"])


class HeldObject(BaseModel):
    """`reason`: `corrupted` or `engine_died`; `until` null: until it is lifted. Times in Unix seconds."""

    id: str
    object: str = "quarantine"
    tenant_id: str
    digest: str
    reason: str
    replica: str
    strikes: int
    at: int
    until: int | None


class HeldList(BaseModel):
    object: str = "list"
    data: list[HeldObject]


@router.get("")
async def list_held(_: Operator, parts: AppParts) -> HeldList:
    """Every adapter that is held back now, the latest first."""
    return HeldList(data=[_object(row) for row in parts.quarantine.held()])


@router.delete("/{held_id}", status_code=204)
async def lift(held_id: str, _: Operator, parts: AppParts) -> None:
    """Let it be loaded again: at once here, within a second at every gateway."""
    await parts.quarantine.lift(held_id)


def _object(row: Held) -> HeldObject:
    return HeldObject(
        id=row.id,
        tenant_id=row.tenant_id,
        digest=row.digest,
        reason=row.reason,
        replica=row.replica,
        strikes=row.strikes,
        at=row.at,
        until=row.until,
    )
