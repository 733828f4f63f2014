"""An alias that is switched under load: every answer is of one version, and of one that the alias stood for."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.bad_adapters import write_good
from tests.chaos.client import DIALECTS, Client, request
from tests.chaos.conftest import Figure, NewClient
from tests.integration.gateway.conftest import RunGateway, RunReplica, Tenant

CLIENTS = 4


@dataclass
class Switches:
    """What the alias stood for, and from when to when at most it may have answered."""

    digests: dict[int, str]
    begun: list[tuple[float, int]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def stood_for(self, begin: float, end: float) -> set[str]:
        found = set()
        for number, (since, version) in enumerate(self.begun):
            until = self.ended[number + 1] if number + 1 < len(self.ended) else float("inf")
            if since <= end and until >= begin:
                found.add(self.digests[version])
        return found


@pytest.mark.parametrize("count", [40, pytest.param(1_000, marks=[pytest.mark.full, pytest.mark.timeout(3_600)])])
async def test_switches_under_load_fail_and_mix_nothing(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, figure: Figure, tmp_path: Path, count: int
) -> None:
    """The digest in the receipt is the one that spoke, from the first token to the last."""
    gateway = await run_gateway(
        await run_replica(events=6, keep_requests=False), await run_replica(keep_requests=False)
    )
    tenant = await gateway.tenant("acme")
    switches = Switches({})
    for seed in (1, 2, 3):
        made = await tenant.publish(write_good(tmp_path / f"v{seed}", seed=seed, rank=1))
        switches.digests[seed] = made.json()["current"]["digest"]
    now = time.monotonic()
    switches.begun.append((now, 3))
    switches.ended.append(now)
    stop = asyncio.Event()
    asked: list[tuple[float, float, str, str]] = []
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for seed in range(CLIENTS):
            group.create_task(ask(new_client(gateway.url), tenant, seed, asked, stop))
        await switch(tenant, switches, count, asked)
        stop.set()
    wrong = [found for found in asked if found[2] not in switches.stood_for(found[0], found[1])]
    mixed = [found for found in asked if found[2] != found[3]]
    seen = {found[2] for found in asked}
    figure(
        f"alias switches: {count} under {len(asked)} requests in {time.monotonic() - begin:.0f} s: 0 failed, "
        f"{len(mixed)} mixed, {len(wrong)} wrong; {len(seen)} versions"
    )
    assert wrong == mixed == []
    assert seen == set(switches.digests.values())
    assert len(asked) > count


async def switch(tenant: Tenant, switches: Switches, count: int, asked: list[tuple[float, float, str, str]]) -> None:
    """Round and round, each after at least one more request has been answered."""
    for number in range(count):
        answered = len(asked)
        while len(asked) == answered:
            await asyncio.sleep(0.001)
        version = number % 3 + 1
        switches.begun.append((time.monotonic(), version))
        moved = await tenant.client.put("/v1/adapters/bot/aliases/default", json={"version": version})
        assert moved.status_code == 200, moved.text
        switches.ended.append(time.monotonic())


async def ask(
    client: Client, tenant: Tenant, seed: int, asked: list[tuple[float, float, str, str]], stop: asyncio.Event
) -> None:
    number = seed
    while not stop.is_set():
        number += 1
        dialect, stream = DIALECTS[number % len(DIALECTS)], number % 3 > 0
        begin = time.monotonic()
        answer = await client.send(
            request(tenant.key, "bot", dialect=dialect, stream=stream), dialect=dialect, stream=stream
        )
        await client.until(answer)
        assert (answer.ending, answer.status) == ("whole", 200), bytes(answer.body)
        receipt = answer.headers["x-tailor-version"].partition("sha256=")[2]
        asked.append((begin, time.monotonic(), receipt, answer.digest))
