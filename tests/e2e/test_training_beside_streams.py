"""What four tenants' jobs on the same machine cost eight streams, on a real vLLM and a real worker."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import openai
import pytest

from tests.e2e.conftest import RealStack, real_stack
from tests.e2e.test_fine_tuning import jsonl
from training.tasks import jargon

STREAMS: Final = 8
TOKENS: Final = 32
ALONE_S: Final = 30.0
TERMS: Final = 6
EPOCHS: Final = 10  # of three steps each


@pytest.fixture(scope="module")
def as_shipped(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStack]:
    """`tailor up` as it is without settings: the worker stands back behind the engine."""
    with real_stack(tiny_base, tmp_path_factory.mktemp("as-shipped") / "home") as stack:
        yield stack


@dataclass
class Streams:
    """Eight streams at a time, each begun again as soon as it ends; times in seconds."""

    client: openai.AsyncOpenAI
    model: str
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For as long as the block lasts, and until the streams that have begun end."""
        stop = asyncio.Event()
        streams = [asyncio.create_task(self._one(number, stop)) for number in range(STREAMS)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*streams)

    async def _one(self, number: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self._stream(number)
            except openai.OpenAIError as error:
                self.failures.append(repr(error))

    async def _stream(self, number: int) -> None:
        sent = last = time.monotonic()
        stream = await self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": f"Repeat: red rapid heavy spare night rented quiet iron {number}"}],
            max_tokens=TOKENS,
            stream=True,
        )
        tokens, why = 0, None
        async for event in stream:
            now = time.monotonic()
            if event.choices and event.choices[0].delta.content:
                (self.gaps if tokens else self.first).append(now - (last if tokens else sent))
                last, tokens = now, tokens + 1
            why = (event.choices[0].finish_reason if event.choices else None) or why
        if not tokens or why not in ("stop", "length"):
            self.failures.append(f"ended after {tokens} pieces: {why}")

    def told(self) -> str:
        first, gap = (statistics.quantiles(times, n=100) for times in (self.first, self.gaps))
        return (
            f"{len(self.first)} streams; first token p50 {first[49] * 1e3:.0f} ms, p99 {first[98] * 1e3:.0f} ms; "
            f"between two tokens p50 {gap[49] * 1e3:.1f} ms, p99 {gap[98] * 1e3:.1f} ms"
        )


@pytest.mark.full
@pytest.mark.timeout(1_200)
async def test_four_tenants_are_trained_while_eight_streams_are_served(as_shipped: RealStack) -> None:
    """No request fails and every job succeeds; what it costs the streams is printed, for docs/benchmarks.md."""
    stack = as_shipped
    async with AsyncExitStack() as held:

        async def client_of(name: str) -> openai.AsyncOpenAI:
            key = await asyncio.to_thread(stack.new_tenant, name)
            return await held.enter_async_context(
                openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0, timeout=120)
            )

        reader = await client_of("reader")
        tenants = [await client_of(f"trained-{number}") for number in range(4)]
        warm, alone, beside = (Streams(reader, stack.base.name) for _ in range(3))
        async with warm.running():
            await asyncio.sleep(3)
        assert warm.failures == []
        async with alone.running():
            await asyncio.sleep(ALONE_S)  # as long as it is measured
        began = time.monotonic()
        async with beside.running(), asyncio.timeout(600):
            await asyncio.gather(*(_train(client, seed, stack.base.name) for seed, client in enumerate(tenants)))
        took_s = time.monotonic() - began
    print(f"\nalone: {alone.told()}\nwith four jobs, for {took_s:.0f} s: {beside.told()}")  # noqa: T201
    assert alone.failures == beside.failures == []


async def _train(client: openai.AsyncOpenAI, seed: int, base: str) -> None:
    file = await client.files.create(file=("jargon.jsonl", jsonl(jargon(seed, TERMS).train)), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        seed=seed,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": 8}}},
    )
    while job.status in ("queued", "running"):
        await asyncio.sleep(0.5)
        job = await client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
