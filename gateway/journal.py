"""The journal of usage: lines in files that outlive the process, until the database has them.

A segment is one file and one batch: its name is the id under which the database knows that it was counted. Whoever
writes a segment holds its lock, so a file without a holder was left by a process that died, and another may count it.
A line is in the page cache when `append` returns: it survives the process (kill -9), not a power cut. The file is
mapped into memory, since a write to it cost 9 µs a request, more than all other counting together.
"""

import fcntl
import logging
import mmap
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger("tailor.usage")
SUFFIX: Final = ".journal"
LINE: Final = re.compile(rb"([0-9]+)\t([^\t]+)\t([^\t]*)\t([0-9]+)\t([01])\t([0-9]+)\t([0-9]+)\t([0-9]+)")
STALE_S: Final = 7 * 86_400  # for so long the database remembers what was counted
FIRST_BYTES: Final = 65_536
HOUR_S: Final = 3_600

Key = tuple[int, str, str, int]
"""Hour (its first second), tenant, adapter, version."""
Rows = dict[Key, list[int]]
"""Requests, failed ones, prompt tokens, cached ones of them, completion tokens."""


def add(rows: Rows, key: Key, requests: int, failed: int, prompt: int, cached: int, completion: int) -> None:
    """Count requests."""
    row = rows.get(key)
    if row is None:
        rows[key] = [requests, failed, prompt, cached, completion]
        return
    row[0] += requests
    row[1] += failed
    row[2] += prompt
    row[3] += cached
    row[4] += completion


class Tab:
    """What one version's requests of a tenant have come to since the last batch.

    Whoever keeps it counts without a lookup; there may be several of the same version, which a batch adds up.
    """

    __slots__ = (
        "adapter", "cached", "completion", "failed", "head", "hour", "prompt", "requests", "segment", "tenant",
        "version",
    )  # fmt: skip

    def __init__(self, tenant: str, adapter: str, version: int) -> None:
        self.tenant = tenant
        self.adapter = adapter
        self.version = version
        self.hour = 0
        self.head = b""  # of its lines
        self.segment: Segment | None = None  # that it is counted in; None: there is nothing to count
        self.requests = self.failed = self.prompt = self.cached = self.completion = 0


