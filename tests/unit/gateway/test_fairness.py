"""Who is served next and whose adapter has a place, on a clock that a test moves."""

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.ids import TenantId
from gateway.fairness import (
    FORGET_ACCOUNTS_FROM,
    LEAD_LIMIT_TOKENS,
    FairGate,
    GateLimits,
    LoadAllowance,
    QueueFull,
    Turn,
    VirtualTokenCounters,
)
from gateway.open_set import Key, OpenSet


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def key(number: int, tenant: str | None = None) -> Key:
    return (TenantId(tenant or f"t{number}"), f"d{number}")


@dataclass
class Model:
    """A replica in virtual time: one gate, requests that run for as long as they say."""

    concurrency: int = 8
    slots: int | None = None
    quantum_s: float = 1.0
    fair: bool = True
    tenant_queue: int = 10_000
    queue: int = 10_000
    clock: Clock = field(default_factory=Clock)
    waited: dict[int, float] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    started: Counter[Key | None] = field(default_factory=Counter)
    _events: list[tuple[float, int, Turn, float]] = field(default_factory=list)
    _numbers: int = 0

    def __post_init__(self) -> None:
        self.counters = VirtualTokenCounters(self.clock)
        self.open_set = OpenSet(self.slots, self.quantum_s, self.clock, by_tenant=self.fair) if self.slots else None
        limits = GateLimits(self.concurrency, self.tenant_queue, self.queue, fair=self.fair)
        self.gate = FairGate(limits, self.counters, self.open_set, self.clock)
        self.most_open = 0

    def ask(
        self, tenant: str, runs_s: float, *, adapter: Key | None = None, weight: float = 1.0, cost: int = 100
    ) -> tuple[int, Turn]:
        """Send a request; returns its number, by which `waited` tells its wait once it has started."""
        self._numbers += 1
        number, asked_at = self._numbers, self.clock.now
        turn = Turn(TenantId(tenant), weight, adapter, cost)

        def go() -> None:
            self.waited[number] = self.clock.now - asked_at
            self.started[adapter] += 1
            heapq.heappush(self._events, (self.clock.now + runs_s, number, turn, runs_s))

        if self.gate.enter(turn):
            go()
        else:
            self.gate.wait(turn, go)
        self._look()
        return number, turn

    def _look(self) -> None:
        if self.open_set is not None:
            self.most_open = max(self.most_open, len(self.open_set))

    def step(self, until: float) -> Turn | None:
        """Move the clock to what happens next, at most to `until`; returns the request that ended."""
        due = self.gate.due()
        ends = self._events[0][0] if self._events else math.inf
        if due is not None and due <= min(ends, until):
            self.clock.now = max(self.clock.now + 1e-6, due)
            self.gate.rotate()
            self._look()
            return None
        if ends > until:
            self.clock.now = until
            return None
        self.clock.now = max(ends, self.clock.now)
        _, _, turn, _ = heapq.heappop(self._events)
        self.spent[turn.tenant] += turn.cost
        self.gate.leave(turn, turn.cost)
        self._look()
        return turn

    def run(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.step(until)


# virtual token counters


def test_an_idle_tenant_saves_nothing_up_and_pays_for_nothing() -> None:
    """Coming back, it starts at the minimum of those who were active meanwhile."""
    counters = VirtualTokenCounters(Clock())
    busy = counters.arrive(TenantId("busy"), 1)
    counters.settle(busy, counters.charge(busy, 500), 500)
    late = counters.arrive(TenantId("late"), 1)
    assert late.counter == 500
    counters.settle(late, counters.charge(late, 10), 10)
    counters.depart(late)
    counters.settle(busy, counters.charge(busy, 1_000), 1_000)
    assert counters.arrive(TenantId("late"), 1).counter == 1_500


def test_an_estimate_is_set_right_when_the_request_ends() -> None:
    """The counter is charged at the start, so that one tenant cannot start everything at once."""
    counters = VirtualTokenCounters(Clock())
    account = counters.arrive(TenantId("t"), 2)
    charged = counters.charge(account, 4_000)
    assert account.counter == 2_000
    counters.settle(account, charged, 100)
    assert account.counter == 50


def test_priorities_of_requests_that_wait_together_compare() -> None:
    """The tenant that is ahead goes later, but no later than one who comes a minute after."""
    clock = Clock()
    counters = VirtualTokenCounters(clock)
    ahead, behind = (counters.arrive(TenantId(name), 1) for name in ("ahead", "behind"))
    counters.charge(ahead, 10**9)
    first = counters.priority(ahead)
    assert first > counters.priority(behind)
    clock.now += LEAD_LIMIT_TOKENS / 1_000 + 1
    assert first < counters.priority(behind)
    assert -(2**63) <= first < 2**63


def test_an_account_that_is_forgotten_is_not_counted_on() -> None:
    """Whoever kept it gets the tenant's new one; that of the newcomer for whom others were forgotten stays."""
    counters = VirtualTokenCounters(Clock())
    busy = counters.arrive(TenantId("busy"), 1)
    kept = counters.arrive(TenantId("kept"), 1)
    counters.depart(kept)
    for number in range(FORGET_ACCOUNTS_FROM):
        counters.settle(busy, counters.charge(busy, 1), 1)
        newcomer = counters.arrive(TenantId(f"{number}"), 1)
        counters.depart(newcomer)
    assert kept.forgotten
    again = counters.arrive(TenantId("kept"), 1, kept)
    assert again is not kept
    assert counters.arrive(TenantId("kept"), 1, kept) is again
    assert counters.arrive(TenantId(f"{FORGET_ACCOUNTS_FROM - 1}"), 1) is newcomer


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 500), st.booleans()), max_size=200))
def test_the_floor_is_the_least_of_the_active(steps: list[tuple[int, int, bool]]) -> None:
    """Whoever comes and goes, and in whatever order estimates are settled."""
    counters = VirtualTokenCounters(Clock())
    running: dict[int, list[tuple[object, float]]] = {}
    for number, tokens, ends in steps:
        mine = running.setdefault(number, [])
        if ends and mine:
            account, charged = mine.pop()
            counters.settle(account, charged, tokens)  # type: ignore[arg-type]
            counters.depart(account)  # type: ignore[arg-type]
        else:
            account = counters.arrive(TenantId(str(number)), 1)
            mine.append((account, counters.charge(account, tokens)))
        active = [list_[0][0] for list_ in running.values() if list_]
        if active:
            assert counters.floor() == min(account.settled for account in active)  # type: ignore[attr-defined]


