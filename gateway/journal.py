"""The journal of usage: lines in files that outlive the process, until the database has them.

A segment is one file and one batch: its name is the id under which the database knows that it was counted. Whoever
writes a segment holds its lock, so a file without a holder was left by a process that died, and another may count it.
A line is in the page cache when `Journal.record` returns: it survives the process (kill -9), not a power cut. The file
is mapped into memory, since a write to it cost 9 µs a request, more than all other counting together.
"""

import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger("tailor.usage")
SUFFIX: Final = ".journal"
UNNAMED: Final = "."
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


class Meter:
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
        self._meters: list[Meter] = []
        self._known: dict[tuple[str, str, int], Meter] = {}
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
        beside = folder / f"{UNNAMED}{self.id}.{os.getpid()}"
        try:
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            beside.rename(self._path)
        except OSError as error:
            self._refused(error)
            return -1
        return file

    def meter_of(self, tenant: str, adapter: str, version: int) -> Meter:
        """One for whoever keeps none."""
        key = (tenant, adapter, version)
        meter = self._known.get(key)
        if meter is None:
            meter = self._known[key] = Meter(tenant, adapter, version)
        return meter

    def count(self, meter: Meter, hour: int, failed: int, prompt: int, cached: int, completion: int) -> None:
        """One request. Never raises: what the disk does not take is counted all the same."""
        if meter.segment is not self or meter.hour != hour:
            self._begin(meter, hour)
        meter.requests += 1
        meter.failed += failed
        meter.prompt += prompt
        meter.cached += cached
        meter.completion += completion
        self._append(b"%b%d\t%d\t%d\t%d\n" % (meter.head, failed, prompt, cached, completion))

    def _begin(self, meter: Meter, hour: int) -> None:
        if meter.segment is not None:
            meter.segment.sum_up()
        if meter.hour != hour:
            meter.hour = hour
            meter.head = f"{hour}\t{meter.tenant}\t{meter.adapter}\t{meter.version}\t".encode()
        meter.segment = self
        self._meters.append(meter)

    def sum_up(self) -> Rows:
        """What has been counted so far."""
        meters, self._meters = self._meters, []
        for meter in meters:
            key = (meter.hour, meter.tenant, meter.adapter, meter.version)
            add(self._rows, key, meter.requests, meter.failed, meter.prompt, meter.cached, meter.completion)
            meter.segment = None
            meter.requests = meter.failed = meter.prompt = meter.cached = meter.completion = 0
        return self._rows

    @property
    def row_count(self) -> int:
        """Rows that it has, or a few more."""
        return len(self._rows) + len(self._meters)

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
    """The segment that is being counted in; what `seal` gives is the caller's. `begin` before the first `record`."""

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

    def seal(self) -> Segment:
        """What has been counted so far; what comes is counted in the next segment."""
        full, self.open = self.open, self._new_segment()
        return full

    def meter_of(self, tenant: str, adapter: str, version: int) -> Meter:
        """Where requests for a version are counted; the base model is adapter '' version 0."""
        return self.open.meter_of(tenant, adapter, version)

    def record(
        self, meter: Meter, *, failed: bool, prompt_tokens: int, cached_tokens: int, completion_tokens: int
    ) -> None:
        """One ended request. Counted in the hour in which it ended."""
        now = self._wall_clock()
        if now >= self._hour_end:
            self._hour = int(now) // HOUR_S * HOUR_S
            self._hour_end = self._hour + HOUR_S
        self.open.count(meter, self._hour, int(failed), prompt_tokens, cached_tokens, completion_tokens)

    def _new_segment(self) -> Segment:
        return Segment(self._folder, limit_bytes=self._limit_bytes, fsync=self._fsync)
