"""Where tests keep rows and blobs: SQLite and a folder, or a real PostgreSQL and an S3 server.

The servers start with the first test that needs them and serve the whole run; each test has a database and a prefix
of its own.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.store import LocalStore

from adapter_store.blobs import PREFIX, Blobs
from gateway.database import migrate, open_engine
from tests.servers import PostgresServer, S3Server, postgres_server, s3_server

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SETTINGS = ("TAILOR_DATABASE_URL", "TAILOR_BLOBS_URL")


class Kind(StrEnum):
    """What `--storage` takes."""

    LOCAL = "sqlite-folder"
    SERVERS = "postgres-s3"


@dataclass(frozen=True)
class Place:
    """One test's rows and blobs; `folder` where the blobs are files."""

    kind: Kind
    database_url: str
    blobs_url: str
    folder: Path | None = None

    @property
    def settings(self) -> dict[str, str]:
        return dict(zip(SETTINGS, (self.database_url, self.blobs_url), strict=True))


class Servers:
    """PostgreSQL and S3, each started on first use."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._numbers = count(1)

    @cached_property
    def postgres(self) -> PostgresServer:
        return self._running.enter_context(postgres_server())

    @cached_property
    def s3(self) -> S3Server:
        return self._running.enter_context(s3_server())

    @cached_property
    def _migrated(self) -> str:
        """The name of a database with today's tables: to copy it costs a tenth of making them."""
        url = self._running.enter_context(self.postgres.database("migrated"))
        with ThreadPoolExecutor(1) as thread:  # a loop of its own
            thread.submit(asyncio.run, _migrate(url)).result()
        return "migrated"

    @contextmanager
    def place(self, *, migrated: bool = False) -> Iterator[Place]:
        """A database, empty or with today's tables, and an empty prefix; the credentials are in the environment
        meanwhile."""
        name = f"test{next(self._numbers)}"
        template = self._migrated if migrated else None
        with self.postgres.database(name, template) as database_url, environment(self.s3.environment):
            yield Place(Kind.SERVERS, database_url, f"s3://{self.s3.bucket}/{name}/blobs")

    def close(self) -> None:
        self._running.close()


async def _migrate(url: str) -> None:
    engine = open_engine(url)
    await migrate(engine)
    await engine.dispose()


def local_place(folder: Path) -> Place:
    blobs = folder / "blobs"
    return Place(Kind.LOCAL, f"sqlite+aiosqlite:///{folder / 'tailor.db'}", blobs.as_uri(), blobs)


def settings_at(home: Path) -> dict[str, str]:
    """Where a gateway with this home keeps rows and blobs, as settings for one with another home."""
    own = local_place(home).settings
    return {name.removeprefix("TAILOR_").lower(): os.environ.get(name, own[name]) for name in SETTINGS}


def shelf_of(home: Path) -> "Shelf":
    """The blobs of a gateway with this home."""
    url = settings_at(home)["blobs_url"]
    return Shelf(Blobs.open(url), home / "blobs" if url.startswith("file:") else None)


@contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def clean_environment() -> dict[str, str]:
    """What a process of ours inherits in a test: no setting but those that `--storage` made."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_") or name in SETTINGS}


class Shelf:
    """What lies in a blob store, seen and changed behind its back, whatever kind it is."""

    def __init__(self, blobs: Blobs, folder: Path | None) -> None:
        self._store: ObjectStore = blobs._store if folder is None else LocalStore(folder, mkdir=True)
        self._folder = folder

    def keys(self) -> list[str]:
        """All of it, half-written files of a folder too."""
        if self._folder is not None:
            return sorted(str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())
        return sorted(item["path"] for page in obstore.list(self._store) for item in page)

    def content(self) -> dict[str, bytes]:
        return {key: self.read(key) for key in self.keys()}

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    def write(self, key: str, content: bytes) -> None:
        obstore.put(self._store, key, content)

    def flip(self, key: str, at: int) -> None:
        """Changes one bit of one byte."""
        raw = bytearray(self.read(key))
        raw[at] ^= 1
        self.write(key, bytes(raw))

    def break_down(self) -> None:
        """From now on nothing can be written: a file where a folder should be, or no bucket."""
        assert self._folder is not None
        shutil.rmtree(self._folder / PREFIX, ignore_errors=True)
        (self._folder / PREFIX).write_text("a file where a folder should be")
