"""What an operator imports: an adapter's two files from a folder of the server's, or from the blob store.

A folder is named below one root, and walked without following a link; a blob below `imports/`. So neither a slip of the
operator's nor a link that somebody has laid there reaches anything else.
"""

import os
import re
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, StagedBundle, storage_errors
from adapter_store.errors import BlobCorrupt, ImportInvalid
from adapter_store.threads import in_thread

PREFIX: Final = "imports"
READ_BYTES: Final = 1 << 20
PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MOST_PARTS: Final = 16


class Imports:
    """Where imports come from; without a root there are none from folders."""

    def __init__(self, blobs: Blobs, root: Path | None) -> None:
        self._blobs = blobs
        self._root = root

    async def from_folder(self, folder: str, bundle: StagedBundle) -> None:
        """Stages the two files of a folder below the root. Raises ImportInvalid, and what staging raises."""
        if self._root is None:
            raise ImportInvalid("importing from a folder is off: set TAILOR_IMPORT_ROOT to the folder of such folders")
        parts = _parts(folder)
        for name in BUNDLE_FILES:
            with _opened(self._root, (*parts, name)) as file:
                await bundle.write(name, _pieces(file))

    async def from_blobs(self, prefix: str, bundle: StagedBundle) -> None:
        """Stages the two files below `imports/<prefix>` in the blob store. Raises as `from_folder`."""
        parts = _parts(prefix)
        for name in BUNDLE_FILES:
            key = "/".join((PREFIX, *parts, name))
            try:
                async with self._blobs.read(key) as pieces:
                    await bundle.write(name, pieces)
            except BlobCorrupt:
                raise ImportInvalid(f"the blob store has no {key}") from None


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if len(parts) > MOST_PARTS or not all(PART.fullmatch(part) for part in parts):
        raise ImportInvalid(
            f"{path[:160]!r} is not where an import may come from: name a folder by letters, digits, '.', '_', '-' "
            "and '/', below the root and without '..'"
        )
    return parts


@contextmanager
def _opened(root: Path, parts: tuple[str, ...]) -> Iterator[BinaryIO]:
    """A plain file below the root; each folder on the way is opened from the one above it: no link is followed."""
    *folders, name = parts
    told = "/".join(parts)
    held: list[int] = []
    try:
        held.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
        for folder in folders:
            held.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=held[-1]))
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=held[-1])
    except OSError as error:
        raise ImportInvalid(f"'{told}' below the import root cannot be opened: {error.strerror}") from error
    finally:
        for descriptor in held:
            os.close(descriptor)
    with os.fdopen(file, "rb", buffering=0) as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ImportInvalid(f"'{told}' below the import root is no plain file")
        yield opened


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while True:
        with storage_errors():
            piece = await in_thread(file.read, READ_BYTES)
        if not piece:
            return
        yield piece
