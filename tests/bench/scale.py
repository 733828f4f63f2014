"""What resolve + admit costs, and what its caches hold, with many adapters: in a process of its own.

    python -m tests.bench.scale DATABASE ADAPTERS TENANTS KEYS fill [FINGERPRINT]  makes the rows
    python -m tests.bench.scale DATABASE ADAPTERS TENANTS KEYS measure             asks for each adapter, then measures
    python -m tests.bench.scale DATABASE ADAPTERS TENANTS KEYS requests MOST       says what could be asked over HTTP

The fingerprint is that of the adapters' base model. `requests` prints {"uniform": …, "zipf": …}, each some thousands of
pairs of key and model, for at most so many adapters.

`measure` prints {"rss_mib": growth by what the caches hold}, then {"cpu_us": per request} for each line on stdin, which
says what traffic (`ten`, `uniform`, `zipf`): requests for adapters in random order. Keys and names are made anew for
each request, as a socket would bring them.
"""

import asyncio
import gc
import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Select, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store import catalog
from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.catalog import Version
from adapter_store.catalog import select_versions as version_rows
from adapter_store.catalog import version_of as version_of_row
from adapter_store.faults import Bounds
from adapter_store.ids import TenantId
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading, writing
from gateway.api_key import ApiKey
from gateway.auth import Auth
from gateway.database import api_keys, migrate, open_engine, plans, tenants
from gateway.keys import KEY_PREFIX, Keys, hash_key
from gateway.keys import _key_of as key_of_row
from gateway.limits.memory import MemoryLimits
from gateway.models import Models
from gateway.plans import COLUMNS as PLAN_COLUMNS

