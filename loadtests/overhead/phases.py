"""The loads: a closed loop of small requests, streams one at a time, many streams in lockstep."""

import asyncio
import statistics
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from loadtests.overhead.client import Pool, Reply, Target, now
from loadtests.overhead.processes import cpu_ns

CONNECTIONS: Final = 16
STREAMS: Final = 64
SLOW_STEP_US: Final = 20_000
FAST_STEP_US: Final = 5_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One phase against one target; an operation is a request or a chunk, `p50_us` and `p99_us` its latency."""

    operations: int
    failed: int
    per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Length:
    """How long each phase takes."""

    seconds: float
    first_tokens: int


async def closed_loop(target: Target, seconds: float, connections: int = CONNECTIONS) -> Sample:
    """As many small requests, not streamed, as the connections can carry."""
    data = target.request(max_tokens=16)
    replies: list[Reply] = []
    async with Pool(target) as pool:
        await pool.warm(connections)
        begin = now()
        stop = begin + int(seconds * 1e9)

        async def work() -> None:
            while now() < stop:
                replies.append(await pool.ask(data))

        await asyncio.gather(*(work() for _ in range(connections)))
        took_s = (now() - begin) / 1e9
    return _sample(replies, len(replies), took_s, [reply.end - reply.begin for reply in replies])


async def first_token(target: Target, count: int) -> Sample:
    """Time to the first chunk, one stream at a time; the upstream answers at once."""
    data = target.request(stream=True, max_tokens=2, seed=0)
    async with Pool(target) as pool:
        await pool.ask(data, stream=True)
        begin = now()
        replies = [await pool.ask(data, stream=True) for _ in range(count)]
        took_s = (now() - begin) / 1e9
    return _sample(replies, count, took_s, [reply.first - reply.begin for reply in replies if reply.first])


async def streams(target: Target, step_us: int, seconds: float, concurrent: int = STREAMS) -> Sample:
    """Concurrent streams of a chunk each `step_us`; latency is each chunk's, the first's left out."""
    chunks = max(16, int(seconds * 1e6 / step_us))
    data = target.request(stream=True, max_tokens=chunks, seed=step_us)
    async with Pool(target) as pool:
        await pool.warm(concurrent)
        begin = now()
        replies = await asyncio.gather(*(pool.ask(data, stream=True) for _ in range(concurrent)))
        took_s = (now() - begin) / 1e9
    got = sum(len(reply.lags) for reply in replies)
    return _sample(replies, got, took_s, [lag for reply in replies for lag in reply.lags[1:]])


def _sample(replies: Sequence[Reply], operations: int, took_s: float, latencies_ns: list[int]) -> Sample:
    ordered = sorted(latencies_ns) or [0]
    return Sample(
        operations=operations,
        failed=sum(not reply.ok for reply in replies),
        per_s=operations / took_s,
        p50_us=ordered[len(ordered) // 2] / 1e3,
        p99_us=ordered[int(len(ordered) * 0.99)] / 1e3,
    )


async def with_cpu(pids: Collection[int], load: Awaitable[Sample]) -> Sample:
    """The load's sample with what the processes spent on each operation."""
    before = cpu_ns(pids)
    sample = await load
    spent_us = (cpu_ns(pids) - before) / 1e3
    return Sample(
        sample.operations, sample.failed, sample.per_s, sample.p50_us, sample.p99_us,
        cpu_us=spent_us / max(1, sample.operations),
    )  # fmt: skip


async def all_phases(targets: Sequence[tuple[Target, Collection[int]]], length: Length) -> dict[str, dict[str, Sample]]:
    """One round: each phase visits every target before the next begins; phase → target's name → sample."""
    for target, _ in targets:
        await closed_loop(target, 0.2, 4)
    out: dict[str, dict[str, Sample]] = {}
    for phase in ("requests", "first_token", "slow_streams", "fast_streams"):
        out[phase] = {}
        for target, pids in targets:
            out[phase][target.name] = await with_cpu(pids, _load(phase, target, length))
            await asyncio.sleep(0.05)
    return out


def _load(phase: str, target: Target, length: Length) -> Awaitable[Sample]:
    if phase == "requests":
        return closed_loop(target, length.seconds)
    if phase == "first_token":
        return first_token(target, length.first_tokens)
    step_us = SLOW_STEP_US if phase == "slow_streams" else FAST_STEP_US
    return streams(target, step_us, length.seconds)


def median(rounds: Sequence[dict[str, dict[str, Sample]]]) -> dict[str, dict[str, Sample]]:
    """Of every number over the rounds; failures add up."""
    return {
        phase: {name: _median([one[phase][name] for one in rounds]) for name in rounds[0][phase]} for phase in rounds[0]
    }


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        operations=sum(sample.operations for sample in samples),
        failed=sum(sample.failed for sample in samples),
        per_s=statistics.median(sample.per_s for sample in samples),
        p50_us=statistics.median(sample.p50_us for sample in samples),
        p99_us=statistics.median(sample.p99_us for sample in samples),
        cpu_us=statistics.median(sample.cpu_us for sample in samples),
    )
