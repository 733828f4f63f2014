"""O3: an hour of everything at once, on one gateway process. `SOAK_S=90` makes it shorter."""

import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from adapter_store.base_model import BaseModel
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.chaos.client import DIALECTS, Client, request
from tests.chaos.conftest import Figure, NewClient
from tests.gateways import GatewayProcess, gateway_settings, until_ready
from tests.integration.gateway.conftest import BASE
from tests.ports import free_port

SOAK_S = float(os.environ.get("SOAK_S", "3600"))
WARM_UP = 0.2
"""Share of the time in which caches fill: not looked at."""
TENANTS = 10
CLIENTS = 12
PAUSE_S = 0.02
RESTART_EVERY_S = 30.0
CHANGE_EVERY_S = 1.0
GROWTH_LIMIT_BYTES = 5 << 20
DESCRIPTORS_ROOM = 16


@dataclass
class Soak:
    gateway: GatewayProcess
    replicas: list[FakeReplica]
    operator: httpx.AsyncClient
    keys: list[str]
    bundles: list[list[Path]]
    endings: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, int]] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    ends_at: float = 0.0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    async def ask(self, client: Client, seed: int) -> None:
        chance = random.Random(seed)
        while not self.is_over:
            await asyncio.sleep(PAUSE_S)
            dialect, stream = chance.choice(DIALECTS), chance.random() < 0.6
            model = chance.choice((BASE, "bot", "bot", "bot", "none-such"))
            more = {"nonsense": 1} if chance.random() < 0.03 else {}
            key = chance.choice(self.keys) if chance.random() > 0.02 else "sk-tailor-wrong"
            data = request(key, model, dialect=dialect, stream=stream, tokens=chance.randint(1, 30), **more)
            answer = await client.send(data, dialect=dialect, stream=stream)
            if chance.random() < 0.1:
                await asyncio.sleep(chance.uniform(0, 0.1))
                client.leave()
                self.endings["left"] += 1
                continue
            await client.until(answer)
            ending = answer.ending
            self.endings[f"{ending} {answer.status}" if ending == "refused" else ending] += 1

    async def change(self) -> None:
        """New versions, deletes, uploads that stop half way."""
        chance = random.Random(1)
        while not self.is_over:
            await asyncio.sleep(CHANGE_EVERY_S)
            number = chance.randrange(TENANTS)
            headers = {"authorization": f"Bearer {self.keys[number]}"}
            if chance.random() < 0.2:
                await self.operator.delete("/v1/adapters/bot", headers=headers)
            files = {
                file.name: (file.name, file.read_bytes()) for file in chance.choice(self.bundles[number]).iterdir()
            }
            if chance.random() < 0.2:
                files.popitem()
            await self.operator.post("/v1/adapters", data={"name": "bot"}, files=files, headers=headers)

    async def restart(self) -> None:
        """One replica after the other, with the faults of a bad day in between."""
        number = 0
        while not self.is_over:
            replica = self.replicas[number % 2]
            number += 1
            for fault, value in (("status", 500), ("load_status", 500), ("latency_s", 0.5)):
                await asyncio.sleep(RESTART_EVERY_S / 4)
                setattr(replica.faults, fault, value)
                await asyncio.sleep(0.5)
                setattr(replica.faults, fault, type(replica.faults).__dataclass_fields__[fault].default)
            await asyncio.sleep(RESTART_EVERY_S / 4)
            await replica.restart()

    async def look(self) -> None:
        process = psutil.Process(self.gateway.pid)
        begin = time.monotonic()
        while not self.is_over:
            await asyncio.sleep(min(10.0, SOAK_S / 100))
            self.rss.append((time.monotonic() - begin, process.memory_info().rss))
            self.descriptors.append(process.num_fds())

    @property
    def growth(self) -> float:
        """Bytes by which resident memory grows in the whole time, by the straight line through what was seen."""
        seen = [(at, rss) for at, rss in self.rss if at >= WARM_UP * SOAK_S]
        return statistics.linear_regression(*zip(*seen, strict=True)).slope * SOAK_S


@pytest.mark.full
@pytest.mark.timeout(SOAK_S + 300)
async def test_an_hour_of_everything_leaves_nothing_behind(
    base_folder: Path, base: BaseModel, new_client: NewClient, figure: Figure, tmp_path: Path
) -> None:
    """Memory grows by at most 5 MiB an hour, descriptors not at all, and nothing fails unseen."""
    async with AsyncExitStack() as held:
        soak = await started(held, base_folder, base.fingerprint, tmp_path)
        soak.ends_at = time.monotonic() + SOAK_S
        asks = [soak.ask(new_client(soak.gateway.url), seed) for seed in range(CLIENTS)]
        await asyncio.gather(*asks, soak.change(), soak.restart(), soak.look())
        errors = [line for line in soak.gateway.log.read_text().splitlines() if is_error(line)]
        half = soak.descriptors[len(soak.descriptors) // 5 : len(soak.descriptors) // 2]
        figure(
            f"O3: {SOAK_S:.0f} s, {soak.endings.total()} requests {dict(soak.endings)}: memory "
            f"{soak.rss[0][1] >> 20} → {soak.rss[-1][1] >> 20} MiB, {soak.growth / (1 << 20):+.1f} MiB by the line; "
            f"descriptors {max(half)} → {max(soak.descriptors[-len(half) :])}; {len(errors)} errors logged"
        )
        assert errors == []
        assert soak.growth <= GROWTH_LIMIT_BYTES * max(1.0, SOAK_S / 3_600)
        assert max(soak.descriptors[-len(half) :]) <= max(half) + DESCRIPTORS_ROOM
        for replica in soak.replicas:
            assert replica.violations == []


def is_error(line: str) -> bool:
    """What no fault of a replica or a client may cause: an exception that nobody has caught."""
    if "never retrieved" in line or "Traceback" in line:
        return True
    try:
        return json.loads(line).get("level") in ("error", "critical")
    except ValueError:
        return False


async def started(held: AsyncExitStack, base_folder: Path, fingerprint: str, folder: Path) -> Soak:
    replicas = []
    for _ in range(2):
        engine = EngineModel(max_num_seqs=32, base_step_s=0.005, load_s=0.01)
        replica = FakeReplica(fingerprint, base_name=BASE, engine=engine, keep_requests=False)
        await replica.start()
        held.push_async_callback(replica.stop)
        replicas.append(replica)
    gateway = GatewayProcess(
        free_port(), folder / "home", gateway_settings(base_folder, *replicas), folder / "gateway.log"
    )
    held.push_async_callback(gateway.kill)
    await gateway.start()
    await gateway.serves()
    await until_ready(gateway.url)
    headers = {"authorization": f"Bearer {gateway.operator_key()}"}
    operator = await held.enter_async_context(httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30))
    keys, bundles = [], []
    for number in range(TENANTS):
        await operator.post("/admin/v1/tenants", json={"name": f"tenant-{number}"})
        made = await operator.post(f"/admin/v1/tenants/tenant-{number}/keys", json={})
        keys.append(str(made.json()["secret"]))
        bundles.append([write_good(folder / f"{number}-{seed}", seed=10 * number + seed, rank=1) for seed in range(4)])
    return Soak(gateway, replicas, operator, keys, bundles)


def test_the_judge_knows_an_error() -> None:
    """As the gateway logs it, and as Python does."""
    assert is_error('{"level":"error","message":"request x failed"}')
    assert is_error("Task exception was never retrieved")
    assert not is_error('{"level":"warning","message":"replica r-1 gets no requests"}')
