"""`/v1/adapters/{name}/uploads`: an upload in parts, which survives whatever breaks between the first and the last."""

from typing import Annotated, Literal

from fastapi import Header, Request, Response
from pydantic import BaseModel, Field

from adapter_store.bundle import BUNDLE_FILES
from adapter_store.catalog import DEFAULT_ALIAS, Version
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterRejected, AdapterStoreError, BundleTooLarge, PartInvalid, UploadNotFound
from adapter_store.proofs import find_all
from adapter_store.quota import kept_by
from adapter_store.together import Together
from adapter_store.uploads import DeclaredFile, Upload, check_complete, check_part
from gateway.api.adapters import PublishedVersion, published_version
from gateway.api.body import Body
from gateway.api.lazy import LazyRouter
from gateway.api.publishing import Publication, PublishedAlias, as_response, check_published_alias, once, publish_bundle
from gateway.arrivals import Arrivals, Kind
from gateway.dependencies import AdapterKey, AdapterTenant, AppParts, Parts, TenantKey
from gateway.errors import GatewayError, RequestInvalid, answer
from gateway.idempotency import Kept, Once, Repeated, fingerprint

router = LazyRouter(prefix="/v1/adapters/{name}/uploads", tags=["adapters"])

FileName = Literal["adapter_config.json", "adapter_model.safetensors"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class NewFile(BaseModel, extra="forbid"):
    """What a file will be: its size, and its SHA-256 in hex."""

    name: FileName
    bytes: Annotated[int, Field(strict=True, ge=1, le=10**15)]
    sha256: Sha256


class NewUpload(BaseModel, extra="forbid"):
    """Both files of the adapter."""

    files: Annotated[list[NewFile], Field(min_length=2, max_length=2)]


class FileObject(BaseModel):
    """`missing`: numbers of the parts that are still to come, of `parts` in all."""

    name: str
    bytes: int
    sha256: str
    parts: int
    missing: list[int]


class UploadObject(BaseModel):
    """An upload; each part but a file's last has `part_bytes`. Times in Unix seconds."""

    id: str
    object: str = "adapter.upload"
    adapter: str
    status: Literal["open", "completed"]
    part_bytes: int
    files: list[FileObject]
    created_at: int
    expires_at: int


class UploadList(BaseModel):
    object: str = "list"
    data: list[UploadObject]


class _Creation(Together[Upload]):
    """An upload is declared within the tenant's quota, and once for each Idempotency-Key."""

    def __init__(
        self, arrivals: Arrivals, asker: TenantKey, name: str, size_bytes: int, once: Once, request: str
    ) -> None:
        self.answer: Kept | None = None
        self._arrivals = arrivals
        self._asker = asker
        self._name = name
        self._size_bytes = size_bytes
        self._once = once
        self._request = request

    async def before(self, connection: AsyncConnection) -> None:
        await self._once.check_in(connection, self._request)
        quota = self._asker.key.plan.quota
        if quota.counts:
            tenant_id = self._asker.tenant_id
            kept = await kept_by(connection, tenant_id, self._name)
            kept.check(quota, self._size_bytes)
            self._arrivals.check_room(tenant_id, Kind.ADAPTER, self._size_bytes, kept.bytes_left(quota))

    async def after(self, connection: AsyncConnection, made: Upload) -> None:
        location = f"/v1/adapters/{made.adapter_name}/uploads/{made.id}"
        self.answer = Kept(self._request, 201, location, _upload(made).model_dump_json())
        await self._once.keep(connection, self.answer)


class _Completion(Publication):
    """The version is made, the upload closed and the answer kept, or none of them."""

    def __init__(self, parts: Parts, upload: Upload, once: Once, alias: str) -> None:
        super().__init__(once, fingerprint("complete", upload.id, alias), self._told, alias=alias or None)
        self._parts = parts
        self.besides_upload = upload.id
        self._upload = upload

    async def before(self, connection: AsyncConnection) -> None:
        await super().before(connection)
        upload = self._upload
        now = await self._parts.uploads.find_in(connection, upload.tenant_id, upload.adapter_name, upload.id)
        if now.answer is not None:
            raise Repeated(Kept.from_text(now.answer))

    async def _told(self, connection: AsyncConnection, version: Version) -> tuple[str, PublishedVersion]:
        found = await find_all(connection, [version.id])
        return f"/v1/adapters/{version.adapter_name}", published_version(version, self._parts, found)

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        await super().after(connection, made)
        assert self.answer is not None
        await self._parts.uploads.close_in(connection, self._upload, self.answer.to_text())


@router.post("", status_code=201, response_model=UploadObject)
async def create(name: str, body: NewUpload, request: Request, asker: AdapterKey, parts: AppParts) -> Response:
    """Declare an upload in parts: both files, how large they are, and their SHA-256."""
    parts.store.check_name(name)
    files = {str(file.name): DeclaredFile(file.bytes, file.sha256) for file in body.files}
    if set(files) != set(BUNDLE_FILES):
        raise RequestInvalid(f"files: declare {' and '.join(BUNDLE_FILES)}, each once.", param="files")
    for file, declared in files.items():
        if declared.size_bytes > parts.staging.limits[file]:
            raise BundleTooLarge(file, parts.staging.limits[file])
    told = sorted((file, str(declared.size_bytes), declared.sha256) for file, declared in files.items())
    asked = fingerprint("create upload", name, *(word for file in told for word in file))
    size_bytes = sum(declared.size_bytes for declared in files.values())
    creation = _Creation(parts.arrivals, asker, name, size_bytes, once(request, parts, asker.tenant_id), asked)
    try:
        await parts.uploads.create(asker.tenant_id, name, files, creation)
    except Repeated as repeated:
        return as_response(repeated.kept)
    assert creation.answer is not None
    return as_response(creation.answer)


@router.get("")
async def list_open(name: str, tenant_id: AdapterTenant, parts: AppParts) -> UploadList:
    """The uploads of this adapter that are under way, newest first."""
    return UploadList(data=[_upload(upload) for upload in await parts.uploads.list_open(tenant_id, name)])


@router.get("/{upload}")
async def show(name: str, upload: str, tenant_id: AdapterTenant, parts: AppParts) -> UploadObject:
    """What has arrived, and what is missing."""
    return _upload(await parts.uploads.find(tenant_id, name, upload))


@router.put("/{upload}/{file}/{number}")
async def put_part(
    name: str,
    upload: str,
    file: FileName,
    number: int,
    request: Request,
    tenant_id: AdapterTenant,
    parts: AppParts,
    x_content_sha256: Annotated[str, Header(pattern="^[0-9a-f]{64}$")],
) -> UploadObject:
    """Send a part, numbered from 1; it is durable when this is answered. The same part again changes nothing."""
    body = Body(request.receive, stall_s=parts.stall_s)
    try:
        found = await parts.uploads.find(tenant_id, name, upload)
        if found.answer is not None:
            raise UploadNotFound
        size_bytes = found.part_size(file, number)
        check_part(found, file, number, x_content_sha256)
        if (file, number) in found.parts:
            await body.discard()
            return _upload(found)
        async with parts.arrivals.stage(tenant_id, Kind.DECLARED, {file: size_bytes}) as bundle:
            await bundle.write(file, body.pieces())
            if bundle.sizes[file] != size_bytes or bundle.sha256[file] != x_content_sha256:
                raise PartInvalid(
                    f"part {number} of {file} has {size_bytes} bytes of SHA-256 {x_content_sha256}; "
                    f"{bundle.sizes[file]} bytes of {bundle.sha256[file]} came: send it again"
                )
            kept = await parts.uploads.keep_part(found, file, number, bundle.folder / file, x_content_sha256)
    except (GatewayError, AdapterStoreError):
        await body.discard()
        raise
    return _upload(kept)


@router.post("/{upload}/complete", status_code=201, response_model=PublishedVersion)
async def complete(
    name: str,
    upload: str,
    request: Request,
    asker: AdapterKey,
    parts: AppParts,
    alias: PublishedAlias = DEFAULT_ALIAS,
) -> Response:
    """Put the parts together and publish them; asked again, the answer is the same, a refusal too."""
    found = await parts.uploads.find(asker.tenant_id, name, upload)
    if found.answer is not None:
        return as_response(Kept.from_text(found.answer))
    check_published_alias(parts, alias)
    completion = _Completion(parts, found, once(request, parts, asker.tenant_id), alias)
    try:
        made = await _complete(request, parts, asker, found, completion)
    except Repeated as repeated:
        return as_response(repeated.kept)
    except AdapterRejected as rejected:  # what was declared cannot become another adapter: its bytes go
        told = answer(rejected)
        refusal = Kept(completion.request_sha256, told.status, "", told.body.decode())
        await parts.uploads.close(found, refusal.to_text())
        raise
    await parts.uploads.drop_parts(found)
    return made


async def _complete(
    request: Request, parts: Parts, asker: TenantKey, upload: Upload, completion: _Completion
) -> Response:
    await completion.once.check(completion.request_sha256)
    check_complete(upload)
    async with parts.arrivals.complete(asker.tenant_id, upload.id) as bundle:
        await _repeat_if_answered(parts, upload)
        try:
            await parts.uploads.assemble(upload, bundle)
        except UploadNotFound:
            await _repeat_if_answered(parts, upload)
            raise
        return await publish_bundle(request, parts, asker, upload.adapter_name, bundle, completion)


async def _repeat_if_answered(parts: Parts, upload: Upload) -> None:
    """Raises Repeated where another call has completed the upload meanwhile, UploadNotFound where it was cancelled."""
    now = await parts.uploads.find(upload.tenant_id, upload.adapter_name, upload.id)
    if now.answer is not None:
        raise Repeated(Kept.from_text(now.answer))


@router.delete("/{upload}", status_code=204)
async def cancel(name: str, upload: str, tenant_id: AdapterTenant, parts: AppParts) -> None:
    """Cancel an upload; its parts go. A version that it has become stays."""
    await parts.uploads.cancel(tenant_id, name, upload)


def _upload(upload: Upload) -> UploadObject:
    is_open = upload.answer is None
    return UploadObject(
        id=upload.id,
        adapter=upload.adapter_name,
        status="open" if is_open else "completed",
        part_bytes=upload.part_bytes,
        files=[
            FileObject(
                name=name,
                bytes=file.size_bytes,
                sha256=file.sha256,
                parts=upload.part_count(name),
                missing=upload.missing(name) if is_open else [],
            )
            for name, file in upload.files.items()
        ],
        created_at=upload.created_at,
        expires_at=upload.expires_at,
    )
