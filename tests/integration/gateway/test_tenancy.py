"""Plans, tenants and keys over HTTP and from the command, on one gateway and on two that share a database."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapter_store.catalog import Fallback, Version
from gateway.cli import app as command
from loadtests.fake.replica import FakeReplica

from .conftest import Gateway, RunGateway, Tenant, error_of

SOON_S = 5.0  # what is promised for revocation everywhere
CHAT = "/v1/chat/completions"


async def until(holds: Callable[[], Awaitable[bool]], deadline_s: float = SOON_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not await holds():
            await asyncio.sleep(0.02)


async def answers(client: httpx.AsyncClient, status: int) -> bool:
    return (await client.get("/v1/models")).status_code == status


async def make_key(client: httpx.AsyncClient, path: str = "/v1/keys", **body: Any) -> dict[str, Any]:
    made = await client.post(path, json=body)
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


async def admin_of(gateway: Gateway, tenant: str, *scopes: str, **more: Any) -> httpx.AsyncClient:
    """A tenant admin's client; the tenant exists."""
    body = {"scopes": ["admin", *scopes], **more}
    return gateway.client((await make_key(gateway.operator, f"/admin/v1/tenants/{tenant}/keys", **body))["secret"])


# plans


async def test_a_plan_lives_from_its_making_to_its_deletion(gateway: Gateway) -> None:
    """What is left out of a change stays, null takes a limit away, a plan in use is not deleted."""
    operator = gateway.operator
    made = await operator.post("/admin/v1/plans", json={"name": "gold", "weight": 2, "tokens_per_minute": 100})
    assert made.status_code == 201
    assert made.json().items() >= {"weight": 2.0, "tokens_per_minute": 100, "tokens_per_month": None}.items()
    assert error_of(await operator.post("/admin/v1/plans", json={"name": "gold"}))["code"] == "name_taken"
    changed = await operator.patch("/admin/v1/plans/gold", json={"tokens_per_minute": None, "loads_per_minute": 3})
    assert changed.json() == (await operator.get("/admin/v1/plans/gold")).json()
    assert changed.json().items() >= {"weight": 2.0, "tokens_per_minute": None, "loads_per_minute": 3}.items()
    assert [plan["name"] for plan in (await operator.get("/admin/v1/plans")).json()["data"]] == ["default", "gold"]
    await operator.post("/admin/v1/tenants", json={"name": "acme", "plan": "gold"})
    refused = await operator.delete("/admin/v1/plans/gold")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "plan_in_use")
    assert (await operator.patch("/admin/v1/tenants/acme", json={"plan": "default"})).json()["plan"] == "default"
    assert (await operator.delete("/admin/v1/plans/gold")).status_code == 204
    assert (await operator.get("/admin/v1/plans/gold")).status_code == 404
    assert (await operator.delete("/admin/v1/plans/default")).status_code == 409


FAULTY_PLANS: list[dict[str, Any]] = [
    {"name": "Gold!"}, {"name": "x", "weight": 0}, {"name": "x", "weight": 1e9}, {"name": "x", "weight": None},
    {"name": "x", "requests_per_minute": 0}, {"name": "x", "tokens_per_month": 10**16}, {"name": "x", "colour": 1},
]  # fmt: skip


async def test_a_faulty_plan_is_refused(gateway: Gateway, subtests: pytest.Subtests) -> None:
    """By the name of the field; nothing is made or changed."""
    for body in FAULTY_PLANS:
        with subtests.test(body=body):
            refused = await gateway.operator.post("/admin/v1/plans", json=body)
            assert refused.status_code == 400
            if "weight" in body:
                changed = await gateway.operator.patch("/admin/v1/plans/default", json={"weight": body["weight"]})
                assert changed.status_code == 400
    assert [plan["name"] for plan in (await gateway.operator.get("/admin/v1/plans")).json()["data"]] == ["default"]


