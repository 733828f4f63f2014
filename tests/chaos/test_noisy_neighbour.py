"""A tenant that asks for twenty times its share, seen by the others through the whole of HTTP.

Latencies are by the engine's own clock: a busy machine changes little of them.
"""

import asyncio
import math
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.fake.engine import EngineModel
from loadtests.store.report import percentile
from tests.chaos.client import Client
from tests.chaos.conftest import Figure, NewClient
from tests.gateways import gateway_process, new_key
from tests.integration.gateway.conftest import BASE, RunReplica
from tests.waiting import until

PLACES = 40
CALM = 4
SHARE = PLACES // (CALM + 1)
FLOOD = 20 * SHARE
CALM_TOKENS, FLOOD_TOKENS = 12, 200
PAUSE_S, SETTLE_S, WINDOW_S = 0.05, 1.5, 4.0
TRIES = 3


@dataclass
class Tenants:
    """Callers that ask again when they are answered."""

    engine: EngineModel
    took_s: list[float] = field(default_factory=list)
    """Of the calm ones' answers."""
    asked_s: dict[str, float] = field(default_factory=dict)
    """When the calm ones' last requests began."""
    flood: int = 0
    """Answers of the flood."""

    async def ask_calmly(self, client: Client, key: str) -> None:
        while True:
            self.asked_s[key] = self.engine.now_s
            answer = await client.ask(key, BASE, tokens=CALM_TOKENS)
            assert answer.ending == "whole"
            self.took_s.append(self.engine.now_s - self.asked_s.pop(key))
            await asyncio.sleep(PAUSE_S)

    async def ask_on(self, client: Client, key: str) -> None:
        while True:
            answer = await client.ask(key, BASE, tokens=FLOOD_TOKENS)
            assert answer.ending == "whole"
            self.flood += 1

    def p99_s(self) -> float:
        """Those that still wait have taken as long as they have waited."""
        return percentile([*self.took_s, *(self.engine.now_s - asked_s for asked_s in self.asked_s.values())], 0.99)


async def calm_p99_s(
    base_folder: Path,
    run_replica: RunReplica,
    new_client: NewClient,
    folder: Path,
    *,
    flood: int,
    fairness: bool = True,
) -> float:
    """p99 of four calm tenants beside a flood of so many callers with long answers."""
    engine = EngineModel(max_num_seqs=PLACES, base_step_s=0.01, per_sequence_s=0.0001)
    settings = {"TAILOR_FAIRNESS": "true" if fairness else "false", "TAILOR_QUEUE_TIMEOUT_S": "120"}
    replica = await run_replica(engine=engine, keep_requests=False)
    async with gateway_process(base_folder, replica, folder, **settings) as gateway:
        operator = gateway.operator_key()
        keys = [await new_key(gateway.url, operator, f"calm-{number}") for number in range(CALM)]
        flooding = await new_key(gateway.url, operator, "flood")
        tenants = Tenants(engine)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(tenants.ask_calmly(new_client(gateway.url), key)) for key in keys]
            await until(lambda: len(tenants.took_s) > 2 * CALM)
            tasks += [group.create_task(tenants.ask_on(new_client(gateway.url), flooding)) for _ in range(flood)]
            begin_s = engine.now_s
            await until(lambda: engine.now_s > begin_s + SETTLE_S, deadline_s=60)
            tenants.took_s.clear()
            await until(lambda: engine.now_s > begin_s + SETTLE_S + WINDOW_S, deadline_s=120)
            p99_s = tenants.p99_s()
            for task in tasks:
                task.cancel()
        assert (tenants.flood > 0) == (flood > 0)
    return p99_s


async def test_a_neighbour_at_twenty_times_its_share_is_not_felt(
    base_folder: Path, run_replica: RunReplica, new_client: NewClient, figure: Figure, tmp_path: Path
) -> None:
    """Others' p99 is at most 1.5 times what it is alone; with fairness off it is far more."""

    async def p99_s(name: str, *, flood: int, fairness: bool = True) -> float:
        return await calm_p99_s(base_folder, run_replica, new_client, tmp_path / name, flood=flood, fairness=fairness)

    alone_s = await p99_s("alone", flood=0)
    beside_s = math.inf
    for number in range(TRIES):  # a stall of the gateway's process is no neighbour's doing
        beside_s = min(beside_s, await p99_s(f"beside-{number}", flood=FLOOD))
        if beside_s <= 1.5 * alone_s:
            break
    unfair_s = await p99_s("unfair", flood=FLOOD, fairness=False)
    figure(
        f"noisy neighbour at 20 times its share: others' p99 {beside_s / alone_s:.2f} times what it is alone "
        f"({alone_s * 1e3:.0f} ms); {unfair_s / alone_s:.1f} times with fairness off"
    )
    assert beside_s <= 1.5 * alone_s
    assert unfair_s > 3 * alone_s
