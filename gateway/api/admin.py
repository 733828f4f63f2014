"""`/admin/v1`: tenants and keys, for operators."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from gateway.dependencies import AppParts, Operator
from gateway.errors import RequestInvalid
from gateway.tenants import TENANT_SCOPES, ApiKey, Scope, Tenant

router = APIRouter(prefix="/admin/v1", tags=["admin"])


class NewTenant(BaseModel, extra="forbid"):
    name: str


class TenantObject(BaseModel):
    """`created_at` in Unix seconds."""

    id: str
    object: str = "tenant"
    name: str
    created_at: int


class TenantList(BaseModel):
    object: str = "list"
    data: list[TenantObject]


class NewKey(BaseModel, extra="forbid"):
    """`scopes` default to all that a tenant's key can have; `expires_at` in Unix seconds."""

    label: Annotated[str, Field(max_length=128)] = ""
    scopes: Annotated[list[Scope], Field(min_length=1)] = sorted(TENANT_SCOPES)
    expires_at: Annotated[int, Field(gt=0, le=253_402_300_799)] | None = None


class KeyObject(BaseModel):
    """A key without its secret; times in Unix seconds."""

    id: str
    object: str = "api_key"
    tenant_id: str | None
    prefix: str
    scopes: list[str]
    label: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class KeyWithSecret(KeyObject):
    """The answer to a creation: the only time that `secret` is shown."""

    secret: str


class KeyList(BaseModel):
    object: str = "list"
    data: list[KeyObject]


@router.post("/tenants", status_code=201)
async def create_tenant(body: NewTenant, _: Operator, parts: AppParts) -> TenantObject:
    """A new tenant, without a key."""
    return _tenant(await parts.tenants.create(body.name))


@router.get("/tenants")
async def list_tenants(_: Operator, parts: AppParts) -> TenantList:
    """Every tenant, by name."""
    return TenantList(data=[_tenant(tenant) for tenant in await parts.tenants.all()])


@router.post("/tenants/{tenant}/keys", status_code=201)
async def create_key(tenant: str, body: NewKey, operator: Operator, parts: AppParts) -> KeyWithSecret:
    """A new key of a tenant (name or id); an operator's key cannot be made here."""
    if Scope.OPERATOR in body.scopes:
        raise RequestInvalid("A tenant's key cannot have the scope 'operator'.", param="scopes")
    owner = await parts.tenants.named(tenant)
    key, secret = await parts.tenants.create_key(owner.id, body.scopes, label=body.label, expires_at=body.expires_at)
    return KeyWithSecret(**_key(key).model_dump(), secret=secret)


@router.get("/tenants/{tenant}/keys")
async def list_keys(tenant: str, _: Operator, parts: AppParts) -> KeyList:
    """A tenant's keys, revoked ones too, the oldest first."""
    owner = await parts.tenants.named(tenant)
    return KeyList(data=[_key(key) for key in await parts.tenants.keys(owner.id)])


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(key_id: str, _: Operator, parts: AppParts) -> None:
    """Revoke for good: at once here, within a second on every other gateway."""
    parts.auth.forget(await parts.tenants.revoke_key(key_id))


def _tenant(tenant: Tenant) -> TenantObject:
    return TenantObject(id=tenant.id, name=tenant.name, created_at=tenant.created_at)


def _key(key: ApiKey) -> KeyObject:
    return KeyObject(
        id=key.id,
        tenant_id=key.tenant_id,
        prefix=key.prefix,
        scopes=sorted(key.scopes),
        label=key.label,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
    )
