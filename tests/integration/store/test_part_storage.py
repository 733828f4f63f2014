"""Parts of uploads in a folder, in one file at their places, and as objects: the same promises."""

import asyncio
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from adapter_store.blobs import Blobs
from adapter_store.bundle import WEIGHTS_FILE, StagedBundle, Staging
from adapter_store.errors import BlobCorrupt
from adapter_store.ids import TenantId, UploadId
from adapter_store.part_storage import Part, PartFile, PartFolder, PartObjects, PartStorage

PIECES = [b"a" * 4_096, b"b" * 4_096, b"c" * 100]
WHOLE = b"".join(PIECES)
FILE = PartFile(TenantId("ten_a"), UploadId("upl_" + "0" * 24), WEIGHTS_FILE, 1, len(WHOLE))
PARTS = [Part(FILE, n + 1, n * 4_096, len(data), sha256(data).hexdigest()) for n, data in enumerate(PIECES)]
MAKE: list[Callable[[Path], PartStorage]] = [
    lambda root: PartFolder(Blobs.open(str(root)), root),
    lambda root: PartObjects(Blobs.open(str(root))),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture(params=MAKE, ids=["folder", "objects"])
def storage(request: pytest.FixtureRequest, root: Path) -> PartStorage:
    make: Callable[[Path], PartStorage] = request.param
    return make(root)


async def put(storage: PartStorage, number: int, folder: Path, *, is_first: bool = False) -> None:
    path = folder / f"part-{number}"
    path.write_bytes(PIECES[number - 1])
    async with storage.turn(FILE):
        await storage.put(PARTS[number - 1], path, is_first=is_first)
    path.unlink()


async def put_all(storage: PartStorage, folder: Path) -> None:
    for number in (3, 1, 2):
        await put(storage, number, folder, is_first=number == 3)


async def assembled(storage: PartStorage, bundle: StagedBundle) -> bytes:
    await storage.assemble(FILE, PARTS, bundle)
    read = (bundle.folder / WEIGHTS_FILE).read_bytes()
    assert bundle.sizes[WEIGHTS_FILE] == len(read)
    assert bundle.sha256[WEIGHTS_FILE] == sha256(read).hexdigest()
    return read


def stored(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


async def test_parts_in_any_order_are_the_file(storage: PartStorage, root: Path, tmp_path: Path) -> None:
    """Staged whole with its hash; dropped, nothing of it is left."""
    await put_all(storage, tmp_path)
    assert [await storage.holds(part) for part in PARTS] == [True] * 3
    async with Staging(tmp_path / "staging").stage() as bundle:
        assert await assembled(storage, bundle) == WHOLE
        await storage.drop([FILE], PARTS)
        assert stored(root) == []
        assert (bundle.folder / WEIGHTS_FILE).read_bytes() == WHOLE


async def test_a_file_that_is_gone_is_told(storage: PartStorage, tmp_path: Path) -> None:
    """And no part of it is held."""
    await put_all(storage, tmp_path)
    await storage.drop([FILE], PARTS)
    assert [await storage.holds(part) for part in PARTS] == [False] * 3
    async with Staging(tmp_path / "staging").stage() as bundle:
        with pytest.raises(BlobCorrupt):
            await storage.assemble(FILE, PARTS, bundle)


async def test_what_is_staged_is_never_written_to(root: Path, tmp_path: Path) -> None:
    """A part that has to come again goes to another file than the one that is being inspected."""
    storage = PartFolder(Blobs.open(str(root)), root)
    await put_all(storage, tmp_path)
    async with Staging(tmp_path / "staging").stage() as bundle:
        await assembled(storage, bundle)
        async with storage.turn(FILE):
            await storage.keep_only(FILE, [PARTS[0], PARTS[2]])
        assert [await storage.holds(part) for part in PARTS] == [True, False, True]
        assert (bundle.folder / WEIGHTS_FILE).read_bytes() == WHOLE
    await put(storage, 2, tmp_path)
    async with Staging(tmp_path / "staging").stage() as bundle:
        assert await assembled(storage, bundle) == WHOLE
    assert stored(root) == [root / FILE.key]


async def test_gateways_take_turns_at_a_file(root: Path) -> None:
    """Two that share a folder, each several times at once; a file that was removed meanwhile is another one."""
    gateways = [PartFolder(Blobs.open(str(root)), root) for _ in range(2)]
    inside = 0

    async def work(storage: PartFolder, number: int) -> None:
        nonlocal inside
        async with storage.turn(FILE):
            inside += 1
            for _ in range(5):
                assert inside == 1
                await asyncio.sleep(0)
            if number == 0:
                (root / FILE.key).unlink()
            inside -= 1

    await asyncio.gather(*(work(storage, number) for number in range(3) for storage in gateways))
    assert stored(root) == [root / FILE.key]


async def test_a_copy_is_staged_where_no_link_can_be(root: Path, tmp_path: Path) -> None:
    """A staging folder on another filesystem: the same bytes."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other filesystem")
    storage = PartFolder(Blobs.open(str(root)), root)
    await put_all(storage, tmp_path)
    staging = Staging(elsewhere / f"tailor-{tmp_path.name}-{id(root)}")
    try:
        async with staging.stage() as bundle:
            assert await assembled(storage, bundle) == WHOLE
    finally:
        staging.root.rmdir()
