"""Aliases: the names that move. What one stands for, who moved it, and the way back.

An alias stands for one version, or for several with weights. Each move is one transaction with its row in the history
and its entry in the change feed, so that no reader ever sees half of one.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final

from sqlalchemy import Row, bindparam, delete, func, insert, select, update

from adapter_store import catalog
from adapter_store.base_model import BaseModel
from adapter_store.catalog import (
    DEFAULT_ALIAS,
    OF_TENANT,
    Fallback,
    Version,
    adapters,
    alias_moves,
    alias_shares,
    aliases,
    rollouts,
    select_versions,
    version_of,
    versions,
)
from adapter_store.changes import record_change
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import (
    AdapterNotFound,
    AliasInvalid,
    AliasKept,
    AliasNotFound,
    NothingToRollBack,
    OtherBaseModel,
    TooManyAliases,
)
from adapter_store.ids import AdapterId, TenantId, VersionId
from adapter_store.transactions import reading, writing

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NOUN: Final = "adapter"  # in the change feed: an adapter's names are forgotten together
MOST_ALIASES: Final = 64
"""Of one adapter."""
MOST_SHARES: Final = 8
MOST_WEIGHT: Final = 10_000
MOST_REASON: Final = 500
HISTORY: Final = 1_000
"""Moves that are kept of one adapter."""

# Built once, as in the catalogue.
_FOUND: Final = (
    select_versions()
    .add_columns(aliases.c.fallback, aliases.c.weight.label("alias_weight"), aliases.c.rollout_id)
    .join(aliases, (aliases.c.adapter_id == adapters.c.id) & (aliases.c.version_id == versions.c.id))
    .where(OF_TENANT, aliases.c.name == bindparam("alias"))
)
_OF_ADAPTER: Final = (
    select(aliases, versions.c.number)
    .join(versions, versions.c.id == aliases.c.version_id)
    .where(aliases.c.adapter_id == bindparam("adapter_id"))
)
_ROW: Final = _OF_ADAPTER.where(aliases.c.name == bindparam("alias"))
_ROWS: Final = _OF_ADAPTER.order_by(aliases.c.name)
_COUNT: Final = select(func.count()).select_from(aliases).where(aliases.c.adapter_id == bindparam("adapter_id"))
_NEW: Final = insert(aliases)
_MOVE: Final = update(aliases).where(aliases.c.adapter_id == bindparam("of"), aliases.c.name == bindparam("called"))
_NEW_SHARE: Final = insert(alias_shares)
_NO_SHARES: Final = delete(alias_shares).where(
    alias_shares.c.adapter_id == bindparam("of"), alias_shares.c.alias == bindparam("called")
)
_NEW_MOVE: Final = insert(alias_moves)
_NEXT_MOVE: Final = select(func.coalesce(func.max(alias_moves.c.number), 0) + 1).where(
    alias_moves.c.adapter_id == bindparam("adapter_id")
)
_OLD_MOVES: Final = delete(alias_moves).where(
    alias_moves.c.adapter_id == bindparam("adapter_id"), alias_moves.c.number <= bindparam("last")
)


class MoveKind(StrEnum):
    """Why an alias stands where it stands."""

    PUBLISH = "publish"
    MOVE = "move"
    ROLLBACK = "rollback"
    ROLLOUT = "rollout"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Share:
    """One version's part of an alias: `weight` beside the sum of all."""

    version: Version
    weight: int


@dataclass(frozen=True, slots=True)
class Split:
    """What an alias stands for while it stands for several versions; the first is its own, which lists show."""

    shares: tuple[Share, ...]

    @property
    def adapter_name(self) -> str:
        return self.shares[0].version.adapter_name

    @property
    def main(self) -> Version:
        return self.shares[0].version

    def pick(self, affinity: bytes) -> Version:
        """The version for whoever sends `affinity`: the same for the same, in proportion to the weights.

        Weighted rendezvous hashing (Schindelhauer and Schomaker, SPAA 2005): where weights change, as few as
        possible are given another version, so a canary that grows keeps those that it has.
        """
        least = math.inf
        picked = self.main
        for share in self.shares:
            drawn = blake2b(affinity, digest_size=8, key=share.version.id.encode()[:64]).digest()
            score = -math.log((int.from_bytes(drawn, "big") + 1) / (2.0**64 + 1)) / share.weight
            if score < least:
                least, picked = score, share.version
        return picked


