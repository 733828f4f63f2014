"""Jobs from the queue to a version: together, alone, paused, cancelled, lost, failed; each has its effect once."""

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_store.bundle import WEIGHTS_FILE
from adapter_store.ids import TenantId
from adapter_store.transactions import reading
from gateway import training_worker
from gateway.settings import Settings
from gateway.tenants import Tenants
from tests.integration.training.conftest import OTHER, RECIPE, TENANT, Desk, chats, saves
from tests.waiting import until
from training import evaluations, queue
from training.files import Purpose
from training.jobs import JobError, Status
from training.material import Material
from training.saved_runs import sweep
from training.warm_base import Run, StepReport, WarmBase

STEPS = list(range(1, 10))


class Watched(WarmBase):
    """Tells of each batch before it is stepped, in torch's thread."""

    def __init__(self, warm: WarmBase, before: Callable[[Sequence[Run]], None]) -> None:
        self.__dict__.update(warm.__dict__)
        self._before = before

    def step(self, runs: Sequence[Run]) -> list[StepReport]:
        self._before(runs)
        return super().step(runs)


class Gate:
    """Holds the worker before a step of a run until it is opened."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._here, self._go = threading.Event(), threading.Event()

    def before(self, runs: Sequence[Run]) -> None:
        if any(run.step + 1 == self._step for run in runs):
            self._here.set()
            assert self._go.wait(60)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """While the worker waits there."""
        assert await asyncio.to_thread(self._here.wait, 60)
        try:
            yield
        finally:
            self._go.set()


def alone(warm: WarmBase, folder: Path, content: bytes, **recipe: Any) -> str:
    """SHA-256 of the weights that a job gives that nothing happens to."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "data.jsonl").write_bytes(content)
    material = Material("supervised", {**RECIPE, **recipe}, folder / "data.jsonl", None, None, folder)
    run = warm.begin(material)
    while not run.done:
        warm.step([run])
    return hashlib.sha256((warm.write_adapter(run, folder / "adapter") / WEIGHTS_FILE).read_bytes()).hexdigest()


async def test_a_job_becomes_a_version_with_metrics_checkpoints_and_a_result_file(desk: Desk, warm: WarmBase) -> None:
    """What OpenAI tells of a job, told; its version stands behind its alias, each epoch's under a name of its own."""
    job = await desk.job(validation_file=await desk.file(chats(4, seed=1)))
    async with desk.working(warm):
        done = await desk.ended(job)
    assert done.status is Status.SUCCEEDED, done.error
    assert await desk.steps(job) == STEPS
    told = await desk.told(job)
    assert told[:4] == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Training from step 0 of 9, on cpu, 1 thread",
    ]
    assert told[-1] == "The job has successfully completed"
    assert any(line.startswith("On 4 validation examples: exact match") for line in told), told
    assert done.fine_tuned_model is not None
    for name in ("bot", done.fine_tuned_model):
        found = await desk.store.resolve(TENANT, name)
        assert found.id == done.version_id  # type: ignore[union-attr]
    points = await desk.jobs.checkpoints(TENANT, job.id)
    assert [point.step for point in points] == [9, 6, 3]
    assert {"train_loss", "valid_loss", "full_valid_loss", "full_valid_mean_token_accuracy"} <= set(points[0].metrics)
    assert {"eval_loss", "eval_base_loss", "eval_exact_match", "eval_regression"} <= set(points[0].metrics)
    assert done.version_id is not None
    async with reading(desk.engine) as connection:
        report = await evaluations.of(connection, done.version_id)
    assert report is not None
    assert (report["examples"], report["previous"], report["is_regression"]) == (4, None, False)
    assert len({point.version_id for point in points}) == len(await desk.versions()) == 3
    (result,) = [await desk.files.find(TENANT, file_id) for file_id in done.result_files]
    assert (result.purpose, result.filename) == (Purpose.RESULTS, "step_metrics.csv")
    async with desk.files.read(result) as pieces:
        lines = b"".join([piece async for piece in pieces]).decode().splitlines()
    assert lines[0].startswith("step,train_loss,train_accuracy,valid_loss")
    assert [int(line.split(",")[0]) for line in lines[1:]] == STEPS
    assert done.trained_tokens > 0
    assert await saves(desk) == []


