"""Erasure with a receipt: what a tenant deletes, carried to its end everywhere, and the signed record of it.

Rows go first, in the transaction that makes the erasure; from its commit on nothing resolves to what is erased. Then
the blobs, then the replicas (device, host memory, disk) one by one, however long one is away; then the receipt is
signed. Each step may be repeated and taken up by any gateway: a crash at any point loses nothing.

Adapters are one kind of what is erased. Whoever keeps other things of tenants' as blobs (training files, what jobs have
made) removes their rows and calls `note_erasure` in the same transaction; versions among them go by `remove_versions`.

What a replica does is the gateway's to ask of it (`gateway/erasing.py`). What a receipt claims, and what it does not,
is in docs/api.md, *Erasure*.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    Row,
    Select,
    Table,
    Text,
    insert,
    select,
    update,
)

from adapter_store import aliases, catalog, grants
from adapter_store.aliases import NOUN as ADAPTER_NOUN
from adapter_store.blob_rows import unreferenced
from adapter_store.blobs import Blobs, blob_key
from adapter_store.catalog import Version, metadata, versions
from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import AdapterNotFound, ErasureNotFound, VersionInUse
from adapter_store.ids import AdapterId, TenantId, new_erasure_id
from adapter_store.scrub import forget
from adapter_store.signing import Kind, Signer, Statement
from adapter_store.transactions import reading, writing

NOUN = "erasure"

erasures = Table(
    "erasures",
    metadata,
    Column("id", Text, primary_key=True),  # in the order of time
    Column("tenant_id", Text, nullable=False),
    Column("adapter_id", Text, nullable=False),  # or of what it is; no foreign key: the row outlives it
    Column("adapter", Text, nullable=False),  # its name; empty for other things, which are known by their ids
    Column("number", Integer),  # null: the whole adapter
    Column("forced", Integer, nullable=False),
    Column("requested_by", Text),
    Column("requested_at", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("versions", Text, nullable=False),  # JSON: _ErasedVersion
    Column("aliases", Text, nullable=False),  # JSON: what became of those that pointed there
    Column("blobs", Text, nullable=False),  # JSON, once they are gone: sha256 → "erased" or "kept"
    Column("blobs_gone_at", BigInteger),
    Column("replicas_gone_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("signature", Text),  # the receipt, once completed
    Column("scope", Text),  # null: an adapter's or a version's
    Column("files", Text, nullable=False, server_default="[]"),  # JSON: ErasedBlob
    Index("ix_erasures_tenant_id_id", "tenant_id", "id"),
    Index("ix_erasures_state", "state"),
)
erasure_replicas = Table(  # every replica that was known when the erasure was asked for
    "erasure_replicas",
    metadata,
    Column("erasure_id", Text, ForeignKey("erasures.id", name="fk_erasure_replicas_erasure_id"), primary_key=True),
    Column("replica", Text, primary_key=True),
    Column("outcome", Text),  # null: it is still to be asked
    Column("engine_gone_at", BigInteger),
    Column("disk_gone_at", BigInteger),
    Column("confirmed_by", Text),  # an operator's key, where nobody can ask the replica any more
)


class State(StrEnum):
    """How far an erasure is; it only moves on, in this order."""

    REQUESTED = "requested"
    BLOBS_GONE = "blobs_gone"
    REPLICAS_GONE = "replicas_gone"
    COMPLETED = "completed"


class Outcome(StrEnum):
    """How a replica's share ended."""

    ERASED = "erased"
    PUBLISHED_AGAIN = "published_again"  # meanwhile, by the tenant itself: what is held is held for the new version
    VOUCHED = "vouched"  # an operator says so of a replica that will not be back


class Scope(StrEnum):
    """What is erased."""

    ADAPTER = "adapter"
    VERSION = "version"
    FILE = "file"
    JOB = "job"  # its row and story, and what it has made besides its result: checkpoints, files


@dataclass(frozen=True, slots=True)
class ErasedBlob:
    """A blob that a row named which is gone. `id`: the row's; `kind`: what it was for."""

    id: str
    kind: str
    sha256: str
    bytes: int

    def told(self, blobs: dict[str, str]) -> dict[str, Any]:
        return {**asdict(self), "blob": blobs.get(self.sha256, "pending")}


