"""How blobs come in before the row that names them, and go when no row names them any more."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from adapter_store.blob_rows import NamedBlob, unreferenced
from adapter_store.blobs import Blobs, blob_key
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncEngine
from adapter_store.ids import TenantId
from adapter_store.scrub import forget, known_faults
from adapter_store.transactions import reading, writing

PUT_TRIES = 3  # a delete may remove a shared blob before the commit, which then sees it: the put is repeated


def hashed(path: Path) -> tuple[str, int]:
    """The file's SHA-256 and its size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


async def put_missing(
    engine: AsyncEngine, blobs: Blobs, tenant_id: TenantId, files: Sequence[tuple[NamedBlob, Path]]
) -> None:
    """Leaves out what a row names and is whole already. A blob that none names may be torn by a power cut.

    Raises StorageFull, StorageUnavailable.
    """
    digests = [blob.sha256 for blob, _ in files]
    async with reading(engine) as connection:
        loose = await unreferenced(connection, tenant_id, digests)
        anew = {*loose, *await known_faults(connection, tenant_id, digests)}
    for blob, path in files:
        if blob.sha256 in anew or not await blobs.exists(blob.key, blob.size_bytes):
            await blobs.adopt(blob.key, path)


async def all_stored(blobs: Blobs, files: Collection[NamedBlob]) -> bool:
    return all([await blobs.exists(blob.key, blob.size_bytes) for blob in files])


async def drop_unreferenced(
    engine: AsyncEngine, blobs: Blobs, tenant_id: TenantId, digests: Collection[str]
) -> Sequence[str]:
    """Removes those of the blobs that no row names, while no other writer can add one; which.

    Raises StorageUnavailable.
    """
    async with writing(engine) as connection:
        await take_turn(connection)
        loose = await unreferenced(connection, tenant_id, digests)
        await forget(connection, tenant_id, loose)
        for sha256 in loose:
            await blobs.delete(blob_key(tenant_id, sha256))
    return loose
