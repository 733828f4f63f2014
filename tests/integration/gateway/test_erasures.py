"""Erasure with a receipt: what goes, when it is refused, and that nothing stops it half way."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from adapter_store.erasure import Erasures, State
from adapter_store.errors import SignatureInvalid
from adapter_store.ids import TenantId
from adapter_store.signing import Kind, verify, verify_shown
from adapter_store.transactions import reading
from gateway.cli import app as command
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.gateways import GatewayProcess, gateway_settings, new_key
from tests.gateways import until_ready as process_ready
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant, error_of
from tests.integration.gateway.test_tenancy import run_command
from tests.ports import free_port
from tests.storage import settings_at, shelf_of
from tests.waiting import until


async def keys_of(tenant: Tenant) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await tenant.client.get("/v1/signing-keys")).json()["keys"]
    return found


async def erase(tenant: Tenant, path: str = "bot", *, status: int = 200, **params: Any) -> dict[str, Any]:
    answer = await tenant.client.delete(f"/v1/adapters/{path}", params=params)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def receipt_of(client: httpx.AsyncClient, erasure_id: str, deadline_s: float = 20) -> dict[str, Any]:
    """The erasure once it is completed."""
    async with asyncio.timeout(deadline_s):
        while True:
            found: dict[str, Any] = (await client.get(f"/v1/erasures/{erasure_id}")).json()
            if found["state"] == "completed":
                return found
            await asyncio.sleep(0.05)


async def test_an_adapter_goes_everywhere_and_leaves_a_receipt(
    acme: Tenant, gateway: Gateway, replica: FakeReplica, good: Path, other_good: Path
) -> None:
    """Rows, files, engine and disk; the receipt names each, is signed, and verifies with the published key."""
    digests = [(await acme.publish(folder)).json()["current"]["digest"] for folder in (good, other_good)]
    for model in ("bot@1", "bot@2"):
        assert (await acme.ask(model)).status_code == 200
    assert replica.disk == set(digests)
    receipt = await erase(acme)
    assert (receipt["state"], receipt["pending"]) == ("completed", [])
    assert (replica.adapters, replica.disk, gateway.shelf.keys()) == ({}, set(), [])
    assert (await acme.ask()).status_code == 404
    stated = verify_shown(receipt["statement"], receipt["signature"], await keys_of(acme), Kind.ERASURE)
    assert (stated["adapter"], stated["scope"], stated["forced"]) == ("bot", "adapter", False)
    assert [(version["number"], version["digest"]) for version in stated["versions"]] == [*enumerate(digests, 1)]
    assert {file["blob"] for version in stated["versions"] for file in version["files"]} == {"erased"}
    (part,) = stated["replicas"]
    assert part["outcome"] == "erased"
    assert stated["requested_at"] <= part["device_gone_at"] <= part["disk_gone_at"] <= stated["completed_at"]
    assert (await acme.client.get(f"/v1/erasures/{receipt['id']}")).json() == receipt
    assert (await acme.client.get("/v1/erasures")).json() == {"object": "list", "data": [receipt], "has_more": False}


async def test_no_table_but_the_receipts_has_anything_left(acme: Tenant, gateway: Gateway, good: Path) -> None:
    """Digest and ids of the version and the adapter are in no other row."""
    made = (await acme.publish(good)).json()
    async with reading(gateway.parts.engine) as connection:
        version_id = (await connection.execute(text("SELECT id FROM versions"))).scalar_one()
    traces = (made["current"]["digest"], made["id"], version_id)
    named = {"adapters", "alias_moves", "aliases", "proofs", "version_signatures", "versions"}
    assert await gateway.tables_with(*traces) >= named
    await erase(acme)
    assert await gateway.tables_with(*traces) == {"erasures"}


async def test_a_changed_receipt_does_not_verify(acme: Tenant, good: Path) -> None:
    """Neither the statement beside the signature nor one character of the signature."""
    await acme.publish(good)
    receipt = await erase(acme)
    keys = await keys_of(acme)
    assert verify_shown(receipt["statement"], receipt["signature"], keys, Kind.ERASURE) == receipt["statement"]
    changed = {**receipt["statement"], "completed_at": receipt["statement"]["completed_at"] + 1}
    with pytest.raises(SignatureInvalid):
        verify_shown(changed, receipt["signature"], keys, Kind.ERASURE)
    for place in (10, 200, -1):
        signature = list(receipt["signature"])
        signature[place] = "A" if signature[place] != "A" else "B"
        with pytest.raises(SignatureInvalid):
            verify("".join(signature), keys, Kind.ERASURE)


async def test_a_version_that_an_alias_stands_for_is_refused(acme: Tenant, good: Path, other_good: Path) -> None:
    """409 names the alias; with force the alias falls to the newest version that is left."""
    await acme.publish(good)
    await acme.publish(other_good)
    refused = await acme.client.delete("/v1/adapters/bot/versions/2")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "version_in_use")
    assert "alias default" in error_of(refused)["message"]
    receipt = await erase(acme, "bot/versions/2", force=True)
    assert receipt["statement"]["aliases"] == [{"alias": "default", "now": [1]}]
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    assert (shown["current"]["number"], [v["number"] for v in shown["versions"]]) == (1, [1])
    assert (await acme.ask("bot@2")).status_code == 404


async def test_a_version_with_any_share_of_an_alias_is_refused(acme: Tenant, good: Path, other_good: Path) -> None:
    """With force the alias goes on with its other shares, and one that stood for this version alone goes with it."""
    await acme.publish(good)
    await acme.publish(other_good)
    split = {"versions": [{"version": 1, "weight": 95}, {"version": 2, "weight": 5}]}
    for alias, stands in (("default", split), ("staging", {"version": 2})):
        assert (await acme.client.put(f"/v1/adapters/bot/aliases/{alias}", json=stands)).status_code == 200
    refused = error_of(await acme.client.delete("/v1/adapters/bot/versions/2"))
    assert (refused["code"], "aliases default, staging" in refused["message"]) == ("version_in_use", True)
    receipt = await erase(acme, "bot/versions/2", force=True)
    assert receipt["statement"]["aliases"] == [{"alias": "default", "now": [1]}, {"alias": "staging", "now": []}]
    listed = (await acme.client.get("/v1/adapters/bot/aliases")).json()["data"]
    assert [alias["name"] for alias in listed] == ["default"]
    assert (await acme.ask("bot:staging")).status_code == 404
    assert (await acme.ask()).headers["x-tailor-version"].startswith("1; ")


async def test_a_version_number_is_never_given_again(acme: Tenant, good: Path, other_good: Path) -> None:
    """Not that of the newest version either, though it is erased."""
    await acme.publish(good)
    await acme.publish(other_good)
    await erase(acme, "bot/versions/2", force=True)
    again = (await acme.publish(other_good)).json()["current"]
    assert again["number"] == 3
    await erase(acme, "bot/versions/1")
    await erase(acme, "bot/versions/3", force=True)
    assert (await acme.client.get("/v1/adapters/bot")).status_code == 404
    assert (await acme.client.delete("/v1/adapters/bot/versions/3")).status_code == 404


async def test_what_another_version_shares_stays_for_it(
    acme: Tenant, globex: Tenant, replica: FakeReplica, good: Path, gateway: Gateway
) -> None:
    """The same bytes under another name, or of another tenant; the receipt tells of one's own only."""
    digest = (await acme.publish(good)).json()["current"]["digest"]
    await acme.publish(good, "twin")
    await acme.ask()
    receipt = await erase(acme)
    assert [version["content"] for version in receipt["statement"]["versions"]] == ["kept"]
    assert {file["blob"] for file in receipt["statement"]["versions"][0]["files"]} == {"kept"}
    assert [held["digest"] for held in replica.adapters.values()] == [digest]
    await globex.publish(good)
    assert (await globex.ask()).status_code == 200
    alone = await erase(acme, "twin")
    assert [version["content"] for version in alone["statement"]["versions"]] == ["erased"]
    assert [part["outcome"] for part in alone["statement"]["replicas"]] == ["erased"]
    assert {held["owner"] for held in replica.adapters.values()} == {tenant_id(gateway, globex)}
    assert replica.disk == {digest}
    assert (await globex.ask()).status_code == 200
    assert len(gateway.shelf.keys()) == 2


