"""The limits that one gateway counts by itself, and how they are told."""

import asyncio
import gc
import math
import tracemalloc
from collections.abc import Coroutine
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.ids import TenantId
from gateway.errors import QuotaSpent, RateLimited, RequestExceedsLimit, TokenRateLimited, answer
from gateway.limits import UNLIMITED, Admission
from gateway.limits.memory import IDLE_S, LEARN_AGAIN_S, MemoryLimits
from gateway.limits.terms import month_of, spelled
from gateway.plans import Plan

TENANT = TenantId("tnt_a")
NOVEMBER = 1_793_491_200  # 2026-11-01 00:00 UTC
DECEMBER = 1_796_083_200
FULL = Plan(requests_per_minute=6, tokens_per_minute=600, concurrent_requests=3, tokens_per_month=5_000)
T = TypeVar("T")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must not suspend."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise AssertionError("it waited for something")


@dataclass
class Database:
    """What the ledger would say of a month, and whether it says anything."""

    used: int = 0
    is_away: bool = False
    asked: int = 0
    answers: asyncio.Event | None = None

    async def __call__(self, tenant_id: TenantId, begin: int) -> int:
        self.asked += 1
        if self.answers is not None:
            await self.answers.wait()
        if self.is_away:
            raise OSError("away")
        return self.used


@dataclass
class World:
    """Limits whose clocks stand still until they are moved."""

    database: Database = field(default_factory=Database)
    now: float = 1_000.0
    wall: float = NOVEMBER + 1_000.0
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        self.limits = MemoryLimits(
            self.database, timeout_s=self.timeout_s, clock=lambda: self.now, wall_clock=lambda: self.wall
        )

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def admit(self, tokens: int = 0, plan: Plan = FULL, tenant: str = TENANT) -> Admission:
        return at_once(self.limits.admit(TenantId(tenant), plan, tokens))

    async def admit_first(self, tokens: int = 0, plan: Plan = FULL) -> Admission:
        return await self.limits.admit(TENANT, plan, tokens)


class Model:
    """The same limits in exact arithmetic, the slow way."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests = Fraction(plan.requests_per_minute or 0)
        self.tokens = Fraction(plan.tokens_per_minute or 0)
        self.running: list[int] = []
        self.settled = 0

    def move(self, seconds: Fraction) -> None:
        for name, limit in (("requests", self.plan.requests_per_minute), ("tokens", self.plan.tokens_per_minute)):
            if limit is not None:
                setattr(self, name, min(Fraction(limit), getattr(self, name) + seconds * limit / 60))

    def admit(self, tokens: int) -> bool:
        plan = self.plan
        fits = (
            (plan.requests_per_minute is None or self.requests >= 1)
            and (plan.tokens_per_minute is None or self.tokens >= tokens)
            and (plan.concurrent_requests is None or len(self.running) < plan.concurrent_requests)
            and (plan.tokens_per_month is None or self.settled + sum(self.running) + tokens <= plan.tokens_per_month)
        )
        if fits:
            self.requests -= 1
            self.tokens -= tokens
            self.running.append(tokens)
        return fits

    def settle(self, index: int, used: int) -> None:
        reserved = self.running.pop(index)
        limit = self.plan.tokens_per_minute
        if limit is not None:
            self.tokens = min(Fraction(limit), self.tokens + reserved - used)
        self.settled += used


plans = st.builds(
    Plan,
    requests_per_minute=st.none() | st.integers(1, 40),
    tokens_per_minute=st.none() | st.integers(20, 400),
    concurrent_requests=st.none() | st.integers(1, 4),
    tokens_per_month=st.none() | st.integers(100, 2_000),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("move"), st.integers(1, 400), st.just(0)),  # eighths of a second
        st.tuples(st.just("admit"), st.integers(0, 120), st.just(0)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 200)),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(plan=plans, steps=steps)
def test_decisions_are_those_of_exact_buckets(plan: Plan, steps: list[tuple[str, int, int]]) -> None:
    """No request too many and none too few, whatever is admitted, settled below or above, and however late."""

    async def compare() -> None:
        world, model = World(), Model(plan)
        (await world.admit_first(0, Plan(tokens_per_month=1))).settle(0)  # so that the month is known
        running: list[Admission] = []
        for step, first, second in steps:
            if step == "move":
                world.move(first / 8)
                model.move(Fraction(first, 8))
            elif step == "settle" and running:
                index = first % len(running)
                running.pop(index).settle(second)
                model.settle(index, second)
            elif step == "admit":
                is_held = False
                try:
                    world.limits.hold_off(TENANT, plan, first)
                except RateLimited:
                    is_held = True
                try:
                    running.append(world.admit(first, plan))
                except RateLimited:
                    assert not model.admit(first)
                else:
                    assert not is_held
                    assert model.admit(first) or plan == Plan()

    asyncio.run(compare())


@settings(max_examples=100)
@given(limit=st.integers(1, 5_000), tokens=st.integers(1, 300), gaps=st.lists(st.integers(0, 5_000), max_size=60))
def test_the_time_told_is_the_time_it_takes(limit: int, tokens: int, gaps: list[int]) -> None:
    """A request that comes back after `retry-after-ms` is admitted, and one that comes 2 ms sooner is not."""
    world, plan = World(), Plan(tokens_per_minute=limit)
    for gap in gaps:
        world.move(gap / 1_000)
        wait_ms = refused_for(world, plan, tokens)
        if wait_ms is not None:
            world.move(max(0, wait_ms - 2) / 1_000)
            assert wait_ms < 2 or refused_for(world, plan, tokens) is not None
            world.move(min(2, wait_ms) / 1_000)
            assert refused_for(world, plan, tokens) is None


def refused_for(world: World, plan: Plan, tokens: int) -> int | None:
    """None where the request is admitted, or could never be; else what `retry-after-ms` says."""
    try:
        world.admit(tokens, plan)
    except TokenRateLimited as error:
        headers = dict(answer(error).headers)
        wait_ms = int(headers[b"retry-after-ms"])
        assert int(headers[b"retry-after"]) == max(1, math.ceil(wait_ms / 1_000))
        return wait_ms
    except RequestExceedsLimit:
        assert tokens > (plan.tokens_per_minute or 0)
    return None


async def test_a_known_tenant_never_waits() -> None:
    """Only a tenant's first request asks the database; the others do not suspend."""
    world = World()
    (await world.admit_first(10)).settle(5)
    for _ in range(3):
        world.admit(10).settle(5)
    assert world.database.asked == 1


