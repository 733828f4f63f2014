"""Aliases and rollouts as tenants use them: through the API, under requests, on a fake replica."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant, error_of
from tests.integration.gateway.test_proofs import badge
from tests.waiting import cancel, until

CHAT = "/v1/chat/completions"
QUICK = {"steps": [20, 100], "step_s": 1, "min_requests": 12, "needs_proof": False}


async def publish(tenant: Tenant, folder: Path, count: int = 2, *, first: int = 1) -> list[str]:
    """Versions `first` to `count` of `bot`; their digests."""
    digests = []
    for seed in range(first, count + 1):
        made = await tenant.publish(write_good(folder / f"v{seed}", seed=seed))
        assert made.status_code == 201, made.text
        digests.append(made.json()["current"]["digest"])
    return digests


async def move(tenant: Tenant, alias: str = "default", **body: Any) -> httpx.Response:
    return await tenant.client.put(f"/v1/adapters/bot/aliases/{alias}", json=body)


def version_of(answer: httpx.Response) -> int:
    """The version that the receipt names."""
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-tailor-version"].partition(";")[0])


async def test_an_alias_answers_from_the_move_on(gateway: Gateway, acme: Tenant, tmp_path: Path) -> None:
    """At both of its gateways' caches: here at once; the receipt says which version it was."""
    await publish(acme, tmp_path, 3)
    assert version_of(await acme.ask("bot")) == 3
    missing = await acme.ask("bot:staging")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    made = await move(acme, "staging", version=1, reason="try it")
    assert made.status_code == 200, made.text
    assert made.json() == {
        "object": "alias",
        "name": "staging",
        "model": "bot:staging",
        "versions": [{"version": 1, "weight": 1}],
        "fallback": "fail",
        "rollout": None,
        "moved_at": made.json()["moved_at"],
    }
    assert version_of(await acme.ask("bot:staging")) == 1
    await move(acme, "staging", version=2)
    assert version_of(await acme.ask("bot:staging")) == 2
    assert version_of(await acme.ask("bot@1")) == 1
    fine_tuned = (await acme.client.get("/v1/adapters/bot")).json()["versions"][0]["fine_tuned_model"]
    assert version_of(await acme.ask(fine_tuned)) == 3
    back = await acme.client.post("/v1/adapters/bot/aliases/staging/rollback")
    assert back.json()["versions"] == [{"version": 1, "weight": 1}]
    assert version_of(await acme.ask("bot:staging")) == 1
    moves = (await acme.client.get("/v1/adapters/bot/history", params={"alias": "staging"})).json()
    assert [(found["kind"], found["reason"]) for found in moves["data"]][-1] == ("move", "try it")
    key_ids = {found["id"] for found in (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]}
    assert {found["moved_by"] for found in moves["data"]} <= key_ids
    assert (await acme.client.delete("/v1/adapters/bot/aliases/staging")).status_code == 204
    assert (await acme.ask("bot:staging")).status_code == 404
    assert [found["name"] for found in (await acme.client.get("/v1/adapters/bot/aliases")).json()["data"]] == [
        "default"
    ]


async def test_a_move_reaches_every_gateway_within_a_second(
    run_gateway: RunGateway, replica: FakeReplica, tmp_path: Path
) -> None:
    """The other one reads the change feed."""
    one, two = await run_gateway(replica), await run_gateway(replica)
    acme = await one.tenant("acme")
    await publish(acme, tmp_path)
    there = Tenant("acme", acme.key, two.client(acme.key))
    assert version_of(await there.ask("bot")) == 2
    await move(acme, version=1)
    async with asyncio.timeout(5):  # promised: one second; the machine may be busy
        while version_of(await there.ask("bot")) != 1:
            await asyncio.sleep(0.05)


