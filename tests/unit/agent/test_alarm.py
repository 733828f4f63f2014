"""What the agent makes of NaN and of an engine's death: whom it suspects, and what the next engine tells."""

import asyncio
from pathlib import Path

import pytest

from adapter_store.agent.alarm import FILE, IN_A_ROW_S, Alarms, Suspect
from adapter_store.agent.residency import Residency
from tests.unit.agent.test_residency import Cache, Engine, residency


class Life:
    """One engine's life: an agent on a plain engine, over a folder that outlives it."""

    def __init__(self, folder: Path, generation: str, now: float = 1_000.0) -> None:
        self.engine = Engine()
        self.adapters: Residency = residency(self.engine, Cache(), capacity=8)
        self.alarms = Alarms(folder, generation, self.adapters, clock=lambda: now)

    def suspects(self) -> list[str]:
        assert self.alarms.now is not None
        return [suspect.digest for suspect in self.alarms.now.suspects]


async def test_nan_has_a_name(tmp_path: Path) -> None:
    """Of several in the same step the one loaded last; the base model's alone accuse nobody; the first alarm stays."""
    life = Life(tmp_path, "e1")
    for number in (1, 2, 3):
        await life.adapters.load(f"a-{number}", f"d{number}", [], owner="t")
    life.alarms.corrupted(["a-2", "a-1", None])
    assert life.alarms.raised.is_set()
    life.alarms.corrupted(["a-3"])
    life.alarms.died(killed=False)
    assert life.alarms.now is not None
    assert (life.alarms.now.reason, life.suspects()) == ("corrupted", ["d2"])
    base = Life(tmp_path, "e2")
    base.alarms.corrupted([None, "a-null"])
    assert base.suspects() == []


async def test_a_death_during_a_load_accuses_that_load_alone(tmp_path: Path) -> None:
    """Whatever was loaded just before."""
    life = Life(tmp_path, "e1")
    await life.adapters.load("a-1", "d1", [], owner="t")
    life.engine.gate.clear()
    loading = asyncio.create_task(life.adapters.load("a-2", "d2", [], owner="t"))
    while life.adapters.under_suspicion() != [("t", "d2")]:
        await asyncio.sleep(0)
    life.alarms.died(killed=False)
    assert life.suspects() == ["d2"]
    loading.cancel()


async def test_the_next_engine_tells_what_the_last_one_died_of(tmp_path: Path) -> None:
    """And two deaths in a row narrow the suspects down to who was there both times."""
    first = Life(tmp_path, "e1")
    for number in (1, 2):
        await first.adapters.load(f"a-{number}", f"d{number}", [], owner="t")
    first.alarms.died(killed=False)
    assert sorted(first.suspects()) == ["d1", "d2"]
    second = Life(tmp_path, "e2")
    assert second.alarms.before == first.alarms.now
    for number in (2, 3):
        await second.adapters.load(f"a-{number}", f"d{number}", [], owner="t")
    second.alarms.died(killed=False)
    assert second.suspects() == ["d2"]
    later = Life(tmp_path, "e3", now=1_000.0 + 2 * IN_A_ROW_S)
    for number in (2, 3):
        await later.adapters.load(f"a-{number}", f"d{number}", [], owner="t")
    later.alarms.died(killed=False)
    assert sorted(later.suspects()) == ["d2", "d3"]


async def test_a_kill_from_outside_accuses_nobody(tmp_path: Path) -> None:
    """An operator's, or the kernel's for want of memory."""
    life = Life(tmp_path, "e1")
    await life.adapters.load("a-1", "d1", [], owner="t")
    life.alarms.died(killed=True)
    assert life.suspects() == []


@pytest.mark.parametrize("note", [b"", b"{", b'{"generation": 1}', b"\x00" * 100])
async def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, note: bytes) -> None:
    """A power cut in the middle of an alarm does not keep the engine from starting."""
    (tmp_path / FILE).write_bytes(note)
    life = Life(tmp_path, "e1")
    assert life.alarms.before is None
    await life.adapters.load("a-1", "d1", [], owner="t")
    life.alarms.corrupted(["a-1"])
    assert Life(tmp_path, "e2").alarms.before == life.alarms.now
    assert life.alarms.now is not None
    assert life.alarms.now.suspects == (Suspect("t", "d1"),)
