"""`Idempotency-Key`: a request that is sent again has one effect and gets the same answer.

The answer is written in the transaction that has the effect, under the tenant and its key. So there is no state
between: who comes second, at the same time or after a crash, finds the answer or does the work. Keys are kept for a
day; the same key with another request is told so.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text, delete, insert, select, update

from adapter_store.catalog import metadata
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.ids import TenantId
from adapter_store.transactions import reading, writing
from gateway.errors import KeyReused, RequestInvalid

HEADER: Final = "idempotency-key"
KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
KEPT_S: Final = 86_400

kept_answers = Table(
    "kept_answers",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("location", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Index("ix_kept_answers_expires_at", "expires_at"),
)


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it was given."""

    request_sha256: str
    status: int
    location: str
    body: str

    def to_text(self) -> str:
        """For a column of another table."""
        return json.dumps([self.request_sha256, self.status, self.location, self.body])

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(*json.loads(text))


class Repeated(Exception):
    """The request has had its effect already, and this was the answer; unwinds the transaction of a second one."""

    def __init__(self, kept: Kept) -> None:
        super().__init__("answered before")
        self.kept = kept


class Answers:
    """The answers that are kept, in the database."""

    def __init__(self, engine: AsyncEngine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def once(self, tenant_id: TenantId, key: str | None) -> "Once":
        """What a handler does its work with. Raises RequestInvalid for a key that is none."""
        if key is not None and not KEY.fullmatch(key):
            raise RequestInvalid(
                "An Idempotency-Key is 1 to 255 visible ASCII characters: a random UUID does.", param=HEADER
            )
        return Once(self, tenant_id, key)

    async def find(self, tenant_id: TenantId, key: str) -> Kept | None:
        async with reading(self._engine) as connection:
            return await self.found(connection, tenant_id, key)

    async def found(self, connection: AsyncConnection, tenant_id: TenantId, key: str) -> Kept | None:
        row = (
            await connection.execute(
                select(kept_answers).where(kept_answers.c.tenant_id == tenant_id, kept_answers.c.key == key)
            )
        ).first()
        if row is None or row.expires_at <= self._clock():
            return None
        return Kept(row.request_sha256, row.status, row.location, row.body)

    async def keep(self, connection: AsyncConnection, tenant_id: TenantId, key: str, kept: Kept) -> None:
        here = (kept_answers.c.tenant_id == tenant_id) & (kept_answers.c.key == key)
        await connection.execute(delete(kept_answers).where(here))  # one that is over
        await connection.execute(
            insert(kept_answers).values(
                tenant_id=tenant_id,
                key=key,
                request_sha256=kept.request_sha256,
                status=kept.status,
                location=kept.location,
                body=kept.body,
                expires_at=int(self._clock()) + KEPT_S,
            )
        )

    async def rewrite(
        self, connection: AsyncConnection, tenant_id: TenantId, location: str, change: Callable[[str], str]
    ) -> None:
        """Changes what answers say of an object that is erased; they stay, so that no repetition makes it again."""
        here = (kept_answers.c.tenant_id == tenant_id) & (kept_answers.c.location == location)
        for row in (await connection.execute(select(kept_answers.c.key, kept_answers.c.body).where(here))).all():
            await connection.execute(
                update(kept_answers).where(here, kept_answers.c.key == row.key).values(body=change(row.body))
            )

    async def sweep(self) -> int:
        """Removes what is over; how many."""
        async with writing(self._engine) as connection:
            over = kept_answers.c.expires_at <= int(self._clock())
            return (await connection.execute(delete(kept_answers).where(over))).rowcount


class Once:
    """One request's key; without one, nothing is looked for and nothing kept."""

    def __init__(self, answers: Answers, tenant_id: TenantId, key: str | None) -> None:
        self._answers = answers
        self._tenant_id = tenant_id
        self._key = key

    async def is_known(self) -> bool:
        """Whether the key has an answer: it may be this request's."""
        return self._key is not None and await self._answers.find(self._tenant_id, self._key) is not None

    async def check(self, request_sha256: str) -> None:
        """Raises Repeated where the request was answered before, KeyReused where another one was."""
        if self._key is not None:
            _compare(await self._answers.find(self._tenant_id, self._key), request_sha256)

    async def check_in(self, connection: AsyncConnection, request_sha256: str) -> None:
        """The same in the transaction that is to have the effect; the caller holds the writers' turn."""
        if self._key is not None:
            _compare(await self._answers.found(connection, self._tenant_id, self._key), request_sha256)

    async def keep(self, connection: AsyncConnection, answer: Kept) -> None:
        """Keeps the answer, in the transaction that has the effect."""
        if self._key is not None:
            await self._answers.keep(connection, self._tenant_id, self._key, answer)


def fingerprint(*parts: str) -> str:
    """What two requests have in common that ask for the same."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compare(kept: Kept | None, request_sha256: str) -> None:
    if kept is None:
        return
    if kept.request_sha256 != request_sha256:
        raise KeyReused("This Idempotency-Key was used for another request: send a new one.", param=HEADER)
    raise Repeated(kept)
