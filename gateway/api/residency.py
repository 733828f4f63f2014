"""`/v1/adapters/{name}/…`: where a tenant's adapter is, loading it ahead of requests, keeping it loaded."""

from typing import Annotated

from fastapi import Response
from pydantic import BaseModel, Field

from adapter_store.aliases import main_of
from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterKey, AdapterTenant, AppParts, Operator, Parts
from gateway.pins import OPERATOR, TENANT, Pin

router = LazyRouter(tags=["residency"])
MOST_SHOWN = 100
Number = Annotated[int, Field(ge=1, le=999_999_999)]


class Warm(BaseModel, extra="forbid"):
    """`version`: its number, by default the one that the name stands for; `everywhere`: in every replica.

    `wait_s`: how long the answer may take.
    """

    version: Number | None = None
    everywhere: bool = False
    wait_s: Annotated[float, Field(ge=0, le=60)] = 10


class Where(BaseModel):
    """`tier`: `gpu` or `host`: loaded; `disk`: its files are there; `loading`; `failed`."""

    replica: str
    tier: str


class WarmObject(BaseModel):
    object: str = "adapter.warm"
    name: str
    version: int
    replicas: list[Where]


class VersionTiers(BaseModel):
    """A replica that is not named has nothing of the version: it is in the blob store."""

    version: int
    digest: str
    pinned: bool
    replicas: list[Where]


class TierList(BaseModel):
    object: str = "list"
    data: list[VersionTiers]


class PinObject(BaseModel):
    """`pinned_by`: `tenant` or `operator`; `at` in Unix seconds."""

    object: str = "pin"
    tenant_id: str
    name: str
    pinned_by: str
    at: int


class PinList(BaseModel):
    object: str = "list"
    data: list[PinObject]


@router.post("/v1/adapters/{name}/warm", responses={202: {"model": WarmObject}})
async def warm(name: str, body: Warm, response: Response, tenant: AdapterKey, parts: AppParts) -> WarmObject:
    """Load a version before the first request asks for it: 200 when it is loaded, 202 while that goes on.

    Each load counts among the plan's `loads_per_minute`.
    """
    version = await _version(parts, tenant.tenant_id, name, body.version)
    tiers = await parts.pool.warm(version, tenant.key.plan, everywhere=body.everywhere, within_s=body.wait_s)
    if not set(tiers.values()) <= {"gpu", "host"}:
        response.status_code = 202
    return WarmObject(name=name, version=version.number, replicas=_where(tiers))


@router.get("/v1/adapters/{name}/residency")
async def residency(name: str, tenant_id: AdapterTenant, parts: AppParts) -> TierList:
    """Where the newest versions of an adapter are: on which replica's device, in its memory, on its disk."""
    _, versions = await parts.store.show(tenant_id, name)
    shown = versions[:MOST_SHOWN]
    tiers = await parts.pool.tiers(tenant_id, [version.digest for version in shown])
    return TierList(
        data=[
            VersionTiers(
                version=version.number,
                digest=version.digest,
                pinned=parts.pool.is_pinned((tenant_id, version.digest)),
                replicas=_where(tiers[version.digest]),
            )
            for version in shown
        ]
    )


@router.put("/v1/adapters/{name}/pin")
async def pin(name: str, tenant: AdapterKey, parts: AppParts) -> PinObject:
    """Keep the adapter loaded, whichever version its name stands for; the plan says how many may be."""
    return _pin(await parts.pins.pin(tenant.tenant_id, name, by=TENANT, most=tenant.key.plan.pinned_adapters))


@router.delete("/v1/adapters/{name}/pin", status_code=204)
async def unpin(name: str, tenant: AdapterKey, parts: AppParts) -> None:
    """Let it go when room is needed."""
    await parts.pins.unpin(tenant.tenant_id, name, by=TENANT)


@router.get("/admin/v1/pins")
async def list_pins(_: Operator, parts: AppParts) -> PinList:
    """Every adapter that stays loaded."""
    return PinList(data=[_pin(row) for row in await parts.pins.all()])


@router.put("/admin/v1/tenants/{tenant}/pins/{adapter}")
async def pin_for_tenant(tenant: str, adapter: str, _: Operator, parts: AppParts) -> PinObject:
    """Keep a tenant's adapter loaded, beyond what its plan lets it pin."""
    owner = await parts.tenants.named(tenant)
    return _pin(await parts.pins.pin(owner.id, adapter, by=OPERATOR))


@router.delete("/admin/v1/tenants/{tenant}/pins/{adapter}", status_code=204)
async def unpin_for_tenant(tenant: str, adapter: str, _: Operator, parts: AppParts) -> None:
    """Take a pin away, whoever has set it."""
    owner = await parts.tenants.named(tenant)
    await parts.pins.unpin(owner.id, adapter, by=OPERATOR)


async def _version(parts: Parts, tenant_id: TenantId, name: str, number: int | None) -> Version:
    await parts.store.show(tenant_id, name)
    return main_of(await parts.store.resolve(tenant_id, name if number is None else f"{name}@{number}"))


def _where(tiers: dict[str, str]) -> list[Where]:
    return [Where(replica=replica, tier=tier) for replica, tier in sorted(tiers.items())]


def _pin(row: Pin) -> PinObject:
    return PinObject(tenant_id=row.tenant_id, name=row.adapter, pinned_by=row.pinned_by, at=row.at)
