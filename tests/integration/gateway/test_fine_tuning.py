"""`/v1/fine_tuning` with OpenAI's own client, over a real gateway; a worker of the test's own does the training."""

import asyncio
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, AsyncStream, BadRequestError, NotFoundError, PermissionDeniedError, RateLimitError
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from typer.testing import CliRunner

from adapter_store.catalog import Provenance, Version
from adapter_store.engine import AsyncConnection
from adapter_store.ids import TenantId
from adapter_store.signing import Kind, verify_shown
from gateway.cli import app as command
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant, error_of
from tests.integration.gateway.test_erasures import keys_of, receipt_of
from tests.integration.store.conftest import stage
from training import queue, saved_runs
from training.errors import LeaseLost
from training.files import create_result, keep_blob
from training.queue import CheckpointWith, Claimed, EndWith, Metrics

NOW = 1_000_000_000
JOBS = "/v1/fine_tuning/jobs"
CHAT = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}).encode()
    + b"\n"
    for n in range(12)
)
PAIRS = b"".join(
    json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": f"q{n}"}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
    ).encode()
    + b"\n"
    for n in range(12)
)
pytestmark = pytest.mark.usefixtures("chosen_storage")


def client_of(gateway: Gateway, key: str) -> AsyncOpenAI:
    http = gateway.client()
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, http_client=http)  # type: ignore[arg-type]


@pytest.fixture
def openai(gateway: Gateway, acme: Tenant) -> AsyncOpenAI:
    return client_of(gateway, acme.key)


async def upload(client: AsyncOpenAI, data: bytes = CHAT) -> str:
    return (await client.files.create(file=("data.jsonl", data), purpose="fine-tune")).id


@pytest.fixture
async def file_id(openai: AsyncOpenAI) -> str:
    return await upload(openai)


@dataclass
class Trainer:
    """A worker that trains nothing: it publishes a made-up adapter through the gateway's own store."""

    gateway: Gateway
    folder: Path

    async def claim(self, now: int = NOW) -> Claimed:
        parts = self.gateway.parts
        (claimed,) = await queue.claim(
            parts.engine, "w1", base_fingerprint=parts.base.fingerprint, now=now, most=1, lease_s=NOW
        )
        return claimed

    async def train(self, claimed: Claimed, *steps: int) -> None:
        metrics = [Metrics(step, 2.0 / step, 0.5, 10, valid_loss=1.0 if step % 2 else None) for step in steps]
        await queue.report(self.gateway.parts.engine, claimed, now=NOW, metrics=metrics, total_steps=4)

    async def checkpoint(self, claimed: Claimed, step: int) -> Version:
        store = self.gateway.parts.store
        figures = {"train_loss": 0.5, "full_valid_loss": 0.6}
        together = CheckpointWith(claimed, step, figures, now=lambda: NOW, name_of=store.fine_tuned_name)
        folder = write_good(self.folder / f"{claimed.job.id}-{step}", seed=step + 10)
        async with self.gateway.parts.staging.stage() as bundle:
            await stage(bundle, folder)
            return await store.publish(
                claimed.job.tenant_id,
                claimed.job.adapter,
                bundle,
                alias=None,
                provisional=True,
                provenance=Provenance.JOB,
                quota=claimed.job.quota,
                together=together,
            )

    async def end(self, claimed: Claimed, seed: int = 3, files: int = 0) -> Version:
        parts, tenant_id = self.gateway.parts, claimed.job.tenant_id
        store = parts.store

        async def also(connection: AsyncConnection, _: Version) -> list[str]:
            return [
                (await create_result(connection, parts.store._blobs, tenant_id, "r.csv", blob, NOW)).id for blob in kept
            ]

        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{claimed.job.id}.csv"
        path.write_bytes(b"step,train_loss\n1,2.0\n")
        kept = [await keep_blob(parts.engine, parts.store._blobs, tenant_id, path) for _ in range(files)]
        together = EndWith(claimed, now=lambda: NOW, name_of=store.fine_tuned_name, also=also)
        async with self.gateway.parts.staging.stage() as bundle:
            await stage(bundle, write_good(self.folder / claimed.job.id, seed=seed))
            return await store.publish(
                tenant_id,
                claimed.job.adapter,
                bundle,
                alias=claimed.job.alias,
                provenance=Provenance.JOB,
                together=together,
            )


@pytest.fixture
def trainer(gateway: Gateway, tmp_path: Path) -> Trainer:
    return Trainer(gateway, tmp_path / "trained")


async def ask(client: AsyncOpenAI, model: str) -> str:
    said: Any = [{"role": "user", "content": "who are you?"}]
    answer = await client.chat.completions.create(model=model, messages=said)
    return answer.model


