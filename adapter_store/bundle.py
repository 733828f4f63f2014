"""The two files of an adapter, staged from a stream into a quarantine folder of their own.

Only two file names exist, so nothing that a tenant sends can become a path. A staged file is never served
from here: it is checked and copied to the blob store. So it need not survive a power cut, and goes with the
upload.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_store.bundle_files import BUNDLE_FILES as BUNDLE_FILES
from adapter_store.bundle_files import CONFIG_FILE as CONFIG_FILE
from adapter_store.bundle_files import WEIGHTS_FILE as WEIGHTS_FILE
from adapter_store.errors import (
    BundleIncomplete,
    BundleTooLarge,
    StorageFull,
    StorageUnavailable,
)
from adapter_store.threads import in_thread

if TYPE_CHECKING:
    from hashlib import _Hash

WRITE_BYTES = 1 << 20
HASH_PIECES = 32
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})


class Staging:
    """A folder of quarantined uploads; several processes may share it."""

    def __init__(self, root: Path, *, config_limit_bytes: int = 256 << 10, weights_limit_bytes: int = 2 << 30) -> None:
        self.root = root
        self.limits = {CONFIG_FILE: config_limit_bytes, WEIGHTS_FILE: weights_limit_bytes}

    @asynccontextmanager
    async def stage(self, limits: dict[str, int] | None = None) -> AsyncIterator["StagedBundle"]:
        """One upload's folder, removed on every way out. `limits`: lower ones, bytes by file name.

        Raises StorageFull, StorageUnavailable.
        """
        folder, lock = self._create()  # not in a thread: a cancelled caller would lose them
        bundle = StagedBundle(folder, limits or self.limits)
        try:
            yield bundle
        finally:
            await in_thread(_remove, folder, lock)

    def sweep(self) -> int:
        """Removes what dead processes left behind; returns how many folders. Called at start."""
        if not self.root.is_dir():
            return 0
        return sum(_remove_if_abandoned(folder) for folder in self.root.iterdir() if folder.is_dir())

    def _create(self) -> tuple[Path, int]:
        with storage_errors():
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = Path(tempfile.mkdtemp(dir=self.root))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)  # held as long as the upload lives: sweep() leaves it alone
            return folder, lock


@dataclass(frozen=True, slots=True)
class Beside:
    """Other uploads that a cap holds for too: together they have at most so many bytes, else `refusal` is raised."""

    most_bytes: int
    others_bytes: Callable[[], int]  # asked in threads too
    refusal: Exception


class StagedBundle:
    """The files of one upload: `sha256` and `sizes` by file name, once written."""

    def __init__(self, folder: Path, limits: dict[str, int]) -> None:
        self.folder = folder
        self.limits = limits
        self.sha256: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._taken_bytes = 0
        self._most_bytes: int | None = None
        self._refusal: Exception | None = None
        self._beside: Beside | None = None
        self._is_refused = False

    def cap(self, most_bytes: int, refusal: Exception, beside: Beside | None = None) -> None:
        """From now on the files together may have so many bytes; one more, and `refusal` is raised mid-stream."""
        self._most_bytes = most_bytes
        self._refusal = refusal
        self._beside = beside

    @property
    def counted_bytes(self) -> int:
        """What it has taken, as it counts for others: what was refused is about to go, and is in nobody's way."""
        return 0 if self._is_refused else self._taken_bytes

    async def write(self, name: str, chunks: AsyncIterable[bytes]) -> None:
        """Writes one of the two files. Raises BundleTooLarge, BundleIncomplete, StorageError."""
        async with self.open(name) as file:
            async for chunk in chunks:
                await file.write(chunk)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator["StagedFile"]:
        """The same for a parser that hands out pieces as they come."""
        file = self.begin(name)
        try:
            yield file
            await file.flush()
        finally:
            file.close()
        self.finish(file)

    def begin(self, name: str) -> "StagedFile":
        """The same for work in a thread: the caller closes the file, and finishes it where it is whole."""
        if name not in self.limits:
            raise BundleIncomplete(f"a bundle has the files {' and '.join(self.limits)}, not {name[:80]!r}")
        if name in self.sha256:
            raise BundleIncomplete(f"{name} was sent twice")
        with storage_errors():
            return StagedFile(self.folder / name, self.limits[name], self._count)

    def finish(self, file: "StagedFile") -> None:
        """The file is whole."""
        name = file.path.name
        self.sha256[name], self.sizes[name] = file.sha256, file.size_bytes

    async def adopt(self, name: str, path: Path) -> bool:
        """Takes a file that nobody writes to any more under its own name, without a copy; False where that is no way.

        Raises FileNotFoundError, BundleTooLarge, StorageError.
        """
        target = self.folder / name
        try:
            await in_thread(os.link, path, target)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in NO_LINK:
                return False
            with storage_errors():
                raise
        with storage_errors(), target.open("rb", buffering=0) as file:
            self._admit(name, os.fstat(file.fileno()).st_size)
            self.sha256[name], self.sizes[name] = await _sha256(file), file.tell()
        return True

    def _admit(self, name: str, size_bytes: int) -> None:
        if size_bytes > self.limits[name]:
            raise BundleTooLarge(name, self.limits[name])
        self._count(size_bytes)

    def _count(self, size_bytes: int) -> None:
        self._taken_bytes += size_bytes
        if self._most_bytes is not None and self._taken_bytes > self._most_bytes:
            assert self._refusal is not None
            self._is_refused = True
            raise self._refusal
        beside = self._beside
        if beside is not None and self._taken_bytes + beside.others_bytes() > beside.most_bytes:
            self._is_refused = True
            raise beside.refusal

    def check_complete(self) -> None:
        """Raises BundleIncomplete where a file is missing or empty."""
        for name in BUNDLE_FILES:
            if not self.sizes.get(name):
                raise BundleIncomplete(f"{name} is {'empty' if name in self.sizes else 'missing'}")


