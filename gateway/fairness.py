"""Pure: who is served next, and whose adapter has a place, where a replica is busy.

Two things are shared. Tokens: a virtual counter per tenant says who has had least (Sheng et al. 2024, "Fairness in
Serving Large Language Models"). Adapter slots: an engine runs `max_loras` adapters at once and lets a further one wait
for ever, so each gateway opens no more than that and rotates them. Clocks are injected; nothing here waits.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from adapter_store.ids import TenantId

Key = tuple[TenantId, str]
"""(tenant, digest) of an adapter: tenants never share one in an engine, equal bytes or not."""
Clock = Callable[[], float]

PRIORITY_EPOCH_S: Final = 1_767_225_600.0  # 2026-01-01: keeps priorities short
LEAD_LIMIT_TOKENS: Final = 60_000  # a request passes another that came this many milliseconds later, in any case
FORGET_ACCOUNTS_FROM: Final = 4_096


class Account:
    """One tenant's virtual counter: tokens over weight.

    `settled` are tokens that were really spent, `reserved` the estimates of requests under way.
    """

    __slots__ = ("in_heap", "requests", "reserved", "settled", "weight")

    def __init__(self) -> None:
        self.settled = 0.0
        self.reserved = 0.0
        self.requests = 0  # waiting or in flight
        self.weight = 1.0
        self.in_heap = False

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

    def arrive(self, tenant: TenantId, weight: float) -> Account:
        """A request of the tenant begins to wait or to run; `depart` when it is over."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account()
            if len(self._accounts) > self._forget_from:
                self._forget_idle()
        account.weight = weight
        if not account.requests:
            account.settled = max(account.settled, self.floor())
            self._active += 1
            if not account.in_heap:
                self._push(account)
        account.requests += 1
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

    def _forget_idle(self) -> None:
        """An idle tenant at or below the floor would be lifted to it anyway: its account says nothing."""
        floor = self.floor()
        for tenant, account in list(self._accounts.items()):
            if not (account.requests or account.in_heap) and account.settled <= floor:
                del self._accounts[tenant]
        self._forget_from = max(FORGET_ACCOUNTS_FROM, 2 * len(self._accounts))


class _Open:
    """An adapter that may send requests to the engine."""

    __slots__ = ("closing", "in_flight", "opened_at", "served", "used_at", "work")

    def __init__(self, now: float) -> None:
        self.opened_at = now
        self.used_at = now
        self.in_flight = 0
        self.work = 0  # tokens that its requests in flight may still need
        self.served = False
        self.closing = False


