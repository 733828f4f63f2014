"""Files that come in parts, as OpenAI's Uploads API has them: declared, sent in any order, put together by their ids.

A part is a blob and a row, both durable before it is acknowledged, so an upload survives restarts of either side, and
each call may meet another gateway with other disks. Blobs of parts lie under `file-uploads/<tenant>/`, apart from those
of files. The same bytes again are the same part. An upload that has ended keeps its row until it expires, with the
answer that it was given.
"""

import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NewType

from sqlalchemy import Row, delete, func, insert, select, update

from adapter_store.blobs import PLAIN, Blobs
from adapter_store.changes import take_turn
from adapter_store.content import PUT_TRIES
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import BlobCorrupt
from adapter_store.ids import TenantId
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from training.errors import (
    FileUploadNotKnown,
    FileUploadOver,
    PartDamaged,
    PartNotKnown,
    PartTooLarge,
    SizeDiffers,
    TooManyFileUploads,
    TrainingError,
)
from training.files import FileQuota, Purpose, file_upload_parts, file_uploads, kept_by

FileUploadId = NewType("FileUploadId", str)
PREFIX: Final = "file-uploads"
EXPIRY_S: Final = 86_400.0
MOST_OPEN: Final = 64
MOST_PARTS: Final = 10_000
ORPHANS_AFTER_S: Final = 3_600.0  # far above the time between a part's blob and its row
KEY: Final = re.compile(rf"{PREFIX}/[A-Za-z0-9_-]{{1,64}}/(upload_[0-9a-f]{{24}})-[0-9a-f]{{64}}")