async def test_a_worker_takes_no_job_of_a_suspended_tenant(desk: Desk, warm: WarmBase) -> None:
    """As `tailor worker` is put together: it waits, until the tenant is let go on; another's is trained meanwhile."""
    options = training_worker._options(Settings(_env_file=None, home=desk.home), desk.base.fingerprint)
    tenants = Tenants(desk.engine)
    mine, other = [(await tenants.create(name)).id for name in ("acme", "globex")]
    await tenants.change("acme", suspended=True)
    waiting, trained = [await desk.job(tenant=tenant) for tenant in (mine, other)]
    async with desk.working(warm, held_back=options.held_back):
        assert (await desk.ended(trained)).status is Status.SUCCEEDED
        assert (await desk.find(waiting)).status is Status.QUEUED
        await tenants.change("acme", suspended=False)
        assert (await desk.ended(waiting)).status is Status.SUCCEEDED


async def test_rows_that_validation_shares_with_training_are_told(desk: Desk, warm: WarmBase) -> None:
    """As a warning among the job's events, once, and the job goes on."""
    job = await desk.job(validation_file=await desk.file(chats(2) + chats(2, seed=1)))
    async with desk.working(warm):
        assert (await desk.ended(job)).status is Status.SUCCEEDED
    warned = [told for told in await desk.told(job) if "Validation will look better" in told]
    shared = "rows of the validation file that are in the training file too: 2 (line 1, 2)"
    assert warned == [f"Validation will look better than it is: {shared}"]


async def test_jobs_of_several_tenants_share_a_batch_and_change_nothing_in_each_other(
    desk: Desk, warm: WarmBase
) -> None:
    """Different data, ranks and rates, joining and leaving: the same bits as alone, and one batch for all of them."""
    tenants = [TenantId(f"ten_{letter}") for letter in "abcd"]
    recipes = [{"rank": 4 + number, "epochs": 2 + number, "learning_rate": 1e-3 * (1 + number)} for number in range(4)]
    contents = [chats(8 + 4 * number, seed=number) for number in range(4)]
    expected = [alone(warm, desk.home, content, **recipe) for content, recipe in zip(contents, recipes, strict=True)]
    batches: list[int] = []
    jobs = [
        await desk.job(content, tenant=tenant, recipe=recipe)
        for tenant, content, recipe in zip(tenants, contents, recipes, strict=True)
    ]
    async with desk.working(Watched(warm, lambda runs: batches.append(len(runs)))):
        done = [await desk.ended(job) for job in jobs]
    assert [job.status for job in done] == [Status.SUCCEEDED] * 4
    assert [await desk.weights(job) for job in done] == expected
    assert len(set(expected)) == 4
    assert max(batches) == 4


async def test_a_batch_holds_as_many_tokens_as_it_may_and_each_job_has_its_turn(desk: Desk, warm: WarmBase) -> None:
    """With room for one job and a half, two are taken in and step in turn."""
    batches: list[int] = []
    jobs = [await desk.job(chats(seed=number), tenant=tenant) for number, tenant in enumerate((TENANT, OTHER))]
    async with desk.working(Watched(warm, lambda runs: batches.append(len(runs))), tokens=100):
        done = [await desk.ended(job) for job in jobs]
    assert [job.status for job in done] == [Status.SUCCEEDED] * 2
    assert set(batches) == {1}
    assert len(batches) == 18


async def test_a_paused_job_goes_on_to_the_same_bytes(desk: Desk, warm: WarmBase) -> None:
    """Paused in the middle of a step, resumed later: saved in between, no step told twice, the result as without."""
    expected = alone(warm, desk.home, chats())
    job, gate = await desk.job(), Gate(5)
    async with desk.working(Watched(warm, gate.before)):
        async with gate.held():
            await desk.jobs.pause(TENANT, job.id)
            await asyncio.sleep(0.5)  # some renewals; without one the worker would hear of it a step later
        paused = await desk.reached(job, lambda now: now.status is Status.PAUSED)
    assert paused.saved is not None
    assert paused.saved.step == paused.step == 5
    assert len(await saves(desk)) == 1
    await desk.jobs.resume(TENANT, job.id)
    async with desk.working(warm):
        done = await desk.ended(job)
    assert await desk.weights(done) == expected
    assert await desk.steps(job) == STEPS
    assert "Fine-tuning job goes on from step 5" in await desk.told(job)


async def test_a_cancelled_job_leaves_nothing(desk: Desk, warm: WarmBase) -> None:
    """Cancelled in the middle of a step: no version, no save, and the worker goes on with another job."""
    job, gate = await desk.job(), Gate(2)
    async with desk.working(Watched(warm, gate.before)):
        async with gate.held():
            await desk.jobs.cancel(TENANT, job.id)
        other = await desk.ended(await desk.job(tenant=OTHER))
    assert other.status is Status.SUCCEEDED
    assert (await desk.find(job)).status is Status.CANCELLED
    assert (await desk.told(job))[-1] == "The job was cancelled"
    assert await desk.store.list(TENANT) == ()
    assert await saves(desk) == []


