"""Where the parts of an upload lie until it is completed.

In a folder each file of an upload is one file, and each part is written to its place in it: putting the parts
together then copies nothing. Writers of one file take turns, those of other gateways on the same folder too, and write
only what no row says is there. So a file whose parts are all there is never written to again, and can be inspected and
published as it is. In an object store each part is an object of its own.
"""

import asyncio
import fcntl
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final
from uuid import uuid4
from weakref import WeakValueDictionary

from adapter_store.blobs import PLAIN, Blobs, make_durable, store_errors
from adapter_store.bundle import StagedBundle
from adapter_store.errors import BlobCorrupt, StorageUnavailable
from adapter_store.ids import TenantId, UploadId
from adapter_store.threads import in_thread

PREFIX: Final = "uploads"
COPY_BYTES: Final = 1 << 20
TURN_S: Final = 20.0
LOOK_AGAIN_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of an upload; `index`: its place among a bundle's files."""

    tenant_id: TenantId
    upload_id: UploadId
    name: str
    index: int
    size_bytes: int

    @property
    def key(self) -> str:
        assert PLAIN.fullmatch(self.tenant_id)
        return f"{PREFIX}/{self.tenant_id}/{self.upload_id}-{self.index}"


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file, by where they begin and how many they are; numbers count from 1."""

    file: PartFile
    number: int
    offset: int
    size_bytes: int
    sha256: str

    @property
    def key(self) -> str:
        return f"{self.file.key}-{self.number}-{self.sha256}"


class PartStorage(ABC):
    """`turn` is held while a part is put and its row written, and while damaged ones are dropped."""

    @classmethod
    def of(cls, blobs: Blobs) -> "PartStorage":
        return PartObjects(blobs) if blobs.folder is None else PartFolder(blobs, blobs.folder)

    @abstractmethod
    def turn(self, file: PartFile) -> AbstractAsyncContextManager[None]:
        """Keeps others from writing to the file. Raises StorageUnavailable."""

    @abstractmethod
    async def put(self, part: Part, path: Path, *, is_first: bool) -> None:
        """Stores a part that was checked, durably; `is_first`: no row names one of the file. Raises StorageError."""

    @abstractmethod
    async def assemble(self, file: PartFile, parts: Sequence[Part], bundle: StagedBundle) -> None:
        """Stages the whole file. Raises BlobCorrupt where something of it is gone, and what staging raises."""

    @abstractmethod
    async def holds(self, part: Part) -> bool:
        """Whether its bytes are what they were. Raises StorageError."""

    @abstractmethod
    async def keep_only(self, file: PartFile, parts: Sequence[Part]) -> None:
        """Prepares the file to be given its other parts again. Raises StorageError."""

    @abstractmethod
    async def drop(self, files: Collection[PartFile], parts: Collection[Part]) -> None:
        """Removes them; what fails here is swept later."""


class PartFolder(PartStorage):
    """A file for each file, in the folder of the blobs."""

    def __init__(self, blobs: Blobs, folder: Path) -> None:
        self._blobs = blobs
        self._folder = folder
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, file: PartFile) -> AsyncIterator[None]:
        async with self._turns.setdefault(file.key, asyncio.Lock()):
            descriptor = await self._lock(self._path(file))
            try:
                yield
            finally:
                os.close(descriptor)

    async def put(self, part: Part, path: Path, *, is_first: bool) -> None:
        target = self._path(part.file)
        with store_errors():
            await in_thread(_put, target, part.offset, path)
            if is_first:  # the file's name: later parts find it durable, for a row says so
                await in_thread(make_durable, self._folder, target)

    async def assemble(self, file: PartFile, parts: Sequence[Part], bundle: StagedBundle) -> None:
        try:
            if await bundle.adopt(file.name, self._path(file)):
                return
        except FileNotFoundError as error:
            raise BlobCorrupt(f"{file.name} is gone") from error
        async with self._blobs.read(file.key) as pieces:
            await bundle.write(file.name, pieces)

    async def holds(self, part: Part) -> bool:
        with store_errors():
            return await in_thread(_sha256, self._path(part.file), part.offset, part.size_bytes) == part.sha256

    async def keep_only(self, file: PartFile, parts: Sequence[Part]) -> None:
        """In another file: the present one may be staged already."""
        with store_errors():
            await in_thread(_renew, self._folder, self._path(file), parts)

    async def drop(self, files: Collection[PartFile], parts: Collection[Part]) -> None:
        await self._blobs.try_delete(file.key for file in files)

    def _path(self, file: PartFile) -> Path:
        return self._folder / file.key

    async def _lock(self, path: Path) -> int:
        """The file, locked; whoever closes it gives the turn away."""
        for _ in range(round(TURN_S / LOOK_AGAIN_S)):
            with store_errors():
                descriptor = _try_lock(path)  # not in a thread: a cancelled caller would lose it
            if descriptor is not None:
                return descriptor
            await asyncio.sleep(LOOK_AGAIN_S)
        raise StorageUnavailable("other gateways have stored parts of this file all the time: send it again")


class PartObjects(PartStorage):
    """An object for each part, named by its content: nothing is ever overwritten, so nobody waits."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    @asynccontextmanager
    async def turn(self, file: PartFile) -> AsyncIterator[None]:
        yield

    async def put(self, part: Part, path: Path, *, is_first: bool) -> None:
        await self._blobs.adopt(part.key, path)

    async def assemble(self, file: PartFile, parts: Sequence[Part], bundle: StagedBundle) -> None:
        await bundle.write(file.name, self._read(parts))

    async def holds(self, part: Part) -> bool:
        try:
            return await self._blobs.sha256(part.key) == part.sha256
        except BlobCorrupt:
            return False

    async def keep_only(self, file: PartFile, parts: Sequence[Part]) -> None:
        return

    async def drop(self, files: Collection[PartFile], parts: Collection[Part]) -> None:
        await self._blobs.try_delete(part.key for part in parts)

    async def _read(self, parts: Sequence[Part]) -> AsyncIterator[bytes]:
        for part in parts:
            async with self._blobs.read(part.key) as pieces:
                async for piece in pieces:
                    yield piece


def _try_lock(path: Path) -> int | None:
    """None: another process has the file, or it was renewed or removed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _put(target: Path, offset: int, source: Path) -> None:
    with target.open("r+b", buffering=0) as file, source.open("rb", buffering=0) as part:
        file.seek(offset)
        _copy(part, file)
        os.fsync(file.fileno())


def _renew(root: Path, target: Path, parts: Sequence[Part]) -> None:
    spare = target.with_name(f"{target.name}#{uuid4().hex}")
    try:
        with target.open("rb", buffering=0) as old, spare.open("xb", buffering=0) as new:
            for part in parts:
                old.seek(part.offset)
                new.seek(part.offset)
                _copy(old, new, part.size_bytes)
        make_durable(root, spare)
        spare.replace(target)
    finally:
        spare.unlink(missing_ok=True)
    make_durable(root, target)


def _copy(source: FileIO, target: FileIO, size_bytes: int | None = None) -> None:
    """From where both stand, to the end or so many bytes."""
    left = size_bytes
    while piece := source.read(COPY_BYTES if left is None else min(COPY_BYTES, left)):
        with memoryview(piece) as rest:
            written = 0
            while written < len(rest):
                written += target.write(rest[written:])
        left = None if left is None else left - len(piece)


def _sha256(path: Path, offset: int, size_bytes: int) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while size_bytes and (piece := file.read(min(COPY_BYTES, size_bytes))):
                digest.update(piece)
                size_bytes -= len(piece)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
