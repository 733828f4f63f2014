"""`/v1/adapters/{name}/aliases`, `/rollouts`, `/history`: the names that move, and how."""

import asyncio
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field, model_validator

from adapter_store import rollouts
from adapter_store.aliases import MOST_REASON, MOST_SHARES, MOST_WEIGHT, Alias, Move, MoveKind, main_of
from adapter_store.catalog import DEFAULT_ALIAS, Fallback, Version
from adapter_store.errors import AdapterStoreError
from adapter_store.scaling import SCALED
from gateway.api.lazy import LazyRouter
from gateway.dependencies import AdapterKey, AdapterTenant, AppParts, Parts, TenantKey

router = LazyRouter(prefix="/v1/adapters/{name}", tags=["aliases"])
MOST_NUMBER = 10**9
Number = Annotated[int, Field(ge=1, le=MOST_NUMBER)]
Target = Number | Annotated[str, Field(pattern=rf"^{SCALED.pattern}$")]
"""A version's number, or what was made of one: `3*0.7`."""
Reason = Annotated[str, Field(max_length=MOST_REASON)]


class Share(BaseModel, extra="forbid"):
    """A version's part of an alias's traffic: its weight beside the sum of all."""

    version: Number
    weight: int = Field(default=1, ge=1, le=MOST_WEIGHT)


class TargetShare(BaseModel, extra="forbid"):
    """The same as it is asked for."""

    version: Target
    weight: int = Field(default=1, ge=1, le=MOST_WEIGHT)


class AliasObject(BaseModel):
    """A name of an adapter: `<adapter>:<alias>` as a request's model; `default` is the adapter's bare name."""

    object: str = "alias"
    name: str
    model: str
    versions: list[Share]
    fallback: Fallback
    rollout: str | None
    moved_at: int


class AliasList(BaseModel):
    object: str = "list"
    data: list[AliasObject]


class AliasMove(BaseModel, extra="forbid"):
    """Either `version`, or several `versions` with weights, the alias's own first; `reason` is kept in the history."""

    version: Target | None = None
    versions: list[TargetShare] | None = Field(default=None, min_length=1, max_length=MOST_SHARES)
    fallback: Fallback | None = None
    reason: Reason = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> "AliasMove":
        if (self.version is None) == (self.versions is None):
            raise ValueError("give either version or versions")
        return self

    @property
    def shares(self) -> list[tuple[int | str, int]]:
        if self.version is not None:
            return [(self.version, 1)]
        return [(share.version, share.weight) for share in self.versions or ()]


class Undo(BaseModel, extra="forbid"):
    reason: Reason = ""


class MoveObject(BaseModel):
    """One move of an alias; `moved_by` is the id of a key, null where Tailor moved it by itself."""

    number: int
    alias: str
    kind: MoveKind
    moved_by: str | None
    reason: str
    before: list[Share]
    after: list[Share]
    at: int


class History(BaseModel):
    """A page, the newest first; `has_more` says whether `?before=<the last number>` has another."""

    object: str = "list"
    data: list[MoveObject]
    has_more: bool


class RolloutStart(BaseModel, extra="forbid"):
    """Where an alias is to go and how; see docs/api.md for what makes it go back."""

    version: Number
    alias: str = Field(default=DEFAULT_ALIAS, max_length=64)
    steps: list[int] = Field(default=[5, 25, 50, 100], min_length=1, max_length=20)
    step_s: int = Field(default=60, ge=1, le=7 * 86_400)
    min_requests: int = Field(default=20, ge=1, le=1_000_000)
    give_up_s: int = Field(default=86_400, ge=1, le=30 * 86_400)
    max_error_increase: float = Field(default=0.01, ge=0, le=1)
    max_latency_ratio: float = Field(default=2.0, ge=1, le=100)
    needs_proof: bool = True

    @property
    def policy(self) -> rollouts.Policy:
        given = self.model_dump(exclude={"version", "alias", "steps"})
        return rollouts.Policy(steps=tuple(self.steps), **given)


class Seen(BaseModel):
    """What was seen of a version in a rollout; `p90_s` null while there is too little to tell."""

    version: int
    requests: int
    errors: int
    p90_s: float | None


