"""Blobs by content, in a folder and in S3: whole or not there, and nothing left of what was interrupted."""

import asyncio
import hashlib
import os
from pathlib import Path

import obstore
import pytest

from adapter_store.blobs import Blobs, blob_key
from adapter_store.errors import BlobCorrupt
from adapter_store.ids import TenantId
from adapter_store.store import AdapterStore
from tests.integration.store.conftest import TENANT, Publish
from tests.storage import Place, Servers, Shelf

PART_BYTES = 5 << 20
A_DAY_S = 86_400.0
BEFORE_S3 = 1.0e9  # in 2001: moto says of every upload that it was begun in November 2010


@pytest.fixture
def other(place: Place, tmp_path: Path) -> Blobs:
    """A second store of the same kind."""
    return Blobs.open(str(tmp_path / "other") if place.folder else f"{place.blobs_url}/other")


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size_bytes", [1, PART_BYTES + 1])
async def test_a_blob_comes_back_as_it_was_put(size_bytes: int, blobs: Blobs, tmp_path: Path) -> None:
    """In one part and in several."""
    sha256 = written(tmp_path / "file", bytes(size_bytes))
    key = blob_key(TENANT, sha256)
    await blobs.put(key, tmp_path / "file")
    assert await blobs.exists(key, size_bytes)
    assert await blobs.sha256(key) == sha256


@pytest.mark.parametrize("size_bytes", [1, PART_BYTES + 1])
async def test_a_blob_outlives_the_file_that_it_was_adopted_from(size_bytes: int, blobs: Blobs, tmp_path: Path) -> None:
    """Twice in a row too, as a publish that is repeated does it; nothing else is left in the store."""
    sha256 = written(tmp_path / "file", bytes(size_bytes))
    key = blob_key(TENANT, sha256)
    for _ in range(2):
        await blobs.adopt(key, tmp_path / "file")
    (tmp_path / "file").unlink()
    assert await blobs.sha256(key) == sha256
    assert await blobs.names("adapters") == [key]
    assert await blobs.sweep_partial(4e9) == 0


async def test_a_folder_adopts_without_a_copy_what_lies_on_its_filesystem(tmp_path: Path) -> None:
    """100 MB are a name more; what lies elsewhere is copied."""
    blobs = Blobs.open(str(tmp_path / "blobs"))
    near, far = tmp_path / "near", Path("/dev/shm") / f"tailor-{tmp_path.name}-{os.getpid()}"
    for path in (near, far):
        key = blob_key(TENANT, written(path, path.name.encode()))
        await blobs.adopt(key, path)
        assert (tmp_path / "blobs" / key).read_bytes() == path.name.encode()
    far.unlink()
    assert near.stat().st_nlink == 2


@pytest.mark.parametrize("key", ["../outside", "adapters/../../outside", "/etc/hostname"])
async def test_no_key_leads_out_of_the_folder(key: str, tmp_path: Path) -> None:
    """A replica is told keys over HTTP."""
    blobs = Blobs.open(str(tmp_path / "blobs"))
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(ValueError, match="is no key"):
        async with blobs.read(key):
            raise AssertionError


@pytest.mark.parametrize("size_bytes", [1, PART_BYTES + 1])
async def test_a_copy_is_verified_on_its_way(
    size_bytes: int, blobs: Blobs, other: Blobs, shelf: Shelf, tmp_path: Path
) -> None:
    """What is not as its digest says never appears in the other store; what is, does."""
    sha256 = written(tmp_path / "file", bytes(size_bytes))
    key = blob_key(TENANT, sha256)
    await blobs.put(key, tmp_path / "file")
    shelf.flip(key, -1)
    with pytest.raises(BlobCorrupt, match="not what its digest says"):
        await blobs.copy(key, sha256, other)
    assert await other.names("adapters") == []
    await blobs.put(key, tmp_path / "file")
    await blobs.copy(key, sha256, other)
    assert await other.sha256(key) == sha256


async def test_orphans_are_collected_after_their_grace(
    publish: Publish, store: AdapterStore, blobs: Blobs, shelf: Shelf, good: Path
) -> None:
    """A blob that no version names goes when it is old enough; one that is named stays however old it is."""
    version = await publish(good)
    named = sorted(file.key for file in version.files)
    await blobs.put(blob_key(TENANT, "f" * 64), good / "adapter_config.json")
    assert await store.collect_orphans(older_than_s=A_DAY_S) == 0
    assert len(shelf.keys()) == 3
    assert await store.collect_orphans(older_than_s=-A_DAY_S) == 1
    assert shelf.keys() == named


async def test_a_put_to_s3_that_was_interrupted_is_ended(remote: Place) -> None:
    """Its parts, which no list of objects shows, are gone once they are old enough; nothing was ever visible."""
    blobs = Blobs.open(remote.blobs_url)
    halfway = obstore.open_writer(blobs._store, blob_key(TENANT, "f" * 64), buffer_size=PART_BYTES)
    halfway.write(bytes(PART_BYTES + 1))
    assert await blobs.names("adapters") == []
    assert await blobs.sweep_partial(BEFORE_S3) == 0
    assert await blobs.sweep_partial(2 * BEFORE_S3) == 1
    assert await blobs.sweep_partial(2 * BEFORE_S3) == 0


async def test_others_uploads_in_the_bucket_are_left_alone(remote: Place, servers: Servers) -> None:
    """Only what lies under our own prefix is ours."""
    theirs = Blobs.open(f"s3://{servers.s3.bucket}/theirs")
    halfway = obstore.open_writer(theirs._store, blob_key(TENANT, "f" * 64), buffer_size=PART_BYTES)
    halfway.write(bytes(PART_BYTES + 1))
    assert await Blobs.open(remote.blobs_url).sweep_partial(2 * BEFORE_S3) == 0
    assert await theirs.sweep_partial(2 * BEFORE_S3) == 1


async def test_equal_files_of_a_tenant_are_stored_once(
    publish: Publish, store: AdapterStore, shelf: Shelf, good: Path
) -> None:
    """Ten adapters with the same bytes, published at once, are two blobs; another tenant's are two more."""
    await asyncio.gather(*(publish(good, name=f"bot{number}") for number in range(10)))
    assert len(shelf.keys()) == 2
    await publish(good, tenant=TenantId("ten_b"))
    assert len(shelf.keys()) == 4
    for number in range(9):
        await store.delete(TENANT, f"bot{number}")
    assert len(shelf.keys()) == 4
    await store.delete(TENANT, "bot9")
    assert len(shelf.keys()) == 2
