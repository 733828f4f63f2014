"""`/v1/adapters/{name}/versions/{number}/scaled`: a version that does as another, but more or less of it."""

from typing import Annotated, Final

from fastapi import Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from adapter_store import scaling
from adapter_store.aliases import main_of
from adapter_store.catalog import Provenance, Version
from adapter_store.engine import AsyncConnection
from adapter_store.proofs import find_all
from adapter_store.scaling import Scaling
from gateway.api.adapters import Number, ScaledVersion, scaled_version
from gateway.api.lazy import LazyRouter
from gateway.api.publishing import (
    Publication,
    as_response,
    check_published_alias,
    hold_to_quota,
    once,
    publish_bundle,
)
from gateway.arrivals import Kind
from gateway.dependencies import AdapterKey, AppParts
from gateway.idempotency import Repeated, fingerprint

router = LazyRouter(prefix="/v1/adapters", tags=["adapters"])
ROUTE: Final = "/{name}/versions/{number}/scaled"
Factor = Annotated[str, BeforeValidator(lambda given: repr(given) if type(given) in (int, float) else given)]
"""A number as JSON has it, or as text."""


class NewScaled(BaseModel, extra="forbid"):
    """Above 0, at most 2, of at most 4 decimals; `alias` is what is to stand for the version, if anything is."""

    factor: Factor = Field(max_length=40)
    alias: str = Field(default="", max_length=64)


class _Scaled(Publication):
    """Its answer and how it came about are written together."""

    scaling: Scaling

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        await scaling.note(connection, self.scaling, made)
        await super().after(connection, made)


@router.post(ROUTE, status_code=201, response_model=ScaledVersion)
async def scale(
    name: str, number: Number, body: NewScaled, request: Request, asker: AdapterKey, parts: AppParts
) -> Response:
    """Make `name@number*factor`: the version with all that it adds to the base model times the factor, exactly.

    It has the same weights and another alpha, is checked and proved as every version, and has a number of its own. The
    same factor again is the same version.
    """
    asked = Scaling(number, scaling.read_factor(body.factor))
    check_published_alias(parts, body.alias)
    source = main_of(await parts.store.resolve(asker.tenant_id, f"{name}@{number}"))

    async def respond(connection: AsyncConnection, version: Version) -> tuple[str, ScaledVersion]:
        found = await find_all(connection, [version.id])
        return f"/v1/adapters/{name}", scaled_version(version, parts, found, asked)

    digest = fingerprint(ROUTE, name, str(asked), body.alias)
    publication = _Scaled(once(request, parts, asker.tenant_id), digest, respond, alias=body.alias or None)
    publication.scaling = asked
    async with parts.arrivals.stage(asker.tenant_id, Kind.ADAPTER) as bundle:
        try:
            await publication.once.check(digest)
            await hold_to_quota(parts, asker, name, bundle, repeated=True)  # the version may be there already
            await parts.store.stage_scaled(source, asked.factor, bundle)
            return await publish_bundle(request, parts, asker, name, bundle, publication, provenance=Provenance.SCALED)
        except Repeated as repeated:
            return as_response(repeated.kept)
