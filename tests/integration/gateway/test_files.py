"""Files over HTTP, with OpenAI's own client: kept, listed, read, expired, erased, and refused where they should be."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import update
from typer.testing import CliRunner, Result

from adapter_store.engine import AsyncConnection
from adapter_store.ids import TenantId
from adapter_store.transactions import writing
from gateway.api_client import ApiClient
from gateway.cli import app as command
from gateway.push_file import PushFile
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of
from tests.integration.gateway.test_tenancy import run_command
from tests.waiting import until
from training.files import FileId, files


def example(question: str, answer: str = "a dragon") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(count: int = 3, of: str = "who") -> bytes:
    return b"".join(json.dumps(example(f"{of} is number {number}?")).encode() + b"\n" for number in range(count))


@pytest.fixture
async def gateway(run_gateway: RunGateway) -> Gateway:
    return await run_gateway()


def client_of(gateway: Gateway, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def client(gateway: Gateway, acme: Tenant) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(gateway, acme.key) as client:
        yield client


def stored(gateway: Gateway) -> list[str]:
    return gateway.shelf.keys()


def staged(gateway: Gateway) -> list[str]:
    return [str(path) for path in (gateway.home.path / "staging").rglob("*")]


async def test_a_file_is_kept_listed_and_read_with_the_official_client(
    client: openai.AsyncOpenAI, gateway: Gateway
) -> None:
    """Every member that OpenAI's types have, and ours beside them."""
    data = jsonl()
    made = await client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "train.jsonl", "fine-tune")
    assert (made.status, made.expires_at) == ("processed", None)
    assert made.model_extra is not None
    assert made.model_extra["tailor"]["sha256"] == sha256(data).hexdigest()
    assert await client.files.retrieve(made.id) == made
    assert [file async for file in client.files.list()] == [made]
    assert (await client.files.content(made.id)).content == data
    assert staged(gateway) == []


async def test_lists_are_paged_either_way(client: openai.AsyncOpenAI) -> None:
    """By the client's own paging, and by purpose."""
    ids = [(await client.files.create(file=("a", jsonl(n)), purpose="fine-tune")).id for n in (1, 2, 3)]
    assert {file.id async for file in client.files.list(limit=2)} == set(ids)
    newest = [file.id async for file in client.files.list(limit=1)]
    assert [file.id async for file in client.files.list(limit=1, order="asc")] == newest[::-1]
    page = await client.files.list(limit=2)
    assert page.has_more
    assert [file async for file in client.files.list(purpose="fine-tune-results")] == []


async def test_a_file_is_erased_with_a_receipt(client: openai.AsyncOpenAI, acme: Tenant, gateway: Gateway) -> None:
    """OpenAI's answer; the row, the bytes and the name are gone, and the receipt is signed."""
    data = jsonl()
    made = await client.files.create(file=("names.jsonl", data), purpose="fine-tune")
    gone = await client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    assert stored(gateway) == []
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made.id)
    assert gone.model_extra is not None
    receipt = (await acme.client.get(f"/v1/erasures/{gone.model_extra['tailor']['erasure']}")).json()
    assert (receipt["state"], receipt["statement"]["subject"]) == ("completed", made.id)
    assert receipt["signature"] is not None
    (file,) = receipt["statement"]["files"]
    assert file == {
        "id": made.id,
        "kind": "fine-tune",
        "sha256": sha256(data).hexdigest(),
        "bytes": len(data),
        "blob": "erased",
    }
    assert "names.jsonl" not in json.dumps(receipt)
    assert (await acme.client.get("/v1/erasures")).json()["data"] == [receipt]


async def test_the_same_bytes_stay_for_another_file(client: openai.AsyncOpenAI) -> None:
    """Two files of the same content go one by one."""
    first, second = [(await client.files.create(file=("a", jsonl()), purpose="fine-tune")).id for _ in range(2)]
    assert first != second
    await client.files.delete(first)
    assert (await client.files.content(second)).content == jsonl()


