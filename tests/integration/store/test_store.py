"""An adapter's life in the store, and what is left when something goes wrong."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs, blob_key
from adapter_store.bundle import Staging
from adapter_store.changes import changes_since
from adapter_store.errors import (
    AdapterNotFound,
    AdapterRejected,
    BundleIncomplete,
    BundleTooLarge,
    NameInvalid,
    NameReserved,
    OtherBaseModel,
    StorageFull,
    StorageUnavailable,
)
from adapter_store.faults import Bounds
from adapter_store.ids import TenantId
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading
from tests.bad_adapters import BAD, write_good
from tests.integration.store.conftest import OTHER, TENANT, Publish, files_under, stage
from tests.storage import Shelf


async def test_what_is_published_answers_to_its_name(
    publish: Publish, store: AdapterStore, shelf: Shelf, good: Path
) -> None:
    """A published adapter resolves to version 1, whose blobs hold the tenant's weights."""
    version = await publish(good)
    assert version == await store.resolve(TENANT, "bot") == await store.resolve(TENANT, "bot@1")
    assert (version.number, version.rank, version.modules) == (1, 8, ("k_proj", "o_proj", "q_proj", "v_proj"))
    weights = version.files[1]
    assert shelf.read(weights.key) == (good / weights.name).read_bytes()


async def test_new_content_becomes_the_next_version(
    publish: Publish, store: AdapterStore, tmp_path: Path, good: Path
) -> None:
    """The alias moves to the newest; the older stays reachable by number."""
    first = await publish(good)
    second = await publish(write_good(tmp_path / "second", seed=7))
    assert (second.number, await store.resolve(TENANT, "bot")) == (2, second)
    assert await store.resolve(TENANT, "bot@1") == first
    adapter, versions = await store.show(TENANT, "bot")
    assert (adapter.default, versions) == (second, (second, first))


async def test_the_same_content_again_is_the_same_version(
    publish: Publish, store: AdapterStore, tmp_path: Path, good: Path
) -> None:
    """Publishing is idempotent by content, and moves the alias back to it."""
    first = await publish(good)
    await publish(write_good(tmp_path / "second", seed=7))
    assert await publish(good) == first == await store.resolve(TENANT, "bot")
    assert len((await store.show(TENANT, "bot"))[1]) == 2


async def test_a_tenant_cannot_tell_a_foreign_adapter_from_a_missing_one(
    publish: Publish, store: AdapterStore, good: Path
) -> None:
    """Resolve, show and delete answer alike; lists are apart."""
    await publish(good)
    for call in (store.resolve(OTHER, "bot"), store.show(OTHER, "bot"), store.delete(OTHER, "bot")):
        with pytest.raises(AdapterNotFound, match="'bot' does not exist"):
            await call
    assert await store.list(OTHER) == ()
    assert [adapter.name for adapter in await store.list(TENANT)] == ["bot"]


async def test_two_tenants_with_the_same_adapter_share_no_blob(
    publish: Publish, store: AdapterStore, good: Path, shelf: Shelf
) -> None:
    """Deleting one tenant's leaves the other's files."""
    await publish(good)
    theirs = await publish(good, tenant=OTHER)
    await store.delete(TENANT, "bot")
    assert shelf.keys() == sorted(file.key for file in theirs.files)