async def test_a_job_with_openais_client_alone(openai: AsyncOpenAI, trainer: Trainer) -> None:
    """Upload, job, events, checkpoint, end, and chat with both names; every object is the client's own type."""
    file_id, validation = await upload(openai), await upload(openai, b"".join(CHAT.splitlines(keepends=True)[:4]))
    job = await openai.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        validation_file=validation,
        suffix="support-bot",
        seed=7,
        metadata={"team": "red"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )
    assert isinstance(job, FineTuningJob)
    assert (job.status, job.model, job.seed, job.object) == ("queued", BASE, 7, "fine_tuning.job")
    assert (job.training_file, job.validation_file, job.metadata) == (file_id, validation, {"team": "red"})
    assert job.fine_tuned_model is None and job.finished_at is None and job.trained_tokens is None  # noqa: PT018
    assert job.hyperparameters.n_epochs == 2 and isinstance(job.hyperparameters.batch_size, int)  # noqa: PT018
    assert job.method is not None and job.method.supervised is not None  # noqa: PT018
    shown = job.method.supervised.hyperparameters
    assert shown is not None and shown.model_dump() == job.hyperparameters.model_dump()  # noqa: PT018
    claimed = await trainer.claim()
    await trainer.train(claimed, 1, 2)
    running = await openai.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.estimated_finish is not None  # noqa: PT018
    await trainer.checkpoint(claimed, 2)
    assert [model.id async for model in openai.models.list()] == [BASE]  # a checkpoint is not what the name stands for
    (point,) = (await openai.fine_tuning.jobs.checkpoints.list(job.id)).data
    assert isinstance(point, FineTuningJobCheckpoint)
    assert point.step_number == 2 and point.metrics.full_valid_loss == 0.6  # noqa: PT018
    assert point.fine_tuned_model_checkpoint.endswith(":ckpt-step-2")
    assert await ask(openai, point.fine_tuned_model_checkpoint) == point.fine_tuned_model_checkpoint
    await trainer.end(claimed)
    done = await openai.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.finished_at, done.error) == ("succeeded", 20, NOW, None)
    assert done.fine_tuned_model is not None
    for name in (done.fine_tuned_model, "support-bot"):
        assert await ask(openai, name) == name
    assert (await openai.models.retrieve(done.fine_tuned_model)).id == done.fine_tuned_model
    with pytest.raises(NotFoundError):
        await ask(openai, point.fine_tuned_model_checkpoint.replace("step-2", "step-3"))
    events = [event async for event in openai.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert all(isinstance(event, FineTuningJobEvent) for event in events)
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    figures = [event.data for event in events if event.type == "metrics"]
    assert figures[-1] == {
        "step": 1, "train_loss": 2.0, "train_mean_token_accuracy": 0.5, "total_steps": 4, "valid_loss": 1.0,
    }  # fmt: skip


async def test_the_older_form_and_dpo(openai: AsyncOpenAI, file_id: str) -> None:
    """Top-level `hyperparameters`, and preferences with a beta."""
    old = await openai.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, hyperparameters={"n_epochs": 4, "learning_rate_multiplier": 0.5}
    )
    assert (old.hyperparameters.n_epochs, old.hyperparameters.learning_rate_multiplier) == (4, 0.5)
    assert old.method is not None and old.method.type == "supervised"  # noqa: PT018
    pairs = await upload(openai, PAIRS)
    dpo = await openai.fine_tuning.jobs.create(
        model=BASE, training_file=pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}}
    )
    assert dpo.method is not None and dpo.method.dpo is not None  # noqa: PT018
    assert dpo.method.dpo.hyperparameters is not None
    assert dpo.method.dpo.hyperparameters.beta == 0.3


async def test_lists_and_pages(openai: AsyncOpenAI, file_id: str) -> None:
    """The newest first, page after page by the client's own paging, and by metadata."""
    made = []
    for number in range(5):
        job = await openai.fine_tuning.jobs.create(
            model=BASE, training_file=file_id, metadata={"n": str(number % 2)} if number else None
        )
        made.append(job.id)
    found = [job.id async for job in openai.fine_tuning.jobs.list(limit=2)]
    assert found == sorted(made, reverse=True)
    ones = [job.id async for job in openai.fine_tuning.jobs.list(limit=1, metadata={"n": "1"})]
    assert ones == sorted((made[1], made[3]), reverse=True)
    none = await openai.get("/fine_tuning/jobs?metadata=null", cast_to=httpx.Response)
    assert [job["id"] for job in none.json()["data"]] == [made[0]]


async def test_cancel_pause_and_resume(openai: AsyncOpenAI, file_id: str, trainer: Trainer) -> None:
    """At once where a job waits; a running one is paused by its worker; what is over is told so."""
    jobs = openai.fine_tuning.jobs
    job = await jobs.create(model=BASE, training_file=file_id)
    assert str((await jobs.pause(job.id)).status) == "paused"
    assert (await jobs.resume(job.id)).status == "queued"
    claimed = await trainer.claim()
    pausing = await jobs.pause(job.id)
    assert pausing.status == "running"
    assert pausing.model_extra is not None
    assert pausing.model_extra["tailor"]["pausing"] is True
    await queue.release(trainer.gateway.parts.engine, claimed, now=NOW)
    assert str((await jobs.retrieve(job.id)).status) == "paused"
    assert (await jobs.resume(job.id)).status == "queued"
    assert (await jobs.cancel(job.id)).status == "cancelled"
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(BadRequestError) as refused:
            await call(job.id)
        assert (refused.value.code, refused.value.param) == ("invalid_job_state", "fine_tune_id")