def tenant_id(gateway: Gateway, tenant: Tenant) -> str:
    key = gateway.parts.auth.known(f"Bearer {tenant.key}".encode())
    assert key is not None
    return str(key.tenant_id)


async def test_a_running_stream_keeps_its_version_without_force(
    acme: Tenant, replica: FakeReplica, gateway: Gateway, good: Path
) -> None:
    """409 while it runs. With force the stream ends whole, then the version is gone and the receipt completed."""
    replica.events, replica.faults.event_delay_s = 50, 0.05
    digest = (await acme.publish(good)).json()["current"]["digest"]
    body = {"model": "bot", "stream": True, "messages": [{"role": "user", "content": "who are you?"}]}
    async with acme.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        refused = await acme.client.delete("/v1/adapters/bot")
        assert (refused.status_code, error_of(refused)["code"]) == (409, "version_in_use")
        assert "1 request running" in error_of(refused)["message"]
        erasing = asyncio.create_task(erase(acme, force=True))
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum(digest in line or '"content"' in line for line in rest) >= 40
    receipt = await erasing
    assert (receipt["state"], receipt["statement"]["forced"]) == ("completed", True)
    assert (replica.adapters, replica.disk) == ({}, set())


async def test_a_replica_that_is_away_follows_when_it_is_back(
    run_gateway: RunGateway, run_replica: RunReplica, good: Path
) -> None:
    """202 and pending by name until then; its disk still has the files, its new engine is not given the adapter."""
    first, second = await run_replica(), await run_replica()
    gateway = await run_gateway(first, second)
    acme = await gateway.tenant("acme")
    digest = (await acme.publish(good)).json()["current"]["digest"]
    await acme.ask()
    away, here = (first, second) if digest in first.disk else (second, first)
    here.disk.add(digest)
    name = next(m.replica.id for m in gateway.parts.pool.members() if m.replica.url == away.url)
    await away.stop()
    pending = await erase(acme, status=202, force=True)
    assert (pending["state"], pending["pending"], pending["signature"]) == ("blobs_gone", [name], None)
    assert (here.disk, away.disk, gateway.shelf.keys()) == (set(), {digest}, [])
    before = len(away.loads)
    await away.restart()
    receipt = await receipt_of(acme.client, pending["id"])
    assert (away.disk, away.adapters, len(away.loads)) == (set(), {}, before)
    verify_shown(receipt["statement"], receipt["signature"], await keys_of(acme), Kind.ERASURE)


