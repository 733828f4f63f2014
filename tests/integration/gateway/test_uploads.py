"""Uploads over HTTP: refused with a reason, cut off at a limit, and nothing left behind."""

import asyncio
import json
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.bad_adapters import BAD, BadAdapter
from tests.fakes.replica import FakeReplica
from tests.integration.gateway.conftest import Gateway, RunGateway, Tenant, error_of

BOUNDARY = "frontier"


def left_over(gateway: Gateway) -> list[Path]:
    """Files of uploads, staged or stored."""
    places = (gateway.home.path / "staging", gateway.home.path / "blobs")
    return [path for place in places for path in place.rglob("*") if path.is_file()]


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


@pytest.mark.parametrize(
    ("body", "code"),
    [
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
    ],
)
async def test_a_broken_form_is_told(acme: Tenant, gateway: Gateway, body: bytes, code: str) -> None:
    """Whatever the form lacks or has too much of, the answer is a 400 that says so."""
    answer = await post(acme, body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert left_over(gateway) == []


@pytest.mark.parametrize(
    ("name", "status"),
    [("", 400), ("../x", 400), ("A", 400), ("x" * 65, 400), ("a/b", 400), ("a@1", 400), ("base", 409), ("a\x00", 400)],
)
async def test_a_bad_name_is_told(acme: Tenant, gateway: Gateway, good: Path, name: str, status: int) -> None:
    """Names are plain; the base model's is taken."""
    answer = await acme.publish(good, name)
    assert answer.status_code == status
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
    import asyncio

    answers = await asyncio.gather(acme.publish(good), acme.publish(other_good))
    assert sorted(answer.json()["current"]["number"] for answer in answers) != []
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


def test_bad_adapters_are_many_and_named_apart() -> None:
    """The list is what it claims to be."""
    assert len(BAD) >= 40
    assert len({bad.name for bad in BAD}) == len(BAD)
    assert json.dumps([bad.name for bad in BAD])
