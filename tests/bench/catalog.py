"""What the catalogue costs with many versions: made here, and asked by the gateway's own code, without HTTP.

    python -m tests.bench.catalog DATABASE_URL VERSIONS TENANTS fill       prints {"keys", "largest"}
    python -m tests.bench.catalog DATABASE_URL VERSIONS TENANTS measure    answers each line on stdin

`keys` are secrets of some tenants. The first is the large one: a hundredth of the versions are its adapters', one each,
and as many again are those of its adapter `largest`. The rest are spread evenly. `measure` prints {"cpu_us"}, that of a
resolve, for each line: `uncached` asks the database for adapters in random order, `cached` the gateway's memory for a
hundred of them.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store import catalog
from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.faults import Bounds
from adapter_store.ids import TenantId
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from gateway.database import open_engine
from gateway.models import Models
from tests.bench import scale
from tests.bench.scale import FINGERPRINT, Size

LARGE: Final = 0
"""Number of the large tenant."""
KEYS: Final = 8
UNCACHED: Final = 300
CACHED: Final = 20_000
POPULAR: Final = 100


def shape(versions: int, tenants: int) -> tuple[Size, int]:
    """What is spread evenly, and how many adapters the large tenant has besides; it has twice as many versions."""
    many = max(1, versions // 100)
    return Size(versions - 2 * many, tenants, tenants), many


async def fill(engine: AsyncEngine, size: Size, many: int) -> None:
    """All rows."""
    await scale.fill(engine, size)
    await scale.add(engine, catalog.adapters, (_of_large(size, scale.adapter_row(size, n)) for n in _own(size, many)))
    await scale.add(engine, catalog.versions, _versions(size, many))
    await scale.add(engine, catalog.aliases, (scale.alias_row(number) for number in _own(size, many)))


def _own(size: Size, many: int) -> range:
    return range(size.adapters, size.adapters + many)


def _versions(size: Size, many: int) -> Iterator[dict[str, object]]:
    own = _own(size, many)
    for number in own:
        yield _of_large(size, scale.version_row(size, number))
    for count, number in enumerate(range(own.stop, own.stop + many), start=2):
        row = _of_large(size, scale.version_row(size, number))
        yield {**row, "adapter_id": scale.adapter_id(own.start), "number": count}


def _of_large(size: Size, row: dict[str, object]) -> dict[str, object]:
    return {**row, "tenant_id": size.tenant_of(LARGE)}


class Lookups:
    """The gateway's own way from a name to a version, with and without its memory."""

    def __init__(self, engine: AsyncEngine, folder: Path, size: Size) -> None:
        base = BaseModel("base", FINGERPRINT, "LlamaForCausalLM", "float32", {})
        self._size = size
        self._store = AdapterStore(engine, Blobs.open(str(folder / "blobs")), Inspector(base, Bounds(64, 1 << 30)))
        self._models = Models(self._store, base.name)
        self._chosen = random.Random(1)

    async def uncached(self) -> float:
        """CPU of one question to the database, in µs, threads included."""
        return await _cpu_us(self._store.resolve, self._names(UNCACHED))

    async def cached(self) -> float:
        """CPU of one answer from memory."""
        popular = self._names(POPULAR)
        for tenant_id, model in popular:
            await self._models.resolve(tenant_id, model)
        return await _cpu_us(self._from_memory, self._chosen.choices(popular, k=CACHED))

    async def _from_memory(self, tenant_id: TenantId, model: str) -> None:
        assert (self._models.known(tenant_id, model) or await self._models.resolve(tenant_id, model)) is not None

    def _names(self, count: int) -> list[tuple[TenantId, str]]:
        numbers = [self._chosen.randrange(self._size.adapters) for _ in range(count)]
        return [(self._size.tenant_of(number), f"adapter-{number}") for number in numbers]


async def _cpu_us(
    resolve: Callable[[TenantId, str], Awaitable[object]], names: Sequence[tuple[TenantId, str]]
) -> float:
    begin = time.process_time_ns()
    for tenant_id, model in names:
        await resolve(tenant_id, model)
    return (time.process_time_ns() - begin) / 1e3 / len(names)


async def measure(engine: AsyncEngine, size: Size) -> None:
    """A figure for each line on stdin."""
    with tempfile.TemporaryDirectory() as folder:
        lookups = Lookups(engine, Path(folder), size)
        await lookups.uncached()  # connections and code
        for line in sys.stdin:
            _tell(cpu_us=await (lookups.cached() if line.strip() == "cached" else lookups.uncached()))


def _tell(**figures: object) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


async def main(url: str, versions: str, tenants: str, verb: str) -> None:
    size, many = shape(int(versions), int(tenants))
    engine = open_engine(url)
    try:
        if verb == "fill":
            await fill(engine, size, many)
            keys = [scale.secret(number) for number in range(min(KEYS, size.keys))]
            _tell(keys=keys, largest=f"adapter-{size.adapters}")
        else:
            await measure(engine, size)
    finally:
        await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
