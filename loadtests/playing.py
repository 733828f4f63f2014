"""Plays a schedule against a server with several generator processes and brings their samples together."""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from loadtests.generator import LINE_BYTES
from loadtests.progress import Progress
from loadtests.recording import Lateness, Samples, Schedule
from loadtests.records import merged
from loadtests.scenario import Scenario
from loadtests.scheduling import shard_of

NS: Final = 1_000_000_000
LEAD_NS: Final = NS // 5
"""From the word to begin until the begin, so that every process hears it in time."""


class CannotPlay(Exception):
    """The server could not be reached at all, or a generator process failed; the text says which."""


class Keys:
    """Each tenant's API key; a change reaches the generators at once."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = list(keys)
        self._listeners: list[Callable[[int, str], None]] = []

    def now(self) -> list[str]:
        """As they are."""
        return list(self._keys)

    def change(self, tenant: int, key: str) -> None:
        """Requests that are sent from now on have it."""
        self._keys[tenant] = key
        for listener in self._listeners:
            listener(tenant, key)

    def tell(self, listener: Callable[[int, str], None]) -> None:
        """Call it for every change."""
        self._listeners.append(listener)


@dataclass(frozen=True, slots=True)
class Server:
    """Who is asked."""

    url: str  # http://host:port
    base_model: str  # the model's name for requests without an adapter
    tokens_per_word: float = 1.0  # of bodies.WORDS, with the model's tokenizer
    connections: int | None = None
    """At most so many of each process at once; with a limit the load is no longer open."""


@dataclass(slots=True)
class _Generator:
    """A running process and the last it told."""

    number: int
    process: Process
    log: Path
    groups: dict[str, list[Any]] = field(default_factory=dict)

    def say(self, message: dict[str, object]) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def hear(self) -> dict[str, Any]:
        """Its next word.

        Raises:
            CannotPlay: it has ended.
        """
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            why = self.log.read_text(errors="replace")[-2_000:] or "it was killed"
            raise CannotPlay(f"generator process {self.number} ended before its time: {why}")
        message: dict[str, Any] = json.loads(line)
        if "unreachable" in message:
            raise CannotPlay(f"cannot reach {message['unreachable']}")
        return message


async def play(
    schedule: Schedule,
    *,
    scenario: Scenario,
    server: Server,
    keys: Keys,
    processes: int,
    folder: Path,
    begin_ns: int | None = None,
    on_begin: Callable[[int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: asyncio.Event | None = None,
) -> tuple[Samples, list[Lateness]]:
    """Send every request of the schedule at its time and wait until all have ended.

    `begin_ns`: of the monotonic clock, soon where not given; `on_begin` is told it a little before. `stop`: once set,
    nothing more is sent, and what is left is UNSENT. Files of the generators are left in `folder`.

    Raises:
        CannotPlay: nothing was measured.
    """
    generators: list[_Generator] = []
    try:
        for number in range(processes):
            generators.append(await _start(number, folder))
        _give_out(schedule, generators, scenario, server, keys, folder)
        await asyncio.gather(*(generator.hear() for generator in generators))
        begin = begin_ns if begin_ns is not None else time.monotonic_ns() + LEAD_NS
        if begin < time.monotonic_ns():
            raise CannotPlay("the time to begin has passed before the generators were ready")
        if on_begin is not None:
            on_begin(begin)
        for generator in generators:
            generator.say({"begin": begin})
        keys.tell(partial(_tell_key, generators))
        lateness = await _follow(generators, begin, on_progress, stop)
    finally:
        await _end(generators)
    parts = [await asyncio.to_thread(Samples.load, folder / f"samples-{one.number}.npz") for one in generators]
    return merged(parts), lateness


async def _start(number: int, folder: Path) -> _Generator:
    log = folder / f"generator-{number}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtests.generator"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=errors,
            limit=LINE_BYTES,
            start_new_session=True,  # a Ctrl-C at the terminal is its parent's
        )
    return _Generator(number, process, log)


def _give_out(
    schedule: Schedule,
    generators: Sequence[_Generator],
    scenario: Scenario,
    server: Server,
    keys: Keys,
    folder: Path,
) -> None:
    part = shard_of(schedule.planned, len(generators))
    for generator in generators:
        indices = np.flatnonzero(part == generator.number)
        np.savez(folder / f"planned-{generator.number}.npz", planned=schedule.planned[indices], indices=indices)
        generator.say(
            {
                "process": generator.number,
                "folder": str(folder),
                "url": server.url,
                "host": urlsplit(server.url).netloc,
                "base_model": server.base_model,
                "tokens_per_word": server.tokens_per_word,
                "connections": server.connections,
                "keys": keys.now(),
                "groups": schedule.groups,
                "models": schedule.models,
                "phases": schedule.phases,
                "workloads": [scenario.workloads[name].model_dump(mode="json") for name in schedule.workloads],
                "timeout_s": scenario.timeout_s,
            }
        )


def _tell_key(generators: Sequence[_Generator], tenant: int, key: str) -> None:
    for generator in generators:
        generator.say({"key": [tenant, key]})


async def _follow(
    generators: Sequence[_Generator],
    begin: int,
    on_progress: Callable[[Progress], None] | None,
    stop: asyncio.Event | None,
) -> list[Lateness]:
    def tell() -> None:
        if on_progress is not None:
            on_progress(Progress.of(time.monotonic_ns() - begin, [one.groups for one in generators]))

    async def follow(generator: _Generator) -> Lateness:
        while True:
            message = await generator.hear()
            if "end" in message:
                return Lateness(**message["end"])
            generator.groups = message["groups"]
            if generator is generators[0]:
                tell()

    async def stop_all(event: asyncio.Event) -> None:
        await event.wait()
        for generator in generators:
            generator.say({"stop": True})

    stopping = asyncio.create_task(stop_all(stop)) if stop is not None else None
    try:
        async with asyncio.TaskGroup() as group:
            following = [group.create_task(follow(generator)) for generator in generators]
    except* CannotPlay as errors:
        raise errors.exceptions[0] from None
    finally:
        if stopping is not None:
            stopping.cancel()
    tell()
    return [one.result() for one in following]


async def _end(generators: Sequence[_Generator]) -> None:
    for generator in generators:
        if generator.process.returncode is None:
            assert generator.process.stdin is not None
            generator.process.stdin.close()  # it ends with its parent's word
    for generator in generators:
        await generator.process.wait()