@settings(max_examples=25)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4),
    costs=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    concurrency=st.integers(1, 16),
)
def test_backlogged_tenants_are_served_by_weight(weights: list[float], costs: list[int], concurrency: int) -> None:
    """Their tokens over weight stay within what is in flight at once (Sheng et al. 2024, theorem 4.4).

    As in an engine, where each running request gives a token a step, what costs more runs longer.
    """
    model = Model(concurrency=concurrency)
    tenants = {f"t{number}": weight for number, weight in enumerate(weights)}
    cost_of = {name: costs[number % len(costs)] for number, name in enumerate(tenants)}
    for name, weight in tenants.items():
        for _ in range(120):
            model.ask(name, 0.001 * cost_of[name], weight=weight, cost=cost_of[name])
    while all(party.waiting for party in model.gate._parties.values()):
        model.step(math.inf)
        had = [model.spent[name] / weight for name, weight in tenants.items()]
        slack = 2 * (concurrency + 1) * max(cost_of[name] / weight for name, weight in tenants.items())
        assert max(had) - min(had) <= slack
    assert sum(model.spent.values())


def test_weight_decides_where_all_places_are_taken() -> None:
    """Three to one by weight is three to one in tokens."""
    model = Model(concurrency=8)
    for _ in range(200):
        model.ask("big", 0.05, weight=3.0)
        model.ask("small", 0.05, weight=1.0)
    model.run(1.0)
    assert model.spent["big"] == pytest.approx(3 * model.spent["small"], rel=0.1)