class RolloutObject(BaseModel):
    """`percent` of the alias's traffic go to `version`; `reason` says why it went back, or was not compared."""

    id: str
    object: str = "rollout"
    alias: str
    version: int
    previous: int
    percent: int
    steps: list[int]
    status: rollouts.Status
    reason: str
    started_by: str
    started_at: int
    ended_at: int | None


class RolloutWithCounts(RolloutObject):
    seen: list[Seen]


class RolloutList(BaseModel):
    object: str = "list"
    data: list[RolloutObject]


@router.get("/aliases")
async def list_aliases(name: str, tenant_id: AdapterTenant, parts: AppParts) -> AliasList:
    """All aliases of an adapter."""
    return AliasList(data=[_alias(name, alias) for alias in await parts.aliases.list(tenant_id, name)])


@router.get("/aliases/{alias}")
async def show_alias(name: str, alias: str, tenant_id: AdapterTenant, parts: AppParts) -> AliasObject:
    """What an alias stands for."""
    return _alias(name, await parts.aliases.show(tenant_id, name, alias))


@router.put("/aliases/{alias}")
async def move_alias(name: str, alias: str, body: AliasMove, caller: AdapterKey, parts: AppParts) -> AliasObject:
    """Make an alias, or let it stand for other versions: from the answer on here, within a second everywhere.

    Requests that have begun end with the version that they began with. A rollout that was under way is superseded.
    Where the old version is in an engine, the new one is brought there before the move.
    """
    shares = [(await _number(caller, name, target, parts), weight) for target, weight in body.shares]
    numbers = [number for number, _ in shares]
    await parts.proofs.allow_moves(caller.tenant_id, name, numbers)
    old = await _warm(caller, name, alias, numbers, parts)
    moved = await parts.aliases.move(
        caller.tenant_id, name, alias, shares, moved_by=caller.key.id, reason=body.reason, fallback=body.fallback
    )
    parts.models.forget_tenant(caller.tenant_id)
    await retire_unnamed(old, parts)
    return _alias(name, moved)


@router.delete("/aliases/{alias}", status_code=204)
async def remove_alias(name: str, alias: str, caller: AdapterKey, parts: AppParts) -> None:
    """Remove an alias; `default` goes with its adapter only."""
    await parts.aliases.remove(caller.tenant_id, name, alias, moved_by=caller.key.id)
    parts.models.forget_tenant(caller.tenant_id)


@router.post("/aliases/{alias}/rollback")
async def roll_back(
    name: str, alias: str, caller: AdapterKey, parts: AppParts, body: Undo | None = None
) -> AliasObject:
    """Back to what the alias stood for before its last move; called again, before the one before that."""
    reason = body.reason if body is not None else ""
    old = await _warm(caller, name, alias, [], parts)
    moved = await parts.aliases.roll_back(caller.tenant_id, name, alias, moved_by=caller.key.id, reason=reason)
    parts.models.forget_tenant(caller.tenant_id)
    await retire_unnamed(old, parts)
    return _alias(name, moved)


