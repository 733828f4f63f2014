"""A replica's disk cache: digest → folder with the two files. In vLLM's API process; one per root.

vLLM 0.32 reads an adapter again from disk, inside an engine step, after it fell out of host memory: files
gone or changed then end the engine for everybody. So a pinned folder that was fetched is never removed; the agent
pins a digest for as long as the engine knows a name that uses it. Pin before `fetch`, which leaves no moment
in between.
"""

import asyncio
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, bundle_digest, storage_errors
from adapter_store.catalog import BlobFile
from adapter_store.errors import BlobCorrupt, StorageFull
from adapter_store.threads import in_thread

DIGEST = re.compile(r"[0-9a-f]{64}")
PARTIAL = ".partial-"


class DigestPinned(Exception):
    """The folder is in use."""


class DiskCache:
    """Folders by digest, least recently fetched removed first when `limit_bytes` is reached."""

    def __init__(self, root: Path, blobs: Blobs, limit_bytes: int) -> None:
        """Takes over what lies in `root` from an earlier process; interrupted fetches are removed."""
        self._root = root
        self._blobs = blobs
        self._limit_bytes = limit_bytes
        self._pins: Counter[str] = Counter()
        self._fetches: dict[str, asyncio.Task[Path]] = {}
        self._reserved_bytes = 0
        with storage_errors():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._entries = _take_over(root)  # in the order of use, oldest first

    @property
    def used_bytes(self) -> int:
        return sum(self._entries.values())

    @property
    def limit_bytes(self) -> int:
        return self._limit_bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def pin(self, digest: str) -> None:
        """Keeps the folder of `digest`, there or still to be fetched, until as many `unpin`."""
        self._pins[_checked(digest)] += 1

    def unpin(self, digest: str) -> None:
        if self._pins[digest] < 1:
            raise ValueError(f"{digest[:80]} is not pinned")
        self._pins[digest] -= 1
        if self._pins[digest] == 0:
            del self._pins[digest]

    async def fetch(self, digest: str, files: Sequence[BlobFile]) -> Path:
        """The folder of `digest`, fetched where needed and hashed in any case; concurrent callers share one fetch.

        What lies there is read whole before each load: a disk that has changed a byte since is found before the engine
        reads it, and the file fetched again. 100 MB take 0.1 s of a thread's time (docs/benchmarks.md).

        Raises BlobCorrupt (nothing is left behind), StorageFull (the rest is pinned), StorageUnavailable.
        """
        named = _by_name(_checked(digest), files)
        task = self._fetches.get(digest)
        if task is None:
            task = asyncio.create_task(self._fetch(digest, named))
            self._fetches[digest] = task
            task.add_done_callback(lambda _: self._fetches.pop(digest, None))
        return await asyncio.shield(task)

    async def release(self, digest: str) -> bool:
        """Removes the folder of `digest` now, whatever room there is; False where there is none.

        Raises DigestPinned: the engine may still read it.
        """
        if digest in self._pins or digest in self._fetches:
            raise DigestPinned(digest)
        known = _checked(digest) in self._entries
        await self._discard(digest)
        return known

    async def close(self) -> None:
        """Waits for fetches that are under way."""
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)

    async def _fetch(self, digest: str, files: dict[str, BlobFile]) -> Path:
        folder = self._root / digest
        size_bytes = self._entries.get(digest)
        if size_bytes is None or not await in_thread(_is_whole, folder, files):
            size_bytes = await self._download(folder, files)
        self._entries.pop(digest, None)
        self._entries[digest] = size_bytes  # now the most recently used
        with storage_errors():
            os.utime(folder)
        return folder

    async def _download(self, folder: Path, files: dict[str, BlobFile]) -> int:
        """Fetches the files; what lay there before goes at the end, in the same moment."""
        size_bytes = sum(file.size_bytes for file in files.values())
        self._reserved_bytes += size_bytes
        partial = self._root / f"{PARTIAL}{folder.name}"
        try:
            await self._make_room()
            with storage_errors():
                partial.mkdir(mode=0o700)
                for file in files.values():
                    await self._download_file(file, partial / file.name)
                self._entries.pop(folder.name, None)
                gone = _out_of_the_way(folder)
                partial.rename(folder)
        except BaseException:
            if folder.name not in self._pins:
                await self._discard(folder.name)
            raise
        finally:
            self._reserved_bytes -= size_bytes
            await in_thread(shutil.rmtree, partial, ignore_errors=True)
        await in_thread(shutil.rmtree, gone, ignore_errors=True)
        return size_bytes

    async def _download_file(self, file: BlobFile, path: Path) -> None:
        digest = hashlib.sha256()
        size_bytes = 0
        async with self._blobs.read(file.key) as chunks:
            with path.open("xb", buffering=0) as target:
                async for chunk in chunks:
                    size_bytes += len(chunk)
                    if size_bytes > file.size_bytes:
                        break
                    await in_thread(_append, target.fileno(), chunk, digest)
        if size_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
            raise BlobCorrupt(f"blob {file.key} is not what its digest says")

    async def _make_room(self) -> None:
        """Removes unpinned folders, the longest unused first, until the reserved bytes fit."""
        while self.used_bytes + self._reserved_bytes > self._limit_bytes:
            # chosen anew each time: while one folder is removed, another may be pinned
            spare = (digest for digest in self._entries if digest not in self._pins and digest not in self._fetches)
            victim = next(spare, None)
            if victim is None:
                raise StorageFull(
                    f"the adapter cache of {self._limit_bytes} bytes is full of adapters in use: raise it"
                )
            await self._discard(victim)

    async def _discard(self, digest: str) -> None:
        if self._entries.pop(digest, None) is None:
            return
        await in_thread(shutil.rmtree, _out_of_the_way(self._root / digest), ignore_errors=True)


def _out_of_the_way(folder: Path) -> Path:
    """Where the folder's files are now, if it was there: removing them takes time, and it may be fetched anew."""
    gone = folder.with_name(f"{PARTIAL}{uuid4().hex}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    return gone


def _take_over(root: Path) -> dict[str, int]:
    folders = [path for path in root.iterdir() if path.is_dir()]
    for path in folders:
        if path.name.startswith(PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
    kept = sorted((path for path in folders if DIGEST.fullmatch(path.name)), key=lambda path: path.stat().st_mtime)
    return {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in kept}


def _checked(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest[:80]!r} is not a digest")
    return digest


def _by_name(digest: str, files: Sequence[BlobFile]) -> dict[str, BlobFile]:
    """The two files by name, which alone become paths. Raises BlobCorrupt: they do not make up `digest`."""
    named = {file.name: file for file in files}
    if sorted(named) != sorted(BUNDLE_FILES) or len(files) != len(named):
        raise BlobCorrupt(f"a bundle has the files {' and '.join(BUNDLE_FILES)}")
    if bundle_digest(*(named[name].sha256 for name in BUNDLE_FILES)) != digest:
        raise BlobCorrupt(f"these files do not make up the bundle {digest}")
    return named


def _is_whole(folder: Path, files: dict[str, BlobFile]) -> bool:
    """Whether both files are there, in size and content."""
    return all(
        _size(folder / file.name) == file.size_bytes and _sha256(folder / file.name) == file.sha256
        for file in files.values()
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _append(descriptor: int, chunk: bytes, digest: "hashlib._Hash") -> None:
    left = memoryview(chunk)
    digest.update(left)
    while left:
        left = left[os.write(descriptor, left) :]
