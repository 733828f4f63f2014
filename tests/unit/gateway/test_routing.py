"""Which replica an adapter's request goes to, and on how many the adapter lives."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import BOUND, Router, rendezvous


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Host:
    """A replica that holds every adapter, but for those that a test takes away."""

    id: str
    load: int = 0
    concurrency: int = 256
    slots: int = 4
    takes_requests: bool = True
    lacks: set[str] = field(default_factory=set)
    full_for: set[str] = field(default_factory=set)

    def holds(self, adapter: str) -> bool:
        return adapter not in self.lacks

    def has_place(self, adapter: str) -> bool:
        return adapter not in self.full_for


class Asked(Host):
    """One whose slots are all taken, and that counts who asks for them."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "slots":
            self.looks += 1
            return 0
        return super().__getattribute__(name)


def cluster(count: int, *, spread_at: float = 16) -> tuple[Router[str, Host], list[Host], Clock]:
    clock = Clock()
    router: Router[str, Host] = Router(clock, spread_at=spread_at)
    hosts = [Host(f"r{number}") for number in range(count)]
    router.set_hosts(hosts)
    return router, hosts, clock


def order(router: Router[str, Host], adapter: str) -> list[Host]:
    return list(router.spread(adapter).order)


def keep_in_flight(router: Router[str, Host], clock: Clock, adapter: str, requests: int, seconds: float) -> list[Host]:
    """Hold so many requests in flight, one ending and one starting every 50 ms; returns the homes that were added."""
    added = []
    while router.spread(adapter).in_flight < requests:
        added.append(router.started(adapter))
    for _ in range(int(seconds / 0.05)):
        clock.now += 0.05
        router.ended(adapter)
        added.append(router.started(adapter))
    return [host for host in added if host is not None]


@given(st.sets(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=2, max_size=12), st.text(max_size=20))
def test_when_a_replica_leaves_only_its_own_adapters_move(replicas: set[str], adapter: str) -> None:
    """The order of those that stay is what it was."""
    before = rendezvous(replicas, adapter)
    gone = sorted(replicas)[0]
    assert rendezvous(replicas - {gone}, adapter) == [replica for replica in before if replica != gone]


def test_adapters_are_dealt_evenly() -> None:
    """Each of four replicas is first for a quarter of them, within a fifth."""
    router, _, _ = cluster(4)
    first = Counter(order(router, f"adapter-{number}")[0].id for number in range(2_000))
    assert all(count == pytest.approx(500, rel=0.2) for count in first.values())


def test_an_adapter_stays_with_its_replica() -> None:
    """However its load and that of others changes below the bound."""
    router, hosts, _ = cluster(4)
    home = order(router, "a")[0]
    for load in range(8):
        home.load = load
        assert router.choose("a") is home
    for host in hosts:
        host.load = 100
    assert router.choose("a") is home


def test_a_replica_that_is_not_ready_or_was_tried_is_left_out() -> None:
    """The next in order takes over; with none left the caller is told."""
    router, hosts, _ = cluster(3)
    first, second, third = order(router, "a")
    first.takes_requests = False
    assert router.choose("a") is second
    assert router.choose("a", tried=[second]) is third
    assert router.choose("a", tried=[second, third]) is None
    assert router.least_loaded([second]) is third
    for host in hosts:
        host.takes_requests = False
    assert router.choose("a") is None
    assert router.least_loaded() is None


def test_a_replica_above_the_bound_sends_an_adapter_on() -> None:
    """1.25 times the mean: the next in order that is below it."""
    router, hosts, _ = cluster(4)
    first, second, *_ = order(router, "a")
    for host in hosts:
        host.load = 40
    first.load = 60
    assert first.load > BOUND * 45
    assert router.choose("a") is second
    second.lacks = {"a"}
    assert router.choose("a") is order(router, "a")[2]
    for host in hosts:
        host.lacks = {"a"} if host is not first else set()
    assert router.choose("a") is first, "a load costs everybody more than a busy home"
    first.load = first.concurrency
    assert router.choose("a") is second


def test_a_place_for_the_adapter_counts_more_than_its_home() -> None:
    """Where all slots at home are busy, a replica with a free one answers at once."""
    router, _, _ = cluster(3)
    first, second, third = order(router, "a")
    first.full_for = {"a"}
    assert router.choose("a") is second
    second.lacks = {"a"}
    assert router.choose("a") is third, "one that has it loaded is asked before one that would have to load it"


def test_a_replica_where_the_load_failed_is_asked_last_for_a_while() -> None:
    """For half a minute; if no other takes requests it is asked all the same."""
    router, _, clock = cluster(2)
    first, second = order(router, "a")
    router.avoid("a", first)
    assert router.choose("a") is second
    second.takes_requests = False
    assert router.choose("a") is first
    second.takes_requests = True
    clock.now += 31
    assert router.choose("a") is first


