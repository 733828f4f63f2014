"""`/v1/files`: what tenants send to train on, and what jobs have made; OpenAI's shapes, with a member `tailor`."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from adapter_store.bundle import StagedBundle
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterStoreError
from adapter_store.together import Together
from gateway.api.body import Body
from gateway.api.erasures import Erased
from gateway.api.lazy import LazyRouter
from gateway.api.multipart import Form, Writes
from gateway.api.publishing import as_response, once
from gateway.arrivals import Kind
from gateway.dependencies import AppParts, Parts, TenantKey, TrainingKey, trainer
from gateway.erasing import REQUEST_WAIT_S
from gateway.errors import GatewayError, RequestInvalid
from gateway.idempotency import Answers, Kept, Once, Repeated, fingerprint
from training.errors import FileTooLarge, TrainingError
from training.files import File, NewFile, OnErase, Purpose, bytes_exceeded

router = LazyRouter(prefix="/v1/files", tags=["files"])

DATA: Final = "data"
"""What a staged file is called, whatever its sender calls it."""
ANCHOR: Final = "created_at"
LEAST_EXPIRY_S: Final = 3_600
MOST_EXPIRY_S: Final = 2_592_000
MOST_NAME_CHARACTERS: Final = 255
MOST_AT_ONCE: Final = 1_000
WANTED: Final = f"the fields purpose ('{Purpose.FINE_TUNE}') and file"
Text = Annotated[str | None, Query(max_length=64, pattern="^[^\\x00]*$")]


class FileReport(BaseModel):
    """What Tailor says beyond OpenAI's members: `report` is null for files that no check is for."""

    sha256: str
    report: dict[str, Any] | None


class FileObject(BaseModel):
    """A file, as OpenAI has it; times in Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    tailor: FileReport


class FileList(BaseModel):
    """A page; `has_more` says whether `?after=<last_id>` has another."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
    tailor: Erased


