"""Pure: which replica serves an adapter's next request, and on how many replicas the adapter lives.

Rendezvous order (highest random weight, Thaler and Ravishankar 1998) gives every adapter an order of the replicas that
is its own and stable: when a replica leaves, only its own adapters move. An adapter lives on the first k of those that
are ready, its homes; k grows with its load. Nothing here waits, hashes or sorts per request.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

Clock = Callable[[], float]

BOUND = 1.25  # of the mean load: a replica above it sends an adapter on (Mirrokni et al. 2018, bounded loads)
BUSY_FROM = 8  # requests: below, no replica is too loaded for one more
AVERAGED_OVER_S = 2.0
SHRINK_AFTER_S = 30.0
AVOID_S = 30.0
GROW_AGAIN_S = 1.0
COLD = 0.01  # requests in flight on average: an adapter below it is hotter than none
FORGET_FROM = 4_096


def rendezvous(replicas: Iterable[str], adapter: str) -> list[str]:
    """Replica ids in the adapter's own stable order."""
    return sorted(
        replicas,
        key=lambda replica: blake2b(f"{replica}\0{adapter}".encode(), digest_size=8).digest(),
        reverse=True,
    )


class Host(Protocol):
    """What routing asks of a replica."""

    @property
    def id(self) -> str: ...
    @property
    def load(self) -> int:
        """Requests in flight and waiting."""

    @property
    def concurrency(self) -> int:
        """Requests that it runs at once."""

    @property
    def slots(self) -> int:
        """Adapters that it runs at once."""

    @property
    def takes_requests(self) -> bool: ...
    def holds(self, adapter: Any) -> bool:
        """Whether the adapter is loaded there."""

    def has_place(self, adapter: Any) -> bool:
        """Whether a request of the adapter would start without a wait for an adapter slot."""


HostT = TypeVar("HostT", bound=Host)
KeyT = TypeVar("KeyT", bound=Hashable)


class Spread(Generic[KeyT, HostT]):
    """One adapter's order of the replicas and its load, in requests in flight over all of them."""

    __slots__ = (
        "_noted_at",
        "average",
        "avoided",
        "grow_at",
        "in_flight",
        "is_warm",
        "k",
        "key",
        "low_since",
        "members",
        "order",
    )

    def __init__(self, key: KeyT, now: float) -> None:
        self.key = key
        self.k = 1
        self.in_flight = 0
        self.average = 0.0
        self.order: Sequence[HostT] = ()
        self.members = -1  # the pool's membership that `order` is of
        self.avoided: dict[str, float] = {}
        self.low_since = now  # since when the load asks for one home less
        self.grow_at = now  # when one home more is looked for again, where none was found
        self.is_warm = False
        self._noted_at = now

    def note(self, now: float, change: int) -> None:
        """The adapter's requests in flight change; the average follows with a time constant of two seconds."""
        self.average += (self.in_flight - self.average) * -math.expm1((self._noted_at - now) / AVERAGED_OVER_S)
        self._noted_at = now
        self.in_flight += change

    def homes(self) -> list[HostT]:
        return [host for host in self.order if host.takes_requests][: self.k]