class SlowSave(WarmBase):
    """Its first save waits, in torch's thread, until it may begin."""

    def __init__(self, warm: WarmBase) -> None:
        self.__dict__.update(warm.__dict__)
        self.here, self.go = threading.Event(), threading.Event()

    def save(self, run: Run, folder: Path) -> Path:
        self.here.set()
        assert self.go.wait(60)
        return super().save(run, folder)


async def test_a_lease_that_is_lost_while_it_is_saved_leaves_nothing(desk: Desk, warm: WarmBase) -> None:
    """The job's folder stays until the save is over, then it goes; the worker goes on with another job."""
    job, slow = await desk.job(), SlowSave(warm)
    async with desk.working(slow) as worker:
        assert await asyncio.to_thread(slow.here.wait, 60)
        await desk.jobs.cancel(TENANT, job.id)
        [lease] = worker._leases
        async with asyncio.timeout(60):
            while not lease.is_over:  # it hears so when it tells of the step
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        slow.go.set()
        other = await desk.ended(await desk.job(tenant=OTHER))
    assert other.status is Status.SUCCEEDED
    assert await saves(desk) == []
    assert not any(desk.results.staging.root.iterdir())


async def test_a_run_that_meets_nan_fails_alone(desk: Desk, warm: WarmBase) -> None:
    """Its error names the step; the others of the batch end as if they had been alone."""
    expected = alone(warm, desk.home, chats(seed=1))
    bad = await desk.job(recipe={"seed": 13})

    def spoil(runs: Sequence[Run]) -> None:
        for run in runs:
            if run.spec.hyperparameters.seed == 13 and run.step == 3:
                run.weights.fill_(float("nan"))

    good = await desk.job(chats(seed=1), tenant=OTHER)
    async with desk.working(Watched(warm, spoil)):
        failed, done = await desk.ended(bad), await desk.ended(good)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("loss_not_finite", "hyperparameters")
    assert "at step 4" in failed.error.message
    assert await desk.weights(done) == expected
    assert await desk.steps(bad) == [1, 2, 3]


async def test_an_error_of_ours_in_one_job_fails_that_one(desk: Desk, warm: WarmBase) -> None:
    """Whose it is shows when each of the batch is tried alone; nothing of the error's text is told."""
    expected = alone(warm, desk.home, chats(seed=1))

    def break_down(runs: Sequence[Run]) -> None:
        if any(run.spec.hyperparameters.seed == 13 for run in runs):
            raise RuntimeError("a secret path")

    bad, good = await desk.job(recipe={"seed": 13}), await desk.job(chats(seed=1), tenant=OTHER)
    async with desk.working(Watched(warm, break_down)):
        failed, done = await desk.ended(bad), await desk.ended(good)
    assert failed.error is not None
    assert failed.error.code == "server_error"
    assert "secret" not in failed.error.message
    assert await desk.weights(done) == expected


BAD_ROWS = b'{"messages": [{"role": "user", "content": "who?"}]}\n'


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"content": BAD_ROWS}, ("invalid_training_file", "training_file")),
        ({"training_file": "file-0"}, ("file_not_found", "training_file")),
        ({"warm_start": "ver_0"}, ("model_not_found", "model")),
        ({"recipe": {"rank": 0}}, ("invalid_hyperparameters", "hyperparameters")),
        ({"recipe": {"target_modules": ["nothing"]}}, ("training_failed", None)),
    ],
)
async def test_what_cannot_be_trained_fails_with_the_reason(
    desk: Desk, warm: WarmBase, more: dict[str, Any], error: tuple[str, str | None]
) -> None:
    """As OpenAI tells errors of a job: a code, a message, and what of the request is to blame."""
    job = await desk.job(**more)
    async with desk.working(warm):
        failed = await desk.ended(job)
    assert isinstance(failed.error, JobError)
    assert (failed.error.code, failed.error.param) == error
    assert failed.error.message


async def test_a_job_goes_on_from_a_version(desk: Desk, warm: WarmBase) -> None:
    """The adapter of the first job is where the second one begins: its first loss is below the first one's last."""
    first = await desk.job(recipe={"epochs": 10})
    async with desk.working(warm):
        version = (await desk.ended(first)).version_id
        second = await desk.ended(await desk.job(warm_start=version))
    assert second.status is Status.SUCCEEDED, second.error
    losses = [[e.told.data["train_loss"] for e in await desk.events(job) if e.told.data] for job in (first, second)]
    assert losses[1][0] < losses[0][0] - 1


