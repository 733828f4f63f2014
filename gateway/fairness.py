"""Pure: who is served next where a replica is busy.

Tokens are shared: a virtual counter per tenant says who has had least (Sheng et al. 2024, "Fairness in Serving Large
Language Models"). So are an engine's adapter slots, in `gateway/open_set.py`. Clocks are injected; nothing here waits.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from adapter_store.ids import TenantId
from gateway.open_set import Clock, Key, OpenSet, Slot

PRIORITY_EPOCH_S: Final = 1_767_225_600.0  # 2026-01-01: keeps priorities short
LEAD_LIMIT_TOKENS: Final = 60_000  # a request passes another that came this many milliseconds later, in any case
FORGET_ACCOUNTS_FROM: Final = 4_096


class Account:
    """One tenant's virtual counter: tokens over weight.

    `settled` are tokens that were really spent, `reserved` the estimates of requests under way. One that is `forgotten`
    counts no longer: the tenant's next request gets another.
    """

    __slots__ = ("forgotten", "in_heap", "requests", "reserved", "settled", "weight")

    def __init__(self) -> None:
        self.settled = 0.0
        self.reserved = 0.0
        self.requests = 0  # waiting or in flight
        self.weight = 1.0
        self.in_heap = False
        self.forgotten = False

    @property
    def counter(self) -> float:
        return self.settled + self.reserved


class VirtualTokenCounters:
    """Tokens that each tenant has had, divided by its weight; whoever has least goes first.

    A tenant that comes back from idleness starts at the minimum of those who are active: it neither saves up while
    away nor pays for it. An estimate is charged when a request starts and set right when it ends.
    """

    def __init__(self, wall: Clock) -> None:
        self._wall = wall
        self._accounts: dict[TenantId, Account] = {}
        self._heap: list[tuple[float, int, Account]] = []  # one entry an account; `settled` as it was, or lower
        self._entries = 0
        self._active = 0
        self._floor = 0.0
        self._forget_from = FORGET_ACCOUNTS_FROM

    def arrive(self, tenant: TenantId, weight: float, known: Account | None = None) -> Account:
        """A request of the tenant begins to wait or to run; `depart` when it is over.

        `known`: what this gave last time, which saves looking it up.
        """
        account = self._account(tenant) if known is None or known.forgotten else known
        account.weight = weight
        if not account.requests:
            account.settled = max(account.settled, self.floor())
            self._active += 1
            if not account.in_heap:
                self._push(account)
        account.requests += 1
        return account

    def _account(self, tenant: TenantId) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account()
            if len(self._accounts) > self._forget_from:
                self._forget_idle(account)
        return account

    def floor(self) -> float:
        """The least that an active tenant has had; with none active, what the last one had."""
        if not self._active:
            return self._floor
        while True:
            settled, _, account = self._heap[0]
            if not account.requests:
                heapq.heappop(self._heap)
                account.in_heap = False
            elif account.settled > settled:
                self._entries += 1
                heapq.heapreplace(self._heap, (account.settled, self._entries, account))
            else:
                self._floor = settled
                return settled

    def charge(self, account: Account, tokens: int) -> float:
        """Reserve the estimate of a request that starts; what it returns goes to `settle`."""
        charged = tokens / account.weight
        account.reserved += charged
        return charged

    def settle(self, account: Account, charged: float, tokens: int | None) -> None:
        """The request used `tokens`; None: the estimate stands."""
        account.reserved -= charged
        account.settled += charged if tokens is None else tokens / account.weight

    def depart(self, account: Account) -> None:
        account.requests -= 1
        if not account.requests:
            account.reserved = 0.0  # nothing of rounding is carried on
            self._active -= 1
            if not self._active:
                self._floor = max(self._floor, account.settled)

    def priority(self, account: Account) -> int:
        """What vLLM orders waiting requests by, lower first.

        Milliseconds of the clock, plus a millisecond for each virtual token that the tenant is ahead of the least
        served one, at most a minute. So two requests that wait at the same time compare, whichever gateways sent
        them, and every request, being passed by later ones for a minute at most, comes to its turn.
        """
        lead = min(account.counter - self.floor(), LEAD_LIMIT_TOKENS)
        return int((self._wall() - PRIORITY_EPOCH_S) * 1_000 + lead)

    def _push(self, account: Account) -> None:
        self._entries += 1
        heapq.heappush(self._heap, (account.settled, self._entries, account))
        account.in_heap = True

    def _forget_idle(self, new: Account) -> None:
        """An idle tenant at or below the floor would be lifted to it anyway: its account says nothing."""
        floor = self.floor()
        for tenant, account in list(self._accounts.items()):
            if not (account.requests or account.in_heap or account is new) and account.settled <= floor:
                del self._accounts[tenant]
                account.forgotten = True
        self._forget_from = max(FORGET_ACCOUNTS_FROM, 2 * len(self._accounts))


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What bounds one replica's gate; `queue_timeout_s` is the caller's to keep."""

    concurrency: int
    tenant_queue: int
    queue: int
    fair: bool = True
    active_s: float = 10.0


