"""The agent's rules for what an engine holds, on a plain engine that records what it is told."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapter_store.agent.residency import AdapterUnknownError, LoadQueueFullError, NameTakenError, Residency
from adapter_store.catalog import BlobFile


class Engine:
    """Does as it is told, one thing after another, and remembers the order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.held: dict[int, str] = {}
        self.refuses = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, name: str, path: Path) -> int:
        await self.gate.wait()
        if self.refuses:
            raise RuntimeError("no")
        self.said.append(f"load {name}")
        number = len(self.said)
        self.held[number] = name
        return number

    def hide(self, name: str) -> None:
        self.said.append(f"hide {name}")

    async def unload(self, number: int) -> None:
        self.said.append(f"unload {self.held.pop(number)}")

    async def residency(self) -> tuple[set[int], set[int]]:
        return set(self.held), set(self.held)


class Cache:
    """Where files would be; counts pins."""

    used_bytes = 0
    limit_bytes = 1

    def __init__(self) -> None:
        self.pins: dict[str, int] = {}

    def __len__(self) -> int:
        return 0

    def __contains__(self, digest: str) -> bool:
        return False

    async def release(self, digest: str) -> bool:
        return False

    def pin(self, digest: str) -> None:
        self.pins[digest] = self.pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        self.pins[digest] -= 1
        assert self.pins[digest] >= 0

    async def fetch(self, digest: str, files: Sequence[BlobFile]) -> Path:
        assert self.pins.get(digest, 0) > 0, "fetched before it was pinned"
        return Path("/nowhere") / digest


def residency(engine: Engine, cache: Cache, capacity: int = 2, loads_waiting: int = 8) -> Residency:
    return Residency(engine, cache, capacity=capacity, loads_waiting=loads_waiting)


async def test_a_name_stands_for_one_content_for_ever() -> None:
    """The same name and digest again is nothing new; another digest is refused, and so is a name that was unloaded."""
    adapters = residency(Engine(), Cache())
    await adapters.load("a-1", "d1", [])
    assert (await adapters.load("a-1", "d1", [])).load_s == 0
    with pytest.raises(NameTakenError):
        await adapters.load("a-1", "d2", [])
    await adapters.unload("a-1")
    with pytest.raises(NameTakenError):
        await adapters.load("a-1", "d1", [])


async def test_the_engine_never_holds_more_than_its_memory() -> None:
    """Room is made before a load, by the adapter that was idle longest; its files are released."""
    engine, cache = Engine(), Cache()
    adapters = residency(engine, cache)
    for number in (1, 2, 3):
        await adapters.load(f"a-{number}", f"d{number}", [])
    assert engine.said == ["load a-1", "load a-2", "hide a-1", "unload a-1", "load a-3"]
    assert cache.pins == {"d1": 0, "d2": 1, "d3": 1}


async def test_a_busy_adapter_is_never_removed() -> None:
    """With every resident busy a load is refused; nothing of it stays."""
    engine, cache = Engine(), Cache()
    adapters = residency(engine, cache)
    await adapters.load("a-1", "d1", [])
    await adapters.load("a-2", "d2", [])
    async with adapters.serving("a-1"), adapters.serving("a-2"):
        with pytest.raises(LoadQueueFullError):
            await adapters.load("a-3", "d3", [])
    assert sorted(engine.held.values()) == ["a-1", "a-2"]
    assert cache.pins["d3"] == 0


async def test_an_unload_waits_for_the_adapters_requests() -> None:
    """New requests are turned away at once, running ones end first."""
    engine = Engine()
    adapters = residency(engine, Cache())
    await adapters.load("a-1", "d1", [])
    async with adapters.serving("a-1"):
        unloading = asyncio.create_task(adapters.unload("a-1"))
        await asyncio.sleep(0)
        with pytest.raises(AdapterUnknownError):
            async with adapters.serving("a-1"):
                pass
        assert engine.held
    await unloading
    assert not engine.held


