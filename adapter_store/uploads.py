"""Uploads in parts: declared, received in any order and as often as need be, put together at the end.

A part is bytes in the blob store and a row, both durable before it is acknowledged, so an upload survives restarts of
either side, and each call may meet another gateway with other disks. Parts lie under `uploads/<tenant>/`, apart from
the blobs of versions (`part_storage`). An upload that has ended keeps its row until it expires, with the answer that it
was given.
"""

import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    Row,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, CONFIG_FILE, WEIGHTS_FILE, StagedBundle
from adapter_store.catalog import metadata
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import (
    BlobCorrupt,
    ChecksumMismatch,
    PartConflict,
    PartInvalid,
    PartsMissing,
    TooManyUploads,
    UploadNotFound,
)
from adapter_store.faults import listing
from adapter_store.ids import TenantId, UploadId, new_upload_id
from adapter_store.part_storage import PREFIX, Part, PartFile, PartStorage
from adapter_store.together import Together
from adapter_store.transactions import reading, writing

PART_BYTES: Final = 16 << 20
EXPIRY_S: Final = 86_400.0
MOST_OPEN: Final = 64
ORPHANS_AFTER_S: Final = 3_600.0  # far above the time between a part's blob and its row
KEY: Final = re.compile(rf"{PREFIX}/([A-Za-z0-9_-]{{1,64}})/(upl_[0-9a-f]{{24}})-[0-9]+(-[0-9]+-[0-9a-f]{{64}})?")

