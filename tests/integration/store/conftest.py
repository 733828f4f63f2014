"""The real store, with a real inspection worker: on SQLite and a folder, and on PostgreSQL and S3."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.bundle import BUNDLE_FILES, StagedBundle, Staging
from adapter_store.catalog import Version
from adapter_store.faults import Bounds
from adapter_store.ids import TenantId
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from gateway.database import migrate, open_engine
from tests.bad_adapters import write_base, write_good
from tests.storage import Kind, Place, Shelf

TENANT = TenantId("ten_a")
OTHER = TenantId("ten_b")
Publish = Callable[..., Awaitable[Version]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.read(write_base(tmp_path_factory.mktemp("models") / "base"))


@pytest.fixture(scope="session")
async def inspector(base: BaseModel) -> AsyncIterator[Inspector]:
    inspector = Inspector(base, Bounds())
    yield inspector
    await inspector.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the store run on both kinds of storage; those about SQLite's or a folder's own ways on these alone."""
    if "place" in metafunc.fixturenames:
        is_local = metafunc.definition.get_closest_marker("local") or "blobs_folder" in metafunc.fixturenames
        metafunc.parametrize("place", [Kind.LOCAL] if is_local else list(Kind), indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue("local" if request.param == Kind.LOCAL else "remote")
    return found


@pytest.fixture
async def engine(place: Place) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(place.database_url)
    await migrate(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def blobs_folder(place: Place) -> Path:
    """Where the blobs are files; a test that asks for it runs on a folder alone."""
    assert place.folder is not None
    return place.folder


@pytest.fixture
def blobs(place: Place) -> Blobs:
    return Blobs.open(place.blobs_url)


@pytest.fixture
def shelf(place: Place, blobs: Blobs) -> Shelf:
    return Shelf(blobs, place.folder)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "quarantine", weights_limit_bytes=8 << 20)


@pytest.fixture
def store(engine: AsyncEngine, blobs: Blobs, inspector: Inspector) -> AdapterStore:
    return AdapterStore(engine, blobs, inspector)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_good(tmp_path / "good")


async def stage(bundle: StagedBundle, folder: Path) -> None:
    """Sends a folder's files in pieces of 1,000 bytes, as an upload would."""
    for name in BUNDLE_FILES:
        if (folder / name).exists():
            raw = (folder / name).read_bytes()
            async with bundle.open(name) as file:
                for start in range(0, len(raw), 1_000):
                    await file.write(raw[start : start + 1_000])


@pytest.fixture
def publish(store: AdapterStore, staging: Staging) -> Publish:
    async def publish(folder: Path, name: str = "bot", tenant: TenantId = TENANT) -> Version:
        async with staging.stage() as bundle:
            await stage(bundle, folder)
            return await store.publish(tenant, name, bundle)

    return publish


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
