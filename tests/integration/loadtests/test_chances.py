"""Which runs of a scenario have a second chance, and which are red at once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtests import gates
from loadtests.recording import SAMPLE, Outcome, Run, Samples
from loadtests.scenario import Gate
from tests.integration.loadtests.chances import TRIES, judged
from tests.integration.loadtests.playing import MS, plan, scenario, schedule

WELL, LATE, SLOW, REFUSED = "well", "late", "slow", "refused"


def run_of(kind: str) -> Run:
    """Twenty requests, whole after 10 ms: or sent a second late, or answered after a second, or refused."""
    planned = plan(20)
    rows = np.zeros(len(planned), SAMPLE)
    rows["index"] = np.arange(len(planned))
    rows["scheduled"] = planned["at"]
    rows["sent"] = planned["at"] + (1_000 * MS if kind == LATE else 0)
    rows["first"] = rows["token"] = rows["last"] = rows["done"] = rows["sent"] + (1_000 if kind == SLOW else 10) * MS
    rows["outcome"] = Outcome.REFUSED if kind == REFUSED else Outcome.WHOLE
    found = (Gate(metric="refused_share", at_most=0, samples=1), Gate(metric="response_ms.p50", at_most=100, samples=1))
    told = scenario().model_copy(update={"gates": found}).model_dump(mode="json")
    samples = Samples(rows, np.zeros(0, np.uint64), np.zeros(0, np.uint32), ("",))
    return Run(told, {}, {}, "2026-11-26T00:00:00+00:00", schedule(planned), samples)


@pytest.mark.parametrize(
    ("runs", "code", "played"),
    [
        ([WELL], gates.PASSED, 1),
        ([LATE, LATE, WELL], gates.PASSED, 3),
        ([LATE] * TRIES, gates.INCONCLUSIVE, TRIES),
        ([SLOW, WELL], gates.PASSED, 2),
        ([SLOW, SLOW], gates.FAILED, 2),
        ([SLOW, LATE, SLOW], gates.FAILED, 3),
        ([REFUSED], gates.FAILED, 1),
        ([LATE, REFUSED], gates.FAILED, 2),
    ],
)
async def test_only_what_a_stall_explains_is_played_again(
    runs: list[str], code: int, played: int, tmp_path: Path
) -> None:
    """Late requests five times more, red times once more, a fact never."""
    left: Iterator[str] = iter(runs)
    folders = []

    async def play(folder: Path) -> Run:
        folders.append(folder)
        return run_of(next(left))

    found, verdicts = await judged(play, tmp_path)
    assert (found, len(folders), len(set(folders))) == (code, played, played), verdicts
