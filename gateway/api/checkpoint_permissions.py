"""`/v1/fine_tuning/checkpoints/{checkpoint}/permissions`: who else may ask a fine-tuned model.

As OpenAI has it, with a tenant for a project. The owner's administrators decide; a project that does not exist is taken
like any other, so that nobody learns from it which tenants there are.
"""

import time
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, Field

from adapter_store import grants
from adapter_store.catalog import Version
from adapter_store.changes import take_turn
from adapter_store.grants import Grant
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.api.lazy import LazyRouter
from gateway.api.publishing import as_response, once
from gateway.dependencies import AppParts, KeyAdmin, Parts
from gateway.errors import ModelUnknown
from gateway.idempotency import Kept, Repeated, fingerprint

router = LazyRouter(prefix="/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions", tags=["fine-tuning"])
ProjectId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class PermissionsAsked(BaseModel, extra="forbid"):
    """Ids of tenants."""

    project_ids: Annotated[list[ProjectId], Field(min_length=1, max_length=100)]


class PermissionObject(BaseModel):
    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str


class PermissionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PermissionObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PermissionDeleted(BaseModel):
    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    deleted: Literal[True] = True


@router.post("", response_model=PermissionList)
async def allow(
    checkpoint: str, body: PermissionsAsked, request: Request, asker: KeyAdmin, parts: AppParts
) -> Response:
    """Let other tenants ask this model by its fine-tuned name, with their own keys, limits and bills."""
    version = await _own(checkpoint, asker.tenant_id, parts)
    repeat = once(request, parts, asker.tenant_id)
    asked = fingerprint("allow", version.id, *body.project_ids)
    projects = [TenantId(project) for project in body.project_ids]
    try:
        async with writing(parts.engine) as connection:
            await take_turn(connection)
            await repeat.check_in(connection, asked)
            made = await grants.allow(connection, version, projects, by=asker.key.id, now=time.time())
            answer = Kept(asked, 200, "", _list(made, has_more=False).model_dump_json())
            await repeat.keep(connection, answer)
    except Repeated as repeated:
        return as_response(repeated.kept)
    return as_response(answer)


@router.get("")
async def list_permissions(
    checkpoint: str,
    asker: KeyAdmin,
    parts: AppParts,
    after: Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")] = None,
) -> PermissionList:
    """Who may ask it, the newest first unless `order` says otherwise."""
    version = await _own(checkpoint, asker.tenant_id, parts)
    async with reading(parts.engine) as connection:
        found = await grants.page(
            connection,
            version,
            after=after,
            limit=limit + 1,
            newest_first=order == "descending",
            granted_to=project_id,
        )
    return _list(found[:limit], has_more=len(found) > limit)


@router.delete("/{permission_id}")
async def take_back(checkpoint: str, permission_id: str, asker: KeyAdmin, parts: AppParts) -> PermissionDeleted:
    """Take a permission back: at once here, within a second everywhere; requests that have begun end."""
    version = await _own(checkpoint, asker.tenant_id, parts)
    async with writing(parts.engine) as connection:
        await take_turn(connection)
        gone = await grants.take_back(connection, version, permission_id)
    parts.models.forget_tenant(gone.granted_to)
    return PermissionDeleted(id=gone.id)


async def _own(model: str, tenant_id: TenantId, parts: Parts) -> Version:
    """A version of the tenant's own, by a name that never stands for another. Raises ModelUnknown, OtherBaseModel."""
    if model.startswith("ft:"):
        found = await parts.models.resolve(tenant_id, model)
        if isinstance(found, Version) and found.tenant_id == tenant_id:
            return found
    raise ModelUnknown(model, param="fine_tuned_model_checkpoint")


def _list(found: list[Grant], *, has_more: bool) -> PermissionList:
    data = [PermissionObject(id=grant.id, created_at=grant.created_at, project_id=grant.granted_to) for grant in found]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return PermissionList(data=data, first_id=first, last_id=last, has_more=has_more)