# the gate


def test_an_idle_server_queues_nothing() -> None:
    """One tenant alone has all places; the first request beyond them waits."""
    model = Model(concurrency=4)
    for _ in range(4):
        number, _ = model.ask("t", 1.0)
        assert model.waited[number] == 0
    model.ask("t", 1.0)
    assert (model.gate.in_flight, model.gate.waiting) == (4, 1)


def test_a_flood_leaves_a_newcomer_its_share() -> None:
    """While both are active, a newcomer never waits for the flood's long answers; with fairness off it does."""

    def longest_wait(*, fair: bool) -> float:
        model = Model(concurrency=8, fair=fair)
        model.ask("calm", 0.1)
        model.run(0.2)
        for _ in range(200):
            model.ask("flood", 30.0)
        waits = []
        for _ in range(20):
            number, _ = model.ask("calm", 0.1)
            model.run(0.4)
            waits.append(model.waited.get(number, math.inf))
        return max(waits)

    assert longest_wait(fair=True) == 0
    assert longest_wait(fair=False) > 8


def test_a_tenant_gets_all_places_again_when_others_fall_silent() -> None:
    """Ten seconds after the last request of another."""
    model = Model(concurrency=8)
    model.ask("other", 0.1)
    for _ in range(100):
        model.ask("t", 1.0)
    assert model.gate.in_flight == 1 + 4
    model.run(11.5)
    assert model.gate.in_flight == 8


def quiet_beside_floods(
    *, places: int, quiet: int, rate: float, floods: int, seconds: float
) -> tuple[list[float], Counter[str]]:
    """Quiet tenants ask for a second each, `rate` times a second by chance, while floods always have ten waiting.

    Returns how long each of the quiet requests waited, and the seconds of answers that every flood had.
    """
    model, chance = Model(concurrency=places), random.Random(4)
    due = [(model.clock.now + chance.expovariate(rate), f"q{number}") for number in range(quiet)]
    heapq.heapify(due)
    asked, settled, end = [], model.clock.now + 20, model.clock.now + seconds  # at first the floods are alone
    for flood in range(floods):
        for _ in range(places + 10):
            model.ask(f"f{flood}", 2.0)
    while model.clock.now < end:
        ended = model.step(due[0][0])
        if ended is not None and ended.tenant.startswith("f"):
            model.ask(ended.tenant, 2.0)
        elif ended is None and model.clock.now == due[0][0]:
            number, _ = model.ask(due[0][1], 1.0)
            if settled < model.clock.now < end - 20:
                asked.append(number)
            heapq.heapreplace(due, (model.clock.now + chance.expovariate(rate), due[0][1]))
    waited = sorted(model.waited.get(number, math.inf) for number in asked)
    return waited, Counter({name: model.spent[name] // 100 * 2 for name in model.spent if name.startswith("f")})


@pytest.mark.parametrize(
    ("places", "quiet", "rate", "floods"), [(8, 3, 0.17, 1), (64, 100, 0.1, 1), (64, 100, 0.1, 2), (64, 1_000, 0.01, 3)]
)
def test_floods_have_what_quiet_tenants_leave(places: int, quiet: int, rate: float, floods: int) -> None:
    """However many those are; in equal parts; and hardly ever does one of the quiet wait."""
    waited, had = quiet_beside_floods(places=places, quiet=quiet, rate=rate, floods=floods, seconds=200)
    assert sum(waited) / len(waited) < 0.02  # seconds, of an answer's 1 and a flood's 2
    assert sum(wait > 0 for wait in waited) <= 0.04 * len(waited)
    left = places - quiet * rate
    assert sum(had.values()) > 0.45 * left * 200  # a share of all who are active would be 0.04 of it, with 100 of them
    assert max(had.values()) < 1.1 * min(had.values())


def test_a_request_that_stops_waiting_leaves_no_trace() -> None:
    """Its place in line, its tenant's share and its adapter's claim are free again."""
    model = Model(concurrency=1, slots=1)
    model.ask("a", 1.0, adapter=key(1, "a"))
    _, turn = model.ask("b", 1.0, adapter=key(2, "b"))
    assert (model.gate.waiting, model.open_set and model.open_set.waiting) == (1, 1)
    model.gate.cancel(turn)
    assert (model.gate.waiting, model.open_set and model.open_set.waiting) == (0, 0)
    assert turn.account is not None
    assert turn.account.requests == 0
    model.run(2.0)
    assert model.gate.load == 0
    number, _ = model.ask("a", 1.0, adapter=key(1, "a"))
    assert model.waited[number] == 0


def test_the_queue_is_bounded_for_a_tenant_and_for_all() -> None:
    """One tenant's full queue leaves room for others'."""
    model = Model(concurrency=1, tenant_queue=2, queue=3)
    for _ in range(3):
        model.ask("t", 1.0)
    with pytest.raises(QueueFull) as full:
        model.ask("t", 1.0)
    assert full.value.of_tenant
    model.ask("u", 1.0)
    with pytest.raises(QueueFull) as full:
        model.ask("v", 1.0)
    assert not full.value.of_tenant
    assert model.gate.load == 4


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.floats(0.01, 3), st.booleans()),
        min_size=1,
        max_size=120,
    )
)
def test_whatever_comes_every_request_is_served_and_nothing_stays(
    asks: list[tuple[str, int, float, bool]],
) -> None:
    """Never more in flight than places, never more adapters than slots; at the end all is as in the beginning."""
    model = Model(concurrency=5, slots=3, quantum_s=0.5)
    numbers = []
    for tenant, adapter, runs_s, gives_up in asks:
        number, turn = model.ask(tenant, runs_s, adapter=key(adapter, tenant) if adapter else None)
        assert model.gate.in_flight <= 5
        if gives_up and not turn.started:
            model.gate.cancel(turn)
        else:
            numbers.append(number)
        model.run(0.05)
    model.run(len(asks) * 10)
    assert set(numbers) <= set(model.waited)
    assert model.gate.load == 0
    assert model.most_open <= 3
    assert not model.gate._ready
    assert not model.gate._parked
    assert model.gate._flooding == 0
    assert model.gate._flooding_weights == pytest.approx(0)
    assert not any(party.floods for party in model.gate._parties.values())
    assert model.open_set is not None
    assert model.open_set.waiting == model.open_set._closing == 0