FINGERPRINT = "f" * 64
REQUESTS = 20_000
REQUESTS_OVER_HTTP = 6_000
TEN = 10
SCATTER = 7_919  # prime: neighbours in popularity are no neighbours in memory
AT_ONCE = 250  # requests made up at a time: few enough to be in the processor's cache, as bytes off a socket are
FILLED = 5_000
PLAN = "every-limit"
HIGH = 10**12
TOKENS = 28


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is; adapters and keys are spread evenly over the tenants."""

    adapters: int
    tenants: int
    keys: int
    fingerprint: str = FINGERPRINT
    asked: int | None = None
    """Adapters that are asked for at all; None: each."""

    def tenant_of(self, number: int) -> TenantId:
        return TenantId(f"tnt_{number % self.tenants:024x}")

    def request(self, chosen: random.Random, traffic: str) -> tuple[bytes, str]:
        """Authorization and model of a tenant's request for one of its adapters.

        Traffic `uniform` asks for all equally often, `zipf` for the nth most popular in proportion to 1/n, `ten` for
        ten of them, which are of ten tenants where there are as many.
        """
        asked = min(self.adapters, TEN if traffic == "ten" else self.asked or self.adapters)
        rank = int(asked ** chosen.random()) - 1 if traffic == "zipf" else chosen.randrange(asked)
        adapter = rank * SCATTER % self.adapters
        key = adapter % self.tenants + self.tenants * chosen.randrange(self.keys // self.tenants)
        return f"Bearer {secret(key)}".encode(), f"adapter-{adapter}"


def secret(key: int) -> str:
    """Spelled like a real one."""
    return f"{KEY_PREFIX}{digest('key', key)[:43]}"


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def key_id(number: int) -> str:
    return f"key_{number:024x}"


def adapter_id(number: int) -> str:
    return f"adp_{number:024x}"


async def fill(engine: AsyncEngine, size: Size) -> None:
    """The rows of all tenants, keys and adapters; the plan has every limit, set high."""
    await migrate(engine)
    limits = {column.name: HIGH for column in plans.columns if column.name not in ("name", "weight", "created_at")}
    await add(engine, plans, [{"name": PLAN, "weight": 1.0, "created_at": 0, **limits}])
    await add(engine, tenants, (_tenant_row(size, number) for number in range(size.tenants)))
    await add(engine, api_keys, (_key_row(size, number) for number in range(size.keys)))
    await add(engine, catalog.adapters, (adapter_row(size, number) for number in range(size.adapters)))
    await add(engine, catalog.versions, (version_row(size, number) for number in range(size.adapters)))
    await add(engine, catalog.aliases, (alias_row(number) for number in range(size.adapters)))


def _tenant_row(size: Size, number: int) -> dict[str, object]:
    return {"id": size.tenant_of(number), "name": f"tenant-{number}", "created_at": 0, "plan": PLAN}


def _key_row(size: Size, number: int) -> dict[str, object]:
    return {
        "id": key_id(number),
        "tenant_id": size.tenant_of(number),
        "sha256": hash_key(secret(number).encode()),
        "prefix": secret(number)[:14],
        "scopes": "adapters inference",
        "label": "",
        "created_at": 0,
    }


def adapter_row(size: Size, number: int) -> dict[str, object]:
    names = {"id": adapter_id(number), "tenant_id": size.tenant_of(number), "name": f"adapter-{number}"}
    return {**names, "created_at": 0}


def version_row(size: Size, number: int) -> dict[str, object]:
    return {
        "id": f"ver_{number:024x}",
        "adapter_id": adapter_id(number),
        "tenant_id": size.tenant_of(number),
        "number": 1,
        "digest": digest("version", number),
        "config_sha256": digest("config", number),
        "config_bytes": 300,
        "weights_sha256": digest("weights", number),
        "weights_bytes": 1_000_000 + number,
        "rank": 8,
        "modules": json.dumps(["q_proj", "k_proj", "v_proj", "o_proj"]),
        "base_fingerprint": size.fingerprint,
        "provenance": "upload",
        "created_at": 1_700_000_000 + number,
    }


def alias_row(number: int) -> dict[str, object]:
    return {"adapter_id": adapter_id(number), "name": "default", "version_id": f"ver_{number:024x}", "moved_at": 0}


async def add(engine: AsyncEngine, table: Any, rows: Iterable[dict[str, object]]) -> None:
    left = iter(rows)
    async with writing(engine) as connection:
        while some := [row for _, row in zip(range(FILLED), left, strict=False)]:
            await connection.execute(insert(table), some)


def key_rows() -> Select[Any]:
    """What a key is made of."""
    columns = (api_keys.c.id, api_keys.c.tenant_id, api_keys.c.sha256, api_keys.c.scopes, api_keys.c.expires_at)
    return (
        select(*columns, api_keys.c.revoked_at, tenants.c.suspended_at, *PLAN_COLUMNS)
        .join(tenants, tenants.c.id == api_keys.c.tenant_id)
        .join(plans, plans.c.name == tenants.c.plan)
    )


class AllKeys(Keys):
    """Keys that are read thousands at a time: asking for 20,000 one by one would take half a minute."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self._database = engine
        self._read: dict[bytes, ApiKey] = {}

    async def read(self, numbers: range) -> None:
        """Have those keys at hand, for one question each."""
        query = key_rows().where(api_keys.c.id.between(key_id(numbers[0]), key_id(numbers[-1])))
        async with reading(self._database) as connection:
            for row in (await connection.execute(query)).mappings():
                sha256 = bytes.fromhex(row["sha256"])
                self._read[sha256] = key_of_row(row, sha256)

    async def by_hash(self, sha256: bytes) -> ApiKey | None:
        return self._read.pop(sha256)


class AllAdapters(AdapterStore):
    """The same for adapters."""

    def __init__(self, engine: AsyncEngine, folder: Path, base: BaseModel) -> None:
        super().__init__(engine, Blobs.open(str(folder / "blobs")), Inspector(base, Bounds(64, 1 << 30)))
        self._database = engine
        self._read: dict[tuple[TenantId, str], Version] = {}

    async def read(self, numbers: range) -> None:
        """Have those adapters at hand, for one question each."""
        between = catalog.versions.c.adapter_id.between(adapter_id(numbers[0]), adapter_id(numbers[-1]))
        async with reading(self._database) as connection:
            for row in await connection.execute(version_rows().where(between)):
                version = version_of_row(row)
                self._read[version.tenant_id, version.adapter_name] = version

    async def resolve(self, tenant_id: TenantId, model: str) -> Version:
        return self._read.pop((tenant_id, model))


