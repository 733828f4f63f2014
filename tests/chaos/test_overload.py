"""O1: ten times as much as the engine does. O2: thousands of streams that say nothing.

Goodput is compared by the engine's own clock, costs by the gateway's own CPU time: a busy machine changes neither.
"""

import asyncio
import random
import resource
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from adapter_store.base_model import BaseModel
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica
from tests.chaos.client import Answer, Client, request
from tests.chaos.conftest import Figure, NewClient
from tests.gateways import GatewayProcess, gateway_process, new_key
from tests.integration.gateway.conftest import BASE, RunGateway, RunReplica
from tests.waiting import until

AT_ONCE = 16
TENANTS = 8
WINDOW_S = 6.0
REJECTS = 2_000
STREAMS = 2_000
STREAM_LIMIT_BYTES = 40 << 10


@dataclass
class Crowd:
    """Clients who ask again as soon as they are answered, and a moment after they are refused."""

    engine: EngineModel
    tokens: int = 0
    """Of whole answers: what the engine did for those who left or failed is no goodput."""
    refused: Counter[int] = field(default_factory=Counter)
    requests: int = 0
    stopped: bool = False

    async def run(self, client: Client, key: str, seed: int, pause_s: float) -> None:
        chance = random.Random(seed)
        while not self.stopped:
            tokens, stream = chance.randint(10, 40), chance.random() < 0.5
            answer = await client.ask(key, BASE, stream=stream, tokens=tokens)
            self.requests += 1
            if answer.ending == "whole":
                self.tokens += tokens
            else:
                self._note(answer)
                await self._pause(pause_s)

    def _note(self, answer: Answer) -> None:
        assert answer.ending == "refused"
        assert int(answer.headers["retry-after"]) >= 1
        self.refused[answer.status] += 1

    async def _pause(self, seconds: float) -> None:
        """By the engine's clock: on a slow machine the crowd would be a larger one."""
        end_s = self.engine.now_s + seconds
        while (left_s := end_s - self.engine.now_s) > 0 and not self.stopped:
            await asyncio.sleep(left_s)

    async def goodput(self) -> float:
        """Tokens of whole answers in a second of the engine's."""
        await self._until(self.engine.now_s + WINDOW_S / 4)
        begin_s, before = self.engine.now_s, self.tokens
        await self._until(begin_s + WINDOW_S)
        return (self.tokens - before) / (self.engine.now_s - begin_s)

    async def _until(self, moment_s: float) -> None:
        async with asyncio.timeout(120):
            while self.engine.now_s < moment_s:
                await asyncio.sleep(0.01)


async def test_ten_times_the_capacity_takes_nothing_from_what_is_served(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, figure: Figure
) -> None:
    """At least 90 % of the goodput of just enough clients; who is refused is told when to come again."""
    # steps so long that a place is filled again within one, however busy the machine
    model = EngineModel(max_num_seqs=AT_ONCE, base_step_s=0.03, per_sequence_s=0.0003)
    gateway = await run_gateway(await run_replica(engine=model, keep_requests=False), queue_limit=2 * AT_ONCE)
    keys = [(await gateway.tenant(f"tenant-{number}")).key for number in range(TENANTS)]

    async def run(clients: int, pause_s: float) -> tuple[float, float, Crowd]:
        crowd = Crowd(model)
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(crowd.run(new_client(gateway.url), keys[number % TENANTS], number, pause_s))
            begin_s = model.now_s
            found = await crowd.goodput()
            offered = crowd.requests / (model.now_s - begin_s)
            crowd.stopped = True
        return found, offered, crowd

    peak, enough, calm = await run(2 * AT_ONCE, 0.0)
    goodput, offered, crowd = await run(10 * AT_ONCE, 0.5)
    figure(
        f"O1: goodput {goodput / peak:.1%} of {peak:.0f} tokens/s (engine's clock) at {offered / enough:.1f} times the "
        f"requests; refused: {dict(crowd.refused)}"
    )
    assert not calm.refused
    assert offered >= 10 * enough
    assert goodput >= 0.9 * peak
    assert set(crowd.refused) <= {429, 503}


