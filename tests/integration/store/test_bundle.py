"""Staging an upload."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE, Staging
from adapter_store.errors import BundleIncomplete, BundleTooLarge
from tests.integration.store.conftest import files_under


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_a_staged_file_is_hashed_in_passing(staging: Staging) -> None:
    """Size and SHA-256 are those of all pieces together."""
    async with staging.stage() as bundle:
        await bundle.write(CONFIG_FILE, pieces(b"ab", b"", b"c"))
        assert bundle.sizes == {CONFIG_FILE: 3}
        assert bundle.sha256[CONFIG_FILE].startswith("ba7816bf")
        assert (bundle.folder / CONFIG_FILE).read_bytes() == b"abc"


async def test_a_file_past_its_limit_is_cut_off_while_it_comes(tmp_path: Path) -> None:
    """The limit is enforced on the way, not after the last byte; nothing stays."""
    staging = Staging(tmp_path, config_limit_bytes=1_000)
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 100
            yield bytes(100)

    with pytest.raises(BundleTooLarge, match="1000 bytes"):
        async with staging.stage() as bundle:
            await bundle.write(CONFIG_FILE, endless())
    assert taken == 1_100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../adapter_config.json", "/etc/passwd", "", "weights.bin", "adapter_config.json\0"])
async def test_only_the_two_file_names_exist(name: str, staging: Staging) -> None:
    """Nothing that a tenant names becomes a path."""
    async with staging.stage() as bundle:
        with pytest.raises(BundleIncomplete):
            await bundle.write(name, pieces(b"x"))
        assert files_under(staging.root) == []


async def test_a_file_cannot_be_sent_twice(staging: Staging) -> None:
    """The second of the same name is refused, not written over the first."""
    async with staging.stage() as bundle:
        await bundle.write(CONFIG_FILE, pieces(b"first"))
        with pytest.raises(BundleIncomplete, match="twice"):
            await bundle.write(CONFIG_FILE, pieces(b"second"))


async def test_a_missing_and_an_empty_file_are_told_by_name(staging: Staging) -> None:
    """The error says which file and what about it."""
    async with staging.stage() as bundle:
        await bundle.write(CONFIG_FILE, pieces())
        with pytest.raises(BundleIncomplete, match=f"{CONFIG_FILE} is empty"):
            bundle.check_complete()
    async with staging.stage() as bundle:
        await bundle.write(CONFIG_FILE, pieces(b"{}"))
        with pytest.raises(BundleIncomplete, match=f"{WEIGHTS_FILE} is missing"):
            bundle.check_complete()


async def test_a_client_that_goes_away_leaves_nothing(staging: Staging) -> None:
    """A cancelled upload removes its folder."""
    started = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield bytes(2 << 20)
        started.set()
        await asyncio.Event().wait()

    async def upload() -> None:
        async with staging.stage() as bundle:
            await bundle.write(WEIGHTS_FILE, stalled())

    task = asyncio.create_task(upload())
    await started.wait()
    assert files_under(staging.root) != []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert list(staging.root.iterdir()) == []


async def test_the_sweep_takes_what_is_abandoned_only(staging: Staging) -> None:
    """A folder of a dead process goes; one of a running upload stays."""
    async with staging.stage() as bundle:
        await bundle.write(CONFIG_FILE, pieces(b"{}"))
        (staging.root / "abandoned").mkdir()
        (staging.root / "abandoned" / WEIGHTS_FILE).write_bytes(b"half")
        assert Staging(staging.root).sweep() == 1
        assert list(staging.root.iterdir()) == [bundle.folder]
