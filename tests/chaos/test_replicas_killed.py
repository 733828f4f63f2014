"""F1: kill -9 of a replica in the middle of traffic, again and again."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapter_store.base_model import BaseModel
from gateway.replicas.replica import ReplicaState
from tests.bad_adapters import write_good
from tests.chaos.client import DIALECTS, Answer, Client, Hung
from tests.chaos.conftest import Figure, NewClient
from tests.chaos.replica_process import ReplicaProcess, replica_process
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant
from tests.ports import free_port

CLIENTS = 12
TENANTS = 3


@dataclass
class Asker:
    """Clients that ask without pause, in every dialect, and judge every answer."""

    gateway: Gateway
    tenants: list[Tenant]
    digests: dict[str, str]
    endings: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: int = 0
    stopped: bool = False

    @property
    def answered(self) -> int:
        return self.endings.total()

    async def run(self, client: Client, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopped:
            tenant = chance.choice(self.tenants)
            model = chance.choice(("bot", "bot", BASE))
            dialect, stream = chance.choice(DIALECTS), chance.random() < 0.7
            tokens = chance.randint(2, 48)
            try:
                answer = await client.ask(tenant.key, model, dialect=dialect, stream=stream, tokens=tokens)
            except Hung:
                self.hung += 1
                client.leave()
                continue
            self._judge(answer, "the base" if model == BASE else self.digests[tenant.name])

    def _judge(self, answer: Answer, expected: str) -> None:
        ending = answer.ending
        self.endings[ending] += 1
        if ending == "refused":
            self.refusals[f"{answer.status} {bytes(answer.body)!r}"] += 1
        elif answer.digest != expected:
            self.wrong.append(f"{answer.digest} instead of {expected}")

    async def more(self, count: int) -> None:
        """Return after so many further answers."""
        wanted = self.answered + count
        async with asyncio.timeout(60):
            while self.answered < wanted:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(3_600)])])
async def test_kill_9_of_a_replica_in_the_middle_of_traffic(
    run_gateway: RunGateway, base: BaseModel, new_client: NewClient, figure: Figure, tmp_path: Path, kills: int
) -> None:
    """No request hangs, none is answered wrongly, none that had not begun fails; begun streams end in one error event.

    A replica that comes back has its adapters before its first request.
    """
    async with AsyncExitStack() as held:
        replicas = [
            await held.enter_async_context(replica_process(free_port(), base.fingerprint, tmp_path / f"{number}.log"))
            for number in range(2)
        ]
        gateway = await run_gateway(replicas=tuple(replica.url for replica in replicas), spread_at=2)
        await until_ready(gateway, *replicas)
        asker = await asker_of(gateway, tmp_path)
        async with asyncio.TaskGroup() as group:
            for seed in range(CLIENTS):
                group.create_task(asker.run(new_client(gateway.url), seed))
            await asker.more(100)
            for number in range(kills):
                victim = replicas[number % 2]
                await victim.kill()
                await asker.more(30)
                await victim.start()
                await until_ready(gateway, *replicas)
                await asker.more(30)
            asker.stopped = True
    figure(f"F1: {kills} x kill -9 in {asker.answered} requests: {dict(asker.endings)}, {asker.hung} hung")
    assert asker.hung == 0
    assert asker.wrong == []
    assert asker.refusals == {}
    assert asker.endings["error event"] > 0
    assert sum(len(replica.told()) for replica in replicas) == len(replicas) + kills
    for replica in replicas:
        assert all(life["held"] for life in replica.told()[1:])


async def asker_of(gateway: Gateway, folder: Path) -> Asker:
    tenants = [await gateway.tenant(f"tenant-{number}") for number in range(TENANTS)]
    digests = {}
    for seed, tenant in enumerate(tenants):
        made = await tenant.publish(write_good(folder / tenant.name, seed=seed))
        digests[tenant.name] = made.json()["current"]["digest"]
    return Asker(gateway, tenants, digests)


async def until_ready(gateway: Gateway, *replicas: ReplicaProcess) -> None:
    """Until all of them take requests."""
    async with asyncio.timeout(30):
        while set(gateway.parts.pool.states().values()) != {ReplicaState.READY}:
            await asyncio.sleep(0.01)
    assert len(gateway.parts.pool.states()) == len(replicas)