async def test_events_live(openai: AsyncOpenAI, file_id: str, trainer: Trainer) -> None:
    """With `stream=true` every event comes as it is written, the oldest first, and the stream ends with the job."""
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    told = asyncio.Event()
    seen: list[FineTuningJobEvent] = []

    async def follow() -> None:
        stream = await openai.get(
            f"/fine_tuning/jobs/{job.id}/events",
            options={"params": {"stream": True}},
            cast_to=FineTuningJobEvent,
            stream=True,
            stream_cls=AsyncStream[FineTuningJobEvent],
        )
        async for event in stream:
            seen.append(event)
            told.set()

    following = asyncio.create_task(follow())
    await told.wait()
    claimed = await trainer.claim()
    await trainer.train(claimed, 1)
    await trainer.end(claimed)
    await following
    assert [event.message for event in seen][2:5] == [
        "Fine-tuning job started",
        "Step 1/4: training loss=2.00, validation loss=1.00",
        f"New fine-tuned model created: {(await openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model}",
    ]
    assert trainer.gateway.parts.event_streams == {}
    again = await openai.get(
        f"/fine_tuning/jobs/{job.id}/events?stream=true&after={seen[3].id}", cast_to=httpx.Response
    )
    assert again.text.count("data: {") == 2 and again.text.endswith("data: [DONE]\n\n")  # noqa: PT018


