"""A model of replicas behind a Tailor gateway, in numbers alone: what becomes of a load on so many of them.

An engine goes in steps that take longer the more sequences run; a prompt and an adapter that is loaded or brought into
a slot make one step longer for all (vLLM 0.32). The gateway opens no more adapters than there are slots, round robin by
`quantum_s` where more are asked, and places requests as its routing does: where the adapter has a place, is loaded, and
the load is within 1.25 of the mean. While others were there in the last 10 s a tenant has an equal share of a
replica's places, or an equal part of what those who ask for little leave. Weights, limits, refusals and retries are not
in it.
"""

import heapq
import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_BOUND: Final = 1.25
_BUSY_FROM: Final = 8
_NONE: Final = -1
_ACTIVE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What a replica's work costs, in seconds, and what it has room for."""

    step_s: float
    per_sequence_s: float
    per_prompt_token_s: float
    load_s: float  # an adapter that is not in host memory
    activate_s: float  # one that is there into a slot
    slots: int
    host_adapters: int
    max_num_seqs: int
    overhead_s: float = 0.0  # of a request outside of the engine
    quantum_s: float = 1.0
    spread_at: float = 16.0  # requests of an adapter in flight on a replica, above which it gets another


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in order of time; an adapter is a number, -1 the base model; so is a tenant."""

    at_s: Floats
    tenant: npt.NDArray[Any]
    adapter: npt.NDArray[Any]
    prompt_tokens: npt.NDArray[Any]
    output_tokens: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """When each request had its first token and its last, and what it found."""

    first_s: Floats
    done_s: Floats
    hit: npt.NDArray[np.bool_]  # its adapter was in a slot


class _Sharing:
    """How the gate divides a replica's places between tenants: `gateway.fairness.FairGate`, all weights alike."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._seen: dict[int, float] = {}  # each tenant of the last seconds, longest ago first
        self._running: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        self._in_flight = 0
        self._floods: set[int] = set()  # who wait or have more than their part
        self._peaks = (0, 0)  # of what the others have at once: in this stretch and the last, and in this one
        self._stretch_ends_at = 0.0

    def come(self, tenant: int, now: float) -> None:
        self._seen.pop(tenant, None)
        self._seen[tenant] = now
        self._waiting[tenant] += 1

    def look(self, now: float) -> None:
        """Forget who has been away for long."""
        if now >= self._stretch_ends_at:
            self._peaks, self._stretch_ends_at = (self._peaks[1], self._calm), now + _ACTIVE_S
        while self._seen:
            tenant, at = next(iter(self._seen.items()))
            if at >= now - _ACTIVE_S:
                return
            del self._seen[tenant]
            if self._running[tenant] or self._waiting[tenant]:
                self._seen[tenant] = now

    def wait(self, tenant: int) -> None:
        """A request of it could not start, for whatever reason: it floods."""
        if tenant not in self._floods:
            self._floods.add(tenant)
            self._peaks = (self._peaks[0], self._calm)

    def start(self, tenant: int) -> None:
        self._waiting[tenant] -= 1
        self._running[tenant] += 1
        self._in_flight += 1
        if tenant not in self._floods:
            if self._running[tenant] > self._part(tenant):
                self.wait(tenant)
            else:
                self._peaks = (max(self._peaks[0], self._calm), max(self._peaks[1], self._calm))

    def end(self, tenant: int) -> None:
        self._running[tenant] -= 1
        self._in_flight -= 1
        if not self._waiting[tenant] and self._running[tenant] <= self._part(tenant) / 2:
            self._floods.discard(tenant)

    @property
    def _calm(self) -> int:
        return self._in_flight - sum(self._running[one] for one in self._floods)

    @property
    def _spare(self) -> float:
        return 1 + math.sqrt(self._peaks[0])

    def _share(self) -> float:
        return self._places / max(1, len(self._seen))

    def _part(self, tenant: int) -> float:
        return max(1.0, self._share(), (self._places - self._peaks[0] - self._spare) / len(self._floods | {tenant}))

    def may_start(self, tenant: int) -> bool:
        running, left = self._running[tenant], self._places - self._in_flight
        if len(self._seen) < 2 or running < max(1, int(self._share())):
            return True
        silent = sum(1 for one in self._seen if not (self._running[one] or self._waiting[one]))
        if running < self._share() and left > silent * self._share():
            return True
        kept = self._peaks[0] - self._calm + self._spare
        return running < self._part(tenant) and left > (kept if tenant in self._floods else kept / 2)


