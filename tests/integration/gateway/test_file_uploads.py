"""Files in parts over HTTP, with OpenAI's own client: in any order, repeated, restarted, cancelled, refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Upload
from sqlalchemy import update

from adapter_store.transactions import writing
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of
from tests.integration.gateway.test_files import client_of, jsonl, staged, stored
from training.file_uploads import MOST_OPEN
from training.files import file_uploads

DATA = jsonl(40)
PART_BYTES = 1_000


@pytest.fixture
async def gateway(run_gateway: RunGateway) -> Gateway:
    return await run_gateway()


@pytest.fixture
async def client(gateway: Gateway, acme: Tenant) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(gateway, acme.key) as client:
        yield client


async def begin(client: openai.AsyncOpenAI, data: bytes = DATA, **more: Any) -> Upload:
    told = {"filename": "train.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune", **more}
    return await client.uploads.create(bytes=len(data), **told)


def cut(data: bytes = DATA) -> list[bytes]:
    return [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]


async def send(client: openai.AsyncOpenAI, upload: Upload, parts: list[bytes]) -> list[str]:
    return [(await client.uploads.parts.create(upload.id, data=part)).id for part in parts]


async def test_the_client_uploads_a_file_in_chunks(
    client: openai.AsyncOpenAI, gateway: Gateway, tmp_path: Path
) -> None:
    """`upload_file_chunked`, with MD5: one file as if sent whole, and no part stays."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(DATA)
    done = await client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=PART_BYTES, md5=md5(DATA).hexdigest()
    )
    assert (done.object, done.status, done.bytes, done.filename) == ("upload", "completed", len(DATA), "train.jsonl")
    assert done.file is not None
    assert (await client.files.content(done.file.id)).content == DATA
    assert await client.files.retrieve(done.file.id) == done.file
    assert [key.rpartition("/")[2] for key in stored(gateway)] == [sha256(DATA).hexdigest()]
    assert staged(gateway) == []


async def test_parts_come_in_any_order_and_more_than_once(client: openai.AsyncOpenAI) -> None:
    """The order is what completing says; the same bytes are the same part; completing again is answered alike."""
    upload = await begin(client, expires_after={"anchor": "created_at", "seconds": 3_600})
    assert (upload.status, upload.file) == ("pending", None)
    backwards = await send(client, upload, cut()[::-1])
    assert await send(client, upload, cut()) == backwards[::-1]
    together = await asyncio.gather(*(client.uploads.complete(upload.id, part_ids=backwards[::-1]) for _ in range(3)))
    assert together == [together[0]] * 3
    file = together[0].file
    assert file is not None
    assert file.expires_at == file.created_at + 3_600
    assert (await client.files.content(file.id)).content == DATA
    assert len([file async for file in client.files.list()]) == 1


async def test_an_upload_survives_its_gateway(run_gateway: RunGateway, tmp_path: Path) -> None:
    """Half is sent to one gateway, half to another with a home of its own, and a third completes it."""
    shared = {
        "database_url": f"sqlite+aiosqlite:///{tmp_path / 'shared.db'}",
        "blobs_url": (tmp_path / "shared-blobs").as_uri(),
    }
    first, second, third = [await run_gateway(home=tmp_path / name, **shared) for name in ("one", "two", "three")]
    key = (await first.tenant("acme")).key
    async with client_of(first, key) as one, client_of(second, key) as two, client_of(third, key) as three:
        upload = await begin(one)
        ids = [*await send(one, upload, cut()[:2]), *await send(two, upload, cut()[2:])]
        done = await three.uploads.complete(upload.id, part_ids=ids)
        assert done.file is not None
        assert (await one.files.content(done.file.id)).content == DATA


async def test_a_cancelled_upload_is_over(client: openai.AsyncOpenAI, gateway: Gateway, acme: Tenant) -> None:
    """Its parts go; cancelled again it answers alike, and nothing more can be sent or completed."""
    upload = await begin(client)
    ids = await send(client, upload, cut())
    for _ in range(2):
        assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    assert stored(gateway) == []
    for path, body in (("parts", {"files": {"data": b"x"}}), ("complete", {"json": {"part_ids": ids}})):
        refused = await acme.client.post(f"/v1/uploads/{upload.id}/{path}", **body)
        assert (refused.status_code, error_of(refused)["code"]) == (409, "upload_over")