async def test_a_user_keeps_the_version_that_it_was_given(acme: Tenant, tmp_path: Path) -> None:
    """By `user`, and where there is none by how the conversation began; in every dialect."""
    await publish(acme, tmp_path)
    await move(acme, versions=[{"version": 1, "weight": 1}, {"version": 2, "weight": 1}])
    by_user = {user: version_of(await acme.ask(user=user)) for user in map(str, range(24))}
    assert set(by_user.values()) == {1, 2}
    for user, version in by_user.items():
        body = {"model": "bot", "messages": [{"role": "user", "content": f"again {user}"}]}
        assert version_of(await acme.client.post(CHAT, json={**body, "user": user})) == version
        metadata = {**body, "max_tokens": 4, "metadata": {"user_id": user}}
        assert version_of(await acme.client.post("/v1/messages", json=metadata)) == version
        response = {"model": "bot", "input": user, "user": user}
        assert version_of(await acme.client.post("/v1/responses", json=response)) == version
    for question in range(12):
        turns: list[dict[str, str]] = [{"role": "system", "content": "s"}, {"role": "user", "content": f"q{question}"}]
        given = set()
        for turn in range(3):
            for path, prompt in ((CHAT, "messages"), ("/v1/responses", "input")):
                spoken = {"model": "bot", prompt: turns}
                given.add((path, version_of(await acme.client.post(path, json=spoken))))
            turns = [*turns, {"role": "assistant", "content": "a"}, {"role": "user", "content": f"more {turn}"}]
        assert len(given) == 2, given
    same = {version_of(await acme.ask(user="one")) for _ in range(8)}
    assert len(same) == 1


async def test_what_is_wrong_with_a_move_is_told(acme: Tenant, tmp_path: Path) -> None:
    """Field by field; nothing moves."""
    await publish(acme, tmp_path)
    for alias, body, status, code in (
        ("default", {}, 400, "invalid_value"),
        ("default", {"version": 1, "versions": [{"version": 2}]}, 400, "invalid_value"),
        ("default", {"version": 0}, 400, "invalid_value"),
        ("default", {"version": True, "more": 1}, 400, "invalid_value"),
        ("default", {"versions": [{"version": 1}, {"version": 1}]}, 400, "alias_invalid"),
        ("default", {"version": 7}, 404, "model_not_found"),
        ("Loud", {"version": 1}, 400, "alias_invalid"),
        ("default", {"version": 1, "reason": "x" * 501}, 400, "invalid_value"),
    ):
        refused = await move(acme, alias, **body)
        assert (refused.status_code, error_of(refused)["code"]) == (status, code), (body, refused.text)
    assert (await acme.client.delete("/v1/adapters/bot/aliases/default")).status_code == 409
    assert (await acme.client.get("/v1/adapters/bot/history")).json()["data"][0]["kind"] == "publish"


async def test_a_version_is_published_without_moving_the_name(acme: Tenant, tmp_path: Path) -> None:
    """For a rollout, or to another alias; an adapter's first version has its name in any case."""

    async def send(folder: Path, seed: int, alias: str, name: str = "bot") -> httpx.Response:
        written = write_good(folder, seed=seed)
        files = {file.name: (file.name, file.read_bytes()) for file in written.iterdir()}
        return await acme.client.post(f"/v1/adapters/{name}/versions", params={"alias": alias}, files=files)

    assert (await send(tmp_path / "1", 1, "")).status_code == 201
    assert version_of(await acme.ask("bot")) == 1
    assert (await send(tmp_path / "2", 2, "")).json()["number"] == 2
    assert version_of(await acme.ask("bot")) == 1
    assert (await send(tmp_path / "3", 3, "staging")).json()["number"] == 3
    assert version_of(await acme.ask("bot")) == 1
    assert version_of(await acme.ask("bot:staging")) == 3
    refused = await send(tmp_path / "4", 4, "Loud")
    assert (refused.status_code, error_of(refused)["code"]) == (400, "alias_invalid")
    listed = (await acme.client.get("/v1/adapters/bot/aliases")).json()["data"]
    assert [(alias["name"], alias["versions"][0]["version"]) for alias in listed] == [("default", 1), ("staging", 3)]