# the open set


def busy_four(model: Model, *, runs_s: float, callers: int, until: float) -> None:
    """Four adapters, each with so many callers who ask again as soon as they are answered."""
    again: dict[int, Key] = {}
    for number in range(4):
        for caller in range(callers):
            length = runs_s * (0.25 + 0.75 * caller / callers)
            _, turn = model.ask(f"t{number}", length, adapter=key(number))
            again[id(turn)] = key(number)
    lengths = iter(range(10**9))
    while model.clock.now < until:
        ended = model.step(until)
        if ended is not None and ended.key in {key(number) for number in range(4)}:
            length = runs_s * (0.25 + 0.75 * (next(lengths) % 7) / 7)
            model.ask(ended.tenant, length, adapter=ended.key)


def test_a_cold_fifth_adapter_waits_no_longer_than_the_formula() -> None:
    """Beside four kept busy: ceil(1 / 4) * (Q + D), where the engine alone would let it wait for ever."""
    quantum_s, longest_s = 1.0, 2.0
    model = Model(concurrency=64, slots=4, quantum_s=quantum_s)
    busy_four(model, runs_s=longest_s, callers=8, until=model.clock.now + 5)
    number, _ = model.ask("t9", 0.5, adapter=key(9))
    assert number not in model.waited
    busy_four(model, runs_s=longest_s, callers=0, until=model.clock.now + 5)
    assert model.waited[number] <= quantum_s + longest_s


