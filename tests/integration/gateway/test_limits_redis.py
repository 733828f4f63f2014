"""Limits of several gateways on one real Redis, which dies, freezes, forgets and comes back."""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from adapter_store.ids import TenantId
from gateway.errors import QuotaSpent, RateLimited, RequestExceedsLimit, TokenRateLimited
from gateway.limits import Admission, scripts
from gateway.limits.memory import MemoryLimits
from gateway.limits.redis import KNOWN_S, Call, RedisLimits
from gateway.limits.terms import month_of
from gateway.plans import Plan
from tests.servers import RedisServer, redis_server
from tests.waiting import until

TENANT = TenantId("tnt_a")
COUNTERS, LEASES = f"tailor:{{{TENANT}}}", f"tailor:{{{TENANT}}}:leases"
DEADLINE_S = 3.0  # where Redis hangs; where it does not, a busy machine must not make it seem so
ROOM = 1.01  # over-admission of at most 1 %


class Database:
    """What the ledger would say of the month."""

    def __init__(self, used: int = 0) -> None:
        self.used = used
        self.asked = 0
        self.is_away = False
        self.answers: asyncio.Event | None = None

    async def __call__(self, tenant_id: TenantId, begin: int) -> int:
        self.asked += 1
        used = self.used
        if self.answers is not None:
            await self.answers.wait()
        if self.is_away:
            raise OSError("away")
        return used


@pytest.fixture(scope="module")
def running_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
async def server(running_redis: RedisServer) -> RedisServer:
    """Running and empty."""
    async with client_of(running_redis) as client:
        await client.flushall()
    return running_redis


@asynccontextmanager
async def client_of(server: RedisServer) -> AsyncIterator[Redis]:
    client = Redis.from_url(server.url, decode_responses=True)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def gateway(
    server: RedisServer | str, database: Database | None = None, **options: Any
) -> AsyncIterator[RedisLimits]:
    """The limits of one gateway."""
    used = database or Database()
    given = {"timeout_s": 5.0, "probe_s": 0.1, **options}
    memory = MemoryLimits(used, timeout_s=5.0)
    url = server if isinstance(server, str) else server.url
    limits = RedisLimits(url, memory, used_this_month=used, **given)
    await limits.start()
    try:
        yield limits
    finally:
        await limits.close()


async def stored(client: Redis, name: str) -> float:
    value = await client.hget(COUNTERS, name)
    assert value is not None
    return float(value)


async def admitted(limits: RedisLimits, plan: Plan, tokens: int = 0, tenant: str = TENANT) -> Admission | None:
    try:
        return await limits.admit(TenantId(tenant), plan, tokens)
    except RateLimited:
        return None


async def settled(limits: RedisLimits) -> None:
    """Everything that was to be written is written."""
    await until(lambda: limits.unsettled == 0)


async def test_a_tenant_at_its_limit_is_told_without_redis(server: RedisServer) -> None:
    """By its last refusal, until time has made room; a new plan is asked for at once."""
    plan = Plan(requests_per_minute=30)
    async with gateway(server) as limits:
        limits.hold_off(TenantId(TENANT), plan, 1)
        for _ in range(30):
            assert await admitted(limits, plan)
        limits.hold_off(TenantId(TENANT), plan, 1)
        assert await admitted(limits, plan) is None
        with pytest.raises(RateLimited) as refused:
            limits.hold_off(TenantId(TENANT), plan, 1)
        assert refused.value.retry_after_s in (1, 2)

        def passes() -> bool:
            try:
                limits.hold_off(TenantId(TENANT), plan, 1)
            except RateLimited:
                return False
            return True

        assert not passes()
        await until(passes)
        assert await admitted(limits, plan)
        assert await admitted(limits, plan) is None
        limits.hold_off(TenantId(TENANT), Plan(requests_per_minute=60), 1)


def is_held(limits: RedisLimits, plan: Plan, tokens: int = 1) -> type[RateLimited] | None:
    """What a request is told before it is read."""
    try:
        limits.hold_off(TenantId(TENANT), plan, tokens)
    except RateLimited as error:
        return type(error)
    return None


