"""One process that sends its part of a schedule, each request at its time whatever became of the others.

    python -m loadtests.generator

It is started by `loadtests.playing`, with which it speaks JSON, a line a message: told what to do first, then when
to begin, keys that change, and perhaps to stop; it tells that it is ready, its counts twice a second, and its end.
"""

import asyncio
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from loadtests.alarm import alarm
from loadtests.bodies import Bodies, Planned
from loadtests.client import NS, Exchange, Pool, now
from loadtests.progress import PROGRESS_S, Tally
from loadtests.recording import ABSENT, FAILED, PLANNED, Array, Lateness, Outcome
from loadtests.records import Records
from loadtests.scenario import Workload

LINE_BYTES: Final = 1 << 28
WARM: Final = 8
"""Connections that are open before the first request."""
_PAUSE_S: Final = 0.1
"""Of a caller in a closed loop whose request failed: one that asked again at once would only count how fast that is."""
_NEVER: Final = 1 << 62


class Caller:
    """One caller of a closed loop: its requests one after the other, as long as its phase lasts."""

    def __init__(self, places: Array, begin: int, end: int) -> None:
        self.places: Iterator[int] = iter(places.tolist())
        self.begin, self.end = begin, end


class Sender:
    """Sends what is planned; times since the run's begin, which is at `begin` of the monotonic clock."""

    def __init__(self, told: dict[str, Any], planned: Array, indices: Array) -> None:
        self._planned, self.indices = planned, indices
        self._phases: list[list[int]] = told["phases"]
        self._groups: list[str] = told["groups"]
        self._workloads = [Workload.model_validate(one) for one in told["workloads"]]
        self._bodies = Bodies(
            workloads=self._workloads,
            models=told["models"],
            keys=told["keys"],
            base_model=told["base_model"],
            host=told["host"],
            tokens_per_word=told["tokens_per_word"],
        )
        self._pool = Pool(told["url"], timeout_s=told["timeout_s"], most=told["connections"])
        self.change_key = self._bodies.change_key
        self.tallies = {group: Tally() for group in dict.fromkeys(self._groups)}
        numbers = np.array([list(self.tallies).index(group) for group in self._groups])
        self._group_of = numbers[planned["tenant"]]
        self.records = Records()
        self._at: list[int] = planned["at"][planned["at"] != ABSENT].tolist()
        self._open = np.flatnonzero(planned["at"] != ABSENT)
        self._next = 0
        self._callers = sorted(self._closed_loops(), key=lambda caller: caller.begin, reverse=True)
        self._running = 0  # callers at work
        self._idle_callers = 0
        self._in_flight = 0
        self._stopped = False
        self._finished = asyncio.Event()

    def _closed_loops(self) -> list[Caller]:
        loops: dict[tuple[object, ...], list[int]] = {}
        for place in np.flatnonzero(self._planned["at"] == ABSENT).tolist():
            row = Planned._make(self._planned[place].item())
            loops.setdefault((row.phase, row.workload, self._groups[row.tenant], row.caller), []).append(place)
        return [Caller(np.array(places), *self._phases[key[0]]) for key, places in loops.items()]  # type: ignore[call-overload]

    async def connect(self) -> None:
        """Be ready.

        Raises:
            OSError: the server cannot be reached.
        """
        await self._pool.warm(WARM)

    async def run(self, begin: int) -> None:
        """Until the last request has ended."""
        self._begin = begin
        self._alarm = alarm(asyncio.get_running_loop(), self._ring)
        self._ring()
        await self._finished.wait()
        self._alarm.close()
        self._pool.close()

    def stop(self) -> None:
        """Send nothing more; what is in flight is waited for."""
        self._stopped = True
        self._next = len(self._at)
        self._callers.clear()
        self._check_end()

    # sending

    def _ring(self) -> None:
        """Send all that is due."""
        due = now() - self._begin
        while self._callers and self._callers[-1].begin <= due:
            self._running += 1
            self._ask_again(self._callers.pop())
        while self._next < len(self._at) and self._at[self._next] <= due:
            self._next += 1
            self._send(int(self._open[self._next - 1]), self._ended)
        soonest = self._at[self._next] if self._next < len(self._at) else _NEVER
        if self._callers:
            soonest = min(soonest, self._callers[-1].begin)
        if soonest < _NEVER:
            self._alarm.set(self._begin + soonest)
        self._check_end()

    def _ask_again(self, caller: Caller) -> None:
        over = self._stopped or now() - self._begin >= caller.end
        place = None if over else next(caller.places, None)
        if place is None:
            self._idle_callers += not over
            self._running -= 1
            self._check_end()
        else:
            self._send(place, lambda exchange: self._answered(exchange, caller))

    def _answered(self, exchange: Exchange, caller: Caller) -> None:
        self._ended(exchange)
        if exchange.outcome in (Outcome.WHOLE, Outcome.ABORTED):
            self._ask_again(caller)
        else:
            asyncio.get_running_loop().call_later(_PAUSE_S, self._ask_again, caller)

    def _send(self, place: int, on_end: Callable[[Exchange], None]) -> None:
        planned = Planned._make(self._planned[place].item())
        tally = self.tallies[self._groups[planned.tenant]]
        tally.sent += 1
        self._in_flight += 1
        exchange = Exchange(
            place,
            self._bodies.request(planned),
            on_end,
            scheduled=ABSENT if planned.at == ABSENT else planned.at + self._begin,
            tally=tally,
            streams=self._workloads[planned.workload].stream,
            keeps_answer=planned.canary,
            abort_after=planned.abort_after,
        )
        self._pool.send(exchange)

    def _ended(self, exchange: Exchange) -> None:
        self._in_flight -= 1
        exchange.tally.done += 1
        if exchange.outcome == Outcome.REFUSED:
            exchange.tally.refused += 1
        elif exchange.outcome in FAILED:
            exchange.tally.failed += 1
        self.records.add(exchange, int(self.indices[exchange.index]), self._begin)
        self._check_end()

    def _check_end(self) -> None:
        waits = self._next < len(self._at) or self._callers or self._running or self._in_flight
        if not waits:
            self._finished.set()

    # what it tells

    def told(self) -> dict[str, list[Any]]:
        """Counts of each group so far."""
        rows, chunk_at = self.records.since_last()
        groups = self._group_of[np.searchsorted(self.indices, rows["index"])]
        for number, tally in enumerate(self.tallies.values()):
            mine = groups == number
            tally.count(rows[mine], chunk_at[np.repeat(mine, rows["chunks"])])
        return {name: tally.told() for name, tally in self.tallies.items()}

    def lateness(self, process: int, rows: Array, cpu_share: float) -> Lateness:
        """How far after their times the requests were sent, of those that had one: in a closed loop none has."""
        timed = self._planned["at"][np.searchsorted(self.indices, rows["index"])] != ABSENT
        sent = rows[timed & (rows["sent"] != ABSENT)]
        late_us = (sent["sent"] - sent["scheduled"]) / 1_000
        if not len(late_us):
            return Lateness(process, 0.0, 0.0, 0.0, cpu_share, self._idle_callers)
        p50_us, p99_us = np.quantile(late_us, (0.5, 0.99)).tolist()
        return Lateness(process, p50_us, p99_us, float(late_us.max()), cpu_share, self._idle_callers)


