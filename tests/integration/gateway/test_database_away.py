"""F9: what goes on while the database is locked or away, and what says 503."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant
from tests.servers import postgres_server
from tests.waiting import stalls

PROMPT_S = 1.0


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """As a backup or a stuck writer holds it."""
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.close()


async def slowest_answer(tenant: Tenant, ends: "asyncio.Future[Any]") -> float:
    """Ask a known model with a known key until `ends`; every answer is a 200. Stalls of this machine do not count."""
    slowest_s = 0.0
    with stalls() as stalled_s:
        while not ends.done():
            begin = time.monotonic() - stalled_s()
            answer = await tenant.ask("base")
            assert answer.status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - stalled_s() - begin)
            await asyncio.sleep(0.02)
    return slowest_s


def assert_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "storage_unavailable"


@pytest.mark.local
async def test_a_locked_database_holds_up_nobody_but_those_who_write(gateway: Gateway, acme: Tenant) -> None:
    """More writers than connections get 503 in bounded time; known callers do not notice, and later all is well."""
    await acme.ask("base")
    with locked(gateway.home.path / "tailor.db"):
        begin = time.monotonic()
        writes = asyncio.gather(
            *(gateway.operator.post("/admin/v1/tenants", json={"name": f"late-{number}"}) for number in range(6))
        )
        slowest_s = await slowest_answer(acme, writes)
        for answer in await writes:
            assert_unavailable(answer)
        assert time.monotonic() - begin < 15
    assert slowest_s < PROMPT_S
    assert (await gateway.operator.post("/admin/v1/tenants", json={"name": "late-0"})).status_code == 201


@pytest.mark.local
async def test_a_database_that_is_away_is_not_replaced_by_an_empty_one(gateway: Gateway, acme: Tenant) -> None:
    """Moved away, everything that needs it is a 503; moved back, it goes on as before, with new keys too."""
    await acme.ask("base")
    database, elsewhere = gateway.home.path / "tailor.db", gateway.home.path / "elsewhere.db"
    database.rename(elsewhere)
    for _ in range(3):
        assert_unavailable(await gateway.operator.post("/admin/v1/tenants", json={"name": "globex"}))
        assert_unavailable(await gateway.operator.get("/admin/v1/tenants"))
        assert (await gateway.operator.get("/ready")).json()["database"] is False
    assert (await acme.ask("base")).status_code == 200
    assert not database.exists()
    elsewhere.rename(database)
    globex = await gateway.tenant("globex")
    assert (await globex.ask("base")).status_code == 200


@pytest.mark.local
async def test_a_stream_of_events_outlives_a_database_that_is_away(
    gateway: Gateway, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits, and goes on where it was."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    sent = {"file": ("data.jsonl", json.dumps(row).encode())}
    file_id = (await acme.client.post("/v1/files", data={"purpose": "fine-tune"}, files=sent)).json()["id"]
    made = await acme.client.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": file_id})
    job = f"/v1/fine_tuning/jobs/{made.json()['id']}"
    database, elsewhere = gateway.home.path / "tailor.db", gateway.home.path / "elsewhere.db"
    async with acme.client.stream("GET", f"{job}/events?stream=true") as answer:
        lines = answer.aiter_lines()
        assert "Created fine-tuning job" in await anext(lines)
        database.rename(elsewhere)
        async with asyncio.timeout(30):
            while "the events of job" not in caplog.text:
                await asyncio.sleep(0.05)
        elsewhere.rename(database)
        assert (await acme.client.post(f"{job}/cancel")).status_code == 200
        rest = [line async for line in lines if line]
    assert ["The job was cancelled" in rest[-2], rest[-1]] == [True, "data: [DONE]"]


@pytest.mark.local
async def test_a_database_that_was_put_in_its_place_is_the_one_that_is_used(gateway: Gateway, acme: Tenant) -> None:
    """A copy restored from a backup: no connection goes on writing into the file that is gone."""
    database, restored = gateway.home.path / "tailor.db", gateway.home.path / "restored.db"
    with sqlite3.connect(database) as source, sqlite3.connect(restored) as target:
        source.backup(target)
    source.close()
    target.close()
    for name in ("tailor.db", "tailor.db-wal", "tailor.db-shm"):
        (gateway.home.path / name).rename(gateway.home.path / f"old-{name}")
    restored.rename(database)
    await gateway.tenant("globex")
    with sqlite3.connect(database) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM tenants")}
    connection.close()
    assert names == {"acme", "globex"}


async def test_a_postgresql_that_has_gone_comes_back(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Stopped: known callers are served, writers get 503. Started again: no connection of before is in the way."""
    with postgres_server() as server:
        gateway = await run_gateway(replica, database_url=server.url)
        acme = await gateway.tenant("acme")
        await acme.ask("base")
        server.stop()
        assert_unavailable(await gateway.operator.post("/admin/v1/tenants", json={"name": "globex"}))
        assert (await acme.ask("base")).status_code == 200
        server.start()
        globex = await gateway.tenant("globex")
        assert (await globex.ask("base")).status_code == 200