class OpenSet:
    """The adapters of tenants that may have requests in one replica's engine: at most `limit`, in turns.

    While others wait in line, an open adapter with nothing to do gives way at once, and one whose quantum is over
    closes: it takes no new request, finishes those that run, and leaves its place to the head of the line. The line
    goes round the tenants that wait in it. Of those whose quantum is over, the one with the least work left closes;
    each further quantum in which the head still waits closes one more, so that one long answer blocks nothing.

    An adapter at position p of the line (1: its head) begins to answer within

        ceil(p / limit) * (Q + D) + min(p, limit) * L

    Q: the quantum; D: the longest answer in flight of the adapter that drains first; L: one load, none where the
    engine holds the adapter already. With the defaults (limit 4, Q = 1 s), answers of up to 3 s and loads of up to
    0.2 s, a cold fifth adapter waits 4.2 s at most.
    """

    def __init__(self, limit: int, quantum_s: float, clock: Clock, *, by_tenant: bool = True) -> None:
        self.limit = limit
        self._quantum_s = quantum_s
        self._clock = clock
        self._by_tenant = by_tenant
        self._open: dict[Key, _Open] = {}
        self._idle: OrderedDict[Key, None] = OrderedDict()  # of the open ones; the longest unused first
        self._line: OrderedDict[str, OrderedDict[Key, None]] = OrderedDict()
        self._in_line = 0
        self._closing = 0
        self._stuck_since: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: Key) -> bool:
        return key in self._open

    @property
    def waiting(self) -> int:
        """Adapters in line."""
        return self._in_line

    def keys(self) -> list[Key]:
        return list(self._open)

    def admits(self, key: Key) -> bool:
        """Whether a request of the adapter may start now."""
        slot = self._open.get(key)
        return slot is not None and not slot.closing

    def has_place(self, key: Key) -> bool:
        """Whether a request of the adapter would start without a wait for a place."""
        slot = self._open.get(key)
        if slot is not None:
            return not slot.closing
        return not self._in_line and (len(self._open) < self.limit or len(self._idle) > 0)

    def open_free(self, key: Key, busy: Callable[[Key], bool]) -> bool:
        """Open the adapter where a place is free and nobody is in line; `busy` says who has requests waiting."""
        if self._in_line:
            return False
        while len(self._open) >= self.limit:
            for unused in self._idle:
                if not busy(unused):
                    break
            else:
                return False
            self._remove(unused)
        self._add(key)
        return True

    def share(self, slots: int, used_by_others: int) -> None:
        """Come one step nearer to the engine's slots less those that other gateways' adapters use, never below one.

        Gateways on one replica step down together while their adapters are more than its slots, and up while they are
        fewer: from 4 and 4 on four slots to 2 and 2 within two reports, then within one of the slots for good.
        """
        target = max(1, slots - used_by_others)
        self.limit += (self.limit < target) - (self.limit > target)

    def join(self, key: Key) -> None:
        """Put the adapter in line; one that is open or in it stays as it is."""
        if key in self._open:
            return
        keys = self._line.setdefault(key[0] if self._by_tenant else "", OrderedDict())
        if key not in keys:
            keys[key] = None
            self._in_line += 1

    def drop(self, key: Key) -> None:
        """Nobody waits for the adapter any more: it leaves the line."""
        group = key[0] if self._by_tenant else ""
        keys = self._line.get(group)
        if keys is not None and key in keys:
            del keys[key]
            self._in_line -= 1
            if not keys:
                del self._line[group]

    def start(self, key: Key, work: int) -> None:
        """A request of an open adapter goes to the engine."""
        slot = self._open[key]
        if not slot.in_flight:
            del self._idle[key]
        slot.in_flight += 1
        slot.work += work
        slot.served = True

    def finish(self, key: Key, work: int) -> bool:
        """A request is over; True where that may give somebody in line a place."""
        slot = self._open[key]
        slot.in_flight -= 1
        slot.work -= work
        slot.used_at = self._clock()
        if not slot.in_flight:
            self._idle[key] = None
        return not slot.in_flight and (slot.closing or self._in_line > 0 or len(self._open) > self.limit)

    def turn(self, busy: Callable[[Key], bool]) -> tuple[list[Key], list[Key]]:
        """Rotate as far as can be now; `busy` says which adapters have requests waiting.

        Returns the adapters that now take requests, and those that no longer do.
        """
        opened: list[Key] = []
        closed: list[Key] = []
        self._leave_places(busy, closed)
        while self._in_line and len(self._open) < self.limit:
            key = self._pop_line()
            self._add(key)
            opened.append(key)
            self._stuck_since = None
        self._close_some(closed)
        self._reopen(opened)
        return opened, closed

    def due(self) -> float | None:
        """When `turn` is worth another call though nothing else has happened, by the clock."""
        if self._demand() <= 0:
            return None
        times = [slot.opened_at + self._quantum_s for slot in self._open.values() if not slot.closing and slot.served]
        if self._closing < self._demand():
            return min(times, default=None)
        if self._stuck_since is None or not times:
            return None
        extra = self._closing - self._demand() + 1
        return max(min(times), self._stuck_since + extra * self._quantum_s)

    def _demand(self) -> int:
        """Places that must become free."""
        return min(self._in_line + len(self._open) - self.limit, len(self._open))

    def _leave_places(self, busy: Callable[[Key], bool], closed: list[Key]) -> None:
        spare = self._demand()
        for key, slot in sorted(self._open.items(), key=lambda item: item[1].used_at):
            if slot.in_flight or not (slot.closing or (spare > 0 and not busy(key))):
                continue
            spare -= 1
            self._remove(key)
            if not slot.closing:
                closed.append(key)
            if busy(key):
                self.join(key)

    def _close_some(self, closed: list[Key]) -> None:
        now = self._clock()
        demand = self._demand()
        if demand <= 0:
            return
        if self._stuck_since is not None:
            demand += int((now - self._stuck_since) / self._quantum_s)
        over = [
            (slot.work, key)
            for key, slot in self._open.items()
            if not slot.closing and slot.served and now >= slot.opened_at + self._quantum_s
        ]
        for _, key in heapq.nsmallest(max(0, demand - self._closing), over):
            self._open[key].closing = True
            self._closing += 1
            closed.append(key)
            if self._stuck_since is None:
                self._stuck_since = now

    def _reopen(self, opened: list[Key]) -> None:
        """Closing was for somebody who is no longer in line."""
        if not self._closing or self._demand() > 0:
            return
        for key, slot in self._open.items():
            if slot.closing:
                slot.closing = False
                opened.append(key)
        self._closing = 0
        self._stuck_since = None

    def _add(self, key: Key) -> None:
        self._open[key] = _Open(self._clock())
        self._idle[key] = None

    def _remove(self, key: Key) -> None:
        self._idle.pop(key, None)
        if self._open.pop(key).closing:
            self._closing -= 1

    def _pop_line(self) -> Key:
        group, keys = self._line.popitem(last=False)
        key, _ = keys.popitem(last=False)
        if keys:
            self._line[group] = keys  # behind the other tenants
        self._in_line -= 1
        return key


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

    __slots__ = ("floods", "in_flight", "seen_at", "waiting", "weight")

    def __init__(self, weight: float) -> None:
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
        "_number", "account", "charged", "cost", "go", "key", "party", "places", "started", "tenant", "weight",
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
        self._parties: OrderedDict[TenantId, Party] = OrderedDict()  # the longest silent first
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
        if turn.key is not None and not self._may_use(turn.key):
            return False
        self._note_busy(party)
        turn.account = self._counters.arrive(turn.tenant, turn.weight)
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
        self._note_busy(party)
        turn.go = go
        self._numbers += 1
        turn._number = self._numbers
        turn.account = self._counters.arrive(turn.tenant, turn.weight)
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
        if turn.key is not None and self.open_set is not None and self.open_set.finish(turn.key, turn.cost):
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

    def _may_use(self, key: Key) -> bool:
        """Whether the adapter is open, or could be opened at once."""
        open_set = self.open_set
        if open_set is None or open_set.admits(key):
            return True
        return key not in open_set and open_set.open_free(key, self._is_waiting)

    def _is_waiting(self, key: Key) -> bool:
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
            party = self._parties[turn.tenant] = Party(turn.weight)
            self._weights += turn.weight
            self._silent_weights += turn.weight
        elif len(self._parties) > 1:
            self._parties.move_to_end(turn.tenant)
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
        while self._parties:
            tenant, party = next(iter(self._parties.items()))
            if party.seen_at > now - self.limits.active_s:
                self._expire_at = party.seen_at + self.limits.active_s
                return
            if party.in_flight or party.waiting:
                party.seen_at = now
                self._parties.move_to_end(tenant)
            else:
                del self._parties[tenant]
                self._weights -= party.weight
                self._silent_weights -= party.weight

    def _note_busy(self, party: Party) -> None:
        """Before a request of the tenant begins to wait or to run."""
        if party.is_silent:
            self._silent_weights -= party.weight

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
            self.open_set.start(turn.key, turn.cost)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class LoadAllowance:
    """How many cold loads a tenant may cause: `per_minute`, saved up for a minute."""

    clock: Clock
    _buckets: OrderedDict[TenantId, _Bucket] = field(default_factory=OrderedDict)

    def take(self, tenant: TenantId, per_minute: int | None) -> float:
        """0 where the load is allowed, and counted; else the seconds until one would be."""
        if per_minute is None:
            return 0.0
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