async def test_a_change_of_plan_reaches_known_keys_within_a_second(
    run_gateway: RunGateway, replica: FakeReplica
) -> None:
    """At once here, by the change feed on the other gateway."""
    here, there = await run_gateway(replica), await run_gateway(replica)
    acme = await here.tenant("acme")
    header = f"Bearer {acme.key}".encode()
    for gateway in (here, there):
        assert (await gateway.parts.auth.live_key(header)).plan.tokens_per_minute is None
    changed = await here.operator.patch("/admin/v1/plans/default", json={"tokens_per_minute": 5})
    assert changed.status_code == 200
    assert (await here.parts.auth.live_key(header)).plan.tokens_per_minute == 5

    async def arrived() -> bool:
        return (await there.parts.auth.live_key(header)).plan.tokens_per_minute == 5

    begin = time.monotonic()
    await until(arrived)
    print(f"a plan reached the other gateway after {time.monotonic() - begin:.2f} s")  # noqa: T201  time is no gate here


# tenants


async def test_tenants_come_page_by_page(gateway: Gateway) -> None:
    """By name, each once, and one is found by name or id."""
    for name in ("c", "a", "b"):
        await gateway.operator.post("/admin/v1/tenants", json={"name": name})
    first = (await gateway.operator.get("/admin/v1/tenants", params={"limit": 2})).json()
    assert ([tenant["name"] for tenant in first["data"]], first["has_more"]) == (["a", "b"], True)
    rest = (await gateway.operator.get("/admin/v1/tenants", params={"limit": 2, "after": "b"})).json()
    assert ([tenant["name"] for tenant in rest["data"]], rest["has_more"]) == (["c"], False)
    (found,) = rest["data"]
    assert (await gateway.operator.get(f"/admin/v1/tenants/{found['id']}")).json() == found
    assert (await gateway.operator.get("/admin/v1/tenants/nobody")).status_code == 404
    assert (await gateway.operator.post("/admin/v1/tenants", json={"name": "d", "plan": "none"})).status_code == 404


async def test_a_suspended_tenant_is_refused_everywhere(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """At once where it was done, within seconds elsewhere; resumed, its keys are good again. Others notice nothing."""
    here, there = await run_gateway(replica), await run_gateway(replica)
    acme, globex = await here.tenant("acme"), await here.tenant("globex")
    elsewhere = there.client(acme.key)
    assert await answers(elsewhere, 200)
    suspended = await here.operator.patch("/admin/v1/tenants/acme", json={"suspended": True})
    assert suspended.json()["suspended_at"] is not None
    assert (await acme.ask("base")).status_code == 401
    assert await answers(acme.client, 401)
    await until(lambda: answers(elsewhere, 401))
    assert (await elsewhere.post(CHAT, json={})).status_code == 401
    assert (await globex.ask("base")).status_code == 200
    resumed = await here.operator.patch("/admin/v1/tenants/acme", json={"suspended": False})
    assert resumed.json()["suspended_at"] is None
    assert (await acme.ask("base")).status_code == 200
    await until(lambda: answers(elsewhere, 200))


# keys


async def test_a_key_never_grants_more_than_its_maker_has(gateway: Gateway, acme: Tenant) -> None:
    """No scope that the maker lacks, no day after its end, never `operator`; what is left out is the maker's."""
    end = int(time.time()) + 1_000
    admin = await admin_of(gateway, "acme", "inference", expires_at=end)
    for scopes in (["adapters"], ["inference", "training"]):
        refused = await admin.post("/v1/keys", json={"scopes": scopes})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "grant_too_wide")
    assert (await admin.post("/v1/keys", json={"scopes": ["operator"]})).status_code == 400
    assert (await admin.post("/v1/keys", json={"expires_at": end + 1})).status_code == 403
    assert (await admin.post("/v1/keys", json={"expires_at": 1})).status_code == 400
    made = await make_key(admin, label="shop")
    assert (made["scopes"], made["expires_at"], made["label"]) == (["inference"], end, "shop")
    assert await answers(gateway.client(made["secret"]), 200)
    listed = (await admin.get("/v1/keys")).json()["data"]
    (mine,) = [key for key in listed if key["id"] == made["id"]]
    assert "secret" not in mine
    assert mine["created_by"] in {key["id"] for key in listed}


