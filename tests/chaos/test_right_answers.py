"""I1: whose answer it is, under uploads, moving names, deletes, evictions, disconnects and a restart.

Two fake replicas with four slots and 32 places in host memory each; 200 adapters of ten tenants, who all use the same
names. Every answer names the digest that gave it.
"""

import asyncio
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.chaos.client import DIALECTS, Answer, Client, request
from tests.chaos.conftest import Figure, NewClient
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant
from tests.waiting import cancel

TENANTS = 10
NAMES = 20
CLIENTS = 32
CHANGE_EVERY_S = 0.02
NOBODY = ""
UNKNOWN = "?"


@dataclass
class Change:
    """The name stands for `digest` from some moment between `begin` and `end` on."""

    begin: float
    digest: str = UNKNOWN
    end: float = math.inf


@dataclass
class Name:
    """One tenant's adapter, and all that it ever stood for."""

    tenant: Tenant
    name: str
    folders: list[Path]
    changes: list[Change] = field(default_factory=list)
    published: int = 0

    def stood_for(self, begin: float, end: float) -> set[str]:
        """What it may have stood for at some moment between the two."""
        found = set()
        for number, change in enumerate(self.changes):
            until = self.changes[number + 1].end if number + 1 < len(self.changes) else math.inf
            if change.begin <= end and until >= begin:
                found.add(change.digest)
        return found

    async def publish(self) -> None:
        """The next version; after the last one the first again."""
        folder = self.folders[self.published % len(self.folders)]
        self.published += 1
        change = Change(time.monotonic())
        self.changes.append(change)
        made = await self.tenant.publish(folder, self.name)
        assert made.status_code == 201, made.text
        change.digest, change.end = made.json()["current"]["digest"], time.monotonic()

    async def delete(self) -> None:
        change = Change(time.monotonic(), NOBODY)
        self.changes.append(change)
        gone = await self.tenant.client.delete(f"/v1/adapters/{self.name}", params={"force": True})
        assert gone.status_code in (200, 202), gone.text
        change.end = time.monotonic()


@dataclass
class Asked:
    """One request that has got an answer."""

    name: Name
    begin: float
    end: float
    digest: str

    @property
    def right(self) -> bool:
        return self.digest in self.name.stood_for(self.begin, self.end)


@dataclass
class Traffic:
    gateway: Gateway
    names: list[Name]
    count: int
    endings: Counter[str] = field(default_factory=Counter)
    digests: set[str] = field(default_factory=set)
    doubtful: list[Asked] = field(default_factory=list)
    """The digest was not known yet when its answer came: judged at the end."""
    refusals: Counter[str] = field(default_factory=Counter)
    left: int = 0
    begun: int = 0

    async def run(self, client: Client, seed: int) -> None:
        chance = random.Random(seed)
        weights = [1 / (1 + place) ** 0.8 for place in range(len(self.names))]
        while self.begun < self.count:
            self.begun += 1
            (name,) = chance.choices(self.names, weights)
            dialect, stream = chance.choice(DIALECTS), chance.random() < 0.5
            begin = time.monotonic()
            data = request(name.tenant.key, name.name, dialect=dialect, stream=stream, tokens=chance.randint(1, 4))
            answer = await client.send(data, dialect=dialect, stream=stream)
            if chance.random() < 0.03:
                await asyncio.sleep(chance.uniform(0, 0.02))
                client.leave()
                self.left += 1
                continue
            await client.until(answer)
            self._judge(answer, name, begin)

    def _judge(self, answer: Answer, name: Name, begin: float) -> None:
        ending = answer.ending
        self.endings[f"{ending} {answer.status}" if ending == "refused" else ending] += 1
        if ending == "refused" and answer.status != 404:
            self.refusals[bytes(answer.body).decode()] += 1
            return
        digest = NOBODY if ending == "refused" else answer.digest
        self.digests.add(digest)
        asked = Asked(name, begin, time.monotonic(), digest)
        if not asked.right:
            self.doubtful.append(asked)