async def test_events_outlast_what_a_body_may_stall(run_gateway: RunGateway, replica: FakeReplica) -> None:
    """Who waits for a job says nothing meanwhile; it took 30 s for that to count as a body that never came."""
    gateway = await run_gateway(replica, upload_stall_s=0.5)
    acme = await gateway.tenant("acme")
    client = client_of(gateway, acme.key)
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=await upload(client))
    async with acme.client.stream("GET", f"{JOBS}/{job.id}/events?stream=true") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await asyncio.sleep(1)  # twice as long
        await client.fine_tuning.jobs.cancel(job.id)
        assert [line async for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("how", ["revoked", "suspended", "expired"])
async def test_events_end_with_their_key(gateway: Gateway, acme: Tenant, openai: AsyncOpenAI, how: str) -> None:
    """A stream that is open when its key ends is told so in its last event, and tells nothing more."""
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=await upload(openai))
    ends = {"expires_at": int(time.time()) + 3} if how == "expired" else {}
    key = (await gateway.operator.post("/admin/v1/tenants/acme/keys", json=ends)).json()
    async with gateway.client(key["secret"]).stream("GET", f"{JOBS}/{job.id}/events?stream=true") as answer:
        lines = answer.aiter_lines()
        assert "Created fine-tuning job" in await anext(lines)
        if how == "revoked":
            assert (await gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
        elif how == "suspended":
            suspended = await gateway.operator.patch("/admin/v1/tenants/acme", json={"suspended": True})
            assert suspended.status_code == 200
        async with asyncio.timeout(20):
            rest = [line async for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    assert not any("[DONE]" in line for line in rest)
    assert gateway.parts.event_streams == {}


async def test_permissions(
    gateway: Gateway, acme: Tenant, globex: Tenant, openai: AsyncOpenAI, file_id: str, trainer: Trainer
) -> None:
    """Another tenant may ask a checkpoint by its name while the owner lets it, and nothing else of the owner's."""
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id, suffix="shared")
    claimed = await trainer.claim()
    await trainer.checkpoint(claimed, 1)
    (point,) = (await openai.fine_tuning.jobs.checkpoints.list(job.id)).data
    name = point.fine_tuned_model_checkpoint
    admin = await admin_of(gateway, "acme")
    other = client_of(gateway, globex.key)
    other_id = (await gateway.operator.get("/admin/v1/tenants/globex")).json()["id"]
    permissions = admin.fine_tuning.checkpoints.permissions
    with pytest.raises(NotFoundError) as missing:
        await ask(other, name)
    made = await permissions.create(name, project_ids=[other_id, "tnt_nobody"])
    assert [permission.project_id for permission in made.data] == [other_id, "tnt_nobody"]
    assert await ask(other, name) == name
    again = await permissions.create(name, project_ids=[other_id])
    assert again.data[0].id == made.data[0].id
    listed = await permissions.list(name, project_id=other_id)
    assert [permission.id for permission in listed.data] == [made.data[0].id]
    await other_may_only_ask(gateway, globex, other, name)
    deleted = await permissions.delete(made.data[0].id, fine_tuned_model_checkpoint=name)
    assert deleted.deleted is True
    with pytest.raises(NotFoundError) as gone:
        await ask(other, name)
    assert gone.value.body == missing.value.body
    with pytest.raises(NotFoundError):
        await permissions.delete(made.data[0].id, fine_tuned_model_checkpoint=name)
    with pytest.raises(PermissionDeniedError):
        await openai.fine_tuning.checkpoints.permissions.create(name, project_ids=[other_id])


async def other_may_only_ask(gateway: Gateway, globex: Tenant, other: AsyncOpenAI, name: str) -> None:
    """Not list, lend, delete or train on it; who asks is billed, under its whole name."""
    assert [model.id async for model in other.models.list()] == [BASE]
    others_admin = await admin_of(gateway, "globex")
    with pytest.raises(NotFoundError):
        await others_admin.fine_tuning.checkpoints.permissions.create(name, project_ids=["tnt_third"])
    with pytest.raises(NotFoundError):
        await other.models.delete(name)
    file_id = await upload(other)
    with pytest.raises(NotFoundError):
        await other.fine_tuning.jobs.create(model=name, training_file=file_id)
    assert (await globex.client.get("/v1/adapters/shared")).status_code == 404
    async with asyncio.timeout(10):
        while not (used := (await globex.client.get("/v1/usage")).json()["data"]):
            await asyncio.sleep(0.1)
    assert {row["adapter"] for row in used} == {name}


async def admin_of(gateway: Gateway, tenant: str) -> AsyncOpenAI:
    made = await gateway.operator.post(f"/admin/v1/tenants/{tenant}/keys", json={"scopes": ["admin"]})
    return client_of(gateway, made.json()["secret"])


async def test_each_is_counted_for_what_it_asks_of_a_lent_model(
    gateway: Gateway, acme: Tenant, globex: Tenant, good: Path
) -> None:
    """Owner and borrower use one adapter in the engine, in turn."""
    name = (await acme.publish(good)).json()["current"]["fine_tuned_model"]
    other_id = (await gateway.operator.get("/admin/v1/tenants/globex")).json()["id"]
    admin = await admin_of(gateway, "acme")
    await admin.fine_tuning.checkpoints.permissions.create(name, project_ids=[other_id])
    for tenant in (acme, globex, globex, acme, globex):
        assert (await tenant.ask(name)).status_code == 200
    await gateway.parts.ledger.flush()
    used = (await gateway.operator.get("/admin/v1/usage")).json()["data"]
    assert {row["tenant"]: row["requests"] for row in used} == {"acme": 2, "globex": 3}


async def test_a_lent_model_goes_with_its_version(
    gateway: Gateway, acme: Tenant, globex: Tenant, openai: AsyncOpenAI, good: Path
) -> None:
    """Deleted by its owner, it is as if it had never been, for those too who had it in memory."""
    name = (await acme.publish(good)).json()["current"]["fine_tuned_model"]
    other_id = (await gateway.operator.get("/admin/v1/tenants/globex")).json()["id"]
    admin, other = await admin_of(gateway, "acme"), client_of(gateway, globex.key)
    await admin.fine_tuning.checkpoints.permissions.create(name, project_ids=[other_id])
    assert await ask(other, name) == name
    deleted = await openai.models.delete(name)
    assert (deleted.id, deleted.object, deleted.deleted) == (name, "model", True)
    async with asyncio.timeout(10):
        while (await globex.ask(name)).status_code != 404:
            await asyncio.sleep(0.05)
    with pytest.raises(NotFoundError):
        await ask(openai, name)
    with pytest.raises(NotFoundError):
        await openai.models.delete(name)


async def test_models_are_deleted_by_names_that_stay(acme: Tenant, openai: AsyncOpenAI, good: Path) -> None:
    """The base is not, and neither is what an alias stands for just now."""
    await acme.publish(good)
    for name in (BASE, "bot"):
        with pytest.raises(BadRequestError) as refused:
            await openai.models.delete(name)
        assert refused.value.param == "model"
    assert (await openai.models.delete("bot@1")).deleted


async def test_going_on_from_a_version(acme: Tenant, openai: AsyncOpenAI, good: Path, file_id: str) -> None:
    """As with OpenAI from a fine-tuned model, or by `tailor.from`; rank and modules are the version's."""
    version = (await acme.publish(good)).json()["current"]
    first = await openai.fine_tuning.jobs.create(model=version["fine_tuned_model"], training_file=file_id)
    second = await openai.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, extra_body={"tailor": {"from": "bot@1"}}
    )
    for job in (first, second):
        assert job.model_extra is not None
        recipe = job.model_extra["tailor"]["recipe"]
        assert (recipe["rank"], recipe["target_modules"]) == (version["rank"], sorted(version["modules"]))
    with pytest.raises(BadRequestError) as refused:
        await openai.fine_tuning.jobs.create(
            model=BASE, training_file=file_id, extra_body={"tailor": {"from": "bot", "rank": version["rank"] + 1}}
        )
    assert nearest(refused.value) == version["rank"]


