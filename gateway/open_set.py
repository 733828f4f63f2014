"""Pure: whose adapter has a place in a replica.

An engine runs `max_loras` adapters at once and lets a further one wait for ever, so each gateway opens no more than
that and rotates them. Clocks are injected; nothing here waits.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable

from adapter_store.ids import TenantId

Key = tuple[TenantId, str]
"""(tenant, digest) of an adapter: tenants never share one in an engine, equal bytes or not."""
Clock = Callable[[], float]


class Slot:
    """An adapter that may send requests to the engine; while it has none in flight it is among the idle."""

    __slots__ = ("after", "before", "closing", "in_flight", "key", "opened_at", "served", "used_at", "work")

    def __init__(self, key: Key, now: float) -> None:
        self.before: Slot | None = None  # its neighbours among the idle
        self.after: Slot | None = None
        self.key = key
        self.opened_at = now
        self.used_at = now
        self.in_flight = 0
        self.work = 0  # tokens that its requests in flight may still need
        self.served = False
        self.closing = False


class _Idle:
    """Slots with nothing in flight, the longest unused first.

    They know their neighbours, so that one comes and goes without the two lookups that `OrderedDict` needs.
    """

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first: Slot | None = None
        self.last: Slot | None = None

    def append(self, slot: Slot) -> None:
        """One that is not idle yet, used just now."""
        last = self.last
        slot.before = last
        if last is None:
            self.first = slot
        else:
            last.after = slot
        self.last = slot

    def remove(self, slot: Slot) -> None:
        """One that is idle."""
        before, after = slot.before, slot.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        slot.before = slot.after = None


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
        self._open: dict[Key, Slot] = {}
        self._idle = _Idle()
        self._line: OrderedDict[str, OrderedDict[Key, None]] = OrderedDict()
        self._in_line = 0
        self._closing = 0
        self._stuck_since: float | None = None

    def __len__(self) -> int:
        return len(self._open)

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
        return not self._in_line and (len(self._open) < self.limit or self._idle.first is not None)

    def claim(self, key: Key, busy: Callable[[Key], bool]) -> Slot | None:
        """The adapter's slot where a request of it may start now: it is open, or a place is free and nobody in line.

        A place is free that nobody has, or whose adapter is idle and has nobody waiting, as `busy` says: it is closed.
        """
        slot = self._open.get(key)
        if slot is not None:
            return None if slot.closing else slot
        if self._in_line:
            return None
        while len(self._open) >= self.limit:
            unused = self._unused(busy)
            if unused is None:
                return None
            self._remove(unused)
        return self._add(key)

    def _unused(self, busy: Callable[[Key], bool]) -> Slot | None:
        """The adapter that has been idle longest and has nobody waiting."""
        slot = self._idle.first
        while slot is not None and busy(slot.key):
            slot = slot.after
        return slot

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

    def slot_of(self, key: Key) -> Slot:
        """That of an open adapter."""
        return self._open[key]

    def start(self, slot: Slot, work: int) -> None:
        """A request of the adapter goes to the engine."""
        if not slot.in_flight:
            self._idle.remove(slot)
        slot.in_flight += 1
        slot.work += work
        slot.served = True

    def finish(self, slot: Slot, work: int) -> bool:
        """A request is over; True where that may give somebody in line a place."""
        slot.in_flight -= 1
        slot.work -= work
        slot.used_at = self._clock()
        if slot.in_flight:
            return False
        self._idle.append(slot)
        return slot.closing or self._in_line > 0 or len(self._open) > self.limit

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
        before = len(self._open)
        for slot in sorted(self._open.values(), key=lambda slot: slot.used_at):
            key = slot.key
            if slot.in_flight or not (slot.closing or (spare > 0 and not busy(key))):
                continue
            spare -= 1
            self._remove(slot)
            if not slot.closing:
                closed.append(key)
            if busy(key):
                self.join(key)
        if len(self._open) < before:  # the rest have a quantum to follow
            self._stuck_since = self._clock() if self._closing else None

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
        if self._demand() > 0:
            return
        self._stuck_since = None
        if self._closing:
            for key, slot in self._open.items():
                if slot.closing:
                    slot.closing = False
                    opened.append(key)
            self._closing = 0

    def _add(self, key: Key) -> Slot:
        slot = self._open[key] = Slot(key, self._clock())
        self._idle.append(slot)
        return slot

    def _remove(self, slot: Slot) -> None:
        """One without requests in flight."""
        self._idle.remove(slot)
        del self._open[slot.key]
        if slot.closing:
            self._closing -= 1

    def _pop_line(self) -> Key:
        group, keys = self._line.popitem(last=False)
        key, _ = keys.popitem(last=False)
        if keys:
            self._line[group] = keys  # behind the other tenants
        self._in_line -= 1
        return key