class _Replica:
    """One engine with the gateway's gate before it."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine, self.number = engine, number
        self.lines: dict[tuple[int, int], deque[int]] = {}  # who waits, by tenant and adapter
        self.waiting = 0
        self.running: list[list[int]] = []  # index, adapter, tokens to come, tenant
        self.sharing = _Sharing(engine.max_num_seqs)
        self.busy: Counter[int] = Counter()  # running, by adapter
        self.open: dict[int, float] = {}  # since when
        self.closing: set[int] = set()
        self.host: OrderedDict[int, None] = OrderedDict()
        self.device: OrderedDict[int, None] = OrderedDict()
        self.stepping = False

    @property
    def load(self) -> int:
        return self.waiting + len(self.running)

    def has_place(self, adapter: int) -> bool:
        if adapter == _NONE or (adapter in self.open and adapter not in self.closing):
            return True
        return len(self.open) < self.engine.slots or any(not self.busy[one] for one in self.open)

    def join(self, index: int, tenant: int, adapter: int, now: float) -> None:
        """A request comes to the gate."""
        self.lines.setdefault((tenant, adapter), deque()).append(index)
        self.waiting += 1
        self.sharing.come(tenant, now)

    def step(self, now: float, load: Load, hit: npt.NDArray[np.bool_]) -> float:
        """Take in what there is room for, first come first; returns how long the step takes."""
        stall, prompts = 0.0, 0
        self.sharing.look(now)
        heads = [(line[0], key) for key, line in self.lines.items()] if self._has_room else []
        heapq.heapify(heads)
        while heads and self._has_room:
            index, (tenant, adapter) = heapq.heappop(heads)
            if not self.sharing.may_start(tenant) or not self._opens(adapter, now):
                continue
            stall += self._start(index, tenant, adapter, load, hit)
            prompts += int(load.prompt_tokens[index])
            if line := self.lines.get((tenant, adapter)):
                heapq.heappush(heads, (line[0], (tenant, adapter)))
        for tenant, _ in self.lines:
            self.sharing.wait(tenant)
        engine = self.engine
        decoding = engine.step_s + engine.per_sequence_s * len(self.running)
        return decoding + engine.per_prompt_token_s * prompts + stall

    @property
    def _has_room(self) -> bool:
        return len(self.running) < self.engine.max_num_seqs

    def _start(self, index: int, tenant: int, adapter: int, load: Load, hit: npt.NDArray[np.bool_]) -> float:
        """The head of a line runs; what bringing its adapter stalls."""
        line = self.lines[tenant, adapter]
        line.popleft()
        if not line:
            del self.lines[tenant, adapter]
        self.waiting -= 1
        self.sharing.start(tenant)
        self.running.append([index, adapter, int(load.output_tokens[index]), tenant])
        if adapter == _NONE:
            return 0.0
        hit[index] = adapter in self.device
        self.busy[adapter] += 1
        return self._bring(adapter)

    def _opens(self, adapter: int, now: float) -> bool:
        if adapter == _NONE:
            return True
        if adapter in self.open:
            return adapter not in self.closing
        if len(self.open) >= self.engine.slots:
            idle = next((one for one in self.open if not self.busy[one]), None)
            if idle is None:
                self._close_one(now)
                return False
            self._close(idle)
        self.open[adapter] = now
        return True

    def _close_one(self, now: float) -> None:
        """The adapter that has been open longest drains, when its time is over."""
        longest = min((one for one in self.open if one not in self.closing), key=self.open.__getitem__, default=None)
        if longest is not None and now - self.open[longest] >= self.engine.quantum_s:
            self.closing.add(longest)

    def _close(self, adapter: int) -> None:
        self.open.pop(adapter, None)
        self.closing.discard(adapter)

    def _bring(self, adapter: int) -> float:
        """Into host memory and into a slot; the time it stalls the engine."""
        stall = self.engine.activate_s if adapter not in self.device else 0.0
        if adapter not in self.host:
            stall = self.engine.load_s
        for held, room in ((self.host, self.engine.host_adapters), (self.device, self.engine.slots)):
            held[adapter] = None
            held.move_to_end(adapter)
            while len(held) > room:
                held.popitem(last=False)
        return stall

    def tell(self, now: float, first: Floats, done: Floats) -> list[int]:
        """The step's tokens are there; the adapters of requests that ended."""
        ended, left = [], []
        for one in self.running:
            index, adapter, _, tenant = one
            if math.isnan(first[index]):
                first[index] = now
            one[2] -= 1
            if one[2] > 0:
                left.append(one)
                continue
            done[index] = now
            ended.append(adapter)
            self.busy[adapter] -= 1
            self.sharing.end(tenant)
            if adapter in self.closing and not self.busy[adapter]:
                self._close(adapter)
        self.running = left
        return ended


