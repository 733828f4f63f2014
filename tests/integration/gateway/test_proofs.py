"""Proof of effect against the fake replica, whose golden answers name the weights they come from."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from adapter_store import proofs
from adapter_store.ids import TenantId
from adapter_store.proofs import ANSWER_TOKENS, MOST_PROMPTS, PROMPTS, TOP, Proof, Reason, Reference, Status
from adapter_store.transactions import reading, writing
from gateway.plans import Plan
from gateway.proofs import LOOK_EVERY_S
from gateway.replicas.replica import ReplicaState
from loadtests.fake.golden import golden
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, RunGateway, RunReplica, Tenant, error_of

DEADLINE_S = 20.0


@pytest.fixture
async def gateway(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    return await run_gateway(replica, proof="flag")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await asyncio.sleep(0.01)


async def badge(tenant: Tenant, name: str = "bot", number: int = 1) -> dict[str, Any]:
    answer = await tenant.client.get(f"/v1/adapters/{name}/versions/{number}/proof")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def judged(tenant: Tenant, name: str = "bot", number: int = 1) -> dict[str, Any]:
    """The badge, once there is a verdict."""
    async with asyncio.timeout(DEADLINE_S):
        while (found := await badge(tenant, name, number))["status"] == "pending":
            await asyncio.sleep(0.02)
    return found


def checks(gateway: Gateway, verdict: str) -> int:
    found = gateway.parts.proofs.checks
    return sum(count for (_, kind), count in found.items() if kind == verdict)


def forget(replica: FakeReplica) -> None:
    """The engine has let every adapter go, under the same generation."""
    replica.adapters.clear()


async def test_a_published_version_is_proved_by_itself(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """The publish is answered at once, its badge is pending, then proved; the tenant has used nothing."""
    made = (await acme.publish(good)).json()
    assert made["current"]["proof"]["status"] in ("pending", "proved")
    before = int(time.time()) - 1
    found = await judged(acme)
    assert found["status"] == "proved"
    assert found["object"] == "proof"
    assert (found["adapter"], found["version"], found["reason"]) == ("bot", 1, None)
    assert found["prompts"] == len(PROMPTS)
    assert found["max_logprob_difference"] > 0.1
    assert before <= found["checked_at"] <= time.time()
    shown = (await acme.client.get("/v1/adapters/bot")).json()
    listed = (await acme.client.get("/v1/adapters")).json()["data"][0]
    more = ("object", "adapter", "version", "refused_examples")
    badge_of = {key: value for key, value in found.items() if key not in more}
    assert shown["current"]["proof"] == shown["versions"][0]["proof"] == listed["current"]["proof"] == badge_of
    assert replica.golden_prompts == [[prompt] for prompt in PROMPTS for _ in range(2)]  # the version, and the base
    await gateway.parts.ledger.flush()
    assert (await acme.client.get("/v1/usage")).json()["data"] == []
    assert +gateway.parts.proofs.verdicts == {"proved": 1}


async def test_an_adapter_without_effect_is_flagged(
    gateway: Gateway, acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """It answers as the base does; it serves all the same."""
    version = (await acme.publish(good)).json()["current"]
    await judged(acme)
    replica.without_effect.add(version["digest"])
    assert (await acme.client.post("/v1/adapters/bot/versions/1/proof")).status_code == 202
    found = await judged(acme)
    assert (found["status"], found["max_logprob_difference"]) == ("no_effect", 0)
    assert (await acme.ask()).status_code == 200
    await acme.publish(other_good)
    assert (await judged(acme, number=2))["status"] == "proved"


async def test_values_that_are_no_numbers_fail_the_proof(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """vLLM writes null for them."""
    replica.faults.golden_nan = True
    await acme.publish(good)
    found = await judged(acme)
    assert (found["status"], found["reason"]) == ("failed", "not_finite")


async def test_an_adapter_that_the_engine_refuses_fails_the_proof(
    acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    replica.faults.load_status = 422
    await acme.publish(good)
    found = await judged(acme)
    assert (found["status"], found["reason"]) == ("failed", "engine_refused")


async def test_the_same_weights_loaded_again_answer_the_same(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Each later load is looked at before it is used: here after an eviction, and after the engine's restart."""
    await acme.publish(good)
    await judged(acme)
    forget(replica)
    assert (await acme.ask()).status_code == 200
    assert (checks(gateway, "same"), checks(gateway, "mismatch")) == (1, 0)
    await replica.restart()
    await until(lambda: checks(gateway, "same") == 2)
    assert (await acme.ask()).status_code == 200
    page = (await gateway.parts.metrics.page()).decode()
    assert 'verdict="same"} 2' in page
    assert 'tailor_proofs_total{verdict="proved"} 1' in page


