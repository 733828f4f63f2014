"""`/v1/adapters`: a tenant publishes, lists, shows and deletes its own adapters."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from adapter_store.aliases import main_of
from adapter_store.catalog import DEFAULT_ALIAS, Adapter, Fallback, Version
from adapter_store.errors import AdapterNotFound, OtherBaseModel
from adapter_store.ids import TenantId, VersionId
from adapter_store.proofs import UNKNOWN, Proof
from gateway.api.multipart import UploadForm
from gateway.api.proofs import ProofObject, proof_object
from gateway.dependencies import AdapterKey, AdapterTenant, AppParts, Parts, publisher
from gateway.errors import RequestInvalid

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


class QuarantineObject(BaseModel):
    """Why a version is held back: an engine computed NaN with it (`corrupted`), or `engine_died`.

    `until` null: until an operator lifts it.
    """

    reason: str
    at: int
    until: int | None


class VersionObject(BaseModel):
    """One immutable version; `digest` is SHA-256 over its two files, `created_at` in Unix seconds.

    While `quarantine` is not null no engine may have it.
    `model` and `fine_tuned_model` are two ways to ask for just this one.
    """

    number: int
    model: str
    fine_tuned_model: str
    digest: str
    bytes: int
    rank: int
    modules: list[str]
    created_at: int
    quarantine: QuarantineObject | None
    proof: ProofObject


class AdapterObject(BaseModel):
    """An adapter; `current` is the version that its name stands for, `fallback` who answers where that one cannot."""

    id: str
    object: str = "adapter"
    name: str
    created_at: int
    fallback: Fallback
    current: VersionObject


class AdapterChange(BaseModel, extra="forbid"):
    """Who answers where the current version cannot: nobody, the base model, or the version before it."""

    fallback: Fallback


class AdapterWithVersions(AdapterObject):
    versions: list[VersionObject]


class AdapterList(BaseModel):
    """A page; `has_more` says whether `?after=<the last name>` has another."""

    object: str = "list"
    data: list[AdapterObject]
    has_more: bool


@router.post("", status_code=201)
async def publish(request: Request, response: Response, caller: AdapterKey, parts: AppParts) -> AdapterObject:
    """Publish a version: multipart with `name`, `adapter_config.json` and `adapter_model.safetensors`.

    The adapter's name stands for the new version from the answer on. The same bytes again are the same version.
    """
    tenant_id = caller.tenant_id
    async with parts.staging.stage() as bundle:
        form = UploadForm(request, bundle)
        await form.receive()
        if "name" not in form.fields:
            raise RequestInvalid("The field name is missing: it is what requests will call the adapter.", param="name")
        await publisher(request, parts)  # an upload may take long: the key may be revoked by now
        old = await _current(tenant_id, form.fields["name"], parts)
        version = await parts.store.publish(tenant_id, form.fields["name"], bundle)
    parts.models.forget_tenant(tenant_id)
    parts.pool.replace(old, version, caller.key.plan)
    response.headers["location"] = f"/v1/adapters/{version.adapter_name}"
    adapter, _ = await parts.store.show(tenant_id, version.adapter_name)
    return _adapter(adapter, parts, await _proofs(parts, [adapter.default]))


@router.get("")
async def list_adapters(
    tenant_id: AdapterTenant,
    parts: AppParts,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> AdapterList:
    """The tenant's adapters by name, a page at a time."""
    page = await parts.store.list(tenant_id, after=after, limit=limit + 1)
    found = await _proofs(parts, [adapter.default for adapter in page[:limit]])
    return AdapterList(data=[_adapter(adapter, parts, found) for adapter in page[:limit]], has_more=len(page) > limit)


@router.get("/{name}")
async def show(name: str, tenant_id: AdapterTenant, parts: AppParts) -> AdapterWithVersions:
    """One adapter with all its versions."""
    adapter, versions = await parts.store.show(tenant_id, name)
    found = await _proofs(parts, versions)
    shown = [_version(version, parts, found) for version in versions]
    return AdapterWithVersions(**_adapter(adapter, parts, found).model_dump(), versions=shown)


@router.patch("/{name}")
async def change(name: str, body: AdapterChange, tenant_id: AdapterTenant, parts: AppParts) -> AdapterObject:
    """Declare a fallback; answers that come by it are flagged."""
    await parts.aliases.set_fallback(tenant_id, name, DEFAULT_ALIAS, body.fallback)
    parts.models.forget_tenant(tenant_id)
    adapter, _ = await parts.store.show(tenant_id, name)
    return _adapter(adapter, parts, await _proofs(parts, [adapter.default]))


@router.delete("/{name}", status_code=204)
async def delete(name: str, tenant_id: AdapterTenant, parts: AppParts) -> None:
    """Delete an adapter with all its versions: rows, files, and its place in every engine."""
    deleted = await parts.store.delete(tenant_id, name)
    parts.models.forget_tenant(tenant_id)
    await parts.pins.forget(tenant_id, name)
    await parts.pool.unload(tenant_id, [version.digest for version in deleted])


async def _current(tenant_id: TenantId, name: str, parts: Parts) -> Version | None:
    try:
        return main_of(await parts.store.resolve(tenant_id, name))
    except (AdapterNotFound, OtherBaseModel):
        return None


async def _proofs(parts: Parts, versions: Sequence[Version]) -> Mapping[VersionId, Proof]:
    return await parts.proofs.statuses([version.id for version in versions])


def _adapter(adapter: Adapter, parts: Parts, proofs: Mapping[VersionId, Proof]) -> AdapterObject:
    return AdapterObject(
        id=adapter.id,
        name=adapter.name,
        created_at=adapter.created_at,
        fallback=adapter.default.fallback,
        current=_version(adapter.default, parts, proofs),
    )


def _version(version: Version, parts: Parts, proofs: Mapping[VersionId, Proof]) -> VersionObject:
    held = parts.quarantine.of(version.tenant_id, version.digest)
    return VersionObject(
        number=version.number,
        model=f"{version.adapter_name}@{version.number}",
        fine_tuned_model=parts.store.fine_tuned_name(version),
        digest=version.digest,
        bytes=version.size_bytes,
        rank=version.rank,
        modules=list(version.modules),
        created_at=version.created_at,
        quarantine=None if held is None else QuarantineObject(reason=held.reason, at=held.at, until=held.until),
        proof=proof_object(proofs.get(version.id, UNKNOWN)),
    )
