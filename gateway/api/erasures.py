"""`/v1/erasures`, `/admin/v1/erasures`: receipts of what was erased; `/v1/signing-keys`: what they are checked with."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from pydantic import BaseModel

from adapter_store.erasure import Erasure, Outcome, ReplicaPart
from adapter_store.ids import TenantId
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator, Parts
from gateway.errors import ObjectUnknown, ReplicaInSettings, ScopeMissing, authorization_of
from gateway.tenants import Scope

router = LazyRouter(tags=["erasures"])

After = Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")]
Limit = Annotated[int, Query(ge=1, le=1_000)]
TenantName = Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")]


class ErasureObject(BaseModel):
    """An erasure: `state` is `requested`, `blobs_gone`, `replicas_gone` or `completed`.

    `pending` are the replicas that have not confirmed. `statement` is what the receipt says; once completed,
    `signature` is a compact JWS of it.
    """

    id: str
    object: str = "erasure"
    state: str
    pending: list[str]
    statement: dict[str, Any]
    signature: str | None


class ErasureList(BaseModel):
    """A page, the oldest first; `has_more` says whether `?after=<the last id>` has another."""

    object: str = "list"
    data: list[ErasureObject]
    has_more: bool


class Erased(BaseModel):
    """In the answer to a deletion: where the receipt is."""

    erasure: str


class PublicKey(BaseModel):
    """An Ed25519 key as a JWK (RFC 8037); `kid` is its thumbprint."""

    kty: str
    crv: str
    x: str
    kid: str
    alg: str
    use: str


class PublicKeys(BaseModel):
    """A JWK set: every key that ever signed, the oldest first."""

    keys: list[PublicKey]


async def requests_on(parts: Parts, tenant_id: TenantId, digests: Collection[str]) -> int:
    """How many requests run on what would leave the replicas; a proof of it makes way."""
    parts.proofs.give_way(tenant_id, digests)
    return await parts.pool.running(tenant_id, digests)


async def _any_reader(request: Request, parts: AppParts) -> None:
    key = await parts.auth.live_key(authorization_of(request.scope))
    if not key.scopes:
        raise ScopeMissing("This key may not be used here: it lacks the scope 'adapters'.")


async def _eraser(request: Request, parts: AppParts) -> TenantId:
    """Whoever may erase something may read what became of it."""
    authorization = authorization_of(request.scope)
    scope = Scope.TRAINING if Scope.TRAINING in (await parts.auth.live_key(authorization)).scopes else Scope.ADAPTERS
    return await parts.auth.tenant(authorization, scope)


ErasingTenant = Annotated[TenantId, Depends(_eraser)]


@router.get("/v1/signing-keys", dependencies=[Depends(_any_reader)])
async def list_signing_keys(parts: AppParts) -> PublicKeys:
    """The public keys; keep a copy, and whatever was signed can be checked without this server."""
    return PublicKeys(keys=[PublicKey(**key) for key in await parts.signer.public_keys()])


@router.get("/v1/erasures")
async def list_erasures(
    tenant_id: ErasingTenant, parts: AppParts, after: After = None, limit: Limit = 100
) -> ErasureList:
    """The tenant's erasures, the oldest first; receipts stay after what they are about is gone."""
    return _page(await parts.erasures.page(tenant_id, after, limit + 1), limit)


@router.get("/v1/erasures/{erasure}")
async def show_erasure(erasure: str, tenant_id: ErasingTenant, parts: AppParts) -> ErasureObject:
    """One erasure: how far it is, and its receipt."""
    return erasure_object(await parts.erasures.find(tenant_id, erasure))


@router.get("/admin/v1/erasures")
async def list_all_erasures(
    _: Operator, parts: AppParts, tenant: TenantName = None, after: After = None, limit: Limit = 100
) -> ErasureList:
    """Every tenant's erasures, or one's (name or id), the oldest first."""
    tenant_id = None if tenant is None else (await parts.tenants.named(tenant)).id
    return _page(await parts.erasures.page(tenant_id, after, limit + 1), limit)


@router.get("/admin/v1/erasures/{erasure}")
async def show_any_erasure(erasure: str, _: Operator, parts: AppParts) -> ErasureObject:
    """One erasure of any tenant."""
    return erasure_object(await parts.erasures.find(None, erasure))


@router.post("/admin/v1/erasures/{erasure}/replicas/{replica}/vouch")
async def vouch(erasure: str, replica: str, operator: Operator, parts: AppParts) -> ErasureObject:
    """Vouch for a replica that will not be back: the operator has wiped its disk, and the receipt says who said so.

    409 for one that is in the pool: that one is asked itself.
    """
    found = await parts.erasures.find(None, erasure)
    if replica in {member.replica.id for member in parts.pool.members()}:
        raise ReplicaInSettings(
            "That replica is in the pool, and erases by itself: take it out first.", param="replica"
        )
    part = ReplicaPart(replica, Outcome.VOUCHED, None, None, operator.id)
    if not await parts.erasures.confirm(found.id, part):
        raise ObjectUnknown("That replica is not pending in this erasure.", param="replica")
    return erasure_object(await parts.eraser.wait(found, 1.0))


def erasure_object(erasure: Erasure) -> ErasureObject:
    return ErasureObject(
        id=erasure.id,
        state=erasure.state.value,
        pending=erasure.pending,
        statement=dict(erasure.statement()),
        signature=erasure.signature,
    )


def _page(found: Sequence[Erasure], limit: int) -> ErasureList:
    return ErasureList(data=[erasure_object(erasure) for erasure in found[:limit]], has_more=len(found) > limit)