async def test_a_tenant_without_tokens_is_told_without_redis(server: RedisServer) -> None:
    """Where none is left, with the same answer; a request that takes none passes, and so do some when they flow in."""
    plan = Plan(tokens_per_minute=600)
    async with gateway(server, known_s={**KNOWN_S, b"rate": 3_600.0}) as limits:
        first = await admitted(limits, plan, 600)
        assert first is not None
        first.settle(640)  # owes 40, which flow in within 4 s
        await settled(limits)
        with pytest.raises(TokenRateLimited) as refused:
            await limits.admit(TenantId(TENANT), plan, 100)
        with pytest.raises(TokenRateLimited) as held:
            limits.hold_off(TenantId(TENANT), plan, 100)
        assert dict(held.value.headers).keys() == dict(refused.value.headers).keys()
        assert 0 <= (refused.value.retry_after_s or 0) - (held.value.retry_after_s or 0) <= 1
        assert is_held(limits, plan) is TokenRateLimited
        await until(lambda: is_held(limits, plan) is None)
        assert await admitted(limits, plan, 1)
        assert await admitted(limits, plan, 600) is None
        assert is_held(limits, plan, 0) is None


async def test_a_tenant_with_a_spent_month_is_told_without_redis(server: RedisServer) -> None:
    """For a second; then Redis is asked again, for a request that has ended elsewhere may have left some."""
    plan = Plan(tokens_per_month=100)
    async with gateway(server) as limits, gateway(server) as other:
        held = await admitted(other, plan, 100)
        assert held is not None
        assert await admitted(limits, plan, 1) is None
        assert is_held(limits, plan) is QuotaSpent
        assert is_held(limits, plan, 0) is None
        assert await admitted(limits, plan, 1) is None
        held.settle(10)
        await settled(other)
        await until(lambda: is_held(limits, plan) is None)
        assert await admitted(limits, plan, 1)


async def test_a_tenant_with_all_it_may_run_is_told_without_redis(server: RedisServer) -> None:
    """For a fifth of a second, or until a request of this gateway has ended."""
    plan = Plan(concurrent_requests=2)
    async with gateway(server, known_s={**KNOWN_S, b"running": 3_600.0}) as limits, gateway(server) as other:
        mine, theirs = await admitted(limits, plan), await admitted(other, plan)
        assert mine is not None
        assert theirs is not None
        assert await admitted(limits, plan) is None
        assert await admitted(other, plan) is None
        assert is_held(limits, plan) is RateLimited
        assert is_held(other, plan, 0) is RateLimited
        mine.settle(0)
        await settled(limits)
        assert is_held(limits, plan) is None
        assert await admitted(limits, plan)
        await until(lambda: is_held(other, plan) is None)  # whom nobody tells
        assert await admitted(other, plan) is None
        assert is_held(other, Plan(concurrent_requests=3)) is None


async def test_cold_loads_are_counted_for_all_gateways(server: RedisServer) -> None:
    """As many as the plan says in a minute, whichever is asked, and one more whenever one is due."""
    async with gateway(server) as one, gateway(server) as other:
        assert [await limits.take_load(TENANT, 30) for limits in (one, other) for _ in range(15)] == [0.0] * 30
        wait_s = await one.take_load(TENANT, 30)
        assert 0 < wait_s <= 2
        assert await one.take_load(TenantId("tnt_b"), 30) == 0
        assert await other.take_load(TENANT, 0) == 60
        await asyncio.sleep(wait_s)
        assert await other.take_load(TENANT, 30) == 0
        assert await one.take_load(TENANT, 30) > 0
        assert await admitted(one, Plan(requests_per_minute=1))  # of which loads take nothing


async def test_without_redis_cold_loads_are_counted_here() -> None:
    """With the same limit, as all else is."""
    async with gateway("redis://127.0.0.1:1") as limits:
        assert limits.degraded
        assert [await limits.take_load(TENANT, 2) for _ in range(2)] == [0.0, 0.0]
        assert 29 < await limits.take_load(TENANT, 2) <= 30


async def test_what_is_released_runs_no_longer_and_stays_reserved(server: RedisServer) -> None:
    """Its place is another's, at both gateways; what it used is settled later."""
    plan = Plan(concurrent_requests=1, tokens_per_month=1_000)
    async with gateway(server) as first, gateway(server) as second, client_of(server) as client:
        left = await admitted(first, plan, 600)
        assert left is not None
        assert await admitted(second, plan, 100) is None
        left.release()
        await settled(first)
        await first._renew_all()
        running = await admitted(second, plan, 100)
        assert running is not None
        assert await admitted(first, plan, 100) is None
        assert await stored(client, "used") == 700
        left.settle(250)
        left.release()
        await settled(first)
        assert await stored(client, "used") == 350
        assert await admitted(first, plan, 100) is None
        running.settle(0)
        await settled(second)
        assert await stored(client, "used") == 250
        assert await client.zcard(LEASES) == 0


