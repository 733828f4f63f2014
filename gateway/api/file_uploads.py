"""`/v1/uploads`: a training file in parts, as OpenAI's Uploads API has it."""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Final, Literal

from fastapi import Request, Response
from pydantic import BaseModel, Field

from adapter_store.bundle import StagedBundle
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterStoreError
from adapter_store.threads import in_thread
from adapter_store.together import Together
from gateway.api.body import Body
from gateway.api.files import (
    DATA,
    MOST_NAME_CHARACTERS,
    Described,
    ExpiresAfter,
    FileObject,
    check_filename,
    check_purpose,
    file_object,
    keep_staged,
)
from gateway.api.lazy import LazyRouter
from gateway.api.multipart import Form, Writes
from gateway.api.publishing import as_response, once
from gateway.arrivals import Arrivals, Kind
from gateway.dependencies import AppParts, Parts, TenantKey, TrainingKey
from gateway.errors import GatewayError, RequestInvalid, answer
from gateway.idempotency import Kept, Once, Repeated, fingerprint
from training.errors import FileInvalid, FileTooLarge, Md5Differs, PartTooLarge, TrainingError
from training.file_uploads import MOST_PARTS, FileUpload, NewUpload, Part, check_pending
from training.files import File, Purpose, kept_by

router = LazyRouter(prefix="/v1/uploads", tags=["files"])

MOST_PART_BYTES: Final = 64 << 20
Word = Annotated[str, Field(max_length=MOST_NAME_CHARACTERS)]
PartId = Annotated[str, Field(max_length=64)]


