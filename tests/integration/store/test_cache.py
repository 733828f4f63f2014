"""The replica's disk cache."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from adapter_store.blobs import Blobs
from adapter_store.cache import DigestPinned, DiskCache
from adapter_store.catalog import BlobFile, Version
from adapter_store.errors import BlobCorrupt, StorageFull
from tests.bad_adapters import write_good
from tests.integration.store.conftest import Publish, files_under
from tests.storage import Place, Shelf

LIMIT_BYTES = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(root: Path, blobs: Blobs) -> DiskCache:
    return DiskCache(root, blobs, LIMIT_BYTES)


async def versions(publish: Publish, tmp_path: Path, count: int) -> list[Version]:
    return [
        await publish(write_good(tmp_path / f"adapter{seed}", seed=10 * seed), name=f"bot{seed}")
        for seed in range(1, count + 1)
    ]


async def test_a_fetched_folder_holds_the_two_files(cache: DiskCache, publish: Publish, good: Path) -> None:
    """The folder is named by the digest and holds what was published."""
    version = await publish(good)
    folder = await cache.fetch(version.digest, version.files)
    assert folder.name == version.digest
    assert files_under(folder) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == (good / "adapter_model.safetensors").read_bytes()


class Counted(Blobs):
    """Counts how often each blob is read."""

    reads: Counter[str]

    @asynccontextmanager
    async def read(self, key: str) -> AsyncIterator[AsyncIterator[bytes]]:
        self.reads[key] += 1
        async with super().read(key) as pieces:
            yield pieces


async def test_callers_at_the_same_time_share_one_fetch(root: Path, place: Place, publish: Publish, good: Path) -> None:
    """Ten fetches give one folder, written once; a cancelled caller does not break the others'."""
    version = await publish(good)
    blobs = Counted.open(place.blobs_url)
    blobs.reads = Counter()
    cache = DiskCache(root, blobs, LIMIT_BYTES)
    tasks = [asyncio.create_task(cache.fetch(version.digest, version.files)) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    cancelled, *folders = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert folders == [root / version.digest] * 9
    assert files_under(root / version.digest) == ["adapter_config.json", "adapter_model.safetensors"]
    assert blobs.reads == {file.key: 1 for file in version.files}


async def test_the_least_recently_fetched_goes_first(
    root: Path, blobs: Blobs, publish: Publish, tmp_path: Path
) -> None:
    """Room is made by bytes, in the order of last use."""
    one, two, three = await versions(publish, tmp_path, 3)
    cache = DiskCache(root, blobs, one.size_bytes * 2 + 100)
    for version in (one, two, one, three):
        await cache.fetch(version.digest, version.files)
    assert [one.digest in cache, two.digest in cache, three.digest in cache] == [True, False, True]
    assert not (root / two.digest).exists()
    assert cache.used_bytes == one.size_bytes + three.size_bytes


async def test_a_pinned_folder_is_never_removed(root: Path, blobs: Blobs, publish: Publish, tmp_path: Path) -> None:
    """With everything pinned a fetch fails as StorageFull; after unpin there is room."""
    one, two = await versions(publish, tmp_path, 2)
    cache = DiskCache(root, blobs, one.size_bytes + 100)
    cache.pin(one.digest)
    cache.pin(one.digest)
    await cache.fetch(one.digest, one.files)
    cache.unpin(one.digest)
    with pytest.raises(StorageFull, match="in use"):
        await cache.fetch(two.digest, two.files)
    assert files_under(root / one.digest)
    cache.unpin(one.digest)
    await cache.fetch(two.digest, two.files)
    assert list(root.iterdir()) == [root / two.digest]


async def test_an_unpin_too_many_is_an_error(cache: DiskCache) -> None:
    """Pins are counted exactly."""
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin("0" * 64)


@pytest.mark.parametrize("at", [0, -1])
async def test_a_flipped_blob_is_found_and_nothing_is_left(
    at: int, cache: DiskCache, root: Path, publish: Publish, good: Path, shelf: Shelf
) -> None:
    """One changed byte in the blob store: BlobCorrupt, and no folder."""
    version = await publish(good)
    shelf.flip(version.files[1].key, at)
    with pytest.raises(BlobCorrupt):
        await cache.fetch(version.digest, version.files)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("change", [-1, 1, 100_000])
async def test_a_blob_of_another_size_is_found(
    change: int, cache: DiskCache, root: Path, publish: Publish, good: Path, shelf: Shelf
) -> None:
    """A shorter or longer blob is corrupt; no more than its size is written."""
    version = await publish(good)
    key = version.files[1].key
    raw = shelf.read(key)
    shelf.write(key, raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(BlobCorrupt):
        await cache.fetch(version.digest, version.files)
    assert list(root.iterdir()) == []


async def test_a_missing_blob_is_told(cache: DiskCache, root: Path, publish: Publish, good: Path, blobs: Blobs) -> None:
    """A blob that is gone is BlobCorrupt, and a later fetch tries again."""
    version = await publish(good)
    await blobs.delete(version.files[1].key)
    for _ in range(2):
        with pytest.raises(BlobCorrupt, match="gone"):
            await cache.fetch(version.digest, version.files)
    assert list(root.iterdir()) == []


async def test_a_restart_takes_over_and_verifies_once(root: Path, blobs: Blobs, publish: Publish, good: Path) -> None:
    """Folders of an earlier process are used again; one that rotted meanwhile is fetched anew."""
    version = await publish(good)
    folder = await DiskCache(root, blobs, LIMIT_BYTES).fetch(version.digest, version.files)
    kept = folder.stat().st_ino
    (root / ".partial-abc").mkdir()
    cache = DiskCache(root, blobs, LIMIT_BYTES)
    assert cache.used_bytes == version.size_bytes
    assert (await cache.fetch(version.digest, version.files)).stat().st_ino == kept
    (folder / "adapter_model.safetensors").write_bytes(b"rot")
    await DiskCache(root, blobs, LIMIT_BYTES).fetch(version.digest, version.files)
    assert (folder / "adapter_model.safetensors").stat().st_size == version.files[1].size_bytes
    assert list(root.iterdir()) == [folder]


async def test_a_byte_that_changes_after_the_fetch_is_found_before_the_next_load(
    cache: DiskCache, publish: Publish, good: Path
) -> None:
    """Of the same size, in a file that was verified before; the engine is given the right one."""
    version = await publish(good)
    cache.pin(version.digest)
    folder = await cache.fetch(version.digest, version.files)
    weights = folder / "adapter_model.safetensors"
    right = weights.read_bytes()
    for at in (0, len(right) // 2, -1):
        rotten = bytearray(right)
        rotten[at] ^= 1
        weights.write_bytes(rotten)
        await cache.fetch(version.digest, version.files)
        assert weights.read_bytes() == right
    assert cache.used_bytes == version.size_bytes


async def test_files_in_use_are_never_taken_away(cache: DiskCache, publish: Publish, good: Path, blobs: Blobs) -> None:
    """Neither released, nor where they are rotten and cannot be had anew; without a pin they go."""
    version = await publish(good)
    cache.pin(version.digest)
    folder = await cache.fetch(version.digest, version.files)
    with pytest.raises(DigestPinned):
        await cache.release(version.digest)
    (folder / "adapter_model.safetensors").write_bytes(b"rot")
    await blobs.delete(version.files[1].key)
    with pytest.raises(BlobCorrupt):
        await cache.fetch(version.digest, version.files)
    assert files_under(folder) == ["adapter_config.json", "adapter_model.safetensors"]
    cache.unpin(version.digest)
    assert await cache.release(version.digest)
    assert not folder.exists()
    assert not await cache.release(version.digest)
    with pytest.raises(ValueError, match="not a digest"):
        await cache.release("..")


async def test_a_vanished_file_is_fetched_again(cache: DiskCache, publish: Publish, good: Path) -> None:
    """Files that somebody removed under the cache come back with the next fetch."""
    version = await publish(good)
    folder = await cache.fetch(version.digest, version.files)
    (folder / "adapter_model.safetensors").unlink()
    assert (await cache.fetch(version.digest, version.files)) == folder
    assert (folder / "adapter_model.safetensors").exists()


async def test_no_path_comes_from_anything_but_digests(cache: DiskCache, publish: Publish, good: Path) -> None:
    """Digests that are not hex, other file names and files that make up another digest are refused."""
    version = await publish(good)
    with pytest.raises(ValueError, match="not a digest"):
        await cache.fetch("../" + version.digest[3:], version.files)
    with pytest.raises(BlobCorrupt, match="do not make up"):
        await cache.fetch("0" * 64, version.files)
    climbing = BlobFile("../../x", version.files[0].key, version.files[0].sha256, 1)
    with pytest.raises(BlobCorrupt, match="has the files"):
        await cache.fetch(version.digest, (climbing, version.files[1]))
