"""The files of all versions by content: `adapters/<tenant>/<sha256>` in a folder or an object store.

A blob that was put survives a power cut. obstore 0.12 writes a folder's files to a temporary name and renames
them, but never calls fsync, so that is done here. S3 is sent the SHA-256 of every part, and refuses a
part that it does not match.
"""

import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from adapter_store.bundle import NO_LINK, storage_errors
from adapter_store.disk import sync
from adapter_store.errors import BlobCorrupt, StorageError, StorageFull, StorageUnavailable
from adapter_store.ids import TenantId
from adapter_store.s3_leftovers import Leftovers
from adapter_store.threads import in_thread

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PREFIX = "adapters"
FOLDER_PART_BYTES = 1 << 20
REMOTE_PART_BYTES = 5 << 20  # the least that S3 takes
REMOTE_PARTS_AT_ONCE = 2  # a part waits for its answer; each holds 5 MiB, and an upload may take 32 in all
SMALL_BYTES = 16 << 20  # up to here one at a time: the parts of an upload come two at once themselves
READ_BYTES = 1 << 20
PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
KEY = re.compile(rf"{PREFIX}/([A-Za-z0-9_-]{{1,64}})/([0-9a-f]{{64}})")
SIZE_COLUMN = "blob_size"  # in the `info` of a column that names blobs: see `blob_rows`
FLEETING = "fleeting"
# ENOSPC, EFBIG and EDQUOT, as obstore's text has them: it gives no errno.
FULL = re.compile(r"os error (?:28|27|122)\)")


def blob_key(tenant_id: TenantId, sha256: str) -> str:
    """Where a tenant's file lies. Raises ValueError for anything but plain ids and hex."""
    if not PLAIN.fullmatch(tenant_id) or not SHA256.fullmatch(sha256):
        raise ValueError(f"{tenant_id[:80]!r}, {sha256[:80]!r}: not a tenant's id and a SHA-256")
    return f"{PREFIX}/{tenant_id}/{sha256}"


def names_blob(size_column: str, *, fleeting: bool = False) -> dict[str, Any]:
    """For `Column(info=…)` of a column with the SHA-256 of a tenant's blob: `blob_rows`."""
    return {SIZE_COLUMN: size_column, FLEETING: fleeting}


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """`modified_at`: seconds since 1970."""

    tenant_id: TenantId
    sha256: str
    modified_at: float

    @property
    def key(self) -> str:
        return blob_key(self.tenant_id, self.sha256)


def _obstore() -> Any:
    """The library, loaded with the first blob: 4 MiB that a gateway which only relays never needs."""
    import obstore
    import obstore.exceptions
    import obstore.store

    return obstore


