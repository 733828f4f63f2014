"""Runs the in-process measurement of resolve + admit; that lives with the tests, since it imports what it measures."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from loadtests.figures import Row
from loadtests.overhead.processes import on_core, two_cores
from loadtests.overhead.report import row
from loadtests.overhead.stack import CannotMeasureError

PROGRAM: Final = "tests.bench.scale"
ROOT: Final = Path(__file__).parents[2]
SMALL: Final = ("10", "1", "2")  # adapters, tenants, keys
LARGE: Final = ("100000", "10000", "20000")
TRAFFIC: Final = ("uniform", "zipf")


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
    """CPU with few and with many, turn by turn. The least of the rounds counts: what else runs only ever adds."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tailor-scale-")))
        small = held.enter_context(_measured(folder / "small.db", SMALL))
        large = held.enter_context(_measured(folder / "large.db", LARGE))
        least = {
            traffic: [min(pair) for pair in zip(*_turns(small, large, traffic, rounds), strict=True)]
            for traffic in TRAFFIC
        }
        uniform, zipf = (least[traffic] for traffic in TRAFFIC)
        return [
            row(
                "resolve_admit_cpu_ratio", uniform[1] / uniform[0], traffic="uniform",
                cpu_us_with_10=round(uniform[0], 2), cpu_us_with_100000=round(uniform[1], 2),
                ratio_in_zipf_traffic=round(zipf[1] / zipf[0], 3),
            ),
            row("resolve_admit_rss_mib", large.rss_mib, with_10=round(small.rss_mib, 2)),
        ]  # fmt: skip


def _turns(small: Measured, large: Measured, traffic: str, rounds: int) -> list[tuple[float, float]]:
    return [(small.cpu_us(traffic), large.cpu_us(traffic)) for _ in range(rounds)]


@contextmanager
def _measured(database: Path, size: Sequence[str]) -> Iterator[Measured]:
    """A process that holds so many adapters, tenants and keys, until the block ends."""
    command = [sys.executable, "-m", PROGRAM, str(database), *size]
    subprocess.run([*command, "fill"], cwd=ROOT, check=True)
    with on_core(two_cores()[0]):
        process = subprocess.Popen(
            [*command, "measure"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    with process:
        try:
            yield Measured(process)
        finally:
            process.kill()