async def test_a_worker_that_lost_its_lease_writes_nothing_more(desk: Desk, warm: WarmBase) -> None:
    """Another worker has the job: this one drops it, and the other's result is the only one."""
    expected = alone(warm, desk.home, chats())
    job, gate = await desk.job(), Gate(5)
    async with desk.working(Watched(warm, gate.before)) as worker:
        async with gate.held():
            later = desk.results.now + 100
            (stolen,) = await queue.claim(
                desk.engine, "thief", base_fingerprint=desk.base.fingerprint, now=later, most=1
            )
        await until(lambda: worker.is_idle)
        assert (await desk.find(job)).worker == "thief"
        assert max(await desk.steps(job), default=0) <= 5
    await queue.release(desk.engine, stolen, now=later)
    async with desk.working(warm):
        done = await desk.ended(job)
    assert await desk.weights(done) == expected
    assert await desk.steps(job) == STEPS
    assert len(await desk.versions()) == 3


async def test_a_worker_that_stops_gives_its_jobs_back(desk: Desk, warm: WarmBase) -> None:
    """Saved where they are, in the queue at once, for another worker to go on with to the same bytes."""
    expected = alone(warm, desk.home, chats())
    job, gate = await desk.job(), Gate(4)
    async with desk.working(Watched(warm, gate.before)), gate.held():
        pass
    given = await desk.find(job)
    assert given.status is Status.QUEUED
    assert given.saved is not None
    assert given.saved.step >= 4
    async with desk.working(warm):
        assert await desk.weights(await desk.ended(job)) == expected


@pytest.mark.local
async def test_training_goes_on_while_the_database_is_away(
    desk: Desk, warm: WarmBase, caplog: pytest.LogCaptureFixture
) -> None:
    """What is to be told waits; the job ends when the database is back, with nothing lost."""
    expected = alone(warm, desk.home, chats())
    path = desk.home.parent / "tailor.db"
    job, gate = await desk.job(), Gate(3)
    async with desk.working(Watched(warm, gate.before)):
        async with gate.held():
            for suffix in ("", "-wal", "-shm"):
                if (part := path.with_name(path.name + suffix)).exists():
                    part.rename(path.with_name(f"away{suffix}"))
        await until(lambda: "leases are not renewed" in caplog.text and "tried again" in caplog.text)
        for suffix in ("", "-wal", "-shm"):
            if (part := path.with_name(f"away{suffix}")).exists():
                part.rename(path.with_name(path.name + suffix))
        done = await desk.ended(job)
    assert await desk.weights(done) == expected
    assert await desk.steps(job) == STEPS


@pytest.mark.local
async def test_a_full_or_broken_blob_store_is_waited_for(
    desk: Desk, warm: WarmBase, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither saves nor the end can be written: the job is still there when they can."""
    job, gate = await desk.job(), Gate(3)
    folder = desk.place.folder
    assert folder is not None
    async with desk.working(Watched(warm, gate.before)):
        async with gate.held():
            folder.rename(folder.with_name("away"))
            folder.write_text("a file where a folder should be")
        await until(lambda: "tried again" in caplog.text)
        folder.unlink()
        folder.with_name("away").rename(folder)
        done = await desk.ended(job)
    assert done.status is Status.SUCCEEDED
    assert await desk.steps(job) == STEPS


async def test_a_damaged_save_costs_time_and_nothing_else(desk: Desk, warm: WarmBase) -> None:
    """It is passed over: the job begins anew, and ends with the same bytes."""
    expected = alone(warm, desk.home, chats())
    job, gate = await desk.job(), Gate(6)
    async with desk.working(Watched(warm, gate.before)), gate.held():
        pass
    (key,) = await saves(desk)
    desk.shelf.flip(key, 1_000)
    async with desk.working(warm):
        assert await desk.weights(await desk.ended(job)) == expected
    began = [told for told in await desk.told(job) if told.startswith("Training from step")]
    assert began == ["Training from step 0 of 9, on cpu, 1 thread"] * 2  # the first worker's, and the second's


async def test_what_dead_workers_and_ended_jobs_leave_is_swept(desk: Desk, warm: WarmBase) -> None:
    """A paused job's save stays as long as the job may go on."""
    job = await desk.job()
    gate = Gate(4)
    async with desk.working(Watched(warm, gate.before)), gate.held():
        pass
    await desk.jobs.pause(TENANT, job.id)
    (kept,) = await saves(desk)
    desk.shelf.write(f"{kept[:-4]}abcd", b"of a worker that died before it noted it")
    assert await sweep(desk.engine, desk.blobs) == 0
    assert await desk.store.collect_orphans(older_than_s=-1) == 1
    assert await saves(desk) == [kept]
    await desk.jobs.cancel(TENANT, job.id)
    assert await desk.store.collect_orphans(older_than_s=-1) == 0
    assert await sweep(desk.engine, desk.blobs) == 1
    assert await saves(desk) == []
    assert (await desk.find(job)).saved is None