class QueueFull(Exception):
    """No more requests may wait; `of_tenant` where the tenant's own share of the queue is full."""

    def __init__(self, *, of_tenant: bool) -> None:
        super().__init__("the queue is full")
        self.of_tenant = of_tenant


class Party:
    """A tenant at one replica's gate; `floods` from when it waits or has more than its part until it does neither."""

    __slots__ = ("account", "floods", "in_flight", "seen_at", "tenant", "waiting", "weight")

    def __init__(self, tenant: TenantId, weight: float) -> None:
        self.tenant = tenant
        self.account: Account | None = None
        self.weight = weight
        self.in_flight = 0
        self.waiting = 0
        self.seen_at = 0.0
        self.floods = False

    @property
    def is_silent(self) -> bool:
        return not (self.in_flight or self.waiting)


class Turn:
    """One request at a gate; `key` is None for the base model, `places` the sequences that it is in the engine (n)."""

    __slots__ = (
        "_number", "account", "charged", "cost", "go", "key", "party", "places", "slot", "started", "tenant", "weight",
    )  # fmt: skip

    def __init__(self, tenant: TenantId, weight: float, key: Key | None, cost: int, places: int = 1) -> None:
        self.places = places
        self.tenant = tenant
        self.weight = weight
        self.key = key
        self.cost = cost
        self.started = False
        self.charged = 0.0
        self._number = 0
        self.go: Callable[[], None] | None = None
        self.account: Account | None = None
        self.party: Party | None = None
        self.slot: Slot | None = None


Queue = deque[Turn]
QueueKey = tuple[TenantId, Key | None]


