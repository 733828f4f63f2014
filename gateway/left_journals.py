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
from contextlib import suppress
from pathlib import Path
from typing import Final

from adapter_store.aliases import NAME
from gateway.journal import SUFFIX, UNNAMED, Rows, add

log = logging.getLogger("tailor.usage")
FIELDS: Final = (
    "[1-9][0-9]{9}",  # the hour, 2001 to 2286: one that lost its first digits is none
    "tnt_[0-9a-f]{24}",
    f"{NAME.pattern}|ft:[!-~]{{1,512}}|",  # a name, one that was lent, or none for the base model
    "0|[1-9][0-9]{0,8}",
    "[01]",
    *["0|[1-9][0-9]{0,14}"] * 3,  # with room for their sum in the database's 64 bits
)
LINE: Final = re.compile("\t".join(f"({field})" for field in FIELDS).encode())
"""What a gateway writes, and nothing else."""
UNFINISHED_S: Final = 60
STALE_S: Final = 7 * 86_400  # for so long the database remembers what was counted


class LeftSegment:
    """A dead process's segment, locked for us."""

    def __init__(self, path: Path, file: int) -> None:
        self.id = path.name.removesuffix(SUFFIX)
        self.path = path
        self._file = file

    def read(self) -> Rows:
        """What it counted; a torn last line was never acknowledged, and a damaged one is told.

        Raises:
            OSError: the disk does not give it.
        """
        rows: Rows = {}
        written = self.path.read_bytes().rstrip(b"\0")  # a dead process left room behind its last line
        *lines, torn = written.split(b"\n")
        damaged = 0
        for whole in lines:
            _, hole, line = whole.rpartition(b"\0")  # a page that a power cut took reads as zeros
            found = LINE.fullmatch(line)
            if hole or found is None:
                damaged += 1
            if found is None:
                continue
            hour, tenant, adapter, version, *counts = found.groups()
            failed, prompt, cached, completion = (int(count) for count in counts)
            key = (int(hour), tenant.decode(), adapter.decode(), int(version))
            add(rows, key, 1, failed, prompt, cached, completion)
        if damaged or torn:
            log.warning("%s: %d damaged lines and %d torn bytes are not counted", self.path, damaged, len(torn))
        return rows

    def is_stale(self) -> bool:
        """So old that the database may have forgotten whether it was counted."""
        return time.time() - os.fstat(self._file).st_mtime > STALE_S

    def set_aside(self) -> None:
        self.path.rename(self.path.with_suffix(".stale"))

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def left_segments(folder: Path) -> Iterator[LeftSegment]:
    """Those of dead processes, each locked while it is looked at.

    A living one's are passed over; so is what cannot be opened or locked, which is told.
    """
    _drop_unfinished(folder)
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner was faster
        except OSError as error:
            _tell(path, error)
            continue
        try:
            if _lock(file, path) and os.fstat(file).st_nlink:
                yield LeftSegment(path, file)
        finally:
            os.close(file)


def _drop_unfinished(folder: Path) -> None:
    """Files whose process died between making and naming them: nothing is in them."""
    for path in folder.glob(f"{UNNAMED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > UNFINISHED_S:
                path.unlink()


def _lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _tell(path, error)
        return False
    return True


def _tell(path: Path, error: OSError) -> None:
    log.warning(
        "%s is not counted (%s): let the gateway's user read it. It is kept and tried again in a minute",
        path,
        error.strerror,
    )
