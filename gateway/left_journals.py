"""What a dead process left in its journal: read, counted by another process, and taken away.

Not in `gateway.journal`, which is compiled: there a generator that is dropped half way does not run its `finally`, and
the lock of the file that it was at would stay.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.journal import SUFFIX, Rows, add

log = logging.getLogger("tailor.usage")
LINE: Final = re.compile(rb"([0-9]+)\t([^\t]+)\t([^\t]*)\t([0-9]+)\t([01])\t([0-9]+)\t([0-9]+)\t([0-9]+)")
STALE_S: Final = 7 * 86_400  # for so long the database remembers what was counted


class LeftSegment:
    """A dead process's segment, locked for us."""

    def __init__(self, path: Path, file: int) -> None:
        self.id = path.name.removesuffix(SUFFIX)
        self._path = path
        self._file = file

    def read(self) -> Rows:
        """What it counted; a torn last line was never acknowledged, and a damaged one is told."""
        rows: Rows = {}
        written = self._path.read_bytes().rstrip(b"\0")  # a dead process left room behind its last line
        *lines, torn = written.split(b"\n")
        damaged = 0
        for line in lines:
            found = LINE.fullmatch(line)
            if found is None:
                damaged += 1
                continue
            hour, tenant, adapter, version, *counts = found.groups()
            failed, prompt, cached, completion = (int(count) for count in counts)
            key = (int(hour), tenant.decode(), adapter.decode(), int(version))
            add(rows, key, 1, failed, prompt, cached, completion)
        if damaged or torn:
            log.warning("%s: %d damaged lines and %d torn bytes are not counted", self._path, damaged, len(torn))
        return rows

    def is_stale(self) -> bool:
        """So old that the database may have forgotten whether it was counted."""
        return time.time() - os.fstat(self._file).st_mtime > STALE_S

    def set_aside(self) -> None:
        self._path.rename(self._path.with_suffix(".stale"))

    def delete(self) -> None:
        self._path.unlink(missing_ok=True)


def left_segments(folder: Path) -> Iterator[LeftSegment]:
    """Those of dead processes, each locked while it is looked at; a living one's are passed over."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner was faster
        try:
            if _lock(file) and os.fstat(file).st_nlink:
                yield LeftSegment(path, file)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
