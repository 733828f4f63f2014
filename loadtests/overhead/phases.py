"""The loads: a closed loop of small requests, streams one at a time, many streams in lockstep."""

import asyncio
import os
import statistics
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loadtests.overhead.client import Pool, Reply, Target, now
from loadtests.overhead.processes import Others, cpu_ns, listeners

CONNECTIONS: Final = 16
STREAMS: Final = 64
SLOW_STEP_US: Final = 20_000
FAST_STEP_US: Final = 5_000
PHASES: Final = ("requests", "first_token", "slow_streams", "fast_streams")


@dataclass(frozen=True, slots=True)
class Sample:
    """One phase against one target; an operation is a request or a chunk, `p50_us` and `p99_us` its latency.

    `others`: share of the two cores' time that went to processes which have no part in this.
    """

    operations: int
    failed: int
    per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float = 0.0
    others: float = 0.0


Round = dict[str, dict[str, Sample]]
"""Phase → target's name → sample."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A target, the processes whose CPU is its own, and all that take part when it is asked."""

    target: Target
    own: frozenset[int]
    taking_part: frozenset[int]
    cores: frozenset[int]


def watch(targets: Sequence[Target], cores: Collection[int]) -> list[Watched]:
    """Find the targets' processes; the first target is the upstream of the others, `cores` is where all of them run."""
    own = [frozenset(listeners(target.port)) for target in targets]
    return [
        Watched(target, pids, pids | own[0] | {os.getpid()}, frozenset(cores))
        for target, pids in zip(targets, own, strict=True)
    ]


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


async def with_cpu(watched: Watched, load: Awaitable[Sample]) -> Sample:
    """The load's sample with what the target's processes spent on each operation, and how busy others were."""
    others, own = Others(watched.cores, lambda: cpu_ns(watched.taking_part)), cpu_ns(watched.own)
    sample = await load
    own_ns = cpu_ns(watched.own) - own
    return replace(sample, cpu_us=own_ns / 1e3 / max(1, sample.operations), others=others.share())


async def all_phases(targets: Sequence[Watched], length: Length) -> Round:
    """One round: each phase visits every target before the next begins."""
    for watched in targets:
        await closed_loop(watched.target, 0.2, 4)
    out: Round = {}
    for phase in PHASES:
        out[phase] = {}
        for watched in targets:
            out[phase][watched.target.name] = await with_cpu(watched, _load(phase, watched.target, length))
            await asyncio.sleep(0.05)
    return out


def _load(phase: str, target: Target, length: Length) -> Awaitable[Sample]:
    if phase == "requests":
        return closed_loop(target, length.seconds)
    if phase == "first_token":
        return first_token(target, length.first_tokens)
    step_us = SLOW_STEP_US if phase == "slow_streams" else FAST_STEP_US
    return streams(target, step_us, length.seconds)


def median(rounds: Sequence[Round]) -> Round:
    """Of every number over the calmer half of the rounds, phase by phase; failures of all rounds add up.

    Calm is told by what others took of the cores, never by how a target did.
    """
    out: Round = {}
    for phase in PHASES:
        ordered = sorted((one[phase] for one in rounds), key=lambda by: sum(sample.others for sample in by.values()))
        calm = ordered[: (len(ordered) + 1) // 2]
        out[phase] = {
            name: replace(
                _median([by[name] for by in calm]),
                operations=sum(by[name].operations for by in ordered),
                failed=sum(by[name].failed for by in ordered),
            )
            for name in ordered[0]
        }
    return out


def _median(samples: Sequence[Sample]) -> Sample:
    def of(number: str) -> float:
        return float(statistics.median(getattr(sample, number) for sample in samples))

    return Sample(0, 0, of("per_s"), of("p50_us"), of("p99_us"), of("cpu_us"), of("others"))