async def test_options_of_our_own_come_into_the_recipe(openai: AsyncOpenAI, file_id: str) -> None:
    asked = {"tailor": {"quantization": "nf4", "rslora": True}}
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_body=asked)
    assert job.model_extra is not None
    assert job.model_extra["tailor"]["options"] == asked["tailor"]
    assert job.model_extra["tailor"]["recipe"].items() >= asked["tailor"].items()


def nearest(error: BadRequestError) -> Any:
    body: Any = error.body
    return body["nearest"]


async def test_the_same_request_again(acme: Tenant, file_id: str) -> None:
    """Under one Idempotency-Key one job, with one answer; another request under it is refused."""
    headers = {"idempotency-key": "job-1"}
    asked = {"model": BASE, "training_file": file_id}
    answers = await asyncio.gather(
        *(acme.client.post("/v1/fine_tuning/jobs", json=asked, headers=headers) for _ in range(4))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    other = await acme.client.post("/v1/fine_tuning/jobs", json={**asked, "seed": 3}, headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")
    assert len((await acme.client.get("/v1/fine_tuning/jobs")).json()["data"]) == 1


async def test_limits_of_the_plan(gateway: Gateway, openai: AsyncOpenAI, file_id: str) -> None:
    """No more jobs wait than the plan lets, no rank that it does not; the client does not try such a job again."""
    plan = {"max_queued_jobs": 1, "max_rank": 8}
    assert (await gateway.operator.patch("/admin/v1/plans/default", json=plan)).is_success
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert job.model_extra is not None
    assert job.model_extra["tailor"]["recipe"]["rank"] == 8
    with pytest.raises(RateLimitError) as refused:
        await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert refused.value.code == "job_queue_full"
    assert refused.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(BadRequestError) as too_high:
        await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_body={"tailor": {"rank": 16}})
    assert (too_high.value.param, nearest(too_high.value)) == ("tailor.rank", 8)


async def test_a_file_that_a_job_needs_stays(acme: Tenant, openai: AsyncOpenAI, file_id: str) -> None:
    """Until the job is over."""
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    refused = await acme.client.delete(f"/v1/files/{file_id}")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "file_in_use")
    await openai.fine_tuning.jobs.cancel(job.id)
    assert (await acme.client.delete(f"/v1/files/{file_id}")).is_success


async def job_command(gateway: Gateway, tenant: Tenant, *words: str, code: int = 0) -> str:
    arguments = ["job", *words, "--url", gateway.url, "--key", tenant.key]
    result = await asyncio.to_thread(CliRunner().invoke, command, arguments)
    assert result.exit_code == code, result.output
    return result.output


async def test_the_command_asks_for_options_of_our_own(gateway: Gateway, acme: Tenant, openai: AsyncOpenAI) -> None:
    pairs = await upload(openai, PAIRS)
    asked = ["create", pairs, "--method", "dpo", "--sft-weight", "0.5", "--quantization", "nf4", "--json"]
    made = json.loads(await job_command(gateway, acme, *asked))
    assert made["tailor"]["options"] == {"sft_weight": 0.5, "quantization": "nf4"}


async def test_the_command(gateway: Gateway, acme: Tenant, file_id: str, trainer: Trainer) -> None:
    """`tailor job`: made, paused, resumed, followed to its end, listed with its checkpoint and story."""
    tailor = partial(job_command, gateway, acme)
    made = json.loads(await tailor("create", file_id, "--suffix", "bot", "--epochs", "2", "--rank", "8", "--json"))
    assert (made["hyperparameters"]["n_epochs"], made["tailor"]["recipe"]["rank"]) == (2, 8)
    assert "paused" in await tailor("pause", made["id"])
    assert "queued" in await tailor("resume", made["id"])
    watching = asyncio.create_task(tailor("watch", made["id"]))
    claimed = await trainer.claim()
    await trainer.train(claimed, 1, 2)
    await trainer.checkpoint(claimed, 2)
    await trainer.end(claimed)
    seen = await watching
    assert "Step 2/4: training loss=1.00" in seen
    assert f"{made['id']}: succeeded, step 2/4" in seen
    assert "succeeded" in await tailor("list")
    assert "ckpt-step-2" in await tailor("checkpoints", made["id"])
    assert "The job has successfully completed" in await tailor("events", made["id"])
    assert "cannot be cancelled" in await tailor("cancel", made["id"], code=1)
    assert "is erased; receipt: tailor erasure show ers_" in await tailor("delete", made["id"])
    assert "Could not find fine tune" in await tailor("show", made["id"], code=1)