def test_homes_grow_with_load_and_shrink_when_it_has_gone_for_long() -> None:
    """One more above 16 in flight on each; one less only after half a minute below half of that."""
    router, hosts, clock = cluster(4)
    first, second, *_ = order(router, "a")
    assert keep_in_flight(router, clock, "a", 12, 10) == []
    assert keep_in_flight(router, clock, "a", 24, 10) == [second]
    assert router.spread("a").k == 2
    first.load, second.load = 12, 11
    for host in hosts:
        host.lacks = set() if host in (first, second) else {"a"}
    assert router.choose("a") is second
    while router.spread("a").in_flight > 2:
        router.ended("a")
    keep_in_flight(router, clock, "a", 2, 20)
    assert router.spread("a").k == 2
    keep_in_flight(router, clock, "a", 2, 20)
    assert router.spread("a").k == 1
    first.load = second.load = 0
    assert router.choose("a") is first


def test_a_load_between_the_two_thresholds_changes_nothing() -> None:
    """Hysteresis: what made it grow need not stay as high, and comes and goes without a load each time."""
    router, _, clock = cluster(4)
    keep_in_flight(router, clock, "a", 24, 10)
    while router.spread("a").in_flight > 12:
        router.ended("a")
    for _ in range(5):
        assert keep_in_flight(router, clock, "a", 12, 30) == []
        assert router.spread("a").k == 2


def test_a_moment_of_load_spreads_nothing() -> None:
    """The average over two seconds counts."""
    router, _, clock = cluster(4)
    for _ in range(100):
        assert router.started("a") is None
    clock.now += 0.2
    for _ in range(100):
        router.ended("a")
    assert keep_in_flight(router, clock, "a", 1, 10) == []


def test_growth_never_takes_a_hotter_adapters_slot() -> None:
    """A replica whose slots are all used by hotter adapters is passed over; with no other, the adapter stays."""
    router, hosts, clock = cluster(3)
    for host in hosts:
        host.slots = 1
    first, second, third = order(router, "a")
    hot = next(f"hot-{number}" for number in range(100) if order(router, f"hot-{number}")[0] is second)
    keep_in_flight(router, clock, hot, 15, 10)
    assert keep_in_flight(router, clock, "a", 24, 5) == [third]
    assert router.spread("a").homes() == [first, third]
    other = next(f"hot-{number}" for number in range(100) if order(router, f"hot-{number}")[0] is third)
    keep_in_flight(router, clock, other, 15, 5)
    keep_in_flight(router, clock, hot, 15, 5)
    b = next(f"b-{number}" for number in range(100) if order(router, f"b-{number}")[0] is first)
    assert keep_in_flight(router, clock, b, 24, 3) == []


def test_an_adapter_that_has_gone_quiet_is_hotter_than_none() -> None:
    """What filled a replica's slots an hour ago keeps no other adapter from it."""
    router, hosts, clock = cluster(2)
    for host in hosts:
        host.slots = 1
    second = order(router, "a")[1]
    hot = next(f"hot-{number}" for number in range(100) if order(router, f"hot-{number}")[0] is second)
    keep_in_flight(router, clock, hot, 40, 10)
    while router.spread(hot).in_flight:
        router.ended(hot)
    clock.now += 3_600
    assert keep_in_flight(router, clock, "a", 24, 10) == [second]


def test_a_refused_home_is_looked_for_once_a_second() -> None:
    """A look goes through all adapters in use, so no request of a busy one may cost it."""
    router, _, clock = cluster(2)
    hosts = [Asked(f"r{number}") for number in range(2)]
    router.set_hosts(hosts)
    keep_in_flight(router, clock, "a", 40, 10)
    assert 8 <= sum(host.looks for host in hosts) / 2 <= 11  # each look asks twice


def test_quiet_adapters_are_not_gone_through() -> None:
    """Neither each second nor for a home."""
    router, _, clock = cluster(2)
    for number in range(1_000):
        router.started(f"a{number}")
        router.ended(f"a{number}")
    router.started("busy")
    for _ in range(20):
        clock.now += 1
        router.review()
    assert list(router._warm) == ["busy"]


def test_quiet_adapters_lose_their_homes_without_a_request() -> None:
    """`review` is called every second."""
    router, _, clock = cluster(2)
    keep_in_flight(router, clock, "a", 24, 10)
    while router.spread("a").in_flight:
        router.ended("a")
    for _ in range(60):
        clock.now += 1
        router.review()
    assert router.spread("a").k == 1


def test_adapters_that_are_not_used_are_forgotten() -> None:
    """A hundred thousand adapters must not stay in memory."""
    router, _, _ = cluster(2)
    for number in range(20_000):
        router.started(f"a{number}")
        router.ended(f"a{number}")
    assert len(router._spreads) <= 8_192