def test_a_long_answer_does_not_hold_up_the_line() -> None:
    """Where an adapter closes and does not drain, another, however busy, closes a quantum later."""
    model = Model(concurrency=64, slots=2, quantum_s=1.0)
    model.ask("a", 60.0, adapter=key(1, "a"), cost=10)
    model.ask("b", 0.5, adapter=key(2, "b"), cost=1_000)
    number, _ = model.ask("c", 0.1, adapter=key(3, "c"))
    for _ in range(20):
        model.run(0.25)
        model.ask("b", 0.5, adapter=key(2, "b"), cost=1_000)
    assert 2.0 <= model.waited[number] <= 2.5


def test_a_long_answer_does_not_hold_up_the_second_in_line() -> None:
    """Two close for two that wait; one drains, the other does not: who came in by it closes a quantum later."""
    model = Model(concurrency=64, slots=2, quantum_s=1.0)
    model.ask("a", 60.0, adapter=key(1, "a"))
    model.ask("b", 1.5, adapter=key(2, "b"))
    model.ask("x", 0.5, adapter=key(3, "x"))
    number, _ = model.ask("y", 0.1, adapter=key(4, "y"))
    for _ in range(40):
        model.run(0.25)
        model.ask("x", 0.5, adapter=key(3, "x"), cost=1_000)
    assert 2.5 <= model.waited[number] <= 3.5


def test_a_place_left_to_another_gateway_closes_nothing_later() -> None:
    """It drained long ago: whoever waits next has one adapter closed, not all of them."""
    model = Model(concurrency=64, slots=4, quantum_s=1.0)
    assert model.open_set is not None
    model.ask("t0", 2.5, adapter=key(0))
    for number in range(1, 4):
        model.ask(f"t{number}", 600.0, adapter=key(number), cost=1_000)
    model.run(2.0)
    model.open_set.share(4, 1)
    model.gate.rotate()
    model.run(100.0)
    assert len(model.open_set) == model.open_set.limit == 3
    model.ask("t9", 1.0, adapter=key(9))
    model.run(0.1)
    assert sum(model.open_set.admits(key(number)) for number in range(1, 4)) == 2


def test_the_adapter_with_the_least_work_left_closes() -> None:
    """It drains soonest, and the engine loses least by it."""
    model = Model(concurrency=64, slots=2, quantum_s=1.0)
    model.ask("a", 9.0, adapter=key(1, "a"), cost=1_000)
    model.ask("b", 9.0, adapter=key(2, "b"), cost=10)
    model.ask("c", 1.0, adapter=key(3, "c"))
    model.run(1.1)
    assert model.open_set is not None
    assert model.open_set.admits(key(1, "a"))
    assert not model.open_set.admits(key(2, "b"))


def test_a_busy_adapter_keeps_its_place_for_a_quantum() -> None:
    """Each turn costs a drain: adapters do not change places with every request."""
    model = Model(concurrency=64, slots=1, quantum_s=2.0)
    model.ask("a", 0.5, adapter=key(1, "a"))
    number, _ = model.ask("b", 0.5, adapter=key(2, "b"))
    for _ in range(20):
        model.run(0.25)
        model.ask("a", 0.5, adapter=key(1, "a"))
    assert 2.0 <= model.waited[number] <= 2.5


def test_an_idle_adapter_gives_way_at_once() -> None:
    """A place is kept for nobody who has nothing to do."""
    model = Model(slots=1)
    model.ask("a", 0.1, adapter=key(1, "a"))
    model.run(0.2)
    number, _ = model.ask("b", 0.1, adapter=key(2, "b"))
    assert model.waited[number] == 0


def test_the_adapter_gives_way_that_was_unused_longest() -> None:
    """Of those with nothing to do; one whose request still runs stays, however long ago it came."""
    model = Model(slots=3)
    for number, runs_s in ((1, 9.0), (2, 0.1), (3, 0.2)):
        model.ask(f"t{number}", runs_s, adapter=key(number))
    model.run(0.3)
    model.ask("t2", 0.1, adapter=key(2))
    model.run(0.2)
    assert model.open_set is not None
    for newcomer, left in ((4, [1, 2, 4]), (5, [1, 4, 5])):
        model.ask(f"t{newcomer}", 9.0, adapter=key(newcomer))
        assert sorted(model.open_set.keys()) == [key(number) for number in left]
    assert not model.open_set.has_place(key(6))


