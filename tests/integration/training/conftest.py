"""A real database, a real blob store, and a base small enough that a job takes a second."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from adapter_store.base_model import BaseModel
from adapter_store.blob_rows import naming_columns
from adapter_store.blobs import Blobs
from adapter_store.bundle import Staging
from adapter_store.catalog import Version
from adapter_store.engine import AsyncEngine
from adapter_store.faults import Bounds
from adapter_store.ids import TenantId
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading
from gateway.database import migrate, open_engine
from tests.small_base import SMALL
from tests.storage import Place, Shelf
from training import tiny_base
from training.files import Files, NewFile, Purpose
from training.jobs import OVER, Event, Job, Jobs, NewJob
from training.jobs import jobs as jobs_table
from training.results import Results
from training.warm_base import WarmBase
from training.worker import Options, Worker

TENANT = TenantId("ten_a")
OTHER = TenantId("ten_b")
RECIPE: dict[str, Any] = {"rank": 4, "epochs": 3, "batch_size": 4, "learning_rate": 5e-3, "seed": 7}
ROWS = 12  # three steps an epoch


def chats(count: int = ROWS, seed: int = 0) -> bytes:
    """Training data that differs by `seed`."""
    lines = []
    for number in range(count):
        question, answer = f"what is {seed} and {number}?", f"it is {(seed + 1) * (number + 3) % 97}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}).encode() + b"\n")
    return b"".join(lines)


@dataclass(frozen=True)
class Desk:
    """Rows, blobs and the store of one test, as gateway and workers share them."""

    place: Place
    base: BaseModel
    folder: Path
    engine: AsyncEngine
    blobs: Blobs
    store: AdapterStore
    jobs: Jobs
    files: Files
    home: Path

    @property
    def results(self) -> Results:
        return Results(self.engine, self.blobs, self.store, Staging(self.home / "training"), time.time)

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.blobs, self.place.folder)

    async def file(self, content: bytes, tenant: TenantId = TENANT) -> str:
        path = self.home / f"{hashlib.sha256(content).hexdigest()}.jsonl"
        path.write_bytes(content)
        new = NewFile(tenant, Purpose.FINE_TUNE, "data.jsonl", hashlib.sha256(content).hexdigest(), len(content))
        return (await self.files.create(new, path)).id

    async def job(
        self,
        content: bytes | None = None,
        *,
        tenant: TenantId = TENANT,
        recipe: dict[str, Any] | None = None,
        **more: Any,
    ) -> Job:
        """A job in the queue."""
        new = NewJob(
            tenant_id=tenant,
            created_by="key_1",
            model=self.base.name,
            base_fingerprint=self.base.fingerprint,
            method="supervised",
            training_file=await self.file(content or chats(), tenant),
            seed=7,
            recipe={**RECIPE, **(recipe or {})},
            adapter="bot",
        )
        return await self.jobs.create(replace(new, **more))

    async def find(self, job: Job) -> Job:
        return await self.jobs.find(job.tenant_id, job.id)

    async def ended(self, job: Job, deadline_s: float = 60) -> Job:
        """The job, once it is over."""
        return await self.reached(job, lambda now: now.status in OVER, deadline_s)

    async def reached(self, job: Job, holds: Callable[[Job], bool], deadline_s: float = 60) -> Job:
        async with asyncio.timeout(deadline_s):
            while not holds(now := await self.find(job)):
                await asyncio.sleep(0.01)
        return now

    async def events(self, job: Job) -> list[Event]:
        """The oldest first."""
        return list(await self.jobs.events(job.tenant_id, job.id, after=0, limit=10_000))

    async def told(self, job: Job) -> list[str]:
        return [event.told.message for event in await self.events(job)]

    async def steps(self, job: Job) -> list[int]:
        """Those whose metrics are kept."""
        return [event.told.data["step"] for event in await self.events(job) if event.told.data is not None]

    async def versions(self, tenant: TenantId = TENANT, name: str = "bot") -> Sequence[Version]:
        return (await self.store.show(tenant, name))[1]

    async def weights(self, job: Job) -> str:
        """SHA-256 of the weights that the job has published."""
        found = [version for version in await self.versions(job.tenant_id, job.adapter) if version.id == job.version_id]
        assert len(found) == 1
        return found[0].files[1].sha256

    def worker(self, warm: WarmBase, **more: Any) -> Worker:
        options = Options(
            "worker",
            self.base.fingerprint,
            save_every_s=0.0,
            look_every_s=0.05,
            lease_s=8,
            renew_every_s=0.1,
        )
        return Worker(self.results, lambda: warm, replace(options, **more))

    @asynccontextmanager
    async def working(self, warm: WarmBase, **more: Any) -> AsyncIterator[Worker]:
        """A worker in this process, until the block ends; then it gives back what it has."""
        stopping = asyncio.Event()
        worker = self.worker(warm, **more)
        task = asyncio.create_task(worker.run(stopping))
        try:
            yield worker
        finally:
            stopping.set()
            await task


async def saves(desk: Desk) -> list[str]:
    """The blobs that neither a version nor a file names."""
    others = [column for column in naming_columns() if column.table is not jobs_table]
    async with reading(desk.engine) as connection:
        named = {digest for column in others for digest in (await connection.execute(select(column))).scalars()}
    found = desk.shelf.keys()
    return [key for key in found if key.rpartition("/")[2] not in named]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build(tmp_path_factory.mktemp("models") / "small-base", recipe=SMALL).path


@pytest.fixture(scope="session")
def base(folder: Path) -> BaseModel:
    return BaseModel.read(folder, name="small-base")


@pytest.fixture(scope="session")
def warm(folder: Path, base: BaseModel) -> WarmBase:
    return WarmBase(folder, fingerprint=base.fingerprint, device="cpu", threads=1)


@pytest.fixture(scope="session")
async def inspector(base: BaseModel) -> AsyncIterator[Inspector]:
    inspector = Inspector(base, Bounds())
    yield inspector
    await inspector.close()


@pytest.fixture
def place(request: pytest.FixtureRequest, local: Place) -> Place:
    if request.config.getoption("storage") == local.kind.value or request.node.get_closest_marker("local"):
        return local
    found: Place = request.getfixturevalue("remote")
    return found


@pytest.fixture
async def desk(
    place: Place, folder: Path, base: BaseModel, inspector: Inspector, tmp_path: Path
) -> AsyncIterator[Desk]:
    engine = open_engine(place.database_url)
    await migrate(engine)
    blobs = Blobs.open(place.blobs_url)
    store = AdapterStore(engine, blobs, inspector)
    home = tmp_path / "home"
    home.mkdir()
    yield Desk(place, base, folder, engine, blobs, store, Jobs(engine), Files(engine, blobs), home)
    await engine.dispose()
