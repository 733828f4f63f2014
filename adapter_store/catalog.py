"""Adapters, versions and aliases as rows. Every statement asks for the tenant inside the query.

Times are whole seconds since 1970, UTC. Versions are never updated; an alias is what moves.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from sys import intern
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    delete,
    insert,
    or_,
    select,
    update,
)

from adapter_store.blobs import blob_key, names_blob
from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.engine import AsyncConnection
from adapter_store.ids import AdapterId, TenantId, VersionId, new_adapter_id

DEFAULT_ALIAS = "default"

metadata = MetaData()
adapters = Table(
    "adapters",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("last_number", Integer, nullable=False, server_default="0"),  # of a version, there or erased
    UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_id_name"),
)
versions = Table(
    "versions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("adapter_id", Text, ForeignKey("adapters.id", name="fk_versions_adapter_id"), nullable=False),
    Column("tenant_id", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("config_sha256", Text, nullable=False, info=names_blob("config_bytes")),
    Column("config_bytes", BigInteger, nullable=False),
    Column("weights_sha256", Text, nullable=False, info=names_blob("weights_bytes")),
    Column("weights_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("modules", Text, nullable=False),  # JSON list of names
    Column("base_fingerprint", Text, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("published_by", Text),  # id of the key; null: published before that was kept
    UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
    UniqueConstraint("adapter_id", "digest", name="uq_versions_adapter_id_digest"),
    Index("ix_versions_tenant_id_config_sha256", "tenant_id", "config_sha256"),
    Index("ix_versions_tenant_id_weights_sha256", "tenant_id", "weights_sha256"),
)
aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapters.id", name="fk_aliases_adapter_id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("version_id", Text, ForeignKey("versions.id", name="fk_aliases_version_id"), nullable=False),
    Column("moved_at", BigInteger, nullable=False),
    Column("fallback", Text, nullable=False, server_default="fail"),  # who answers where the version cannot
    Column(
        "weight", Integer, nullable=False, server_default="0"
    ),  # of `version_id` beside `alias_shares`; 0: it is alone
    Column("rollout_id", Text),  # the rollout that is under way
)
alias_shares = Table(  # what answers to an alias beside its own version, until it stands for one alone
    "alias_shares",
    metadata,
    Column("adapter_id", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version_id", Text, ForeignKey("versions.id", name="fk_alias_shares_version_id"), primary_key=True),
    Column("weight", Integer, nullable=False),
    ForeignKeyConstraint(["adapter_id", "alias"], ["aliases.adapter_id", "aliases.name"], name="fk_alias_shares_alias"),
)
alias_moves = Table(  # who moved what when; versions by number, as JSON: [[number, weight], …]
    "alias_moves",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapters.id", name="fk_alias_moves_adapter_id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("alias", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("moved_by", Text, nullable=False),  # a key's id; empty: Tailor itself
    Column("reason", Text, nullable=False),
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("undone", Integer, nullable=False),  # 1: a rollback has gone past it
    Column("at", BigInteger, nullable=False),
)
rollouts = Table(  # an alias on its way to another version, step by step
    "rollouts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("adapter_id", Text, ForeignKey("adapters.id", name="fk_rollouts_adapter_id"), nullable=False),
    Column("alias", Text, nullable=False),
    Column("baseline_id", Text, nullable=False),  # no foreign keys: what has ended outlives its versions
    Column("baseline", Integer, nullable=False),
    Column("candidate_id", Text, nullable=False),
    Column("candidate", Integer, nullable=False),
    Column("policy", Text, nullable=False),  # JSON
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("step_at", BigInteger, nullable=False),
    Column("step_requests", BigInteger, nullable=False),  # the candidate's before this step
    Column("started_by", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Index("ix_rollouts_adapter_id", "adapter_id"),
    Index("ix_rollouts_status", "status"),
)
rollout_counts = Table(  # what each gateway has seen of a rollout's two versions, JSON
    "rollout_counts",
    metadata,
    Column("rollout_id", Text, ForeignKey("rollouts.id", name="fk_rollout_counts_rollout_id"), primary_key=True),
    Column("version_id", Text, primary_key=True),
    Column("gateway", Text, primary_key=True),
    Column("tally", Text, nullable=False),
)


class Provenance(StrEnum):
    """How a version came to be."""

    UPLOAD = "upload"
    IMPORT = "import"
    JOB = "job"
    SCALED = "scaled"


class Fallback(StrEnum):
    """Who answers, flagged, where the version that an alias points to cannot."""

    FAIL = "fail"
    BASE = "base"
    PREVIOUS = "previous"


@dataclass(frozen=True, slots=True)
class BlobFile:
    """One file of a bundle: `key` is where its bytes lie in the blob store."""

    name: str
    key: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable set of weights; `digest` names its content.

    Compact, because gateways keep 100,000 of them: the two files are 64 bytes of hashes and two sizes, spelled out
    only when `files` is asked for. `fallback` and `rollout` are the alias's by which the version was found: `fail`
    where it was found by number, None where no rollout is under way.
    """

    id: VersionId
    adapter_id: AdapterId
    tenant_id: TenantId
    adapter_name: str
    number: int
    digest: str
    file_hashes: bytes  # SHA-256 of the config, then of the weights
    config_bytes: int
    weights_bytes: int
    rank: int
    modules: tuple[str, ...]
    base_fingerprint: str
    provenance: Provenance
    created_at: int
    fallback: Fallback = Fallback.FAIL
    rollout: str | None = None
    published_by: str | None = None  # a key's id

    @property
    def files(self) -> tuple[BlobFile, BlobFile]:
        """Config and weights."""
        return (
            self._file(CONFIG_FILE, self.file_hashes[:32], self.config_bytes),
            self._file(WEIGHTS_FILE, self.file_hashes[32:], self.weights_bytes),
        )

    def _file(self, name: str, sha256: bytes, size_bytes: int) -> BlobFile:
        return BlobFile(name, blob_key(self.tenant_id, sha256.hex()), sha256.hex(), size_bytes)

    @property
    def size_bytes(self) -> int:
        return self.config_bytes + self.weights_bytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """A tenant's name for weights; `default` is the version that answers to it."""

    id: AdapterId
    tenant_id: TenantId
    name: str
    created_at: int
    default: Version