async def change_names(names: list[Name], seed: int) -> None:
    """For ever: new versions, names that move back to earlier ones, deletes."""
    chance = random.Random(seed)
    while True:
        await asyncio.sleep(CHANGE_EVERY_S)
        name = names[int(len(names) * chance.random() ** 3)]  # the busiest most of all
        if chance.random() < 0.3:
            await name.delete()
            await asyncio.sleep(chance.uniform(0, 2 * CHANGE_EVERY_S))
        await name.publish()


@pytest.mark.parametrize(
    "count", [3_000, pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.timeout(6 * 3_600)])]
)
async def test_every_answer_comes_from_what_its_name_stood_for(
    run_gateway: RunGateway,
    run_replica: RunReplica,
    new_client: NewClient,
    figure: Figure,
    tmp_path: Path,
    count: int,
) -> None:
    """At some moment between request and answer; and never from another tenant's: 0 wrong."""
    replicas = [await run_replica(engine=engine(), capacity=32, keep_requests=False) for _ in range(2)]
    gateway = await run_gateway(*replicas, adapter_quantum_s=0.05)
    names = await publish_all(gateway, tmp_path)
    traffic = Traffic(gateway, names, count)
    changing = asyncio.create_task(change_names(names, seed=1))
    restarting = asyncio.create_task(restart_in_the_middle(traffic, replicas[0]))
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for seed in range(CLIENTS):
            group.create_task(traffic.run(new_client(gateway.url), seed))
    took_s = time.monotonic() - begin
    await cancel(changing)
    await restarting
    figure(
        f"I1: {sum(not asked.right for asked in traffic.doubtful)} wrong in {traffic.begun} requests ({took_s:.0f} s), "
        f"{dict(traffic.endings)}, {traffic.left} left; {len(traffic.digests)} versions, "
        f"{sum(len(name.changes) for name in names)} changes, {sum(len(fake.loads) for fake in replicas)} loads, "
        f"{sum(len(fake.evicted) for fake in replicas)} evictions"
    )
    assert [asked for asked in traffic.doubtful if not asked.right] == []
    answered = traffic.endings["whole"] + traffic.endings["refused 404"]
    assert answered >= 0.97 * (traffic.begun - traffic.left), traffic.refusals
    assert sum(len(fake.evicted) for fake in replicas) > 0
    assert traffic.endings["refused 404"] > 0


def engine() -> EngineModel:
    return EngineModel(max_num_seqs=32, max_loras=4, base_step_s=0.001, per_sequence_s=0.0, load_s=0.001)


async def publish_all(gateway: Gateway, folder: Path) -> list[Name]:
    """Every tenant has the same names."""
    tenants = [await gateway.tenant(f"tenant-{number}") for number in range(TENANTS)]
    names = []
    for number in range(TENANTS * NAMES):
        tenant = tenants[number % TENANTS]
        folders = [write_good(folder / f"{number}-{seed}", seed=number + 1_000 * seed, rank=1) for seed in (1, 2)]
        names.append(Name(tenant, f"bot-{number // TENANTS}", folders))
    room = asyncio.Semaphore(4)

    async def publish(name: Name) -> None:
        async with room:
            await name.publish()

    await asyncio.gather(*map(publish, names))
    return names


async def restart_in_the_middle(traffic: Traffic, replica: FakeReplica) -> None:
    """Its engine forgets every name that the gateway knows."""
    while traffic.begun < traffic.count // 2:
        await asyncio.sleep(0.01)
    await replica.restart()


def test_the_judge_knows_a_wrong_answer() -> None:
    """An older version after its time, a newer one before it, a deleted one, and another name's."""
    name = Name(Tenant("a", "", None), "bot", [])  # type: ignore[arg-type]
    name.changes = [Change(0, "one", 1), Change(10, "two", 11), Change(20, NOBODY, 21), Change(30, "three", 31)]
    for begin, end, right in (
        (2, 3, {"one"}),
        (10.5, 10.6, {"one", "two"}),
        (12, 13, {"two"}),
        (12, 25, {"two", NOBODY}),
        (22, 23, {NOBODY}),
        (22, 40, {NOBODY, "three"}),
    ):
        assert name.stood_for(begin, end) == right
