"""`/v1/keys`: a tenant's own admin makes, lists, rotates and revokes the keys of its tenant.

The objects are those of `/admin/v1` too.
"""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field

from gateway.api.lazy import LazyRouter
from gateway.api_key import ApiKey
from gateway.dependencies import AppParts, KeyAdmin
from gateway.errors import RequestInvalid
from gateway.keys import KeyDetails, Rotation
from gateway.tenants import DEFAULT_SCOPES, Scope

router = LazyRouter(prefix="/v1/keys", tags=["keys"])
OVERLAP_LIMIT_S = 2_592_000
KEPT_FOR_EVER = 253_402_300_799  # the last second of the year 9999

Label = Annotated[str, Field(max_length=128, pattern="^[^\\x00]*$")]  # PostgreSQL's texts hold no NUL


class NewKey(BaseModel, extra="forbid"):
    """`scopes` default to what serving and training need; `expires_at` in Unix seconds, by default the maker's own."""

    label: Label = ""
    scopes: Annotated[list[Scope], Field(min_length=1)] | None = None
    expires_at: Annotated[int, Field(gt=0, le=KEPT_FOR_EVER)] | None = None


class NewRotation(BaseModel, extra="forbid"):
    """For how long the old key goes on beside the new one."""

    overlap_s: Annotated[int, Field(ge=0, le=OVERLAP_LIMIT_S)] = 86_400


class KeyObject(BaseModel):
    """A key without its secret; times in Unix seconds, `last_used_at` up to a minute and a half late."""

    id: str
    object: str = "api_key"
    tenant_id: str | None
    prefix: str
    scopes: list[str]
    label: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    created_by: str | None
    replaces: str | None


class KeyWithSecret(KeyObject):
    """The answer to a creation: the only time that `secret` is shown."""

    secret: str


class KeyList(BaseModel):
    """A page; `has_more` says whether `?after=<the last id>` has another."""

    object: str = "list"
    data: list[KeyObject]
    has_more: bool


After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=1_000)]


@router.post("", status_code=201)
async def create(body: NewKey, admin: KeyAdmin, parts: AppParts) -> KeyWithSecret:
    """A new key of the caller's tenant, with no more scopes and no later end than the caller's own."""
    made, secret = await parts.keys.create(
        admin.tenant_id, tenant_scopes(body, admin.key), maker=admin.key, label=body.label, expires_at=body.expires_at
    )
    return with_secret(made, secret, parts)


@router.get("")
async def list_keys(admin: KeyAdmin, parts: AppParts, after: After = None, limit: Limit = 100) -> KeyList:
    """The tenant's keys, revoked ones too, the oldest first."""
    return key_list(await parts.keys.page(admin.tenant_id, after, limit + 1), limit)


@router.post("/{key_id}/rotate", status_code=201)
async def rotate(key_id: str, body: NewRotation, admin: KeyAdmin, parts: AppParts) -> KeyWithSecret:
    """A successor with the same scopes, label and end; the old key goes on for `overlap_s`."""
    rotation = await parts.keys.rotate(admin.tenant_id, key_id, maker=admin.key, overlap_s=body.overlap_s)
    return rotated(rotation, parts)


@router.delete("/{key_id}", status_code=204)
async def revoke(key_id: str, admin: KeyAdmin, parts: AppParts) -> None:
    """Revoke for good: at once here, within a second on every other gateway."""
    parts.auth.forget((await parts.keys.revoke(admin.tenant_id, key_id)).sha256)


def tenant_scopes(body: NewKey, maker: ApiKey) -> frozenset[Scope]:
    """What a tenant's new key is for.

    Raises:
        RequestInvalid: `operator` is asked for, or nothing that is given by default can be given by this maker.
    """
    if body.scopes is None:
        scopes = DEFAULT_SCOPES if Scope.OPERATOR in maker.scopes else DEFAULT_SCOPES & maker.scopes
        if not scopes:
            raise RequestInvalid(
                "Your key has none of the scopes that are given by default: name some.", param="scopes"
            )
        return scopes
    if Scope.OPERATOR in body.scopes:
        raise RequestInvalid("A tenant's key cannot have the scope 'operator'.", param="scopes")
    return frozenset(body.scopes)


def rotated(rotation: Rotation, parts: AppParts) -> KeyWithSecret:
    parts.auth.forget(rotation.old.sha256)
    return with_secret(rotation.made, rotation.secret, parts)


def with_secret(key: KeyDetails, secret: str, parts: AppParts) -> KeyWithSecret:
    parts.auth.forget_unknown()  # it may have been asked for before it was there
    return KeyWithSecret(**key_object(key).model_dump(), secret=secret)


def key_list(found: list[KeyDetails], limit: int) -> KeyList:
    return KeyList(data=[key_object(key) for key in found[:limit]], has_more=len(found) > limit)


def key_object(key: KeyDetails) -> KeyObject:
    return KeyObject(
        id=key.id,
        tenant_id=key.tenant_id,
        prefix=key.prefix,
        scopes=sorted(key.scopes),
        label=key.label,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
        created_by=key.created_by,
        replaces=key.replaces,
    )
