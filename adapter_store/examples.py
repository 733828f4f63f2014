"""A tenant's examples of good answers, and how likely each version finds them.

Errors and latency say nothing about an adapter that was trained on garbage: it answers, and quickly. What it makes of
its own tenant's examples does. Rows and the comparison; `gateway/proofs.py` asks the engine.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Table, Text, delete, insert, select

from adapter_store.catalog import metadata, versions
from adapter_store.engine import AsyncConnection
from adapter_store.errors import PromptsInvalid
from adapter_store.ids import AdapterId, VersionId
from adapter_store.proofs import is_text

MOST_EXAMPLES = 8
MOST_TEXT_BYTES = 4_096  # of a prompt, and of an answer
WORSE = 0.5
"""Nats per token: an answer of ten tokens is then 150 times less likely than by the version before."""
SCORED_ANEW = 10
"""Versions, the newest, whose score is asked for again where the examples change."""


class Example(msgspec.Struct, frozen=True):
    """What a user says, and a good answer to it."""

    prompt: str
    answer: str


examples = Table(
    "examples",
    metadata,
    Column(
        "adapter_id",
        Text,
        ForeignKey("adapters.id", name="fk_examples_adapter_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("examples", Text, nullable=False),  # JSON
    Column("changed_at", BigInteger, nullable=False),
)
scores = Table(
    "scores",
    metadata,
    Column(
        "version_id",
        Text,
        ForeignKey("versions.id", name="fk_scores_version_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("digest", Text, nullable=False),  # of the examples that it is of; " without 1,3": the engine refused these
    Column("score", Double, nullable=False),
)


_WITHOUT = " without "


@dataclass(frozen=True, slots=True)
class Score:
    """Mean log probability of the tokens of the examples that `digest` names; all of them `refused`: 0, and no measure.

    `refused`: places in the tenant's list, from 0, of those that the engine refused and that are not counted.
    """

    digest: str
    mean: float
    refused: tuple[int, ...] = ()


def check(given: Sequence[Example]) -> None:
    """Raises PromptsInvalid."""
    if len(given) > MOST_EXAMPLES:
        raise PromptsInvalid(f"{len(given)} examples: at most {MOST_EXAMPLES}")
    for number, example in enumerate(given):
        for field, text in (("prompt", example.prompt), ("answer", example.answer)):
            size = len(text.encode(errors="surrogatepass"))
            if not text.strip() or size > MOST_TEXT_BYTES:
                raise PromptsInvalid(f"examples[{number}].{field} has {size} bytes: 1 to {MOST_TEXT_BYTES}")
            if not is_text(text):
                raise PromptsInvalid(f"examples[{number}].{field} is not text: a NUL, or half of a surrogate pair")


def digest_of(given: Sequence[Example]) -> str:
    """What names these examples."""
    return hashlib.sha256(msgspec.json.encode(list(given))).hexdigest()


def spelled(places: Sequence[int]) -> str:
    """As `check` names them."""
    return ", ".join(f"examples[{place}]" for place in places)


def worse(candidate: float, baseline: float) -> str | None:
    """Why a version's score is worse than that of the one before on the same examples; None: it is not."""
    if candidate >= baseline - WORSE:
        return None
    return (
        f"the examples' answers have a mean log probability of {candidate:.2f} a token, "
        f"and {baseline:.2f} by the version before"
    )


async def of(connection: AsyncConnection, adapter_id: AdapterId) -> tuple[Example, ...]:
    """The adapter's."""
    statement = select(examples.c.examples).where(examples.c.adapter_id == adapter_id)
    found = (await connection.execute(statement)).scalar_one_or_none()
    return () if found is None else tuple(msgspec.json.decode(found, type=list[Example]))


async def keep(connection: AsyncConnection, adapter_id: AdapterId, given: Sequence[Example], now: int) -> None:
    """In the place of those that there were. The caller holds the writers' turn."""
    await connection.execute(delete(examples).where(examples.c.adapter_id == adapter_id))
    if given:
        row = {"adapter_id": adapter_id, "examples": msgspec.json.encode(list(given)).decode(), "changed_at": now}
        await connection.execute(insert(examples).values(row))


async def newest(connection: AsyncConnection, adapter_id: AdapterId) -> Sequence[VersionId]:
    """The versions that are scored again where the examples change."""
    statement = (
        select(versions.c.id)
        .where(versions.c.adapter_id == adapter_id)
        .order_by(versions.c.number.desc())
        .limit(SCORED_ANEW)
    )
    return [VersionId(found) for found in (await connection.execute(statement)).scalars()]


async def keep_score(connection: AsyncConnection, version_id: VersionId, score: Score) -> None:
    """In the place of the one that there was; a mean that is no number is kept as the worst."""
    await connection.execute(delete(scores).where(scores.c.version_id == version_id))
    row = {
        "version_id": version_id,
        "digest": score.digest + (_WITHOUT + ",".join(map(str, score.refused)) if score.refused else ""),
        "score": score.mean if math.isfinite(score.mean) else -1e9,
    }
    await connection.execute(insert(scores).values(row))


async def score_of(connection: AsyncConnection, version_id: VersionId) -> Score | None:
    """The version's, of the examples that there were when it was asked."""
    row = (
        await connection.execute(select(scores.c.digest, scores.c.score).where(scores.c.version_id == version_id))
    ).one_or_none()
    if row is None:
        return None
    digest, _, refused = row.digest.partition(_WITHOUT)
    return Score(digest, row.score, tuple(map(int, refused.split(","))) if refused else ())