@dataclass(frozen=True, slots=True)
class ErasedVersion:
    """A version whose rows are gone; `kept`: another version of the tenant has the same content, which stays for it."""

    number: int
    digest: str
    config_sha256: str
    weights_sha256: str
    kept: bool

    def told(self, blobs: dict[str, str]) -> dict[str, Any]:
        files = (("adapter_config.json", self.config_sha256), ("adapter_model.safetensors", self.weights_sha256))
        return {
            "number": self.number,
            "digest": self.digest,
            "content": "kept" if self.kept else "erased",
            "files": [{"name": name, "sha256": sha256, "blob": blobs.get(sha256, "pending")} for name, sha256 in files],
        }


@dataclass(frozen=True, slots=True)
class ReplicaPart:
    """One replica's share, pending while it has no outcome. `engine_gone_at`: from the device and from host memory."""

    replica: str
    outcome: Outcome | None
    engine_gone_at: int | None
    disk_gone_at: int | None
    confirmed_by: str | None

    @property
    def gone_at(self) -> int:
        return max(self.engine_gone_at or 0, self.disk_gone_at or 0)


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure and how far it is. Times in Unix seconds."""

    id: str
    tenant_id: TenantId
    adapter_id: AdapterId
    adapter: str
    number: int | None
    forced: bool
    requested_by: str | None
    requested_at: int
    state: State
    versions: tuple[ErasedVersion, ...]
    aliases: tuple[dict[str, Any], ...]
    blobs: dict[str, str]
    blobs_gone_at: int | None
    replicas: tuple[ReplicaPart, ...]
    replicas_gone_at: int | None
    completed_at: int | None
    signature: str | None
    other: Scope | None = None  # what it is, where it is no adapter; its id is `adapter_id`
    files: tuple[ErasedBlob, ...] = ()

    @property
    def scope(self) -> Scope:
        return self.other or (Scope.ADAPTER if self.number is None else Scope.VERSION)

    @property
    def hashes(self) -> set[str]:
        """The blobs that go, unless something else of the tenant's has the same content."""
        of_versions = {sha256 for v in self.versions for sha256 in (v.config_sha256, v.weights_sha256)}
        return of_versions | {file.sha256 for file in self.files}

    @property
    def digests(self) -> list[str]:
        """What must leave the replicas."""
        return sorted({version.digest for version in self.versions if not version.kept})

    @property
    def pending(self) -> list[str]:
        """The replicas that have not confirmed."""
        return [part.replica for part in self.replicas if part.outcome is None]

    def statement(self) -> Statement:
        """What the receipt says; what is signed once everything is done."""
        return {
            "type": "tailor.erasure/1",
            "id": self.id,
            "tenant_id": self.tenant_id,
            **self._subject(),
            "scope": self.scope.value,
            "forced": self.forced,
            "requested_by": self.requested_by,
            "requested_at": self.requested_at,
            "rows_gone_at": self.requested_at,
            **self._shares(),
            "completed_at": self.completed_at,
        }

    def _subject(self) -> dict[str, Any]:
        if self.other is None:
            return {"adapter": self.adapter, "adapter_id": self.adapter_id}
        return {"subject": self.adapter_id, **({"adapter": self.adapter} if self.other is Scope.JOB else {})}

    def _shares(self) -> dict[str, Any]:
        """What went where, by the scope: an adapter's versions are in replicas, files in none, a job has made both."""
        versions = {"versions": [version.told(self.blobs) for version in self.versions]}
        files = {"files": [file.told(self.blobs) for file in self.files]}
        blobs = {"blobs_gone_at": self.blobs_gone_at}
        replicas = {
            "replicas": [_told_replica(part) for part in self.replicas],
            "prefix_cache_unreachable_at": self.replicas_gone_at,
        }
        match self.other:
            case None:
                return versions | {"aliases": list(self.aliases)} | blobs | replicas
            case Scope.JOB:
                return versions | files | blobs | replicas
            case _:
                return files | blobs


def _told_replica(part: ReplicaPart) -> dict[str, Any]:
    return {
        "replica": part.replica,
        "outcome": part.outcome.value if part.outcome is not None else "pending",
        "device_gone_at": part.engine_gone_at,
        "host_gone_at": part.engine_gone_at,
        "disk_gone_at": part.disk_gone_at,
        "confirmed_by": part.confirmed_by,
    }