def select_versions() -> Select[Any]:
    """Versions with their adapter's name: what `version_of` reads."""
    return select(versions, adapters.c.name).join(adapters, versions.c.adapter_id == adapters.c.id)


OF_TENANT: Final = (adapters.c.tenant_id == bindparam("tenant_id")) & (adapters.c.name == bindparam("name"))
# Built once: building a statement costs ten times what running it does.
_BY_NUMBER: Final = select_versions().where(OF_TENANT, versions.c.number == bindparam("number"))
_BY_DIGEST: Final = select_versions().where(OF_TENANT, versions.c.digest == bindparam("digest"))
_ADAPTER: Final = select(adapters.c.id, adapters.c.created_at).where(OF_TENANT)
_NEW_ADAPTER: Final = insert(adapters)
_NEW_VERSION: Final = insert(versions)
_TAKE_NUMBER: Final = (
    update(adapters)
    .where(adapters.c.id == bindparam("adapter_id"))
    .values(last_number=adapters.c.last_number + 1)
    .returning(adapters.c.last_number)
)


def version_of(row: Row[Any], fallback: str = Fallback.FAIL, rollout: str | None = None) -> Version:
    """The version in a row of `select_versions`."""
    return Version(
        id=row.id,
        adapter_id=row.adapter_id,
        tenant_id=TenantId(intern(row.tenant_id)),
        adapter_name=row.name,
        number=row.number,
        digest=row.digest,
        file_hashes=bytes.fromhex(row.config_sha256 + row.weights_sha256),
        config_bytes=row.config_bytes,
        weights_bytes=row.weights_bytes,
        rank=row.rank,
        modules=_modules(row.modules),
        base_fingerprint=intern(row.base_fingerprint),
        provenance=Provenance(row.provenance),
        created_at=row.created_at,
        fallback=Fallback(fallback),
        rollout=rollout,
        published_by=row.published_by and intern(row.published_by),
    )


@lru_cache(maxsize=1024)
def _modules(encoded: str) -> tuple[str, ...]:
    """One tuple for all versions that adapt the same modules."""
    return tuple(intern(name) for name in json.loads(encoded))


async def find_by_number(connection: AsyncConnection, tenant_id: TenantId, name: str, number: int) -> Version | None:
    asked = {"tenant_id": tenant_id, "name": name, "number": number}
    row = (await connection.execute(_BY_NUMBER, asked)).one_or_none()
    return None if row is None else version_of(row)


