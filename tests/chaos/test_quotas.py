"""Q1 and S4: two gateway processes on one Redis and one database, 50 tenants at their limits, clients that leave.

The fake replica counts what it really sent, by tenant. What the limits let through and what the ledger has is compared
with that, through the whole of HTTP.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_store.base_model import BaseModel
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica, Served
from tests.bad_adapters import write_good
from tests.chaos.client import DIALECTS, Client, request
from tests.chaos.conftest import Figure, NewClient
from tests.gateways import GatewayProcess, gateway_settings, until_ready
from tests.integration.gateway.conftest import BASE
from tests.ports import free_port
from tests.servers import redis_server

TENANTS = 50
ASKERS = 2  # of one tenant, at each gateway
TOKENS = "tokens"
REQUESTS = "requests"
AT_ONCE = 3
PLANS: dict[str, dict[str, int]] = {
    TOKENS: {"tokens_per_minute": 1_200, "requests_per_minute": 6_000, "concurrent_requests": AT_ONCE},
    REQUESTS: {"tokens_per_minute": 1_000_000, "requests_per_minute": 30, "concurrent_requests": AT_ONCE},
}
LARGEST = 100
"""No request reserves more tokens."""
ROOM = 1.01


class Counting(FakeReplica):
    """Notes how many requests of one tenant ran at once."""

    most: Counter[str]

    def _serve_record(self, name: str | None, body: dict[str, Any]) -> Served:
        served = super()._serve_record(name, body)
        self.most[served.owner] = max(self.most[served.owner], self.adapters[str(name)]["in_flight"])
        return served


@dataclass
class Customer:
    """A tenant, and what it met with."""

    name: str
    plan: str
    id: str = ""
    key: str = ""
    began: float = 0.0
    ended: float = 0.0
    answered: int = 0
    left: int = 0
    refused: int = 0

    @property
    def admitted(self) -> int:
        return self.answered + self.left

    async def ask(self, client: Client, chance: random.Random) -> bool:
        """One request, to its end or to somewhere in its middle; False where it was refused."""
        dialect, stream = chance.choice(DIALECTS), chance.random() < 0.7
        data = request(self.key, "bot", dialect=dialect, stream=stream, tokens=chance.randint(8, 40))
        self.began = self.began or time.monotonic()
        answer = await client.send(data, dialect=dialect, stream=stream)
        if stream and chance.random() < 0.4:
            await client.until(answer, events=chance.randint(1, 30))
            if not answer.framed:
                client.leave()
                self.left += 1
                return True
        await client.until(answer)
        if answer.ending == "whole":
            self.answered += 1
            return True
        assert answer.status == 429, bytes(answer.body)
        assert int(answer.headers["retry-after"]) >= 1
        assert f"x-ratelimit-remaining-{self.plan}" in answer.headers
        self.refused += 1
        return False


@dataclass
class Pair:
    """Two gateways with one Redis, one database, one replica."""

    gateways: list[GatewayProcess]
    operator: httpx.AsyncClient
    replica: Counting
    customers: list[Customer] = field(default_factory=list)

    async def enrol(self, folder: Path) -> None:
        """50 tenants, half on each plan, each with an adapter, so that the replica knows whose request it is."""
        for name, limits in PLANS.items():
            assert (await self.operator.post("/admin/v1/plans", json={"name": name, **limits})).status_code == 201
        for number in range(TENANTS):
            customer = Customer(f"tenant-{number}", (TOKENS, REQUESTS)[number % 2])
            new = {"name": customer.name, "plan": customer.plan}
            customer.id = (await self.operator.post("/admin/v1/tenants", json=new)).json()["id"]
            made = await self.operator.post(f"/admin/v1/tenants/{customer.name}/keys", json={})
            customer.key = made.json()["secret"]
            await self._publish(customer, write_good(folder / customer.name, seed=number, rank=1))
            self.customers.append(customer)

    async def _publish(self, customer: Customer, folder: Path) -> None:
        files = {file.name: (file.name, file.read_bytes()) for file in folder.iterdir()}
        headers = {"authorization": f"Bearer {customer.key}"}
        made = await self.operator.post("/v1/adapters", data={"name": "bot"}, files=files, headers=headers)
        assert made.status_code == 201, made.text

    async def use_up(self, customer: Customer, new_client: NewClient, seconds: float, seed: int) -> None:
        """Ask at both gateways without pause, and at the end once more for all that is left."""
        end = time.monotonic() + seconds

        async def keep_asking(url: str, chance: random.Random) -> None:
            client = new_client(url)
            while time.monotonic() < end:
                if not await customer.ask(client, chance):
                    await asyncio.sleep(0.1)

        urls = [gateway.url for gateway in self.gateways] * ASKERS
        await asyncio.gather(*(keep_asking(url, random.Random(f"{seed} {n}")) for n, url in enumerate(urls)))
        await asyncio.sleep(1)  # what those used who have left is known within that time
        client, chance = new_client(urls[0]), random.Random(seed)
        while await customer.ask(client, chance):
            pass
        customer.ended = time.monotonic()

    async def ledger(self, customer: Customer) -> tuple[int, int, int]:
        """Requests, failed ones and tokens, as the database has them."""
        rows = (await self.operator.get("/admin/v1/usage", params={"tenant": customer.name})).json()["data"]
        return (
            sum(row["requests"] for row in rows),
            sum(row["failed"] for row in rows),
            sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows),
        )

    def served(self, customer: Customer) -> list[Served]:
        return [served for served in self.replica.served if served.owner == customer.id]

    def tokens(self, customer: Customer) -> int:
        return sum(served.prompt_tokens + served.completion_tokens for served in self.served(customer))


@asynccontextmanager
async def pair(base_folder: Path, fingerprint: str, folder: Path) -> AsyncIterator[Pair]:
    engine = EngineModel(max_num_seqs=256, max_loras=2 * TENANTS, base_step_s=0.004, per_sequence_s=0.0)
    replica = Counting(fingerprint, base_name=BASE, engine=engine, capacity=2 * TENANTS, keep_requests=False)
    replica.most = Counter()
    replica.faults.silent_every = 5  # tokens of which the Responses and the Messages API say nothing
    await replica.start()
    async with AsyncExitStack() as held:
        held.push_async_callback(replica.stop)
        redis = held.enter_context(redis_server())
        settings = gateway_settings(
            base_folder, replica, TAILOR_REDIS_URL=redis.url, TAILOR_LIMITS_TIMEOUT_S="10", TAILOR_USAGE_FLUSH_S="0.2"
        )
        gateways = []
        for number in range(2):
            gateway = GatewayProcess(free_port(), folder / "home", settings, folder / f"{number}.log")
            held.push_async_callback(gateway.kill)
            await gateway.start()
            await gateway.serves()
            await until_ready(gateway.url)
            gateways.append(gateway)
        headers = {"authorization": f"Bearer {gateways[0].operator_key()}"}
        operator = await held.enter_async_context(
            httpx.AsyncClient(base_url=gateways[0].url, headers=headers, timeout=30)
        )
        yield Pair(gateways, operator, replica)


@pytest.mark.parametrize("seconds", [3.0, pytest.param(600.0, marks=[pytest.mark.full, pytest.mark.timeout(1_800)])])
async def test_limits_hold_and_the_ledger_counts_what_was_sent(
    base_folder: Path, base: BaseModel, new_client: NewClient, figure: Figure, tmp_path: Path, seconds: float
) -> None:
    """At most 1 % over any limit; nothing withheld but the last request's size; ledger and replica agree to the token.

    A fifth of all requests end because their client left in the middle of the stream, in every dialect.
    """
    async with pair(base_folder, base.fingerprint, tmp_path) as both:
        await both.enrol(tmp_path / "adapters")
        await asyncio.gather(
            *(both.use_up(customer, new_client, seconds, seed) for seed, customer in enumerate(both.customers))
        )
        await settled(both)
        most, least = 0.0, 1.0
        for customer in both.customers:
            used = both.tokens(customer) if customer.plan == TOKENS else customer.admitted
            per_minute = PLANS[customer.plan][f"{customer.plan}_per_minute"]
            allowed = per_minute * (1 + (customer.ended - customer.began) / 60)
            promised = per_minute * (1 + seconds / 60) - (LARGEST if customer.plan == TOKENS else 1)
            most, least = max(most, used / allowed), min(least, used / promised)
            assert used <= ROOM * allowed, customer
            assert used >= promised, customer
            assert 1 <= both.replica.most[customer.id] <= AT_ONCE
            served = both.served(customer)
            assert len(served) == customer.admitted
            assert await both.ledger(customer) == (customer.admitted, 0, both.tokens(customer))
        assert max(both.replica.most.values()) == AT_ONCE  # some have met it
        count, left = (sum(getattr(one, name) for one in both.customers) for name in ("admitted", "left"))
        figure(
            f"Q1, S4: {count} requests of {TENANTS} tenants at two gateways, {left} left in the middle: used "
            f"{most:.1%} of what the limits allow at most, {least:.1%} of what they promise at least; ledger = replica"
        )
        assert left > count / 10
        assert both.replica.violations == []
        for gateway in both.gateways:
            assert "limits" not in gateway.log.read_text(), "Redis was slow: limits were counted by each alone"


async def settled(both: Pair) -> None:
    """Both gateways have written what they counted."""
    async with asyncio.timeout(30):
        while True:
            counts = [await both.ledger(customer) for customer in both.customers]
            if sum(count[0] for count in counts) >= len(both.replica.served) and not both.replica.in_flight:
                return
            await asyncio.sleep(0.2)
