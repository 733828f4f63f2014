"""Which adapters a replica holds, under which names, and when one may leave.

Invariants, each against a fault seen in vLLM 0.32 (`docs/vllm.md`): a name is used once in an engine's life;
nothing is loaded in place; the engine never holds more adapters than its host memory allows, so that it never evicts
one by itself and later re-reads it from disk inside an engine step; files of a held adapter stay pinned in the cache.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from adapter_store.catalog import BlobFile

NAME = re.compile(r"a-[0-9a-f]{8,64}")
FETCHES_AT_ONCE = 2
SUSPECT_FOR_S = 5.0
"""An engine that dies this soon after a load may have died of it."""


class NameTakenError(Exception):
    """The name stands for other files, or was retired."""


class LoadQueueFullError(Exception):
    """Too many loads wait, or every resident adapter is busy."""


class AdapterUnknownError(Exception):
    """No adapter of that name is resident."""


class LoadsAdapters(Protocol):
    """What residency asks of an engine; `engine.Engine` on vLLM, a plain class in tests."""

    async def load(self, name: str, path: Path) -> int: ...
    def hide(self, name: str) -> None: ...
    async def unload(self, number: int) -> None: ...
    async def residency(self) -> tuple[set[int], set[int]]: ...


class KeepsFiles(Protocol):
    """What residency asks of a disk cache; `cache.DiskCache`, a plain class in tests."""

    @property
    def used_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __contains__(self, digest: str) -> bool: ...
    def pin(self, digest: str) -> None: ...
    def unpin(self, digest: str) -> None: ...
    async def fetch(self, digest: str, files: Sequence[BlobFile]) -> Path: ...
    async def release(self, digest: str) -> bool: ...


Whose = tuple[str, str]
"""(owner, digest) of an adapter."""


@dataclass(slots=True)
class Resident:
    """One adapter the engine knows."""

    name: str
    digest: str
    owner: str
    number: int
    size_bytes: int
    last_used: float
    loaded_at: float
    leaving: bool = False
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load went, in seconds."""

    name: str
    fetch_s: float
    load_s: float