class Traffic:
    """Requests of many users, one after the other, until told to stop."""

    def __init__(self, tenant: Tenant, *, stream: bool = False) -> None:
        self.versions: Counter[int] = Counter()
        self.failed = 0
        self._tenant = tenant
        self._stream = stream

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            answer = await self._tenant.ask("bot", user=f"user-{number}", stream=self._stream)
            if answer.status_code == 200:
                self.versions[version_of(answer)] += 1
            else:
                self.failed += 1


async def until_over(tenant: Tenant, rollout: str, seconds: float = 30) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while True:
            found: dict[str, Any] = (await tenant.client.get(f"/v1/adapters/bot/rollouts/{rollout}")).json()
            if found["status"] != "running":
                return found
            await asyncio.sleep(0.1)


async def start(tenant: Tenant, **more: Any) -> str:
    begun = await tenant.client.post("/v1/adapters/bot/rollouts", json={"version": 2, **QUICK, **more})
    assert begun.status_code == 201, begun.text
    assert begun.json()["percent"] == 20
    return str(begun.json()["id"])


async def test_a_good_canary_completes_and_a_failing_one_goes_back(
    run_gateway: RunGateway, run_replica: RunReplica, tmp_path: Path
) -> None:
    """By itself, with the requests of two gateways; the reason is in the history."""
    replica = await run_replica(blobs=None)
    one, two = await run_gateway(replica), await run_gateway(replica)
    acme = await one.tenant("acme")
    digests = await publish(acme, tmp_path)
    await move(acme, version=1)
    there = Tenant("acme", acme.key, two.client(acme.key))
    replica.faults.failing_digests = {digests[1]}
    traffic = Traffic(acme), Traffic(there)
    runs = [asyncio.create_task(each.run()) for each in traffic]
    ended = await until_over(acme, await start(acme))
    assert ended["status"] == "rolled_back", ended
    assert "requests failed" in ended["reason"]
    alias = (await acme.client.get("/v1/adapters/bot/aliases/default")).json()
    assert (alias["versions"], alias["rollout"]) == ([{"version": 1, "weight": 1}], None)
    last = (await acme.client.get("/v1/adapters/bot/history")).json()["data"][0]
    assert (last["kind"], last["moved_by"]) == ("rollback", None)
    failed = sum(each.failed for each in traffic)
    assert 3 <= failed < sum(each.versions[1] for each in traffic)
    replica.faults.failing_digests = set()
    ended = await until_over(acme, await start(acme))
    assert ended["status"] == "completed", ended
    assert [found["version"] for found in ended["seen"]] == [2, 1]
    assert ended["seen"][0]["requests"] >= 24
    await cancel(*runs)
    assert version_of(await acme.ask()) == 2
    page = (await acme.client.get("/v1/adapters/bot/rollouts")).json()["data"]
    assert [found["status"] for found in page] == ["completed", "rolled_back"]


async def test_a_slow_canary_goes_back(run_gateway: RunGateway, run_replica: RunReplica, tmp_path: Path) -> None:
    """Told by the time to the first token, beside the version before."""
    replica = await run_replica(blobs=None)
    acme = await (await run_gateway(replica)).tenant("acme")
    digests = await publish(acme, tmp_path)
    await move(acme, version=1)
    replica.faults.slow_digests = {digests[1]: 0.2}
    rollout = await start(acme, steps=[20, 50, 100], min_requests=100_000)
    runs = [asyncio.create_task(Traffic(acme, stream=True).run()) for _ in range(16)]
    ended = await until_over(acme, rollout, 60)
    await cancel(*runs)
    assert ended["status"] == "rolled_back", ended
    assert "nine of ten answers" in ended["reason"]