# what it costs, in a process of its own


class Silent(FakeReplica):
    """Says one token and then nothing."""

    async def _fault(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if number == 1:
            await reader.read()
        return number == 1


async def cpu_of_a_reject(gateway: GatewayProcess, new_client: NewClient, waiting: int) -> float:
    """Seconds of CPU while so many requests wait, and no further one may; the better of two turns, for whoever else has
    the core in one takes the caches from it."""
    key = await new_key(gateway.url, gateway.operator_key())
    crowd = [new_client(gateway.url) for _ in range(waiting + 1 + 20)]
    answers = [await client.send(request(key, BASE)) for client in crowd]
    await until(lambda: sum(answer.framed for answer in answers) == 20)
    client, process = new_client(gateway.url), psutil.Process(gateway.pid)
    turns_s = []
    for _ in range(2):
        before = process.cpu_times()
        for _ in range(REJECTS):
            answer = await client.ask(key, BASE)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        after = process.cpu_times()
        turns_s.append(after.user + after.system - before.user - before.system)
    return min(turns_s) / REJECTS


async def test_a_reject_costs_the_same_however_many_wait(
    base_folder: Path, base: BaseModel, new_client: NewClient, figure: Figure, tmp_path: Path
) -> None:
    """In CPU time of the gateway: 16 times the queue is at most twice the cost (it is the same but for noise)."""
    replica = FakeReplica(base.fingerprint, base_name=BASE)
    replica.faults.hang_before_answer = True
    await replica.start()
    costs = []
    for waiting in (64, 1_024):
        settings = {
            "TAILOR_REPLICA_CONCURRENCY": "1",
            "TAILOR_QUEUE_LIMIT": str(waiting),
            "TAILOR_TENANT_QUEUE_LIMIT": str(2 * waiting),
            "TAILOR_QUEUE_TIMEOUT_S": "300",
        }
        async with gateway_process(base_folder, replica, tmp_path / str(waiting), **settings) as gateway:
            costs.append(await cpu_of_a_reject(gateway, new_client, waiting))
    await replica.stop()
    figure(f"O1: a reject costs {costs[0] * 1e6:.0f} µs of CPU with 64 waiting, {costs[1] * 1e6:.0f} µs with 1,024")
    assert costs[1] <= 2 * costs[0]
    assert replica.violations == []


async def test_streams_that_say_nothing_cost_little_memory(
    base_folder: Path, base: BaseModel, new_client: NewClient, figure: Figure, tmp_path: Path
) -> None:
    """2,000 of them on one gateway: at most 40 KB each of its resident memory, and they end with the replica's end."""
    with_descriptors(5 * STREAMS)
    replica = Silent(base.fingerprint, base_name=BASE, max_num_seqs=2 * STREAMS, keep_requests=False)
    await replica.start()
    async with gateway_process(base_folder, replica, tmp_path / "gateway") as gateway:
        key = await new_key(gateway.url, gateway.operator_key())
        process = psutil.Process(gateway.pid)
        await open_streams(gateway, new_client, key, 20)
        before = process.memory_info().rss
        streams = await open_streams(gateway, new_client, key, STREAMS)
        each = (process.memory_info().rss - before) / STREAMS
        figure(f"O2: {STREAMS} idle streams: {each / 1_024:.1f} KiB each, {before >> 20} MiB without them")
        assert each <= STREAM_LIMIT_BYTES
        await replica.stop()
        for client, answer in streams:
            await client.until(answer)
            assert answer.ending == "error event"
    assert replica.violations == []


async def open_streams(
    gateway: GatewayProcess, new_client: NewClient, key: str, count: int
) -> list[tuple[Client, Answer]]:
    """Streams whose first event has come."""
    opened = []
    for number in range(count):
        client = new_client(gateway.url)
        opened.append((client, await client.send(request(key, BASE, stream=True), stream=True)))
        if number % 100 == 99:  # a listener's queue is short
            await client.until(opened[-1][1], events=1)
    for client, answer in opened:
        await client.until(answer, events=1)
    return opened


def with_descriptors(count: int) -> None:
    """Clients and replica are in this process; the gateway inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