async def test_what_does_not_fit_together_is_refused(client: openai.AsyncOpenAI, acme: Tenant) -> None:
    """Unknown parts, too few, too many bytes, another MD5: the upload stays open, and can be completed after all."""
    upload = await begin(client)
    ids = await send(client, upload, cut())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"part_ids": [*ids, "part_0"]}, "part_unknown"),
        ({"part_ids": ids[1:]}, "size_differs"),
        ({"part_ids": [*ids, ids[0]]}, "size_differs"),
        ({"part_ids": ids, "md5": "0" * 32}, "checksum_mismatch"),
        ({"part_ids": []}, "invalid_value"),
        ({"part_ids": ids, "md5": "no md5"}, "invalid_value"),
        ({"part_ids": ids, "more": 1}, "invalid_value"),
    ]
    for body, code in wrong:
        refused = await acme.client.post(f"/v1/uploads/{upload.id}/complete", json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (400, code)
    more = await acme.client.post(f"/v1/uploads/{upload.id}/parts", files={"data": b"more"})
    assert (more.status_code, error_of(more)["code"]) == (413, "part_too_large")
    assert (await client.uploads.complete(upload.id, part_ids=ids, md5=md5(DATA).hexdigest())).status == "completed"


async def test_a_faulty_file_ends_its_upload(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    """Every fault is told, the same again when asked again, and nothing is kept."""
    data = jsonl(2) + b"{}\n"
    upload = await begin(client, data)
    ids = await send(client, upload, [data])
    said = []
    for _ in range(2):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.uploads.complete(upload.id, part_ids=ids)
        said.append(refused.value.response.content)
    assert said == [said[0]] * 2
    assert [fault["line"] for fault in json.loads(said[0])["error"]["faults"]] == [3]
    assert stored(gateway) == []


async def test_what_is_declared_counts_against_the_plan(
    client: openai.AsyncOpenAI, acme: Tenant, gateway: Gateway
) -> None:
    """At once and once only; what is cancelled or expired counts no more; so many are open at most."""
    plan = {"max_stored_file_bytes": len(DATA) + 10}
    assert (await gateway.operator.patch("/admin/v1/plans/default", json=plan)).status_code == 200
    upload = await begin(client)
    with pytest.raises(openai.PermissionDeniedError):
        await client.files.create(file=("a", jsonl(1)), purpose="fine-tune")
    await client.uploads.complete(upload.id, part_ids=await send(client, upload, cut()))
    with pytest.raises(openai.PermissionDeniedError) as refused:
        await begin(client)
    assert refused.value.body["param"] == "max_stored_file_bytes"  # type: ignore[index]
    assert (await gateway.operator.patch("/admin/v1/plans/default", json={"max_stored_file_bytes": None})).is_success
    for _ in range(MOST_OPEN):
        last = await begin(client)
    with pytest.raises(openai.ConflictError):
        await begin(client)
    await client.uploads.cancel(last.id)
    assert (await begin(client)).status == "pending"


async def test_expired_uploads_are_swept(client: openai.AsyncOpenAI, gateway: Gateway, acme: Tenant) -> None:
    """What has expired is missing at once; housekeeping removes rows and parts."""
    upload = await begin(client)
    await send(client, upload, cut())
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(file_uploads).values(expires_at=1))
    refused = await acme.client.post(f"/v1/uploads/{upload.id}/cancel")
    assert (refused.status_code, error_of(refused)["code"]) == (404, "not_found")
    gateway.parts.file_uploads._clock = lambda: 4e9  # parts are old enough by then
    assert await gateway.parts.file_uploads.sweep() == len(cut())
    assert stored(gateway) == []


async def test_hostile_declarations_are_refused(acme: Tenant, gateway: Gateway) -> None:
    """Each with OpenAI's envelope, and nothing kept."""
    good = {"filename": "a", "bytes": 10, "mime_type": "text/plain", "purpose": "fine-tune"}
    wrong: list[dict[str, Any]] = [
        {"bytes": 0},
        {"bytes": -1},
        {"bytes": "10"},
        {"bytes": 1.5},
        {"bytes": 10**16},
        {"filename": ""},
        {"filename": "x" * 256},
        {"filename": "a\nb"},
        {"purpose": "batch"},
        {"purpose": "fine-tune-results"},
        {"expires_after": {"anchor": "created_at", "seconds": 1}},
        {"expires_after": {"anchor": "last_used_at", "seconds": 3_600}},
        {"expires_after": {"seconds": 3_600}},
        {"more": 1},
    ]
    for change in wrong:
        refused = await acme.client.post("/v1/uploads", json={**good, **change})
        assert refused.status_code == 400, change
        error_of(refused)
    large = await acme.client.post("/v1/uploads", json={**good, "bytes": (512 << 20) + 1})
    assert (large.status_code, error_of(large)["code"]) == (413, "file_too_large")
    assert stored(gateway) == []
