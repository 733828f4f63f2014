"""Scaled versions: what `bot@3*0.7` stands for is version 3 with what it adds to the base times 0.7, exactly.

An engine multiplies an adapter's product B·A by alpha over a function of the rank. So the scaled version has the same
weights, one blob for both, and another alpha; it is published, inspected and proved as any other. A factor between 0
and 1 is WiSE-FT's interpolation (https://arxiv.org/abs/2109.01903) between the base and the adapted model.
"""

import json
import re
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Column, ForeignKey, Index, Integer, Table, Text, bindparam, insert, select

from adapter_store.blobs import Blobs
from adapter_store.bundle import StagedBundle
from adapter_store.catalog import OF_TENANT, Version, find_by_number, metadata, select_versions, version_of
from adapter_store.catalog import versions as versions_table
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterNotFound, FactorInvalid
from adapter_store.ids import TenantId, VersionId

PARTS: Final = 10_000
"""A factor is kept as a whole number of these, so that 0.7 and 0.70 are one."""
MOST: Final = 2 * PARTS
FACTOR: Final = r"[0-2](?:\.[0-9]{1,4})?"
SCALED: Final = re.compile(rf"(?P<number>[1-9][0-9]{{0,8}})\*(?P<factor>{FACTOR})")
_FACTOR: Final = re.compile(FACTOR)

scalings = Table(  # the number of what was scaled, not its id: it may be erased, and its number is never given again
    "scalings",
    metadata,
    Column("adapter_id", Text, ForeignKey("adapters.id", name="fk_scalings_adapter_id"), primary_key=True),
    Column("source", Integer, primary_key=True, autoincrement=False),
    Column("factor", Integer, primary_key=True, autoincrement=False),
    Column("version_id", Text, ForeignKey("versions.id", name="fk_scalings_version_id"), nullable=False),
    Index("ix_scalings_version_id", "version_id"),
)
_FOUND: Final = (
    select_versions()
    .join(scalings, scalings.c.version_id == versions_table.c.id)
    .where(OF_TENANT, scalings.c.source == bindparam("source"), scalings.c.factor == bindparam("factor"))
)
_NOTED: Final = select(scalings.c.version_id).where(
    scalings.c.adapter_id == bindparam("adapter_id"),
    scalings.c.source == bindparam("source"),
    scalings.c.factor == bindparam("factor"),
)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Which version of the same adapter was scaled, and by how many ten-thousandths."""

    source: int
    factor: int

    def __str__(self) -> str:
        return f"{self.source}*{spelled(self.factor)}"


def read_factor(text: str) -> int:
    """In ten-thousandths. Raises FactorInvalid."""
    factor = _parts(text) if _FACTOR.fullmatch(text) else 0
    if not 0 < factor <= MOST:
        raise FactorInvalid(f"{text[:40]!r} is not a factor: a number above 0, at most 2, of at most 4 decimals")
    return factor


def read_scaling(text: str) -> Scaling | None:
    """`3*0.7`; None where it is not spelled so."""
    found = SCALED.fullmatch(text)
    if found is None or not 0 < _parts(found["factor"]) <= MOST:
        return None
    return Scaling(int(found["number"]), _parts(found["factor"]))


def spelled(factor: int) -> str:
    """The shortest way."""
    whole, part = divmod(factor, PARTS)
    return f"{whole}.{part:04}".rstrip("0").rstrip(".")


def _parts(text: str) -> int:
    whole, _, part = text.partition(".")
    return int(whole) * PARTS + int(part.ljust(4, "0"))


async def find(connection: AsyncConnection, tenant_id: TenantId, name: str, scaling: Scaling) -> Version | None:
    """The version that was made so; that of factor 1 is the source itself."""
    if scaling.factor == PARTS:
        return await find_by_number(connection, tenant_id, name, scaling.source)
    asked = {"tenant_id": tenant_id, "name": name, "source": scaling.source, "factor": scaling.factor}
    row = (await connection.execute(_FOUND, asked)).one_or_none()
    return None if row is None else version_of(row)


async def note(connection: AsyncConnection, scaling: Scaling, version: Version) -> None:
    """Says how the version came about, within the transaction that publishes it.

    Raises AdapterNotFound: what was scaled has been erased meanwhile.
    """
    source = await find_by_number(connection, version.tenant_id, version.adapter_name, scaling.source)
    if source is None:
        raise AdapterNotFound(f"{version.adapter_name}@{scaling.source}")
    key = {"adapter_id": version.adapter_id, "source": scaling.source, "factor": scaling.factor}
    if scaling.factor == PARTS or (await connection.execute(_NOTED, key)).one_or_none() is not None:
        return
    await connection.execute(insert(scalings), {**key, "version_id": version.id})


async def of(connection: AsyncConnection, version_ids: Collection[VersionId]) -> dict[VersionId, Scaling]:
    """How those of the versions that are scaled ones came about; the first way, where there were several."""
    query = (
        select(scalings)
        .where(scalings.c.version_id.in_(version_ids))
        .order_by(scalings.c.source.desc(), scalings.c.factor.desc())
    )
    rows = (await connection.execute(query)).all()
    return {VersionId(row.version_id): Scaling(row.source, row.factor) for row in rows}


async def stage(blobs: Blobs, source: Version, factor: int, bundle: StagedBundle) -> None:
    """The two files of the scaled version: the weights as they are, the config with another alpha.

    Raises BlobCorrupt, StorageError.
    """
    config, weights = source.files
    async with blobs.read(config.key) as pieces:
        content = b"".join([piece async for piece in pieces])
    await bundle.write(config.name, _one(scaled_config(content, factor)))
    async with blobs.read(weights.key) as pieces:
        await bundle.write(weights.name, pieces)


def scaled_config(content: bytes, factor: int) -> bytes:
    """The canonical config with each alpha times the factor."""
    config: dict[str, Any] = json.loads(content)
    config["lora_alpha"] = config["lora_alpha"] * factor / PARTS
    config["alpha_pattern"] = dict(_scaled(config.get("alpha_pattern", {}).items(), factor))
    return json.dumps(config).encode()


def _scaled(alphas: Iterable[tuple[str, float]], factor: int) -> Iterable[tuple[str, float]]:
    return ((module, alpha * factor / PARTS) for module, alpha in alphas)


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content