async def find_by_id(connection: AsyncConnection, tenant_id: TenantId, name: str, hex_id: str) -> Version | None:
    """The version whose id ends in these hex digits."""
    statement = select_versions().where(
        adapters.c.tenant_id == tenant_id, adapters.c.name == name, versions.c.id == f"ver_{hex_id}"
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else version_of(row)


async def find_previous(connection: AsyncConnection, version: Version) -> Version | None:
    """The newest older version of the same adapter that was made for the same base model."""
    statement = (
        select_versions()
        .where(
            versions.c.tenant_id == version.tenant_id,
            versions.c.adapter_id == version.adapter_id,
            versions.c.number < version.number,
            versions.c.base_fingerprint == version.base_fingerprint,
        )
        .order_by(versions.c.number.desc())
        .limit(1)
    )
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else version_of(row)


async def find_by_digest(connection: AsyncConnection, tenant_id: TenantId, name: str, digest: str) -> Version | None:
    asked = {"tenant_id": tenant_id, "name": name, "digest": digest}
    row = (await connection.execute(_BY_DIGEST, asked)).one_or_none()
    return None if row is None else version_of(row)


async def list_adapters(
    connection: AsyncConnection, tenant_id: TenantId, after: str | None, limit: int
) -> tuple[Adapter, ...]:
    """The tenant's adapters by name, those that come after `after`."""
    statement = (
        select_versions()
        .add_columns(adapters.c.created_at.label("adapter_created_at"), aliases.c.fallback)
        .join(aliases, (aliases.c.adapter_id == adapters.c.id) & (aliases.c.version_id == versions.c.id))
        .where(adapters.c.tenant_id == tenant_id, aliases.c.name == DEFAULT_ALIAS)
        .order_by(adapters.c.name)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(adapters.c.name > after)
    return tuple(_adapter(row) for row in await connection.execute(statement))


def _adapter(row: Row[Any]) -> Adapter:
    return Adapter(row.adapter_id, row.tenant_id, row.name, row.adapter_created_at, version_of(row, row.fallback))


async def list_versions(
    connection: AsyncConnection, tenant_id: TenantId, name: str, before: int | None = None, limit: int | None = None
) -> tuple[Version, ...]:
    """Newest first, those whose number is below `before`."""
    statement = (
        select_versions()
        .where(adapters.c.tenant_id == tenant_id, adapters.c.name == name)
        .order_by(versions.c.number.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(versions.c.number < before)
    return tuple(version_of(row) for row in await connection.execute(statement))


async def find_adapter(connection: AsyncConnection, tenant_id: TenantId, name: str) -> Row[Any, Any] | None:
    """(id, created_at)"""
    return (await connection.execute(_ADAPTER, {"tenant_id": tenant_id, "name": name})).one_or_none()


async def ensure_adapter(connection: AsyncConnection, tenant_id: TenantId, name: str, now: int) -> AdapterId:
    """The adapter's id, made where there was none. The caller holds the writers' turn."""
    row = await find_adapter(connection, tenant_id, name)
    if row is not None:
        return AdapterId(row.id)
    adapter_id = new_adapter_id()
    new = {"id": adapter_id, "tenant_id": tenant_id, "name": name, "created_at": now}
    await connection.execute(_NEW_ADAPTER, new)
    return adapter_id


async def take_number(connection: AsyncConnection, adapter_id: AdapterId) -> int:
    """The adapter's next version number; none is given twice, though versions are erased."""
    return int((await connection.execute(_TAKE_NUMBER, {"adapter_id": adapter_id})).scalar_one())


async def insert_version(connection: AsyncConnection, version: Version) -> None:
    hashes = version.file_hashes
    row = {
        "id": version.id,
        "adapter_id": version.adapter_id,
        "tenant_id": version.tenant_id,
        "number": version.number,
        "digest": version.digest,
        "config_sha256": hashes[:32].hex(),
        "config_bytes": version.config_bytes,
        "weights_sha256": hashes[32:].hex(),
        "weights_bytes": version.weights_bytes,
        "rank": version.rank,
        "modules": json.dumps(version.modules),
        "base_fingerprint": version.base_fingerprint,
        "provenance": version.provenance,
        "created_at": version.created_at,
        "published_by": version.published_by,
    }
    await connection.execute(_NEW_VERSION, row)


async def delete_adapter(connection: AsyncConnection, adapter_id: AdapterId) -> None:
    """With every row of every table that refers to it or to one of its versions."""
    await _delete_with_references(connection, adapters, adapters.c.id == adapter_id)


async def delete_version(connection: AsyncConnection, version_id: VersionId) -> None:
    """With every row of every table that refers to it: an alias too, where the caller has not moved it."""
    await _delete_with_references(connection, versions, versions.c.id == version_id)


async def _delete_with_references(connection: AsyncConnection, table: Table, where: ColumnElement[bool]) -> None:
    doomed = {table: where}
    for other in metadata.sorted_tables:  # what is referred to comes before what refers to it
        parts = [
            column.in_(select(key.elements[0].column).where(doomed[key.referred_table]))
            for key in other.foreign_key_constraints
            for column in key.columns
            if len(key.columns) == 1 and key.referred_table in doomed
        ]
        if parts:
            doomed[other] = or_(*parts)
    for other in reversed(metadata.sorted_tables):
        if other in doomed:
            await connection.execute(delete(other).where(doomed[other]))