@router.get("/history")
async def history(
    name: str,
    tenant_id: AdapterTenant,
    parts: AppParts,
    alias: Annotated[str | None, Query(max_length=64)] = None,
    before: Annotated[int | None, Query(ge=1, le=MOST_NUMBER)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
) -> History:
    """Who moved which alias when, from what to what; the newest 1,000 moves of an adapter are kept."""
    page = await parts.aliases.history(tenant_id, name, alias=alias, before=before, limit=limit + 1)
    return History(data=[_move(move) for move in page[:limit]], has_more=len(page) > limit)


@router.post("/rollouts", status_code=201)
async def start_rollout(name: str, body: RolloutStart, caller: AdapterKey, parts: AppParts) -> RolloutObject:
    """Let an alias go to another version step by step, and back by itself where that one does worse."""
    await parts.proofs.allow_moves(caller.tenant_id, name, [body.version])
    begun = await parts.rollouts.start(
        caller.tenant_id, name, body.alias, body.version, body.policy, started_by=caller.key.id
    )
    parts.models.forget_tenant(caller.tenant_id)
    await _warm(caller, name, body.alias, [body.version], parts)
    return _rollout(begun)


@router.get("/rollouts")
async def list_rollouts(name: str, tenant_id: AdapterTenant, parts: AppParts) -> RolloutList:
    """The newest first; the last 100 are kept."""
    return RolloutList(data=[_rollout(found) for found in await parts.rollouts.list(tenant_id, name)])


@router.get("/rollouts/{rollout}")
async def show_rollout(name: str, rollout: str, tenant_id: AdapterTenant, parts: AppParts) -> RolloutWithCounts:
    """Where it is, and what was seen of its two versions by all gateways, a second ago at most."""
    found, candidate, baseline = await parts.rollouts.show(tenant_id, name, rollout)
    seen = [_seen(found.candidate, candidate), _seen(found.baseline, baseline)]
    return RolloutWithCounts(**_rollout(found).model_dump(), seen=seen)


@router.post("/rollouts/{rollout}/cancel")
async def cancel_rollout(
    name: str, rollout: str, caller: AdapterKey, parts: AppParts, body: Undo | None = None
) -> RolloutObject:
    """Back to the version before, at once."""
    reason = body.reason if body is not None else ""
    ended = await parts.rollouts.cancel(caller.tenant_id, name, rollout, by=caller.key.id, reason=reason)
    parts.models.forget_tenant(caller.tenant_id)
    return _rollout(ended)


async def _number(caller: TenantKey, name: str, target: int | str, parts: Parts) -> int:
    """Of the version that is meant. Raises AdapterNotFound where it was not made yet."""
    if isinstance(target, int):
        return target
    return main_of(await parts.store.resolve(caller.tenant_id, f"{name}@{target}")).number


async def _warm(caller: TenantKey, name: str, alias: str, numbers: list[int], parts: Parts) -> Version | None:
    """What the alias is about to stand for, where its present version is, which is returned.

    What is missing, the move itself tells.
    """
    resolve, plan = parts.store.resolve, caller.key.plan
    try:
        old = main_of(await resolve(caller.tenant_id, f"{name}:{alias}"))
        found = [main_of(await resolve(caller.tenant_id, f"{name}@{number}")) for number in numbers]
    except AdapterStoreError:
        return None
    await asyncio.gather(*(parts.pool.prewarm(old, new, plan=plan) for new in found))
    return old


async def retire_unnamed(old: Version | None, parts: Parts) -> None:
    """Let the engines give up a version that no alias names any more, once its requests have ended."""
    if old is None:
        return
    named = await parts.aliases.list(old.tenant_id, old.adapter_name)
    if all(number != old.number for alias in named for number, _ in alias.shares):
        parts.pool.retire(old)


def _alias(name: str, alias: Alias) -> AliasObject:
    return AliasObject(
        name=alias.name,
        model=name if alias.name == DEFAULT_ALIAS else f"{name}:{alias.name}",
        versions=_shares(alias.shares),
        fallback=alias.fallback,
        rollout=alias.rollout_id,
        moved_at=alias.moved_at,
    )


def _shares(shares: tuple[tuple[int, int], ...]) -> list[Share]:
    return [Share(version=number, weight=weight) for number, weight in shares]


def _move(move: Move) -> MoveObject:
    return MoveObject(
        number=move.number,
        alias=move.alias,
        kind=move.kind,
        moved_by=move.moved_by or None,
        reason=move.reason,
        before=_shares(move.before),
        after=_shares(move.after),
        at=move.at,
    )


def _rollout(rollout: rollouts.Rollout) -> RolloutObject:
    return RolloutObject(
        id=rollout.id,
        alias=rollout.alias,
        version=rollout.candidate,
        previous=rollout.baseline,
        percent=rollout.percent,
        steps=list(rollout.policy.steps),
        status=rollout.status,
        reason=rollout.reason,
        started_by=rollout.started_by,
        started_at=rollout.started_at,
        ended_at=rollout.ended_at,
    )


def _seen(number: int, tally: rollouts.Tally) -> Seen:
    return Seen(version=number, requests=tally.requests, errors=tally.errors, p90_s=tally.latency_s(0.9))