async def test_two_gateways_admit_what_one_may(server: RedisServer) -> None:
    """50 tenants, random sizes, a third never settled: at most 1 % over the token limit, and nothing withheld."""
    plan, seconds, largest = Plan(tokens_per_minute=6_000), 3.0, 60
    charged: defaultdict[str, int] = defaultdict(int)
    tenants = [f"tnt_{number}" for number in range(50)]

    async def hammer(limits: RedisLimits, tenant: str, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            tokens = chance.randint(largest // 2, largest)
            admission = await admitted(limits, plan, tokens, tenant)
            if admission is None:
                await asyncio.sleep(0.1)
                continue
            if chance.random() < 1 / 3:
                charged[tenant] += tokens  # the gateway never says what it used
                continue
            used = chance.randint(0, tokens)
            charged[tenant] += used
            admission.settle(used)

    async with gateway(server) as first, gateway(server) as second:
        begin = time.monotonic()
        end = begin + seconds
        both = [hammer(limits, tenant, seed) for seed, tenant in enumerate(tenants) for limits in (first, second)]
        await asyncio.gather(*both)
        await settled(first)
        await settled(second)
        for tenant in tenants:  # what came back at the very end is taken, too
            while await admitted(first, plan, largest, tenant):
                charged[tenant] += largest
        took_s = time.monotonic() - begin
        assert not first.degraded
        assert not second.degraded
    for tenant in tenants:
        allowed = 6_000 + took_s * 100
        assert charged[tenant] <= allowed * ROOM
        assert charged[tenant] >= 6_000 + seconds * 100 - largest


async def test_two_gateways_share_requests_a_minute(server: RedisServer) -> None:
    """Exactly the bucket, whoever asks."""
    plan = Plan(requests_per_minute=50)
    async with gateway(server) as first, gateway(server) as second:
        begin = time.monotonic()
        found = await asyncio.gather(*(admitted(limits, plan) for _ in range(50) for limits in (first, second)))
        flowed_in = (time.monotonic() - begin) * 50 / 60
    assert 50 <= sum(one is not None for one in found) <= 50 + flowed_in


async def test_two_gateways_share_places(server: RedisServer) -> None:
    """Never more than the limit at once, and every place is free again when its request ends."""
    plan = Plan(concurrent_requests=4)
    async with gateway(server) as first, gateway(server) as second:
        for _ in range(3):
            found = await asyncio.gather(*(admitted(limits, plan) for _ in range(4) for limits in (first, second)))
            running = [one for one in found if one is not None]
            assert len(running) == 4
            for one in running:
                one.settle(1)
                one.settle(1)
            await settled(first)
            await settled(second)


def told(result: Admission | BaseException) -> dict[str, int]:
    """Limits, what remains of them, and when to come back, as the request's client reads it."""
    if isinstance(result, BaseException):
        assert isinstance(result, RateLimited)
        lines = [(name.decode(), value.decode()) for name, value in result.headers]
    else:
        lines = [(name, value) for name, value in (line.split(": ") for line in result.headers.decode().splitlines())]
    return {name: int(value) for name, value in lines if "-limit-" in name or "-remaining-" in name or "-ms" in name}


async def test_decisions_are_those_of_memory(server: RedisServer) -> None:
    """The script and the arithmetic in memory agree on headers and refusals, step by step."""
    plan = Plan(requests_per_minute=10, tokens_per_minute=60, concurrent_requests=2, tokens_per_month=360)
    chance = random.Random(1)  # in which no two of a request's waits are equal: either could be told
    now = at = 0.0
    memory = MemoryLimits(Database(), timeout_s=1, clock=lambda: now)
    found: Counter[str] = Counter()
    async with gateway(server) as limits, client_of(server) as client:
        running: list[tuple[Admission, Admission, int]] = []
        for _ in range(300):
            if running and chance.random() < 0.4:
                here, there, tokens = running.pop(chance.randrange(len(running)))
                used = chance.randint(tokens // 2, tokens)
                here.settle(used)
                there.settle(used)
                await settled(limits)
                continue
            now += 6.0 * (chance.random() < 0.3)  # lets whole numbers flow in, of which moments are no part
            tokens = chance.randint(0, 16)
            if found["admitted"]:  # Redis's counters are as old as those in memory, and a moment
                seconds, micros = await client.time()
                await client.hset(COUNTERS, "at", repr(seconds + micros / 1e6 - (now - at)))
            one, other = await asyncio.gather(
                memory.admit(TENANT, plan, tokens), limits.admit(TENANT, plan, tokens), return_exceptions=True
            )
            expected = told(one)
            assert told(other).keys() == expected.keys()
            for name, value in told(other).items():
                assert abs(value - expected[name]) <= (500 if name == "retry-after-ms" else 1), name
            if isinstance(one, BaseException) or isinstance(other, BaseException):
                assert type(one) is type(other)
                found["busy" if expected.get("retry-after-ms") == 1_000 else type(one).__name__] += 1
            else:
                running.append((one, other, tokens))
                found["admitted"] += 1
                at = now
    assert found.keys() == {"admitted", "busy", "RateLimited", "TokenRateLimited", "QuotaSpent"}
    assert min(found.values()) > 10, found


async def test_what_is_over_the_reservation_is_owed_from_now_on(server: RedisServer) -> None:
    """A bucket that has filled up meanwhile does not forgive it."""
    plan = Plan(tokens_per_minute=60)
    async with gateway(server) as limits, client_of(server) as client:
        running = await limits.admit(TENANT, plan, 10)
        await client.hset(COUNTERS, "at", repr(await stored(client, "at") - 50))
        running.settle(90)
        await settled(limits)
        await client.hset(COUNTERS, "at", repr(await stored(client, "at") - 15))
        assert await admitted(limits, plan, 0) is None


async def test_too_large_a_request_is_told_so(server: RedisServer) -> None:
    """Without asking Redis."""
    async with gateway(server) as limits:
        with pytest.raises(RequestExceedsLimit):
            await limits.admit(TENANT, Plan(tokens_per_minute=10), 11)


HOLDER = """
import asyncio, sys
from gateway.limits.memory import MemoryLimits
from gateway.limits.redis import KNOWN_S, Call, RedisLimits
from gateway.plans import Plan

async def used(tenant, begin):
    return 0

async def hold():
    memory, lease_s = MemoryLimits(used, timeout_s=5), float(sys.argv[2])
    limits = RedisLimits(sys.argv[1], memory, used_this_month=used, timeout_s=5, lease_s=lease_s)
    await limits.start()
    plan = Plan(concurrent_requests=3, tokens_per_month=1_000)
    held = [await limits.admit("tnt_a", plan, 300) for _ in range(3)]
    print("held", flush=True)
    await asyncio.sleep(3_600)

asyncio.run(hold())
"""


async def test_a_killed_gateway_gives_its_places_back(server: RedisServer) -> None:
    """Not while it lives and renews; but when its leases have run out, and later its share of the month too."""
    lease_s = 5.0  # renewed after a third of it, and a busy machine stands still for seconds
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, server.url, str(lease_s)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert child.stdout is not None
    places, month = Plan(concurrent_requests=3), Plan(tokens_per_month=1_000)
    async with asyncio.timeout(60), gateway(server, lease_s=lease_s, settle_within_s=1.2) as limits:
        try:
            assert await child.stdout.readline() == b"held\n"
            end = time.monotonic() + 1.2 * lease_s
            while time.monotonic() < end:
                assert await admitted(limits, places) is None
                await asyncio.sleep(0.05)
        finally:
            child.kill()
            await child.wait()
        taken: list[Admission] = []
        while len(taken) < 3:
            await asyncio.sleep(0.01)
            if (one := await admitted(limits, places)) is not None:
                taken.append(one)
        for one in taken:
            one.settle(0)
        await settled(limits)
        while await admitted(limits, month, 1_000) is None:
            await asyncio.sleep(0.01)


async def test_a_batch_sent_twice_counts_once(server: RedisServer, tmp_path: Path) -> None:
    """The connection breaks when Redis has done the work and before it says so."""
    plan = Plan(tokens_per_minute=1_000, tokens_per_month=10_000, concurrent_requests=5)
    async with deaf_proxy(server, tmp_path / "proxy.sock") as proxy, gateway(proxy.url) as limits:
        running = [await limits.admit(TENANT, plan, 100) for _ in range(5)]
        proxy.is_deaf = True
        for one in running:
            one.settle(40)
        await until(lambda: limits.degraded)
        assert proxy.swallowed > 0
        proxy.is_deaf = False
        await until(lambda: not limits.degraded)
        await settled(limits)
    async with client_of(server) as client:
        assert await stored(client, "used") == 200
        assert 190 <= await stored(client, "tokens") <= 200
        assert await client.zcard(LEASES) == 0


class DeafProxy:
    """Between a gateway and Redis; when deaf, it hears no answer of Redis and hangs up. It counts what limits ask."""

    def __init__(self, server: RedisServer, path: Path) -> None:
        self.url = f"unix://{path}"
        self.is_deaf = False
        self.swallowed = 0
        self.asked = 0
        self._target = server.url.removeprefix("unix://")
        self._serving: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_unix_connection(self._target)

        async def forward() -> None:
            while data := await reader.read(1 << 16):
                self.asked += data.count(b"EVALSHA")
                to.write(data)
            to.close()

        forwarding = asyncio.create_task(forward())
        try:
            while data := await there.read(1 << 16):
                if self.is_deaf:
                    self.swallowed += len(data)
                    break
                writer.write(data)
        finally:
            forwarding.cancel()
            for one in (writer, to):
                one.close()
            await asyncio.gather(forwarding, writer.wait_closed(), to.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def deaf_proxy(server: RedisServer, path: Path) -> AsyncIterator[DeafProxy]:
    proxy = DeafProxy(server, path)
    listener = await asyncio.start_unix_server(proxy.accept, str(path))
    try:
        yield proxy
    finally:
        listener.close()
        await proxy.close()


async def test_a_frozen_redis_stops_nobody(server: RedisServer, tmp_path: Path) -> None:
    """One wait of the deadline at most, the same limits in memory meanwhile, and afterwards nothing counted twice."""
    plan = Plan(requests_per_minute=1_000, tokens_per_minute=1_000, tokens_per_month=100_000, concurrent_requests=20)
    database = Database(used=500)
    async with (
        deaf_proxy(server, tmp_path / "proxy.sock") as proxy,
        gateway(proxy.url, database, timeout_s=DEADLINE_S) as limits,
    ):
        there = await limits.admit(TENANT, plan, 100)
        (await limits.admit(TENANT, plan, 100)).settle(30)
        await settled(limits)
        server.freeze()
        try:
            begin = time.monotonic()
            first = await limits.admit(TENANT, plan, 100)
            assert time.monotonic() - begin < 2 * DEADLINE_S
            assert limits.degraded
            database.used = 530
            asked = proxy.asked
            rest = [one for _ in range(20) if (one := await admitted(limits, plan, 100)) is not None]
            await asyncio.sleep(0.1)  # what was sent is through the proxy
            assert proxy.asked == asked > 0
            assert len(rest) == 9  # 1,000 a minute in memory, 100 of them `first`
            there.settle(60)
            for one in (first, *rest[:4]):
                one.settle(50)
        finally:
            server.thaw()
        await until(lambda: not limits.degraded)
        for one in rest[4:]:
            one.settle(10)  # admitted in memory, settled when Redis is back
        await settled(limits)
        assert limits.outages == 1
        async with client_of(server) as client:
            assert await stored(client, "used") == 530 + 60 + 5 * 50 + 5 * 10
            assert await client.zcard(LEASES) == 0
            assert await stored(client, "tokens") <= 30 + 60


async def test_redis_killed_and_back(server: RedisServer) -> None:
    """Requests go on in memory with the same limits; the new, empty Redis learns the month from the database."""
    plan = Plan(tokens_per_minute=1_000, tokens_per_month=5_000)
    database = Database(used=4_000)
    async with gateway(server, database) as limits:
        (await limits.admit(TENANT, plan, 100)).settle(100)
        await settled(limits)
        server.kill()
        try:
            database.used = 4_100
            found = [await admitted(limits, plan, 100) for _ in range(20)]
            running = [one for one in found if one is not None]
            assert limits.degraded
            assert len(running) == 9  # the budget of 5,000 in memory
            with pytest.raises(QuotaSpent):
                await limits.admit(TENANT, plan, 100)
            for one in running:
                one.settle(100)
            database.used = 5_000
        finally:
            server.start()
        await until(lambda: not limits.degraded)
        with pytest.raises(QuotaSpent):
            await limits.admit(TENANT, plan, 1)
        async with client_of(server) as client:
            assert await stored(client, "used") == 5_000


async def test_a_gateway_starts_without_redis(tmp_path: Path) -> None:
    """It counts by itself, and says so."""
    async with gateway(f"unix://{tmp_path / 'nobody.sock'}") as limits:
        assert limits.degraded
        plan = Plan(requests_per_minute=2)
        assert [await admitted(limits, plan) is not None for _ in range(3)] == [True, True, False]


async def test_a_redis_that_forgot_the_scripts_is_taught_again(server: RedisServer) -> None:
    """A fail-over or SCRIPT FLUSH costs one outage of a probe's length."""
    plan = Plan(requests_per_minute=100)
    async with gateway(server) as limits, client_of(server) as client:
        await client.script_flush()
        await limits.admit(TENANT, plan, 1)
        assert limits.degraded
        await until(lambda: not limits.degraded)
        await limits.admit(TENANT, plan, 1)
        assert not limits.degraded


async def test_a_second_outage_asks_the_database_again(server: RedisServer) -> None:
    """What memory knew of the month in the first one is old: others have counted since."""
    plan, database = Plan(tokens_per_month=1_000), Database()
    async with gateway(server, database, timeout_s=DEADLINE_S) as limits:
        for used, expected in ((0, 10), (900, 1)):
            database.used = used
            server.freeze()
            try:
                found = [await admitted(limits, plan, 100) for _ in range(12)]
            finally:
                server.thaw()
            running = [one for one in found if one is not None]
            assert len(running) == expected
            for one in running:
                one.settle(0)
            await until(lambda: not limits.degraded)


async def test_what_was_counted_alone_is_added_once(server: RedisServer, tmp_path: Path) -> None:
    """Redis adds it, and the connection breaks before it says so: sent again, it is not added again."""
    plan, database = Plan(tokens_per_month=10_000), Database()
    async with deaf_proxy(server, tmp_path / "proxy.sock") as proxy, gateway(proxy.url, database) as limits:
        (await limits.admit(TENANT, plan, 100)).settle(100)
        await settled(limits)
        async with client_of(server) as client:
            await client.script_flush()  # one outage
        alone = await limits.admit(TENANT, plan, 100)
        assert limits.degraded
        await until(lambda: not limits.degraded)
        await settled(limits)
        proxy.is_deaf = True
        alone.settle(70)
        await until(lambda: proxy.swallowed > 0 and limits.degraded)
        proxy.is_deaf = False
        await until(lambda: not limits.degraded)
        await settled(limits)
    async with client_of(server) as client:
        assert await stored(client, "used") == 170


async def test_what_the_database_knew_already_is_not_added(server: RedisServer) -> None:
    """Redis comes back empty, another gateway puts the database's count there, then the first one returns."""
    plan, database = Plan(tokens_per_month=10_000), Database()
    async with gateway(server, database, probe_s=1.0) as first:
        (await first.admit(TENANT, plan, 100)).settle(100)
        await settled(first)
        server.kill()
        (await first.admit(TENANT, plan, 100)).settle(50)
        assert first.degraded
        database.used = 150  # the ledger has both
        server.start()
        async with gateway(server, database) as second:
            (await second.admit(TENANT, plan, 100)).settle(10)
            await settled(second)
            await until(lambda: not first.degraded)
            await settled(first)
    async with client_of(server) as client:
        assert await stored(client, "used") == 160


async def test_a_count_of_the_month_is_never_put_over_another(server: RedisServer) -> None:
    """A gateway whose database answers late does not undo what has been counted since."""
    plan, late = Plan(tokens_per_month=10_000), Database(used=900)
    late.answers = asyncio.Event()
    async with gateway(server, Database(used=900)) as first, gateway(server, late) as second:
        asking = asyncio.create_task(second.admit(TENANT, plan, 10))
        await until(lambda: late.asked == 1)
        (await first.admit(TENANT, plan, 50)).settle(50)
        await settled(first)
        late.answers.set()
        (await asking).settle(10)
        await settled(second)
        async with client_of(server) as client:
            assert await stored(client, "used") == 960


async def test_the_month_is_asked_for_once(server: RedisServer) -> None:
    """Two gateways, many first requests: what the database says is put into Redis once."""
    plan, database = Plan(tokens_per_month=1_000), Database(used=900)
    async with gateway(server, database) as first, gateway(server, database) as second:
        found = await asyncio.gather(*(admitted(limits, plan, 10) for _ in range(15) for limits in (first, second)))
        assert sum(one is not None for one in found) == 10
        assert database.asked <= 2


async def test_a_month_that_nobody_knows_is_not_enforced(server: RedisServer) -> None:
    """Neither Redis nor the database can say: requests go on, the other limits hold."""
    plan, database = Plan(tokens_per_month=10, requests_per_minute=3), Database(used=10)
    database.is_away = True
    async with gateway(server, database) as limits:
        assert [await admitted(limits, plan, 5) is not None for _ in range(4)] == [True, True, True, False]
        assert not limits.degraded
        assert database.asked == 1


async def test_a_new_month_begins_with_what_is_running(server: RedisServer) -> None:
    """Redis's calendar turns: reservations remain, what has ended does not."""
    plan = Plan(tokens_per_month=1_000)
    async with gateway(server) as limits, client_of(server) as client:
        running = await limits.admit(TENANT, plan, 300)
        (await limits.admit(TENANT, plan, 700)).settle(700)
        await settled(limits)
        assert await admitted(limits, plan, 1) is None
        month = int(await stored(client, "month"))
        await client.hset(COUNTERS, "month", month - 1)
        assert await admitted(limits, plan, 701) is None
        await client.hset(COUNTERS, "month", month - 1)
        running.settle(900)
        await settled(limits)
        assert await stored(client, "used") == 900


async def test_redis_counts_the_same_months(server: RedisServer) -> None:
    """The script's calendar is Python's, at the first and last seconds of 400 years of months."""
    async with client_of(server) as client:
        begin, expected = 0, 1970 * 12 + 1
        for _ in range(12 * 400):
            _, end = month_of(begin)
            for second in (begin, end - 1):
                assert await client.eval(scripts.MONTH, 2, "a", "b", second) == expected
            begin, expected = end, expected + 1


async def test_a_tenants_keys_stay_together(server: RedisServer) -> None:
    """One hash tag: a cluster keeps them on one node. And they go by themselves."""
    plan = Plan(requests_per_minute=5, tokens_per_minute=5, concurrent_requests=5, tokens_per_month=5)
    async with gateway(server) as limits, client_of(server) as client:
        await limits.admit(TENANT, plan, 1)
        keys = await client.keys("*")
        assert sorted(keys) == [COUNTERS, LEASES]
        assert min([await client.ttl(key) for key in keys]) > 0


async def test_who_leaves_while_redis_is_asked_holds_nothing(server: RedisServer) -> None:
    """A cancelled admission gives place, tokens and request back."""
    plan = Plan(requests_per_minute=1, concurrent_requests=1, tokens_per_minute=10)
    async with gateway(server) as limits:
        asking = asyncio.create_task(limits.admit(TENANT, plan, 10))
        await asyncio.sleep(0)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            while await admitted(limits, plan, 10) is None:
                await asyncio.sleep(0.01)


async def test_who_leaves_in_the_moment_of_the_answer_holds_nothing(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is set, and its waiter is cancelled before it has run."""
    plan = Plan(concurrent_requests=1, requests_per_minute=10, tokens_per_minute=1000, tokens_per_month=1000)
    async with gateway(server) as limits, client_of(server) as client:
        first = await limits.admit(TENANT, plan, 900)
        first.settle(0)
        await settled(limits)
        before = await stored(client, "requests")
        fly = limits._fly

        async def fly_and_cancel(calls: Sequence[Call]) -> None:
            await fly(calls)
            asking.cancel()

        monkeypatch.setattr(limits, "_fly", fly_and_cancel)
        asking = asyncio.create_task(limits.admit(TENANT, plan, 900))
        with pytest.raises(asyncio.CancelledError):
            await asking
        monkeypatch.undo()
        await settled(limits)
        assert await client.zcard(LEASES) == 0
        assert await stored(client, "used") == 0
        assert await stored(client, "requests") <= before + 0.01
        assert await admitted(limits, plan, 900)
