"""A verdict on what really was sent: a generator that cannot keep its schedule proves nothing."""

from pathlib import Path

import pytest

from loadtests import gates, results
from loadtests.recording import Run
from tests.integration.loadtests.playing import MS, plan, played, scenario, schedule
from tests.integration.loadtests.test_playing import trivial


@pytest.mark.parametrize(("every_ns", "code"), [(20 * MS, gates.PASSED), (0, gates.INCONCLUSIVE)])
async def test_a_late_generator_gives_3(every_ns: int, code: int, tmp_path: Path) -> None:
    """Fifty requests a second are sent in time; thousands at one instant are more than one process can send."""
    told = scenario().model_copy(update={"late_ms": 150.0})
    planned = schedule(plan(3_000 if every_ns == 0 else 40, every_ns=every_ns))
    async with trivial() as port:
        samples, lateness = await played(port, planned, tmp_path, of=told)
    run = Run(
        told.model_dump(mode="json"), {}, {}, "2026-11-26T00:00:00+00:00", planned, samples, lateness=tuple(lateness)
    )
    results.save(run, tmp_path / "run")
    found = results.load(tmp_path / "run")
    assert gates.exit_code(gates.judge(found), found) == code, lateness