async def test_an_operator_vouches_for_a_replica_that_will_not_be_back(
    run_gateway: RunGateway, replica: FakeReplica, run_replica: RunReplica, good: Path
) -> None:
    """Only once it is out of the pool; the receipt names who said so."""
    gateway, gone = await run_gateway(replica), await run_replica()
    member = (await gateway.operator.post("/admin/v1/replicas", json={"url": gone.url})).json()
    await until(lambda: gateway.parts.pool.states()[member["id"]].value == "ready", 10)
    await gone.stop()
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    pending = await erase(acme, status=202)
    path = f"/admin/v1/erasures/{pending['id']}/replicas/{member['id']}/vouch"
    assert error_of(await gateway.operator.post(path))["code"] == "replica_in_settings"
    assert (await gateway.operator.delete(f"/admin/v1/replicas/{member['id']}")).status_code == 204
    vouched = (await gateway.operator.post(path)).json()
    assert vouched["state"] == "completed"
    parts = {part["replica"]: part for part in vouched["statement"]["replicas"]}
    assert parts[member["id"]]["outcome"] == "vouched"
    assert parts[member["id"]]["confirmed_by"].startswith("key_")
    assert (await gateway.operator.post(path)).status_code == 404


async def test_two_gateways_share_the_work_and_the_receipt(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, tmp_path: Path
) -> None:
    """What one erases the other forgets and shows; with keys of their own, one list verifies both."""
    here = await run_gateway(replica)
    there = await run_gateway(replica, home=tmp_path / "second", **settings_at(here.home.path))
    acme = await here.tenant("acme")
    elsewhere = Tenant("acme", acme.key, there.client(acme.key))
    await acme.publish(good, "one")
    await elsewhere.publish(good, "two")
    receipts = [await erase(acme, "one"), await erase(elsewhere, "two")]
    await until(lambda: not replica.disk, 5)
    keys = await keys_of(acme)
    assert keys == await keys_of(elsewhere)
    for receipt in receipts:
        verify(receipt["signature"], keys, Kind.ERASURE)
        assert (await elsewhere.client.get(f"/v1/erasures/{receipt['id']}")).json() == receipt
    assert (await elsewhere.ask("one")).status_code == 404