async def test_keys_are_administered_with_the_scope_for_it_only(gateway: Gateway, acme: Tenant) -> None:
    """Neither a tenant's ordinary key nor an operator's stands for a tenant's admin, and no admin for an operator."""
    admin = await admin_of(gateway, "acme")
    for client in (acme.client, gateway.operator):
        assert (await client.get("/v1/keys")).status_code == 403
        assert (await client.post("/v1/keys", json={})).status_code == 403
    for path in ("/admin/v1/keys", "/admin/v1/plans", "/admin/v1/tenants", "/admin/v1/tenants/acme/keys"):
        assert (await admin.get(path)).status_code == 403
    assert (await admin.post(CHAT, json={})).status_code == 403


async def test_another_tenants_key_looks_like_one_that_never_existed(
    gateway: Gateway, acme: Tenant, globex: Tenant
) -> None:
    """For every verb, word by word; and it goes on working."""
    admin = await admin_of(gateway, "acme")
    (foreign,) = (await gateway.operator.get("/admin/v1/tenants/globex/keys")).json()["data"]
    (operators, *_) = (await gateway.operator.get("/admin/v1/keys")).json()["data"]
    missing = "key_" + "0" * 24

    async def told(key_id: str) -> list[tuple[int, str]]:
        found = [
            await admin.delete(f"/v1/keys/{key_id}"),
            await admin.post(f"/v1/keys/{key_id}/rotate", json={}),
            await admin.get("/v1/keys", params={"after": key_id}),
        ]
        return [(answer.status_code, answer.text.replace(key_id, "?")) for answer in found]

    expected = await told(missing)
    assert [status for status, _ in expected] == [404, 404, 404]
    assert await told(foreign["id"]) == expected
    assert await told(operators["id"]) == expected
    assert (await globex.ask("base")).status_code == 200


async def test_rotation_overlaps(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Old and new both work for the overlap; then the old one is refused on every gateway."""
    here, there = await run_gateway(replica), await run_gateway(replica)
    acme = await here.tenant("acme")
    admin = await admin_of(here, "acme", "inference", "adapters", "training")

    async def first_key() -> dict[str, Any]:
        listed: list[dict[str, Any]] = (await admin.get("/v1/keys")).json()["data"]
        return next(key for key in listed if key["prefix"] == acme.key[: len(key["prefix"])])

    old = await first_key()
    elsewhere = there.client(acme.key)
    assert await answers(elsewhere, 200)
    made = await make_key(admin, f"/v1/keys/{old['id']}/rotate", overlap_s=3_600)
    assert (made["replaces"], made["scopes"], made["expires_at"]) == (old["id"], old["scopes"], None)
    assert await answers(here.client(made["secret"]), 200)
    assert await answers(acme.client, 200)
    old = await first_key()
    assert abs(old["expires_at"] - time.time() - 3_600) < 60
    again = await make_key(here.operator, f"/admin/v1/keys/{old['id']}/rotate", overlap_s=0)
    assert await answers(acme.client, 401)
    await until(lambda: answers(elsewhere, 401))
    assert await answers(there.client(again["secret"]), 200)
    over = await admin.post(f"/v1/keys/{old['id']}/rotate", json={})
    assert (over.status_code, error_of(over)["code"]) == (409, "key_is_over")


async def test_a_revoked_key_stops_on_the_other_gateway(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Within 5 s, in its tenant admin's hands too; keys made by it go on."""
    here, there = await run_gateway(replica), await run_gateway(replica)
    await here.tenant("acme")
    admin = await admin_of(here, "acme", "inference")
    child = await make_key(admin)
    elsewhere = there.client(child["secret"])
    assert await answers(elsewhere, 200)
    assert (await admin.delete(f"/v1/keys/{child['id']}")).status_code == 204
    assert (await admin.delete(f"/v1/keys/{child['id']}")).status_code == 204
    assert await answers(here.client(child["secret"]), 401)
    await until(lambda: answers(elsewhere, 401))


async def test_the_last_operator_key_is_not_revoked(gateway: Gateway) -> None:
    """Nobody could administer anything any more; with a second one it can go."""
    (first,) = (await gateway.operator.get("/admin/v1/keys")).json()["data"]
    refused = await gateway.operator.delete(f"/admin/v1/keys/{first['id']}")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "last_operator_key")
    second = await make_key(gateway.operator, "/admin/v1/keys", label="second")
    assert (second["scopes"], second["tenant_id"], second["created_by"]) == (["operator"], None, first["id"])
    assert (await gateway.operator.delete(f"/admin/v1/keys/{first['id']}")).status_code == 204
    assert (await gateway.operator.get("/admin/v1/keys")).status_code == 401
    other = gateway.client(second["secret"])
    assert len((await other.get("/admin/v1/keys")).json()["data"]) == 2
    assert (await other.delete(f"/admin/v1/keys/{second['id']}")).status_code == 409