class Erasures:
    """The erasures of all tenants, and their steps. Every call of a tenant's names the tenant."""

    def __init__(
        self, engine: AsyncEngine, blobs: Blobs, signer: Signer | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._signer = signer
        self._clock = clock

    async def request(
        self,
        tenant_id: TenantId,
        name: str,
        number: int | None = None,
        *,
        requested_by: str | None = None,
        force: bool = False,
        running: int = 0,
        replicas: Iterable[str] = (),
    ) -> Erasure:
        """Removes the rows of one version, or of the whole adapter, and notes what is still to be done.

        `running` requests are on it just now. `replicas`: those that may hold it.

        With `force` a version goes though aliases stand for it (`aliases.take_off`), and the adapter with its last one.

        Raises AdapterNotFound, VersionInUse, StorageFull, StorageUnavailable.
        """
        async with writing(self._engine) as connection:
            await record_change(connection, ADAPTER_NOUN, tenant_id, name)
            row = await catalog.find_adapter(connection, tenant_id, name)
            found = await catalog.list_versions(connection, tenant_id, name)
            gone = [version for version in found if number in (None, version.number)]
            if row is None or not gone:
                raise AdapterNotFound(name if number is None else f"{name}@{number}")
            now = int(self._clock())
            moved: list[dict[str, Any]] = []
            if number is not None:
                left = [version for version in found if version.number != number]
                by = requested_by or ""
                moved = await _free(connection, gone[0], left, running=running, force=force, by=by, now=now)
            elif running and not force:
                raise VersionInUse(name, None, [], running)
            erased = await remove_versions(connection, found, gone)
            told = {
                "adapter_id": row.id,
                "adapter": name,
                "number": number,
                "forced": int(force),
                "requested_by": requested_by,
                "versions": json.dumps(erased),
                "aliases": json.dumps(moved),
            }
            return await _note(connection, tenant_id, now, told, replicas)

    # reading

    async def leaving(self, tenant_id: TenantId, name: str, number: int | None = None) -> list[str]:
        """The digests that would leave the replicas with the version, or with the adapter. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            found = await catalog.list_versions(connection, tenant_id, name)
            gone = [version for version in found if number in (None, version.number)]
            if not gone:
                raise AdapterNotFound(name if number is None else f"{name}@{number}")
            return await leaving(connection, tenant_id, gone)

    async def find(self, tenant_id: TenantId | None, erasure_id: str) -> Erasure:
        """One of the tenant's; `tenant_id` None: whosever. Raises ErasureNotFound."""
        statement = select(erasures).where(erasures.c.id == erasure_id)
        if tenant_id is not None:
            statement = statement.where(erasures.c.tenant_id == tenant_id)
        async with reading(self._engine) as connection:
            found = await _read(connection, statement)
        if not found:
            raise ErasureNotFound(erasure_id)
        return found[0]

    async def page(self, tenant_id: TenantId | None, after: str | None, limit: int) -> Sequence[Erasure]:
        """The tenant's, the oldest first; the next page starts `after` the last id of this one."""
        statement = select(erasures).order_by(erasures.c.id).limit(limit)
        if tenant_id is not None:
            statement = statement.where(erasures.c.tenant_id == tenant_id)
        if after is not None:
            statement = statement.where(erasures.c.id > after)
        async with reading(self._engine) as connection:
            return await _read(connection, statement)

    async def unfinished(self, after: str = "", limit: int = 100) -> Sequence[Erasure]:
        """Those that are not completed, the oldest first."""
        statement = (
            select(erasures)
            .where(erasures.c.state != State.COMPLETED.value, erasures.c.id > after)
            .order_by(erasures.c.id)
            .limit(limit)
        )
        async with reading(self._engine) as connection:
            return await _read(connection, statement)

    async def published_again(self, tenant_id: TenantId, digests: Collection[str]) -> set[str]:
        """Those of the digests that a version of the tenant has (again): they are not to leave the replicas."""
        statement = select(versions.c.digest).where(versions.c.tenant_id == tenant_id, versions.c.digest.in_(digests))
        async with reading(self._engine) as connection:
            return set((await connection.execute(statement)).scalars())

    async def on_disk_for_others(self, tenant_id: TenantId, digests: Collection[str]) -> set[str]:
        """Those of the digests whose folder on a replica's disk may be there for another tenant's same bytes."""
        statement = select(versions.c.digest).where(versions.c.tenant_id != tenant_id, versions.c.digest.in_(digests))
        async with reading(self._engine) as connection:
            return set((await connection.execute(statement)).scalars())

    # the steps

    async def drop_blobs(self, erasure: Erasure) -> None:
        """Removes the files that nothing of the tenant's has any more. Raises StorageUnavailable."""
        hashes = erasure.hashes
        async with writing(self._engine) as connection:
            await take_turn(connection)
            loose = await unreferenced(connection, erasure.tenant_id, hashes)
            await forget(connection, erasure.tenant_id, loose)
            for sha256 in loose:
                await self._blobs.delete(blob_key(erasure.tenant_id, sha256))
            told = {sha256: "erased" if sha256 in loose else "kept" for sha256 in sorted(hashes)}
            await _move(
                connection,
                erasure.id,
                State.REQUESTED,
                State.BLOBS_GONE,
                blobs=json.dumps(told),
                blobs_gone_at=int(self._clock()),
            )

    async def confirm(self, erasure_id: str, part: ReplicaPart) -> bool:
        """A replica holds nothing of it any more; False where that was known, or the replica has no share in it."""
        here = (erasure_replicas.c.erasure_id == erasure_id) & (erasure_replicas.c.replica == part.replica)
        values = {
            "outcome": part.outcome,
            "engine_gone_at": part.engine_gone_at,
            "disk_gone_at": part.disk_gone_at,
            "confirmed_by": part.confirmed_by,
        }
        async with writing(self._engine) as connection:
            statement = update(erasure_replicas).where(here, erasure_replicas.c.outcome.is_(None)).values(values)
            return bool((await connection.execute(statement)).rowcount)

    async def complete(self, erasure_id: str) -> Erasure:
        """Signs the receipt where nothing is pending; the erasure as it is then. Raises ErasureNotFound."""
        if self._signer is not None:
            await self._signer.ready()
        async with writing(self._engine) as connection:
            await take_turn(connection)
            by_id = select(erasures).where(erasures.c.id == erasure_id)
            erasure = next(iter(await _read(connection, by_id)), None)
            if erasure is None:
                raise ErasureNotFound(erasure_id)
            if erasure.state is State.BLOBS_GONE and not erasure.pending:
                now = int(self._clock())
                last = max((part.gone_at for part in erasure.replicas), default=now)
                await _move(connection, erasure_id, State.BLOBS_GONE, State.REPLICAS_GONE, replicas_gone_at=last)
                await _move(connection, erasure_id, State.REPLICAS_GONE, State.COMPLETED, completed_at=now)
                (erasure,) = await _read(connection, by_id)
                if self._signer is not None:
                    signature = self._signer.sign(Kind.ERASURE, erasure.statement())
                    signed = update(erasures).where(erasures.c.id == erasure_id).values(signature=signature)
                    await connection.execute(signed)
                await record_change(connection, NOUN, erasure.tenant_id, erasure_id)
                (erasure,) = await _read(connection, by_id)
            return erasure


async def leaving(connection: AsyncConnection, tenant_id: TenantId, gone: Collection[Version]) -> list[str]:
    """The digests that leave the replicas with these versions: no other version of the tenant's has them."""
    digests = {version.digest for version in gone}
    others = versions.c.id.not_in([version.id for version in gone])
    statement = select(versions.c.digest).where(
        versions.c.tenant_id == tenant_id, versions.c.digest.in_(digests), others
    )
    return sorted(digests - set((await connection.execute(statement)).scalars()))


async def note_erasure(
    connection: AsyncConnection,
    tenant_id: TenantId,
    scope: Scope,
    subject: str,
    blobs: Sequence[ErasedBlob],
    *,
    requested_by: str | None,
    forced: bool,
    now: int,
    adapter: str = "",
    erased: Sequence[dict[str, Any]] = (),
    replicas: Iterable[str] = (),
) -> Erasure:
    """Notes that these blobs are to go, in the transaction that removes the rows which named them.

    The caller holds the writers' turn. `subject`: the id of what is erased, by which the receipt names it. `erased`:
    versions of `adapter` that went with it, as `remove_versions` tells them, and which `replicas` may hold.
    """
    told = {
        "adapter_id": subject,
        "adapter": adapter,
        "forced": int(forced),
        "requested_by": requested_by,
        "versions": json.dumps(erased),
        "aliases": "[]",
        "scope": scope.value,
        "files": json.dumps([asdict(blob) for blob in blobs]),
    }
    return await _note(connection, tenant_id, now, told, replicas)


async def remove_versions(
    connection: AsyncConnection, found: Sequence[Version], gone: Sequence[Version]
) -> list[dict[str, Any]]:
    """Removes the rows of some of an adapter's versions, with the last of them the adapter; as an erasure keeps them.

    `found` are all that the adapter has. The caller has taken the aliases off those that go, where others stay.
    """
    if not gone:
        return []
    await grants.tell_holders(connection, [version.id for version in gone])
    if len(gone) == len(found):
        await catalog.delete_adapter(connection, gone[0].adapter_id)
    else:
        for version in gone:
            await catalog.delete_version(connection, version.id)
    return await _erased(connection, gone[0].tenant_id, gone)


async def _note(
    connection: AsyncConnection, tenant_id: TenantId, now: int, told: dict[str, Any], replicas: Iterable[str]
) -> Erasure:
    """A new erasure, which these replicas are to confirm."""
    erasure_id = new_erasure_id(now)
    begun = {"requested_at": now, "state": State.REQUESTED.value, "blobs": "{}"}
    await connection.execute(insert(erasures).values({"id": erasure_id, "tenant_id": tenant_id, **begun, **told}))
    parts = [{"erasure_id": erasure_id, "replica": replica} for replica in sorted(set(replicas))]
    if parts:
        await connection.execute(insert(erasure_replicas), parts)
    await record_change(connection, NOUN, tenant_id, erasure_id)
    return (await _read(connection, select(erasures).where(erasures.c.id == erasure_id)))[0]


async def _free(
    connection: AsyncConnection,
    version: Version,
    left: Sequence[Version],
    *,
    running: int,
    force: bool,
    by: str,
    now: int,
) -> list[dict[str, Any]]:
    """Takes the aliases off a version that goes; what became of each. Raises VersionInUse without `force`."""
    names = [alias.name for alias in await aliases.standing_for(connection, version)]
    if (names or running) and not force:
        raise VersionInUse(version.adapter_name, version.number, names, running)
    moved = await aliases.take_off(connection, version, left, by, now)
    return [{"alias": alias, "now": list(numbers)} for alias, numbers in moved]


async def _erased(connection: AsyncConnection, tenant_id: TenantId, gone: Sequence[Version]) -> list[dict[str, Any]]:
    """The versions whose rows are gone, as the erasure keeps them."""
    statement = select(versions.c.digest).where(
        versions.c.tenant_id == tenant_id, versions.c.digest.in_([version.digest for version in gone])
    )
    kept = set((await connection.execute(statement)).scalars())
    return [
        {
            "number": version.number,
            "digest": version.digest,
            "config_sha256": version.files[0].sha256,
            "weights_sha256": version.files[1].sha256,
            "kept": version.digest in kept,
        }
        for version in sorted(gone, key=lambda version: version.number)
    ]


async def _move(connection: AsyncConnection, erasure_id: str, before: State, after: State, **values: Any) -> None:
    """One step on; nothing where another gateway has taken it."""
    here = (erasures.c.id == erasure_id) & (erasures.c.state == before.value)
    await connection.execute(update(erasures).where(here).values(state=after.value, **values))


async def _read(connection: AsyncConnection, statement: Select[Any]) -> list[Erasure]:
    rows = (await connection.execute(statement)).all()
    ids = [row.id for row in rows]
    parts: dict[str, list[ReplicaPart]] = {erasure_id: [] for erasure_id in ids}
    found = select(erasure_replicas).where(erasure_replicas.c.erasure_id.in_(ids)).order_by(erasure_replicas.c.replica)
    for part in await connection.execute(found):
        parts[part.erasure_id].append(_part(part))
    return [_erasure(row, parts[row.id]) for row in rows]


def _part(row: Row[Any]) -> ReplicaPart:
    outcome = Outcome(row.outcome) if row.outcome is not None else None
    return ReplicaPart(row.replica, outcome, row.engine_gone_at, row.disk_gone_at, row.confirmed_by)


def _erasure(row: Row[Any], replicas: Sequence[ReplicaPart]) -> Erasure:
    return Erasure(
        id=row.id,
        tenant_id=TenantId(row.tenant_id),
        adapter_id=AdapterId(row.adapter_id),
        adapter=row.adapter,
        number=row.number,
        forced=bool(row.forced),
        requested_by=row.requested_by,
        requested_at=row.requested_at,
        state=State(row.state),
        versions=tuple(ErasedVersion(**version) for version in json.loads(row.versions)),
        aliases=tuple(json.loads(row.aliases)),
        blobs=json.loads(row.blobs),
        blobs_gone_at=row.blobs_gone_at,
        replicas=tuple(replicas),
        replicas_gone_at=row.replicas_gone_at,
        completed_at=row.completed_at,
        signature=row.signature,
        other=None if row.scope is None else Scope(row.scope),
        files=tuple(ErasedBlob(**file) for file in json.loads(row.files)),
    )
