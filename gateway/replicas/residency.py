"""Which adapters one replica holds, as this gateway knows it: hold, load when cold, let go.

The replica owns the truth: `adopt` takes it over from its report. What is here only saves a question.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.errors import AdapterNotLoadable
from gateway.open_set import Key
from gateway.replicas.client import CONTROL_ERRORS, AgentRefusedError, LoadReport, ReplicaClient, ResidentAdapter
from gateway.replicas.holdings import Holdings, Resident

log = logging.getLogger("tailor.residency")
PATIENCE_S: Final = 3.0
ENGINE_ENDING: Final = "engine_ending"
ON_DISK_S: Final = 2.0
WORD_S: Final = 2.0
"""How long a load that met an engine's end waits before it is tried elsewhere: it may be the cause."""


class LoadFailed(AdapterNotLoadable):
    """A load that failed; `again`: another try, here or elsewhere, may succeed."""

    def __init__(self, message: str, *, retry_after_s: int, again: bool = True) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.again = again


class SlowLoad(LoadFailed):
    """A load that has not ended in time; it goes on."""


@dataclass(slots=True)
class _Flight:
    """One load under way, and all who wait for it."""

    task: asyncio.Task[None]
    outcome: asyncio.Future[Resident]


class KeepsOut(Protocol):
    """What residency asks of the quarantine; `gateway.quarantine.Quarantine`, a plain class in tests."""

    def check(self, key: Key) -> None: ...
    def holds(self, key: Key) -> bool: ...


