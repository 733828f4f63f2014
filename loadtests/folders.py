"""Temporary folders that nobody is left with: what a load test that was killed has left, the next one takes away.

A folder is locked (flock) while it is in use, and a lock ends with its process, however that ends. Between its making
and its locking a folder looks as if it had been left, so its maker takes another one where it has gone meanwhile.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PREFIX: Final = "tailor-loadtest-own-"
_TRIES: Final = 20


@contextmanager
def own_folder(root: Path | None = None) -> Iterator[Path]:
    """A new folder, until the block ends, under `root` or where temporary files are."""
    root = root or Path(tempfile.gettempdir())
    _take_away_left(root)
    folder, lock = _made(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _take_away_left(root: Path) -> None:
    for found in root.glob(f"{PREFIX}*"):
        lock = _locked(found)
        if lock is not None:
            shutil.rmtree(found, ignore_errors=True)
            os.close(lock)


def _made(root: Path) -> tuple[Path, int | None]:
    """With its lock; without one on a file system that has none, where nobody can take it for left either."""
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        lock = _locked(folder)
        if lock is not None:
            return folder, lock
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder, None


def _locked(folder: Path) -> int | None:
    """Our folder's lock, an open file; None where another has it, or the folder is not ours or not there any more."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, there = os.fstat(file), folder.lstat()
        if os.path.samestat(opened, there) and opened.st_uid == os.getuid():
            return file
    except OSError:
        pass
    os.close(file)
    return None
