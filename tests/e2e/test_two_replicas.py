"""Two real replicas behind one gateway: many adapters over few slots, a cold one beside busy ones, kills and freezes.

Behind `-m full`: two engines on two cores take minutes. Each figure is printed.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import RealStack, real_stack
from tests.gateways import GatewayProcess, until_ready
from tests.ports import free_port
from training.evaluation import Answerer

pytestmark = [pytest.mark.full, pytest.mark.timeout(1_200)]

SLOTS = 2  # of each replica: four in all
QUESTION = [{"role": "user", "content": "What is your name?"}]
ANSWER_TOKENS = 24
LONG = 400  # of tokens, and no fewer: nothing of what is under way has ended when a replica dies
WHOLE = 4
REQUESTS = 300
CALLERS = 8
HOT_CALLERS = 4  # of each hot adapter
STRETCH_S = 20.0
BOUND_S = 5.0


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStack]:
    settings = {"TAILOR_LOCAL_REPLICAS": "2", "TAILOR_ADAPTER_SLOTS": str(SLOTS), "TAILOR_HOST_ADAPTERS": "12"}
    with real_stack(tiny_base, tmp_path_factory.mktemp("pair") / "home", **settings) as stack:
        until_replicas(stack, 2, 240)
        yield stack


@pytest.fixture(scope="module")
def key(pair: RealStack) -> str:
    return pair.new_tenant("acme")


@pytest.fixture(scope="module")
def right(pair: RealStack, key: str, adapters: list[Path], tiny_base: Path) -> dict[str, str]:
    """Twelve adapters, published; each with the answer that PEFT gives."""
    answers = {}
    for number, folder in enumerate(adapters):
        pair.tailor("adapter", "push", str(folder), "--name", f"bot-{number}", key=key)
        answers[f"bot-{number}"] = Answerer(tiny_base, folder, max_new_tokens=ANSWER_TOKENS).generate(QUESTION).text
    assert len(set(answers.values())) == len(answers)
    return answers


def until_replicas(stack: RealStack, count: int, deadline_s: float) -> float:
    """Wait until so many replicas are ready; how long it took, in seconds."""
    begin = time.monotonic()
    while time.monotonic() - begin < deadline_s:
        if httpx.get(f"{stack.url}/ready", timeout=10).json()["replicas_ready"] == count:
            return time.monotonic() - begin
        time.sleep(0.05)
    raise AssertionError(f"not {count} replicas after {deadline_s} s")


@dataclass
class Caller:
    """Asks the gateway and remembers what was wrong."""

    http: httpx.AsyncClient
    right: dict[str, str]
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0

    async def ask(
        self, model: str, max_tokens: int = ANSWER_TOKENS, timeout_s: float = 120, least: int = 0
    ) -> httpx.Response:
        body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": max_tokens, "min_tokens": least}
        answer = await self.http.post("/v1/chat/completions", json=body, timeout=timeout_s)
        if answer.status_code == 200:
            told = answer.json()
            self.tokens += told["usage"]["completion_tokens"]
            said = told["choices"][0]["message"]["content"]
            expected = self.right[model]
            # of two lengths one is the beginning of the other; half a character at a cut is the tokenizer's own
            shorter, longer = sorted((said.rstrip("\ufffd"), expected.rstrip("\ufffd")), key=len)
            if not longer.startswith(shorter) or (max_tokens == ANSWER_TOKENS and said != expected):
                self.wrong.append(model)
        return answer


@asynccontextmanager
async def calling(url: str, key: str, right: dict[str, str]) -> AsyncIterator[Caller]:
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits) as http:
        yield Caller(http, right)


@pytest.mark.parametrize("traffic", ["uniform", "zipf"])
async def test_twelve_adapters_over_four_slots_answer_as_themselves(
    pair: RealStack, key: str, right: dict[str, str], traffic: str
) -> None:
    """0 wrong fingerprints, 0 failures, evenly and with a few hot ones."""
    models = list(right)
    weights = [1.0 if traffic == "uniform" else 1 / (rank + 1) for rank in range(len(models))]
    asks = random.Random(7).choices(models, weights, k=REQUESTS)
    begin = time.monotonic()
    async with calling(pair.url, key, right) as caller:
        gate = asyncio.Semaphore(CALLERS)

        async def one(model: str) -> int:
            async with gate:
                return (await caller.ask(model)).status_code

        statuses = await asyncio.gather(*(one(model) for model in asks))
    print(f"{traffic}: {REQUESTS} requests in {time.monotonic() - begin:.1f} s, {len(caller.wrong)} wrong")  # noqa: T201
    assert set(statuses) == {200}
    assert caller.wrong == []


@asynccontextmanager
async def busy(caller: Caller, models: Sequence[str]) -> AsyncIterator[None]:
    """Keep adapters busy with requests of mixed lengths until the block ends."""
    enough = asyncio.Event()
    lengths = random.Random(3)

    async def go_on(model: str) -> None:
        while not enough.is_set():
            answer = await caller.ask(model, lengths.randrange(8, 64))
            assert answer.status_code == 200, answer.text

    async with asyncio.TaskGroup() as group:
        for model in models:
            for _ in range(HOT_CALLERS):
                group.create_task(go_on(model))
        try:
            yield
        finally:
            enough.set()


async def stretch(
    url: str, key: str, right: dict[str, str], cold: Sequence[str]
) -> tuple[float, list[float], list[str]]:
    """Four hot adapters, now and then a cold one: tokens/s of the hot, seconds of each cold one, what was wrong."""
    waits = []
    async with calling(url, key, right) as hot, calling(url, key, right) as others:
        async with busy(hot, [f"bot-{number}" for number in range(4)]):
            await asyncio.sleep(2)
            before, begin = hot.tokens, time.monotonic()
            for model in cold:
                await asyncio.sleep(STRETCH_S / (len(cold) + 1))
                asked = time.monotonic()
                try:
                    answer = await others.ask(model, timeout_s=STRETCH_S / (len(cold) + 1))
                    waits.append(time.monotonic() - asked if answer.status_code == 200 else float("inf"))
                except httpx.ReadTimeout:
                    waits.append(float("inf"))
            await asyncio.sleep(max(0.0, STRETCH_S - (time.monotonic() - begin)))
            rate = (hot.tokens - before) / (time.monotonic() - begin)
        return rate, waits, hot.wrong + others.wrong


@asynccontextmanager
async def without_rotation(pair: RealStack) -> AsyncIterator[GatewayProcess]:
    """A second gateway on the same replicas, whose adapter slots do not rotate."""
    sockets = sorted({argument for process in pair.descendants() for argument in uds_of(process)})
    settings = {
        "TAILOR_BASE_MODEL": str(pair.base),
        "TAILOR_REPLICAS": ",".join(f"unix:{path}" for path in sockets),
        "TAILOR_OPERATOR_PORT": "0",
        "TAILOR_ADAPTER_QUANTUM_S": "0",
    }
    gateway = GatewayProcess(free_port(), pair.home, settings, pair.home / "no-rotation.log")
    await gateway.start()
    try:
        await until_ready(gateway.url)
        yield gateway
    finally:
        await gateway.stop()


def uds_of(process: psutil.Process) -> list[str]:
    command = process.cmdline()
    return [command[command.index("--uds") + 1]] if "--uds" in command else []


async def test_a_cold_adapter_beside_busy_ones_is_answered_within_the_bound(
    pair: RealStack, key: str, right: dict[str, str]
) -> None:
    """Every cold one within 5 s; the hot ones lose at most 15 % of what they have where slots do not rotate.

    The bound for the first in line: quantum + drain + load + its own answer, with a quantum of 1 s.
    """
    rates: dict[str, list[float]] = {"on": [], "off": []}
    cold = [f"bot-{number}" for number in range(4, 10)]
    async with without_rotation(pair) as fixed:
        waits: list[float] = []
        for turn in range(3):
            for name, url in (("on", pair.url), ("off", fixed.url)):
                rate, waited, wrong = await stretch(url, key, right, cold[turn * 2 : turn * 2 + 2])
                rates[name].append(rate)
                assert wrong == []
                print(f"rotation {name}: {rate:.0f} hot tokens/s, cold answered after {waited} s")  # noqa: T201
                if name == "on":
                    waits += waited
    kept = sum(rates["on"]) / sum(rates["off"])
    print(f"hot throughput kept: {kept:.2f}; longest cold wait {max(waits):.2f} s")  # noqa: T201
    assert max(waits) <= BOUND_S
    assert kept >= 0.85


def engines(pair: RealStack) -> list[psutil.Process]:
    return sorted(
        (process for process in pair.descendants() if "EngineCore" in " ".join(process.cmdline())),
        key=lambda process: process.pid,
    )


async def test_a_frozen_engine_leaves_rotation_within_5_s(pair: RealStack, key: str, right: dict[str, str]) -> None:
    """SIGSTOP: `/health` still says 200, no token comes; requests go on at the other replica."""
    frozen = [engines(pair)[0], *engines(pair)[0].children(recursive=True)]
    for process in frozen:
        process.suspend()
    try:
        took_s = await asyncio.to_thread(until_replicas, pair, 1, 30)
        async with calling(pair.url, key, right) as caller:
            for model in right:
                assert (await caller.ask(model)).status_code == 200
            assert caller.wrong == []
    finally:
        for process in frozen:
            process.resume()
    back_s = await asyncio.to_thread(until_replicas, pair, 2, 60)
    print(f"frozen engine out of rotation after {took_s:.2f} s, back {back_s:.2f} s after it thawed")  # noqa: T201
    assert took_s <= 5.5  # 5 s, and what this test takes to see it


@pytest.mark.parametrize("part", ["engine", "server"])
async def test_a_killed_replica_fails_no_unstarted_request(
    pair: RealStack, key: str, right: dict[str, str], part: str
) -> None:
    """kill -9 of its engine, or of its API server, with answers under way.

    Whole ones, of which nobody has heard anything, are answered by the other replica; its streams end in one error
    event; those of the other one go on to their end; the replica comes back.
    """
    await asyncio.to_thread(until_replicas, pair, 2, 180)
    async with calling(pair.url, key, right) as caller, asyncio.timeout(300):
        await a_busy_while(caller)
        victim, other = await replica_ids(pair)
        streams, tasks = [], []
        for spared in (victim, other):
            async with drained(pair, spared):
                part_of = [Stream(f"bot-{number % SLOTS}") for number in range(WHOLE)]
                tasks += [asyncio.create_task(stream.run(caller.http)) for stream in part_of]
                for stream in part_of:
                    await stream.begun.wait()
                streams += part_of
                if spared == other:
                    whole = [
                        asyncio.create_task(caller.ask(f"bot-{number % SLOTS}", LONG, least=LONG))
                        for number in range(WHOLE)
                    ]
                    server = await server_of(pair, victim)
                    while await asyncio.to_thread(in_flight, pair, server) < 2 * WHOLE:
                        assert [task.result() for task in (*whole, *tasks) if task.done()] == []
        assert [stream.replica for stream in streams] == [other] * WHOLE + [victim] * WHOLE
        killed = server if part == "server" else engine_of(server)
        os.kill(killed.pid, signal.SIGKILL)
        statuses = [(await caller.ask(f"bot-{number % SLOTS}")).status_code for number in range(40)]
        answers = await asyncio.gather(*whole)
        await asyncio.gather(*tasks)
    refused = [status for status in statuses if status != 200]
    ends = {side: [stream.end for stream in streams if (stream.replica == victim) is side] for side in (True, False)}
    print(  # noqa: T201
        f"after kill -9 of the {part}: {WHOLE} whole answers under way there "
        f"{[answer.status_code for answer in answers]}, {len(refused)} of 40 further requests refused {refused}; its "
        f"streams ended {ends[True]}, the other's {ends[False]}"
    )
    assert [answer.status_code for answer in answers] == [200] * WHOLE
    assert victim not in {answer.headers["x-tailor-replica"] for answer in answers}
    assert caller.wrong == []
    assert len(refused) <= 1  # one may have been with the replica in the instant of its death
    assert set(ends[True]) == {"error"}
    assert set(ends[False]) == {"done"}
    back_s = await asyncio.to_thread(until_replicas, pair, 2, 180)
    print(f"the killed {part} takes requests again after {back_s:.0f} s")  # noqa: T201
    assert (await server_of(pair, victim)).pid != server.pid  # its agent ends with its engine


async def a_busy_while(caller: Caller) -> None:
    """So many requests that a tenth of them, the budget of second tries, is more than this test needs."""
    gate = asyncio.Semaphore(CALLERS)

    async def one(number: int) -> None:
        async with gate:
            assert (await caller.ask(f"bot-{number % SLOTS}", 1)).status_code == 200

    await asyncio.gather(*(one(number) for number in range(20 * WHOLE)))


async def replica_ids(pair: RealStack) -> list[str]:
    async with pair.async_client(pair.operator_key) as client:
        return [replica["id"] for replica in (await client.get("/admin/v1/replicas")).json()["data"]]


@asynccontextmanager
async def drained(pair: RealStack, replica: str) -> AsyncIterator[None]:
    """No request begins on it until the block ends."""

    async def become(verb: str, *states: str) -> None:
        assert (await client.post(f"/admin/v1/replicas/{replica}/{verb}")).status_code == 200
        while (await client.get(f"/admin/v1/replicas/{replica}")).json()["state"] not in states:
            await asyncio.sleep(0.05)

    async with pair.async_client(pair.operator_key) as client:
        await become("drain", "draining", "drained")
        yield
        await become("resume", "ready")


async def server_of(pair: RealStack, replica: str) -> psutil.Process:
    """The API server of a replica, by the id that answers carry."""
    async with pair.async_client(pair.operator_key) as client:
        url: str = (await client.get(f"/admin/v1/replicas/{replica}")).json()["url"]
    (found,) = [process for process in servers(pair) if url.removeprefix("unix:") in uds_of(process)]
    return found


def servers(pair: RealStack) -> list[psutil.Process]:
    return [process for process in psutil.Process(pair.process.pid).children() if uds_of(process)]


def engine_of(server: psutil.Process) -> psutil.Process:
    (found,) = [child for child in server.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    return found


def in_flight(pair: RealStack, server: psutil.Process) -> int:
    """How many requests a replica has, as its agent says."""
    count: int = pair.replica_state(uds_of(server)[0])["in_flight"]
    return count


@dataclass
class Stream:
    """One long streamed answer, and how it ended: in `[DONE]`, or in exactly one error event."""

    model: str
    replica: str = ""
    end: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, http: httpx.AsyncClient) -> None:
        body = {"model": self.model, "messages": QUESTION, "stream": True, "max_tokens": LONG, "min_tokens": LONG}
        events = []
        async with http.stream("POST", "/v1/chat/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            self.replica = answer.headers["x-tailor-replica"]
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    self.begun.set()
        errors = [event for event in events if event.startswith('{"error"')]
        if events[-1] == "[DONE]":
            assert errors == []
            self.end = "done"
        else:
            assert errors == [events[-1]], json.dumps(events[-2:])
            self.end = "error"
