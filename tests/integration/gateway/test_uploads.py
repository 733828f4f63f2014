"""Uploads over HTTP: refused with a reason, cut off at a limit, and nothing left behind."""

import asyncio
import io
import os
import resource
import shutil
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from adapter_store.transactions import writing
from gateway.idempotency import kept_answers
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import BAD, BadAdapter, write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of

BOUNDARY = "frontier"


def left_over(gateway: Gateway) -> list[str]:
    """Files of uploads, staged or stored."""
    staged = [str(path) for path in (gateway.home.path / "staging").rglob("*") if path.is_file()]
    return staged + gateway.shelf.keys()


async def test_every_bad_adapter_is_refused_by_name(
    gateway: Gateway, acme: Tenant, good: Path, tmp_path: Path, replica: FakeReplica
) -> None:
    """Each kind of fault has its code; the tenant's good adapter goes on answering; nothing stays behind."""
    assert (await acme.publish(good)).status_code == 201
    kept = left_over(gateway)
    served = [bad for bad in BAD if bad.served_as in (None, "float32")]
    assert len(served) >= 40
    for number, bad in enumerate(served):
        answer = await acme.publish(bad.make(good, tmp_path / f"bad-{number}"), "bad")
        assert_refused(bad, answer)
    assert left_over(gateway) == kept
    assert (await acme.ask("bad")).status_code == 404
    assert (await acme.ask()).status_code == 200
    assert len(replica.loads) == 1


def assert_refused(bad: BadAdapter, answer: httpx.Response) -> None:
    """A status of the client's fault, and codes that name what is wrong."""
    assert answer.status_code in (400, 413, 422), (bad.name, answer.text)
    error = error_of(answer)
    if answer.status_code == 422:
        assert bad.codes <= {fault["code"] for fault in error["faults"]}, (bad.name, error["faults"])
    else:
        assert error["code"] in ("adapter_incomplete", "adapter_too_large"), (bad.name, error)


async def test_a_bad_adapter_does_not_touch_the_version_that_serves(acme: Tenant, good: Path, tmp_path: Path) -> None:
    """Publishing garbage under a good adapter's name is refused; the name still means the good one."""
    await acme.publish(good)
    before = (await acme.ask()).json()["choices"]
    assert (await acme.publish(BAD[0].make(good, tmp_path / "bad"))).status_code == 422
    assert (await acme.ask()).json()["choices"] == before


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    more = f'; filename="{filename}"' if filename else ""
    return f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


async def post(tenant: Tenant, body: bytes | AsyncIterator[bytes]) -> httpx.Response:
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    return await tenant.client.post("/v1/adapters", content=body, headers=headers)


BROKEN_FORMS = (
    (b"", "upload_incomplete"),
    (b"garbage", "multipart_invalid"),
    (part("name", b"bot")[:-30], "upload_incomplete"),
    (part("name", b"bot") + END, "adapter_incomplete"),
    (part("name", b"x" * 2_000) + END, "invalid_value"),
    (part("name", b"\xff") + END, "invalid_value"),
    (part("evil", b"1") + END, "unknown_parameter"),
    (part("../../etc/passwd", b"1", "../../etc/passwd") + END, "unknown_parameter"),
    (part("x", b"1") * 20 + END, "unknown_parameter"),
    (part("name", b"a") * 20 + END, "multipart_invalid"),
    (part("adapter_config.json", b"{}") * 2 + END, "adapter_incomplete"),
    (part("adapter_config.json", b"{}") + END, "invalid_value"),
)


async def test_a_broken_form_is_told(acme: Tenant, gateway: Gateway, subtests: pytest.Subtests) -> None:
    """Whatever the form lacks or has too much of, the answer is a 400 that says so."""
    for body, code in BROKEN_FORMS:
        with subtests.test(body=body):
            answer = await post(acme, body)
            assert (answer.status_code, error_of(answer)["code"]) == (400, code)
            assert left_over(gateway) == []


async def test_a_bad_name_is_told(acme: Tenant, gateway: Gateway, good: Path, subtests: pytest.Subtests) -> None:
    """Names are plain; the base model's is taken."""
    for name in ("", "../x", "A", "x" * 65, "a/b", "a@1", "base", "a\x00"):
        with subtests.test(name=name):
            answer = await acme.publish(good, name)
            assert answer.status_code == (409 if name == "base" else 400)
            assert error_of(answer)["param"] == "name"
            assert left_over(gateway) == []


