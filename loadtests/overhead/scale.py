"""Resolve + admit with many adapters: alone in a loop, and as part of whole requests.

The loop lives with the tests, since it imports what it measures. The same requests with few and with many adapters show
what their number alone costs. Requests spread over all of them meet memory that no cache has: half of a loop of nothing
but lookups, and a small part of a whole request, over HTTP to a gateway on the same database.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import uvloop

from loadtests.figures import Row
from loadtests.overhead.client import Pool, Target
from loadtests.overhead.model_files import BASE_NAME
from loadtests.overhead.phases import CONNECTIONS
from loadtests.overhead.processes import cpu_ns, on_core, two_cores
from loadtests.overhead.report import row
from loadtests.overhead.stack import CannotMeasureError, Gateway, RunningGateway, base_model, mock_upstream

PROGRAM: Final = "tests.bench.scale"
ROOT: Final = Path(__file__).parents[2]
SMALL: Final = ("10", "1", "2")  # adapters, tenants, keys
LARGE: Final = ("100000", "10000", "20000")
TRAFFIC: Final = ("uniform", "zipf")
FEW: Final = "ten"
"""Traffic for ten adapters, however many there are."""
WHOLE_REQUESTS: Final = 1_000
STARTS: Final = 5
"""Of a gateway for whole requests: how its memory happens to lie is worth 5 % of a request for as long as it runs."""
MOST_ASKED: Final = 2_000
"""Adapters that whole requests ask for: as many as an engine with much memory holds. More would be loads."""


class Measured:
    """A process with its caches full; `rss_mib` is what they hold."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.rss_mib = self._read("rss_mib")

    def cpu_us(self, traffic: str) -> float:
        """Of one request, over some thousands."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{traffic}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CannotMeasureError(f"{PROGRAM} broke off") from None
        return self._read("cpu_us")

    def _read(self, figure: str) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotMeasureError(f"{PROGRAM} broke off; its error stands above")
        return float(json.loads(line)[figure])


def scale_rows(*, rounds: int) -> list[Row]:
    """CPU with few and with many, turn by turn. The least of the rounds counts: what else runs only ever adds.

    Of whole requests, the median of `STARTS` such leasts.
    """
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tailor-scale-")))
        base, fingerprint = base_model(folder / BASE_NAME)
        filled = [Filled(folder / name, size) for name, size in (("small.db", SMALL), ("large.db", LARGE))]
        for one in filled:
            one.run("fill", fingerprint)
        with ExitStack() as looping:
            small, large = (looping.enter_context(_measured(one)) for one in filled)
            least = {traffic: _least(small.cpu_us, large.cpu_us, traffic, rounds) for traffic in (FEW, *TRAFFIC)}
        whole = whole_requests(base, fingerprint, filled, rounds)
        return [
            row(
                "resolve_admit_cpu_ratio", _ratio(least[FEW]), **_each(least[FEW]),
                spread={traffic: _with_ratio(least[traffic]) for traffic in TRAFFIC},
            ),
            row(
                "request_cpu_ratio", _ratio(whole["uniform"]), **_each(whole["uniform"]),
                zipf=_with_ratio(whole["zipf"]),
            ),
            row("resolve_admit_rss_mib", large.rss_mib, with_10=round(small.rss_mib, 2)),
        ]  # fmt: skip


def _ratio(least: Sequence[float]) -> float:
    return least[1] / least[0]


def _each(least: Sequence[float]) -> dict[str, float]:
    return {"cpu_us_with_10": round(least[0], 2), "cpu_us_with_100000": round(least[1], 2)}


def _with_ratio(least: Sequence[float]) -> dict[str, float]:
    return {"ratio": round(_ratio(least), 3)} | _each(least)


def whole_requests(base: Path, fingerprint: str, filled: "Sequence[Filled]", rounds: int) -> dict[str, list[float]]:
    """Traffic → CPU of a whole small request over HTTP, with few and with many adapters: the median of some starts.

    `rounds` are turns of each start, of which the least counts.
    """
    starts = []
    for _ in range(STARTS):
        with ExitStack() as held:
            few, many = (held.enter_context(_asked(one, base, fingerprint)) for one in filled)
            starts.append({traffic: _least(few.cpu_us, many.cpu_us, traffic, rounds) for traffic in TRAFFIC})
    return {
        traffic: [median(column) for column in zip(*(start[traffic] for start in starts), strict=True)]
        for traffic in TRAFFIC
    }


def _least(small: Callable[[str], float], large: Callable[[str], float], traffic: str, rounds: int) -> list[float]:
    turns = [(small(traffic), large(traffic)) for _ in range(rounds)]
    return [min(column) for column in zip(*turns, strict=True)]


@dataclass(frozen=True, slots=True)
class Filled:
    """A database of so many adapters, tenants and keys, and what is asked of it."""

    database: Path
    size: Sequence[str]

    def command(self, verb: str, *more: str) -> list[str]:
        return [sys.executable, "-m", PROGRAM, str(self.database), *self.size, verb, *more]

    def run(self, verb: str, *more: str) -> str:
        return subprocess.run(self.command(verb, *more), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def _measured(filled: Filled) -> Iterator[Measured]:
    """A process that has looked everything up once, until the block ends."""
    with on_core(two_cores()[0]):
        process = subprocess.Popen(
            filled.command("measure"), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    with process:
        try:
            yield Measured(process)
        finally:
            process.kill()


class Asked:
    """A gateway in front of a mock that holds every adapter which is asked for."""

    def __init__(self, gateway: RunningGateway, requests: dict[str, list[tuple[str, str]]]) -> None:
        self._pid = gateway.start.process.pid
        self._port = gateway.port
        self._wires = {
            traffic: [Target("gateway", gateway.port, key, model).request(max_tokens=16) for key, model in pairs]
            for traffic, pairs in requests.items()
        }
        for wires in self._wires.values():  # keys, names and places are known afterwards, and adapters loaded
            self._ask(wires)

    def cpu_us(self, traffic: str) -> float:
        """Of one request, over some thousands."""
        wires = self._wires[traffic][:WHOLE_REQUESTS]
        self._wires[traffic] = self._wires[traffic][WHOLE_REQUESTS:] + wires
        before = cpu_ns([self._pid])
        self._ask(wires)
        return (cpu_ns([self._pid]) - before) / 1e3 / len(wires)

    def _ask(self, wires: Sequence[bytes]) -> None:
        with on_core(two_cores()[1]):
            failed = uvloop.run(_ask_all(Target("gateway", self._port), wires))
        if failed:
            raise CannotMeasureError(f"{failed} of {len(wires)} requests failed")


async def _ask_all(target: Target, wires: Sequence[bytes]) -> int:
    """How many failed."""
    left, failed = iter(wires), 0
    async with Pool(target) as pool:
        await pool.warm(CONNECTIONS)

        async def work() -> None:
            nonlocal failed
            for wire in left:
                failed += not (await pool.ask(wire)).ok

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return failed


@contextmanager
def _asked(filled: Filled, base: Path, fingerprint: str) -> Iterator[Asked]:
    """A gateway on that database, its requests asked once, until the block ends."""
    proxy_core, client_core = two_cores()
    folder = filled.database.with_suffix("")
    folder.mkdir(exist_ok=True)
    database = {"TAILOR_DATABASE_URL": f"sqlite+aiosqlite:///{filled.database}"}
    with (
        mock_upstream(folder, fingerprint, client_core) as upstream,
        Gateway(folder, base, upstream, proxy_core, database).started() as gateway,
    ):
        yield Asked(gateway, json.loads(filled.run("requests", str(MOST_ASKED))))