async def test_loads_at_the_same_time_are_one() -> None:
    """A second call for the same name and digest waits for the first, and survives its caller."""
    engine = Engine()
    engine.gate.clear()
    adapters = residency(engine, Cache())
    first = asyncio.create_task(adapters.load("a-1", "d1", []))
    second = asyncio.create_task(adapters.load("a-1", "d1", []))
    await asyncio.sleep(0)
    first.cancel()
    engine.gate.set()
    assert (await second).name == "a-1"
    assert engine.said == ["load a-1"]


async def test_a_refused_load_burns_the_name_and_leaves_nothing() -> None:
    """What the engine made of the failed attempt is unknown: the name is not used again."""
    engine, cache = Engine(), Cache()
    engine.refuses = True
    adapters = residency(engine, cache)
    with pytest.raises(RuntimeError):
        await adapters.load("a-1", "d1", [])
    engine.refuses = False
    with pytest.raises(NameTakenError):
        await adapters.load("a-1", "d1", [])
    assert cache.pins["d1"] == 0
    assert await adapters.report() == []


async def test_too_many_waiting_loads_are_turned_away() -> None:
    """The queue is bounded."""
    engine = Engine()
    engine.gate.clear()
    adapters = residency(engine, Cache(), capacity=9, loads_waiting=2)
    waiting = [asyncio.create_task(adapters.load(f"a-{number}", f"d{number}", [])) for number in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(LoadQueueFullError):
        await adapters.load("a-9", "d9", [])
    engine.gate.set()
    await asyncio.gather(*waiting)


async def test_a_tenants_same_files_are_loaded_once() -> None:
    """Another gateway's load of them, or a second try of a slow one, is told the name that is there already."""
    engine, cache = Engine(), Cache()
    engine.gate.clear()
    adapters = residency(engine, cache)
    loads = [asyncio.create_task(adapters.load(f"a-{number}", "d1", [], owner="t")) for number in (1, 2)]
    await asyncio.sleep(0)
    engine.gate.set()
    assert [(await load).name for load in loads] == ["a-1", "a-1"]
    assert (await adapters.load("a-3", "d1", [], owner="other")).name == "a-3"
    assert engine.said == ["load a-1", "load a-3"]
    assert cache.pins == {"d1": 2}


async def test_a_pinned_adapter_leaves_last() -> None:
    """The unpinned one that was used later goes first; where all are pinned, the longest idle one does."""
    engine, cache = Engine(), Cache()
    adapters = residency(engine, cache)
    await adapters.load("a-1", "d1", [], owner="t")
    await adapters.load("a-2", "d2", [], owner="t")
    adapters.pin([("t", "d1")])
    await adapters.load("a-3", "d3", [], owner="t")
    assert sorted(engine.held.values()) == ["a-1", "a-3"]
    assert {known["name"]: known["pinned"] for known in await adapters.report()} == {"a-1": True, "a-3": False}
    adapters.pin([("t", "d1"), ("t", "d3")])
    await adapters.load("a-4", "d4", [], owner="t")
    assert sorted(engine.held.values()) == ["a-3", "a-4"]


async def test_what_is_idle_is_unloaded_and_keeps_nothing_pinned_on_disk() -> None:
    """Neither under a request nor where it is pinned."""
    engine, cache = Engine(), Cache()
    adapters = residency(engine, cache, capacity=4)
    for number in (1, 2, 3):
        await adapters.load(f"a-{number}", f"d{number}", [], owner="t")
    adapters.pin([("t", "d1")])
    async with adapters.serving("a-2"):
        await adapters.unload_idle(-1)
        assert sorted(engine.held.values()) == ["a-1", "a-2"]
    await adapters.unload_idle(60)
    assert sorted(engine.held.values()) == ["a-1", "a-2"]
    await adapters.unload_idle(-1)
    assert sorted(engine.held.values()) == ["a-1"]
    assert cache.pins == {"d1": 1, "d2": 0, "d3": 0}


async def test_requests_in_flight_are_reported() -> None:
    """Several gateways on one replica learn from it how many adapters the others use."""
    adapters = residency(Engine(), Cache())
    await adapters.load("a-1", "d1", [])
    async with adapters.serving("a-1"):
        assert [adapter["in_flight"] for adapter in await adapters.report()] == [1]
    assert [adapter["in_flight"] for adapter in await adapters.report()] == [0]
