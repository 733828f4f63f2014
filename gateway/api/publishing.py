"""How every upload ends, whichever way it came: published and answered, and answered alike when it is repeated."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel

from adapter_store.aliases import check_alias, main_of
from adapter_store.bundle import BUNDLE_FILES, StagedBundle
from adapter_store.catalog import DEFAULT_ALIAS, Provenance, Version
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterNotFound, OtherBaseModel
from adapter_store.ids import TenantId
from adapter_store.quota import bytes_exceeded
from adapter_store.together import Together
from gateway.arrivals import Kind
from gateway.dependencies import Parts, TenantKey, publisher
from gateway.errors import ProofMissing
from gateway.idempotency import HEADER, Kept, Once, fingerprint
from gateway.proofs import Policy

Respond = Callable[[AsyncConnection, Version], Awaitable[tuple[str, BaseModel]]]
"""The answer's location and body, read in the transaction that publishes."""


PublishedAlias = Annotated[
    str, Query(max_length=64, description="The alias that is to stand for the version; empty: none is moved.")
]


class Publication(Together[Version]):
    """One request to publish: its effect and its answer are written together, once.

    `alias` None: none is moved.
    """

    def __init__(self, once: Once, request_sha256: str, respond: Respond, *, alias: str | None) -> None:
        self.alias = alias
        self.request_sha256 = request_sha256
        self.answer: Kept | None = None
        self.once = once
        self._respond = respond

    async def before(self, connection: AsyncConnection) -> None:
        await self.once.check_in(connection, self.request_sha256)

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        location, body = await self._respond(connection, made)
        self.answer = Kept(self.request_sha256, 201, location, body.model_dump_json())
        await self.once.keep(connection, self.answer)


def check_published_alias(parts: Parts, alias: str) -> None:
    """Raises AliasInvalid, and ProofMissing where an alias other than the default one would not wait for the proof."""
    if alias:
        check_alias(alias)
        if alias != DEFAULT_ALIAS and parts.proofs.policy is Policy.REQUIRE:
            raise ProofMissing(
                "This server lets aliases stand for proved versions only: publish with an empty alias, and move "
                f"'{alias}' once the version is proved."
            )


def once(request: Request, parts: Parts, tenant_id: TenantId) -> Once:
    """The request's `Idempotency-Key`. Raises RequestInvalid."""
    return parts.answers.once(tenant_id, request.headers.get(HEADER))


async def hold_to_quota(
    parts: Parts, asker: TenantKey, name: str | None, bundle: StagedBundle, *, repeated: bool
) -> None:
    """Refuses at once what cannot fit, and caps the rest beside what else is under way. Raises QuotaExceeded.

    What is `repeated` takes nothing of what is left; it brings no more than the tenant may have, or has.
    """
    quota = asker.key.plan.quota
    if not quota.counts:
        return
    kept = await parts.store.kept(asker.tenant_id, name)
    left = kept.bytes_left(quota)
    if not repeated:
        kept.check(quota, 0)
    elif left is not None:
        left = left + kept.stored_bytes
    if left is not None:
        beside = parts.arrivals.beside(asker.tenant_id, Kind.ADAPTER, bundle, left)
        bundle.cap(left, bytes_exceeded(quota, kept), beside)


def request_of(route: str, name: str, alias: str | None, bundle: StagedBundle) -> str:
    """What makes two uploads the same request: the adapter, its alias and its files, however they are packed."""
    bundle.check_complete()
    return fingerprint(route, name, alias or "", *(bundle.sha256[file] for file in BUNDLE_FILES))


async def publish_bundle(
    request: Request,
    parts: Parts,
    asker: TenantKey,
    name: str,
    bundle: StagedBundle,
    publication: Publication,
    *,
    provenance: Provenance = Provenance.UPLOAD,
) -> Response:
    """Publishes what was uploaded, as the key allows by now. Raises Repeated, and what the store raises."""
    await publisher(request, parts)  # an upload may take long: the key may be revoked by now
    old = await current(parts, asker.tenant_id, name) if publication.alias == DEFAULT_ALIAS else None
    version = await parts.store.publish(
        asker.tenant_id,
        name,
        bundle,
        alias=publication.alias,
        provenance=provenance,
        published_by=asker.key.id,
        quota=asker.key.plan.quota,
        together=publication,
        provisional=provenance is Provenance.SCALED and publication.alias is None,
    )
    parts.models.forget_tenant(asker.tenant_id)
    parts.pool.replace(old, version, asker.key.plan)
    assert publication.answer is not None
    return as_response(publication.answer)


async def current(parts: Parts, tenant_id: TenantId, name: str) -> Version | None:
    """What answers to the name now: the engines that have it are given its successor, if it has the name at once."""
    if parts.proofs.policy is Policy.REQUIRE:
        return None
    try:
        return main_of(await parts.store.resolve(tenant_id, name))
    except (AdapterNotFound, OtherBaseModel):
        return None


def as_response(kept: Kept) -> Response:
    """The answer, byte for byte as it was given."""
    headers = {"location": kept.location} if kept.location else {}
    return Response(kept.body, kept.status, headers, media_type="application/json")