def test_a_plan_without_limits_counts_nothing() -> None:
    """One shared admission, no headers, no state."""
    world = World()
    assert world.admit(10**9, Plan(weight=2.0, max_output_tokens=5)) is UNLIMITED
    assert len(world.limits) == 0


async def test_settling_twice_is_settling_once() -> None:
    """The second time neither a place nor tokens come back."""
    world, plan = World(), Plan(tokens_per_minute=100, concurrent_requests=1)
    first = world.admit(100, plan)
    first.settle(40)
    second = world.admit(60, plan)
    first.settle(0)
    first.settle(10)
    with pytest.raises(RateLimited):
        world.admit(0, plan)
    second.settle(60)
    with pytest.raises(TokenRateLimited):
        world.admit(1, plan)


def test_what_is_released_runs_no_longer_and_stays_reserved() -> None:
    """Its place is another's, once; its tokens come back when it is settled."""
    world, plan = World(), Plan(tokens_per_minute=100, concurrent_requests=1)
    first = world.admit(60, plan)
    first.release()
    first.release()
    with pytest.raises(TokenRateLimited):
        world.admit(41, plan)
    world.admit(40, plan)
    with pytest.raises(RateLimited):
        world.admit(0, plan)
    first.settle(10)
    first.release()
    with pytest.raises(RateLimited):
        world.admit(0, plan)
    world.admit(50, Plan(tokens_per_minute=100, concurrent_requests=2))


def test_what_is_over_the_reservation_is_owed_from_now_on() -> None:
    """A bucket that has filled up meanwhile does not forgive it."""
    world, plan = World(), Plan(tokens_per_minute=60)
    running = world.admit(10, plan)
    world.move(50)
    running.settle(90)
    world.move(19)
    with pytest.raises(TokenRateLimited):
        world.admit(0, plan)
    world.move(1)
    world.admit(0, plan)


def test_a_refused_request_takes_nothing() -> None:
    """All limits or none: one that is over the tokens does not cost a request."""
    world, plan = World(), Plan(requests_per_minute=1, tokens_per_minute=100)
    big = Plan(tokens_per_minute=100)
    world.admit(60, big)
    with pytest.raises(TokenRateLimited):
        world.admit(50, plan)
    world.admit(40, plan)
    with pytest.raises(RateLimited):
        world.admit(0, plan)