class _Router:
    """Where a request goes."""

    def __init__(self, replicas: list[_Replica], engine: Engine, seed: int) -> None:
        self._replicas, self._spread_at = replicas, engine.spread_at
        self._random = np.random.default_rng(seed)
        self._order: dict[int, list[_Replica]] = {}
        self._in_flight: Counter[int] = Counter()
        self._homes: Counter[int] = Counter()

    def choose(self, adapter: int) -> _Replica:
        if adapter == _NONE:
            return min(self._replicas, key=lambda one: one.load)
        order = self._order.setdefault(
            adapter, [self._replicas[n] for n in self._random.permutation(len(self._replicas))]
        )
        mean = (sum(one.load for one in self._replicas) + 1) / len(self._replicas)
        bound = max(_BOUND * mean, _BUSY_FROM)
        homes = 1 + self._homes[adapter]
        self._in_flight[adapter] += 1
        if self._in_flight[adapter] > self._spread_at * homes and homes < len(order):
            order[homes].host[adapter] = None
            self._homes[adapter] += 1

        def rank(place: int) -> tuple[bool, bool, bool, bool, bool, int, int]:
            one = order[place]
            full = one.load >= one.engine.max_num_seqs
            held, busy = adapter in one.host, one.load >= bound
            return not one.has_place(adapter), full, not held, busy, place >= homes, one.load, place

        return order[min(range(len(order)), key=rank)]

    def ended(self, adapter: int) -> None:
        self._in_flight[adapter] -= 1


def simulate(load: Load, engine: Engine, *, replicas: int = 1, seed: int = 1) -> Answered:
    """What so many replicas make of a load; all times are since the same begin as the load's."""
    count = len(load.at_s)
    first, done = np.full(count, np.nan), np.full(count, np.nan)
    hit = np.ones(count, bool)
    engines = [_Replica(engine, number) for number in range(replicas)]
    router = _Router(engines, engine, seed)
    ends: list[tuple[float, int]] = []

    def begin_step(one: _Replica, now: float) -> None:
        one.stepping = bool(one.running or one.waiting)
        if one.stepping:
            heapq.heappush(ends, (now + one.step(now, load, hit), one.number))

    coming = 0
    while coming < count or ends:
        if coming < count and (not ends or load.at_s[coming] < ends[0][0]):
            now = float(load.at_s[coming])
            one = router.choose(int(load.adapter[coming]))
            one.join(coming, int(load.tenant[coming]), int(load.adapter[coming]), now)
            coming += 1
            if not one.stepping:
                begin_step(one, now)
            continue
        now, number = heapq.heappop(ends)
        for adapter in engines[number].tell(now, first, done):
            router.ended(adapter)
        begin_step(engines[number], now)
    return Answered(first + engine.overhead_s, done + engine.overhead_s, hit)