class FairGate:
    """Lets requests into one replica's engine, as many as it runs at once.

    An idle server queues nothing. Where all places are taken, the tenant that has had least goes next. While other
    tenants have been active in the last `active_s`, each has its weighted share of the places (one at least; rounded up
    only while the shares of those who are silent just now stay free), and what the calm ones among them leave, those
    who want more divide by weight: all places but as many as the calm ones had at once lately, and some more. So a
    newcomer does not wait for a flood's long answers, and a flood among a hundred quiet tenants is not held to a
    hundredth. A request whose adapter is not open waits for that (`OpenSet`).

    With `fair` off: first come, first served.
    """

    def __init__(
        self, limits: GateLimits, counters: VirtualTokenCounters, open_set: OpenSet | None, clock: Clock
    ) -> None:
        self.limits = limits
        self.open_set = open_set
        self.in_flight = 0
        self.waiting = 0
        self._counters = counters
        self._clock = clock
        self._parties: dict[TenantId, Party] = {}
        # one entry a party; the time is that of a moment when it was seen, not always the last
        self._seen: list[tuple[float, int, Party]] = []
        self._sightings = 0
        self._weights = 0.0
        self._silent_weights = 0.0  # of the tenants with nothing in flight and nothing waiting
        self._expire_at = 0.0
        self._flooding_weights = 0.0
        self._flooding = 0  # in flight, of the tenants that flood
        self._calm_peak = 0  # the most that the others had in flight, in this stretch of `active_s` and the last
        self._calm_peak_now = 0  # in this one
        self._stretch_ends_at = 0.0
        self._ready: dict[QueueKey, Queue] = {}  # their adapters are open
        self._parked: dict[QueueKey, Queue] = {}
        self._numbers = 0

    @property
    def load(self) -> int:
        return self.in_flight + self.waiting

    def has_place(self, key: Key | None) -> bool:
        """Whether the adapter's next request would not wait for its adapter to be opened."""
        return key is None or self.open_set is None or self.open_set.has_place(key)

    def enter(self, turn: Turn) -> bool:
        """Start the request if nothing is to be waited for; `leave` when it is over."""
        party = self._party(turn)
        if self.in_flight >= self.limits.concurrency or not self._may_start(party):
            return False
        if turn.key is not None and self.open_set is not None:
            turn.slot = self.open_set.claim(turn.key, self._is_waiting)
            if turn.slot is None:
                return False
        self._arrive(turn, party)
        self._start(turn, party)
        return True

    def wait(self, turn: Turn, go: Callable[[], None]) -> None:
        """Line up a request that could not enter; `go` is called when it starts. `cancel` while it has not.

        Raises:
            QueueFull: it may not wait either.
        """
        party = self._party(turn)
        if self.waiting >= self.limits.queue:
            raise QueueFull(of_tenant=False)
        if party.waiting >= self.limits.tenant_queue:
            raise QueueFull(of_tenant=True)
        self._arrive(turn, party)
        turn.go = go
        self._numbers += 1
        turn._number = self._numbers
        party.waiting += 1
        self.waiting += 1
        self._note_flood(party)
        place: QueueKey = (turn.tenant, turn.key)
        queues = self._ready if self._is_open(turn.key) else self._parked
        queues.setdefault(place, deque()).append(turn)
        if queues is self._parked and self.open_set is not None and turn.key is not None:
            self.open_set.join(turn.key)
            self.rotate()

    def cancel(self, turn: Turn) -> None:
        """The request no longer waits; nothing is left of it."""
        place: QueueKey = (turn.tenant, turn.key)
        queues = self._ready if place in self._ready else self._parked
        queue = queues[place]
        queue.remove(turn)
        if not queue:
            del queues[place]
        self._stop_waiting(turn)
        account = turn.account
        assert account is not None
        assert turn.party is not None
        self._counters.depart(account)
        self._note_calm(turn.party)
        self._note_silent(turn)
        if not queue and turn.key is not None and self.open_set is not None:
            self.open_set.drop(turn.key)
            self.rotate()

    def leave(self, turn: Turn, tokens: int | None) -> None:
        """A started request is over and used `tokens`; None: nobody knows, the estimate stands."""
        account, party = turn.account, turn.party
        assert account is not None
        assert party is not None
        self._counters.settle(account, turn.charged, tokens)
        self._counters.depart(account)
        party.in_flight -= turn.places
        self.in_flight -= turn.places
        if party.floods:
            self._flooding -= turn.places
            self._note_calm(party)
        self._note_silent(turn)
        if turn.slot is not None and self.open_set is not None and self.open_set.finish(turn.slot, turn.cost):
            self.rotate()
        elif self._ready:
            self._pump()

    def rotate(self) -> None:
        """Give places of adapters to those whose turn it is; to be called again at `due`."""
        if self.open_set is not None:
            opened, closed = self.open_set.turn(self._is_waiting)
            for key in closed:
                self._move(key, self._ready, self._parked)
            for key in opened:
                self._move(key, self._parked, self._ready)
        self._pump()

    def due(self) -> float | None:
        """When `rotate` must be called though no request comes or ends, by the clock."""
        return self.open_set.due() if self.open_set is not None else None

    def _is_open(self, key: Key | None) -> bool:
        return key is None or self.open_set is None or self.open_set.admits(key)

    def _is_waiting(self, key: Key) -> bool:
        if not self.waiting:
            return False
        place: QueueKey = (key[0], key)
        return place in self._ready or place in self._parked

    @staticmethod
    def _move(key: Key, source: dict[QueueKey, Queue], target: dict[QueueKey, Queue]) -> None:
        place: QueueKey = (key[0], key)
        queue = source.pop(place, None)
        if queue is not None:
            target[place] = queue

    def _party(self, turn: Turn) -> Party:
        """The tenant's record, as seen just now."""
        party = turn.party
        if party is not None:
            return party
        now = self._clock()
        party = self._parties.get(turn.tenant)
        if party is None:
            party = self._parties[turn.tenant] = Party(turn.tenant, turn.weight)
            self._note_seen(party, now)
            self._weights += turn.weight
            self._silent_weights += turn.weight
        if party.weight != turn.weight:
            self._weights += turn.weight - party.weight
            if party.is_silent:
                self._silent_weights += turn.weight - party.weight
            if party.floods:
                self._flooding_weights += turn.weight - party.weight
            party.weight = turn.weight
        party.seen_at = now
        if now >= self._expire_at:
            self._expire(now)
        self._note_peak(now)
        turn.party = party
        return party

    def _expire(self, now: float) -> None:
        while self._seen:
            seen_at, _, party = self._seen[0]
            if seen_at > now - self.limits.active_s:
                self._expire_at = seen_at + self.limits.active_s
                return
            heapq.heappop(self._seen)
            if party.in_flight or party.waiting:
                party.seen_at = now
            if party.seen_at > now - self.limits.active_s:
                self._note_seen(party, party.seen_at)
            else:
                del self._parties[party.tenant]
                self._weights -= party.weight
                self._silent_weights -= party.weight

    def _note_seen(self, party: Party, at: float) -> None:
        self._sightings += 1
        heapq.heappush(self._seen, (at, self._sightings, party))

    def _arrive(self, turn: Turn, party: Party) -> None:
        """Before a request of the tenant begins to wait or to run."""
        if party.is_silent:
            self._silent_weights -= party.weight
        turn.account = party.account = self._counters.arrive(turn.tenant, turn.weight, party.account)

    def _note_silent(self, turn: Turn) -> None:
        """After a request of the tenant has ended."""
        party = turn.party
        if party is not None and party.is_silent:
            self._silent_weights += party.weight

    def _note_start(self, party: Party, places: int) -> None:
        if party.floods:
            self._flooding += places
        elif party.in_flight > self._part(party):
            self._note_flood(party)
        else:
            calm = self.in_flight - self._flooding
            self._calm_peak = max(self._calm_peak, calm)
            self._calm_peak_now = max(self._calm_peak_now, calm)

    def _note_flood(self, party: Party) -> None:
        """The tenant waits, or has more than its part."""
        if not party.floods:
            party.floods = True
            self._flooding += party.in_flight
            self._flooding_weights += party.weight
            self._calm_peak_now = self.in_flight - self._flooding  # what it had belongs there no longer

    def _note_calm(self, party: Party) -> None:
        """After a request of a tenant has ended, or no longer waits."""
        if party.floods and not party.waiting and party.in_flight <= self._part(party) / 2:
            party.floods = False
            self._flooding -= party.in_flight
            self._flooding_weights -= party.weight

    def _note_peak(self, now: float) -> None:
        if now >= self._stretch_ends_at:
            self._calm_peak, self._calm_peak_now = self._calm_peak_now, self.in_flight - self._flooding
            self._stretch_ends_at = now + self.limits.active_s

    def _share(self, party: Party) -> float:
        """Of all who have been active lately."""
        return self.limits.concurrency * party.weight / self._weights

    def _part(self, party: Party) -> float:
        """Places that the tenant may come to have: its share, or its part of what the calm ones leave; one at least."""
        weights = self._flooding_weights if party.floods else self._flooding_weights + party.weight
        room = self.limits.concurrency - self._calm_peak - self._spare()
        return max(1.0, self._share(party), room * party.weight / weights)

    def _spare(self) -> float:
        """Places kept for the calm ones beyond their peak: independent requests vary by the root of their number."""
        return 1.0 + math.sqrt(self._calm_peak)

    def _may_start(self, party: Party) -> bool:
        if not self.limits.fair or len(self._parties) < 2:
            return True
        places, share = self.limits.concurrency, self._share(party)
        if party.in_flight < max(1, int(share)):
            return True
        left = places - self.in_flight
        if party.in_flight < share and left > places * self._silent_weights / self._weights:
            return True
        if party.in_flight >= self._part(party):
            return False
        kept = self._calm_peak - (self.in_flight - self._flooding) + self._spare()
        return left > (kept if party.floods else kept / 2)

    def _pump(self) -> None:
        """Start waiting requests while there is room."""
        now = self._clock()
        if now >= self._expire_at:
            self._expire(now)
        self._note_peak(now)
        while self._ready and self.in_flight < self.limits.concurrency:
            place = self._next()
            if place is None:
                return
            queue = self._ready[place]
            turn = queue.popleft()
            if not queue:
                del self._ready[place]
            assert turn.party is not None
            self._stop_waiting(turn)
            self._start(turn, turn.party)
            assert turn.go is not None
            turn.go()

    def _next(self) -> QueueKey | None:
        best: tuple[float, int] | None = None
        found: QueueKey | None = None
        for place, queue in self._ready.items():
            turn = queue[0]
            account, party = turn.account, turn.party
            if account is None or party is None or not self._may_start(party):
                continue
            rank = (account.settled + account.reserved if self.limits.fair else 0.0, turn._number)
            if best is None or rank < best:
                best, found = rank, place
        return found

    def _stop_waiting(self, turn: Turn) -> None:
        assert turn.party is not None
        turn.party.waiting -= 1
        self.waiting -= 1

    def _start(self, turn: Turn, party: Party) -> None:
        account = turn.account
        assert account is not None
        turn.charged = self._counters.charge(account, turn.cost)
        turn.started = True
        party.in_flight += turn.places
        self.in_flight += turn.places
        self._note_start(party, turn.places)
        if turn.key is not None and self.open_set is not None:
            slot = turn.slot
            if slot is None:
                slot = turn.slot = self.open_set.slot_of(turn.key)
            self.open_set.start(slot, turn.cost)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class LoadAllowance:
    """How many cold loads a tenant may cause: `per_minute`, saved up for a minute."""

    clock: Clock
    _buckets: OrderedDict[TenantId, _Bucket] = field(default_factory=OrderedDict)

    def take(self, tenant: TenantId, per_minute: int) -> float:
        """0 where the load is allowed, and counted; else the seconds until one would be."""
        now = self.clock()
        bucket = self._buckets.setdefault(tenant, _Bucket(per_minute, now))
        self._buckets.move_to_end(tenant)
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.at) * per_minute / 60)
        bucket.at = now
        self._forget_full(now)
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return 0.0
        return (1 - bucket.tokens) * 60 / per_minute if per_minute else 60.0

    def _forget_full(self, now: float) -> None:
        while self._buckets:
            tenant, bucket = next(iter(self._buckets.items()))
            if now - bucket.at < 60:
                return
            del self._buckets[tenant]