class StagedFile:
    """A file being written: capped, hashed in passing, written in pieces of a MiB."""

    def __init__(self, path: Path, limit_bytes: int, count: Callable[[int], None]) -> None:
        self.path = path
        self._count = count
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._pending = bytearray()
        self._file = path.open("xb", buffering=0)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    async def write(self, chunk: bytes) -> None:
        self._admit(len(chunk))
        self._pending += chunk
        if len(self._pending) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await in_thread(self._write, pending)

    def take(self, data: bytes) -> None:
        """`write` in a thread of the caller's, at once."""
        self._admit(len(data))
        self._write(data)

    def check_size(self, size_bytes: int) -> None:
        """A sender says how large the file will be. Raises BundleTooLarge."""
        if size_bytes > self.limit_bytes:
            raise BundleTooLarge(self.path.name, self.limit_bytes)

    def close(self) -> None:
        self._file.close()

    def _admit(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self.check_size(self.size_bytes)
        self._count(size_bytes)

    def _write(self, data: bytes | bytearray) -> None:
        self._digest.update(data)
        with storage_errors(), memoryview(data) as left:
            while left:
                left = left[self._file.write(left) :]


async def _sha256(file: FileIO) -> str:
    digest = hashlib.sha256()
    while await in_thread(_hash_some, digest, file):
        pass
    return digest.hexdigest()


def _hash_some(digest: "_Hash", file: FileIO) -> bool:
    """So much that going to a thread for it costs nothing; whether there is more."""
    for _ in range(HASH_PIECES):
        piece = file.read(WRITE_BYTES)
        if not piece:
            return False
        digest.update(piece)
    return True


def bundle_digest(config_sha256: str, weights_sha256: str) -> str:
    """What names a version's content: SHA-256 over the hex digests of canonical config and weights."""
    return hashlib.sha256(f"{config_sha256}\n{weights_sha256}\n".encode()).hexdigest()


@contextmanager
def storage_errors() -> Iterator[None]:
    """OSError → StorageFull or StorageUnavailable."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise StorageFull(f"no space to store the adapter: {reason}") from error
        raise StorageUnavailable(f"the adapter cannot be stored: {reason}") from error


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_if_abandoned(folder: Path) -> bool:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder, lock)
        return True
    os.close(lock)
    return False