class Status(StrEnum):
    """`completed` is said of refusals too: the answer tells."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class NewUpload:
    """A file as its sender says that it will be."""

    tenant_id: TenantId
    purpose: Purpose
    filename: str
    size_bytes: int
    expires_after_s: int | None


@dataclass(frozen=True, slots=True)
class FileUpload:
    """An upload; times in Unix seconds. `answer`: what completing it was answered."""

    id: FileUploadId
    tenant_id: TenantId
    purpose: Purpose
    filename: str
    size_bytes: int
    expires_after_s: int | None
    created_at: int
    expires_at: int
    status: Status
    answer: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """So many bytes of an upload."""

    id: str
    upload_id: FileUploadId
    sha256: str
    size_bytes: int
    created_at: int


class FileUploads:
    """The uploads of all tenants. Every call names the tenant."""

    def __init__(
        self,
        engine: AsyncEngine,
        blobs: Blobs,
        *,
        expiry_s: float = EXPIRY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._expiry_s = expiry_s
        self._clock = clock

    async def create(self, new: NewUpload, quota: FileQuota, together: Together[FileUpload]) -> FileUpload:
        """Declares an upload, which counts as a file of its size.

        Raises TooManyFileUploads, QuotaExceeded, StorageError.
        """
        now = int(self._clock())
        upload = FileUpload(
            FileUploadId(f"upload_{secrets.token_hex(12)}"),
            new.tenant_id,
            new.purpose,
            new.filename,
            new.size_bytes,
            new.expires_after_s,
            now,
            int(self._clock() + self._expiry_s),
            Status.PENDING,
            None,
        )
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await together.before(connection)
            if await self._count_open(connection, new.tenant_id) >= MOST_OPEN:
                raise TooManyFileUploads(MOST_OPEN)
            if quota.counts:
                (await kept_by(connection, new.tenant_id, now=self._clock())).check(quota, new.size_bytes)
            await connection.execute(insert(file_uploads).values(_row_of(upload)))
            await together.after(connection, upload)
        return upload

    async def find(self, tenant_id: TenantId, upload_id: str) -> FileUpload:
        """Raises FileUploadNotKnown, for another tenant's too."""
        async with reading(self._engine) as connection:
            return await self.find_in(connection, tenant_id, upload_id)

    async def find_in(self, connection: AsyncConnection, tenant_id: TenantId, upload_id: str) -> FileUpload:
        here = (file_uploads.c.id == upload_id) & (file_uploads.c.tenant_id == tenant_id)
        row = (await connection.execute(select(file_uploads).where(here))).first()
        if row is None or row.expires_at <= self._clock():
            raise FileUploadNotKnown(upload_id)
        return _upload_of(row)

    async def bytes_left(self, upload: FileUpload) -> int:
        """How many bytes of what was declared are still to come. Raises FileUploadOver."""
        check_pending(upload)
        async with reading(self._engine) as connection:
            parts = await _parts_of(connection, upload)
        return upload.size_bytes - sum(part.size_bytes for part in parts)

    async def keep_part(self, upload: FileUpload, path: Path, sha256: str, size_bytes: int) -> Part:
        """Stores a part; durable when this returns. The same bytes again are the same part.

        Raises FileUploadNotKnown, FileUploadOver, PartTooLarge, StorageError.
        """
        key = _key(upload, sha256)
        for _ in range(PUT_TRIES):  # whoever is refused the same bytes just now removes them
            await self._blobs.adopt(key, path)
            async with writing(self._engine) as connection:
                await take_turn(connection)
                if await self._blobs.exists(key, size_bytes):
                    return await self._commit_part(connection, upload, sha256, size_bytes)
        raise BlobCorrupt(f"the part {sha256} vanishes as fast as it is stored")

    async def _commit_part(self, connection: AsyncConnection, upload: FileUpload, sha256: str, size_bytes: int) -> Part:
        try:
            now = await self.find_in(connection, upload.tenant_id, upload.id)
            check_pending(now)
            parts = await _parts_of(connection, upload)
            known = next((part for part in parts if part.sha256 == sha256), None)
            if known is not None:
                return known
            left = upload.size_bytes - sum(part.size_bytes for part in parts)
            if size_bytes > left or len(parts) == MOST_PARTS:
                raise PartTooLarge(left, MOST_PARTS)
        except TrainingError:
            await self._blobs.try_delete([_key(upload, sha256)])
            raise
        part = Part(f"part_{secrets.token_hex(12)}", upload.id, sha256, size_bytes, int(self._clock()))
        await connection.execute(insert(file_upload_parts).values(_row_of_part(part)))
        return part

    async def parts_in_order(self, upload: FileUpload, part_ids: Sequence[str]) -> list[Part]:
        """The parts of these ids, one after the other; one may come twice. Raises PartNotKnown, SizeDiffers."""
        async with reading(self._engine) as connection:
            known = {part.id: part for part in await _parts_of(connection, upload)}
        unknown = next((part_id for part_id in part_ids if part_id not in known), None)
        if unknown is not None:
            raise PartNotKnown(unknown)
        found = [known[part_id] for part_id in part_ids]
        size_bytes = sum(part.size_bytes for part in found)
        if size_bytes != upload.size_bytes:
            raise SizeDiffers(upload.size_bytes, size_bytes)
        return found

    async def read(self, upload: FileUpload, parts: Sequence[Part]) -> AsyncIterator[bytes]:
        """The parts' bytes. Raises PartDamaged, StorageUnavailable."""
        for part in parts:
            try:
                async with self._blobs.read(_key(upload, part.sha256)) as pieces:
                    async for piece in pieces:
                        yield piece
            except BlobCorrupt as error:
                raise PartDamaged(part.id) from error

    async def close_in(
        self, connection: AsyncConnection, upload: FileUpload, answer: str, file_id: str | None = None
    ) -> FileUpload:
        """Ends the upload with an answer, in the caller's transaction; `drop_parts` comes after it.

        `file_id`: what it has become, with which its row goes too.

        The caller holds the writers' turn. Raises FileUploadNotKnown, FileUploadOver.
        """
        check_pending(await self.find_in(connection, upload.tenant_id, upload.id))
        return await self._end(connection, upload, Status.COMPLETED, answer, file_id)

    async def close(self, upload: FileUpload, answer: str) -> None:
        """Ends the upload with an answer that had no other effect, and drops its parts."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await self.close_in(connection, upload, answer)
        await self.drop_parts(upload)

    async def cancel(self, tenant_id: TenantId, upload_id: str) -> FileUpload:
        """Ends the upload; asked again, the same. Raises FileUploadNotKnown, FileUploadOver for a completed one."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            upload = await self.find_in(connection, tenant_id, upload_id)
            if upload.status is Status.COMPLETED:
                raise FileUploadOver(upload.id, upload.status)
            if upload.status is Status.PENDING:
                upload = await self._end(connection, upload, Status.CANCELLED)
        await self.drop_parts(upload)
        return upload

    async def drop_parts(self, upload: FileUpload) -> None:
        """Removes the blobs of an upload that has ended; what fails here is swept later."""
        async with reading(self._engine) as connection:
            parts = await _parts_of(connection, upload)
        await self._blobs.try_delete(_key(upload, part.sha256) for part in parts)
        async with writing(self._engine) as connection:
            await connection.execute(delete(file_upload_parts).where(file_upload_parts.c.upload_id == upload.id))

    async def sweep(self) -> int:
        """Ends what has expired, and removes parts that no open upload has; how many."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            over = select(file_uploads.c.id).where(file_uploads.c.expires_at <= int(self._clock()))
            await connection.execute(delete(file_upload_parts).where(file_upload_parts.c.upload_id.in_(over)))
            await connection.execute(delete(file_uploads).where(file_uploads.c.expires_at <= int(self._clock())))
        async with reading(self._engine) as connection:
            statement = select(file_uploads.c.id).where(file_uploads.c.status == Status.PENDING.value)
            known = set((await connection.execute(statement)).scalars())

        def is_over(key: str) -> bool:
            found = KEY.fullmatch(key)
            return found is not None and found[1] not in known

        return await self._blobs.sweep(PREFIX, self._clock() - ORPHANS_AFTER_S, is_over)

    async def _end(
        self,
        connection: AsyncConnection,
        upload: FileUpload,
        status: Status,
        answer: str | None = None,
        file_id: str | None = None,
    ) -> FileUpload:
        expires_at = int(self._clock() + self._expiry_s)
        values = {"status": status.value, "answer": answer, "file_id": file_id, "expires_at": expires_at}
        await connection.execute(update(file_uploads).where(file_uploads.c.id == upload.id).values(values))
        return replace(upload, status=status, answer=answer, expires_at=expires_at)

    async def _count_open(self, connection: AsyncConnection, tenant_id: TenantId) -> int:
        is_open = (file_uploads.c.status == Status.PENDING.value) & (file_uploads.c.expires_at > self._clock())
        statement = select(func.count()).where(file_uploads.c.tenant_id == tenant_id, is_open)
        return int((await connection.execute(statement)).scalar_one())


def check_pending(upload: FileUpload) -> None:
    """Raises FileUploadOver."""
    if upload.status is not Status.PENDING:
        raise FileUploadOver(upload.id, upload.status)


async def _parts_of(connection: AsyncConnection, upload: FileUpload) -> list[Part]:
    statement = select(file_upload_parts).where(file_upload_parts.c.upload_id == upload.id)
    return [
        Part(row.id, upload.id, row.sha256, row.bytes, row.created_at)
        for row in await connection.execute(statement.order_by(file_upload_parts.c.id))
    ]


def _key(upload: FileUpload, sha256: str) -> str:
    assert PLAIN.fullmatch(upload.tenant_id)
    return f"{PREFIX}/{upload.tenant_id}/{upload.id}-{sha256}"


def _row_of(upload: FileUpload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "tenant_id": upload.tenant_id,
        "purpose": upload.purpose.value,
        "filename": upload.filename,
        "bytes": upload.size_bytes,
        "expires_after_s": upload.expires_after_s,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "status": upload.status.value,
    }


def _row_of_part(part: Part) -> dict[str, Any]:
    return {
        "id": part.id,
        "upload_id": part.upload_id,
        "sha256": part.sha256,
        "bytes": part.size_bytes,
        "created_at": part.created_at,
    }


def _upload_of(row: Row[Any]) -> FileUpload:
    return FileUpload(
        id=FileUploadId(row.id),
        tenant_id=TenantId(row.tenant_id),
        purpose=Purpose(row.purpose),
        filename=row.filename,
        size_bytes=row.bytes,
        expires_after_s=row.expires_after_s,
        created_at=row.created_at,
        expires_at=row.expires_at,
        status=Status(row.status),
        answer=row.answer,
    )
