"""A verdict on what really was sent: a generator that cannot keep its schedule proves nothing."""

from pathlib import Path

import pytest

from loadtests import gates, results
from loadtests.recording import Run
from tests.integration.loadtests.playing import MS, plan, played, scenario, schedule
from tests.integration.loadtests.test_playing import trivial


@pytest.mark.parametrize(
    ("count", "every_ns", "late_ms", "code"),
    [(40, 20 * MS, 2_000.0, gates.PASSED), (3_000, 0, 20.0, gates.INCONCLUSIVE)],
    ids=["in time", "late"],
)
async def test_a_late_generator_gives_3(count: int, every_ns: int, late_ms: float, code: int, tmp_path: Path) -> None:
    """Fifty requests a second are sent in time; 3,000 at one instant are more than one process sends in 20 ms."""
    told = scenario().model_copy(update={"late_ms": late_ms})
    planned = schedule(plan(count, every_ns=every_ns))
    async with trivial() as port:
        samples, lateness = await played(port, planned, tmp_path, of=told)
    run = Run(
        told.model_dump(mode="json"), {}, {}, "2026-11-26T00:00:00+00:00", planned, samples, lateness=tuple(lateness)
    )
    results.save(run, tmp_path / "run")
    found = results.load(tmp_path / "run")
    assert gates.exit_code(gates.judge(found), found) == code, lateness
