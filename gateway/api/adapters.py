"""`/v1/adapters`: a tenant publishes, lists, shows and deletes its own adapters."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from typing import Annotated, Any, Final

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel

from adapter_store.archives import ARCHIVE_TYPES, ArchiveFile
from adapter_store.bundle import StagedBundle
from adapter_store.catalog import DEFAULT_ALIAS, Adapter, Fallback, Provenance, Version
from adapter_store.engine import AsyncConnection
from adapter_store.erasure import Erasure, State
from adapter_store.errors import AdapterStoreError
from adapter_store.ids import VersionId
from adapter_store.proofs import UNKNOWN, Proof, find_all
from adapter_store.scaling import PARTS, Scaling
from adapter_store.signing import VersionSignature
from gateway.api.body import Body
from gateway.api.erasures import ErasureObject, erasure_object, requests_on
from gateway.api.lazy import LazyRouter
from gateway.api.multipart import UploadForm
from gateway.api.proofs import ProofObject, proof_object
from gateway.api.publishing import (
    Publication,
    PublishedAlias,
    Respond,
    as_response,
    check_published_alias,
    hold_to_quota,
    once,
    publish_bundle,
    request_of,
)
from gateway.arrivals import Kind
from gateway.dependencies import AdapterKey, AdapterTenant, AppParts, Parts, TenantKey
from gateway.erasing import REQUEST_WAIT_S
from gateway.errors import GatewayError, RequestInvalid
from gateway.idempotency import Repeated

router = LazyRouter(prefix="/v1/adapters", tags=["adapters"])
ERASING: Final[dict[int | str, dict[str, Any]]] = {
    202: {"model": ErasureObject, "description": "Erased here; a replica is still to follow."}
}
Number = Annotated[int, Path(ge=1, le=999_999_999)]
Force = Annotated[bool, Query(description="Erase it though it is in use.")]


class QuarantineObject(BaseModel):
    """Why a version is held back: an engine computed NaN with it (`corrupted`), or `engine_died`.

    `until` null: until an operator lifts it.
    """

    reason: str
    at: int
    until: int | None


class VersionObject(BaseModel):
    """One immutable version; `digest` is SHA-256 over its two files, `created_at` in Unix seconds.

    `provenance`: how it came, by `upload`, `import` or `job`, or `scaled` from another; `published_by`: the id of the
    key that sent it. While `quarantine` is not null no engine may have it.
    `model` and `fine_tuned_model` are two ways to ask for just this one.
    """

    number: int
    model: str
    fine_tuned_model: str
    digest: str
    bytes: int
    rank: int
    modules: list[str]
    provenance: Provenance
    published_by: str | None
    created_at: int
    quarantine: QuarantineObject | None
    proof: ProofObject


class PublishedVersion(VersionObject):
    """The answer to an upload: the version, and the adapter whose name stands for it."""

    object: str = "adapter.version"
    adapter: str


class ScalingObject(BaseModel):
    """Of which version a scaled one was made, and by which factor."""

    version: int
    factor: float


class ScaledVersion(PublishedVersion):
    """The answer to scaling a version; `scaled_from` null: by 1, which is the version itself."""

    scaled_from: ScalingObject | None


class SignedVersion(VersionObject):
    """The same with a compact JWS of who published what: docs/api.md, *Signatures*.

    Null for versions from before there were signatures.
    """

    signature: str | None
    scaled_from: ScalingObject | None


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
    """An adapter and a page of its versions; `has_more` says whether `?before=<the last number>` has another."""

    versions: list[SignedVersion]
    has_more: bool


class AdapterList(BaseModel):
    """A page; `has_more` says whether `?after=<the last name>` has another."""

    object: str = "list"
    data: list[AdapterObject]
    has_more: bool


@router.post("", status_code=201, response_model=AdapterObject)
async def publish(
    request: Request, asker: AdapterKey, parts: AppParts, alias: PublishedAlias = DEFAULT_ALIAS
) -> Response:
    """Publish a version: multipart with `name` and the two files, or `name` and an `archive` of them.

    The adapter's name stands for the new version from the answer on, or another `alias` does. The same bytes again are
    the same version.
    """

    async def respond(connection: AsyncConnection, version: Version) -> tuple[str, AdapterObject]:
        adapter = await parts.store.find_in(connection, asker.tenant_id, version.adapter_name)
        found = await find_all(connection, [adapter.default.id])
        return f"/v1/adapters/{version.adapter_name}", adapter_object(adapter, parts, found)

    async def receive(body: Body, bundle: StagedBundle) -> str:
        form = UploadForm(request, body, bundle, has_name=True)
        await form.receive()
        if "name" not in form.fields:
            raise RequestInvalid("The field name is missing: it is what requests will call the adapter.", param="name")
        return form.fields["name"]

    return await _upload(request, asker, parts, None, alias, receive, respond)


@router.post("/{name}/versions", status_code=201, response_model=PublishedVersion)
async def publish_version(
    name: str, request: Request, asker: AdapterKey, parts: AppParts, alias: PublishedAlias = DEFAULT_ALIAS
) -> Response:
    """Publish a version: multipart with the two files or an `archive` of them, or a tar, tar.gz or zip as the body."""

    async def respond(connection: AsyncConnection, version: Version) -> tuple[str, PublishedVersion]:
        found = await find_all(connection, [version.id])
        return f"/v1/adapters/{name}", published_version(version, parts, found)

    async def receive(body: Body, bundle: StagedBundle) -> str:
        kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
        if kind in ARCHIVE_TYPES:
            await _receive_archive(body, bundle)
        else:
            await UploadForm(request, body, bundle, has_name=False).receive()
        return name

    return await _upload(request, asker, parts, name, alias, receive, respond)


async def _upload(
    request: Request,
    asker: TenantKey,
    parts: Parts,
    name: str | None,
    alias: str,
    receive: Callable[[Body, StagedBundle], Awaitable[str]],
    respond: Respond,
) -> Response:
    """From a body to an answer; `receive` gives the adapter's name, where it is not known before."""
    body = Body(request.receive, stall_s=parts.stall_s)
    try:
        async with parts.arrivals.stage(asker.tenant_id, Kind.ADAPTER) as bundle:
            repeat = once(request, parts, asker.tenant_id)
            if name is not None:
                parts.store.check_name(name)
            check_published_alias(parts, alias)
            await hold_to_quota(parts, asker, name, bundle, repeated=await repeat.is_known())
            name = await receive(body, bundle)
            asked = request_of(request.scope["route"].path, name, alias, bundle)
            publication = Publication(repeat, asked, respond, alias=alias or None)
            await repeat.check(publication.request_sha256)
            return await publish_bundle(request, parts, asker, name, bundle, publication)
    except Repeated as repeated:
        return as_response(repeated.kept)
    except (GatewayError, AdapterStoreError):
        await body.discard()  # what was staged is gone by now: it waits for no slow client
        raise