class Segment:
    """Lines of one batch. Where the disk takes none, the batch is in memory alone; `lost_by_kill` counts these."""

    def __init__(self, folder: Path, *, limit_bytes: int, fsync: bool) -> None:
        self.id = f"{int(time.time())}-{secrets.token_hex(12)}"
        self._rows: Rows = {}
        self._tabs: list[Tab] = []
        self._known: dict[tuple[str, str, int], Tab] = {}
        self.lost_by_kill = 0
        self._path = folder / f"{self.id}{SUFFIX}"
        self._limit_bytes = limit_bytes
        self._fsync = fsync
        self._size = 0
        self._room = 0
        self._map: mmap.mmap | None = None
        self._is_broken = False
        self._file = self._create(folder)

    def _create(self, folder: Path) -> int:
        """The file appears under its name only once it is locked."""
        beside = folder / f".{self.id}.{os.getpid()}"
        try:
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            beside.rename(self._path)
        except OSError as error:
            self._refused(error)
            return -1
        return file

    def tab_of(self, tenant: str, adapter: str, version: int) -> Tab:
        """One for whoever keeps none."""
        key = (tenant, adapter, version)
        tab = self._known.get(key)
        if tab is None:
            tab = self._known[key] = Tab(tenant, adapter, version)
        return tab

    def count(self, tab: Tab, hour: int, failed: int, prompt: int, cached: int, completion: int) -> None:
        """One request. Never raises: what the disk does not take is counted all the same."""
        if tab.segment is not self or tab.hour != hour:
            self._begin(tab, hour)
        tab.requests += 1
        tab.failed += failed
        tab.prompt += prompt
        tab.cached += cached
        tab.completion += completion
        self._append(b"%b%d\t%d\t%d\t%d\n" % (tab.head, failed, prompt, cached, completion))

    def _begin(self, tab: Tab, hour: int) -> None:
        if tab.segment is not None:
            tab.segment.rows()
        if tab.hour != hour:
            tab.hour = hour
            tab.head = f"{hour}\t{tab.tenant}\t{tab.adapter}\t{tab.version}\t".encode()
        tab.segment = self
        self._tabs.append(tab)

    def rows(self) -> Rows:
        """What has been counted so far."""
        tabs, self._tabs = self._tabs, []
        for tab in tabs:
            key = (tab.hour, tab.tenant, tab.adapter, tab.version)
            add(self._rows, key, tab.requests, tab.failed, tab.prompt, tab.cached, tab.completion)
            tab.segment = None
            tab.requests = tab.failed = tab.prompt = tab.cached = tab.completion = 0
        return self._rows

    @property
    def row_count(self) -> int:
        """Rows that it has, or a few more."""
        return len(self._rows) + len(self._tabs)

    def _append(self, line: bytes) -> None:
        if self._is_broken:
            self.lost_by_kill += 1
            return
        end = self._size + len(line)
        try:
            if end > self._room:
                self._grow(end)
            assert self._map is not None
            self._map[self._size : end] = line
            if self._fsync:
                os.fdatasync(self._file)
        except OSError as error:
            self._refused(error)
            self.lost_by_kill += 1
            return
        self._size = end

    def _grow(self, least: int) -> None:
        """Have room, on the disk too: a page that the disk cannot take would end the process when it is written."""
        if least > self._limit_bytes:
            raise OSError(0, "the journal has reached its limit")
        room = min(max(FIRST_BYTES, 2 * self._room), self._limit_bytes)
        os.posix_fallocate(self._file, 0, room)
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self._file, room)
        self._room = room

    def _refused(self, error: OSError) -> None:
        """Nothing more is written here; the lock is kept, for the file alone is no longer the whole batch."""
        self._is_broken = True
        log.error("usage is kept in memory alone, where a kill would lose it: %s", error.strerror)

    def delete(self) -> None:
        """The database has it."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the file to whoever comes next."""
        if self._map is not None:
            self._map.close()
            self._map = None
            self._room = 0
        if self._file >= 0:
            os.ftruncate(self._file, self._size)
            os.close(self._file)
            self._file = -1


class Journal:
    """Segments of one process, the open one and those before it; `begin` before the first `record`."""

    def __init__(self, folder: Path, *, limit_bytes: int, fsync: bool, wall_clock: Callable[[], float]) -> None:
        self.open: Segment  # what is being counted
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._fsync = fsync
        self._wall_clock = wall_clock
        self._hour = 0
        self._hour_end = 0

    def begin(self) -> None:
        """A segment to count in."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.open = self._new_segment()

    def turn(self) -> Segment:
        """What has been counted so far; what comes is counted in the next segment."""
        full, self.open = self.open, self._new_segment()
        return full

    def tab_of(self, tenant: str, adapter: str, version: int) -> Tab:
        """Where requests for a version are counted; the base model is adapter '' version 0."""
        return self.open.tab_of(tenant, adapter, version)

    def record(self, tab: Tab, *, failed: bool, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """One ended request. Counted in the hour in which it ended."""
        now = self._wall_clock()
        if now >= self._hour_end:
            self._hour = int(now) // HOUR_S * HOUR_S
            self._hour_end = self._hour + HOUR_S
        self.open.count(tab, self._hour, int(failed), prompt_tokens, cached_tokens, completion_tokens)

    def _new_segment(self) -> Segment:
        return Segment(self._folder, limit_bytes=self._limit_bytes, fsync=self._fsync)


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
            add(
                rows,
                (int(hour), tenant.decode(), adapter.decode(), int(version)),
                1,
                failed,
                prompt,
                cached,
                completion,
            )
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
