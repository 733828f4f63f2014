"""When a failing replica is left alone, and how often a request may go out twice."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fairness import VirtualTokenCounters
from gateway.replicas.breaker import Breaker, RetryBudget
from gateway.replicas.client import ReplicaClient
from gateway.replicas.replica import TRANSITIONS, Replica, ReplicaOptions, ReplicaState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_five_failures_in_a_row_trip() -> None:
    """A success in between begins the count anew."""
    breaker = Breaker(Clock())
    assert [breaker.failed() for _ in range(4)] == [False] * 4
    breaker.succeeded()
    assert [breaker.failed() for _ in range(5)] == [False] * 4 + [True]


def test_half_of_twenty_trips_though_never_five_in_a_row() -> None:
    """A replica that fails on every other request is no good either."""
    breaker = Breaker(Clock())
    tripped = False
    for _ in range(10):
        breaker.succeeded()
        tripped = breaker.failed()
    assert tripped


def test_failures_are_forgotten_after_ten_seconds() -> None:
    """Only the last ones say how a replica is now."""
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(12):
        breaker.succeeded()
        clock.now += 5
        assert not breaker.failed()


def test_one_tenants_failures_alone_never_trip() -> None:
    """However many they are, and however quiet all others; nor do they end or prolong a trial."""
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(100):
        assert not breaker.failed("a")
        clock.now += 0.2
    breaker.trip()
    breaker.try_again()
    for _ in range(3):
        assert not breaker.failed("a")
        breaker.succeeded()
    assert not breaker.on_trial
    assert not any(breaker.failed("a") for _ in range(100))


def test_two_tenants_failures_trip() -> None:
    """From the second one on each failure counts, of whichever; for ten seconds."""
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(10):
        breaker.failed("a")
    assert [breaker.failed(tenant) for tenant in "baaab"] == [False] * 4 + [True]
    clock.now += 10
    assert not any(breaker.failed("a") for _ in range(100))


def test_what_another_replica_answers_trips_whoever_asked() -> None:
    """It is no fault of the request's; where several tenants fail it has been counted already."""
    breaker = Breaker(Clock())
    for _ in range(4):
        assert not breaker.failed("a")
        assert not breaker.answered_elsewhere()
    assert not breaker.failed("a")
    assert breaker.answered_elsewhere()
    several = Breaker(Clock())
    several.failed("a")
    for _ in range(4):
        assert not several.failed("b")
        assert not several.answered_elsewhere()
    assert several.failed("b")


def test_a_trial_ends_with_another_tenants_failure() -> None:
    """Failures from before it tell nothing of it."""
    breaker = Breaker(Clock())
    for tenant in "ababab":
        breaker.failed(tenant)
    breaker.trip()
    breaker.try_again()
    assert [breaker.failed(tenant) for tenant in "aab"] == [False, False, True]


def test_a_tripped_replica_is_on_trial_after_its_rest() -> None:
    """Three good answers end the trial, one bad one sends it back for twice as long, four seconds at most."""
    clock = Clock()
    breaker = Breaker(clock)
    breaker.trip()
    for rest_s in (1, 2, 4, 4):
        clock.now += rest_s - 0.1
        assert not breaker.has_rested()
        clock.now += 0.2
        assert breaker.has_rested()
        breaker.try_again()
        assert breaker.on_trial
        assert breaker.failed()
        breaker.trip()
    clock.now += 5
    breaker.try_again()
    for _ in range(3):
        breaker.succeeded()
    assert not breaker.on_trial


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 2)), min_size=1, max_size=60))
def test_second_tries_are_a_tenth_of_the_first(waves: list[tuple[int, float]]) -> None:
    """Where every request fails: at most 1.1 times the requests, or three more where they are few."""
    clock = Clock()
    budget = RetryBudget(clock)
    recent: list[tuple[float, int, int]] = []
    for requests, pause_s in waves:
        retries = 0
        for _ in range(requests):
            budget.request()
            retries += budget.take()
        recent.append((clock.now, requests, retries))
        clock.now += pause_s
        window = [wave for wave in recent if int(wave[0]) > int(recent[-1][0]) - 10]
        firsts, seconds = (sum(wave[place] for wave in window) for place in (1, 2))
        assert seconds <= max(3, 0.1 * firsts) or firsts == 0 or seconds <= 3 + 0.1 * sum(w[1] for w in recent)


@pytest.mark.parametrize("state", ReplicaState)
def test_every_state_can_be_left_and_reached(state: ReplicaState) -> None:
    """The table has no dead end, and a replica that goes away is unreachable from everywhere."""
    assert TRANSITIONS[state]
    assert any(state in reachable for reachable in TRANSITIONS.values())
    assert state is ReplicaState.UNREACHABLE or ReplicaState.UNREACHABLE in TRANSITIONS[state]


LEGAL = {
    "unreachable": ("restoring", "mismatched"),
    "restoring": ("ready", "draining", "unreachable"),
    "ready": ("tripped", "draining", "unreachable"),
    "tripped": ("ready", "draining", "unreachable"),
    "draining": ("ready", "unreachable"),
    "mismatched": ("unreachable",),
}
WAYS: dict[str, tuple[str, ...]] = {
    "unreachable": (),
    "restoring": ("restoring",),
    "ready": ("restoring", "ready"),
    "tripped": ("restoring", "ready", "tripped"),
    "draining": ("restoring", "ready", "draining"),
    "mismatched": ("mismatched",),
}
"""How a new replica comes to each state."""


@pytest.mark.parametrize("after", [state.value for state in ReplicaState])
@pytest.mark.parametrize("before", WAYS)
async def test_a_replica_takes_legal_steps_alone(before: str, after: str) -> None:
    """Each of them, and tells of it once; any other is refused, and nothing has changed. To stay is no step."""
    told: list[str] = []
    replica = Replica(
        ReplicaClient("http://127.0.0.1:1", "token"),
        fingerprint="f",
        options=ReplicaOptions(),
        counters=VirtualTokenCounters(time.time),
        on_change=lambda: told.append(replica.state.value),
        on_loaded=lambda *_: None,
    )
    try:
        for state in WAYS[before]:
            replica._become(ReplicaState(state))
        assert replica.state.value == before
        told.clear()
        if after in LEGAL[before]:
            replica._become(ReplicaState(after))
            assert (replica.state.value, told) == (after, [after])
        elif after == before:
            replica._become(ReplicaState(after))
            assert (replica.state.value, told) == (before, [])
        else:
            with pytest.raises(AssertionError, match="cannot go from"):
                replica._become(ReplicaState(after))
            assert (replica.state.value, told) == (before, [])
        assert replica.takes_requests == (replica.state is ReplicaState.READY)
    finally:
        replica.client.close()