def refusal(world: World, plan: Plan, tokens: int) -> RateLimited:
    """What admission says; what is said before the request is read is the same."""
    with pytest.raises(RateLimited) as held:
        world.limits.hold_off(TENANT, plan, tokens)
    with pytest.raises(RateLimited) as refused:
        world.admit(tokens, plan)
    assert type(held.value) is type(refused.value)
    assert answer(held.value).body == answer(refused.value).body
    assert answer(held.value).headers == answer(refused.value).headers
    return held.value


def test_a_tenant_at_its_limit_is_told_before_its_request_is_read() -> None:
    """With the same answer, for requests, tokens and those at a time; nothing is reserved, and what flows in counts."""
    for plan, kind in (
        (Plan(requests_per_minute=2), RateLimited),
        (Plan(concurrent_requests=2), RateLimited),
        (Plan(tokens_per_minute=20), TokenRateLimited),
        (Plan(requests_per_minute=2, tokens_per_minute=20), TokenRateLimited),
    ):
        world = World()
        world.limits.hold_off(TENANT, plan, 10)
        admissions = [world.admit(10, plan), world.admit(10, plan)]
        assert type(refusal(world, plan, 15)) is kind
        world.move(31)
        admissions[0].settle(10)
        world.limits.hold_off(TENANT, plan, 10)
        world.admit(10, plan)


def test_what_takes_no_tokens_is_not_held_for_them() -> None:
    """A count passes where no token is left."""
    world, plan = World(), Plan(tokens_per_minute=20)
    world.admit(20, plan)
    world.limits.hold_off(TENANT, plan, 0)
    world.admit(0, plan)


async def test_a_spent_budget_is_told_before_a_request_is_read() -> None:
    """Until the month is over."""
    world, plan = World(), Plan(tokens_per_month=100)
    world.limits.hold_off(TENANT, plan, 1)
    await world.admit_first(100, plan)
    assert type(refusal(world, plan, 5)) is QuotaSpent
    world.wall = DECEMBER
    world.limits.hold_off(TENANT, plan, 5)


def test_a_request_above_the_whole_bucket_is_told_so() -> None:
    """A 400 without Retry-After: no client must try it again."""
    world = World()
    with pytest.raises(RequestExceedsLimit) as caught:
        world.admit(601, Plan(tokens_per_minute=600))
    told = answer(caught.value)
    assert told.status == 400
    assert b"request_exceeds_limit" in told.body
    assert b"retry-after" not in dict(told.headers)
    world.admit(600, Plan(tokens_per_minute=600))


def test_refusals_are_spelled_as_openai_does() -> None:
    """429, its types and codes, Retry-After in whole seconds, the state of both buckets."""
    world, plan = World(), Plan(requests_per_minute=60, tokens_per_minute=600, concurrent_requests=1)
    admitted = world.admit(600, plan)
    assert admitted.headers == (
        b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 59\r\nx-ratelimit-reset-requests: 1s\r\n"
        b"x-ratelimit-limit-tokens: 600\r\nx-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1m0s\r\n"
    )
    world.move(0.25)
    with pytest.raises(TokenRateLimited) as caught:
        world.admit(5, plan)
    told = answer(caught.value)
    headers = dict(told.headers)
    assert told.status == 429
    assert b'"type":"tokens"' in told.body
    assert b'"code":"rate_limit_exceeded"' in told.body
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (b"1", b"250")
    assert (headers[b"x-ratelimit-remaining-tokens"], headers[b"x-ratelimit-reset-requests"]) == (b"2", b"750ms")
    with pytest.raises(RateLimited) as refused:
        world.admit(0, plan)
    assert b"1 requests at a time" in answer(refused.value).body
    admitted.settle(0)
    for _ in range(59):
        world.admit(0, plan).settle(0)
    with pytest.raises(RateLimited) as refused:
        world.admit(0, plan)
    assert b'"type":"requests"' in answer(refused.value).body


