"""Uploads in parts over HTTP: repeated, disordered, broken off, restarted, shared by gateways; and what ends them."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, func, select, update

from adapter_store.bundle import BUNDLE_FILES, WEIGHTS_FILE
from adapter_store.errors import UploadNotFound
from adapter_store.transactions import reading, writing
from adapter_store.uploads import MOST_OPEN, upload_parts, uploads
from gateway.api_client import ApiClient, ApiError
from gateway.push import Push
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import BAD, write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of

PART_BYTES = 4_096


@pytest.fixture
async def gateway(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    return await run_gateway(replica, upload_part_bytes=PART_BYTES)


@dataclass
class Sender:
    """A client that sends a folder in parts."""

    client: httpx.AsyncClient
    folder: Path
    name: str = "bot"
    place: str = ""

    def declared(self) -> dict[str, Any]:
        files = [(name, (self.folder / name).read_bytes()) for name in BUNDLE_FILES]
        return {"files": [{"name": n, "bytes": len(d), "sha256": sha256(d).hexdigest()} for n, d in files]}

    async def create(self, **headers: str) -> httpx.Response:
        path = f"/v1/adapters/{self.name}/uploads"
        made = await self.client.post(path, json=self.declared(), headers=headers)
        if made.status_code == 201:
            self.place = f"{path}/{made.json()['id']}"
        return made

    async def state(self) -> httpx.Response:
        return await self.client.get(self.place)

    def parts(self) -> list[tuple[str, int, bytes]]:
        return [
            (name, at // PART_BYTES + 1, data[at : at + PART_BYTES])
            for name, data in ((name, (self.folder / name).read_bytes()) for name in BUNDLE_FILES)
            for at in range(0, len(data), PART_BYTES)
        ]

    async def put(self, file: str, number: int, data: bytes, checksum: str | None = None) -> httpx.Response:
        headers = {"x-content-sha256": checksum or sha256(data).hexdigest()}
        return await self.client.put(f"{self.place}/{file}/{number}", content=data, headers=headers)

    async def put_all(self) -> None:
        for part in self.parts():
            assert (await self.put(*part)).status_code == 200

    async def complete(self, **headers: str) -> httpx.Response:
        return await self.client.post(f"{self.place}/complete", headers=headers)


@pytest.fixture
def sender(acme: Tenant, good: Path) -> Sender:
    return Sender(acme.client, good)


def parts_stored(gateway: Gateway) -> list[str]:
    keys = gateway.shelf.keys()
    return [key for key in keys if key.startswith("uploads/")]


def staged(gateway: Gateway) -> list[str]:
    return [str(path) for path in (gateway.home.path / "staging").rglob("*")]


async def test_parts_become_a_version(sender: Sender, acme: Tenant, gateway: Gateway) -> None:
    """Sent backwards and each twice, then completed: the version answers, and no part stays."""
    made = (await sender.create()).json()
    assert (made["status"], made["part_bytes"]) == ("open", PART_BYTES)
    assert len(sender.parts()) > 5
    for part in reversed(sender.parts()):
        for _ in range(2):
            assert (await sender.put(*part)).status_code == 200
    assert [file["missing"] for file in (await sender.state()).json()["files"]] == [[], []]
    assert len(parts_stored(gateway)) in (len(BUNDLE_FILES), len(sender.parts()))  # a folder; objects
    done = await sender.complete()
    assert (done.status_code, done.json()["number"], done.json()["provenance"]) == (201, 1, "upload")
    assert (await acme.ask()).status_code == 200
    assert parts_stored(gateway) == staged(gateway) == []
    assert (await sender.state()).json()["status"] == "completed"
    assert (await sender.put(*sender.parts()[0])).status_code == 404


async def test_completing_again_is_answered_alike(sender: Sender, acme: Tenant, other_good: Path) -> None:
    """At once, later, and after the adapter has changed: one version, the same bytes."""
    await sender.create()
    await sender.put_all()
    together = await asyncio.gather(*(sender.complete() for _ in range(4)))
    await acme.publish(other_good)
    answers = [*together, await sender.complete()]
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    assert [version["number"] for version in shown["versions"]] == [2, 1]
    assert shown["current"]["number"] == 2


async def test_an_upload_survives_a_restart_of_the_gateway(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, tmp_path: Path
) -> None:
    """Half is sent to one gateway, half to another with a home of its own, and a third completes it."""
    shared = {
        "database_url": f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}",
        "blobs_url": (tmp_path / "shared-blobs").as_uri(),
        "upload_part_bytes": PART_BYTES,
    }
    first = await run_gateway(replica, home=tmp_path / "one", **shared)
    acme = await first.tenant("acme")
    sender = Sender(acme.client, good)
    await sender.create()
    everything = sender.parts()
    for part in everything[::2]:
        assert (await sender.put(*part)).status_code == 200
    for home, parts in (("two", everything[1::2]), ("three", [])):
        other = await run_gateway(home=tmp_path / home, **shared)
        sender.client = other.client(acme.key)
        for part in parts:
            assert (await sender.put(*part)).status_code == 200
    assert (await sender.complete()).status_code == 201
    assert (await acme.ask()).status_code == 200


BAD_PARTS: list[tuple[str, int, Callable[[bytes], bytes], int, str]] = [
    (WEIGHTS_FILE, 1, lambda data: data[:-1], 400, "part_invalid"),
    (WEIGHTS_FILE, 1, lambda data: data + b"x", 413, "adapter_too_large"),
    (WEIGHTS_FILE, 1, lambda data: data[:-1] + b"\xff", 400, "part_invalid"),
    (WEIGHTS_FILE, 0, bytes, 400, "part_invalid"),
    (WEIGHTS_FILE, 10_000, bytes, 400, "part_invalid"),
    ("evil.py", 1, bytes, 400, "invalid_value"),
]


async def test_a_part_that_is_not_what_it_should_be_is_told(sender: Sender, gateway: Gateway) -> None:
    """Wrong length, other bytes than its checksum says, no such part: nothing is kept, the right one is taken then."""
    await sender.create()
    whole = next(data for name, at, data in sender.parts() if (name, at) == (WEIGHTS_FILE, 1))
    for file, number, spoil, status, code in BAD_PARTS:
        answer = await sender.put(file, number, spoil(whole), sha256(whole).hexdigest())
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
        assert parts_stored(gateway) == staged(gateway) == []
    assert (await sender.put(WEIGHTS_FILE, 1, whole)).status_code == 200


async def test_a_part_without_a_checksum_is_refused(sender: Sender) -> None:
    """Nothing is taken on trust."""
    await sender.create()
    answer = await sender.client.put(f"{sender.place}/{WEIGHTS_FILE}/1", content=b"x")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "x-content-sha256")


async def test_a_client_that_stalls_in_a_part_is_cut(run_gateway: RunGateway, replica: FakeReplica, good: Path) -> None:
    """408, its bytes go, and meanwhile it keeps nobody from sending the very part."""
    gateway = await run_gateway(replica, upload_part_bytes=PART_BYTES, upload_stall_s=0.5)
    sender = Sender((await gateway.tenant("acme")).client, good)
    await sender.create()
    file, number, data = next(part for part in sender.parts() if part[0] == WEIGHTS_FILE)
    for_ever = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield data[:100]
        await for_ever.wait()

    headers = {"x-content-sha256": sha256(data).hexdigest()}
    stalled = asyncio.create_task(
        sender.client.put(f"{sender.place}/{file}/{number}", content=pieces(), headers=headers)
    )
    async with asyncio.timeout(10):
        while not staged(gateway):
            await asyncio.sleep(0.01)
        assert (await sender.put(file, number, data)).status_code == 200
        while staged(gateway):
            await asyncio.sleep(0.01)
    for_ever.set()
    answer = await stalled
    assert (answer.status_code, error_of(answer)["code"]) == (408, "request_timeout")
    await sender.put_all()
    assert (await sender.complete()).status_code == 201


async def test_a_part_without_an_end_is_cut_mid_stream(sender: Sender, gateway: Gateway) -> None:
    """At what was declared, which is what the quota was asked for; the client gets to read why."""
    await sender.create()
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):  # less than is read off
            assert sum(path.stat().st_size for path in map(Path, staged(gateway)) if path.is_file()) <= PART_BYTES
            sent += 1 << 20
            yield bytes(1 << 20)

    headers = {"x-content-sha256": "0" * 64}
    answer = await sender.client.put(f"{sender.place}/{WEIGHTS_FILE}/1", content=pieces(), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "adapter_too_large")
    assert sent == 64 << 20
    assert parts_stored(gateway) == staged(gateway) == []


async def test_another_part_in_the_place_of_one_that_is_there_is_a_conflict(sender: Sender, gateway: Gateway) -> None:
    """The file has changed under its sender: told, and the first part stays."""
    await sender.create()
    file, number, data = sender.parts()[0]
    await sender.put(file, number, data)
    answer = await sender.put(file, number, data[::-1])
    assert (answer.status_code, error_of(answer)["code"]) == (409, "part_conflict")
    assert len(parts_stored(gateway)) == 1


async def test_the_same_part_many_times_at_once_is_one(sender: Sender, gateway: Gateway) -> None:
    """All are acknowledged."""
    await sender.create()
    part = sender.parts()[-1]
    answers = await asyncio.gather(*(sender.put(*part) for _ in range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len(parts_stored(gateway)) == 1


async def test_too_early_a_completion_says_what_is_missing(sender: Sender, acme: Tenant) -> None:
    """And the upload goes on."""
    await sender.create()
    *early, late = sender.parts()
    for part in early:
        await sender.put(*part)
    answer = await sender.complete()
    assert (answer.status_code, error_of(answer)["code"]) == (409, "parts_missing")
    assert f"number {late[1]}" in error_of(answer)["message"]
    await sender.put(*late)
    assert (await sender.complete()).status_code == 201


async def test_a_file_that_is_not_what_was_declared_is_told(sender: Sender, acme: Tenant, gateway: Gateway) -> None:
    """All parts are as their checksums say, the whole is not: no version."""
    told = sender.declared()
    told["files"][1]["sha256"] = "0" * 64
    made = await acme.client.post("/v1/adapters/bot/uploads", json=told)
    sender.place = f"/v1/adapters/bot/uploads/{made.json()['id']}"
    await sender.put_all()
    answer = await sender.complete()
    assert (answer.status_code, error_of(answer)["code"]) == (409, "checksum_mismatch")
    assert (await acme.client.get("/v1/adapters")).json()["data"] == []
    assert (await acme.client.delete(sender.place)).status_code == 204
    assert parts_stored(gateway) == staged(gateway) == []


def spoil_second_part(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(PART_BYTES)
        file.write(bytes(PART_BYTES))


ROTTEN: list[tuple[Callable[[Path], Any], Callable[[int], list[int]]]] = [
    (spoil_second_part, lambda count: [2]),
    (lambda path: os.truncate(path, path.stat().st_size - 1), lambda count: [count]),
    (Path.unlink, lambda count: list(range(1, count + 1))),
]


@pytest.mark.local
async def test_parts_that_rot_have_to_be_sent_again(sender: Sender, gateway: Gateway) -> None:
    """Changed, cut off or gone, they are named; once they are there again the upload completes."""
    await sender.create()
    await sender.put_all()
    count = sum(file == WEIGHTS_FILE for file, _, _ in sender.parts())
    for spoil, damaged in ROTTEN:
        (key,) = [key for key in parts_stored(gateway) if key.endswith("-1")]
        spoil(gateway.home.path / "blobs" / key)
        answers = await asyncio.gather(*(sender.complete() for _ in range(2)))
        assert {(answer.status_code, error_of(answer)["code"]) for answer in answers} == {(409, "parts_missing")}
        assert [file["missing"] for file in (await sender.state()).json()["files"]] == [[], damaged(count)]
        await sender.put_all()
    assert (await sender.complete()).status_code == 201
    assert parts_stored(gateway) == staged(gateway) == []


async def test_a_refused_adapter_leaves_no_part(acme: Tenant, gateway: Gateway, good: Path, tmp_path: Path) -> None:
    """The refusal names the faults, now and when it is asked for again."""
    bad = next(bad for bad in BAD if bad.served_as is None)
    sender = Sender(acme.client, bad.make(good, tmp_path / "bad"))
    await sender.create()
    await sender.put_all()
    refused, again = await sender.complete(), await sender.complete()
    assert refused.status_code == 422
    assert bad.codes <= {fault["code"] for fault in error_of(refused)["faults"]}
    assert (again.status_code, again.content) == (422, refused.content)
    assert parts_stored(gateway) == staged(gateway) == []


async def test_a_cancelled_upload_is_gone(sender: Sender, gateway: Gateway, acme: Tenant) -> None:
    """With its parts; it cannot be cancelled twice, and goes on for nobody."""
    await sender.create()
    await sender.put_all()
    assert (await acme.client.delete(sender.place)).status_code == 204
    assert parts_stored(gateway) == []
    for answer in (await acme.client.delete(sender.place), await sender.state(), await sender.complete()):
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


async def test_an_upload_that_ends_while_it_is_put_together_leaves_nothing(
    sender: Sender, gateway: Gateway, acme: Tenant
) -> None:
    """Cancelled, or completed by another call, in the moment before its parts are looked for."""
    found = gateway.parts.uploads
    for end in (acme.client.delete, lambda place: acme.client.post(f"{place}/complete")):
        await sender.create()
        await sender.put_all()
        async with reading(gateway.parts.engine) as connection:
            (tenant_id,) = (await connection.execute(select(uploads.c.tenant_id).distinct())).scalars()
        stale = await found.find(tenant_id, "bot", sender.place.rpartition("/")[2])
        assert (await end(sender.place)).is_success
        async with gateway.parts.staging.stage() as bundle:
            with pytest.raises(UploadNotFound):
                await found.assemble(stale, bundle)
        assert parts_stored(gateway) == staged(gateway) == []


async def test_an_upload_that_is_left_alone_expires(sender: Sender, gateway: Gateway, acme: Tenant) -> None:
    """A new part puts the end off; past it nothing is left, and parts of crashes go too."""
    made = (await sender.create()).json()
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(uploads).values(expires_at=made["expires_at"] - 1_000))
    later = (await sender.put(*sender.parts()[0])).json()["expires_at"]
    assert later >= made["expires_at"]
    assert await gateway.parts.uploads.sweep() == 0
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(uploads).values(expires_at=1))
    assert (await sender.state()).status_code == 404
    assert await gateway.parts.uploads.sweep() == 1
    assert parts_stored(gateway) == []
    async with reading(gateway.parts.engine) as connection:
        for table in (uploads, upload_parts):
            assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == 0


@pytest.mark.local
async def test_parts_of_a_crash_are_swept(sender: Sender, gateway: Gateway) -> None:
    """A blob without a row, old enough to be of no call under way."""
    await sender.create()
    await sender.put_all()
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(delete(upload_parts))
        await connection.execute(delete(uploads))
    assert await gateway.parts.uploads.sweep() == 0
    for key in parts_stored(gateway):
        os.utime(gateway.home.path / "blobs" / key, (0, 0))
    assert await gateway.parts.uploads.sweep() == len(BUNDLE_FILES)
    assert parts_stored(gateway) == []


async def test_open_uploads_are_few_and_listed(sender: Sender, acme: Tenant, globex: Tenant) -> None:
    """So many and no more; another tenant sees none of them."""
    for _ in range(MOST_OPEN):
        assert (await sender.create()).status_code == 201
    answer = await sender.create()
    assert (answer.status_code, error_of(answer)["code"]) == (409, "too_many_uploads")
    assert len((await acme.client.get("/v1/adapters/bot/uploads")).json()["data"]) == MOST_OPEN
    assert (await globex.client.get("/v1/adapters/bot/uploads")).json()["data"] == []


BAD_DECLARATIONS: list[Callable[[list[dict[str, Any]]], Any]] = [
    lambda files: files.pop(),
    lambda files: files[0].update(name="adapter_model.safetensors"),
    lambda files: files[0].update(name="evil"),
    lambda files: files[0].update(sha256="x"),
    lambda files: files[0].update(bytes=0),
    lambda files: files[0].update(bytes=True),
]


async def test_a_declaration_is_held(sender: Sender) -> None:
    """Both files, each once, with a size and a checksum."""
    for spoil in BAD_DECLARATIONS:
        told = sender.declared()
        spoil(told["files"])
        answer = await sender.client.post("/v1/adapters/bot/uploads", json=told)
        assert (answer.status_code, error_of(answer)["type"]) == (400, "invalid_request_error")


async def test_too_large_a_file_is_refused_when_it_is_declared(sender: Sender) -> None:
    """Before a byte of it is sent."""
    told = sender.declared()
    told["files"][1]["bytes"] = 1 << 40
    answer = await sender.client.post("/v1/adapters/bot/uploads", json=told)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "adapter_too_large")


async def test_declaring_with_a_key_is_once(sender: Sender, acme: Tenant) -> None:
    """The same declaration is the same upload; another one under that key is told."""
    keyed = {"idempotency-key": "one"}
    answers = await asyncio.gather(*(sender.create(**keyed) for _ in range(3)))
    assert len({answer.content for answer in answers}) == 1
    assert len((await acme.client.get("/v1/adapters/bot/uploads")).json()["data"]) == 1
    sender.name = "other"
    answer = await sender.create(**keyed)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "idempotency_key_reused")


async def test_what_is_declared_counts_against_the_quota(
    sender: Sender, gateway: Gateway, acme: Tenant, tmp_path: Path
) -> None:
    """An upload under way has its bytes; completing it counts them once."""
    size = sum(file["bytes"] for file in sender.declared()["files"])
    await gateway.operator.patch("/admin/v1/plans/default", json={"max_stored_bytes": size + 2_000})
    assert (await sender.create()).status_code == 201
    second = Sender(acme.client, write_good(tmp_path / "second", seed=9), "second")
    answer = await second.create()
    assert (answer.status_code, error_of(answer)["code"]) == (403, "quota_exceeded")
    assert error_of(answer)["param"] == "max_stored_bytes"
    await sender.put_all()
    assert (await sender.complete()).status_code == 201
    assert json.loads((await second.create()).content)["error"]["code"] == "quota_exceeded"


async def test_a_quota_that_shrinks_under_way_is_held_at_the_end(
    sender: Sender, gateway: Gateway, acme: Tenant
) -> None:
    """No version comes of it, and the parts stay for when there is room again."""
    size = sum(file["bytes"] for file in sender.declared()["files"])
    await sender.create()
    await sender.put_all()
    await gateway.operator.patch("/admin/v1/plans/default", json={"max_stored_bytes": size // 2})
    refused = await sender.complete()
    assert (refused.status_code, error_of(refused)["code"]) == (403, "quota_exceeded")
    assert (await acme.client.get("/v1/adapters")).json()["data"] == []
    assert [file["missing"] for file in (await sender.state()).json()["files"]] == [[], []]
    await gateway.operator.patch("/admin/v1/plans/default", json={"max_stored_bytes": size + 2_000})
    assert (await sender.complete()).status_code == 201


class Interrupted(ApiClient):
    """A line that gives out for good after so many parts."""

    def __init__(self, url: str, key: str, parts: int) -> None:
        super().__init__(url, key)
        self.left = parts
        self.sent = 0
        self._counting = Lock()  # parts travel two at a time

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        if method == "PUT":
            with self._counting:
                if self.left == 0:
                    raise ApiError("the cable was pulled", status=400)
                self.left -= 1
                self.sent += 1
        return super().call(method, path, body, **options)


async def test_a_push_that_is_run_again_goes_on(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """In parts: what was acknowledged is not sent again. At once: the same version."""
    told: list[tuple[str, int]] = []
    done: list[int] = []

    def stage(what: str, size_bytes: int) -> Callable[[int], None]:
        told.append((what, size_bytes))
        return done.append

    def push(parts: int, in_parts_from_bytes: int = 0) -> tuple[Any, int]:
        client = Interrupted(gateway.url, acme.key, parts)
        with closing(client):
            try:
                run = Push(client, "bot", good, stage=stage, in_parts_from_bytes=in_parts_from_bytes)
                return run.run(), client.sent
            except ApiError:
                return None, client.sent

    size = sum(file.stat().st_size for file in good.iterdir())
    assert await asyncio.to_thread(push, 3) == (None, 3)
    done.clear()
    made, sent = await asyncio.to_thread(push, 1_000)
    assert sent == len(Sender(acme.client, good).parts()) - 3
    assert told == [("hashing", size), ("sending", size)] * 2 + [("checking", 0)]
    assert sum(done) == 2 * size
    again, sent = await asyncio.to_thread(push, 0, 1 << 30)
    assert (again, sent) == (made, 0)
    assert made["number"] == 1
    assert parts_stored(gateway) == staged(gateway) == []


async def test_a_push_waits_for_a_gateway_that_is_away(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """The same request goes out again, until it is answered."""
    waits: list[float] = []
    client = ApiClient("http://127.0.0.1:9", acme.key)

    def sleep(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 3:  # it is back
            client._http.base_url = gateway.url

    with closing(client):
        run = Push(client, "bot", good, stage=lambda *_: lambda _: None, sleep=sleep)
        made = await asyncio.to_thread(run.run)
    assert (made["number"], len(waits)) == (1, 3)