def main_of(found: Version | Split) -> Version:
    """The version, or the alias's own one of several."""
    return found.main if isinstance(found, Split) else found


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias as its owner sees it. `shares`: numbers of versions with their weights, its own version first."""

    name: str
    shares: tuple[tuple[int, int], ...]
    fallback: Fallback
    moved_at: int
    rollout_id: str | None


@dataclass(frozen=True, slots=True)
class Move:
    """One entry of the history; `moved_by` is a key's id, empty where Tailor itself moved it."""

    number: int
    alias: str
    kind: MoveKind
    moved_by: str
    reason: str
    before: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, int], ...]
    at: int


Target = Sequence[tuple[VersionId, int, int]]
"""Versions with their numbers and weights."""


class Aliases:
    """The aliases of all tenants' adapters. Every call names the tenant."""

    def __init__(self, engine: AsyncEngine, base: BaseModel, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._base = base
        self._clock = clock

    async def list(self, tenant_id: TenantId, name: str) -> tuple[Alias, ...]:
        """All of an adapter, by name. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            adapter_id = await _adapter_id(connection, tenant_id, name)
            return await _aliases(connection, adapter_id)

    async def show(self, tenant_id: TenantId, name: str, alias: str) -> Alias:
        """Raises AdapterNotFound, AliasNotFound."""
        async with reading(self._engine) as connection:
            adapter_id = await _adapter_id(connection, tenant_id, name)
            return await _one(connection, adapter_id, name, alias)

    async def move(
        self,
        tenant_id: TenantId,
        name: str,
        alias: str,
        shares: Sequence[tuple[int, int]],
        *,
        moved_by: str,
        reason: str = "",
        fallback: Fallback | None = None,
    ) -> Alias:
        """Make the alias, or let it stand for these versions; a rollout that is under way on it is over.

        `shares`: numbers of versions with weights, its own version first. `fallback` None: stays as it is.
        Raises AdapterNotFound, AliasInvalid, TooManyAliases, OtherBaseModel.
        """
        _check(alias, shares)
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            adapter_id = await _adapter_id(connection, tenant_id, name)
            target = await self._target(connection, tenant_id, name, shares)
            move = NewMove(adapter_id, alias, MoveKind.MOVE, moved_by, reason[:MOST_REASON], int(self._clock()))
            await point(connection, move, target)
            if fallback is not None:
                await _set_fallback(connection, adapter_id, alias, fallback)
            return await _one(connection, adapter_id, name, alias)

    async def roll_back(self, tenant_id: TenantId, name: str, alias: str, *, moved_by: str, reason: str = "") -> Alias:
        """Back to what the alias stood for before its last move; again: before the one before that.

        Raises AdapterNotFound, AliasNotFound, NothingToRollBack, OtherBaseModel.
        """
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            adapter_id = await _adapter_id(connection, tenant_id, name)
            await _one(connection, adapter_id, name, alias)
            last = await _last_move(connection, adapter_id, alias)
            if last is None or not json.loads(last.before):
                raise NothingToRollBack(f"alias '{alias}' of '{name}' has not been moved from anything before")
            try:
                target = await self._target(connection, tenant_id, name, json.loads(last.before))
            except AdapterNotFound as error:
                raise NothingToRollBack(
                    f"what alias '{alias}' stood for before was '{error.model}', which has been deleted: move it "
                    "to a version that exists"
                ) from None
            await _mark_undone(connection, adapter_id, last.number)
            why = reason[:MOST_REASON] or f"rolled back move {last.number}"
            move = NewMove(adapter_id, alias, MoveKind.ROLLBACK, moved_by, why, int(self._clock()))
            await point(connection, move, target)
            return await _one(connection, adapter_id, name, alias)

    async def remove(self, tenant_id: TenantId, name: str, alias: str, *, moved_by: str, reason: str = "") -> None:
        """Raises AdapterNotFound, AliasNotFound, AliasKept (`default` goes with its adapter only)."""
        if alias == DEFAULT_ALIAS:
            raise AliasKept(f"'{DEFAULT_ALIAS}' is what the adapter's name stands for: delete the adapter instead")
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            adapter_id = await _adapter_id(connection, tenant_id, name)
            found = await _one(connection, adapter_id, name, alias)
            move = NewMove(adapter_id, alias, MoveKind.REMOVE, moved_by, reason[:MOST_REASON], int(self._clock()))
            await _remove(connection, move, found)

    async def set_fallback(self, tenant_id: TenantId, name: str, alias: str, fallback: Fallback) -> Alias:
        """Declares who answers where the alias's version cannot. Raises AdapterNotFound, AliasNotFound."""
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            adapter_id = await _adapter_id(connection, tenant_id, name)
            await _one(connection, adapter_id, name, alias)
            await _set_fallback(connection, adapter_id, alias, fallback)
            return await _one(connection, adapter_id, name, alias)

    async def history(
        self, tenant_id: TenantId, name: str, *, alias: str | None = None, before: int | None = None, limit: int = 100
    ) -> tuple[Move, ...]:
        """Moves, the newest first; the next page begins `before` the last one's number. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            adapter_id = await _adapter_id(connection, tenant_id, name)
            statement = (
                select(alias_moves)
                .where(alias_moves.c.adapter_id == adapter_id)
                .order_by(alias_moves.c.number.desc())
                .limit(limit)
            )
            if alias is not None:
                statement = statement.where(alias_moves.c.alias == alias)
            if before is not None:
                statement = statement.where(alias_moves.c.number < before)
            return tuple(_move(row) for row in await connection.execute(statement))

    async def _target(
        self, connection: AsyncConnection, tenant_id: TenantId, name: str, shares: Sequence[Sequence[int]]
    ) -> Target:
        found = []
        for number, weight in shares:
            version = await catalog.find_by_number(connection, tenant_id, name, number)
            if version is None:
                raise AdapterNotFound(f"{name}@{number}")
            if version.base_fingerprint != self._base.fingerprint:
                raise OtherBaseModel(
                    f"'{name}@{number}' was made for another base model than '{self._base.name}': train it again"
                )
            found.append((version.id, number, weight))
        return found


@dataclass(frozen=True, slots=True)
class NewMove:
    """What a move is told to the history."""

    adapter_id: AdapterId
    alias: str
    kind: MoveKind
    moved_by: str
    reason: str
    at: int
    rollout_id: str | None = None


async def find(
    connection: AsyncConnection, tenant_id: TenantId, name: str, alias: str = DEFAULT_ALIAS
) -> Version | Split | None:
    """What the alias stands for."""
    row = (await connection.execute(_FOUND, {"tenant_id": tenant_id, "name": name, "alias": alias})).one_or_none()
    if row is None:
        return None
    main = version_of(row, row.fallback, row.rollout_id)
    if not row.alias_weight:
        return main
    others = (
        select_versions()
        .add_columns(alias_shares.c.weight.label("alias_weight"))
        .join(alias_shares, alias_shares.c.version_id == versions.c.id)
        .where(alias_shares.c.adapter_id == main.adapter_id, alias_shares.c.alias == alias)
        .order_by(versions.c.number)
    )
    shares = [Share(main, row.alias_weight)]
    for other in await connection.execute(others):
        shares.append(Share(version_of(other, row.fallback, row.rollout_id), other.alias_weight))
    return Split(tuple(shares))


async def point(connection: AsyncConnection, move: NewMove, target: Target) -> bool:
    """Let the alias stand for the target, within the caller's transaction; False where it already did.

    The first of the target is the alias's own version. A rollout other than the move's own is over.
    """
    current = await _row(connection, move.adapter_id, move.alias)
    before = () if current is None else await _shares(connection, move.adapter_id, current)
    after = tuple((number, weight if len(target) > 1 else 1) for _, number, weight in target)
    if current is not None and before == after and current.rollout_id == move.rollout_id:
        return False
    if current is None:
        await _check_count(connection, move.adapter_id)
    elif current.rollout_id is not None and current.rollout_id != move.rollout_id:
        await _end_rollout(connection, move.adapter_id, move.alias, move.at)
    await _write(connection, move, target, is_new=current is None)
    await _note(connection, move, before, after)
    return True


async def standing_for(connection: AsyncConnection, version: Version) -> tuple[Alias, ...]:
    """The aliases that stand for the version, with any share, or that a rollout may take back to it."""
    its = (rollouts.c.status == "running") & (rollouts.c.baseline_id == version.id)
    leaving = set((await connection.execute(select(rollouts.c.id).where(its))).scalars())
    found = await _aliases(connection, version.adapter_id)
    return tuple(
        alias
        for alias in found
        if alias.rollout_id in leaving or any(number == version.number for number, _ in alias.shares)
    )


async def take_off(
    connection: AsyncConnection, version: Version, left: Sequence[Version], moved_by: str, now: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Lets no alias stand for a version that is erased: each with the numbers of what it stands for then.

    `left` are the adapter's other versions, newest first. An alias goes on with its other shares; `default` without
    any falls to the newest, another one goes.
    """
    by_number = {other.number: other for other in left}
    done = []
    for alias in await standing_for(connection, version):
        others = [(number, weight) for number, weight in alias.shares if number != version.number]
        if not others and alias.name == DEFAULT_ALIAS and left:
            others = [(left[0].number, 1)]
        kind = MoveKind.MOVE if others else MoveKind.REMOVE
        move = NewMove(version.adapter_id, alias.name, kind, moved_by, f"version {version.number} was erased", now)
        if others:
            await point(connection, move, [(by_number[number].id, number, weight) for number, weight in others])
        else:
            await _remove(connection, move, alias)
        done.append((alias.name, tuple(number for number, _ in others)))
    return done


async def _remove(connection: AsyncConnection, move: NewMove, alias: Alias) -> None:
    await _end_rollout(connection, move.adapter_id, alias.name, move.at)
    for table, column in ((alias_shares, alias_shares.c.alias), (aliases, aliases.c.name)):
        await connection.execute(delete(table).where(table.c.adapter_id == move.adapter_id, column == alias.name))
    await _note(connection, move, alias.shares, ())


async def _write(connection: AsyncConnection, move: NewMove, target: Target, *, is_new: bool) -> None:
    (main, _, weight), *others = target
    values = {
        "version_id": main,
        "weight": weight if others else 0,
        "rollout_id": move.rollout_id,
        "moved_at": move.at,
    }
    here = {"of": move.adapter_id, "called": move.alias}
    if is_new:
        await connection.execute(_NEW, {"adapter_id": move.adapter_id, "name": move.alias, **values})
    else:
        await connection.execute(_NO_SHARES, here)
        await connection.execute(_MOVE, {**here, **values})
    for version_id, _, weight in others:
        row = {"adapter_id": move.adapter_id, "alias": move.alias, "version_id": version_id, "weight": weight}
        await connection.execute(_NEW_SHARE, row)


async def _note(
    connection: AsyncConnection,
    move: NewMove,
    before: Sequence[tuple[int, int]],
    after: Sequence[tuple[int, int]],
) -> None:
    number = int((await connection.execute(_NEXT_MOVE, {"adapter_id": move.adapter_id})).scalar_one())
    row = {
        "adapter_id": move.adapter_id,
        "number": number,
        "alias": move.alias,
        "kind": move.kind.value,
        "moved_by": move.moved_by,
        "reason": move.reason,
        "before": json.dumps(before),
        "after": json.dumps(after),
        "undone": int(move.kind is MoveKind.ROLLBACK),
        "at": move.at,
    }
    await connection.execute(_NEW_MOVE, row)
    if number > HISTORY:
        await connection.execute(_OLD_MOVES, {"adapter_id": move.adapter_id, "last": number - HISTORY})


async def _end_rollout(connection: AsyncConnection, adapter_id: AdapterId, alias: str, now: int) -> None:
    """Somebody has moved the alias: the rollout on it leads nowhere any more."""
    here = (rollouts.c.adapter_id == adapter_id) & (rollouts.c.alias == alias) & (rollouts.c.status == "running")
    ended = {"status": "superseded", "reason": "the alias was moved", "ended_at": now}
    await connection.execute(update(rollouts).where(here).values(**ended))


def check_alias(alias: str) -> None:
    """Raises AliasInvalid."""
    if not NAME.fullmatch(alias):
        raise AliasInvalid(
            f"{alias[:80]!r} is not an alias: 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )


def _check(alias: str, shares: Sequence[tuple[int, int]]) -> None:
    check_alias(alias)
    if not 1 <= len(shares) <= MOST_SHARES:
        raise AliasInvalid(f"an alias stands for 1 to {MOST_SHARES} versions, not for {len(shares)}")
    if len({number for number, _ in shares}) != len(shares):
        raise AliasInvalid("each version is named once")
    if not all(1 <= weight <= MOST_WEIGHT for _, weight in shares):
        raise AliasInvalid(f"a weight is 1 to {MOST_WEIGHT}")


async def _check_count(connection: AsyncConnection, adapter_id: AdapterId) -> None:
    if (await connection.execute(_COUNT, {"adapter_id": adapter_id})).scalar_one() >= MOST_ALIASES:
        raise TooManyAliases(f"an adapter has at most {MOST_ALIASES} aliases: remove one first")


async def _adapter_id(connection: AsyncConnection, tenant_id: TenantId, name: str) -> AdapterId:
    row = await catalog.find_adapter(connection, tenant_id, name)
    if row is None:
        raise AdapterNotFound(name)
    return AdapterId(row.id)


async def _row(connection: AsyncConnection, adapter_id: AdapterId, alias: str) -> Row[Any] | None:
    return (await connection.execute(_ROW, {"adapter_id": adapter_id, "alias": alias})).one_or_none()


async def _shares(connection: AsyncConnection, adapter_id: AdapterId, row: Row[Any]) -> tuple[tuple[int, int], ...]:
    """Numbers and weights of what the alias in a `_row` stands for."""
    if not row.weight:
        return ((row.number, 1),)
    statement = (
        select(versions.c.number, alias_shares.c.weight)
        .join(versions, versions.c.id == alias_shares.c.version_id)
        .where(alias_shares.c.adapter_id == adapter_id, alias_shares.c.alias == row.name)
        .order_by(versions.c.number)
    )
    others = [(other.number, other.weight) for other in await connection.execute(statement)]
    return ((row.number, row.weight), *others)


async def _aliases(connection: AsyncConnection, adapter_id: AdapterId) -> tuple[Alias, ...]:
    rows = (await connection.execute(_ROWS, {"adapter_id": adapter_id})).all()
    return tuple([_alias(row, await _shares(connection, adapter_id, row)) for row in rows])


async def _one(connection: AsyncConnection, adapter_id: AdapterId, name: str, alias: str) -> Alias:
    row = await _row(connection, adapter_id, alias)
    if row is None:
        raise AliasNotFound(name, alias)
    return _alias(row, await _shares(connection, adapter_id, row))


def _alias(row: Row[Any], shares: tuple[tuple[int, int], ...]) -> Alias:
    return Alias(row.name, shares, Fallback(row.fallback), row.moved_at, row.rollout_id)


async def _last_move(connection: AsyncConnection, adapter_id: AdapterId, alias: str) -> Row[Any] | None:
    """The newest one that no rollback has gone past."""
    statement = (
        select(alias_moves)
        .where(alias_moves.c.adapter_id == adapter_id, alias_moves.c.alias == alias, alias_moves.c.undone == 0)
        .order_by(alias_moves.c.number.desc())
        .limit(1)
    )
    return (await connection.execute(statement)).one_or_none()


async def _mark_undone(connection: AsyncConnection, adapter_id: AdapterId, number: int) -> None:
    this = (alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.number == number)
    await connection.execute(update(alias_moves).where(this).values(undone=1))


async def _set_fallback(connection: AsyncConnection, adapter_id: AdapterId, alias: str, fallback: Fallback) -> None:
    here = (aliases.c.adapter_id == adapter_id) & (aliases.c.name == alias)
    await connection.execute(update(aliases).where(here).values(fallback=fallback.value))


def _move(row: Row[Any]) -> Move:
    before, after = (tuple((n, w) for n, w in json.loads(told)) for told in (row.before, row.after))
    return Move(row.number, row.alias, MoveKind(row.kind), row.moved_by, row.reason, before, after, row.at)