async def test_another_tenants_file_looks_missing(client: openai.AsyncOpenAI, globex: Tenant) -> None:
    """The same answer for what is there and what is not, whatever is asked of it."""
    made = (await client.files.create(file=("a", jsonl()), purpose="fine-tune")).id
    missing = f"file-{'0' * 26}"
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        theirs = await globex.client.request(method, f"/v1/files/{made}{path}")
        none = await globex.client.request(method, f"/v1/files/{missing}{path}")
        assert theirs.status_code == none.status_code == 404
        assert theirs.text.replace(made, missing) == none.text
    assert (await globex.client.get("/v1/files")).json()["data"] == []
    assert (await client.files.retrieve(made)).id == made


async def test_faults_are_told_line_by_line_and_nothing_is_kept(acme: Tenant, gateway: Gateway) -> None:
    """As a refused adapter: the envelope lists them all."""
    lines = [json.dumps(example("who?")), "{", json.dumps({"messages": []}), json.dumps(example("why?")), "[]"]
    refused = await send(acme, "\n".join(lines).encode())
    assert refused.status_code == 400
    error = error_of(refused)
    assert (error["code"], error["param"]) == ("invalid_training_file", "file")
    assert [fault["line"] for fault in error["faults"]] == [2, 3, 5]
    assert all(fault["reason"] for fault in error["faults"])
    assert "line 2" in error["message"]
    assert (stored(gateway), staged(gateway)) == ([], [])
    assert (await acme.client.get("/v1/files")).json()["data"] == []