async def test_a_deleted_adapter_leaves_no_row_and_no_blob(
    publish: Publish, store: AdapterStore, engine: AsyncEngine, good: Path, shelf: Shelf
) -> None:
    """After delete the name is free and nothing of it is stored."""
    await publish(good)
    await store.delete(TENANT, "bot")
    with pytest.raises(AdapterNotFound):
        await store.resolve(TENANT, "bot")
    assert shelf.keys() == []
    async with reading(engine) as connection:
        for table in ("adapters", "versions", "aliases"):
            assert (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar() == 0
    assert (await publish(good)).number == 1


async def test_blobs_that_another_adapter_uses_survive_a_delete(
    publish: Publish, store: AdapterStore, good: Path, blobs: Blobs
) -> None:
    """Within a tenant equal files are stored once and go with the last that needs them."""
    first = await publish(good)
    second = await publish(good, name="other")
    assert first.files == second.files
    await store.delete(TENANT, "bot")
    assert all([await blobs.exists(file.key, file.size_bytes) for file in second.files])


async def test_what_does_not_exist_is_not_found(
    publish: Publish, store: AdapterStore, good: Path, subtests: pytest.Subtests
) -> None:
    """Unknown names, numbers and ill-formed ones give the same error."""
    await publish(good)
    for model in ("", "nothing", "bot@2", "bot@0", "bot@01", "bot@", "bot@x", "bot:x", "Bot", "b" * 999):
        with subtests.test(model=model), pytest.raises(AdapterNotFound):
            await store.resolve(TENANT, model)


async def test_a_name_that_breaks_the_rule_is_refused(store: AdapterStore, subtests: pytest.Subtests) -> None:
    """The message states the rule."""
    for name in ("", "-bot", ".bot", "Bot", "b/ot", "bot@1", "..", "böt", "b" * 65, "bot\0", "bot\n"):
        with subtests.test(name=name), pytest.raises(NameInvalid, match="1 to 64"):
            store.check_name(name)


async def test_the_base_model_s_name_is_reserved(store: AdapterStore, base: BaseModel) -> None:
    """No adapter can take over the base model's traffic."""
    with pytest.raises(NameReserved):
        store.check_name(base.name)


async def test_lists_come_in_pages(publish: Publish, store: AdapterStore, good: Path) -> None:
    """A page starts after the last name of the one before."""
    for name in ("c", "a", "b"):
        await publish(good, name=name)
    first = await store.list(TENANT, limit=2)
    second = await store.list(TENANT, after=first[-1].name, limit=2)
    assert [adapter.name for adapter in first + second] == ["a", "b", "c"]


async def test_a_refused_adapter_leaves_nothing(
    publish: Publish, store: AdapterStore, tmp_path: Path, good: Path, shelf: Shelf, subtests: pytest.Subtests
) -> None:
    """Every tenth of the bad adapters through the whole door: its faults come back, nothing is stored."""
    for bad in [bad for bad in BAD[::10] if bad.served_as is None]:
        folder = bad.make(good, tmp_path / bad.name)
        with subtests.test(bad=bad.name):
            with pytest.raises((AdapterRejected, BundleIncomplete, BundleTooLarge)):
                await publish(folder)
            assert shelf.keys() == files_under(tmp_path / "quarantine") == []
            assert await store.list(TENANT) == ()


async def test_concurrent_publishes_of_one_name_number_without_gap(
    publish: Publish, store: AdapterStore, tmp_path: Path
) -> None:
    """Six at once, three of them equal: four versions, numbered 1 to 4."""
    folders = [write_good(tmp_path / f"good{number}", seed=max(number, 2)) for number in range(6)]
    published = await asyncio.gather(*(publish(folder) for folder in folders))
    _, versions = await store.show(TENANT, "bot")
    assert [version.number for version in versions] == [4, 3, 2, 1]
    assert {version.id for version in published} == {version.id for version in versions}


async def test_publish_and_delete_at_once_lose_no_blob(
    publish: Publish, store: AdapterStore, good: Path, blobs: Blobs
) -> None:
    """While one adapter is deleted, another with the same files is published: its files are there."""
    for number in range(10):
        await publish(good, name="old")
        new, _ = await asyncio.gather(publish(good, name=f"new{number}"), store.delete(TENANT, "old"))
        assert all([await blobs.exists(file.key, file.size_bytes) for file in new.files])
        await store.delete(TENANT, f"new{number}")


async def test_every_move_is_in_the_change_feed(
    publish: Publish, store: AdapterStore, engine: AsyncEngine, good: Path
) -> None:
    """Publish and delete are told once each; an idempotent publish, which moves nothing, is not."""
    await publish(good)
    await publish(good)
    await store.delete(TENANT, "bot")
    async with reading(engine) as connection:
        told = await changes_since(connection, 0)
        found = [change for change in told if change.noun == "adapter"]
        assert [(change.noun, change.tenant_id, change.name) for change in found] == [("adapter", TENANT, "bot")] * 2
        assert [*await changes_since(connection, found[0].seq)] == told[1:]


async def test_a_version_for_another_base_is_not_served(
    publish: Publish, engine: AsyncEngine, blobs: Blobs, base: BaseModel, good: Path
) -> None:
    """After a restart on another base model, old versions are refused by name instead of loaded."""
    await publish(good)
    moved = AdapterStore(engine, blobs, Inspector(replace(base, fingerprint="0" * 64), Bounds()))
    with pytest.raises(OtherBaseModel, match="train it again"):
        await moved.resolve(TENANT, "bot")


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Writes past the limit fail with EFBIG, as they would with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_no_space_for_the_upload(publish: Publish, good: Path, tmp_path: Path, blobs_folder: Path) -> None:
    """A disk that fills up during the upload: StorageFull, nothing left."""
    with file_size_limit(10_000), pytest.raises(StorageFull):
        await publish(good)
    assert files_under(blobs_folder) == files_under(tmp_path / "quarantine") == []
    assert (await publish(good)).number == 1


async def test_no_space_for_the_blob(store: AdapterStore, good: Path, blobs_folder: Path) -> None:
    """A disk that fills up while the blob is written: StorageFull, no blob, no row, and it recovers by itself.

    Staged on another filesystem, so that it has to be copied.
    """
    async with AsyncExitStack() as held:
        elsewhere = held.enter_context(TemporaryDirectory(dir="/dev/shm"))
        bundle = await held.enter_async_context(Staging(Path(elsewhere)).stage())
        await stage(bundle, good)
        with file_size_limit(20_000), pytest.raises(StorageFull):
            await store.publish(TENANT, "bot", bundle)
        assert files_under(blobs_folder) == []
        assert await store.list(TENANT) == ()
        assert (await store.publish(TENANT, "bot", bundle)).number == 1


async def test_a_read_only_blob_folder_is_told(
    publish: Publish, good: Path, blobs_folder: Path, tmp_path: Path
) -> None:
    """A blob store that cannot be written to: StorageUnavailable, nothing left."""
    (blobs_folder / "adapters").write_text("a file where a folder should be")
    with pytest.raises(StorageUnavailable):
        await publish(good)
    assert files_under(tmp_path / "quarantine") == []


async def test_orphans_are_collected_by_age(
    publish: Publish, store: AdapterStore, blobs: Blobs, blobs_folder: Path, good: Path
) -> None:
    """What a crash left (blobs without rows, half-written files) goes; what is in use or young stays."""
    version = await publish(good)
    await blobs.put(blob_key(TENANT, "f" * 64), good / "adapter_config.json")
    (blobs_folder / f"{blob_key(TENANT, 'e' * 64)}#1").write_bytes(b"half")
    assert await store.collect_orphans(older_than_s=3_600) == 0
    for path in blobs_folder.rglob("*"):
        os.utime(path, (0, 0))
    assert await store.collect_orphans(older_than_s=3_600) == 2
    assert files_under(blobs_folder) == sorted(file.key for file in version.files)


async def test_a_crash_between_blobs_and_rows_can_be_repeated(
    publish: Publish, blobs: Blobs, shelf: Shelf, good: Path
) -> None:
    """A torn blob that no row names is written anew by the next publish of the same content."""
    version = await publish(good)
    again = TenantId("ten_c")
    torn = blob_key(again, version.files[1].sha256)
    shelf.write(torn, bytes(version.files[1].size_bytes))
    await publish(good, tenant=again)
    assert shelf.read(torn) == (good / "adapter_model.safetensors").read_bytes()


async def test_a_cancelled_publish_leaves_nothing(
    publish: Publish, store: AdapterStore, good: Path, tmp_path: Path, shelf: Shelf
) -> None:
    """A client that goes away at any moment leaves all or nothing."""
    for turns in range(0, 60, 3):
        task = asyncio.ensure_future(publish(good, name=f"n{turns}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert files_under(tmp_path / "quarantine") == []
    kept = {file.key for adapter in await store.list(TENANT) for file in adapter.default.files}
    assert set(shelf.keys()) == kept