class ExpiresAfter(BaseModel, extra="forbid"):
    """So many seconds after the file was made it goes."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(strict=True, ge=LEAST_EXPIRY_S, le=MOST_EXPIRY_S)]


def check_purpose(purpose: str) -> Purpose:
    """Raises RequestInvalid, with what would be right."""
    if purpose == Purpose.FINE_TUNE:
        return Purpose.FINE_TUNE
    made = f" ('{Purpose.RESULTS}' are made by jobs only)" if purpose == Purpose.RESULTS else ""
    raise RequestInvalid(
        f"purpose '{purpose[:64]}' is not one that files are uploaded for here: send '{Purpose.FINE_TUNE}'{made}.",
        param="purpose",
    )


def check_filename(filename: str) -> str:
    """A text to show again, and no more: it is never part of a path. Raises RequestInvalid."""
    if not 1 <= len(filename) <= MOST_NAME_CHARACTERS or not filename.isprintable():
        raise RequestInvalid(
            f"A filename has 1 to {MOST_NAME_CHARACTERS} characters, none of them a control character.", param="file"
        )
    return filename


@dataclass(frozen=True, slots=True)
class Described:
    """What a sender says of a file."""

    purpose: Purpose
    filename: str
    expires_after_s: int | None

    def fingerprint(self, sha256: str) -> str:
        """What makes two uploads the same request."""
        return fingerprint("create file", self.purpose, self.filename, str(self.expires_after_s), sha256)


class _FileForm(Form):
    """The one file of a form goes into the staged bundle; what else it says is checked as it comes."""

    def __init__(self, request: Request, body: Body, staged: StagedBundle) -> None:
        super().__init__(request, body, WANTED)
        self.filename = ""
        self._staged = staged

    async def _open(self, name: str, filename: str, part: AsyncExitStack) -> Writes | None:
        if name == "file":
            self.filename = check_filename(filename)
            return await part.enter_async_context(self._staged.open(DATA))
        if name not in ("purpose", "expires_after[anchor]", "expires_after[seconds]"):
            raise self._unknown(name)
        return None

    def _take_field(self, name: str, text: str) -> None:
        super()._take_field(name, text)
        if name == "purpose":
            check_purpose(text)

    def purpose(self) -> Purpose:
        if "purpose" not in self.fields:
            raise RequestInvalid(f"The field purpose is missing: send '{Purpose.FINE_TUNE}'.", param="purpose")
        return check_purpose(self.fields["purpose"])

    def expires_after_s(self) -> int | None:
        """Raises RequestInvalid for half a policy, and one out of bounds."""
        anchor, seconds = (self.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        if anchor != ANCHOR:
            raise RequestInvalid(f"expires_after[anchor] is '{ANCHOR}'.", param="expires_after[anchor]")
        if seconds is None or not (seconds.isascii() and seconds.isdigit() and len(seconds) <= 9):
            raise RequestInvalid("expires_after[seconds] is a whole number.", param="expires_after[seconds]")
        if not LEAST_EXPIRY_S <= int(seconds) <= MOST_EXPIRY_S:
            raise RequestInvalid(
                f"expires_after[seconds] is {LEAST_EXPIRY_S} to {MOST_EXPIRY_S}.", param="expires_after[seconds]"
            )
        return int(seconds)


class _Content(StreamingResponse):
    """Gives back what it reads from, also where its sending never began."""

    def __init__(self, pieces: AsyncIterator[bytes], held: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(pieces, headers=headers, media_type="application/octet-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


class _Creation(Together[File]):
    """A file and the answer to who sent it are written together, once."""

    def __init__(self, once: Once, request_sha256: str) -> None:
        self.answer: Kept | None = None
        self.request_sha256 = request_sha256
        self._once = once

    async def before(self, connection: AsyncConnection) -> None:
        await self._once.check_in(connection, self.request_sha256)

    async def after(self, connection: AsyncConnection, made: File) -> None:
        self.answer = Kept(self.request_sha256, 200, f"/v1/files/{made.id}", file_object(made).model_dump_json())
        await self._once.keep(connection, self.answer)


@router.post("", response_model=FileObject)
async def create(request: Request, asker: TrainingKey, parts: AppParts) -> Response:
    """Keep a file: multipart with `purpose` and `file`, and `expires_after` where it is to go by itself.

    It is checked line by line: 400 `invalid_training_file` names every fault, and nothing of it is kept.
    """
    body = Body(request.receive, stall_s=parts.stall_s)
    try:
        async with parts.arrivals.stage(asker.tenant_id, Kind.FILE, {DATA: parts.file_limits.most_bytes + 1}) as staged:
            repeat = once(request, parts, asker.tenant_id)
            await _hold_to_limits(parts, asker, staged, repeat)
            form = _FileForm(request, body, staged)
            await form.receive()
            purpose, expires_after_s = form.purpose(), form.expires_after_s()
            if DATA not in staged.sha256:
                raise RequestInvalid(f"The file is missing: send {WANTED}.", param="file")
            described = Described(purpose, form.filename, expires_after_s)
            creation = _Creation(repeat, described.fingerprint(staged.sha256[DATA]))
            await repeat.check(creation.request_sha256)
            await keep_staged(request, parts, asker, staged, described, creation)
    except Repeated as repeated:
        return as_response(repeated.kept)
    except (GatewayError, AdapterStoreError, TrainingError):
        await body.discard()  # what was staged is gone by now: it waits for no slow client
        raise
    assert creation.answer is not None
    return as_response(creation.answer)


async def keep_staged(
    request: Request,
    parts: Parts,
    asker: TenantKey,
    staged: StagedBundle,
    described: Described,
    together: Together[File],
) -> File:
    """Checks what was staged and keeps it, as the key allows by now. Raises FileInvalid, and what `Files` raises."""
    await trainer(request, parts)  # an upload may take long: the key may be revoked by now
    report = await parts.file_check.run(asker.tenant_id, staged.folder / DATA, staged.sizes[DATA])
    expires_after_s = described.expires_after_s
    new = NewFile(
        asker.tenant_id,
        described.purpose,
        described.filename,
        staged.sha256[DATA],
        staged.sizes[DATA],
        parts.file_limits.expiry_s if expires_after_s is None else expires_after_s,
        asker.key.id,
        report,
    )
    return await parts.files.create(new, staged.folder / DATA, asker.key.plan.file_quota, together)


async def _hold_to_limits(parts: Parts, asker: TenantKey, staged: StagedBundle, once: Once) -> None:
    """Refuses at once what cannot fit, and caps the rest beside what else is under way. Raises QuotaExceeded.

    A repeated request takes nothing of what is left; it brings no more than the tenant may have, or has.
    """
    most = parts.file_limits.most_bytes
    staged.cap(most, FileTooLarge(most))
    quota = asker.key.plan.file_quota
    if not quota.counts:
        return
    kept = await parts.files.kept(asker.tenant_id)
    left = kept.bytes_left(quota)
    if not await once.is_known():
        kept.check(quota, 0)
    elif left is not None:
        left = left + kept.stored_bytes
    if left is not None:
        beside = parts.arrivals.beside(asker.tenant_id, Kind.FILE, staged, left)
        too_large = FileTooLarge(most) if most <= left else bytes_exceeded(quota, kept)
        staged.cap(min(most, left), too_large, beside)


@router.get("")
async def list_files(
    asker: TrainingKey,
    parts: AppParts,
    purpose: Text = None,
    after: Text = None,
    order: Literal["asc", "desc"] = "desc",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> FileList:
    """The tenant's files, the newest first, at most 1,000 at a time."""
    limit = min(limit, MOST_AT_ONCE)
    page = await parts.files.page(
        asker.tenant_id, purpose=purpose, after=after, newest_first=order == "desc", limit=limit + 1
    )
    shown = [file_object(file) for file in page[:limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return FileList(data=shown, first_id=first, last_id=last, has_more=len(page) > limit)


@router.get("/{file_id}")
async def show(file_id: str, asker: TrainingKey, parts: AppParts) -> FileObject:
    """One file, and what the check found in it."""
    return file_object(await parts.files.find(asker.tenant_id, file_id))


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def content(file_id: str, asker: TrainingKey, parts: AppParts) -> Response:
    """The file's bytes. Where what is stored is damaged the answer breaks off before its end."""
    file = await parts.files.find(asker.tenant_id, file_id)
    held = AsyncExitStack()
    pieces = await held.enter_async_context(parts.files.read(file))
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return _Content(pieces, held, headers)


@router.delete("/{file_id}")
async def delete(
    file_id: str,
    asker: TrainingKey,
    parts: AppParts,
    response: Response,
    force: Annotated[bool, Query(description="Erase it though a job needs it.")] = False,
) -> FileDeleted:
    """Erase a file; the receipt is at `location`. Without `force` it is a 409 `file_in_use` while a job needs it."""
    erasure = await parts.files.erase(asker.tenant_id, file_id, requested_by=asker.key.id, force=force)
    await parts.eraser.wait(erasure, REQUEST_WAIT_S)
    response.headers["location"] = f"/v1/erasures/{erasure.id}"
    return FileDeleted(id=file_id, tailor=Erased(erasure=erasure.id))


def forgetting(answers: Answers) -> OnErase:
    """Takes a tenant's texts out of the answers that are kept for repeated requests."""

    async def forget(connection: AsyncConnection, file: File) -> None:
        await answers.rewrite(connection, file.tenant_id, f"/v1/files/{file.id}", without_texts)

    return forget


def without_texts(body: str) -> str:
    """A file's object, or an upload's with its file, without what its sender wrote and what was found in it."""
    told: dict[str, Any] = json.loads(body)
    for thing in (told, told.get("file")):
        if thing is not None:
            thing["filename"] = ""
            if "tailor" in thing:
                thing["tailor"]["report"] = None
    return json.dumps(told)


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
        tailor=FileReport(sha256=file.sha256, report=file.report),
    )