async def test_an_upload_that_passes_its_limit_is_cut_off(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """The limit is kept mid-stream; the client still gets to read why."""
    gateway = await run_gateway(replica, max_adapter_bytes=65_536)
    acme = await gateway.tenant("acme")
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * (8 << 20)}
    answer = await acme.client.post(
        "/v1/adapters", data={"name": "bot"}, files={name: (name, data) for name, data in files.items()}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (413, "adapter_too_large")
    assert left_over(gateway) == []


async def test_a_client_that_breaks_off_leaves_nothing(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """Half an upload is no upload."""
    whole = part("name", b"bot") + part("adapter_config.json", (good / "adapter_config.json").read_bytes())

    async def half() -> AsyncIterator[bytes]:
        yield whole
        raise ConnectionError("the cable was pulled")

    with pytest.raises(ConnectionError):
        await post(acme, half())
    assert (await acme.client.get("/v1/adapters")).json()["data"] == []
    assert left_over(gateway) == []


async def test_a_key_that_is_revoked_during_its_upload_publishes_nothing(
    acme: Tenant, gateway: Gateway, good: Path
) -> None:
    """However slowly it comes: who may publish is asked again when all is there."""
    files = {file.name: (file.name, file.read_bytes()) for file in good.iterdir()}
    form = acme.client.build_request("POST", "/v1/adapters", data={"name": "bot"}, files=files)
    body = await form.aread()
    begun = asyncio.Event()
    revoked = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:100]
        begun.set()
        await revoked.wait()
        yield body[100:]

    headers = {"content-type": form.headers["content-type"]}
    upload = asyncio.create_task(acme.client.post("/v1/adapters", content=pieces(), headers=headers))
    await begun.wait()
    while not list((gateway.home.path / "staging").glob("*")):  # past the first look at the key
        await asyncio.sleep(0.01)
    (key,) = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    assert (await gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
    revoked.set()
    assert (await upload).status_code == 401
    assert left_over(gateway) == []


async def test_a_full_disk_is_told_and_forgotten(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """No space: 507 and nothing partial; space again: the same upload succeeds."""
    await acme.publish(good)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (good / "adapter_model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # as a full disk does: write() fails half-way
    try:
        answer = await acme.publish(good, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_full")
    assert "retry-after" in answer.headers
    assert (await acme.ask("second")).status_code == 404
    assert (await acme.ask()).status_code == 200
    assert (await acme.publish(good, "second")).status_code == 201


async def test_two_uploads_at_once_are_two_versions(acme: Tenant, good: Path, other_good: Path) -> None:
    """Neither is lost and the numbers differ."""
    answers = await asyncio.gather(acme.publish(good), acme.publish(other_good))
    assert sorted(answer.json()["current"]["number"] for answer in answers) == [1, 2]
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    assert [version["number"] for version in shown["versions"]] == [2, 1]
    assert len({version["digest"] for version in shown["versions"]}) == 2


async def test_a_secret_file_that_others_can_read_is_refused(run_gateway: RunGateway, tmp_path: Path) -> None:
    """The gateway does not start with a secret that has leaked."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret-key").write_text("x" * 32)
    os.chmod(home / "secret-key", 0o644)  # noqa: PTH101
    with pytest.raises(Exception, match="can be read by others"):
        await run_gateway(home=home)


async def test_lists_come_in_pages(acme: Tenant, good: Path) -> None:
    """`after` and `limit` walk through all of them."""
    for name in ("a", "b", "c"):
        await acme.publish(good, name)
    first = (await acme.client.get("/v1/adapters?limit=2")).json()
    assert ([adapter["name"] for adapter in first["data"]], first["has_more"]) == (["a", "b"], True)
    second = (await acme.client.get("/v1/adapters?limit=2&after=b")).json()
    assert ([adapter["name"] for adapter in second["data"]], second["has_more"]) == (["c"], False)
    for query in ("limit=0", "limit=1001", "limit=x"):
        assert error_of(await acme.client.get(f"/v1/adapters?{query}"))["param"] == "limit"


async def test_versions_come_in_pages(acme: Tenant, good: Path, other_good: Path) -> None:
    """Newest first; `before` and `limit` walk through all of them, and the current one is told with each page."""
    for folder in (good, other_good):
        await acme.publish(folder)
    first = (await acme.client.get("/v1/adapters/bot?limit=1")).json()
    assert ([version["number"] for version in first["versions"]], first["has_more"]) == ([2], True)
    second = (await acme.client.get("/v1/adapters/bot?limit=1&before=2")).json()
    assert ([version["number"] for version in second["versions"]], second["has_more"]) == ([1], False)
    assert second["current"] == first["current"]
    for query in ("limit=0", "limit=1001"):
        assert error_of(await acme.client.get(f"/v1/adapters/bot?{query}"))["param"] == "limit"


def test_bad_adapters_are_many_and_named_apart() -> None:
    """The list is what it claims to be."""
    assert len(BAD) >= 40
    assert len({bad.name for bad in BAD}) == len(BAD)


def packed(folder: Path, kind: str) -> tuple[bytes, str]:
    """The folder as one archive, and its content type."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
        return out.getvalue(), "application/zip"
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        tar.add(folder, "bot")
    return out.getvalue(), "application/gzip" if kind == "tar.gz" else "application/x-tar"


async def test_an_archive_is_a_version(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """As the body or as a part of a form, it is the same as the two files."""
    one = (await acme.publish(good)).json()["current"]
    (good / "README.md").write_text("# a card")
    for kind in ("tar", "tar.gz", "zip"):
        body, content_type = packed(good, kind)
        headers = {"content-type": content_type}
        whole = await acme.client.post("/v1/adapters/bot/versions", content=body, headers=headers)
        form = await acme.client.post("/v1/adapters/bot/versions", files={"archive": ("bot", body)})
        old = await acme.client.post("/v1/adapters", data={"name": "bot"}, files={"archive": ("bot", body)})
        assert [answer.status_code for answer in (whole, form, old)] == [201] * 3
        told = {name: value for name, value in one.items() if name != "proof"}  # which may be there by now
        for answer in (whole, form):
            assert {**answer.json(), "proof": None} == {
                **told,
                "object": "adapter.version",
                "adapter": "bot",
                "proof": None,
            }
        assert {**old.json()["current"], "proof": None} == {**told, "proof": None}
    assert list((gateway.home.path / "staging").iterdir()) == []


async def test_two_files_are_a_version(acme: Tenant, good: Path, gateway: Gateway) -> None:
    """Under the adapter's own path, with who sent it."""
    files = {file.name: (file.name, file.read_bytes()) for file in good.iterdir()}
    made = await acme.client.post("/v1/adapters/bot/versions", files=files)
    (key,) = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    assert (made.status_code, made.headers["location"]) == (201, "/v1/adapters/bot")
    assert (made.json()["adapter"], made.json()["number"]) == ("bot", 1)
    assert (made.json()["provenance"], made.json()["published_by"]) == ("upload", key["id"])
    assert (await acme.ask()).status_code == 200


FORM = f"multipart/form-data; boundary={BOUNDARY}"
NO_ARCHIVES = [
    (b"", "application/zip", "archive_truncated"),
    (b"garbage" * 200, "application/octet-stream", "archive_invalid"),
    (b"{}", "application/json", "content_type_invalid"),
    (part("name", b"bot") + END, FORM, "unknown_parameter"),
    (part("archive", b"garbage" * 200) + END, FORM, "archive_invalid"),
]


async def test_a_body_that_is_no_archive_is_told(acme: Tenant, gateway: Gateway) -> None:
    """And leaves nothing."""
    for body, content_type, code in NO_ARCHIVES:
        headers = {"content-type": content_type}
        answer = await acme.client.post("/v1/adapters/bot/versions", content=body, headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (400, code)
        assert left_over(gateway) == []


async def test_half_an_archive_is_no_archive(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """Truncated, with a member that links, with two bodies: a 400 that says so."""
    body, content_type = packed(good, "tar.gz")
    headers = {"content-type": content_type}
    answer = await acme.client.post("/v1/adapters/bot/versions", content=body[:-100], headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "archive_truncated")
    (good / "link").symlink_to("/etc/passwd")
    body, _ = packed(good, "tar.gz")
    answer = await acme.client.post("/v1/adapters/bot/versions", content=body, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "archive_member_refused")
    assert "'bot/link' is a symbolic link" in error_of(answer)["message"]
    assert left_over(gateway) == []


async def test_a_client_that_stalls_is_cut(run_gateway: RunGateway, replica: FakeReplica, good: Path) -> None:
    """However much it has sent: 408, and its files go."""
    gateway = await run_gateway(replica, upload_stall_s=0.2)
    acme = await gateway.tenant("acme")
    for_ever = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield part("adapter_config.json", b"{}")
        await for_ever.wait()

    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    upload = asyncio.create_task(acme.client.post("/v1/adapters/bot/versions", content=pieces(), headers=headers))
    async with asyncio.timeout(10):
        while not list((gateway.home.path / "staging").glob("*")):
            await asyncio.sleep(0.01)
        while list((gateway.home.path / "staging").glob("*")):
            await asyncio.sleep(0.01)
    for_ever.set()
    answer = await upload
    assert (answer.status_code, error_of(answer)["code"]) == (408, "request_timeout")
    assert left_over(gateway) == []


async def set_plan(gateway: Gateway, **limits: int | None) -> None:
    assert (await gateway.operator.patch("/admin/v1/plans/default", json=limits)).status_code == 200


async def test_counts_are_held_to_the_plan(acme: Tenant, gateway: Gateway, good: Path, other_good: Path) -> None:
    """Adapters and versions: the error names the limit, what is used and what to do; a larger plan helps at once."""
    await set_plan(gateway, max_adapters=1, max_versions=2)
    assert (await acme.publish(good)).status_code == 201
    second = await acme.publish(good, "second")
    assert (second.status_code, error_of(second)["code"]) == (403, "quota_exceeded")
    assert error_of(second)["param"] == "max_adapters"
    assert "allows 1 adapters and 1 are used: delete one, or ask" in error_of(second)["message"]
    assert (await acme.publish(other_good)).status_code == 201
    files = {file.name: (file.name, file.read_bytes()) for file in good.iterdir()}
    third = await acme.client.post("/v1/adapters/bot/versions", files=files)
    assert error_of(third)["param"] == "max_versions"
    await set_plan(gateway, max_adapters=None, max_versions=3)
    assert (await acme.publish(good, "second")).status_code == 201
    assert len((await acme.client.get("/v1/adapters")).json()["data"]) == 2


async def test_rank_is_held_to_the_plan(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """The good adapter has rank 8."""
    await set_plan(gateway, max_rank=7)
    answer = await acme.publish(good)
    assert (answer.status_code, error_of(answer)["param"]) == (403, "max_rank")
    assert left_over(gateway) == []
    await set_plan(gateway, max_rank=8)
    assert (await acme.publish(good)).status_code == 201


@pytest.mark.parametrize("way", ["form", "archive"])
async def test_bytes_are_held_to_the_plan_mid_stream(acme: Tenant, gateway: Gateway, good: Path, way: str) -> None:
    """A body that would go on for ever is cut as soon as it is too large for what is left."""
    size = sum(file.stat().st_size for file in good.iterdir())
    await set_plan(gateway, max_stored_bytes=size + 50_000)
    assert (await acme.publish(good)).status_code == 201
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        yield part("adapter_model.safetensors", b"")[:-2] if way == "form" else tar_head(1 << 30)
        for _ in range(64):  # less than is read off, so that the answer can be read
            sent += 1 << 20
            yield bytes(1 << 20)

    types = {"form": f"multipart/form-data; boundary={BOUNDARY}", "archive": "application/x-tar"}
    headers = {"content-type": types[way]}
    answer = await acme.client.post("/v1/adapters/other/versions", content=pieces(), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (403, "quota_exceeded"), answer.text
    assert f"allows {size + 50_000} bytes of adapters" in error_of(answer)["message"]
    assert list((gateway.home.path / "staging").iterdir()) == []
    assert (await acme.ask()).status_code == 200


def tar_head(size_bytes: int) -> bytes:
    info = tarfile.TarInfo("adapter_model.safetensors")
    info.size = size_bytes
    return info.tobuf()


async def test_quotas_hold_between_uploads_at_once(acme: Tenant, gateway: Gateway, tmp_path: Path) -> None:
    """Each is within the limit when it begins; no more are published than fit."""
    await set_plan(gateway, max_adapters=3)
    folders = [write_good(tmp_path / f"good-{seed}", seed=seed) for seed in range(6)]
    answers = await asyncio.gather(*(acme.publish(folder, f"bot-{at}") for at, folder in enumerate(folders)))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 3
    assert len((await acme.client.get("/v1/adapters")).json()["data"]) == 3


async def publish_with(tenant: Tenant, key: str, folder: Path, name: str = "bot") -> httpx.Response:
    files = {file.name: (file.name, file.read_bytes()) for file in folder.iterdir()}
    path = f"/v1/adapters/{name}/versions"
    return await tenant.client.post(path, files=files, headers={"idempotency-key": key})


async def test_a_key_makes_an_upload_once(
    acme: Tenant, globex: Tenant, gateway: Gateway, good: Path, other_good: Path
) -> None:
    """Repeated, at once, after the adapter has gone on, packed otherwise: one effect, the same bytes."""
    first = await publish_with(acme, "k1", good)
    await acme.publish(other_good)
    body, content_type = packed(good, "zip")
    headers = {"content-type": content_type, "idempotency-key": "k1"}
    again = [
        *await asyncio.gather(*(publish_with(acme, "k1", good) for _ in range(4))),
        await acme.client.post("/v1/adapters/bot/versions", content=body, headers=headers),
    ]
    assert {(answer.status_code, answer.content) for answer in again} == {(201, first.content)}
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    assert shown["current"]["number"] == 2  # nothing has moved back
    reused = await publish_with(acme, "k1", other_good)
    assert (reused.status_code, error_of(reused)["code"]) == (409, "idempotency_key_reused")
    assert (await publish_with(acme, "k1", good, "other")).status_code == 409
    assert (await publish_with(globex, "k1", other_good)).status_code == 201  # keys are a tenant's own


async def test_many_with_one_key_at_once_have_one_effect(acme: Tenant, good: Path, other_good: Path) -> None:
    """Two contents under one key, at the same time: one is published, the other is told."""
    answers = await asyncio.gather(
        *(publish_with(acme, "k1", folder) for folder in (good, other_good, good, other_good))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 201, 409, 409]
    assert len((await acme.client.get("/v1/adapters/bot")).json()["versions"]) == 1


async def test_a_repeated_upload_takes_nothing_from_a_full_quota(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """Its answer is what it was; a key that is over is a new one, and a bad key is told."""
    await set_plan(gateway, max_versions=1)
    first = await publish_with(acme, "k1", good)
    assert (await publish_with(acme, "k1", good)).content == first.content
    assert error_of(await publish_with(acme, "k2", good))["code"] == "quota_exceeded"
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(kept_answers).values(expires_at=1))
    assert error_of(await publish_with(acme, "k1", good))["code"] == "quota_exceeded"
    assert await gateway.parts.answers.sweep() == 1
    for bad in ("x" * 256, "a b"):
        assert error_of(await publish_with(acme, bad, good))["param"] == "idempotency-key"


async def test_a_refused_upload_leaves_its_key_free(acme: Tenant, good: Path, tmp_path: Path) -> None:
    """It had no effect: the mended adapter may come under the same key."""
    bad = BAD[0].make(good, tmp_path / "bad")
    assert (await publish_with(acme, "k1", bad)).status_code == 422
    assert (await publish_with(acme, "k1", good)).status_code == 201


async def test_an_operator_imports_a_folder(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, tmp_path: Path
) -> None:
    """From below the root alone, through no link; checked and counted as an upload."""
    root = tmp_path / "root"
    shutil.copytree(good, root / "team" / "bot")
    outside = shutil.copytree(good, tmp_path / "outside")
    (root / "escape").symlink_to(outside)
    (root / "linked").mkdir()
    for file in outside.iterdir():
        (root / "linked" / file.name).symlink_to(file)
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "adapter_config.json")
    gateway = await run_gateway(replica, import_root=root)
    acme = await gateway.tenant("acme")
    place = "/admin/v1/tenants/acme/adapters/bot/import"
    made = await gateway.operator.post(place, json={"folder": "team/bot"})
    assert (made.status_code, made.json()["provenance"]) == (201, "import")
    (operator_key,) = (await gateway.operator.get("/admin/v1/keys")).json()["data"]
    assert made.json()["published_by"] == operator_key["id"]
    assert (await acme.ask()).status_code == 200
    absent = ("nowhere", "team/../team/bot", "..", "../outside", str(outside), "escape", "linked", "pipe", "a\\b", ".")
    for folder in absent:
        answer = await gateway.operator.post(place, json={"folder": folder})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "import_invalid"), folder
    for body in ({}, {"folder": "team/bot", "blobs": "x"}):
        assert (await gateway.operator.post(place, json=body)).status_code == 400
    await set_plan(gateway, max_versions=1)
    shutil.copytree(write_good(tmp_path / "second", seed=5), root / "second")
    assert error_of(await gateway.operator.post(place, json={"folder": "second"}))["code"] == "quota_exceeded"
    assert list((gateway.home.path / "staging").iterdir()) == []


async def test_an_operator_imports_from_the_blob_store(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """From below `imports/` alone; importing from folders is off unless it is set."""
    for file in good.iterdir():
        gateway.shelf.write(f"imports/from/afar/{file.name}", file.read_bytes())
    place = "/admin/v1/tenants/acme/adapters/bot/import"
    assert (await gateway.operator.post(place, json={"blobs": "from/afar"})).status_code == 201
    assert (await acme.ask()).status_code == 200
    for body in ({"blobs": "from"}, {"blobs": "../adapters"}, {"folder": "x"}):
        answer = await gateway.operator.post(place, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "import_invalid"), body
