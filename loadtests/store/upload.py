"""Large uploads, each way in: what they add to the gateway's memory, and their speed beside `cp` and `sha256sum`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loadtests.figures import Row
from loadtests.store import programs
from loadtests.store.report import row

PROGRAM: Final = "tests.bench.uploads"


def upload_rows(folder: Path, size_bytes: int) -> Iterator[Row]:
    """The worst way counts.

    Raises:
        CannotMeasureError: the program breaks off.
    """
    ways = programs.run(PROGRAM, str(size_bytes), settings={"TAILOR_BENCH_FOLDER": str(folder)})
    memory = {one["way"]: one["extra_rss_mib"] for one in ways}
    yield row("upload_rss_mib", max(memory.values()), megabytes=size_bytes / 1e6, each=memory)
    ratios = {one["way"]: one["throughput_ratio"] for one in ways}
    details = {
        f"{one['way']}_{name}": one[name]
        for one in ways
        for name in ("upload_s", "complete_s", "cpu_s", "cpu_ratio", "baseline_s")
        if name in one
    }
    yield row("upload_over_copy", min(ratios.values()), each=ratios, **details)