uploads = Table(
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("adapter_name", Text, nullable=False),
    Column("config_sha256", Text, nullable=False),
    Column("config_bytes", BigInteger, nullable=False),
    Column("weights_sha256", Text, nullable=False),
    Column("weights_bytes", BigInteger, nullable=False),
    Column("part_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("answer", Text),  # what completing it was answered; null: it is open
    Index("ix_uploads_tenant_id_adapter_name", "tenant_id", "adapter_name"),
    Index("ix_uploads_expires_at", "expires_at"),
)
_RESERVED: Final = select(func.coalesce(func.sum(uploads.c.config_bytes + uploads.c.weights_bytes), 0)).where(
    uploads.c.tenant_id == bindparam("tenant_id"), uploads.c.answer.is_(None), uploads.c.id != bindparam("besides")
)
upload_parts = Table(
    "upload_parts",
    metadata,
    Column("upload_id", Text, ForeignKey("uploads.id", name="fk_upload_parts_upload_id"), primary_key=True),
    Column("file", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sha256", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """A file as its sender says it will be."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Upload:
    """`parts`: SHA-256 of what is there, by file and number from 1. Times in Unix seconds."""

    id: UploadId
    tenant_id: TenantId
    adapter_name: str
    files: dict[str, DeclaredFile]
    part_bytes: int
    created_at: int
    expires_at: int
    answer: str | None = None
    parts: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def part_count(self, file: str) -> int:
        return -(-self.files[file].size_bytes // self.part_bytes)

    def part_size(self, file: str, number: int) -> int:
        """How many bytes the part has to have. Raises PartInvalid where there is none of that number."""
        count = self.part_count(file) if file in self.files else 0
        if not 1 <= number <= count:
            raise PartInvalid(f"{file[:64]!r} has no part {number}: {self._told_parts()}")
        return min(self.part_bytes, self.files[file].size_bytes - (number - 1) * self.part_bytes)

    def missing(self, file: str) -> list[int]:
        """Numbers of the parts that are still to come."""
        return [number for number in range(1, self.part_count(file) + 1) if (file, number) not in self.parts]

    def part_file(self, file: str) -> PartFile:
        return PartFile(self.tenant_id, self.id, file, BUNDLE_FILES.index(file), self.files[file].size_bytes)

    def part(self, file: str, number: int, sha256: str) -> Part:
        """Raises PartInvalid where there is none of that number."""
        size_bytes = self.part_size(file, number)
        return Part(self.part_file(file), number, (number - 1) * self.part_bytes, size_bytes, sha256)

    def kept_parts(self, file: str) -> list[Part]:
        """Those that are there, in order."""
        numbers = sorted(number for name, number in self.parts if name == file)
        return [self.part(file, number, self.parts[file, number]) for number in numbers]

    def _told_parts(self) -> str:
        counts = " and ".join(f"{name} has {self.part_count(name)}" for name in self.files)
        return f"{counts}, of {self.part_bytes} bytes each but the last"


class Uploads:
    """The uploads of all tenants. Every call names the tenant."""

    def __init__(
        self,
        engine: AsyncEngine,
        blobs: Blobs,
        *,
        part_bytes: int = PART_BYTES,
        expiry_s: float = EXPIRY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._storage = PartStorage.of(blobs)
        self._part_bytes = part_bytes
        self._expiry_s = expiry_s
        self._clock = clock

    async def create(
        self, tenant_id: TenantId, name: str, files: dict[str, DeclaredFile], together: Together[Upload]
    ) -> Upload:
        """Declares an upload. Raises TooManyUploads, StorageError."""
        now = int(self._clock())
        upload = Upload(
            new_upload_id(), tenant_id, name, files, self._part_bytes, now, int(self._clock() + self._expiry_s)
        )
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await together.before(connection)
            if await self._count_open(connection, tenant_id) >= MOST_OPEN:
                raise TooManyUploads(f"{MOST_OPEN} uploads are under way: complete or cancel one first")
            await connection.execute(insert(uploads).values(_row_of(upload)))
            await together.after(connection, upload)
        return upload

    async def find(self, tenant_id: TenantId, name: str, upload_id: str) -> Upload:
        """Raises UploadNotFound, for another tenant's too."""
        async with reading(self._engine) as connection:
            return await self.find_in(connection, tenant_id, name, upload_id)

    async def find_in(self, connection: AsyncConnection, tenant_id: TenantId, name: str, upload_id: str) -> Upload:
        here = (uploads.c.id == upload_id) & (uploads.c.tenant_id == tenant_id) & (uploads.c.adapter_name == name)
        row = (await connection.execute(select(uploads).where(here))).first()
        if row is None or row.expires_at <= self._clock():
            raise UploadNotFound
        (upload,) = await _with_parts(connection, [row])
        return upload

    async def list_open(self, tenant_id: TenantId, name: str) -> Sequence[Upload]:
        """Those of one adapter, newest first."""
        mine = (uploads.c.tenant_id == tenant_id) & (uploads.c.adapter_name == name)
        is_open = uploads.c.answer.is_(None) & (uploads.c.expires_at > self._clock())
        statement = select(uploads).where(mine, is_open).order_by(uploads.c.created_at.desc(), uploads.c.id)
        async with reading(self._engine) as connection:
            return await _with_parts(connection, (await connection.execute(statement)).all())

    async def keep_part(self, upload: Upload, file: str, number: int, path: Path, sha256: str) -> Upload:
        """Stores a part that was checked; durable when this returns. The upload as it is then.

        The same part again is nothing new. Raises PartConflict, UploadNotFound, StorageError.
        """
        part = upload.part(file, number, sha256)
        try:
            now = await self._keep(upload, part, path)
        except UploadNotFound:
            await self._storage.drop([part.file], [part])
            raise
        if now.answer is not None:
            await self._storage.drop([part.file], [part])
            raise UploadNotFound  # completed meanwhile
        if now.parts[file, number] != sha256:
            await self._storage.drop([], [part])
            check_part(now, file, number, sha256)
        return now

    async def _keep(self, upload: Upload, part: Part, path: Path) -> Upload:
        async with self._storage.turn(part.file):
            now = await self.find(upload.tenant_id, upload.adapter_name, upload.id)
            if now.answer is not None or (part.file.name, part.number) in now.parts:
                return now
            is_first = all(name != part.file.name for name, _ in now.parts)
            await self._storage.put(part, path, is_first=is_first)
            return await self._note(upload, part)

    async def _note(self, upload: Upload, part: Part) -> Upload:
        """Writes the part's row, if there is none by now; the upload as it is then."""
        place = part.file.name, part.number
        async with writing(self._engine) as connection:
            await take_turn(connection)
            now = await self.find_in(connection, upload.tenant_id, upload.adapter_name, upload.id)
            if now.answer is None and place not in now.parts:
                row = {"upload_id": upload.id, "file": place[0], "number": place[1]}
                row |= {"sha256": part.sha256, "bytes": part.size_bytes}
                await connection.execute(insert(upload_parts).values(row))
                now = replace(now, parts={**now.parts, place: part.sha256}, expires_at=self._expiry())
                await self._touch(connection, now)
        return now

    async def assemble(self, upload: Upload, bundle: StagedBundle) -> None:
        """Puts the parts together in the bundle, each file checked against what was declared.

        Raises PartsMissing, ChecksumMismatch, UploadNotFound where it has ended meanwhile, and what staging raises.
        """
        check_complete(upload)
        for name in BUNDLE_FILES:
            try:
                await self._storage.assemble(upload.part_file(name), upload.kept_parts(name), bundle)
            except BlobCorrupt:
                await self._drop_damaged(upload, name)
                raise
            if bundle.sha256[name] != upload.files[name].sha256:
                await self._drop_damaged(upload, name)
                raise ChecksumMismatch(
                    f"{name} is not what was declared: its SHA-256 is {bundle.sha256[name]}; cancel, and begin again"
                )

    async def close_in(self, connection: AsyncConnection, upload: Upload, answer: str) -> None:
        """Ends the upload with an answer, in the caller's transaction; its parts may go then."""
        await connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload.id))
        await connection.execute(
            update(uploads).where(uploads.c.id == upload.id).values(answer=answer, expires_at=self._expiry())
        )

    async def close(self, upload: Upload, answer: str) -> None:
        """Ends the upload with an answer that had no other effect, and drops its parts."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await self.close_in(connection, upload, answer)
        await self.drop_parts(upload)

    async def cancel(self, tenant_id: TenantId, name: str, upload_id: str) -> None:
        """Removes an upload, open or over. Raises UploadNotFound."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            upload = await self.find_in(connection, tenant_id, name, upload_id)
            await _delete(connection, [upload.id])
        await self.drop_parts(upload)

    async def drop_parts(self, upload: Upload) -> None:
        """Removes the bytes of an upload that has ended; what fails here is swept later."""
        files = {name: upload.part_file(name) for name in upload.files}
        await self._storage.drop(files.values(), [part for name in files for part in upload.kept_parts(name)])

    async def sweep(self) -> int:
        """Ends what has expired, and removes parts that no open upload has; how many."""
        removed = await self._sweep_expired()
        async with reading(self._engine) as connection:
            statement = select(uploads.c.id).where(uploads.c.answer.is_(None))
            known = set((await connection.execute(statement)).scalars())

        def is_over(key: str) -> bool:
            parts = KEY.fullmatch(key)
            return parts is not None and parts[2] not in known

        return removed + await self._blobs.sweep(PREFIX, self._clock() - ORPHANS_AFTER_S, is_over)

    async def _sweep_expired(self) -> int:
        async with writing(self._engine) as connection:
            await take_turn(connection)
            statement = select(uploads).where(uploads.c.expires_at <= int(self._clock())).limit(1_000)
            over = await _with_parts(connection, (await connection.execute(statement)).all())
            await _delete(connection, [upload.id for upload in over])
        for upload in over:
            await self.drop_parts(upload)
        return sum(len(upload.parts) for upload in over)

    async def _drop_damaged(self, upload: Upload, name: str) -> None:
        """Raises PartsMissing where a part is not what it was: it has to be sent again. UploadNotFound: it is over."""
        file, parts = upload.part_file(name), upload.kept_parts(name)
        try:
            async with self._storage.turn(file):
                if (await self.find(upload.tenant_id, upload.adapter_name, upload.id)).answer is not None:
                    raise UploadNotFound
                damaged = await self._forget_damaged(upload, file, parts)
        except UploadNotFound:
            await self._storage.drop([file], parts)
            raise
        if damaged:
            told = listing(map(str, damaged))
            raise PartsMissing(f"{name}: parts {told} were damaged where they lay: send them again")

    async def _forget_damaged(self, upload: Upload, file: PartFile, parts: Sequence[Part]) -> list[int]:
        whole = [part for part in parts if await self._storage.holds(part)]
        damaged = sorted({part.number for part in parts} - {part.number for part in whole})
        if damaged:
            await self._storage.keep_only(file, whole)
            async with writing(self._engine) as connection:
                here = (upload_parts.c.upload_id == upload.id) & (upload_parts.c.file == file.name)
                await connection.execute(delete(upload_parts).where(here, upload_parts.c.number.in_(damaged)))
        return damaged

    async def _count_open(self, connection: AsyncConnection, tenant_id: TenantId) -> int:
        is_open = uploads.c.answer.is_(None) & (uploads.c.expires_at > self._clock())
        statement = select(func.count()).where(uploads.c.tenant_id == tenant_id, is_open)
        return int((await connection.execute(statement)).scalar_one())

    def _expiry(self) -> int:
        return int(self._clock() + self._expiry_s)

    async def _touch(self, connection: AsyncConnection, upload: Upload) -> None:
        await connection.execute(update(uploads).where(uploads.c.id == upload.id).values(expires_at=upload.expires_at))


def check_part(upload: Upload, file: str, number: int, sha256: str) -> None:
    """Raises PartConflict where the part is there with other bytes."""
    if upload.parts.get((file, number), sha256) != sha256:
        raise PartConflict(
            f"part {number} of {file} is there with other bytes: if the file has changed, cancel and begin again"
        )


def check_complete(upload: Upload) -> None:
    """Raises PartsMissing."""
    for file in BUNDLE_FILES:
        missing = upload.missing(file)
        if missing:
            raise PartsMissing(
                f"{file} still lacks {len(missing)} of {upload.part_count(file)} parts, first number {missing[0]}"
            )


async def reserved_bytes(connection: AsyncConnection, tenant_id: TenantId, *, besides: str | None = None) -> int:
    """What the tenant's open uploads will have, without `besides`."""
    asked = {"tenant_id": tenant_id, "besides": besides or ""}
    return int((await connection.execute(_RESERVED, asked)).scalar_one())


def _row_of(upload: Upload) -> dict[str, Any]:
    config, weights = upload.files[CONFIG_FILE], upload.files[WEIGHTS_FILE]
    return {
        "id": upload.id,
        "tenant_id": upload.tenant_id,
        "adapter_name": upload.adapter_name,
        "config_sha256": config.sha256,
        "config_bytes": config.size_bytes,
        "weights_sha256": weights.sha256,
        "weights_bytes": weights.size_bytes,
        "part_bytes": upload.part_bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
    }


async def _with_parts(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Upload]:
    ids = [row.id for row in rows]
    found: dict[str, dict[tuple[str, int], str]] = {upload_id: {} for upload_id in ids}
    for part in await connection.execute(select(upload_parts).where(upload_parts.c.upload_id.in_(ids))):
        found[part.upload_id][part.file, part.number] = part.sha256
    return [_upload_of(row, found[row.id]) for row in rows]


def _upload_of(row: Row[Any], parts: dict[tuple[str, int], str]) -> Upload:
    return Upload(
        id=UploadId(row.id),
        tenant_id=TenantId(row.tenant_id),
        adapter_name=row.adapter_name,
        files={
            CONFIG_FILE: DeclaredFile(row.config_bytes, row.config_sha256),
            WEIGHTS_FILE: DeclaredFile(row.weights_bytes, row.weights_sha256),
        },
        part_bytes=row.part_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        answer=row.answer,
        parts=parts,
    )


async def _delete(connection: AsyncConnection, ids: Collection[str]) -> None:
    await connection.execute(delete(upload_parts).where(upload_parts.c.upload_id.in_(ids)))
    await connection.execute(delete(uploads).where(uploads.c.id.in_(ids)))