async def serve() -> None:
    """One run, as standard input says."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection each that is in flight
    told = _Messages()
    await told.open()
    order = await told.next()
    folder, process = Path(order["folder"]), int(order["process"])
    with np.load(folder / f"planned-{process}.npz", allow_pickle=False) as part:
        sender = Sender(order, part["planned"].astype(PLANNED), part["indices"])
    try:
        await sender.connect()
    except OSError as error:
        say({"unreachable": f"{order['url']}: {error}"})
        return
    say({"ready": True})
    begin = int((await told.next())["begin"])
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # what a request makes dies with it; only connections that fail leave cycles
    asides = [asyncio.create_task(_listen(told, sender)), asyncio.create_task(_tell(sender))]
    cpu_s, wall = time.process_time(), max(begin, now())
    await sender.run(begin)
    cpu_share = (time.process_time() - cpu_s) * NS / max(1, now() - wall)
    for aside in asides:
        aside.cancel()
    samples = sender.records.samples(sender.indices)
    samples.save(folder / f"samples-{process}.npz")
    say({"groups": sender.told()})
    say({"end": asdict(sender.lateness(process, samples.rows, cpu_share))})


async def _listen(told: "_Messages", sender: Sender) -> None:
    while True:
        message = await told.next()
        if "key" in message:
            sender.change_key(*message["key"])
        elif "stop" in message:
            sender.stop()


async def _tell(sender: Sender) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        say({"groups": sender.told()})


class _Messages:
    """What the parent says; that it has gone ends this process."""

    async def open(self) -> None:
        self._reader = asyncio.StreamReader(limit=LINE_BYTES)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), sys.stdin)

    async def next(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            os._exit(1)
        message: dict[str, Any] = json.loads(line)
        return message


def say(message: dict[str, object]) -> None:
    """Tell the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(serve())
