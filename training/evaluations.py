"""What was found of a version before it was published: its report lies beside it, and goes with it. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Column, ForeignKey, Table, Text, bindparam, insert, select

from adapter_store.catalog import metadata
from adapter_store.engine import AsyncConnection
from adapter_store.ids import VersionId

evaluations = Table(
    "evaluations",
    metadata,
    Column(
        "version_id",
        Text,
        ForeignKey("versions.id", name="fk_evaluations_version_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("report", Text, nullable=False),  # JSON
)
_REPORT: Final = select(evaluations.c.report).where(evaluations.c.version_id == bindparam("version_id"))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An adapter's folder; its `report` and the `figures` for its job's metrics, where it was evaluated."""

    adapter: Path
    report: Mapping[str, Any] | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)


async def keep(connection: AsyncConnection, version_id: VersionId, report: Mapping[str, Any]) -> None:
    """The first that is told of a version stays, for its content is always the same."""
    if await of(connection, version_id) is None:
        row = {"version_id": version_id, "report": json.dumps(report, allow_nan=False)}
        await connection.execute(insert(evaluations), row)


async def of(connection: AsyncConnection, version_id: VersionId) -> dict[str, Any] | None:
    found = (await connection.execute(_REPORT, {"version_id": version_id})).scalar_one_or_none()
    return None if found is None else json.loads(found)
