"""The replicas behind this gateway: which one answers a request, when, and what is loaded there for it."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from adapter_store.catalog import Version
from adapter_store.changes import Change
from adapter_store.errors import StorageError
from adapter_store.ids import TenantId
from gateway.errors import (
    AdapterNotLoadable,
    ObjectUnknown,
    ReplicaInSettings,
    ReplicaUnavailable,
    TooBusy,
    TooManyLoads,
)
from gateway.fairness import Turn, VirtualTokenCounters
from gateway.open_set import Key
from gateway.plans import Plan
from gateway.quarantine import LIVED_S, Quarantine
from gateway.replicas.breaker import RetryBudget
from gateway.replicas.client import CONTROL_ERRORS, ReplicaClient
from gateway.replicas.holdings import Resident
from gateway.replicas.replica import Replica, ReplicaOptions, ReplicaState
from gateway.replicas.residency import LoadFailed
from gateway.replicas.roster import REPLICA_CHANGE, Roster, RosterRow, replica_id
from gateway.replicas.turns import ReplicaGone
from gateway.routing import Router
from gateway.telemetry.observation import Observation

log = logging.getLogger("tailor.pool")
RETRY_AFTER_S: Final = 5
LOAD_TRIES: Final = 3
LEAST_JITTER_S: Final = 0.05  # before a second try of a load; doubled before a third
MOST_JITTER_S: Final = 0.25
REVIEW_S: Final = 1.0
PREFETCH_REPLICAS: Final = 2
"""The home, and the one that is asked where that is gone or full."""
PREFETCHES_AT_ONCE: Final = 4
PREWARM_S: Final = 5.0
PIN_AGAIN_S: Final = 30.0
RETIRE_AFTER_S: Final = 30.0
MOST_RETIRING: Final = 4_096
RETIRE_WITHIN_S: Final = 900.0
WhenLoaded = Callable[[Replica, Resident], Awaitable[None]]
TakeLoad = Callable[[TenantId, int], Awaitable[float]]
"""(tenant, loads a minute) → 0 where a cold load is allowed, and counted, else seconds; `Limits.take_load` is one."""
RUNNING_S: Final = 1.0
LEAST_WAIT_S: Final = 0.0005
"""Who is told sooner than this has waited for nothing."""


async def _running(replica: Replica, tenant_id: TenantId, digests: Collection[str]) -> int:
    if replica.state is ReplicaState.UNREACHABLE:
        return 0
    try:
        report = await replica.client.state(RUNNING_S)
    except CONTROL_ERRORS:
        return 0
    return sum(held.in_flight for held in report.adapters if held.owner == tenant_id and held.digest in digests)


class Place:
    """A request's place in a replica; `release` gives it back, once.

    `adapter` is the engine's name of the adapter, None where none is used; `name` what the upstream body's `model` must
    be; `priority` vLLM's; `tier` where the adapter was: "gpu", "host", "cold" (loaded just now) or "base".
    """

    __slots__ = (
        "_router", "_turn", "adapter", "load_s", "name", "priority", "queue_s", "replica", "resident", "tier",
    )  # fmt: skip

    def __init__(self, replica: Replica, turn: Turn, resident: Resident | None, priority: int) -> None:
        self.replica = replica
        self.resident = resident
        self.adapter = replica.null_adapter if resident is None else resident.name
        self.name = self.adapter or replica.base_name
        self.tier = "base" if resident is None else resident.tier
        self.priority = priority
        self.queue_s = 0.0
        self.load_s = 0.0
        self._turn: Turn | None = turn
        self._router: Router[Key, Replica] | None = None

    def release(self, tokens: int | None) -> None:
        """The request is over and used `tokens`, prompt and answer together; None: nobody knows."""
        turn = self._turn
        if turn is None:
            return
        self._turn = None
        self.replica.turns.leave(turn, tokens)
        if self._router is not None and turn.key is not None:
            self._router.ended(turn.key)

    def forget_adapter(self) -> None:
        """The replica did not know the adapter (404): the next place loads it afresh."""
        if self.resident is not None:
            self.replica.residency.forget(self.resident)
        else:
            self.replica.suspect()


@dataclass(frozen=True, slots=True)
class Member:
    """A replica as operators see it."""

    replica: Replica
    in_settings: bool
    created_at: int | None
    drained_at: int | None


class ReplicaPool:
    """All replicas, watched while the pool runs: those of the settings, and those that operators add."""

    def __init__(
        self,
        urls: Iterable[str],
        connect: Callable[[str], ReplicaClient],
        *,
        fingerprint: str,
        take_load: TakeLoad,
        options: ReplicaOptions | None = None,
        spread_at: float = 16,
        roster: Roster | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._quarantine = quarantine
        if quarantine is not None:
            quarantine.on_held = self._take_out
        self._when_loaded: list[WhenLoaded] = []
        self._prefetching = asyncio.Semaphore(PREFETCHES_AT_ONCE)
        self._prefetch_counts = {"ok": 0, "failed": 0}
        self._retiring: dict[Key, tuple[float, float]] = {}
        self._pins: Mapping[Key, Version] = {}
        self._pin_again_at: dict[Key, float] = {}
        self._connect = connect
        self._fingerprint = fingerprint
        self._options = options or ReplicaOptions()
        self._roster = roster
        self._counters = VirtualTokenCounters(time.time)
        self._router: Router[Key, Replica] = Router(time.monotonic, spread_at=spread_at)
        self._retries = RetryBudget(time.monotonic)
        self._take_load = take_load
        self._settings_urls = tuple(dict.fromkeys(urls))
        self._rows: dict[str, RosterRow] = {}
        self._replicas: dict[str, Replica] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._roster_changed = asyncio.Event()
        self._state_listeners: list[Callable[[], None]] = []
        self._started = False
        self._only: Replica | None = None
        self._before_load: Callable[[Version], Awaitable[None]] | None = None
        self._after_load: Callable[[Replica, str, Version], Awaitable[None]] | None = None
        for url in self._settings_urls:
            self._admit(url)

    # the life of the pool

    def start(self) -> None:
        self._started = True
        for replica in self._replicas.values():
            self._watch(replica)
        self._spawn(self._review())
        if self._roster is not None:
            self._roster_changed.set()
            self._spawn(self._follow(self._roster))

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas.values():
            replica.residency.abandon()
            replica.turns.close()
            replica.unheard.close()
            replica.client.close()

    def states(self) -> dict[str, ReplicaState]:
        return {replica.id: replica.state for replica in self._replicas.values()}

    # an adapter's way into the replicas and out of them

    def when_loaded(self, tell: WhenLoaded) -> None:
        """Have `tell` awaited after every load that this gateway makes, restored adapters included.

        It runs in the background, beside the first requests; one that raises is logged. While a replica comes back it
        takes no placed requests yet: ask it by its own `client`.
        """
        self._when_loaded.append(tell)

    def prefetch(self, version: Version) -> None:
        """Bring a version's files to the disks of the replicas that will be asked for it first, in the background."""
        key = (version.tenant_id, version.digest)
        if self._quarantine is not None and self._quarantine.holds(key):
            return
        ready = [replica for replica in self._router.spread(key).order if replica.takes_requests]
        for replica in ready[:PREFETCH_REPLICAS]:
            self._spawn(self._prefetch(replica, version))

    async def prewarm(
        self, old: Version | None, new: Version, *, plan: Plan | None = None, within_s: float = PREWARM_S
    ) -> int:
        """Load `new` wherever `old` is, before an alias moves from one to the other; how many replicas hold it then.

        Waits no longer than `within_s`; loads that take longer go on. Never raises: a load that fails is made again by
        the first request. Where `old` is nowhere, nobody waits for `new` either, and its files are prefetched; so they
        are where `plan` allows no more loads just now.
        """
        before = None if old is None else (old.tenant_id, old.digest)
        key = (new.tenant_id, new.digest)
        holders = [each for each in self._replicas.values() if before and each.takes_requests and each.holds(before)]
        self._retiring.pop(key, None)
        cold = [replica for replica in holders if not replica.holds(key)]
        if not holders or not await self._may_load(new.tenant_id, plan, len(cold)):
            self.prefetch(new)
            return 0
        loads = [self._spawn(self._warm(replica, key, new)) for replica in cold]
        if loads:
            await asyncio.wait(loads, timeout=within_s)
        return sum(replica.holds(key) for replica in holders)

    def replace(self, old: Version | None, new: Version, plan: Plan) -> None:
        """`prewarm` and `retire` in the background, for a move that has been made."""
        if old is not None and old.digest != new.digest:
            self._spawn(self._replace(old, new, plan))
        else:
            self.prefetch(new)

    def retire(self, version: Version, *, quiet_s: float = RETIRE_AFTER_S) -> None:
        """Unload a version that no alias names any more, in the background.

        Each replica lets it go once no gateway has asked for it for `quiet_s` and its last request has ended; its
        files then stay on disk for as long as there is room. Who still asks for it by its number keeps it.
        """
        key = (version.tenant_id, version.digest)
        self._retiring.pop(key, None)
        self._retiring[key] = (time.monotonic() + RETIRE_WITHIN_S, quiet_s)
        if len(self._retiring) > MOST_RETIRING:
            del self._retiring[next(iter(self._retiring))]

    async def warm(self, version: Version, plan: Plan, *, everywhere: bool, within_s: float) -> dict[str, str]:
        """Load a version into its home, or `everywhere`; the tier by replica when it is done, or when time is over.

        Tiers are `gpu`, `host`, and where it is not loaded (yet) `loading` or `failed`. Each load counts as a cold one.

        Raises:
            ReplicaUnavailable: none takes requests. AdapterQuarantined, TooManyLoads: as in `place`.
        """
        key = (version.tenant_id, version.digest)
        if self._quarantine is not None:
            self._quarantine.check(key)
        targets = [each for each in self._replicas.values() if each.takes_requests] if everywhere else []
        targets = targets or [self._choose(key, ())]
        loads: dict[str, asyncio.Task[None]] = {}
        for replica in targets:
            if not replica.holds(key):
                await self._allow_load(version.tenant_id, plan)
                loads[replica.id] = self._spawn(self._warm(replica, key, version))
        if loads:
            await asyncio.wait(loads.values(), timeout=within_s)
        return {replica.id: _tier_after(replica, key, loads.get(replica.id)) for replica in targets}

    async def tiers(self, tenant_id: TenantId, digests: Sequence[str]) -> dict[str, dict[str, str]]:
        """Where a tenant's versions are, by digest and replica: `gpu`, `host` or `disk`; else in the blobs alone."""
        found: dict[str, dict[str, str]] = {digest: {} for digest in digests}
        ready = [replica for replica in self._replicas.values() if replica.state is ReplicaState.READY]
        on_disks = await asyncio.gather(*(replica.residency.on_disk(digests) for replica in ready))
        for replica, on_disk in zip(ready, on_disks, strict=True):
            for digest in digests:
                tier = replica.residency.tier_of((tenant_id, digest)) or ("disk" if digest in on_disk else None)
                if tier is not None:
                    found[digest][replica.id] = tier
        return found

    def set_pins(self, pins: Mapping[Key, Version]) -> None:
        """These versions, and no others, stay loaded from now on."""
        self._pins = pins
        self._pin_again_at.clear()
        for replica in self._replicas.values():
            replica.pins = pins

    def is_pinned(self, key: Key) -> bool:
        return key in self._pins

    def _keep_pins(self) -> None:
        """Load what is pinned and nowhere; a load that has failed is tried again after a while."""
        now = time.monotonic()
        for key, version in self._pins.items():
            if now < self._pin_again_at.get(key, 0.0) or any(each.holds(key) for each in self._replicas.values()):
                continue
            if self._quarantine is not None and self._quarantine.holds(key):
                continue
            home = self._router.choose(key)
            if home is not None:
                self._pin_again_at[key] = now + PIN_AGAIN_S
                self._spawn(self._warm(home, key, version))

    def check_loads(
        self,
        before: Callable[[Version], Awaitable[None]],
        after: Callable[[Replica, str, Version], Awaitable[None]],
    ) -> None:
        """Have every load of every replica looked at: both may raise LoadFailed, and then no request uses it."""
        self._before_load = before
        self._after_load = after
        for replica in self._replicas.values():
            self._check_loads_of(replica)

    def _check_loads_of(self, replica: Replica) -> None:
        after = self._after_load
        if after is None:
            return
        replica.residency.before_load = self._before_load
        replica.residency.check_loaded = lambda name, version: after(replica, name, version)

    async def unload(self, tenant_id: TenantId, digests: Sequence[str]) -> None:
        """Take versions that no request may use any more out of every engine."""
        await asyncio.gather(*(replica.residency.unload(tenant_id, digests) for replica in self._replicas.values()))

    def forget(self, tenant_id: TenantId, digests: Collection[str]) -> None:
        """Erased versions: no replica that comes back is given them again."""
        for replica in self._replicas.values():
            replica.residency.forget_adapters(tenant_id, digests)

    async def running(self, tenant_id: TenantId, digests: Collection[str]) -> int:
        """Requests on these versions, of every gateway's, that still run a second from now.

        Shorter ones are over before anybody could do anything about them. A replica that does not answer within a
        second has none.
        """
        until = time.monotonic() + RUNNING_S
        while True:
            counts = await asyncio.gather(*(_running(r, tenant_id, digests) for r in self._replicas.values()))
            if not sum(counts) or time.monotonic() >= until:
                return sum(counts)
            await asyncio.sleep(RUNNING_S / 10)

    def on_state(self, tell: Callable[[], None]) -> None:
        """Be told whenever the state of a replica changes."""
        self._state_listeners.append(tell)

    @property
    def prefetch_counts(self) -> dict[str, int]:
        """Prefetches so far, by what they came to."""
        return self._prefetch_counts

    async def _prefetch(self, replica: Replica, version: Version) -> None:
        async with self._prefetching:
            done = await replica.residency.prefetch(version)
        self._prefetch_counts["ok" if done else "failed"] += 1

    async def _replace(self, old: Version, new: Version, plan: Plan) -> None:
        await self.prewarm(old, new, plan=plan)
        self.retire(old)

    def _retire_quiet(self) -> None:
        now = time.monotonic()
        for key, (until, quiet_s) in list(self._retiring.items()):
            holders = [replica for replica in self._replicas.values() if replica.holds(key)]
            for replica in holders:
                if replica.residency.is_quiet(key, quiet_s) and key not in self._pins:
                    self._spawn(replica.residency.unload(key[0], [key[1]]))
            if not holders or now > until:
                del self._retiring[key]

    def _take_out(self, key: Key) -> None:
        """An adapter is held back from now on."""
        for replica in self._replicas.values():
            if replica.holds(key):
                self._spawn(replica.residency.unload(key[0], [key[1]]))

    def _note_load(self, replica: Replica, resident: Resident) -> None:
        for tell in self._when_loaded:
            self._spawn(_told(tell, replica, resident))
        if self._quarantine is not None and self._quarantine.is_on_trial(resident.key):
            self._spawn(self._acquit_later(replica, resident.key))

    async def _acquit_later(self, replica: Replica, key: Key) -> None:
        before = replica.report.generation if replica.report is not None else None
        await asyncio.sleep(LIVED_S)
        if replica.report is not None and replica.report.generation == before and replica.holds(key):
            assert self._quarantine is not None
            self._quarantine.acquit(key)

    # the hot path

    def place_now(
        self,
        version: Version | None,
        tenant_id: TenantId,
        plan: Plan,
        *,
        cost: int,
        choices: int = 1,
        tried: Sequence[Replica] = (),
    ) -> Place | None:
        """As `place`, where nothing has to be waited for; None: call `place`, which asks anew."""
        key = None if version is None else (version.tenant_id, version.digest)
        replica = self._pick(key, tried)
        resident = None if key is None or version is None else replica.holdings.use(key, version)
        if resident is not None or version is None:
            turn = Turn(tenant_id, plan.weight, key, cost, choices)
            if replica.gate.enter(turn):
                if not tried:
                    self._retries.request()
                return self._placed(replica, turn, resident)
        return None

    async def place(
        self,
        version: Version | None,
        tenant_id: TenantId,
        plan: Plan,
        *,
        cost: int,
        choices: int = 1,
        tried: Sequence[Replica] = (),
        seen: Observation | None = None,
    ) -> Place:
        """A place for one request: picks the replica, waits for its turn, loads the adapter if it is cold.

        `version` None: the base model. `cost`: tokens that the request may use, in `choices` answers. `tried`: replicas
        that have failed on it. To `seen` is added what the request waits, whatever comes of it. Does not suspend where
        there is nothing to wait for.

        Raises:
            ReplicaUnavailable: none takes requests. TooBusy, TooManyWaiting: the queue is full, or the wait too long.
            AdapterNotLoadable: none would or may load it. TooManyLoads: the plan allows no more cold loads just now.
        """
        place = self.place_now(version, tenant_id, plan, cost=cost, choices=choices, tried=tried)
        if place is not None:
            return place
        if not tried:
            self._retries.request()
        key = None if version is None else (version.tenant_id, version.digest)
        if key is not None and self._quarantine is not None:
            self._quarantine.check(key)
        replica = self._pick(key, tried)
        return await self._place_in_turn(replica, version, tenant_id, plan, cost, choices, tried, seen)

    async def until_quiet(self, version: Version) -> None:
        """Until no request of this gateway's runs or waits in the replica that the version's next one would go to.

        Raises:
            ReplicaUnavailable, TooBusy: it would go to none.
        """
        while (replica := self._pick((version.tenant_id, version.digest), ())).load:
            await replica.turns.until_empty()

    def has_other(self, replica: Replica) -> bool:
        """Whether another replica takes requests."""
        return any(other is not replica and other.takes_requests for other in self._replicas.values())

    @property
    def retry_count(self) -> int:
        """Second tries so far."""
        return self._retries.taken

    def retry_allowed(self, replica: Replica | None = None, sent_at: float = 0.0) -> bool:
        """Whether a request of whose answer its client has heard nothing may be sent a second time; it is counted.

        Who was with `replica`, sent at `sent_at` (monotonic seconds), when that died may. Of the others at most a tenth
        of the requests of the last 10 s: where all replicas fail, they get 1.1 times the requests.
        """
        if replica is not None and sent_at <= replica.died_at:
            self._retries.note_free()
            return True
        return self._retries.take()

    def _placed(self, replica: Replica, turn: Turn, resident: Resident | None) -> Place:
        account = turn.account
        assert account is not None
        place = Place(replica, turn, resident, self._counters.priority(account) if self._options.fair else 0)
        if self._only is None and turn.key is not None:
            place._router = self._router
            home = self._router.started(turn.key)
            if home is not None and resident is not None and resident.version is not None:
                self._spawn(self._warm(home, turn.key, resident.version))
        return place

    async def _place_in_turn(
        self,
        replica: Replica,
        version: Version | None,
        tenant_id: TenantId,
        plan: Plan,
        cost: int,
        choices: int,
        tried: Sequence[Replica],
        seen: Observation | None,
    ) -> Place:
        """`place` where something is to be waited for."""
        begin = time.monotonic()
        load_s = 0.0
        tries = 0
        key = None if version is None else (version.tenant_id, version.digest)
        try:
            while True:
                turn = Turn(tenant_id, plan.weight, key, cost, choices)
                left_s = self._options.queue_timeout_s - (time.monotonic() - begin - load_s)
                try:
                    await replica.turns.take(turn, max(left_s, 0.001))
                except ReplicaGone:
                    replica = self._choose(key, tried)
                    continue
                load_from = time.monotonic()
                try:
                    resident, cold = await self._resident(
                        replica, version, tenant_id, plan, patient=tries + 1 == LOAD_TRIES
                    )
                except LoadFailed as error:
                    replica.turns.leave(turn, 0)
                    load_s += time.monotonic() - load_from
                    tries += 1
                    if tries == LOAD_TRIES or not error.again or key is None:
                        raise
                    replica = await self._elsewhere(replica, key, tried, tries)
                    continue
                except BaseException:
                    replica.turns.leave(turn, 0)
                    load_s += _waited_s(time.monotonic() - load_from)
                    raise
                place = self._placed(replica, turn, resident)
                now = time.monotonic()
                if cold:
                    load_s += now - load_from
                    place.tier = "cold"
                place.load_s = load_s
                place.queue_s = max(0.0, now - begin - load_s)
                return place
        finally:
            if seen is not None:
                seen.load_s += load_s
                seen.queue_s += _waited_s(time.monotonic() - begin - load_s)

    async def _resident(
        self, replica: Replica, version: Version | None, tenant_id: TenantId, plan: Plan, *, patient: bool
    ) -> tuple[Resident | None, bool]:
        """The version in the replica, and whether it had to be loaded."""
        if version is None:
            return None, False
        resident = replica.holdings.use((version.tenant_id, version.digest), version)
        if resident is not None:
            return resident, False

        return await replica.residency.hold(
            version,
            patient=patient,
            allow=lambda: self._allow_load(tenant_id, plan),  # of who asks: the version may be lent
        ), True

    async def _may_load(self, tenant_id: TenantId, plan: Plan | None, count: int) -> bool:
        if plan is not None and plan.loads_per_minute is not None:
            for _ in range(count):
                if await self._take_load(tenant_id, plan.loads_per_minute):
                    return False
        return True

    async def _allow_load(self, tenant_id: TenantId, plan: Plan) -> None:
        per_minute = plan.loads_per_minute
        wait_s = 0.0 if per_minute is None else await self._take_load(tenant_id, per_minute)
        if wait_s:
            raise TooManyLoads(
                "Your requests have asked for as many adapters that were not loaded as your plan allows in a "
                "minute; try again later, or keep to fewer adapters.",
                retry_after_s=int(wait_s) + 1,
            )

    async def _elsewhere(self, replica: Replica, key: Key, tried: Sequence[Replica], tries: int) -> Replica:
        """The replica for another try of a load that has failed on `replica`, after a moment."""
        self._router.avoid(key, replica)
        await asyncio.sleep(random.uniform(LEAST_JITTER_S, MOST_JITTER_S) * 2 ** (tries - 1))
        return self._choose(key, tried)

    def _pick(self, key: Key | None, tried: Sequence[Replica]) -> Replica:
        """The only replica that is ready, without a choice, or the one chosen."""
        only = self._only
        return self._choose(key, tried) if only is None or tried or not only.takes_requests else only

    def _choose(self, key: Key | None, tried: Sequence[Replica]) -> Replica:
        replica = self._router.least_loaded(tried) if key is None else self._router.choose(key, tried=tried)
        if replica is not None:
            return replica
        if any(replica.state is ReplicaState.READY and replica not in tried for replica in self._replicas.values()):
            raise TooBusy("The engine is coming back; try again shortly.", retry_after_s=1)
        raise ReplicaUnavailable(
            "No engine is ready to answer just now; try again shortly.", retry_after_s=RETRY_AFTER_S
        )

    async def _warm(self, replica: Replica, key: Key, version: Version) -> None:
        """Load an adapter into its new home before requests go there."""
        try:
            await replica.residency.hold(version, patient=False)
        except AdapterNotLoadable as error:
            log.warning("adapter %s gets no further home in %s: %s", version.digest, replica.id, error)
            self._router.avoid(key, replica)

    # what operators do

    def members(self) -> list[Member]:
        """Every replica, those of the settings first."""
        return [self._member(replica) for replica in self._replicas.values()]

    def member(self, name: str) -> Member:
        """The replica of that id.

        Raises:
            ObjectUnknown: there is none.
        """
        for replica in self._replicas.values():
            if replica.id == name:
                return self._member(replica)
        raise ObjectUnknown(f"There is no replica '{name[:64]}'.", param="replica")

    async def add(self, url: str) -> Member:
        """A further replica, here at once and at every gateway within a second.

        Raises:
            NameTaken: it is in the pool.
        """
        roster = self._rows_or_refuse()
        url = url.rstrip("/")
        if url in self._settings_urls:
            raise ReplicaInSettings("That replica is in the settings (TAILOR_REPLICAS).", param="url")
        await roster.add(url)
        self._apply(await roster.all())
        return self.member(replica_id(url))

    async def drain(self, name: str) -> Member:
        """Keep requests away from a replica, at every gateway; those that run end in their own time."""
        replica = self.member(name).replica
        await self._rows_or_refuse().drain(replica.url)
        return await self._reread(name)

    async def resume(self, name: str) -> Member:
        """Let requests come again."""
        replica = self.member(name).replica
        await self._rows_or_refuse().resume(replica.url, keep=replica.url not in self._settings_urls)
        return await self._reread(name)

    async def remove(self, name: str) -> None:
        """Take a replica out of the pool; requests that run there end in their own time.

        Raises:
            ReplicaInSettings: it would be back with the next start.
        """
        replica = self.member(name).replica
        if replica.url in self._settings_urls:
            raise ReplicaInSettings(
                "That replica is in the settings (TAILOR_REPLICAS): drain it, or take it out there.", param="replica"
            )
        roster = self._rows_or_refuse()
        await roster.remove(replica.url)
        self._apply(await roster.all())

    def on_change(self, change: Change) -> None:
        """A listener of the change feed."""
        if change.noun == REPLICA_CHANGE:
            self._roster_changed.set()

    def on_reset(self) -> None:
        """The change feed has a gap."""
        self._roster_changed.set()

    def _rows_or_refuse(self) -> Roster:
        if self._roster is None:
            raise ReplicaInSettings("This gateway knows the replicas of its settings only.")
        return self._roster

    async def _reread(self, name: str) -> Member:
        self._apply(await self._rows_or_refuse().all())
        return self.member(name)

    def _member(self, replica: Replica) -> Member:
        row = self._rows.get(replica.url)
        in_settings = replica.url in self._settings_urls
        created_at = row.created_at if row is not None and not in_settings else None
        return Member(replica, in_settings, created_at, row.drained_at if row is not None else None)

    # keeping up

    async def _follow(self, roster: Roster) -> None:
        while True:
            await self._roster_changed.wait()
            self._roster_changed.clear()
            try:
                self._apply(await roster.all())
            except StorageError as error:
                log.warning("the replicas added at run time cannot be read: %s", type(error).__name__)
                self._roster_changed.set()
                await asyncio.sleep(1)

    def _apply(self, rows: Sequence[RosterRow]) -> None:
        """Take the database's word for who is in the pool, and who is drained."""
        self._rows = {row.url: row for row in rows}
        for url, row in self._rows.items():
            replica = self._replicas.get(url) or self._admit(url)
            if row.drained_at is not None and not replica.drain_wanted:
                replica.drain()
        for url, replica in list(self._replicas.items()):
            known = self._rows.get(url)
            if known is None and url not in self._settings_urls:
                self._dismiss(replica)
            elif replica.drain_wanted and (known is None or known.drained_at is None):
                replica.resume()

    def _admit(self, url: str) -> Replica:
        replica = Replica(
            self._connect(url),
            fingerprint=self._fingerprint,
            options=self._options,
            counters=self._counters,
            on_change=self._recount,
            on_loaded=self._note_load,
            quarantine=self._quarantine,
        )
        replica.pins = self._pins
        self._check_loads_of(replica)
        self._replicas[url] = replica
        self._router.set_hosts(self._replicas.values())
        if self._started:
            self._watch(replica)
        return replica

    def _dismiss(self, replica: Replica) -> None:
        del self._replicas[replica.url]
        self._router.set_hosts(self._replicas.values())
        replica.drain()
        self._recount()
        replica.turns.turn_away()
        self._spawn(self._close_when_empty(replica, self._watches.pop(replica.url, None)))

    async def _close_when_empty(self, replica: Replica, watch: asyncio.Task[None] | None) -> None:
        await replica.turns.until_empty()
        if watch is not None:
            watch.cancel()
        replica.residency.abandon()
        replica.turns.close()
        replica.unheard.close()
        replica.client.close()

    def _watch(self, replica: Replica) -> None:
        self._watches[replica.url] = asyncio.create_task(replica.watch())

    async def _review(self) -> None:
        while True:
            await asyncio.sleep(REVIEW_S)
            self._router.review()
            self._keep_pins()
            self._retire_quiet()

    def _recount(self) -> None:
        """Where one replica alone is ready, requests go there without a choice."""
        ready = [replica for replica in self._replicas.values() if replica.state is ReplicaState.READY]
        self._only = ready[0] if len(ready) == 1 else None
        for tell in self._state_listeners:
            tell()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _tier_after(replica: Replica, key: Key, load: "asyncio.Task[None] | None") -> str:
    tier = replica.residency.tier_of(key)
    if tier is not None:
        return tier
    return "failed" if load is None or load.done() else "loading"


async def _told(tell: WhenLoaded, replica: Replica, resident: Resident) -> None:
    try:
        await tell(replica, resident)
    except Exception:  # an edge: who is told must not take the load with it
        log.exception("adapter %s of tenant %s: what follows its load failed", resident.key[1], resident.key[0])


def _waited_s(seconds: float) -> float:
    return seconds if seconds >= LEAST_WAIT_S else 0.0