async def test_what_is_published_again_meanwhile_stays(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """A replica that comes back is not robbed of the new version's content, and the receipt says why."""
    gateway = await run_gateway(replica)
    acme = await gateway.tenant("acme")
    digest = (await acme.publish(good)).json()["current"]["digest"]
    await acme.ask()
    await replica.stop()
    pending = await erase(acme, status=202, force=True)
    assert (await acme.publish(good)).status_code == 201
    await replica.restart()
    receipt = await receipt_of(acme.client, pending["id"])
    assert [part["outcome"] for part in receipt["statement"]["replicas"]] == ["published_again"]
    assert replica.disk == {digest}


async def test_another_tenant_sees_and_erases_nothing(acme: Tenant, globex: Tenant, good: Path) -> None:
    """Its adapter, its version and its receipt are as if they were not there."""
    await acme.publish(good)
    for path in ("bot", "bot/versions/1"):
        theirs = await globex.client.delete(f"/v1/adapters/{path}", params={"force": True})
        assert (theirs.status_code, error_of(theirs)["code"]) == (404, "model_not_found")
    receipt = await erase(acme)
    assert (await globex.client.get("/v1/erasures")).json()["data"] == []
    refused = await globex.client.get(f"/v1/erasures/{receipt['id']}")
    assert (refused.status_code, error_of(refused)["code"]) == (404, "not_found")


@pytest.mark.parametrize("done", [State.REQUESTED, State.BLOBS_GONE])
async def test_a_crash_between_two_steps_is_taken_up(
    done: State, run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """A gateway that starts finds what another has left, whichever step that had come to."""
    first = await run_gateway(replica)
    acme = await first.tenant("acme")
    await acme.publish(good)
    await acme.ask()
    parts = first.parts
    left = Erasures(parts.engine, parts.store._blobs, parts.signer)  # without the gateway that would go on
    replicas = [member.replica.id for member in parts.pool.members()]
    erasure = await left.request(TenantId(tenant_id(first, acme)), "bot", replicas=replicas)
    if done is State.BLOBS_GONE:
        await left.drop_blobs(erasure)
    second = await run_gateway(replica)
    receipt = await receipt_of(second.client(acme.key), erasure.id)
    assert (replica.disk, replica.adapters, first.shelf.keys()) == (set(), {}, [])
    verify(receipt["signature"], await keys_of(acme), Kind.ERASURE)


@pytest.mark.timeout(120)
async def test_a_gateway_killed_at_any_moment_of_it_goes_on(
    base_folder: Path, run_replica: RunReplica, tmp_path: Path
) -> None:
    """kill -9 after 0 and 30 ms (`-m full`: 60 moments up to 60 ms).

    Acknowledged or not, after the restart all of it is gone or nothing; what was taken is completed.
    """
    await killed_at_any_moment(base_folder, run_replica, tmp_path, count=2)


@pytest.mark.full
async def test_a_gateway_killed_at_sixty_moments_goes_on(
    base_folder: Path, run_replica: RunReplica, tmp_path: Path
) -> None:
    """The same in full."""
    await killed_at_any_moment(base_folder, run_replica, tmp_path, count=60)


async def killed_at_any_moment(base_folder: Path, run_replica: RunReplica, tmp_path: Path, *, count: int) -> None:
    replica = await run_replica()
    good = write_good(tmp_path / "good", seed=1)
    process = GatewayProcess(
        free_port(), tmp_path / "home", gateway_settings(base_folder, replica), tmp_path / "gateway.log"
    )
    await process.start()
    await process_ready(process.url)
    key = await new_key(process.url, process.operator_key())
    for number in range(count):
        async with httpx.AsyncClient(
            base_url=process.url, headers={"authorization": f"Bearer {key}"}, timeout=10
        ) as client:
            tenant = Tenant("acme", key, client)
            assert (await tenant.publish(good)).status_code == 201
            assert (await tenant.ask()).status_code == 200
            erasing = asyncio.create_task(client.delete("/v1/adapters/bot"))
            await asyncio.sleep(0.06 * number / count)
            await process.kill()
            await asyncio.gather(erasing, return_exceptions=True)
            await process.start()
            await process_ready(process.url)
            erasures = (await client.get("/v1/erasures", params={"limit": 1_000})).json()["data"]
            if (await client.get("/v1/adapters/bot")).status_code == 200:
                erasures.append(await erase(tenant))
            for erasure in erasures:
                await receipt_of(client, erasure["id"])
            assert len(erasures) == number + 1
            assert (replica.disk, replica.adapters) == (set(), {})
            assert shelf_of(tmp_path / "home").keys() == []
    await process.stop()


async def test_versions_are_signed_when_they_are_published(acme: Tenant, good: Path, gateway: Gateway) -> None:
    """By the key that published them; the same bytes again are not another publisher's."""
    made = (await acme.publish(good)).json()
    (version,) = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    stated = verify(version["signature"], await keys_of(acme), Kind.VERSION)
    assert stated == {
        "type": "tailor.version/1",
        "tenant_id": tenant_id(gateway, acme),
        "adapter": "bot",
        "adapter_id": made["id"],
        "number": 1,
        "digest": made["current"]["digest"],
        "published_by": version["published_by"],
        "provenance": "upload",
        "created_at": made["current"]["created_at"],
    }
    spare = await gateway.operator.post("/admin/v1/tenants/acme/keys", json={})
    again = Tenant("acme", spare.json()["secret"], gateway.client(spare.json()["secret"]))
    await again.publish(good)
    (kept,) = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    assert kept == version
    assert version["published_by"].startswith("key_")


async def test_receipts_and_signatures_are_checked_from_the_command(
    acme: Tenant, gateway: Gateway, good: Path, tmp_path: Path
) -> None:
    """`tailor adapter verify`; `tailor erasure show`, then `verify` with a kept copy of the keys and no gateway."""
    await acme.publish(good)
    (stated,) = await run_command(gateway, "adapter", "verify", "bot@1", key=acme.key)
    assert (stated["adapter"], stated["number"]) == ("bot", 1)
    erasure = await run_command(gateway, "adapter", "delete", "bot@1", "--force", key=acme.key)
    assert [found["id"] for found in await run_command(gateway, "erasure", "list", key=acme.key)] == [erasure["id"]]
    assert await run_command(gateway, "erasure", "list", "--operator") == [erasure]
    receipt, keys = tmp_path / "receipt.json", tmp_path / "keys.json"
    shown = await run_command(gateway, "erasure", "show", erasure["id"], key=acme.key)
    receipt.write_text(json.dumps(shown))
    keys.write_text(json.dumps({"keys": await keys_of(acme)}))
    offline = {"TAILOR_URL": "http://127.0.0.1:9", "TAILOR_API_KEY": None, "TAILOR_OPERATOR_KEY": None}
    check = ["erasure", "verify", str(receipt), "--keys", str(keys)]
    done = CliRunner().invoke(command, check, env=offline)
    assert (done.exit_code, "bot@1" in done.stdout) == (0, True), done.output
    receipt.write_text(json.dumps(shown).replace(shown["statement"]["versions"][0]["digest"], "0" * 64))
    assert CliRunner().invoke(command, check, env=offline).exit_code == 1