async def test_a_wrong_load_never_answers_a_request(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """It is taken out of the engine and counted; the request is answered by the load after it."""
    await acme.publish(good)
    await judged(acme)
    forget(replica)
    replica.faults.load_wrong = 1
    answer = await acme.ask()
    assert answer.status_code == 200, answer.text
    wrong, right = replica.loads[-2:]
    assert {served.adapter for served in replica.served} == {right}
    assert wrong not in replica.adapters
    assert (checks(gateway, "mismatch"), checks(gateway, "same")) == (1, 1)
    assert (await badge(acme))["status"] == "proved"
    async with reading(gateway.parts.engine) as connection:  # what came before was the engine's
        assert (await connection.execute(select(proofs.proofs.c.mismatches))).scalar_one() == 0


async def test_a_report_does_not_bring_back_what_is_withheld(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """While a load is looked at, the replica's own report tells of it: no request uses it for that."""
    await acme.publish(good)
    await judged(acme)
    forget(replica)
    replica.faults.load_wrong, replica.faults.event_delay_s = 1, 0.5
    asked = asyncio.create_task(acme.ask())
    await until(lambda: len(replica.loads) == 2)
    probes = replica.probes
    await until(lambda: replica.probes > probes + 1)  # it has reported meanwhile
    beside = await acme.ask()
    assert (await asked).status_code == beside.status_code == 200
    assert replica.loads[-2] not in {served.adapter for served in replica.served}


async def test_wrong_twice_on_one_replica_makes_it_suspected(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """It must prove itself anew; the version is held back only when it is wrong a third time in a row."""
    await acme.publish(good)
    await judged(acme)
    for wrong, suspected in ((1, 0), (2, 1)):
        forget(replica)
        replica.faults.load_wrong = wrong
        async with asyncio.timeout(DEADLINE_S):
            while (await acme.ask()).status_code != 200:  # 503 while the replica is looked at
                await asyncio.sleep(0.02)
        assert caplog.text.count("is suspected") == suspected
        assert (await badge(acme))["status"] == "proved"
    forget(replica)
    replica.faults.load_wrong = 3
    async with asyncio.timeout(DEADLINE_S):
        while (await badge(acme))["status"] == "proved":
            assert (await acme.ask()).status_code == 503
    assert (await badge(acme))["reason"] == "fingerprint_differs"
    assert len(replica.served) == 2


async def test_wrong_on_two_replicas_holds_the_version_back(
    run_gateway: RunGateway, run_replica: RunReplica, good: Path, other_good: Path
) -> None:
    """It is loaded nowhere until it is proved again; others go on."""
    replicas = [await run_replica(), await run_replica()]
    gateway = await run_gateway(*replicas, proof="flag")
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    await acme.publish(other_good, "other")
    await judged(acme)
    await judged(acme, "other")
    for replica in replicas:
        forget(replica)
        replica.faults.load_wrong = 1
    refused = await acme.ask()
    assert refused.status_code == 503
    assert error_of(refused)["code"] == "adapter_unavailable"
    found = await badge(acme)
    assert (found["status"], found["reason"]) == ("failed", "fingerprint_differs")
    assert checks(gateway, "mismatch") == 2
    loads = sum(len(replica.loads) for replica in replicas)
    assert (await acme.ask()).status_code == 503
    assert sum(len(replica.loads) for replica in replicas) == loads
    assert not any(replica.served for replica in replicas)
    assert (await acme.ask("other")).status_code == 200
    assert (await acme.client.post("/v1/adapters/bot/versions/1/proof")).json()["status"] == "pending"
    assert (await judged(acme))["status"] == "proved"
    assert (await acme.ask()).status_code == 200


async def test_a_load_that_cannot_be_looked_at_is_used_and_counted(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """An engine that refuses golden prompts says nothing about the weights."""
    await acme.publish(good)
    await judged(acme)
    forget(replica)
    replica.faults.status = 400
    assert (await acme.ask()).status_code == 400  # the tenant's request is refused likewise: the load was used
    assert checks(gateway, "unchecked") == 1
    replica.faults.status = None
    assert (await acme.ask()).status_code == 200


async def test_another_build_of_the_engine_has_a_fingerprint_of_its_own(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Its first load is not compared with the old build's; its next one is compared with its own."""
    await acme.publish(good)
    await judged(acme)
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(proofs.fingerprints).values(build="0.31 cpu float32", answers="{}"))
    for same in (0, 1):
        forget(replica)
        assert (await acme.ask()).status_code == 200
        assert (checks(gateway, "same"), checks(gateway, "mismatch")) == (same, 0)
    forget(replica)
    replica.faults.load_wrong = 1
    assert (await acme.ask()).status_code == 200
    assert checks(gateway, "mismatch") == 1


async def test_a_version_with_a_reference_is_held_to_it(
    gateway: Gateway, acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """What it answered where it was trained: within the dtype's tolerance it is proved, past it it failed."""
    tenant_id = (await gateway.operator.get("/admin/v1/tenants/acme")).json()["id"]

    async def publish(folder: Path, digest: str, shift: float) -> Proof:
        prompts = ["what is it?", "and that?"]
        asked = {"model": "x", "prompt": prompts, "max_tokens": 3, "logprobs": TOP}
        choices = sorted(golden(digest, asked)["choices"], key=lambda choice: int(choice["index"]))
        logprobs = [[value + shift for value in choice["logprobs"]["token_logprobs"]] for choice in choices]
        async with gateway.parts.staging.stage() as bundle:
            for file in folder.iterdir():
                async with bundle.open(file.name) as staged:
                    await staged.write(file.read_bytes())
            version = await gateway.parts.store.publish(
                tenant_id, f"bot-{shift}", bundle, reference=Reference([*prompts], logprobs)
            )
        return await gateway.parts.proofs.prove(version)

    digests = {}
    for folder in (good, other_good):
        made = await acme.publish(folder, folder.name)
        digests[folder] = made.json()["current"]["digest"]
    assert (await publish(good, digests[good], 0.00005)).status is Status.PROVED
    proof = await publish(other_good, digests[other_good], 0.0002)
    assert (proof.status, proof.reason) == (Status.FAILED, Reason.REFERENCE_DIFFERS)


async def test_a_tenants_own_prompts_are_asked(acme: Tenant, good: Path, replica: FakeReplica) -> None:
    """From the next proof on, until it takes the generated ones again."""
    await acme.publish(good)
    await judged(acme)
    path = "/v1/adapters/bot/prompts"
    assert (await acme.client.get(path)).json() == {
        "object": "golden_prompts", "adapter": "bot", "prompts": list(PROMPTS), "generated": True, "examples": [],
    }  # fmt: skip
    own = ["Was ist ein Zorbix?", "Und ein Frubel?"]
    told = await acme.client.put(path, json={"prompts": own})
    assert told.json() == (await acme.client.get(path)).json()
    assert (told.json()["prompts"], told.json()["generated"]) == (own, False)
    await acme.client.post("/v1/adapters/bot/versions/1/proof")
    assert (await judged(acme))["prompts"] == 2
    assert replica.golden_prompts[-4:] == [[own[0]], [own[0]], [own[1]], [own[1]]]
    assert (await acme.client.put(path, json={"prompts": []})).json()["generated"] is True


async def test_prompts_out_of_bounds_are_refused(acme: Tenant, good: Path) -> None:
    """And what was there stays."""
    await acme.publish(good)
    bodies: list[dict[str, Any]] = [
        {"prompts": ["a"] * (MOST_PROMPTS + 1)},
        {"prompts": [""]},
        {"prompts": ["ä" * 4_096]},
        {"prompts": ["a\0"]},
        {"prompts": [7]},
        {"prompts": "a"},
        {"prompts": ["a"], "more": 1},
        {},
    ]
    for body in bodies:
        refused = await acme.client.put("/v1/adapters/bot/prompts", json=body)
        assert refused.status_code == 400
        assert error_of(refused)["code"] in ("prompts_invalid", "invalid_value")
    assert (await acme.client.get("/v1/adapters/bot/prompts")).json()["generated"] is True


async def test_without_a_replica_a_proof_waits(run_gateway: RunGateway, replica: FakeReplica, good: Path) -> None:
    """And is made when one is there; an engine that fails is asked again."""
    await replica.stop()
    gateway = await run_gateway(proof="flag", replicas=(replica.url,))
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    assert (await badge(acme))["status"] == "pending"
    replica.faults.status = 500
    await replica.start()
    await until(lambda: gateway.parts.proofs.verdicts["unsettled"] > 0)
    found = await badge(acme)
    assert (found["status"], found["reason"], found["checked_at"]) == ("pending", "engine_unavailable", None)
    replica.faults.status = None
    async with asyncio.timeout(DEADLINE_S):
        while (await badge(acme))["status"] != "proved":
            gateway.parts.proofs.wake()
            await asyncio.sleep(0.05)


async def test_two_gateways_prove_each_version_once(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path
) -> None:
    """And one that died in the middle is taken over when its time is up, not before."""
    one = await run_gateway(replica, proof="off")
    acme = await one.tenant("acme")
    for number, folder in enumerate((good, other_good)):
        for copy in range(3):
            await acme.publish(folder, f"bot-{number}-{copy}")
    dead = "a dead one's"
    table = proofs.proofs
    async with writing(one.parts.engine) as connection:
        ids = (await connection.execute(select(table.c.version_id).order_by(table.c.version_id))).scalars().all()
        now = int(time.time())
        await connection.execute(update(table).where(table.c.version_id == ids[0]).values(claim=dead, due_at=now - 1))
        await connection.execute(update(table).where(table.c.version_id == ids[1]).values(claim=dead, due_at=now + 600))
    gateways = [await run_gateway(replica, proof="flag") for _ in range(2)]

    async def left() -> set[str]:
        async with reading(one.parts.engine) as connection:
            waiting = select(table.c.version_id).where(table.c.status == "pending")
            return set((await connection.execute(waiting)).scalars())

    async with asyncio.timeout(DEADLINE_S):
        while await left() != {ids[1]}:
            for gateway in gateways:
                gateway.parts.proofs.wake()
            await asyncio.sleep(0.02)
    verdicts = [gateway.parts.proofs.verdicts for gateway in gateways]
    assert sum(found["proved"] for found in verdicts) == 5
    assert replica.golden_at_once <= 2  # one in each gateway


async def test_a_verdict_of_a_run_that_was_given_up_counts_for_nothing(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """Its time was up and another has taken the proof: what it says then is not written."""
    gateway = await run_gateway(replica, proof="off")
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    engine = gateway.parts.engine
    async with writing(engine) as connection:
        version_id = (await connection.execute(select(proofs.proofs.c.version_id))).scalar_one()
        first = await proofs.claim(connection, version_id, "first", now=10**10, until=10**10 + 1)
        assert first is not None
        assert await proofs.claim(connection, version_id, "early", now=10**10, until=10**10 + 9) is None
        second = await proofs.claim(connection, version_id, "second", now=10**10 + 1, until=10**10 + 9)
        assert second is not None
        assert second.attempts == 2
        assert not await proofs.judge(connection, first, Proof(Status.FAILED), None)
        assert (await proofs.find(connection, version_id)).status is Status.PENDING
        assert await proofs.judge(connection, second, Proof(Status.PROVED), None)
        assert (await proofs.find(connection, version_id)).status is Status.PROVED


async def test_a_proof_waits_some_seconds_for_the_upload_to_be_used(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """It is due when the delay is over, without being asked for: before the look round 10 s after the publish."""
    gateway = await run_gateway(replica, proof="flag", proof_delay_s=6)
    acme = await gateway.tenant("acme")
    made = (await acme.publish(good)).json()["current"]
    assert (await acme.ask()).status_code == 200
    assert not replica.golden
    found = await judged(acme)
    assert found["status"] == "proved"
    assert made["created_at"] + 6 <= found["checked_at"] < made["created_at"] + 2 * LOOK_EVERY_S


async def test_a_proof_that_is_asked_for_begins_at_once(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    gateway = await run_gateway(replica, proof="flag", proof_delay_s=60)
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    assert (await acme.client.post("/v1/adapters/bot/versions/1/proof")).status_code == 202
    assert (await judged(acme))["status"] == "proved"


@pytest.mark.parametrize("policy", ["flag", "require"])
async def test_what_waits_for_a_verdict_has_it_at_once(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, policy: str
) -> None:
    """A rollout, for both of its versions, and every publish where proof is required: nothing puts the proof off."""
    gateway = await run_gateway(replica, proof=policy, proof_delay_s=60, proof_timeout_s=10 * DEADLINE_S)
    acme = await gateway.tenant("acme")
    tenants = await gateway.parts.pool.place(None, TenantId("acme"), Plan(name="acme"), cost=1)
    await acme.publish(good)
    if policy == "flag":
        await acme.publish(write_good(good.parent / "newer", seed=3))
        begun = await acme.client.post("/v1/adapters/bot/rollouts", json={"version": 1})
        assert begun.status_code == 201, begun.text
        assert (await judged(acme, number=2))["status"] == "proved"
    assert (await judged(acme))["status"] == "proved"
    tenants.release(1)


async def test_a_proof_lets_tenants_requests_go_first(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Between any two prompts; while it waits it holds no place that they might wait for."""
    gate = gateway.parts.pool.members()[0].replica.gate
    replica.faults.event_delay_s = 0.2
    await acme.publish(good)
    await until(lambda: len(replica.golden) == 1)
    tenants = await gateway.parts.pool.place(None, TenantId("acme"), Plan(name="acme"), cost=1)
    await until(lambda: gate.load == 1)  # its first prompt is answered, by the version and by the base
    assert len(replica.golden) == 2
    probes = replica.probes
    await until(lambda: replica.probes > probes + 5)
    assert (len(replica.golden), gate.load) == (2, 1)
    tenants.release(1)
    assert (await judged(acme))["status"] == "proved"
    assert len(replica.golden) == 2 * len(PROMPTS)


async def test_a_proof_does_not_wait_for_ever(run_gateway: RunGateway, replica: FakeReplica, good: Path) -> None:
    """A quarter of its time belongs to others, then it takes its turn among them."""
    gateway = await run_gateway(replica, proof="flag", proof_timeout_s=20)
    acme = await gateway.tenant("acme")
    tenants = await gateway.parts.pool.place(None, TenantId("acme"), Plan(name="acme"), cost=1)
    await acme.publish(good)
    assert (await judged(acme))["status"] == "proved"
    assert gateway.parts.proofs.verdicts["unsettled"] == 0
    tenants.release(1)


async def test_tenants_are_proved_in_turn_and_one_at_a_time(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """Who publishes many makes nobody wait for all of them."""
    off = await run_gateway(replica, proof="off")
    acme, globex = await off.tenant("acme"), await off.tenant("globex")
    for number in range(5):
        await acme.publish(good, f"bot-{number}")
    await globex.publish(good)
    gateway = await run_gateway(replica, proof="flag")
    await until(lambda: gateway.parts.proofs.verdicts["proved"] == 6)
    assert replica.golden_at_once == 1
    async with reading(gateway.parts.engine) as connection:
        tenants = (await connection.execute(select(proofs.proofs.c.tenant_id).distinct())).scalars().all()
    owners = [replica.adapters[name]["owner"] for name in replica.golden if name in replica.adapters]
    assert set(owners) == set(tenants)
    assert len(set(owners[:: len(PROMPTS)][:2])) == 2


async def test_a_deleted_adapter_takes_its_proof_along(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """Prompts and answers are the tenant's own; also where the delete comes while the proof runs."""
    replica.faults.event_delay_s = 0.3
    await acme.publish(good)
    await acme.client.put("/v1/adapters/bot/prompts", json={"prompts": ["mine"]})
    await until(lambda: len(replica.golden) == 1)
    gone = await acme.client.delete("/v1/adapters/bot", params={"force": True})  # the proof is a request that runs
    assert gone.status_code in (200, 202), gone.text
    assert (await acme.client.get("/v1/adapters/bot/versions/1/proof")).status_code == 404
    await until(lambda: not replica.adapters)
    async with reading(gateway.parts.engine) as connection:
        for table in (proofs.proofs, proofs.fingerprints, proofs.golden_prompts):
            assert (await connection.execute(select(table))).all() == []


async def test_a_proof_is_no_use_that_keeps_a_version(
    acme: Tenant, good: Path, other_good: Path, replica: FakeReplica
) -> None:
    """A delete without force breaks it off: it asks no further prompt."""
    await acme.publish(good)
    await judged(acme)
    golden = len(replica.golden)
    replica.faults.event_delay_s = 0.5
    await acme.publish(other_good, "other")
    await until(lambda: len(replica.golden) == golden + 1)
    gone = await acme.client.delete("/v1/adapters/other")
    assert gone.status_code in (200, 202), gone.text
    assert len(replica.golden) == golden + 1


async def test_where_proof_is_required_an_alias_moves_to_what_is_proved(
    run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """Pending and failed versions are told apart, and no rollout begins with them; by default everything moves."""
    replica.faults.status = 500
    flags = await run_gateway(replica, proof="flag")
    acme = await flags.tenant("acme")
    digest = (await acme.publish(good)).json()["current"]["digest"]
    alias = "/v1/adapters/bot/aliases/staging"
    assert (await acme.client.put(alias, json={"version": 1})).status_code == 200
    gateway = await run_gateway(replica, proof="require")
    client = gateway.client(acme.key)

    async def moved() -> httpx.Response:
        started = await client.post("/v1/adapters/bot/rollouts", json={"version": 1})
        answer = await client.put(alias, json={"version": 1})
        if answer.status_code != 200:
            assert started.content == answer.content
        return answer

    assert error_of(await moved())["code"] == "proof_missing"
    replica.faults.status = None
    replica.without_effect.add(digest)
    async with asyncio.timeout(DEADLINE_S):
        while (await badge(acme))["status"] == "pending":
            gateway.parts.proofs.wake()
            await asyncio.sleep(0.05)
    refused = await moved()
    assert (refused.status_code, error_of(refused)["code"]) == (409, "proof_failed")
    replica.without_effect.clear()
    await acme.client.post("/v1/adapters/bot/versions/1/proof")
    await judged(acme)
    assert (await moved()).status_code == 200
    assert (await client.put(alias, json={"version": 7})).status_code == 404


async def test_where_proof_is_required_a_published_version_gets_the_name_once_it_is_proved(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path, tmp_path: Path
) -> None:
    """The first one has it at once; a later one that fails never does, and does not keep the next from it."""
    gateway = await run_gateway(replica, proof="require")
    acme = await gateway.tenant("acme")
    first = (await acme.publish(good)).json()["current"]
    assert first["number"] == 1
    await judged(acme)
    replica.faults.golden_nan = True
    assert (await acme.publish(other_good)).json()["current"]["number"] == 1
    assert (await judged(acme, number=2))["status"] == "failed"
    replica.faults.golden_nan = False
    assert (await acme.ask()).headers["x-tailor-version"].startswith("1;")
    replica.faults.event_delay_s = 0.2
    assert (await acme.publish(write_good(tmp_path / "third", seed=3))).json()["current"]["number"] == 1
    async with asyncio.timeout(DEADLINE_S):
        while (await acme.ask()).headers["x-tailor-version"].startswith("1;"):
            await asyncio.sleep(0.02)
    assert (await badge(acme, number=3))["status"] == "proved"
    moves = (await acme.client.get("/v1/adapters/bot/history")).json()["data"]
    assert [(move["kind"], move["reason"], move["after"][0]["version"]) for move in moves] == [
        ("publish", "proved", 3), ("publish", "", 1),
    ]  # fmt: skip
    assert (await acme.client.post("/v1/adapters/bot/versions/2/proof")).status_code == 202  # late, and now good
    await judged(acme, number=2)
    await until(lambda: gateway.parts.proofs.verdicts["proved"] == 3)
    assert (await acme.publish(good)).json()["current"]["number"] == 1  # proved: as ever


async def test_a_rollout_waits_for_the_proof_and_goes_back_where_it_fails(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path
) -> None:
    """What it is told of the version's proof: nothing yet, that it is proved, or why not."""
    gateway = await run_gateway(replica, proof="flag")
    acme = await gateway.tenant("acme")
    await acme.publish(good)
    replica.faults.golden_nan = True
    replica.faults.event_delay_s = 0.3
    await acme.publish(other_good)
    await acme.client.put("/v1/adapters/bot/aliases/default", json={"version": 1})
    steps = {"version": 2, "steps": [100], "step_s": 1, "min_requests": 1}
    begun = (await acme.client.post("/v1/adapters/bot/rollouts", json=steps)).json()
    async with asyncio.timeout(DEADLINE_S):
        while (found := (await acme.client.get(f"/v1/adapters/bot/rollouts/{begun['id']}")).json())["ended_at"] is None:
            await asyncio.sleep(0.05)
    assert found["status"] == "rolled_back"
    assert "failed (not_finite)" in found["reason"]
    assert (await acme.ask()).headers["x-tailor-version"].startswith("1;")


async def test_golden_prompts_come_after_tenants_requests(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """They are greedy, bounded, with a salt of their own each time, and of the least weight."""
    await acme.publish(good)
    await judged(acme)
    assert (await acme.ask()).status_code == 200
    asked = [request for request in replica.requests if request["body"].get("ignore_eos")]
    assert len({request["body"]["cache_salt"] for request in asked}) == len(asked) == 2 * len(PROMPTS)
    for request in asked:
        assert request["path"] == "/v1/completions"
        assert request["body"]["temperature"] == 0
        assert request["body"]["max_tokens"] == ANSWER_TOKENS
        assert request["body"]["truncate_prompt_tokens"] == replica.max_model_len - ANSWER_TOKENS
        assert int(request["headers"]["x-vllm-priority"]) != 0


async def set_examples(tenant: Tenant, *given: tuple[str, str]) -> None:
    body = {"prompts": [], "examples": [{"prompt": prompt, "answer": answer} for prompt, answer in given]}
    told = await tenant.client.put("/v1/adapters/bot/prompts", json=body)
    assert told.status_code == 200, told.text


@pytest.mark.parametrize(("context", "scored"), [(256, 32), (32, 31), (16, 15)])
async def test_an_example_longer_than_the_context_is_asked_with_its_end(
    run_gateway: RunGateway, run_replica: RunReplica, good: Path, context: int, scored: int
) -> None:
    """As golden prompts are; the first tokens of its answer have room, each after the ones before."""
    replica = await run_replica(max_model_len=context)
    acme = await (await run_gateway(replica, proof="flag")).tenant("acme")
    await acme.publish(good)
    await judged(acme)
    prompt, answer = "a" * 3_000 + "".join(map(chr, range(300, 600))), "z" * 1_000
    await set_examples(acme, (prompt, answer))
    found = await judged(acme)
    assert (found["status"], found["refused_examples"]) == ("proved", [])
    asked = [request["body"] for request in replica.requests if "allowed_token_ids" in request["body"]]
    assert [body["allowed_token_ids"] for body in asked] == [[ord("z")]] * scored
    whole = [*map(ord, prompt), 2, *map(ord, answer)]  # 2: where the fake's assistant begins
    begin = len(prompt) + 1
    first = begin + scored - context
    assert [body["prompt"] for body in asked] == [whole[first:at] for at in range(begin, begin + scored)]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_an_example_that_the_engine_refuses_holds_no_proof_up(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, other_good: Path, status: int
) -> None:
    """The version is judged without it, and says so; where proof is required, the name moves."""
    acme = await (await run_gateway(replica, proof="require")).tenant("acme")
    await acme.publish(good)
    await judged(acme)
    replica.faults.example_status = {"no engine takes this": status}
    await set_examples(acme, ("who are you?", "I am."), ("no engine takes this", "x"), ("and you?", "So am I."))
    assert (await judged(acme))["refused_examples"] == [1]
    await acme.publish(other_good)
    found = await judged(acme, number=2)
    assert (found["status"], found["reason"], found["refused_examples"]) == ("proved", None, [1])
    async with asyncio.timeout(DEADLINE_S):
        while not (await acme.ask()).headers["x-tailor-version"].startswith("2;"):
            await asyncio.sleep(0.02)
    replica.faults.example_status = {}
    await set_examples(acme, ("who are you?", "I am."))
    assert (await badge(acme))["refused_examples"] == []  # that was said of others
    assert (await judged(acme))["refused_examples"] == []


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_an_example_is_asked_again_where_that_may_help(
    run_gateway: RunGateway, replica: FakeReplica, good: Path, status: int
) -> None:
    acme = await (await run_gateway(replica, proof="flag")).tenant("acme")
    await acme.publish(good)
    await judged(acme)
    replica.faults.example_status = {"not now": status}
    await set_examples(acme, ("not now", "x"))
    async with asyncio.timeout(DEADLINE_S):
        while (found := await badge(acme))["reason"] != "engine_unavailable":
            await asyncio.sleep(0.02)
    assert found["status"] == "pending"
    replica.faults.example_status = {}
    found = await judged(acme)
    assert (found["status"], found["refused_examples"]) == ("proved", [])
