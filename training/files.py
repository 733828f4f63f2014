"""Files for fine-tuning: what tenants send, and what jobs make of it. An immutable blob each, and a row that names it.

The blob comes first, then the row in one transaction, so that a crash leaves at most a blob without a row, which
`AdapterStore.collect_orphans` removes. A file goes by an erasure (`adapter_store/erasure.py`): its row at once, its
blob right after, and the receipt says so. A filename is a tenant's text: it is shown again, and never part of a path.
"""

import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NewType

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Row,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    delete,
    func,
    insert,
    select,
)

from adapter_store.blob_rows import NamedBlob
from adapter_store.blobs import Blobs, names_blob
from adapter_store.catalog import metadata
from adapter_store.changes import take_turn
from adapter_store.content import PUT_TRIES, all_stored, drop_unreferenced, hashed, put_missing
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.erasure import ErasedBlob, Erasure, Scope, note_erasure
from adapter_store.errors import BlobCorrupt, QuotaExceeded, StorageError
from adapter_store.ids import TenantId
from adapter_store.scrub import forget
from adapter_store.threads import in_thread
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from training.errors import FileDamaged, FileInUse, FileNotKnown

FileId = NewType("FileId", str)
READ_BYTES: Final = 1 << 20
SWEPT_AT_ONCE: Final = 1_000
ADVICE: Final = "or ask your operator for another plan"

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),  # in the order of time
    Column("tenant_id", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("sha256", Text, nullable=False, info=names_blob("bytes")),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),  # null: it stays until it is deleted
    Column("created_by", Text),  # id of the key; null: a job
    Column("report", Text),  # JSON: what the check found in it; null: it was not checked
    Index("ix_files_tenant_id_id", "tenant_id", "id"),
    Index("ix_files_tenant_id_sha256", "tenant_id", "sha256"),
    Index("ix_files_expires_at", "expires_at"),
)
file_uploads = Table(  # in parts: see file_uploads.py
    "file_uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("expires_after_s", BigInteger),  # the file's, once there is one
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("answer", Text),  # what completing it was answered; null: it was not completed
    Column("file_id", Text),  # what it has become
    Index("ix_file_uploads_tenant_id", "tenant_id"),
    Index("ix_file_uploads_expires_at", "expires_at"),
    Index("ix_file_uploads_file_id", "file_id"),
)
file_upload_parts = Table(
    "file_upload_parts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("upload_id", Text, ForeignKey("file_uploads.id", name="fk_file_upload_parts_upload_id"), nullable=False),
    Column("sha256", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("upload_id", "sha256", name="uq_file_upload_parts_upload_id_sha256"),
)
_KEPT: Final = select(func.count(), func.coalesce(func.sum(files.c.bytes), 0)).where(
    files.c.tenant_id == bindparam("tenant_id")
)
_RESERVED: Final = select(func.count(), func.coalesce(func.sum(file_uploads.c.bytes), 0)).where(
    file_uploads.c.tenant_id == bindparam("tenant_id"),
    file_uploads.c.status == "pending",
    file_uploads.c.expires_at > bindparam("now"),
    file_uploads.c.id != bindparam("besides"),
)


class Purpose(StrEnum):
    """What a file is for; results are made by jobs only."""

    FINE_TUNE = "fine-tune"
    RESULTS = "fine-tune-results"


@dataclass(frozen=True, slots=True)
class File:
    """One immutable file. Times in Unix seconds. `report`: what the check found, as `datafile` writes it."""

    id: FileId
    tenant_id: TenantId
    purpose: Purpose
    filename: str
    sha256: str
    size_bytes: int
    created_at: int
    expires_at: int | None
    created_by: str | None
    report: dict[str, Any] | None

    @property
    def blob(self) -> NamedBlob:
        return NamedBlob.of(self.tenant_id, self.sha256, self.size_bytes)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file before it is kept."""

    tenant_id: TenantId
    purpose: Purpose
    filename: str
    sha256: str
    size_bytes: int
    expires_after_s: int | None = None
    created_by: str | None = None
    report: dict[str, Any] | None = None

    @property
    def blob(self) -> NamedBlob:
        return NamedBlob.of(self.tenant_id, self.sha256, self.size_bytes)


@dataclass(frozen=True, slots=True)
class FileQuota:
    """Limits of one tenant; None is no limit. The errors name them as a plan does."""

    files: int | None = None
    stored_bytes: int | None = None

    @property
    def counts(self) -> bool:
        """Whether what is kept matters."""
        return (self.files, self.stored_bytes) != (None, None)


NO_QUOTA: Final = FileQuota()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a tenant has of files, with what its uploads that are under way will have."""

    files: int
    stored_bytes: int

    def check(self, quota: FileQuota, more_bytes: int) -> None:
        """Whether a file more of that size still fits. Raises QuotaExceeded."""
        if quota.files is not None and self.files >= quota.files:
            raise QuotaExceeded(
                "max_files", f"your plan allows {quota.files} files and {self.files} are used: delete one, {ADVICE}"
            )
        left = self.bytes_left(quota)
        if left is not None and more_bytes > left:
            raise bytes_exceeded(quota, self)

    def bytes_left(self, quota: FileQuota) -> int | None:
        """How large a file more may be; None: of any size."""
        return None if quota.stored_bytes is None else max(0, quota.stored_bytes - self.stored_bytes)


def bytes_exceeded(quota: FileQuota, kept: Kept) -> QuotaExceeded:
    """The error of a file that does not fit beside what is there."""
    return QuotaExceeded(
        "max_stored_file_bytes",
        f"this file is too large for what is left: your plan allows {quota.stored_bytes} bytes of files and "
        f"{kept.stored_bytes} are used: delete one, {ADVICE}",
    )


InUse = Callable[[AsyncConnection, TenantId, FileId], Awaitable[Sequence[str]]]
"""The ids of what still needs a file; asked in the transaction that would remove it."""


OnErase = Callable[[AsyncConnection, File], Awaitable[None]]
"""Removes what else is kept of a file that goes, in the same transaction."""


async def _nothing_uses_it(_: AsyncConnection, __: TenantId, ___: FileId) -> Sequence[str]:
    return ()


async def _nothing_else(_: AsyncConnection, __: File) -> None:
    return None


class Files:
    """The files of all tenants. Every call names the tenant."""

    def __init__(
        self,
        engine: AsyncEngine,
        blobs: Blobs,
        *,
        in_use: InUse = _nothing_uses_it,
        on_erase: OnErase = _nothing_else,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._in_use = in_use
        self._on_erase = on_erase
        self._clock = clock

    async def kept(self, tenant_id: TenantId) -> Kept:
        """What the tenant has already. Raises StorageUnavailable."""
        async with reading(self._engine) as connection:
            return await kept_by(connection, tenant_id, now=self._clock())

    async def create(
        self, new: NewFile, path: Path, quota: FileQuota = NO_QUOTA, together: Together[File] | None = None
    ) -> File:
        """Keeps what lies at `path`; `together`: what is written in the same transaction, or nothing is.

        Raises QuotaExceeded, StorageFull, StorageUnavailable.
        """
        together = together or Together()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._undo, new)
            file = await self._put_and_commit(new, path, quota, together)
            undo.pop_all()
        return file

    async def find(self, tenant_id: TenantId, file_id: str) -> File:
        """Raises FileNotKnown, for another tenant's and an expired one too."""
        async with reading(self._engine) as connection:
            return await find(connection, tenant_id, file_id, now=self._clock())

    async def page(
        self,
        tenant_id: TenantId,
        *,
        purpose: str | None = None,
        after: str | None = None,
        newest_first: bool = True,
        limit: int = 100,
    ) -> Sequence[File]:
        """The tenant's by the time they came; the next page starts `after` the last id of this one."""
        alive = files.c.expires_at.is_(None) | (files.c.expires_at > int(self._clock()))
        statement = select(files).where(files.c.tenant_id == tenant_id, alive).limit(limit)
        if purpose is not None:
            statement = statement.where(files.c.purpose == purpose)
        if after is not None:
            statement = statement.where(files.c.id < after if newest_first else files.c.id > after)
        statement = statement.order_by(files.c.id.desc() if newest_first else files.c.id)
        async with reading(self._engine) as connection:
            return [_file_of(row) for row in await connection.execute(statement)]

    @asynccontextmanager
    async def read(self, file: File) -> AsyncIterator[AsyncIterator[bytes]]:
        """As `read` below."""
        async with read(self._blobs, file) as pieces:
            yield pieces

    async def erase(
        self,
        tenant_id: TenantId,
        file_id: str,
        *,
        requested_by: str | None = None,
        force: bool = False,
    ) -> Erasure:
        """Removes the row and notes the erasure of the blob, which whoever carries erasures on completes.

        Raises FileNotKnown, FileInUse, StorageFull, StorageUnavailable.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            file = await find(connection, tenant_id, file_id, now=self._clock())
            used_by = await self._in_use(connection, tenant_id, file.id)
            if used_by and not force:
                raise FileInUse(file.id, used_by)
            return await self._erase_in(connection, file, requested_by, force, int(self._clock()))

    async def sweep(self) -> int:
        """Erases what has expired and nothing needs any more; how many."""
        now = int(self._clock())
        removed, last = 0, ""
        while True:
            async with writing(self._engine) as connection:
                await take_turn(connection)
                over = select(files).where(files.c.expires_at <= now, files.c.id > last)
                found = (await connection.execute(over.order_by(files.c.id).limit(SWEPT_AT_ONCE))).all()
                for file in map(_file_of, found):
                    if not await self._in_use(connection, file.tenant_id, file.id):
                        await self._erase_in(connection, file, EXPIRY, force=False, now=now)
                        removed += 1
            if len(found) < SWEPT_AT_ONCE:
                return removed
            last = found[-1].id

    async def _put_and_commit(self, new: NewFile, path: Path, quota: FileQuota, together: Together[File]) -> File:
        for _ in range(PUT_TRIES):
            await put_missing(self._engine, self._blobs, new.tenant_id, [(new.blob, path)])
            async with writing(self._engine) as connection:
                await take_turn(connection)
                if await all_stored(self._blobs, [new.blob]):
                    await together.before(connection)
                    if quota.counts:
                        kept = await kept_by(
                            connection, new.tenant_id, now=self._clock(), besides_upload=together.besides_upload
                        )
                        kept.check(quota, new.size_bytes)
                    file = await _insert(connection, new, int(self._clock()))
                    await together.after(connection, file)
                    return file
        raise BlobCorrupt(f"the blob of '{new.sha256}' vanishes as fast as it is stored")

    async def _erase_in(
        self, connection: AsyncConnection, file: File, requested_by: str | None, force: bool, now: int
    ) -> Erasure:
        uploads = select(file_uploads.c.id).where(file_uploads.c.file_id == file.id)
        await connection.execute(delete(file_upload_parts).where(file_upload_parts.c.upload_id.in_(uploads)))
        await connection.execute(delete(file_uploads).where(file_uploads.c.file_id == file.id))
        await connection.execute(delete(files).where(files.c.id == file.id))
        await self._on_erase(connection, file)
        return await note_erasure(
            connection,
            file.tenant_id,
            Scope.FILE,
            file.id,
            [_erased(file)],
            requested_by=requested_by,
            forced=force,
            now=now,
        )

    async def _undo(self, new: NewFile) -> None:
        with suppress(StorageError):  # the failure that led here is the one to tell; collect_orphans does the rest
            await drop_unreferenced(self._engine, self._blobs, new.tenant_id, [new.sha256])


EXPIRY: Final = "expiry"
"""Who asks for the erasure of what has expired, in its receipt."""


# for jobs and workers, in transactions of their own


async def find(connection: AsyncConnection, tenant_id: TenantId, file_id: str, *, now: float | None = None) -> File:
    """One of the tenant's; `now`: what has expired by then is missing. Raises FileNotKnown.

    A file that has expired stays as long as a job needs it, and the job finds it by leaving out `now`.
    """
    here = (files.c.id == file_id) & (files.c.tenant_id == tenant_id)
    row = (await connection.execute(select(files).where(here))).first()
    if row is None or (now is not None and row.expires_at is not None and row.expires_at <= now):
        raise FileNotKnown(file_id)
    return _file_of(row)


@asynccontextmanager
async def read(blobs: Blobs, file: File) -> AsyncIterator[AsyncIterator[bytes]]:
    """The file's bytes in pieces; the last one comes only where all of them are what was sent.

    Raises FileDamaged, StorageUnavailable.
    """
    try:
        async with blobs.read(file.blob.key) as pieces:
            yield _checked(pieces, file)
    except BlobCorrupt as error:
        raise FileDamaged(file.id) from error


async def _checked(pieces: AsyncIterator[bytes], file: File) -> AsyncIterator[bytes]:
    digest = hashlib.sha256()
    held: bytes | None = None
    async for piece in pieces:
        await in_thread(digest.update, piece)
        if held is not None:
            yield held
        held = piece
    if digest.hexdigest() != file.sha256:
        raise FileDamaged(file.id)
    if held is not None:
        yield held


async def copy_to(blobs: Blobs, file: File, path: Path) -> None:
    """Writes the file to `path`. Raises FileDamaged, StorageFull, StorageUnavailable."""
    try:
        await blobs.fetch(file.blob.key, file.sha256, path)
    except BlobCorrupt as error:
        raise FileDamaged(file.id) from error


async def keep_blob(engine: AsyncEngine, blobs: Blobs, tenant_id: TenantId, path: Path) -> NamedBlob:
    """Stores what lies at `path` as one of the tenant's blobs, before the row that names it: see `create_result`.

    Raises StorageFull, StorageUnavailable.
    """
    blob = NamedBlob.of(tenant_id, *await in_thread(hashed, path))
    await put_missing(engine, blobs, tenant_id, [(blob, path)])
    return blob


async def create_result(
    connection: AsyncConnection, blobs: Blobs, tenant_id: TenantId, filename: str, blob: NamedBlob, now: int
) -> File:
    """The row of a job's result, in the transaction that ends the job; it counts for no quota's check.

    The caller holds the writers' turn. Raises BlobCorrupt where the blob has gone since `keep_blob`: keep it again.
    """
    if not await all_stored(blobs, [blob]):
        raise BlobCorrupt(f"blob {blob.key} is gone")
    return await _insert(connection, NewFile(tenant_id, Purpose.RESULTS, filename, blob.sha256, blob.size_bytes), now)


async def remove(connection: AsyncConnection, tenant_id: TenantId, file_ids: Collection[str]) -> list[ErasedBlob]:
    """Removes the rows of files that go with what has made them; what there was, for its erasure."""
    here = (files.c.tenant_id == tenant_id) & files.c.id.in_(file_ids)
    found = [_file_of(row) for row in (await connection.execute(select(files).where(here).order_by(files.c.id))).all()]
    await connection.execute(delete(files).where(here))
    return [_erased(file) for file in found]


async def kept_by(
    connection: AsyncConnection, tenant_id: TenantId, *, now: float, besides_upload: str | None = None
) -> Kept:
    """What the tenant has, without what the upload `besides_upload` reserves."""
    count, size_bytes = (await connection.execute(_KEPT, {"tenant_id": tenant_id})).one()
    asked = {"tenant_id": tenant_id, "now": int(now), "besides": besides_upload or ""}
    reserved, reserved_bytes = (await connection.execute(_RESERVED, asked)).one()
    return Kept(int(count) + int(reserved), int(size_bytes) + int(reserved_bytes))


async def _insert(connection: AsyncConnection, new: NewFile, now: int) -> File:
    file = File(
        id=FileId(f"file-{now:010x}{secrets.token_hex(8)}"),
        tenant_id=new.tenant_id,
        purpose=new.purpose,
        filename=new.filename,
        sha256=new.sha256,
        size_bytes=new.size_bytes,
        created_at=now,
        expires_at=None if new.expires_after_s is None else now + new.expires_after_s,
        created_by=new.created_by,
        report=new.report,
    )
    await forget(connection, new.tenant_id, [new.sha256])
    await connection.execute(
        insert(files).values(
            id=file.id,
            tenant_id=file.tenant_id,
            purpose=file.purpose.value,
            filename=file.filename,
            sha256=file.sha256,
            bytes=file.size_bytes,
            created_at=file.created_at,
            expires_at=file.expires_at,
            created_by=file.created_by,
            report=None if file.report is None else json.dumps(file.report),
        )
    )
    return file


def _erased(file: File) -> ErasedBlob:
    return ErasedBlob(file.id, file.purpose.value, file.sha256, file.size_bytes)


def _file_of(row: Row[Any]) -> File:
    return File(
        id=FileId(row.id),
        tenant_id=TenantId(row.tenant_id),
        purpose=Purpose(row.purpose),
        filename=row.filename,
        sha256=row.sha256,
        size_bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        created_by=row.created_by,
        report=None if row.report is None else json.loads(row.report),
    )