async def test_what_the_check_found_is_shown(client: openai.AsyncOpenAI) -> None:
    """Figures and warnings, with the file and whenever it is asked for."""
    rows = [example("who?"), example("who?"), example("write to ada@example.org")]
    made = await client.files.create(file=("a", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
    assert made.model_extra is not None
    report = made.model_extra["tailor"]["report"]
    assert (report["method"], report["statistics"]["examples"]) == ("supervised", 3)
    assert {warning["kind"]: warning["lines"] for warning in report["warnings"]} == {"duplicate": [2], "email": [3]}
    assert (await client.files.retrieve(made.id)).model_extra == made.model_extra


async def send(tenant: Tenant, data: bytes = b"", /, **more: Any) -> httpx.Response:
    """A file as a form; `more` goes to httpx instead of what a good request has."""
    form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", data or jsonl())}}
    return await tenant.client.post("/v1/files", **{**form, **more})


async def test_a_repeated_upload_has_one_effect(acme: Tenant) -> None:
    """With an Idempotency-Key: the same answer, at once and later; another file under it is a conflict."""
    headers = {"idempotency-key": "k1"}
    answers = [
        *await asyncio.gather(*(send(acme, headers=headers) for _ in range(3))),
        await send(acme, headers=headers),
    ]
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert len((await acme.client.get("/v1/files")).json()["data"]) == 1
    other = await send(acme, jsonl(1), headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")


FORMS: list[tuple[dict[str, Any], str | None]] = [
    ({"data": {"purpose": "batch"}}, "purpose"),
    ({"data": {"purpose": "fine-tune-results"}}, "purpose"),
    ({"data": {"purpose": ""}}, "purpose"),
    ({"data": {}}, "purpose"),
    ({"data": {"purpose": "fine-tune", "name": "x"}}, "name"),
    ({"data": {"purpose": "fine-tune", "expires_after[anchor]": "created_at"}}, "expires_after[seconds]"),
    ({"data": {"purpose": "fine-tune", "expires_after[seconds]": "3600"}}, "expires_after[anchor]"),
    (
        {"data": {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}},
        "expires_after[seconds]",
    ),
    (
        {"data": {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "٣٦٠٠"}},
        "expires_after[seconds]",
    ),
    ({"files": {"purpose": (None, "fine-tune")}, "data": {}}, "file"),
    ({"files": {"file": ("a\x07b", b"{}")}}, "file"),
    ({"files": {"file": ("x" * 256, b"{}")}}, "file"),
    ({"files": [("file", ("a", jsonl())), ("file", ("b", jsonl()))]}, None),
    ({"files": {}, "data": {}, "content": b"--x\r\n\r\n", "headers": {"content-type": "multipart/form-data"}}, None),
    (
        {
            "files": {},
            "data": {},
            "content": b"nothing",
            "headers": {"content-type": "multipart/form-data; boundary=x"},
        },
        None,
    ),
    ({"files": {}, "data": {}, "json": {"purpose": "fine-tune"}}, None),
]


async def test_odd_forms_are_refused_in_openais_envelope(acme: Tenant, gateway: Gateway) -> None:
    """Purposes, policies, parts, names, bodies; each names the parameter, and leaves nothing."""
    for form, param in FORMS:
        refused = await send(acme, **form)
        assert refused.status_code == 400, (form, refused.text)
        assert error_of(refused)["param"] == param, (form, refused.text)
    refusal = error_of(await send(acme, data={"purpose": "vision"}))
    assert "'fine-tune'" in refusal["message"]
    assert (stored(gateway), staged(gateway)) == ([], [])


async def test_a_filename_is_a_text_and_no_path(acme: Tenant, gateway: Gateway) -> None:
    """Whatever it says, it is shown again as it came, and lies nowhere."""
    for name in ("../../etc/passwd", "/etc/shadow", "a b;c=d", "bär 🐻.jsonl", "%2e%2e%2f", "file.jsonl\\..\\x"):
        made = await send(acme, files={"file": (name, jsonl())})
        assert made.status_code == 200, made.text
        assert made.json()["filename"] == name
        shown = await acme.client.get(f"/v1/files/{made.json()['id']}")
        assert shown.json() == made.json()
        content = await acme.client.get(f"/v1/files/{made.json()['id']}/content")
        assert content.content == jsonl()
        assert content.headers["content-type"] == "application/octet-stream"
    (key,) = stored(gateway)
    assert re.fullmatch(f"adapters/tnt_[0-9a-f]*/{sha256(jsonl()).hexdigest()}", key)


async def test_a_file_expires(client: openai.AsyncOpenAI, acme: Tenant, gateway: Gateway) -> None:
    """It is missing from that second on, and housekeeping erases it, with a receipt."""
    policy = {"anchor": "created_at", "seconds": 3_600}
    made = await client.files.create(file=("a", jsonl()), purpose="fine-tune", expires_after=policy)  # type: ignore[arg-type]
    assert made.expires_at == made.created_at + 3_600
    gateway.parts.files._clock = lambda: float(made.created_at + 3_600)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made.id)
    assert [file async for file in client.files.list()] == []
    assert await gateway.parts.files.sweep() == 1
    await until(lambda: stored(gateway) == [])
    (erasure,) = (await acme.client.get("/v1/erasures")).json()["data"]
    assert erasure["statement"]["requested_by"] == "expiry"


async def test_quotas_hold_in_the_middle_of_a_file(acme: Tenant, gateway: Gateway) -> None:
    """Count and bytes, as the plan says; one file over the server's own limit is cut too."""
    assert (await send(acme)).status_code == 200
    await gateway.operator.patch("/admin/v1/plans/default", json={"max_files": 1})
    refused = await send(acme)
    assert (refused.status_code, error_of(refused)["param"]) == (403, "max_files")
    await gateway.operator.patch("/admin/v1/plans/default", json={"max_files": 2, "max_stored_file_bytes": 5_000})
    refused = await send(acme, jsonl(1_000))
    assert (refused.status_code, error_of(refused)["param"]) == (403, "max_stored_file_bytes")
    assert (await send(acme, jsonl(1))).status_code == 200
    assert staged(gateway) == []


async def test_a_file_over_the_limit_is_cut(run_gateway: RunGateway) -> None:
    """At the setting's bytes, and at one less it is taken."""
    gateway = await run_gateway(max_file_bytes=len(jsonl(20)))
    acme = await gateway.tenant("acme")
    assert (await send(acme, jsonl(20))).status_code == 200
    refused = await send(acme, jsonl(20) + b"\n")
    assert (refused.status_code, error_of(refused)["code"]) == (413, "file_too_large")
    assert len(stored(gateway)) == 1


async def test_damaged_bytes_are_never_given_whole(acme: Tenant, gateway: Gateway) -> None:
    """A flipped bit breaks the answer off; a blob that is gone is a 503; the scrubber names the file."""
    file_id = (await send(acme)).json()["id"]
    (blob,) = stored(gateway)
    gateway.shelf.flip(blob, 0)
    with pytest.raises(httpx.RemoteProtocolError):
        await acme.client.get(f"/v1/files/{file_id}/content")
    await gateway.parts.scrubber.run()
    (fault,) = (await gateway.operator.get("/admin/v1/storage/faults")).json()["data"]
    assert (fault["fault"], fault["versions"]) == ("corrupt", [file_id])
    await gateway.parts.files._blobs.delete(blob)
    refused = await acme.client.get(f"/v1/files/{file_id}/content")
    assert (refused.status_code, error_of(refused)["code"]) == (503, "file_damaged")
    assert (await send(acme)).status_code == 200  # sent again, the bytes are there again
    assert (await acme.client.get(f"/v1/files/{file_id}/content")).content == jsonl()


async def test_nothing_but_the_receipt_is_left_of_an_erased_file(
    client: openai.AsyncOpenAI, acme: Tenant, gateway: Gateway
) -> None:
    """Its name and report are in no row, its digest and id in answers to its sender; repeated, it is not made."""
    headers = {"idempotency-key": "k1"}
    sent = (await send(acme, files={"file": ("ada.jsonl", jsonl())}, headers=headers)).json()
    told = {"filename": "ada.jsonl", "mime_type": "", "purpose": "fine-tune"}
    upload = await client.uploads.create(bytes=len(jsonl(2)), **told)  # type: ignore[arg-type]
    part = await client.uploads.parts.create(upload.id, data=jsonl(2))
    done = await client.uploads.complete(upload.id, part_ids=[part.id], extra_headers={"idempotency-key": "k2"})
    assert done.file is not None
    texts = ("ada.jsonl", "statistics")
    traces = (sent["id"], done.file.id, sha256(jsonl()).hexdigest(), sha256(jsonl(2)).hexdigest())
    for one in (*texts, *traces):
        assert await gateway.tables_with(one) >= {"files", "kept_answers"}, one
    for file_id in (sent["id"], done.file.id):
        assert (await client.files.delete(file_id)).deleted
    assert await gateway.tables_with(*texts) == set()
    assert await gateway.tables_with(*traces) == {"erasures", "kept_answers"}
    again = await send(acme, files={"file": ("ada.jsonl", jsonl())}, headers=headers)
    assert (again.json()["id"], again.json()["filename"]) == (sent["id"], "")
    assert (await acme.client.get("/v1/files")).json()["data"] == []


async def test_a_file_that_a_job_needs_stays_unless_forced(run_gateway: RunGateway) -> None:
    """409 with the job's name; expiry waits for it too; the receipt says that it was forced."""
    gateway = await run_gateway()
    acme = await gateway.tenant("acme")

    async def in_use(_: AsyncConnection, __: TenantId, ___: FileId) -> Sequence[str]:
        return ["ftjob-1"]

    gateway.parts.files._in_use = in_use
    path = f"/v1/files/{(await send(acme)).json()['id']}"
    refused = await acme.client.delete(path)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "file_in_use")
    assert "ftjob-1" in error_of(refused)["message"]
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(files).values(expires_at=1))
    assert await gateway.parts.files.sweep() == 0
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(files).values(expires_at=None))
    assert (await acme.client.delete(path, params={"force": True})).status_code == 200
    (erasure,) = (await acme.client.get("/v1/erasures")).json()["data"]
    assert erasure["statement"]["forced"] is True


