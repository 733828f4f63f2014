"""`/admin/v1`: plans, tenants and keys, for operators."""

from dataclasses import asdict
from typing import Annotated

from pydantic import BaseModel, Field

from gateway.api.keys import (
    KEPT_FOR_EVER,
    After,
    KeyList,
    KeyWithSecret,
    Label,
    Limit,
    NewKey,
    NewRotation,
    key_list,
    rotated,
    tenant_scopes,
    with_secret,
)
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator
from gateway.errors import RequestInvalid
from gateway.keys import ANYONE
from gateway.plans import DEFAULT, Plan
from gateway.tenants import Scope, Tenant, check_name

router = LazyRouter(prefix="/admin/v1", tags=["admin"])

Weight = Annotated[float, Field(ge=0.01, le=1_000, allow_inf_nan=False)]
Bound = Annotated[int, Field(ge=1, le=10**15)]
PlanName = Annotated[str, Field(max_length=64, pattern="^[^\\x00]*$")]  # PostgreSQL's texts hold no NUL


class NewTenant(BaseModel, extra="forbid"):
    name: str
    plan: PlanName = DEFAULT


class TenantChange(BaseModel, extra="forbid"):
    """What is left out stays as it is."""

    plan: PlanName | None = None
    suspended: bool | None = None


class TenantObject(BaseModel):
    """Times in Unix seconds; while `suspended_at` is set none of the tenant's keys is good."""

    id: str
    object: str = "tenant"
    name: str
    plan: str
    created_at: int
    suspended_at: int | None


class TenantList(BaseModel):
    """A page; `has_more` says whether `?after=<the last name>` has another."""

    object: str = "list"
    data: list[TenantObject]
    has_more: bool


class PlanLimits(BaseModel, extra="forbid"):
    """Limits of each tenant on the plan; null is no limit."""

    requests_per_minute: Bound | None = None
    tokens_per_minute: Bound | None = None
    concurrent_requests: Bound | None = None
    max_output_tokens: Bound | None = None
    max_prompt_bytes: Bound | None = None
    tokens_per_month: Bound | None = None
    loads_per_minute: Bound | None = None
    pinned_adapters: Annotated[int, Field(ge=0, le=65_536)] = 0
    max_adapters: Bound | None = None
    max_versions: Bound | None = None
    max_stored_bytes: Bound | None = None
    max_rank: Bound | None = None
    max_files: Bound | None = None
    max_stored_file_bytes: Bound | None = None
    max_queued_jobs: Bound | None = None
    max_running_jobs: Bound | None = None


class NewPlan(PlanLimits):
    """`weight` is a tenant's share of a busy server, beside others'."""

    name: str
    weight: Weight = 1.0


class PlanChange(PlanLimits):
    """What is left out stays as it is; null takes a limit away."""

    weight: Weight | None = None


class PlanObject(PlanLimits):
    object: str = "plan"
    name: str
    weight: float


class PlanList(BaseModel):
    object: str = "list"
    data: list[PlanObject]


class NewOperatorKey(BaseModel, extra="forbid"):
    """`expires_at` in Unix seconds, by default the maker's own."""

    label: Label = ""
    expires_at: Annotated[int, Field(gt=0, le=KEPT_FOR_EVER)] | None = None


# plans


@router.post("/plans", status_code=201)
async def create_plan(body: NewPlan, _: Operator, parts: AppParts) -> PlanObject:
    """A new plan."""
    check_name(body.name, "A plan's")
    return _plan(await parts.plans.create(Plan(**body.model_dump())))


@router.get("/plans")
async def list_plans(_: Operator, parts: AppParts) -> PlanList:
    """Every plan, by name."""
    return PlanList(data=[_plan(plan) for plan in await parts.plans.all()])


@router.get("/plans/{plan}")
async def show_plan(plan: str, _: Operator, parts: AppParts) -> PlanObject:
    """One plan."""
    return _plan(await parts.plans.named(plan))