async def test_keys_come_page_by_page(gateway: Gateway, acme: Tenant) -> None:
    """The oldest first, each once."""
    admin = await admin_of(gateway, "acme", "inference")
    for _ in range(3):
        await make_key(admin)
    whole = [key["id"] for key in (await admin.get("/v1/keys")).json()["data"]]
    assert len(whole) == 5
    found: list[str] = []
    more = True
    while more:
        page = (await admin.get("/v1/keys", params={"limit": 2, **({"after": found[-1]} if found else {})})).json()
        found += [key["id"] for key in page["data"]]
        more = page["has_more"]
    assert found == whole


async def test_the_last_use_of_a_key_appears(gateway: Gateway, acme: Tenant) -> None:
    """After a flush, for the keys that were used, whatever they were used for."""
    unused = await make_key(gateway.operator, "/admin/v1/tenants/acme/keys")
    await acme.ask("base")
    await gateway.parts.auth.uses.flush()
    listed = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    used = {key["id"]: key["last_used_at"] for key in listed}
    assert used.pop(unused["id"]) is None
    (at,) = used.values()
    assert abs(at - time.time()) < 60


# the database away


@pytest.mark.local
async def test_cached_keys_serve_while_the_database_is_away(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """For the bound on staleness; then everything is a 503 with Retry-After, until it is back."""
    gateway = await run_gateway(replica, max_staleness_s=2)
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    assert (await acme.ask()).status_code == 200
    file, kept = gateway.home.path / "tailor.db", gateway.home.path / "kept.db"

    async def statuses() -> tuple[int, int]:
        return (await acme.ask()).status_code, (await gateway.operator.get("/admin/v1/tenants")).status_code

    await gateway.parts.engine.dispose()
    await gateway.parts.changes.close()
    file.rename(kept)
    file.mkdir()
    assert await statuses() == (200, 503)

    async def refused() -> bool:
        await gateway.parts.changes.close()  # a read in the moment of the renaming would have kept the file
        answer = await acme.ask()
        return answer.status_code == 503 and answer.headers["retry-after"] != ""

    await until(refused, deadline_s=20)
    file.rmdir()
    kept.rename(file)

    async def served() -> bool:
        return await statuses() == (200, 200)

    await until(served)


# fallbacks


async def test_an_adapter_declares_its_fallback(
    gateway: Gateway, acme: Tenant, globex: Tenant, good: Path, other_good: Path
) -> None:
    """The alias carries it, a version asked for by number does not; a new version keeps it; others cannot set it."""
    first = (await acme.publish(good)).json()
    assert first["fallback"] == "fail"
    assert (await acme.client.patch("/v1/adapters/bot", json={"fallback": "previous"})).json()["fallback"] == "previous"
    assert (await acme.client.patch("/v1/adapters/bot", json={"fallback": "other"})).status_code == 400
    missing = await globex.client.patch("/v1/adapters/none", json={"fallback": "base"})
    foreign = await globex.client.patch("/v1/adapters/bot", json={"fallback": "base"})
    assert missing.status_code == 404
    assert foreign.text == missing.text.replace("none", "bot")
    second = (await acme.publish(other_good)).json()
    assert second["fallback"] == "previous"
    assert (await acme.client.get("/v1/adapters")).json()["data"][0]["fallback"] == "previous"
    models, tenant_id = gateway.parts.models, (await gateway.parts.tenants.named("acme")).id
    assert models.known(tenant_id, "bot") is None
    await gateway.parts.changes.catch_up()  # else what the uploads have changed would be taken in, and forgotten, later
    current = await models.resolve(tenant_id, "bot")
    assert isinstance(current, Version)
    assert models.known(tenant_id, "bot") is current
    assert (current.number, current.fallback) == (2, Fallback.PREVIOUS)
    before = await models.previous(current)
    assert before is not None
    assert (before.number, before.fallback, before.digest) == (1, Fallback.FAIL, first["current"]["digest"])
    assert await models.previous(before) is None
    await gateway.parts.engine.dispose()
    assert await models.previous(current) is before
    for spelled in ("bot@<2", "bot@\\udc002"):  # what is kept for fallbacks answers to no name
        body = b'{"model": "%b", "messages": [{"role": "user", "content": "x"}]}' % spelled.encode()
        assert (await acme.client.post(CHAT, content=body)).status_code in (400, 404)
    await acme.client.patch("/v1/adapters/bot", json={"fallback": "base"})
    assert models.known(tenant_id, "bot") is None


# the command


async def run_command(gateway: Gateway, *arguments: str, key: str | None = None) -> Any:
    """What the command prints with --json."""
    environment = {
        "TAILOR_URL": gateway.url,
        "TAILOR_HOME": str(gateway.home.path),
        "TAILOR_OPERATOR_KEY": gateway.home.operator_key() or "",
        "TAILOR_API_KEY": key,
    }
    done = await asyncio.to_thread(CliRunner().invoke, command, [*arguments, "--json"], env=environment)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def test_everything_can_be_administered_from_the_command(gateway: Gateway) -> None:
    """By operators, and by a tenant's own admin with --self."""
    made = await run_command(gateway, "plan", "create", "gold", "--weight", "2", "--tokens-per-minute", "9")
    assert (made["weight"], made["tokens_per_minute"]) == (2.0, 9)
    changed = await run_command(gateway, "plan", "update", "gold", "--tokens-per-minute", "none")
    assert (changed["weight"], changed["tokens_per_minute"]) == (2.0, None)
    assert changed == await run_command(gateway, "plan", "show", "gold")
    assert (await run_command(gateway, "tenant", "create", "shop", "--plan", "gold"))["plan"] == "gold"
    assert (await run_command(gateway, "tenant", "update", "shop", "--plan", "default"))["plan"] == "default"
    await run_command(gateway, "plan", "delete", "gold")
    assert [plan["name"] for plan in await run_command(gateway, "plan", "list")] == ["default"]
    assert (await run_command(gateway, "tenant", "suspend", "shop"))["suspended_at"] is not None
    assert (await run_command(gateway, "tenant", "resume", "shop"))["suspended_at"] is None
    assert [tenant["name"] for tenant in await run_command(gateway, "tenant", "list")] == ["shop"]
    admin = await run_command(gateway, "key", "create", "shop", "--scope", "admin", "--scope", "inference")
    secret = admin["secret"]
    child = await run_command(gateway, "key", "create", "--self", "--days", "1", key=secret)
    assert abs(child["expires_at"] - time.time() - 86_400) < 60
    rotated = await run_command(gateway, "key", "rotate", child["id"], "--self", "--overlap-s", "0", key=secret)
    assert rotated["replaces"] == child["id"]
    await run_command(gateway, "key", "revoke", rotated["id"], "--self", key=secret)
    listed = await run_command(gateway, "key", "list", "--self", key=secret)
    assert listed == await run_command(gateway, "key", "list", "shop")
    assert {key["id"] for key in listed if key["revoked_at"]} == {rotated["id"]}
    operator = await run_command(gateway, "key", "create", "--operator", "--label", "night")
    assert [key["label"] for key in await run_command(gateway, "key", "list", "--operator")][1:] == ["night"]
    await run_command(gateway, "key", "revoke", operator["id"])


async def test_a_fallback_is_declared_from_the_command(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """By the tenant."""
    await acme.publish(good)
    changed = await run_command(gateway, "adapter", "fallback", "bot", "base", key=acme.key)
    assert changed["fallback"] == "base"