def test_headers_tell_only_of_limits_that_exist() -> None:
    """A plan with requests alone says nothing of tokens, one with concurrency alone says nothing."""
    world = World()
    assert b"tokens" not in world.admit(5, Plan(requests_per_minute=5)).headers
    assert world.admit(5, Plan(concurrent_requests=5), "other").headers == b""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, b"0s"), (0.0004, b"1ms"), (0.12, b"120ms"), (1, b"1s"), (1.01, b"2s"), (59.9, b"1m0s"), (360, b"6m0s")],
)
def test_durations_are_spelled_as_openai_does(seconds: float, text: bytes) -> None:
    """Rounded up, so that whoever waits so long has waited long enough."""
    assert spelled(seconds) == text


async def test_a_spent_budget_is_no_matter_of_waiting() -> None:
    """`insufficient_quota`, without Retry-After, and OpenAI's client is told not to try again."""
    world = World(Database(used=4_990))
    (await world.admit_first(10)).settle(10)
    with pytest.raises(QuotaSpent) as caught:
        world.admit(1)
    told = answer(caught.value)
    assert told.status == 429
    assert b'"type":"insufficient_quota"' in told.body
    assert b'"code":"insufficient_quota"' in told.body
    assert b"retry-after" not in dict(told.headers)
    assert dict(told.headers)[b"x-should-retry"] == b"false"


async def test_the_budget_begins_anew_with_the_month() -> None:
    """At midnight UTC; what was running counts, when it ends, in the new month."""
    world = World(Database(used=4_900), wall=DECEMBER - 1.0)
    plan = Plan(tokens_per_month=5_000)
    over_midnight = await world.admit_first(100, plan)
    with pytest.raises(QuotaSpent):
        world.admit(1, plan)
    world.move(1)
    with pytest.raises(QuotaSpent):
        world.admit(4_901, plan)
    over_midnight.settle(300)
    world.admit(4_700, plan)
    with pytest.raises(QuotaSpent):
        world.admit(1, plan)
    assert world.database.asked == 1


async def test_first_requests_at_once_ask_the_database_once() -> None:
    """They wait for one answer, and it holds for all of them."""
    world = World(Database(used=4_950, answers=asyncio.Event()))
    assert world.database.answers is not None
    asking = [asyncio.create_task(world.admit_first(20)) for _ in range(3)]
    await asyncio.sleep(0)
    world.database.answers.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(result) for result in results].count(QuotaSpent) == 1
    assert world.database.asked == 1


async def test_a_database_that_is_away_stops_nobody() -> None:
    """The budget is not enforced until it answers; then what was used meanwhile counts once."""
    world = World(Database(used=4_000, is_away=True))
    plan = Plan(tokens_per_month=5_000)
    running = await world.admit_first(3_000, plan)
    world.admit(900, plan).settle(900)
    assert world.database.asked == 1
    world.move(LEARN_AGAIN_S)
    world.database.is_away, world.database.used = False, 4_900  # the ledger knows what has ended
    world.admit(0, plan).settle(0)
    while world.database.asked < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(QuotaSpent):
        world.admit(0 + 1, plan)
    running.settle(50)
    world.admit(50, plan)
    with pytest.raises(QuotaSpent):
        world.admit(1, plan)


async def test_a_database_that_does_not_answer_is_waited_for_once() -> None:
    """The first request waits for the deadline, the next do not wait."""
    world = World(Database(answers=asyncio.Event()), timeout_s=0.01)
    await world.admit_first(1)
    world.admit(1)
    await world.limits.close()


async def test_idle_tenants_are_forgotten() -> None:
    """After an hour, unless something of theirs is running."""
    world = World()
    world.admit(1, Plan(requests_per_minute=5), "idle").settle(1)
    world.admit(1, Plan(requests_per_minute=5), "busy")
    world.move(IDLE_S + 1)
    world.admit(1, Plan(requests_per_minute=5), "new").settle(1)
    world.limits.drop_idle([TenantId("idle"), TenantId("busy"), TenantId("new")])
    assert len(world.limits) == 2


def test_ten_thousand_tenants_are_small() -> None:
    """At most 10 MiB."""
    world, plan = World(), Plan(requests_per_minute=5, tokens_per_minute=500)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(10_000):
        world.admit(1, plan, f"tnt_{number:024x}").settle(1)
    mib = (tracemalloc.get_traced_memory()[0] - before) / (1 << 20)
    tracemalloc.stop()
    assert mib <= 10


def test_months_are_utc() -> None:
    """From the first second to the first of the next, over a year's end too."""
    assert month_of(DECEMBER - 1) == (NOVEMBER, DECEMBER)
    assert month_of(DECEMBER) == (DECEMBER, DECEMBER + 31 * 86_400)