async def _receive_archive(body: Body, bundle: StagedBundle) -> None:
    with closing(ArchiveFile(bundle)) as archive:
        async for piece in body.pieces():
            await archive.write(piece)
        await archive.finish()


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
    return AdapterList(
        data=[adapter_object(adapter, parts, found) for adapter in page[:limit]], has_more=len(page) > limit
    )


@router.get("/{name}")
async def show(
    name: str,
    tenant_id: AdapterTenant,
    parts: AppParts,
    before: Annotated[int | None, Query(ge=1, le=999_999_999)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> AdapterWithVersions:
    """One adapter with its versions, newest first, a page at a time."""
    adapter, page = await parts.store.show(tenant_id, name, before=before, limit=limit + 1)
    versions = page[:limit]
    found = await _proofs(parts, [adapter.default, *versions])
    signatures = await parts.store.signatures(versions)
    scalings = await parts.store.scalings(versions)
    shown = [
        SignedVersion(
            **_members(version, parts, found),
            signature=_signature(signatures.get(version.id)),
            scaled_from=scaling_object(scalings.get(version.id)),
        )
        for version in versions
    ]
    whole = adapter_object(adapter, parts, found).model_dump()
    return AdapterWithVersions(**whole, versions=shown, has_more=len(page) > limit)


@router.patch("/{name}")
async def change(name: str, body: AdapterChange, tenant_id: AdapterTenant, parts: AppParts) -> AdapterObject:
    """Declare a fallback; answers that come by it are flagged."""
    await parts.aliases.set_fallback(tenant_id, name, DEFAULT_ALIAS, body.fallback)
    parts.models.forget_tenant(tenant_id)
    adapter, _ = await parts.store.show(tenant_id, name)
    return adapter_object(adapter, parts, await _proofs(parts, [adapter.default]))


@router.delete("/{name}", responses=ERASING)
async def erase(name: str, key: AdapterKey, parts: AppParts, response: Response, force: Force = False) -> ErasureObject:
    """Erase an adapter with all its versions and aliases, everywhere; the answer is the receipt, as far as it is.

    200 where all of it is gone, 202 where a replica is away or still has requests running. Without `force` it is a 409
    `version_in_use` while requests run on the adapter; with it they run to their end.
    """
    return await _erase(parts, key, name, None, force, response)


@router.delete("/{name}/versions/{number}", responses=ERASING)
async def erase_version(
    name: str, number: Number, key: AdapterKey, parts: AppParts, response: Response, force: Force = False
) -> ErasureObject:
    """Erase one version; its number is never given again.

    Without `force` it is a 409 `version_in_use` while an alias stands for it or requests run on it. With it, aliases
    go on with their other shares; without any `default` falls to the newest version left, and others go.
    """
    return await _erase(parts, key, name, number, force, response)


async def _erase(
    parts: Parts, key: TenantKey, name: str, number: int | None, force: bool, response: Response
) -> ErasureObject:
    erasure = await erase_everywhere(parts, key, name, number, force=force)
    response.status_code = 200 if erasure.state is State.COMPLETED else 202
    response.headers["location"] = f"/v1/erasures/{erasure.id}"
    return erasure_object(erasure)


async def erase_everywhere(parts: Parts, key: TenantKey, name: str, number: int | None, *, force: bool) -> Erasure:
    """Erases a version, or the whole adapter; the erasure as far as it is. Raises AdapterNotFound, VersionInUse."""
    running = 0
    if not force:
        leaving = await parts.erasures.leaving(key.tenant_id, name, number)
        running = await requests_on(parts, key.tenant_id, leaving)
    erasure = await parts.erasures.request(
        key.tenant_id,
        name,
        number,
        requested_by=key.key.id,
        force=force,
        running=running,
        replicas=[member.replica.id for member in parts.pool.members()],
    )
    parts.models.forget_tenant(key.tenant_id)
    if number is None:
        await parts.pins.forget(key.tenant_id, name)
    return await parts.eraser.wait(erasure, REQUEST_WAIT_S)


async def _proofs(parts: Parts, versions: Sequence[Version]) -> Mapping[VersionId, Proof]:
    return await parts.proofs.statuses([version.id for version in versions])


def adapter_object(adapter: Adapter, parts: Parts, proofs: Mapping[VersionId, Proof]) -> AdapterObject:
    return AdapterObject(
        id=adapter.id,
        name=adapter.name,
        created_at=adapter.created_at,
        fallback=adapter.default.fallback,
        current=version_object(adapter.default, parts, proofs),
    )


def version_object(version: Version, parts: Parts, proofs: Mapping[VersionId, Proof]) -> VersionObject:
    return VersionObject(**_members(version, parts, proofs))


def _signature(signature: VersionSignature | None) -> str | None:
    return None if signature is None else signature.signature


def scaling_object(scaling: Scaling | None) -> ScalingObject | None:
    return None if scaling is None else ScalingObject(version=scaling.source, factor=scaling.factor / PARTS)


def scaled_version(
    version: Version, parts: Parts, proofs: Mapping[VersionId, Proof], scaling: Scaling
) -> ScaledVersion:
    made_of = None if version.number == scaling.source else scaling_object(scaling)
    return ScaledVersion(adapter=version.adapter_name, **_members(version, parts, proofs), scaled_from=made_of)


def _members(version: Version, parts: Parts, proofs: Mapping[VersionId, Proof]) -> dict[str, Any]:
    held = parts.quarantine.of(version.tenant_id, version.digest)
    return {
        "number": version.number,
        "model": f"{version.adapter_name}@{version.number}",
        "fine_tuned_model": parts.store.fine_tuned_name(version),
        "digest": version.digest,
        "bytes": version.size_bytes,
        "rank": version.rank,
        "modules": list(version.modules),
        "provenance": version.provenance,
        "published_by": version.published_by,
        "created_at": version.created_at,
        "quarantine": None if held is None else QuarantineObject(reason=held.reason, at=held.at, until=held.until),
        "proof": proof_object(proofs.get(version.id, UNKNOWN)),
    }


def published_version(version: Version, parts: Parts, proofs: Mapping[VersionId, Proof]) -> PublishedVersion:
    return PublishedVersion(adapter=version.adapter_name, **_members(version, parts, proofs))