async def test_operators_see_what_each_tenant_keeps(
    client: openai.AsyncOpenAI, acme: Tenant, globex: Tenant, gateway: Gateway, good: Path
) -> None:
    """Adapters, files and uploads under way, in counts and bytes; page by page, and from the command."""
    data = jsonl()
    for _ in range(2):
        await client.files.create(file=("a", data), purpose="fine-tune")
    await client.uploads.create(bytes=77, filename="b", mime_type="", purpose="fine-tune")
    assert (await globex.publish(good)).status_code == 201
    first = (await gateway.operator.get("/admin/v1/storage/tenants", params={"limit": 1})).json()
    assert first["has_more"]
    (told,) = first["data"]
    assert (told["tenant"], told["files"], told["file_bytes"]) == ("acme", 2, 2 * len(data))
    assert (told["adapters"], told["versions"], told["uploads"], told["upload_bytes"]) == (0, 0, 1, 77)
    listed = await run_command(gateway, "tenant", "storage")
    assert listed[0] == told
    assert (listed[1]["adapters"], listed[1]["versions"], listed[1]["files"]) == (1, 1, 0)
    assert listed[1]["adapter_bytes"] > 0


async def test_files_are_kept_from_the_command(gateway: Gateway, acme: Tenant, tmp_path: Path) -> None:
    """Put, listed, shown, fetched, erased with a receipt; a faulty one is told line by line."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl())
    made = await run_command(gateway, "file", "put", str(path), "--expires-after-s", "3600", key=acme.key)
    assert (made["filename"], made["expires_at"]) == ("train.jsonl", made["created_at"] + 3_600)
    assert [file["id"] for file in await run_command(gateway, "file", "list", key=acme.key)] == [made["id"]]
    assert await run_command(gateway, "file", "show", made["id"], key=acme.key) == made
    run = tell(gateway, acme)
    assert "3 examples (supervised)" in (await run("show", made["id"])).stdout
    out = tmp_path / "out.jsonl"
    assert (await run("get", made["id"], "--out", str(out))).exit_code == 0
    assert out.read_bytes() == (await run("get", made["id"])).stdout_bytes == jsonl()
    assert (await run("get", made["id"], "--out", str(out))).exit_code == 1  # nothing is written over
    told = (await run("delete", made["id"])).stdout
    receipt = await run_command(gateway, "erasure", "show", told.split()[-1], key=acme.key)
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    stated = await run_command(gateway, "erasure", "verify", str(tmp_path / "receipt.json"), key=acme.key)
    assert (stated["subject"], stated["scope"]) == (made["id"], "file")
    (listed,) = await run_command(gateway, "erasure", "list", key=acme.key)
    assert listed == receipt
    path.write_bytes(jsonl() + b"{\n[]\n")
    refused = await run("put", str(path))
    assert refused.exit_code == 1
    assert "\n  line 4: " in refused.stderr
    assert "\n  line 5: " in refused.stderr


async def test_the_command_sends_large_files_in_parts(gateway: Gateway, acme: Tenant, tmp_path: Path) -> None:
    """What comes out is what went in, in the order in which it went."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(500))

    def push() -> Any:
        with closing(ApiClient(gateway.url, acme.key)) as client:
            stage: Any = lambda *_: lambda _: None  # noqa: E731
            return PushFile(client, path, stage=stage, in_parts_from_bytes=1, part_bytes=7_000).run()

    made = await asyncio.to_thread(push)
    assert made["tailor"]["report"]["statistics"]["examples"] == 500
    assert (await acme.client.get(f"/v1/files/{made['id']}/content")).content == jsonl(500)


def tell(gateway: Gateway, tenant: Tenant) -> Callable[..., Awaitable[Result]]:
    """`tailor file …` as a person runs it."""

    async def run(*arguments: str) -> Result:
        environment = {"TAILOR_URL": gateway.url, "TAILOR_API_KEY": tenant.key, "TAILOR_HOME": str(gateway.home.path)}
        return await asyncio.to_thread(CliRunner().invoke, command, ["file", *arguments], env=environment)

    return run
