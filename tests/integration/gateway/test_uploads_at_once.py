"""Uploads of one tenant that run at the same time: held to the quota together, and so many of them."""

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of
from tests.integration.gateway.test_files import jsonl
from tests.waiting import until

MIB = 1 << 20
BOUNDARY = "frontier"
WAYS = {
    "form": ("/v1/adapters/bot/versions", "adapter_model.safetensors"),
    "archive": ("/v1/adapters/bot/versions", ""),
    "file": ("/v1/files", "file"),
}
LIMITS = {"form": "max_stored_bytes", "archive": "max_stored_bytes", "file": "max_stored_file_bytes"}


@pytest.fixture
async def gateway(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    return await run_gateway(replica, upload_part_bytes=1_024)


class Sending:
    """An upload that sends so many bytes, then waits until it is let go on, and ends as no good one."""

    def __init__(self, tenant: Tenant, way: str, size_bytes: int, *, waits: bool = True) -> None:
        path, self._field = WAYS[way]
        kind = "application/x-tar" if way == "archive" else f"multipart/form-data; boundary={BOUNDARY}"
        self._size_bytes = size_bytes
        self.has_sent = asyncio.Event()
        self.may_end = asyncio.Event()
        if not waits:
            self.may_end.set()
        self.answer = asyncio.create_task(
            tenant.client.post(path, content=self._pieces(), headers={"content-type": kind})
        )

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._head()
        for _ in range(self._size_bytes // MIB):
            yield bytes(MIB)
        self.has_sent.set()
        await self.may_end.wait()
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    def _head(self) -> bytes:
        if not self._field:
            info = tarfile.TarInfo("adapter_model.safetensors")
            info.size = 1 << 30
            return info.tobuf()
        about = f'Content-Disposition: form-data; name="{self._field}"; filename="{self._field}"'
        return f"--{BOUNDARY}\r\n{about}\r\n\r\n".encode()

    async def end(self) -> httpx.Response:
        self.may_end.set()
        return await self.answer


def staged_bytes(gateway: Gateway) -> int:
    found = 0
    for folder, _, names in os.walk(gateway.home.path / "staging"):  # unlike `rglob` it bears what goes meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                found += (Path(folder) / name).stat().st_size
    return found


async def limit(gateway: Gateway, **limits: int | None) -> None:
    assert (await gateway.operator.patch("/admin/v1/plans/default", json=limits)).status_code == 200


def assert_must_wait(answer: httpx.Response) -> None:
    assert (answer.status_code, error_of(answer)["code"]) == (429, "uploads_under_way"), answer.text
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("way", WAYS)
async def test_uploads_at_once_are_held_to_the_quota_together(gateway: Gateway, acme: Tenant, way: str) -> None:
    """What is under way counts as it comes: the next one waits until there is room, another tenant's does not."""
    globex = await gateway.tenant("globex")
    await limit(gateway, **{LIMITS[way]: 6 * MIB})
    first = Sending(acme, way, 4 * MIB)
    await until(lambda: staged_bytes(gateway) >= 3 * MIB)
    assert_must_wait(await Sending(acme, way, 4 * MIB, waits=False).answer)
    assert staged_bytes(gateway) <= 4 * MIB
    other = Sending(globex, way, 4 * MIB)
    await until(lambda: staged_bytes(gateway) >= 6 * MIB)
    for one in (first, other):
        assert (await one.end()).status_code in (400, 422)
    again = await Sending(acme, way, 4 * MIB, waits=False).answer
    assert again.status_code in (400, 422), again.text
    alone = await Sending(acme, way, 7 * MIB, waits=False).answer
    assert (alone.status_code, error_of(alone)["code"]) == (403, "quota_exceeded")
    assert staged_bytes(gateway) == 0


async def test_a_crowd_of_uploads_takes_no_more_disk_than_the_quota(gateway: Gateway, acme: Tenant) -> None:
    """Twelve of 4 MiB at once where the plan has 6 MiB."""
    await limit(gateway, max_stored_bytes=6 * MIB)
    crowd = [Sending(acme, "form", 4 * MIB) for _ in range(12)]
    most = 0
    async with asyncio.timeout(60):
        while not all(one.has_sent.is_set() for one in crowd):
            most = max(most, staged_bytes(gateway))
            await asyncio.sleep(0.01)
    most = max(most, staged_bytes(gateway))
    answers = [await one.end() for one in crowd]
    assert 0 < most <= 7 * MIB  # one that is refused goes a moment later
    assert {answer.status_code for answer in answers} <= {400, 422, 429}
    assert sum(answer.status_code == 429 for answer in answers) >= 11
    assert staged_bytes(gateway) == 0


@pytest.fixture
async def acme_at_one(run_gateway: RunGateway, replica: FakeReplica) -> Tenant:
    gateway = await run_gateway(replica, uploads_at_once=1, upload_part_bytes=1_024)
    return await gateway.tenant("acme")


async def test_so_many_uploads_run_at_once(acme_at_one: Tenant, good: Path) -> None:
    """Without any quota: whole ones, parts, completions and scaled versions are each one of them."""
    tenant, part = acme_at_one, b"x" * 1_024
    assert (await tenant.publish(good)).status_code == 201
    files = [
        {"name": name, "bytes": 1_024, "sha256": sha256(part).hexdigest()}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    upload = (await tenant.client.post("/v1/adapters/bot/uploads", json={"files": files})).json()["id"]
    place = f"/v1/adapters/bot/uploads/{upload}"
    headers = {"x-content-sha256": sha256(part).hexdigest()}

    async def put(name: str) -> httpx.Response:
        return await tenant.client.put(f"{place}/{name}/1", content=part, headers=headers)

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (await put(name)).status_code == 200
    running = Sending(tenant, "form", MIB)
    await until(lambda: running.has_sent.is_set())
    other = (await tenant.client.post("/v1/adapters/bot/uploads", json={"files": files})).json()["id"]
    refused = [
        await tenant.publish(good),
        await tenant.client.put(
            f"/v1/adapters/bot/uploads/{other}/adapter_config.json/1", content=part, headers=headers
        ),
        await tenant.client.post(f"{place}/complete"),
        await tenant.client.post("/v1/adapters/bot/versions/1/scaled", json={"factor": 0.5}),
        await tenant.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", jsonl())}),
    ]
    for answer in refused:
        assert_must_wait(answer)
    assert (await running.end()).status_code in (400, 422)
    assert (await tenant.publish(good)).status_code == 201


async def test_what_is_declared_fits_beside_what_is_under_way(gateway: Gateway, acme: Tenant) -> None:
    """An upload in parts is declared when there is room; one that could never fit is told so at once."""
    await limit(gateway, max_stored_bytes=4 * MIB, max_stored_file_bytes=4 * MIB)

    async def adapter(size_bytes: int) -> httpx.Response:
        sizes = {"adapter_config.json": 100, "adapter_model.safetensors": size_bytes}
        files = [{"name": name, "bytes": size, "sha256": "0" * 64} for name, size in sizes.items()]
        return await acme.client.post("/v1/adapters/bot/uploads", json={"files": files})

    async def file(size_bytes: int) -> httpx.Response:
        told = {"filename": "a", "bytes": size_bytes, "mime_type": "x", "purpose": "fine-tune"}
        return await acme.client.post("/v1/uploads", json=told)

    for way, declare in (("form", adapter), ("file", file)):
        running = Sending(acme, way, 3 * MIB)
        await until(lambda: staged_bytes(gateway) >= 2 * MIB)
        assert_must_wait(await declare(3 * MIB))
        assert error_of(await declare(5 * MIB))["code"] == "quota_exceeded"
        assert (await running.end()).status_code in (400, 422)
        assert (await declare(3 * MIB)).status_code in (200, 201)
