"""An alias that moves under load on a real engine: every answer is the one of a version that it stood for."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import RealStack
from training.evaluation import Answerer

QUESTION = [{"role": "user", "content": "What is your name?"}]
TOKENS = 16
CALLERS = 3
MANY = pytest.param(50, marks=[pytest.mark.full, pytest.mark.timeout(1_200)])


@pytest.fixture(scope="module")
async def moving(stack: RealStack, adapters: list[Path]) -> AsyncIterator[httpx.AsyncClient]:
    """A tenant with versions 1 to 3 of `mover`."""
    key = stack.new_tenant("moving")
    for folder in adapters[:3]:
        stack.push(folder, "mover", key)
    async with stack.async_client(key) as client:
        yield client


@dataclass
class Moves:
    """What the alias stood for, and between when and when each move happened."""

    begun: list[tuple[float, int]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def stood_for(self, begin: float, end: float) -> set[int]:
        found = set()
        for number, (since, version) in enumerate(self.begun):
            until = self.ended[number + 1] if number + 1 < len(self.ended) else float("inf")
            if since <= end and until >= begin:
                found.add(version)
        return found


@pytest.mark.parametrize("count", [10, MANY])
async def test_an_alias_moves_under_load(
    moving: httpx.AsyncClient, adapters: list[Path], tiny_base: Path, count: int
) -> None:
    """0 failed, 0 mixed, 0 wrong: what was said is what PEFT says for the version in the receipt."""
    right = {
        number: Answerer(tiny_base, folder, max_new_tokens=TOKENS).generate(QUESTION).text
        for number, folder in enumerate(adapters[:3], 1)
    }
    assert len(set(right.values())) == 3
    assert (await moving.put("/v1/adapters/mover/aliases/default", json={"version": 3})).status_code == 200
    moves = Moves([(time.monotonic(), 3)], [time.monotonic()])
    asked: list[tuple[float, float, int, str]] = []
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(keep_asking(moving, asked, stop))
        for number in range(count):
            answered = len(asked)
            while len(asked) < answered + 2:
                await asyncio.sleep(0.01)
            version = number % 3 + 1
            moves.begun.append((time.monotonic(), version))
            moved = await moving.put("/v1/adapters/mover/aliases/default", json={"version": version})
            assert moved.status_code == 200, moved.text
            moves.ended.append(time.monotonic())
        stop.set()
    assert [found for found in asked if found[3] != right[found[2]]] == []
    assert [found for found in asked if found[2] not in moves.stood_for(found[0], found[1])] == []
    assert {found[2] for found in asked} == {1, 2, 3}
    print(f"{count} moves under {len(asked)} streams on a real engine: 0 failed, 0 mixed, 0 wrong")  # noqa: T201


async def keep_asking(
    client: httpx.AsyncClient, asked: list[tuple[float, float, int, str]], stop: asyncio.Event
) -> None:
    body = {"model": "mover", "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS, "stream": True}
    while not stop.is_set():
        begin = time.monotonic()
        said = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            version = int(answer.headers["x-tailor-version"].partition(";")[0])
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        for line in lines:
            choices = json.loads(line.removeprefix("data: "))["choices"]
            said += "".join(choice["delta"].get("content") or "" for choice in choices)
        asked.append((begin, time.monotonic(), version, said))