class NewUploadBody(BaseModel, extra="forbid"):
    """`mime_type` is taken, and not looked at: a training file is JSONL."""

    filename: Word
    bytes: Annotated[int, Field(strict=True, ge=1, le=10**15)]
    mime_type: Word
    purpose: Word
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel, extra="forbid"):
    """The parts, in the order in which they make the file; `md5` in hex, where it is to be compared."""

    part_ids: Annotated[list[PartId], Field(min_length=1, max_length=MOST_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


class FileUploadObject(BaseModel):
    """An upload, as OpenAI has it; `file` once it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["pending", "completed", "cancelled"]
    file: FileObject | None = None


class FilePartObject(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class _PartForm(Form):
    """The one part of a form goes into the staged bundle."""

    def __init__(self, request: Request, body: Body, staged: StagedBundle) -> None:
        super().__init__(request, body, "the field data, a file")
        self._staged = staged

    async def _open(self, name: str, filename: str, part: AsyncExitStack) -> Writes | None:
        if name != "data":
            raise self._unknown(name)
        return await part.enter_async_context(self._staged.open(DATA))


class _Declaration(Together[FileUpload]):
    """An upload and the answer to who declared it are written together, once."""

    def __init__(self, arrivals: Arrivals, asker: TenantKey, size_bytes: int, once: Once, request_sha256: str) -> None:
        self.answer: Kept | None = None
        self._arrivals = arrivals
        self._asker = asker
        self._size_bytes = size_bytes
        self._once = once
        self._request = request_sha256

    async def before(self, connection: AsyncConnection) -> None:
        await self._once.check_in(connection, self._request)
        tenant_id = self._asker.tenant_id
        left = (await kept_by(connection, tenant_id, now=time.time())).bytes_left(self._asker.key.plan.file_quota)
        self._arrivals.check_room(tenant_id, Kind.FILE, self._size_bytes, left)

    async def after(self, connection: AsyncConnection, made: FileUpload) -> None:
        self.answer = Kept(self._request, 200, "", upload_object(made).model_dump_json())
        await self._once.keep(connection, self.answer)


class _Completed(Together[File]):
    """The file is made, the upload ended and the answer kept, or none of them."""

    def __init__(self, parts: Parts, upload: FileUpload, once: Once, request_sha256: str) -> None:
        self.answer: Kept | None = None
        self.besides_upload = upload.id
        self._parts = parts
        self._upload = upload
        self._once = once
        self._request = request_sha256

    async def before(self, connection: AsyncConnection) -> None:
        await self._once.check_in(connection, self._request)
        now = await self._parts.file_uploads.find_in(connection, self._upload.tenant_id, self._upload.id)
        if now.answer is not None:
            raise Repeated(Kept.from_text(now.answer))
        check_pending(now)

    async def after(self, connection: AsyncConnection, made: File) -> None:
        told = upload_object(self._upload).model_copy(update={"status": "completed", "file": file_object(made)})
        self.answer = Kept(self._request, 200, f"/v1/files/{made.id}", told.model_dump_json())
        await self._parts.file_uploads.close_in(connection, self._upload, self.answer.to_text(), made.id)
        await self._once.keep(connection, self.answer)


@router.post("", response_model=FileUploadObject)
async def create(body: NewUploadBody, request: Request, asker: TrainingKey, parts: AppParts) -> Response:
    """Declare a file that is to come in parts; it counts against the plan at once."""
    purpose = check_purpose(body.purpose)
    most = parts.file_limits.most_bytes
    if body.bytes > most:
        raise FileTooLarge(most)
    expires_after_s = None if body.expires_after is None else body.expires_after.seconds
    new = NewUpload(asker.tenant_id, purpose, check_filename(body.filename), body.bytes, expires_after_s)
    asked = fingerprint("create upload", purpose, body.filename, str(body.bytes), str(expires_after_s))
    declaration = _Declaration(parts.arrivals, asker, body.bytes, once(request, parts, asker.tenant_id), asked)
    try:
        await parts.file_uploads.create(new, asker.key.plan.file_quota, declaration)
    except Repeated as repeated:
        return as_response(repeated.kept)
    assert declaration.answer is not None
    return as_response(declaration.answer)


@router.post("/{upload_id}/parts")
async def add_part(upload_id: str, request: Request, asker: TrainingKey, parts: AppParts) -> FilePartObject:
    """Send a part, of 64 MiB at most; it is durable when this is answered. The same bytes again are the same part."""
    body = Body(request.receive, stall_s=parts.stall_s)
    try:
        upload = await parts.file_uploads.find(asker.tenant_id, upload_id)
        check_pending(upload)
        async with parts.arrivals.stage(asker.tenant_id, Kind.DECLARED, {DATA: MOST_PART_BYTES + 1}) as staged:
            most = min(MOST_PART_BYTES, upload.size_bytes)
            staged.cap(most, PartTooLarge(most, MOST_PARTS))
            await _PartForm(request, body, staged).receive()
            if not staged.sizes.get(DATA):
                raise RequestInvalid("The part is missing or empty: send the field data, a file.", param="data")
            part = await parts.file_uploads.keep_part(
                upload, staged.folder / DATA, staged.sha256[DATA], staged.sizes[DATA]
            )
    except (GatewayError, AdapterStoreError, TrainingError):
        await body.discard()
        raise
    return FilePartObject(id=part.id, created_at=part.created_at, upload_id=part.upload_id)


@router.post("/{upload_id}/complete", response_model=FileUploadObject)
async def complete(upload_id: str, body: Completion, request: Request, asker: TrainingKey, parts: AppParts) -> Response:
    """Put the parts together, check the file as every upload is, and keep it; asked again, the answer is the same."""
    upload = await parts.file_uploads.find(asker.tenant_id, upload_id)
    if upload.answer is not None:
        return as_response(Kept.from_text(upload.answer))
    check_pending(upload)
    asked = fingerprint("complete upload", upload.id, *body.part_ids)
    completed = _Completed(parts, upload, once(request, parts, asker.tenant_id), asked)
    described = Described(upload.purpose, upload.filename, upload.expires_after_s)
    in_order = await parts.file_uploads.parts_in_order(upload, body.part_ids)
    async with parts.arrivals.complete(asker.tenant_id, upload.id, {DATA: upload.size_bytes}) as staged:
        now = await parts.file_uploads.find(asker.tenant_id, upload.id)
        if now.answer is not None:
            return as_response(Kept.from_text(now.answer))
        await _assemble(parts, upload, in_order, staged, body.md5)
        try:
            await keep_staged(request, parts, asker, staged, described, completed)
        except Repeated as repeated:
            return as_response(repeated.kept)
        except FileInvalid as invalid:  # nothing of it is kept: what was declared cannot become another file
            told = answer(invalid)
            await parts.file_uploads.close(upload, Kept(asked, told.status, "", told.body.decode()).to_text())
            raise
    await parts.file_uploads.drop_parts(upload)
    assert completed.answer is not None
    return as_response(completed.answer)


async def _assemble(
    parts: Parts, upload: FileUpload, in_order: list[Part], staged: StagedBundle, md5: str | None
) -> None:
    digest = hashlib.md5(usedforsecurity=False)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in parts.file_uploads.read(upload, in_order):
            if md5 is not None:
                await in_thread(digest.update, piece)
            yield piece

    await staged.write(DATA, pieces())
    if md5 is not None and digest.hexdigest() != md5.lower():
        raise Md5Differs(digest.hexdigest())


@router.post("/{upload_id}/cancel")
async def cancel(upload_id: str, asker: TrainingKey, parts: AppParts) -> FileUploadObject:
    """Cancel an upload; its parts go. Asked again, the answer is the same; 409 once it is completed."""
    return upload_object(await parts.file_uploads.cancel(asker.tenant_id, upload_id))


def upload_object(upload: FileUpload) -> FileUploadObject:
    return FileUploadObject(
        id=upload.id,
        bytes=upload.size_bytes,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status.value,
    )
