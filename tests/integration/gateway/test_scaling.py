"""Scaled versions as tenants make, name and lose them: through the API, on a fake replica."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from adapter_store.aliases import main_of
from gateway.cli import app as command
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, Tenant, error_of


async def scale(tenant: Tenant, number: int, factor: Any, **more: Any) -> httpx.Response:
    path = f"/v1/adapters/bot/versions/{number}/scaled"
    return await tenant.client.post(path, json={"factor": factor, **more})


async def answering(tenant: Tenant, model: str) -> int:
    """The version that the receipt names."""
    answer = await tenant.ask(model)
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-tailor-version"].partition(";")[0])


async def test_a_scaled_version_answers_to_its_spelling(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """It has the same weights, one blob for both, and each alpha times the factor; the name stays where it is."""
    await acme.publish(good)
    made = await scale(acme, 1, 0.7)
    assert made.status_code == 201, made.text
    told = made.json()
    assert (told["number"], told["provenance"]) == (2, "scaled")
    assert told["scaled_from"] == {"version": 1, "factor": 0.7}
    assert [await answering(acme, model) for model in ("bot", "bot@1*0.7", "bot@1*0.7000", "bot@2")] == [1, 2, 2, 2]
    parts = gateway.parts
    tenant = (await parts.tenants.named("acme")).id
    one, two = [main_of(await parts.store.resolve(tenant, f"bot@{number}")) for number in (1, 2)]
    assert one.files[1].key == two.files[1].key
    before, after = [json.loads(gateway.shelf.read(version.files[0].key)) for version in (one, two)]
    assert after.pop("lora_alpha") == pytest.approx(before.pop("lora_alpha") * 0.7, rel=1e-15)
    assert after == before
    shown = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    assert [version["scaled_from"] for version in shown] == [{"version": 1, "factor": 0.7}, None]


async def test_the_same_factor_again_is_the_same_version(acme: Tenant, good: Path) -> None:
    """However it is spelled; and by 1 it is the version itself."""
    await acme.publish(good)
    numbers = [(await scale(acme, 1, factor)).json()["number"] for factor in (0.5, "0.50", "0.5", 2)]
    assert numbers == [2, 2, 2, 3]
    whole = await scale(acme, 1, 1)
    assert (whole.json()["number"], whole.json()["scaled_from"]) == (1, None)
    assert await answering(acme, "bot@1*1") == 1
    twice = await scale(acme, 2, 2)
    assert (twice.json()["number"], await answering(acme, "bot@2*2")) == (1, 1)


async def test_aliases_stand_for_scaled_versions(acme: Tenant, good: Path) -> None:
    """By their spelling, or at once where they are made."""
    await acme.publish(good)
    await scale(acme, 1, 0.7)
    moved = await acme.client.put("/v1/adapters/bot/aliases/mild", json={"version": "1*0.7"})
    assert moved.json()["versions"] == [{"version": 2, "weight": 1}]
    assert await answering(acme, "bot:mild") == 2
    await scale(acme, 1, 0.3, alias="default")
    assert await answering(acme, "bot") == 3
    mixed = {"versions": [{"version": 1, "weight": 9}, {"version": "1*0.3"}]}
    moved = await acme.client.put("/v1/adapters/bot/aliases/mild", json=mixed)
    assert moved.json()["versions"] == [{"version": 1, "weight": 9}, {"version": 3, "weight": 1}]


async def test_what_was_not_made_is_missing_and_told_how_to_make(acme: Tenant, globex: Tenant, good: Path) -> None:
    """A foreign one and one that was not made are told in the same words; a malformed one is no model."""
    await acme.publish(good)
    await scale(acme, 1, 0.7)
    mine = await acme.ask("bot@1*0.4")
    assert (mine.status_code, error_of(mine)["code"]) == (404, "model_not_found")
    assert "tailor adapter scale bot@1 0.4" in error_of(mine)["message"]
    theirs, missing = await globex.ask("bot@1*0.7"), await globex.ask("bot@1*0.8")
    assert theirs.status_code == missing.status_code == 404
    assert theirs.text.replace("0.7", "0.8") == missing.text
    unmade = await acme.client.put("/v1/adapters/bot/aliases/mild", json={"version": "1*0.4"})
    assert (unmade.status_code, "tailor adapter scale" in unmade.text) == (404, True)
    for malformed in ("@1*", "@1*0", "@1*2.1", "@1*.7", "@1*0.70000", "@1*-1", "@1*1e0", "*0.7", ":mild*0.7"):
        answer = await acme.ask(f"bot{malformed}")
        assert (answer.status_code, "scale" in answer.text) == (404, False), malformed
    for malformed in ("1*3", "1*0", "x"):
        answer = await acme.client.put("/v1/adapters/bot/aliases/mild", json={"version": malformed})
        assert answer.status_code in {400, 404}, malformed


@pytest.mark.parametrize("factor", [0, -1, 2.0001, 0.00001, "0,7", "", "nan", True, None, [1], 1e300, "٣"])
async def test_a_factor_out_of_bounds_is_refused(acme: Tenant, good: Path, factor: Any) -> None:
    """Nothing is made of it."""
    await acme.publish(good)
    answer = await scale(acme, 1, factor)
    assert answer.status_code == 400, answer.text
    assert len((await acme.client.get("/v1/adapters/bot")).json()["versions"]) == 1


async def test_it_goes_through_the_door_of_all_versions(
    gateway: Gateway, acme: Tenant, globex: Tenant, tmp_path: Path
) -> None:
    """Quota and inspection hold, a foreign version is missing, an `Idempotency-Key` repeats its answer."""
    await acme.publish(write_good(tmp_path / "v1"))
    assert (await scale(globex, 1, 0.5)).status_code == 404
    once: dict[str, Any] = {"headers": {"idempotency-key": "k1"}, "json": {"factor": 0.5}}
    path = "/v1/adapters/bot/versions/1/scaled"
    first, again = await acme.client.post(path, **once), await acme.client.post(path, **once)
    assert (first.status_code, first.content) == (again.status_code, again.content) == (201, first.content)
    other = await acme.client.post(path, headers=once["headers"], json={"factor": 0.6})
    assert other.status_code == 409
    plan = await gateway.operator.post("/admin/v1/plans", json={"name": "two", "max_versions": 2})
    assert plan.status_code == 201, plan.text
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "two"})
    full = await scale(acme, 1, 0.9)
    assert (full.status_code, error_of(full)["param"]) == (403, "max_versions")


async def test_each_is_erased_by_its_own_number(acme: Tenant, good: Path) -> None:
    """What was made of an erased version stays, and may not be made of it any more; an erased one is missing again."""
    await acme.publish(good)
    await scale(acme, 1, 0.7, alias="default")
    await scale(acme, 1, 0.2)
    assert (await acme.client.delete("/v1/adapters/bot/versions/1")).status_code == 200
    assert await answering(acme, "bot@1*0.7") == 2
    assert (await scale(acme, 1, 0.5)).status_code == 404
    assert (await acme.client.delete("/v1/adapters/bot/versions/3")).status_code == 200
    assert (await acme.ask("bot@1*0.2")).status_code == 404
    assert (await acme.client.delete("/v1/adapters/bot", params={"force": True})).status_code == 200


async def test_the_command(gateway: Gateway, acme: Tenant, good: Path) -> None:
    """`tailor adapter scale`: what it made is told, an alias goes along, and what is no version is told before."""
    await acme.publish(good)

    async def tailor(*words: str) -> Result:
        arguments = ["adapter", "scale", *words, "--url", gateway.url, "--key", acme.key]
        return await asyncio.to_thread(CliRunner().invoke, command, arguments)

    made = await tailor("bot@1", "0.7")
    assert (made.exit_code, made.stdout) == (0, "bot@1*0.7 is bot@2\n")
    assert await answering(acme, "bot") == 1
    moved = await tailor("bot@1", "0.3", "--alias", "default", "--json")
    assert json.loads(moved.stdout)["scaled_from"] == {"version": 1, "factor": 0.3}
    assert await answering(acme, "bot") == 3
    for words, said in ((("bot", "0.7"), "is not a version"), (("bot@1", "3"), "factor"), (("bot@9", "0.7"), "bot@9")):
        refused = await tailor(*words)
        assert refused.exit_code == 1
        assert said in refused.stderr