class Blobs:
    """Content-addressed files."""

    def __init__(self, store: "ObjectStore | None", folder: Path | None, leftovers: Leftovers | None = None) -> None:
        self._opened = store
        self.folder = folder
        self._leftovers = leftovers
        self._part_bytes = REMOTE_PART_BYTES if folder is None else FOLDER_PART_BYTES
        self._parts_at_once = REMOTE_PARTS_AT_ONCE if folder is None else 1

    @classmethod
    def open(cls, url: str) -> Self:
        """`url`: a path, `file:///…`, or obstore's (`s3://bucket/prefix`), with the environment's credentials."""
        parts = urlsplit(url)
        if parts.scheme in ("s3", "s3a"):
            store = _obstore().store.from_url(url, config={"checksum_algorithm": "SHA256"})
            return cls(store, None, Leftovers.of(url))
        if parts.scheme not in ("", "file"):
            return cls(_obstore().store.from_url(url), None)
        folder = Path(unquote(parts.path) if parts.scheme else url).absolute()
        with store_errors():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(None, folder)

    @property
    def _store(self) -> "ObjectStore":
        if self._opened is None:
            assert self.folder is not None
            self._opened = _obstore().store.LocalStore(self.folder)
        return self._opened

    async def put(self, key: str, path: Path) -> None:
        """Stores the file under `key`: whole, visible at once, durable.

        Raises StorageFull, StorageUnavailable.
        """
        await self._put(key, path)

    async def adopt(self, key: str, path: Path) -> None:
        """`put` of a file that nobody writes to any more: a folder on its own filesystem takes it without a copy."""
        with store_errors():
            if self.folder is not None and await in_thread(_link, self.folder, _path(self.folder, key), path):
                return
        await self._put(key, path)

    async def _put(self, key: str, content: Path | AsyncIterator[bytes]) -> None:
        with store_errors():
            at_once = self._parts_at_once
            if at_once > 1 and isinstance(content, Path) and (await in_thread(content.stat)).st_size <= SMALL_BYTES:
                at_once = 1
            await _obstore().put_async(self._store, key, content, chunk_size=self._part_bytes, max_concurrency=at_once)
            if self.folder is not None:
                await in_thread(make_durable, self.folder, _path(self.folder, key))

    async def exists(self, key: str, size_bytes: int) -> bool:
        with store_errors():
            try:
                if self.folder is not None:
                    return (await in_thread(_path(self.folder, key).stat)).st_size == size_bytes
                return bool((await _obstore().head_async(self._store, key))["size"] == size_bytes)
            except FileNotFoundError:
                return False

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The blob's bytes in pieces. Raises BlobCorrupt where there is none, StorageUnavailable."""
        with store_errors(), ExitStack() as held:
            try:
                if self.folder is not None:
                    pieces = _pieces(held.enter_context(_path(self.folder, key).open("rb", buffering=0)))
                else:
                    pieces = (await _obstore().get_async(self._store, key)).stream(min_chunk_size=READ_BYTES)
            except FileNotFoundError as error:
                raise BlobCorrupt(f"blob {key} is gone") from error
            yield pieces

    async def sha256(self, key: str, on_read: Callable[[int], Awaitable[None]] | None = None) -> str:
        """Of the bytes that lie there; `on_read` is told the size of each piece, and may take its time.

        Raises BlobCorrupt where there is none, StorageUnavailable.
        """
        digest = hashlib.sha256()
        async with self.read(key) as chunks:
            async for chunk in chunks:
                await in_thread(digest.update, chunk)
                if on_read is not None:
                    await on_read(len(chunk))
        return digest.hexdigest()

    async def copy(self, key: str, sha256: str, target: "Blobs") -> None:
        """Copies a blob into another store, whole or not at all. Raises BlobCorrupt: it is not what its digest says."""
        differs = False

        async def verified(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            """An error instead of an end keeps the target from showing anything."""
            nonlocal differs
            digest = hashlib.sha256()
            async for chunk in chunks:
                await in_thread(digest.update, chunk)
                yield chunk
            differs = digest.hexdigest() != sha256
            if differs:
                raise BlobCorrupt

        async with self.read(key) as chunks:
            try:
                await target._put(key, verified(chunks))
            except Exception as error:
                if differs:
                    raise BlobCorrupt(f"blob {key} is not what its digest says") from error
                raise

    async def fetch(self, key: str, sha256: str, path: Path) -> None:
        """Writes a blob to `path`. Raises BlobCorrupt (it is gone, or not what its digest says), StorageError."""
        digest = hashlib.sha256()
        with storage_errors():
            await in_thread(path.unlink, missing_ok=True)  # what lies there may be another name of a blob: `adopt`
            with path.open("xb") as target:
                async with self.read(key) as pieces:
                    async for piece in pieces:
                        digest.update(piece)
                        await in_thread(target.write, piece)
        if digest.hexdigest() != sha256:
            raise BlobCorrupt(f"blob {key} is not what its digest says")

    async def delete(self, key: str) -> None:
        """Removes the blob; it may be gone already."""
        with store_errors():
            try:
                await _obstore().delete_async(self._store, key)
            except FileNotFoundError:
                return

    async def try_delete(self, keys: Iterable[str]) -> None:
        """Removes those that it can; what fails here is swept later."""
        for key in keys:
            with suppress(StorageError):
                await self.delete(key)

    async def sweep(self, prefix: str, before: float, is_over: Callable[[str], bool]) -> int:
        """Removes what was put below `prefix` before that time, in Unix seconds, and `is_over` by its key; how many."""
        removed = 0
        async for key, put_at in self.list_keys(prefix):
            if put_at < before and is_over(key):
                await self.delete(key)
                removed += 1
        return removed

    async def names(self, prefix: str) -> Sequence[str]:
        """The keys that begin with `prefix/`, in order."""
        with store_errors():
            return sorted([item["path"] async for page in _obstore().list(self._store, f"{prefix}/") for item in page])

    async def list(self) -> AsyncIterator[StoredBlob]:
        async for path, modified_at in self.list_keys(PREFIX):
            if (key := KEY.fullmatch(path)) is not None:
                yield StoredBlob(TenantId(key[1]), key[2], modified_at)

    async def list_keys(self, prefix: str) -> AsyncIterator[tuple[str, float]]:
        """What lies below `prefix`: key, and when it was put, in seconds since 1970."""
        with store_errors():
            async for page in _obstore().list(self._store, f"{prefix}/"):
                for item in page:
                    yield item["path"], item["last_modified"].timestamp()

    async def sweep_partial(self, before: float) -> int:
        """Removes what puts that were interrupted before that time left in a folder or in S3; how many."""
        with store_errors():
            if self.folder is not None:
                return await in_thread(_sweep_partial, self.folder, before)
            return 0 if self._leftovers is None else await in_thread(self._leftovers.sweep, before)


def _path(folder: Path, key: str) -> Path:
    """Raises ValueError for a key that leads out of the folder: a replica is told keys by whoever has its token."""
    path = folder / key
    if not path.is_relative_to(folder) or ".." in path.parts:
        raise ValueError(f"{key[:80]!r} is no key")
    return path


async def _pieces(file: FileIO) -> AsyncIterator[bytes]:
    """A file's bytes. obstore 0.12 reads 8 KiB at a time, each in a thread: fetching 100 MB took twice the CPU."""
    while piece := await in_thread(file.read, READ_BYTES):
        yield piece


def _link(root: Path, target: Path, source: Path) -> bool:
    """`source` under the name `target` too, durable before it is seen; False where that cannot be done."""
    spare = target.with_name(f"{target.name}#{uuid4().hex}")
    spare.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, spare)
    except OSError as error:
        if error.errno in NO_LINK:
            return False
        raise
    try:
        os.utime(spare)  # the age by which orphans are told is that of the blob, not of the upload
        sync(spare)
        spare.replace(target)
    finally:
        spare.unlink(missing_ok=True)  # a replacement by another name of the same file does nothing
    make_durable(root, target)
    return True


def make_durable(root: Path, path: Path) -> None:
    """fsync of the file, then of every folder up to the root: each may be new."""
    with suppress(FileNotFoundError):  # a delete was faster; who commits looks again
        sync(path)
    for folder in path.parents:
        sync(folder)
        if folder == root:
            return


def _sweep_partial(folder: Path, before: float) -> int:
    """obstore 0.12 writes `<key>#<n>` before it renames."""
    stale = [path for path in folder.rglob("*#*") if path.stat().st_mtime < before]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


@contextmanager
def store_errors() -> Iterator[None]:
    """obstore's errors → StorageFull or StorageUnavailable; the text of the store stays in the cause."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, _obstore().exceptions.BaseError)):
            raise
        if FULL.search(str(error)) or getattr(error, "errno", None) in (27, 28, 122):
            raise StorageFull("no space left in the blob store") from error
        raise StorageUnavailable("the blob store does not answer as it should") from error