class Residency:
    """The replica's adapters; one engine operation at a time, as loads stall decoding for everybody."""

    def __init__(self, engine: LoadsAdapters, cache: KeepsFiles, *, capacity: int, loads_waiting: int) -> None:
        self._engine = engine
        self._cache = cache
        self._capacity = capacity
        self._loads_waiting = loads_waiting
        self._residents: dict[str, Resident] = {}
        self._pending: dict[str, tuple[str, asyncio.Future[Loaded]]] = {}
        self._used: set[str] = set()
        self._leaving: set[asyncio.Future[None]] = set()
        self._turn = asyncio.Lock()
        self._fetching = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._pinned: frozenset[Whose] = frozenset()
        self._loading: Whose | None = None
        self.load_count = 0
        self.load_seconds = 0.0

    async def load(self, name: str, digest: str, files: Sequence[BlobFile], *, owner: str = "") -> Loaded:
        """Make the adapter answer under `name`; a second call for the same digest joins the first.

        Raises:
            NameTakenError, LoadQueueFullError: nothing changed.
            EngineRefusedError, BlobCorrupt and the store's other errors: nothing is left behind.
        """
        resident = self._residents.get(name)
        if resident is not None:
            if resident.digest != digest or resident.leaving:
                raise NameTakenError(name)
            return Loaded(name, 0.0, 0.0)
        if name in self._pending:
            other, outcome = self._pending[name]
            if other != digest:
                raise NameTakenError(name)
            return await asyncio.shield(outcome)
        if name in self._used:
            raise NameTakenError(name)
        if len(self._pending) >= self._loads_waiting:
            raise LoadQueueFullError("too many loads wait")
        # a task of its own: a caller that goes away must not leave the engine half-way
        work = asyncio.ensure_future(self._load(name, digest, files, owner))
        self._pending[name] = (digest, work)
        work.add_done_callback(lambda _: self._pending.pop(name, None))
        return await asyncio.shield(work)

    async def prefetch(self, digest: str, files: Sequence[BlobFile]) -> float:
        """Bring the files to this machine's disk, not to the engine; returns seconds."""
        begin = time.monotonic()
        async with self._fetching:  # loads, which somebody waits for, need no place here
            await self._cache.fetch(digest, files)
        return time.monotonic() - begin

    def on_disk(self, digests: Iterable[str]) -> list[str]:
        """Those of them whose files are on this machine's disk."""
        return [digest for digest in digests if digest in self._cache]

    async def release(self, digest: str) -> bool:
        """Remove the files from this machine's disk; False where there are none.

        Raises:
            DigestPinned: the engine knows a name that uses them.
        """
        return await self._cache.release(digest)

    def disk(self) -> dict[str, int]:
        """How full the disk cache is."""
        return {
            "adapters": len(self._cache),
            "bytes": self._cache.used_bytes,
            "limit_bytes": self._cache.limit_bytes,
        }

    def pin(self, adapters: Iterable[Whose]) -> None:
        """These, and no others, leave host memory only where every other one is busy or pinned too."""
        self._pinned = frozenset(adapters)

    async def _load(self, name: str, digest: str, files: Sequence[BlobFile], owner: str) -> Loaded:
        begin = time.monotonic()
        self._cache.pin(digest)
        try:
            path = await self._cache.fetch(digest, files)
            fetched = time.monotonic()
            async with self._turn:
                twin = self._twin(owner, digest)
                if twin is not None:
                    twin.last_used = time.time()
                    self._cache.unpin(digest)
                    return Loaded(twin.name, fetched - begin, 0.0)
                await self._make_room()
                self._used.add(name)
                started = time.monotonic()
                self._loading = (owner, digest)
                number = await self._engine.load(name, path)
                self._loading = None
        except BaseException:
            self._loading = None
            self._cache.unpin(digest)
            raise
        now = time.monotonic()
        self._residents[name] = Resident(
            name, digest, owner, number, sum(file.size_bytes for file in files), last_used=time.time(), loaded_at=now
        )
        self.load_count += 1
        self.load_seconds += now - started
        return Loaded(name, fetched - begin, now - started)

    def _twin(self, owner: str, digest: str) -> Resident | None:
        """The owner's same files under another name: another gateway, or an earlier try, has been faster."""
        for resident in self._residents.values():
            if resident.digest == digest and resident.owner == owner and owner and not resident.leaving:
                return resident
        return None

    async def _make_room(self) -> None:
        while len(self._residents) >= self._capacity:
            idle = [r for r in self._residents.values() if not (r.in_flight or r.leaving)]
            if not idle:
                raise LoadQueueFullError("every resident adapter is busy")
            await self._remove(min(idle, key=lambda resident: (self._is_pinned(resident), resident.last_used)))

    def _is_pinned(self, resident: Resident) -> bool:
        return (resident.owner, resident.digest) in self._pinned

    async def unload_idle(self, idle_s: float) -> None:
        """Take out, for real, what has had no request for so long and is not pinned; the disk keeps it while it may."""
        for resident in list(self._residents.values()):
            async with self._turn:
                unused = not resident.in_flight and time.time() - resident.last_used > idle_s
                if unused and not resident.leaving and not self._is_pinned(resident):
                    await self._remove(resident)

    async def unload(self, name: str) -> None:
        """Wait for the adapter's requests, take it out of the engine for real, release its files.

        Raises:
            AdapterUnknownError: it is not resident.
        """
        resident = self._residents.get(name)
        if resident is None or resident.leaving:
            raise AdapterUnknownError(name)
        resident.leaving = True
        self._engine.hide(name)
        # a task of its own: a caller that goes away must not leave the adapter half-way out
        work = asyncio.ensure_future(self._drain(resident))
        self._leaving.add(work)
        work.add_done_callback(self._leaving.discard)
        await asyncio.shield(work)

    async def _drain(self, resident: Resident) -> None:
        await resident.idle.wait()
        async with self._turn:
            await self._remove(resident)

    async def _remove(self, resident: Resident) -> None:
        resident.leaving = True
        self._engine.hide(resident.name)
        await self._engine.unload(resident.number)  # fails only with the engine, and this process ends with it
        del self._residents[resident.name]
        self._cache.unpin(resident.digest)

    @asynccontextmanager
    async def serving(self, name: str) -> AsyncIterator[None]:
        """Hold the adapter for one request.

        Raises:
            AdapterUnknownError: it is not resident, or on its way out.
        """
        resident = self._residents.get(name)
        if resident is None or resident.leaving:
            raise AdapterUnknownError(name)
        resident.in_flight += 1
        resident.last_used = time.time()
        resident.idle.clear()
        try:
            yield
        finally:
            resident.in_flight -= 1
            if not resident.in_flight:
                resident.idle.set()

    async def report(self) -> list[dict[str, object]]:
        """Every resident adapter with its tier, those on their way out too, as `GET /tailor/state` shows it."""
        device, _ = await self._engine.residency()
        return self._report(device)

    def last_report(self) -> list[dict[str, object]]:
        """`report` without asking the engine, which may be dead: everything counts as in host memory."""
        return self._report(frozenset())

    def under_suspicion(self) -> list[Whose]:
        """Whose doing the engine's death may be: the adapter whose load was under way, else those loaded just now."""
        if self._loading is not None:
            return [self._loading]
        since = time.monotonic() - SUSPECT_FOR_S
        return [(known.owner, known.digest) for known in self._residents.values() if known.loaded_at >= since]

    def latest(self, names: Iterable[str]) -> Whose | None:
        """The adapter loaded last of those that the names stand for; None where none is a tenant's."""
        known = [self._residents[name] for name in names if name in self._residents]
        found = max(known, key=lambda resident: resident.loaded_at, default=None)
        return None if found is None else (found.owner, found.digest)

    def _report(self, device: Container[int]) -> list[dict[str, object]]:
        return [
            {
                "name": resident.name,
                "owner": resident.owner,
                "digest": resident.digest,
                "tier": "gpu" if resident.number in device else "host",
                "bytes": resident.size_bytes,
                "last_used": resident.last_used,
                "in_flight": resident.in_flight,
                "pinned": self._is_pinned(resident),
                "leaving": resident.leaving,
            }
            for resident in self._residents.values()
        ]
