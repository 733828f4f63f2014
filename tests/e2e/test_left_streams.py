"""Streams that their clients leave: the ledger has what a real vLLM says that it has computed."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.client import DIALECTS, Answer, Client, request
from tests.e2e.conftest import RealStack

EVENTS = (3, 5, 8, 13, 30)
"""After so many of them a client leaves; the first ones of the Responses and the Messages API say nothing yet."""
TOKENS = 400


@dataclass(frozen=True)
class Tokens:
    """Of prompts and answers."""

    prompt: int
    completion: int


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_streams_that_are_left_are_counted_as_their_engine_counts_them(
    stack: RealStack, adapters: list[Path], dialect: str
) -> None:
    """To the token, though several are left at once and some tokens are no event: half a character says nothing."""
    key = stack.new_tenant(f"leaver-{dialect}")
    stack.push(adapters[0], "bot", key)  # few of its answers end by themselves
    assert (await leave(stack, key, dialect, 1)).status == 200
    before = await of_quiet_engine(stack)
    first = await of_ledger(stack, key, requests=1)
    answers = await asyncio.gather(*(leave(stack, key, dialect, events) for events in EVENTS))
    assert sum(answer.framed for answer in answers) < len(EVENTS) / 2
    used = await of_ledger(stack, key, requests=1 + len(EVENTS))
    after = await of_quiet_engine(stack)
    assert (used.prompt - first.prompt, used.completion - first.completion) == (
        after.prompt - before.prompt,
        after.completion - before.completion,
    )


async def leave(stack: RealStack, key: str, dialect: str, events: int) -> Answer:
    """A stream's answer so far."""
    client = Client(stack.url)
    try:
        data = request(key, "bot", dialect=dialect, stream=True, tokens=TOKENS, temperature=1.0)
        return await client.until(await client.send(data, dialect=dialect, stream=True), events=events)
    finally:
        client.leave()


async def of_ledger(stack: RealStack, key: str, *, requests: int) -> Tokens:
    """Once so many requests are there."""
    async with asyncio.timeout(30):
        while True:
            with stack.client(key) as client:
                rows = client.get("/v1/usage").json()["data"]
            if sum(row["requests"] for row in rows) >= requests:
                return Tokens(sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows))
            await asyncio.sleep(0.1)


async def of_quiet_engine(stack: RealStack) -> Tokens:
    """Once nothing but probes has been computed for two seconds: a new version is proved in the background."""
    last = of_engine(stack)
    async with asyncio.timeout(60):
        while True:
            await asyncio.sleep(2)
            now = of_engine(stack)
            if now == last:
                return now
            last = now


def of_engine(stack: RealStack) -> Tokens:
    """What vLLM's metrics say, less the probes, which alone ask for one token: it has one, and one of prompt."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(stack.of_replica("/metrics")):
        for sample in family.samples:
            found[f"{sample.name} {sample.labels.get('le', '')}"] = sample.value
    probes = found["vllm:request_params_max_tokens_bucket 1.0"]
    return Tokens(
        int(found["vllm:prompt_tokens_total "] - probes), int(found["vllm:generation_tokens_total "] - probes)
    )
