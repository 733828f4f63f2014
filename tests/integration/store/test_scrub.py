"""D3: stored bytes that rot are found before they are loaded, by the scrubber and by the load itself."""

import asyncio
import random
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.blobs import Blobs
from adapter_store.bundle import WEIGHTS_FILE
from adapter_store.cache import DiskCache
from adapter_store.errors import BlobCorrupt
from adapter_store.scrub import Outcome, Scrubber
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading
from tests.bad_adapters import write_good
from tests.integration.store.conftest import OTHER, TENANT, Publish
from tests.storage import Shelf

FAST = 1 << 40
FLIPPED = 50  # of the guarantee's 1,000
A_WEEK_S = 604_800.0


@pytest.fixture
def copy(tmp_path: Path) -> Blobs:
    return Blobs.open(str(tmp_path / "copy"))


def scrubber(engine: AsyncEngine, blobs: Blobs, copy: Blobs | None = None) -> Scrubber:
    """Its passes are seconds apart."""
    return Scrubber(engine, blobs, copy, bytes_per_s=FAST, every_s=0, clock=partial(next, count(1_000_000)))


async def test_a_flipped_bit_is_found_and_named(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, tmp_path: Path
) -> None:
    """What rotted and what is gone is told with the versions that have it; what is whole is not."""
    one = await publish(write_good(tmp_path / "one", seed=1))
    two = await publish(write_good(tmp_path / "two", seed=2))
    theirs = await publish(tmp_path / "two", tenant=OTHER, name="theirs")
    found = scrubber(engine, blobs)
    assert await found.run() == {Outcome.OK: 5}
    assert await found.faulty() == []
    shelf.flip(one.files[1].key, 100)
    await blobs.delete(theirs.files[1].key)
    assert await found.run() == {Outcome.OK: 3, Outcome.CORRUPT: 1, Outcome.MISSING: 1}
    told = {(fault.tenant_id, fault.sha256): (fault.fault, fault.versions) for fault in await found.faulty()}
    assert told == {
        (TENANT, one.files[1].sha256): ("corrupt", ("bot@1",)),
        (OTHER, two.files[1].sha256): ("missing", ("theirs@1",)),
    }
    assert found.fault_count == 2


async def test_what_rotted_is_repaired_from_the_second_copy(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, copy: Blobs, shelf: Shelf, good: Path
) -> None:
    """The copy's bytes are verified before they replace anything; a copy that rotted too is no help."""
    version = await publish(good)
    config, weights = version.files
    for file in version.files:
        await blobs.copy(file.key, file.sha256, copy)
    shelf.flip(weights.key, 100)
    await blobs.delete(config.key)
    found = scrubber(engine, blobs, copy)
    assert await found.run() == {Outcome.REPAIRED: 2}
    assert await found.run() == {Outcome.OK: 2}
    assert await found.faulty() == []
    assert shelf.read(weights.key) == (good / WEIGHTS_FILE).read_bytes()
    Shelf(copy, None).flip(weights.key, 5)
    shelf.flip(weights.key, 7)
    assert await found.run() == {Outcome.OK: 1, Outcome.CORRUPT: 1}


async def test_what_rotted_is_whole_again_when_it_is_published_again(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, good: Path
) -> None:
    """The same bytes replace the damaged ones, though a version has them already; the fault is gone."""
    version = await publish(good)
    shelf.flip(version.files[1].key, 100)
    found = scrubber(engine, blobs)
    await found.run()
    assert await publish(good) == version
    assert await found.faulty() == []
    assert await found.run() == {Outcome.OK: 2}


async def test_a_deleted_adapter_leaves_no_check(
    publish: Publish, store: AdapterStore, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, good: Path
) -> None:
    """Neither a note of its files nor a fault."""
    version = await publish(good)
    shelf.flip(version.files[1].key, 100)
    found = scrubber(engine, blobs)
    await found.run()
    await store.delete(TENANT, "bot")
    async with reading(engine) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM blob_checks"))).scalar() == 0


async def test_several_gateways_share_a_pass(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, tmp_path: Path
) -> None:
    """Each blob is read by one of them, and not again before its time."""
    for seed in range(1, 7):
        await publish(write_good(tmp_path / str(seed), seed=seed))
    now = 1_000_000.0
    several = [Scrubber(engine, blobs, None, bytes_per_s=FAST, clock=lambda: now) for _ in range(3)]
    passes = await asyncio.gather(*(each.run() for each in several))
    assert sum(found[Outcome.OK] for found in passes) == 7
    now += A_WEEK_S - 1
    assert await several[0].run() == {}
    now += 2
    assert await several[0].run() == {Outcome.OK: 7}


async def test_it_reads_no_faster_than_it_may(publish: Publish, engine: AsyncEngine, blobs: Blobs, good: Path) -> None:
    """Between pieces it waits as long as the rate asks for."""
    version = await publish(good)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    await Scrubber(engine, blobs, None, bytes_per_s=1_000, every_s=0, sleep=sleep).run()
    assert sum(slept) == pytest.approx(version.size_bytes / 1_000, rel=0.05)


async def check_flipped(
    flips: int, publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, folder: Path
) -> None:
    version = await publish(write_good(folder / "good", seed=1))
    weights = version.files[1]
    raw = shelf.read(weights.key)
    chance = random.Random(0)
    found = scrubber(engine, blobs)
    found_by_load = found_by_scrub = 0
    for number in range(flips):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        shelf.write(weights.key, bytes(changed))
        cache = DiskCache(folder / f"cache{number}", blobs, 1 << 20)
        try:
            await cache.fetch(version.digest, version.files)
        except BlobCorrupt:
            found_by_load += 1
        assert not any((folder / f"cache{number}").iterdir())
        found_by_scrub += (await found.run())[Outcome.CORRUPT]
    assert (found_by_load, found_by_scrub) == (flips, flips)
    shelf.write(weights.key, raw)
    assert await found.run() == {Outcome.OK: 2}


async def test_every_flipped_blob_is_found(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, tmp_path: Path
) -> None:
    """50 of 50 by the load and by the scrubber, with a bit flipped anywhere."""
    await check_flipped(FLIPPED, publish, engine, blobs, shelf, tmp_path)


@pytest.mark.full
async def test_every_flipped_blob_of_a_thousand_is_found(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, shelf: Shelf, tmp_path: Path
) -> None:
    """1,000 of 1,000."""
    await check_flipped(1_000, publish, engine, blobs, shelf, tmp_path)