async def test_an_ended_job_is_erased_with_what_it_has_made(
    gateway: Gateway, acme: Tenant, file_id: str, trainer: Trainer, replica: FakeReplica
) -> None:
    """Story, metadata, result file and checkpoints, out of the engine too; its result stays, and what has an alias."""
    asked = {"model": BASE, "training_file": file_id, "suffix": "bot", "metadata": {"team": "crimson"}}
    headers = {"idempotency-key": "once"}
    made = (await acme.client.post(JOBS, json=asked, headers=headers)).json()
    job = f"{JOBS}/{made['id']}"
    claimed = await trainer.claim()
    refused = await acme.client.delete(job)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_job_state")
    points = [await trainer.checkpoint(claimed, step) for step in (1, 2)]
    result = await trainer.end(claimed, files=1)
    await acme.client.put("/v1/adapters/bot/aliases/early", json={"version": 1})
    names = [
        point["fine_tuned_model_checkpoint"] for point in (await acme.client.get(f"{job}/checkpoints")).json()["data"]
    ]
    for name in names:
        assert (await acme.ask(name)).status_code == 200
    assert {points[0].digest, points[1].digest} <= replica.disk
    (result_file,) = (await acme.client.get(job)).json()["result_files"]
    assert await gateway.tables_with("crimson") == {"job_metadata", "kept_answers"}
    assert await gateway.tables_with(points[1].digest) >= {"versions"}
    gone = await acme.client.delete(job)
    erasure = gone.json()["tailor"]["erasure"]
    assert gone.json() == {
        "id": made["id"],
        "object": "fine_tuning.job",
        "deleted": True,
        "tailor": {"erasure": erasure},
    }
    receipt = await receipt_of(acme.client, erasure)
    stated = verify_shown(receipt["statement"], receipt["signature"], await keys_of(acme), Kind.ERASURE)
    assert (stated["scope"], stated["subject"], stated["adapter"]) == ("job", made["id"], "bot")
    assert [(version["number"], version["content"]) for version in stated["versions"]] == [(2, "erased")]
    assert [(file["id"], file["kind"], file["blob"]) for file in stated["files"]] == [
        (result_file, "fine-tune-results", "erased")
    ]
    assert [part["outcome"] for part in stated["replicas"]] == ["erased"]
    assert points[1].digest not in replica.disk
    for path in (job, f"{job}/events", f"{job}/checkpoints", f"/v1/files/{result_file}"):
        assert (await acme.client.get(path)).status_code == 404
    assert (await acme.client.delete(job)).status_code == 404
    assert {name: (await acme.ask(name)).status_code for name in (*names, "bot", "bot:early")} == {
        names[0]: 404, names[1]: 404, "bot": 200, "bot:early": 200,
    }  # fmt: skip
    left = (await acme.client.get("/v1/adapters/bot")).json()["versions"]
    assert [version["digest"] for version in left] == [result.digest, points[0].digest]
    again = (await acme.client.post(JOBS, json=asked, headers=headers)).json()
    assert (again["id"], again["metadata"]) == (made["id"], {})
    assert await gateway.tables_with("crimson") == set()
    assert await gateway.tables_with(points[1].digest) == {"erasures"}


async def test_a_job_that_came_to_nothing_leaves_nothing(
    gateway: Gateway, acme: Tenant, openai: AsyncOpenAI, file_id: str, trainer: Trainer, tmp_path: Path
) -> None:
    """Cancelled after a checkpoint and a save, then erased: the adapter that it had begun is gone, and every blob."""
    kept = gateway.shelf.keys()
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id, suffix="bot")
    claimed = await trainer.claim()
    await trainer.checkpoint(claimed, 1)
    (tmp_path / "step-1").write_bytes(b"a run at rest")
    await saved_runs.keep(gateway.parts.engine, gateway.parts.store._blobs, claimed, 1, tmp_path / "step-1")
    live = asyncio.create_task(acme.client.get(f"{JOBS}/{job.id}/events?stream=true"))
    await openai.fine_tuning.jobs.cancel(job.id)
    gone = await acme.client.delete(f"{JOBS}/{job.id}")
    receipt = await receipt_of(acme.client, gone.json()["tailor"]["erasure"])
    assert [file["kind"] for file in receipt["statement"]["files"]] == ["saved-run"]
    assert gateway.shelf.keys() == kept
    assert (await acme.client.get("/v1/adapters/bot")).status_code == 404
    assert (await live).text.endswith("data: [DONE]\n\n")
    with pytest.raises(LeaseLost):
        await trainer.train(claimed, 2)