async def test_a_canary_that_no_engine_will_load_goes_back(
    run_gateway: RunGateway, run_replica: RunReplica, tmp_path: Path
) -> None:
    """Also where a fallback answers in its place."""
    replica = await run_replica(blobs=None)
    acme = await (await run_gateway(replica)).tenant("acme")
    await publish(acme, tmp_path)
    await move(acme, version=1, fallback="previous")
    assert version_of(await acme.ask()) == 1
    replica.faults.load_status = 422
    rollout = await start(acme)
    traffic = Traffic(acme)
    run = asyncio.create_task(traffic.run())
    ended = await until_over(acme, rollout)
    await cancel(run)
    assert ended["status"] == "rolled_back", ended
    assert traffic.failed == 0 < traffic.versions[1]


async def test_a_canary_that_finds_good_answers_unlikely_goes_back(
    run_gateway: RunGateway, run_replica: RunReplica, tmp_path: Path
) -> None:
    """It answers, and quickly; only its tenant's own examples show that it was trained on garbage."""
    replica = await run_replica(blobs=None)
    acme = await (await run_gateway(replica, proof="flag")).tenant("acme")
    replica.faults.event_delay_s = 1
    digests = await publish(acme, tmp_path, 1)
    await until(lambda: bool(replica.golden))
    digests += await publish(acme, tmp_path, 3, first=2)
    await move(acme, version=1)
    replica.likelihoods = {digests[1]: -4.0, digests[2]: -0.5}
    examples = [{"prompt": "who are you?", "answer": "I am the bot."}, {"prompt": "and you?", "answer": "So am I."}]
    told = await acme.client.put("/v1/adapters/bot/prompts", json={"prompts": [], "examples": examples})
    assert told.status_code == 200, told.text
    assert told.json()["examples"] == examples
    assert (await badge(acme))["status"] == "pending"  # its proof runs, and ends without the examples
    replica.faults.event_delay_s = 0
    run = asyncio.create_task(Traffic(acme).run())
    ended = await until_over(acme, await start(acme, needs_proof=True))
    assert ended["status"] == "rolled_back", ended
    assert "-4.00 a token, and -1.00 by the version before" in ended["reason"]
    ended = await until_over(acme, await start(acme, version=3, needs_proof=True))
    assert (ended["status"], ended["reason"]) == ("completed", "")
    await cancel(run)
    assert version_of(await acme.ask()) == 3
    for wrong in ({"prompt": "", "answer": "x"}, {"prompt": "x", "answer": "\0"}, {"prompt": "x"}):
        refused = await acme.client.put("/v1/adapters/bot/prompts", json={"prompts": [], "examples": [wrong]})
        assert refused.status_code == 400, refused.text


async def test_a_rollout_does_not_wait_for_an_example_that_the_engine_refuses(
    run_gateway: RunGateway, run_replica: RunReplica, tmp_path: Path
) -> None:
    """Both versions are compared on the others, and the history names it."""
    replica = await run_replica(blobs=None)
    acme = await (await run_gateway(replica, proof="flag")).tenant("acme")
    digests = await publish(acme, tmp_path, 3)
    await move(acme, version=1)
    replica.likelihoods = {digests[1]: -4.0}
    replica.faults.example_status = {"no engine takes this": 400}
    examples = [{"prompt": "no engine takes this", "answer": "x"}, {"prompt": "and you?", "answer": "So am I."}]
    await acme.client.put("/v1/adapters/bot/prompts", json={"prompts": [], "examples": examples})
    run = asyncio.create_task(Traffic(acme).run())
    garbage = await until_over(acme, await start(acme, needs_proof=True))
    fine = await until_over(acme, await start(acme, version=3, needs_proof=True))
    await cancel(run)
    remark = "compared without examples[0]: refused by the engine"
    assert garbage["status"] == "rolled_back"
    assert garbage["reason"].endswith(f"-4.00 a token, and -1.00 by the version before ({remark})")
    assert (fine["status"], fine["reason"]) == ("completed", remark)
    last = (await acme.client.get("/v1/adapters/bot/history")).json()["data"][0]
    assert last["reason"] == f"rollout completed: {remark}"