class Lookups:
    """The parts of a gateway that a request meets before it is placed, on a real database."""

    def __init__(self, engine: AsyncEngine, folder: Path, size: Size) -> None:
        base = BaseModel("base", FINGERPRINT, "LlamaForCausalLM", "float32", {})
        self._size = size
        self._keys = AllKeys(engine)
        self._adapters = AllAdapters(engine, folder, base)
        self._auth = Auth(self._keys)
        self._models = Models(self._adapters, base.name)
        self._limits = MemoryLimits(_nothing_used, timeout_s=1)

    async def request(self, authorization: bytes, model: str) -> None:
        """Who asks, for which version, and may they: as the hot path does it."""
        key = self._auth.known(authorization) or await self._auth.live_key(authorization)
        tenant_id = key.tenant_id
        assert tenant_id is not None
        version = self._models.known(tenant_id, model) or await self._models.resolve(tenant_id, model)
        assert version is not None
        admission = await self._limits.admit(tenant_id, key.plan, TOKENS)
        admission.settle(TOKENS)

    async def warm(self) -> None:
        """Ask once with each key and once for each adapter."""
        size = self._size
        for begin in range(0, size.keys, FILLED):
            numbers = range(begin, min(size.keys, begin + FILLED))
            await self._keys.read(numbers)
            for number in numbers:
                await self._auth.live_key(f"Bearer {secret(number)}".encode())
        for begin in range(0, size.adapters, FILLED):
            numbers = range(begin, min(size.adapters, begin + FILLED))
            await self._adapters.read(numbers)
            for number in numbers:
                await self.request(f"Bearer {secret(number % size.tenants)}".encode(), f"adapter-{number}")


async def _nothing_used(_tenant: TenantId, _month: int) -> int:
    return 0


async def measure(engine: AsyncEngine, size: Size, folder: Path) -> None:
    """The caches' memory, then the CPU of a request as often as stdin asks."""
    one = Size(1, 1, 1)
    first = Lookups(engine, folder, one)
    await first.warm()  # connections and code
    before_mib = resident_mib()
    lookups = Lookups(engine, folder, size)
    await lookups.warm()
    gc.collect()
    _tell(rss_mib=resident_mib() - before_mib)
    chosen = random.Random(1)
    for line in sys.stdin:
        _tell(cpu_us=await cpu_us(lookups, size, chosen, line.strip()))


async def cpu_us(lookups: Lookups, size: Size, chosen: random.Random, traffic: str) -> float:
    """Of one request, over many."""
    spent_ns = 0
    for _ in range(REQUESTS // AT_ONCE):
        requests = [size.request(chosen, traffic) for _ in range(AT_ONCE)]
        begin = time.thread_time_ns()
        for authorization, model in requests:
            await lookups.request(authorization, model)
        spent_ns += time.thread_time_ns() - begin
    return spent_ns / 1e3 / REQUESTS


def resident_mib() -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _tell(**figures: float) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


async def main(database: str, adapters: str, tenants_: str, keys: str, verb: str, more: str = "") -> None:
    size = Size(int(adapters), int(tenants_), int(keys))
    if verb == "requests":
        _say_requests(replace(size, asked=int(more)))
        return
    engine = open_engine(f"sqlite+aiosqlite:///{database}")
    try:
        if verb == "fill":
            await fill(engine, replace(size, fingerprint=more or FINGERPRINT))
        else:
            await measure(engine, size, Path(database).parent)
    finally:
        await engine.dispose()


def _say_requests(size: Size) -> None:
    chosen = random.Random(1)
    pairs = {
        traffic: [size.request(chosen, traffic) for _ in range(REQUESTS_OVER_HTTP)] for traffic in ("uniform", "zipf")
    }
    told = {
        traffic: [(authorization.decode().removeprefix("Bearer "), model) for authorization, model in asked]
        for traffic, asked in pairs.items()
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