def test_the_base_model_never_waits_for_an_adapters_place() -> None:
    """It has one of its own."""
    model = Model(slots=1)
    model.ask("a", 10.0, adapter=key(1, "a"))
    number, _ = model.ask("b", 0.1)
    assert model.waited[number] == 0


def test_the_line_goes_round_the_tenants() -> None:
    """A tenant with twenty cold adapters in line makes another wait for one of them."""
    model = Model(concurrency=64, slots=1, quantum_s=0.5)
    model.ask("x", 1.0, adapter=key(0, "x"))
    for number in range(20):
        model.ask("many", 1.0, adapter=key(number, "many"))
    number, _ = model.ask("one", 1.0, adapter=key(1, "one"))
    model.run(5.0)
    assert model.waited[number] <= 3.0


def test_a_closing_adapter_opens_again_when_nobody_is_left_in_line() -> None:
    """Its place was for somebody who has gone."""
    model = Model(slots=1, quantum_s=0.5)
    model.ask("a", 5.0, adapter=key(1, "a"))
    _, turn = model.ask("b", 1.0, adapter=key(2, "b"))
    model.run(1.0)
    assert model.open_set is not None
    assert not model.open_set.admits(key(1, "a"))
    model.gate.cancel(turn)
    assert model.open_set.admits(key(1, "a"))


@settings(max_examples=60)
@given(
    slots=st.integers(1, 4),
    adapters=st.integers(2, 10),
    quantum_s=st.sampled_from([0.1, 0.5, 1.0]),
    lengths=st.lists(st.floats(0.05, 2.0), min_size=1, max_size=10),
)
def test_no_adapter_starves(slots: int, adapters: int, quantum_s: float, lengths: list[float]) -> None:
    """With all of them always busy, each is served within its bound, again and again."""
    model = Model(concurrency=10_000, slots=slots, quantum_s=quantum_s)
    longest_s = max(lengths)
    rounds = math.ceil(adapters / slots)
    bound_s = rounds * (quantum_s + longest_s) + 0.01
    asked_at: dict[Key, float] = {}
    worst_s = 0.0
    position = iter(range(10**9))
    for number in range(adapters):
        asked_at[key(number)] = model.clock.now
        model.ask(f"t{number}", lengths[number % len(lengths)], adapter=key(number))
    until = model.clock.now + 4 * bound_s
    while model.clock.now < until:
        ended = model.step(until)
        if ended is not None and ended.key is not None:
            model.ask(ended.tenant, lengths[next(position) % len(lengths)], adapter=ended.key)
        worst_s = max([worst_s, *model.waited.values()])
    assert set(model.started) == {key(number) for number in range(adapters)}
    assert worst_s <= bound_s
    assert model.most_open <= slots


def test_gateways_on_one_replica_share_its_slots() -> None:
    """From all slots each to half of them within two reports; alone again, back to all."""
    here, there = (OpenSet(4, 1.0, Clock()) for _ in range(2))
    for _ in range(2):
        limits = here.limit, there.limit
        here.share(4, limits[1])
        there.share(4, limits[0])
    assert (here.limit, there.limit) == (2, 2)
    for _ in range(2):
        here.share(4, 0)
    assert here.limit == 4
    here.share(4, 9)
    for _ in range(9):
        here.share(4, 9)
    assert here.limit == 1


# loads


def test_loads_are_bounded_by_the_plan() -> None:
    """As many as the plan says in a minute, then one whenever one is due."""
    clock = Clock()
    allowance = LoadAllowance(clock)
    assert [allowance.take(TenantId("t"), 3) for _ in range(3)] == [0, 0, 0]
    assert allowance.take(TenantId("t"), 3) == pytest.approx(20)
    assert allowance.take(TenantId("other"), 3) == 0
    clock.now += 20.1
    assert allowance.take(TenantId("t"), 3) == 0
    assert allowance.take(TenantId("t"), 3) > 0