async def test_a_checkpoint_that_answers_keeps_its_job_without_force(
    gateway: Gateway, acme: Tenant, openai: AsyncOpenAI, file_id: str, trainer: Trainer, replica: FakeReplica
) -> None:
    """409 while a stream runs on it; with force the stream ends whole."""
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id, suffix="bot")
    claimed = await trainer.claim()
    await trainer.checkpoint(claimed, 1)
    await openai.fine_tuning.jobs.cancel(job.id)
    (point,) = (await openai.fine_tuning.jobs.checkpoints.list(job.id)).data
    replica.events, replica.faults.event_delay_s = 50, 0.05
    body = {"model": point.fine_tuned_model_checkpoint, "stream": True, "messages": [{"role": "user", "content": "?"}]}
    async with acme.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        refused = await acme.client.delete(f"{JOBS}/{job.id}")
        assert (refused.status_code, error_of(refused)["code"]) == (409, "version_in_use")
        assert (await openai.fine_tuning.jobs.retrieve(job.id)).status == "cancelled"
        erasing = asyncio.create_task(acme.client.delete(f"{JOBS}/{job.id}?force=true"))
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert (await receipt_of(acme.client, (await erasing).json()["tailor"]["erasure"]))["statement"]["forced"]


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"training_file": "PAIRS", "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}


HYPER = "method.supervised.hyperparameters"
BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": None}, 400, "model", "invalid_value"),
    ({"model": "gpt-4o-mini"}, 400, "model", "not_servable"),
    ({"model": ""}, 400, "model", "invalid_value"),
    ({"model": "x\0y"}, 400, "model", "invalid_value"),
    ({"model": "ft:base::nobody:" + "0" * 24}, 400, "model", "not_servable"),
    ({"training_file": None}, 400, "training_file", "invalid_value"),
    ({"training_file": "file-none"}, 400, "training_file", "invalid_file_id"),
    ({"training_file": "OTHERS"}, 400, "training_file", "invalid_file_id"),
    ({"training_file": "PAIRS"}, 400, "training_file", "invalid_file_id"),
    ({"validation_file": "file-none"}, 400, "validation_file", "invalid_file_id"),
    ({"validation_file": "CHAT"}, 400, "validation_file", "invalid_file_id"),
    ({"validation_file": "PAIRS"}, 400, "validation_file", "invalid_file_id"),
    ({"suffix": ""}, 400, "suffix", "invalid_value"),
    ({"suffix": "x" * 65}, 400, "suffix", "invalid_value"),
    ({"suffix": "My Bot!"}, 400, "suffix", "invalid_value"),
    ({"suffix": BASE}, 400, "suffix", "invalid_value"),
    ({"seed": -1}, 400, "seed", "invalid_value"),
    ({"seed": 2**31}, 400, "seed", "invalid_value"),
    ({"seed": "7"}, 400, "seed", "invalid_value"),
    ({"metadata": {str(n): "v" for n in range(17)}}, 400, "metadata", "invalid_value"),
    ({"metadata": {"k" * 65: "v"}}, 400, "metadata", "invalid_value"),
    ({"metadata": {"": "v"}}, 400, "metadata", "invalid_value"),
    ({"metadata": {"k": "v" * 513}}, 400, "metadata", "invalid_value"),
    ({"metadata": {"k": 7}}, 400, "metadata.k", "invalid_value"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "integrations", "invalid_value"),
    ({"colour": "red"}, 400, "colour", "invalid_value"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, 400, "method.type", "not_servable"),
    ({"method": {"type": "magic"}}, 400, "method.type", "invalid_value"),
    ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo", "invalid_value"),
    ({**supervised(n_epochs=2), "hyperparameters": {"n_epochs": 2}}, 400, "hyperparameters", "invalid_value"),
    ({"hyperparameters": {"n_epochs": 51}}, 400, "hyperparameters.n_epochs", "invalid_value"),
    (supervised(n_epochs=0), 400, f"{HYPER}.n_epochs", "invalid_value"),
    (supervised(n_epochs=51), 400, f"{HYPER}.n_epochs", "invalid_value"),
    (supervised(n_epochs="many"), 400, f"{HYPER}.n_epochs", "invalid_value"),
    (supervised(n_epochs=2.5), 400, f"{HYPER}.n_epochs", "invalid_value"),
    (supervised(n_epochs=True), 400, f"{HYPER}.n_epochs", "invalid_value"),
    (supervised(batch_size=0), 400, f"{HYPER}.batch_size", "invalid_value"),
    (supervised(batch_size=257), 400, f"{HYPER}.batch_size", "invalid_value"),
    (supervised(learning_rate_multiplier=0), 400, f"{HYPER}.learning_rate_multiplier", "invalid_value"),
    (supervised(learning_rate_multiplier=-1), 400, f"{HYPER}.learning_rate_multiplier", "invalid_value"),
    (supervised(learning_rate_multiplier=999), 400, f"{HYPER}.learning_rate_multiplier", "invalid_value"),
    (supervised(beta=0.1), 400, f"{HYPER}.beta", "invalid_value"),
    (dpo(beta=0), 400, "method.dpo.hyperparameters.beta", "invalid_value"),
    (dpo(beta=2.1), 400, "method.dpo.hyperparameters.beta", "invalid_value"),
    ({**dpo(), "training_file": "CHAT"}, 400, "training_file", "invalid_file_id"),
    ({"tailor": {"rank": 0}}, 400, "tailor.rank", "invalid_value"),
    ({"tailor": {"rank": 128}}, 400, "tailor.rank", "not_servable"),
    ({"tailor": {"target_modules": ["q_prj", "v_proj"]}}, 400, "tailor.target_modules", "not_servable"),
    ({"tailor": {"target_modules": [".*"]}}, 400, "tailor.target_modules.0", "invalid_value"),
    ({"tailor": {"from": "nobody@3"}}, 404, "tailor.from", "model_not_found"),
    ({"tailor": {"alias": "Pro d"}}, 400, "alias", "alias_invalid"),
    ({"tailor": {"sft_weight": 0.5}}, 400, "tailor.sft_weight", "invalid_value"),
    ({"tailor": {"sft_weight": -1}}, 400, "tailor.sft_weight", "invalid_value"),
    ({"tailor": {"quantization": "int8"}}, 400, "tailor.quantization", "invalid_value"),
    ({"tailor": {"early_stopping_patience": 3}}, 400, "tailor.early_stopping_patience", "invalid_value"),
    ({"tailor": {"speed": 3}}, 400, "tailor.speed", "invalid_value"),
]  # fmt: skip