@router.patch("/plans/{plan}")
async def change_plan(plan: str, body: PlanChange, _: Operator, parts: AppParts) -> PlanObject:
    """Change a plan for all tenants on it: at once here, within a second on every other gateway."""
    values = body.model_dump(exclude_unset=True)
    if values.get("weight", 1.0) is None:
        raise RequestInvalid("A plan always has a weight.", param="weight")
    changed = await parts.plans.change(plan, values)
    parts.auth.forget_plan(plan)
    return _plan(changed)


@router.delete("/plans/{plan}", status_code=204)
async def delete_plan(plan: str, _: Operator, parts: AppParts) -> None:
    """Delete a plan that no tenant is on."""
    await parts.plans.delete(plan)


# tenants


@router.post("/tenants", status_code=201)
async def create_tenant(body: NewTenant, _: Operator, parts: AppParts) -> TenantObject:
    """A new tenant, without a key."""
    return _tenant(await parts.tenants.create(body.name, body.plan))


@router.get("/tenants")
async def list_tenants(_: Operator, parts: AppParts, after: After = None, limit: Limit = 100) -> TenantList:
    """The tenants by name, a page at a time."""
    page = await parts.tenants.page(after, limit + 1)
    return TenantList(data=[_tenant(tenant) for tenant in page[:limit]], has_more=len(page) > limit)


@router.get("/tenants/{tenant}")
async def show_tenant(tenant: str, _: Operator, parts: AppParts) -> TenantObject:
    """One tenant (name or id)."""
    return _tenant(await parts.tenants.named(tenant))


@router.patch("/tenants/{tenant}")
async def change_tenant(tenant: str, body: TenantChange, _: Operator, parts: AppParts) -> TenantObject:
    """Put a tenant on another plan, suspend it or let it go on: at once here, within a second elsewhere."""
    changed = await parts.tenants.change(tenant, plan=body.plan, suspended=body.suspended)
    parts.auth.forget_tenant(changed.id)
    return _tenant(changed)


@router.post("/tenants/{tenant}/keys", status_code=201)
async def create_key(tenant: str, body: NewKey, operator: Operator, parts: AppParts) -> KeyWithSecret:
    """A new key of a tenant (name or id); an operator's key cannot be made here."""
    scopes = tenant_scopes(body, operator)
    owner = await parts.tenants.named(tenant)
    made, secret = await parts.keys.create(
        owner.id, scopes, maker=operator, label=body.label, expires_at=body.expires_at
    )
    return with_secret(made, secret, parts)


@router.get("/tenants/{tenant}/keys")
async def list_keys(tenant: str, _: Operator, parts: AppParts, after: After = None, limit: Limit = 100) -> KeyList:
    """A tenant's keys, revoked ones too, the oldest first."""
    owner = await parts.tenants.named(tenant)
    return key_list(await parts.keys.page(owner.id, after, limit + 1), limit)


# keys


@router.post("/keys", status_code=201)
async def create_operator_key(body: NewOperatorKey, operator: Operator, parts: AppParts) -> KeyWithSecret:
    """Another operator's key."""
    made, secret = await parts.keys.create(
        None, [Scope.OPERATOR], maker=operator, label=body.label, expires_at=body.expires_at
    )
    return with_secret(made, secret, parts)


@router.get("/keys")
async def list_operator_keys(_: Operator, parts: AppParts, after: After = None, limit: Limit = 100) -> KeyList:
    """Operators' keys, revoked ones too, the oldest first."""
    return key_list(await parts.keys.page(None, after, limit + 1), limit)


@router.post("/keys/{key_id}/rotate", status_code=201)
async def rotate_key(key_id: str, body: NewRotation, operator: Operator, parts: AppParts) -> KeyWithSecret:
    """A successor of any key, with the same tenant, scopes, label and end; the old one goes on for `overlap_s`."""
    rotation = await parts.keys.rotate(ANYONE, key_id, maker=operator, overlap_s=body.overlap_s)
    return rotated(rotation, parts)


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(key_id: str, _: Operator, parts: AppParts) -> None:
    """Revoke any key for good: at once here, within a second on every other gateway."""
    parts.auth.forget((await parts.keys.revoke(ANYONE, key_id)).sha256)


def _tenant(tenant: Tenant) -> TenantObject:
    return TenantObject(**asdict(tenant))


def _plan(plan: Plan) -> PlanObject:
    return PlanObject(**asdict(plan))