class Residency:
    """One replica's adapters. Loads are single-flight per adapter, one at a time per replica, in turn between tenants.

    A load that takes more than `patience_s` gives its turn away and goes on beside the next: it may hang for ever.

    `before_load` may refuse a load by raising LoadFailed. `check_loaded` is told the name that a version has got in the
    engine before any request uses it; where it raises LoadFailed, none does.
    """

    def __init__(
        self,
        client: ReplicaClient,
        *,
        load_timeout_s: float,
        patience_s: float = PATIENCE_S,
        quarantine: KeepsOut | None = None,
        on_loaded: Callable[[Resident], None] = lambda _: None,
        on_ending: Callable[[], None] = lambda: None,
    ) -> None:
        self._quarantine = quarantine
        self._on_loaded = on_loaded
        self._on_ending = on_ending
        self._client = client
        self._load_timeout_s = load_timeout_s
        self._patience_s = patience_s
        self.holdings = Holdings()
        self._residents = self.holdings.by_key
        self._loading: dict[Key, _Flight] = {}
        self._asking: dict[Key, asyncio.Event] = {}
        self._late: dict[Key, asyncio.Task[Resident]] = {}
        self._reported: dict[str, Key] = {}
        self._waiting: Counter[Key] = Counter()
        self._turn = TenantTurns()
        self._withheld: set[str] = set()  # names that no request may use: not looked at yet, or found wrong
        self.before_load: Callable[[Version], Awaitable[None]] | None = None
        self.check_loaded: Callable[[str, Version], Awaitable[None]] | None = None
        self.load_count = 0
        self.failed_loads = 0
        self.load_seconds = 0.0
        self.evictions = 0

    def residents(self) -> Collection[Resident]:
        return self._residents.values()

    async def hold(
        self, version: Version, *, patient: bool = True, allow: Callable[[], Awaitable[None]] | None = None
    ) -> Resident:
        """The resident, loaded if it is cold. Its requests are counted by the agent, which waits for them.

        `allow` is awaited where this starts a load, and may refuse it by raising. Who is `patient` waits for a slow
        load too.

        Raises:
            LoadFailed: the replica would not take it. SlowLoad: it has not ended in time.
            AdapterQuarantined: no replica may have it just now.
        """
        key = (version.tenant_id, version.digest)
        resident = self.holdings.use(key, version)
        if resident is not None:
            return resident
        if self._quarantine is not None:
            self._quarantine.check(key)
        flight = self._loading.get(key)
        if flight is None and allow is not None:
            flight = await self._allowed(key, allow)
            if flight is None and (resident := self.holdings.use(key, version)) is not None:
                return resident
        if flight is None:
            flight = self._begin(key, version)
        self._waiting[key] += 1
        try:
            return await asyncio.shield(flight.outcome)  # a client that leaves must not stop the load for the others
        except SlowLoad:
            late = self._late.get(key)
            if late is None or not patient:
                raise
            return await asyncio.shield(late)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    async def _allowed(self, key: Key, allow: Callable[[], Awaitable[None]]) -> _Flight | None:
        """Ask whether a load may begin, who wants the same one at a time: it is counted once; or the one that has."""
        while (asking := self._asking.get(key)) is not None:
            await asking.wait()
            if (flight := self._loading.get(key)) is not None or key in self._residents:
                return flight
        asking = self._asking[key] = asyncio.Event()
        try:
            await allow()
        finally:
            del self._asking[key]
            asking.set()
        return self._loading.get(key)

    def _begin(self, key: Key, version: Version) -> _Flight:
        outcome: asyncio.Future[Resident] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        flight = _Flight(asyncio.create_task(self._load(key, version, outcome)), outcome)
        self._loading[key] = flight
        return flight

    async def _load(self, key: Key, version: Version, outcome: asyncio.Future[Resident]) -> None:
        try:
            resident = await self._load_in_turn(key, version)
        except AdapterNotLoadable as error:
            self._land(key, outcome)
            if not outcome.done():
                outcome.set_exception(error)
        except BaseException as error:
            self._land(key, outcome)
            if not outcome.done():
                outcome.set_exception(_not_loadable(error))
            if isinstance(error, Exception):
                log.exception("adapter %s of tenant %s not loaded", version.digest, version.tenant_id)
            else:
                raise
        else:
            self._land(key, outcome)
            if not outcome.done():
                outcome.set_result(resident)

    def _land(self, key: Key, outcome: asyncio.Future[Resident]) -> None:
        flight = self._loading.get(key)
        if flight is not None and flight.outcome is outcome:
            del self._loading[key]

    async def _load_in_turn(self, key: Key, version: Version) -> Resident:
        await self._turn.take(key[0])
        try:
            if key not in self._waiting:
                raise LoadFailed("Nobody waits for the adapter any more.", retry_after_s=1)
            call = asyncio.create_task(self._call(key, version))
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.wait({call}, timeout=self._patience_s)
            except asyncio.CancelledError:
                call.cancel()
                raise
            if call.done():
                return call.result()
            self._late[key] = call
            call.add_done_callback(lambda done: self._late.pop(key, None) if self._late.get(key) is done else None)
            log.warning("adapter %s of tenant %s: its load is slow", version.digest, version.tenant_id)
            raise SlowLoad("The adapter is still being loaded; try again.", retry_after_s=2)
        finally:
            self._turn.give()

    async def _call(self, key: Key, version: Version) -> Resident:
        if self.before_load is not None:
            await self.before_load(version)
        name = f"a-{secrets.token_hex(16)}"
        if self.check_loaded is not None:
            self._withheld.add(name)  # a report may tell of it before the load is answered
        try:
            report = await self._client.load(name, version, self._load_timeout_s)
        except CONTROL_ERRORS as error:
            self.failed_loads += 1
            log.warning("adapter %s of tenant %s not loaded: %r", version.digest, version.tenant_id, error)
            if isinstance(error, AgentRefusedError) and error.code == ENGINE_ENDING:
                self._on_ending()
                await asyncio.sleep(WORD_S)  # cut short by `abandon`, once it is known whose doing the end is
            raise _not_loadable(error) from error
        await self._look_at(report.name, version)
        self._withheld.discard(name)
        return self._note(key, version, name, report)

    async def _look_at(self, name: str, version: Version) -> None:
        if self.check_loaded is None:
            return
        self._withheld.add(name)
        try:
            await self.check_loaded(name, version)
        except LoadFailed:
            self.failed_loads += 1
            raise
        self._withheld.discard(name)

    def _note(self, key: Key, version: Version, asked: str, report: LoadReport) -> Resident:
        self.load_count += 1
        self.load_seconds += report.load_s
        log.info(
            "adapter %s of tenant %s loaded as %s: fetch %.3f s, load %.3f s",
            version.digest, version.tenant_id, report.name, report.fetch_s, report.load_s,
        )  # fmt: skip
        resident = Resident(key, report.name, version, time.time(), loaded_at=time.monotonic())
        known = self._residents.setdefault(key, resident)
        if known is resident and report.name == asked:  # else another gateway has loaded it, and told whom it concerns
            self._on_loaded(resident)
        return known

    def forget(self, resident: Resident) -> None:
        """The replica says that it does not know this name: the next request loads afresh."""
        if self._residents.get(resident.key) is resident:
            del self._residents[resident.key]

    def adopt(self, reported: Iterable[ResidentAdapter], *, asked_at: float) -> None:
        """Take the replica's report for the truth: drop what it lacks, learn what others loaded.

        `asked_at` (monotonic seconds) is when the report was asked for: what was loaded since may be missing in it.
        """
        known = {adapter.name: adapter for adapter in reported if adapter.tier != "disk" and not adapter.leaving}
        self._reported = {
            name: (TenantId(adapter.owner), adapter.digest) for name, adapter in known.items() if adapter.owner
        }
        for resident in list(self._residents.values()):
            adapter = known.get(resident.name)
            if adapter is not None:
                resident.tier, resident.in_flight = adapter.tier, adapter.in_flight
                resident.last_used = max(resident.last_used, adapter.last_used)
            elif resident.loaded_at < asked_at:
                self.forget(resident)
                self.evictions += 1
        for adapter in known.values():
            if adapter.owner and adapter.name not in self._withheld:
                key = (TenantId(adapter.owner), adapter.digest)
                if self._quarantine is None or not self._quarantine.holds(key):
                    self._residents.setdefault(
                        key, Resident(key, adapter.name, None, adapter.last_used, tier=adapter.tier)
                    )

    def tier_of(self, key: Key) -> str | None:
        """Where the engine has it, as of the last report."""
        resident = self._residents.get(key)
        return None if resident is None else resident.tier

    async def on_disk(self, digests: Sequence[str]) -> set[str]:
        """Which of them the replica's disk has; none where it does not say."""
        try:
            return await self._client.on_disk(digests, ON_DISK_S)
        except CONTROL_ERRORS as error:
            log.warning("a replica does not say what is on its disk: %r", error)
            return set()

    def is_quiet(self, key: Key, for_s: float) -> bool:
        """Whether no gateway has asked for the adapter for so long."""
        resident = self._residents.get(key)
        return resident is not None and not resident.in_flight and time.time() - resident.last_used > for_s

    async def prefetch(self, version: Version) -> bool:
        """Bring a version's files to the replica's disk; False where that failed: the load will fetch them."""
        try:
            await self._client.load(f"a-{secrets.token_hex(16)}", version, self._load_timeout_s, "disk")
        except CONTROL_ERRORS as error:
            log.warning("adapter %s of tenant %s not prefetched: %r", version.digest, version.tenant_id, error)
            return False
        return True

    async def unload(self, tenant_id: TenantId, digests: Iterable[str]) -> None:
        """Take a tenant's versions out of the replica; a failure is mended by the replica's own eviction."""
        for key in ((tenant_id, digest) for digest in digests):
            # two gateways that load one adapter at the same time give it two names
            names = {name for name, other in self._reported.items() if other == key}
            resident = self._residents.pop(key, None)
            if resident is not None:
                names.add(resident.name)
            for name in names:
                try:
                    await self._client.unload(name, self._load_timeout_s)
                except CONTROL_ERRORS as error:
                    log.warning("adapter %s not unloaded: %r", name, error)

    def forget_adapters(self, tenant_id: TenantId, digests: Iterable[str]) -> None:
        """Versions that are erased: what comes for them fails, and a new engine is not given them again."""
        for digest in digests:
            self._residents.pop((tenant_id, digest), None)

    def abandon(self) -> None:
        """The replica has failed: who waits for a load there is told so now."""
        for flight in list(self._loading.values()):
            if not flight.outcome.done():
                flight.outcome.set_exception(
                    LoadFailed("The engine went away while it loaded the adapter; try again.", retry_after_s=2)
                )
            flight.task.cancel()
        for late in list(self._late.values()):
            late.cancel()
        self._loading.clear()
        self._late.clear()

    def start_over(self) -> list[Version]:
        """The engine is a new one: forget every name; returns what was held, the hottest first."""
        residents = sorted(self._residents.values(), key=lambda resident: resident.last_used, reverse=True)
        self._residents.clear()
        self._withheld.clear()
        return [resident.version for resident in residents if resident.version is not None]


class TenantTurns:
    """A lock that goes round the tenants who wait for it: one with many loads makes nobody wait for all of them."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: OrderedDict[TenantId, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, tenant: TenantId) -> None:
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()  # it came in the same moment
            raise

    def give(self) -> None:
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False


def _not_loadable(error: BaseException) -> LoadFailed:
    if isinstance(error, AgentRefusedError) and error.status == 503:
        return LoadFailed("The adapter waits for a free place; try again.", retry_after_s=1)
    if isinstance(error, AgentRefusedError) and error.status == 422:
        return LoadFailed(
            "The engine refused the adapter; publish it again or ask the operator.", retry_after_s=60, again=False
        )
    return LoadFailed("The adapter could not be loaded just now; try again.", retry_after_s=5)