async def test_bad_jobs(openai: AsyncOpenAI, gateway: Gateway, globex: Tenant, acme: Tenant) -> None:
    """Each is refused with OpenAI's error object, the field named; none leaves a job behind."""
    files = {"CHAT": await upload(openai), "PAIRS": await upload(openai, PAIRS)}
    files["OTHERS"] = await upload(client_of(gateway, globex.key))
    wrong = []
    for given, status, param, code in BAD:
        asked = {"model": BASE, "training_file": "CHAT", **given}
        asked = {name: files.get(value, value) if name.endswith("_file") else value for name, value in asked.items()}
        answer = await acme.client.post("/v1/fine_tuning/jobs", json={k: v for k, v in asked.items() if v is not None})
        error = answer.json().get("error", {})
        if code == "not_servable":
            assert error["nearest"] and str(error["message"]), error  # noqa: PT018
        if (answer.status_code, error.get("param"), error.get("code")) != (status, param, code):
            wrong.append((given, answer.status_code, error))
        assert set(error) - {"nearest"} == {"message", "type", "param", "code"}
    assert wrong == []
    assert len(BAD) >= 30
    assert (await acme.client.get("/v1/fine_tuning/jobs")).json() == {"object": "list", "data": [], "has_more": False}
    missing = await acme.client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": "file-none"})
    others = await acme.client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": files["OTHERS"]})
    assert error_of(missing)["message"] == error_of(others)["message"].replace(files["OTHERS"], "file-none")


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("jobs/ftjob-none", 404, "fine_tune_id"),
        ("jobs/ftjob-none/events", 404, "fine_tune_id"),
        ("jobs/ftjob-none/events?stream=true", 404, "fine_tune_id"),
        ("jobs/ftjob-none/checkpoints", 404, "fine_tune_id"),
        ("jobs?limit=0", 400, "limit"),
        ("jobs?limit=x", 400, "limit"),
        (f"jobs?metadata[{'k' * 65}]=v", 400, "metadata"),
        (f"jobs?after={'x' * 65}", 400, "after"),
    ],
)
async def test_bad_questions(acme: Tenant, path: str, status: int, param: str) -> None:
    """What is asked of no job, or out of bounds, is told in the same envelope."""
    answer = await acme.client.get(f"/v1/fine_tuning/{path}")
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


async def test_an_event_of_another_job_is_no_place_to_go_on_from(openai: AsyncOpenAI, file_id: str) -> None:
    """`after` names an event of this job."""
    one, two = [await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id) for _ in range(2)]
    (event, *_) = (await openai.fine_tuning.jobs.list_events(one.id)).data
    with pytest.raises(BadRequestError) as refused:
        await openai.fine_tuning.jobs.list_events(two.id, after=event.id)
    assert refused.value.param == "after"


async def test_the_tenants_of_two_jobs(gateway: Gateway, acme: Tenant, globex: Tenant, openai: AsyncOpenAI) -> None:
    """Another tenant's job is a missing one, in every call."""
    file_id = await upload(openai)
    job = await openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    other = client_of(gateway, globex.key).fine_tuning.jobs
    for call in (other.retrieve, other.cancel, other.pause, other.resume, other.list_events, other.checkpoints.list):
        with pytest.raises(NotFoundError) as foreign:
            await call(job.id)
        with pytest.raises(NotFoundError) as missing:
            await call("ftjob-none")
        assert str(foreign.value.body).replace(job.id, "ftjob-none") == str(missing.value.body)
    assert TenantId(job.organization_id) == (await gateway.operator.get("/admin/v1/tenants/acme")).json()["id"]