class Router(Generic[KeyT, HostT]):
    """Chooses replicas for adapters.

    `spread_at` is the average of an adapter's requests in flight on one home above which it gets one more; it loses one
    when the rest would stay below half of that for 30 s.
    """

    def __init__(self, clock: Clock, *, spread_at: float) -> None:
        self._clock = clock
        self._spread_at = spread_at
        self._hosts: tuple[HostT, ...] = ()
        self._membership = 0
        self._spreads: dict[KeyT, Spread[KeyT, HostT]] = {}
        self._warm: dict[KeyT, Spread[KeyT, HostT]] = {}  # those that have been used in the last seconds
        self._forget_from = FORGET_FROM

    def set_hosts(self, hosts: Iterable[HostT]) -> None:
        """The pool's replicas have changed, ready or not."""
        self._hosts = tuple(hosts)
        self._membership += 1

    def spread(self, key: KeyT) -> Spread[KeyT, HostT]:
        """The adapter's record, its order brought up to date."""
        spread = self._spreads.get(key)
        if spread is None:
            if len(self._spreads) >= self._forget_from:
                self._forget_idle()
            spread = self._spreads[key] = Spread(key, self._clock())
        if spread.members != self._membership:
            by_id = {host.id: host for host in self._hosts}
            spread.order = [by_id[name] for name in rendezvous(by_id, str(key))]
            spread.members = self._membership
        return spread

    def choose(self, key: KeyT, *, tried: Sequence[HostT] = ()) -> HostT | None:
        """The replica for the adapter's next request; None: none that has not been tried takes requests.

        Best first: has a free place for the adapter and for the request, holds the adapter already, is within the
        bound, is a home, has the least load, comes first in the adapter's order.
        """
        spread = self.spread(key)
        home = self._quick(spread, tried)
        if home is not None:
            return home
        bound = self._bound()
        homes = spread.k
        best: tuple[bool, bool, bool, bool, bool, bool, int] | None = None
        found: HostT | None = None
        for host in spread.order:
            if not host.takes_requests or host in tried:
                continue
            homes -= 1
            load = host.load
            rank = (
                bool(spread.avoided) and self._is_avoided(spread, host),
                not host.has_place(key),
                load >= host.concurrency,
                not host.holds(key),
                load >= max(bound, BUSY_FROM),
                homes < 0,
                load,
            )
            if not any(rank[:6]) and spread.k == 1:
                return host
            if best is None or rank < best:
                best, found = rank, host
        return found

    def least_loaded(self, tried: Sequence[HostT] = ()) -> HostT | None:
        """For the base model, which every replica holds."""
        found: HostT | None = None
        for host in self._hosts:
            if host.takes_requests and host not in tried and (found is None or host.load < found.load):
                found = host
        return found

    def avoid(self, key: KeyT, host: HostT) -> None:
        """The adapter could not be loaded there: others are asked first for half a minute."""
        self.spread(key).avoided[host.id] = self._clock() + AVOID_S

    def started(self, key: KeyT) -> HostT | None:
        """A request of the adapter goes out. A replica is returned where it now gets another home, to be loaded."""
        spread = self._spreads.get(key) or self.spread(key)
        now = self._clock()
        spread.note(now, +1)
        if not spread.is_warm:
            spread.is_warm = True
            self._warm[key] = spread
        if spread.average / spread.k <= self._spread_at:
            return None
        spread.low_since = now
        return self._grow(spread, now) if now >= spread.grow_at else None

    def ended(self, key: KeyT) -> None:
        """A request of the adapter is over."""
        spread = self._spreads.get(key)
        if spread is None:
            return
        now = self._clock()
        spread.note(now, -1)
        if spread.k > 1:
            self._shrink(spread, now)

    def review(self) -> None:
        """Take homes from adapters that have gone quiet; to be called every second."""
        now = self._clock()
        for key, spread in list(self._warm.items()):
            spread.note(now, 0)
            if spread.k > 1:
                self._shrink(spread, now)
            elif not spread.in_flight and spread.average < COLD:
                spread.is_warm = False
                del self._warm[key]

    @staticmethod
    def _quick(spread: Spread[KeyT, HostT], tried: Sequence[HostT]) -> HostT | None:
        """The adapter's one home, where nothing speaks against it."""
        if spread.k > 1 or spread.avoided or tried:
            return None
        for host in spread.order:
            if host.takes_requests:
                load = host.load
                free = load < BUSY_FROM and load < host.concurrency
                return host if free and host.holds(spread.key) and host.has_place(spread.key) else None
        return None

    def _bound(self) -> float:
        total = ready = 0
        for host in self._hosts:
            if host.takes_requests:
                total += host.load
                ready += 1
        return BOUND * (total + 1) / ready if ready else 0.0

    def _is_avoided(self, spread: Spread[KeyT, HostT], host: HostT) -> bool:
        until = spread.avoided.get(host.id)
        if until is None:
            return False
        if self._clock() < until:
            return True
        del spread.avoided[host.id]
        return False

    def _grow(self, spread: Spread[KeyT, HostT], now: float) -> HostT | None:
        """One more home: the next in the adapter's order where no hotter adapter would lose its slot.

        Where there is none, nobody looks again for a second: a look goes through all adapters that are in use.
        """
        ready = [host for host in spread.order if host.takes_requests]
        for position in range(spread.k, len(ready)):
            host = ready[position]
            if self._would_displace_hotter(spread, host, now) or self._is_avoided(spread, host):
                continue
            order = [other for other in spread.order if other is not host]
            order.insert(spread.order.index(ready[spread.k - 1]) + 1, host)  # homes are a prefix of the order
            spread.order = order
            spread.k += 1
            return host
        spread.grow_at = now + GROW_AGAIN_S
        return None

    def _would_displace_hotter(self, spread: Spread[KeyT, HostT], host: HostT, now: float) -> bool:
        heat = spread.average / (spread.k + 1)
        hotter = 0
        for other in self._warm.values():
            if hotter >= host.slots:
                break
            if other is not spread:
                other.note(now, 0)  # one that has gone quiet tells nobody
                hotter += other.average / other.k >= heat and host in other.homes()
        return hotter >= host.slots

    def _shrink(self, spread: Spread[KeyT, HostT], now: float) -> None:
        if spread.average / (spread.k - 1) >= self._spread_at / 2:
            spread.low_since = now
        elif now - spread.low_since >= SHRINK_AFTER_S:
            spread.k -= 1
            spread.low_since = now
            if spread.k == 1:
                spread.members = -1  # back to its own order

    def _forget_idle(self) -> None:
        for key, spread in list(self._spreads.items()):
            if not spread.in_flight and spread.k == 1:
                del self._spreads[key]
                self._warm.pop(key, None)
        self._forget_from = max(FORGET_FROM, 2 * len(self._spreads))
