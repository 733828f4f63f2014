"""Jobs in the database: what clients and workers may do with them, whatever happens in between."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store import catalog
from adapter_store.catalog import Provenance, Version
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection
from adapter_store.ids import TenantId, new_version_id
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from gateway.tenants import SUSPENDED, Tenants
from training import queue
from training.errors import JobNotFound, LeaseLost, StateConflict, TooManyQueued
from training.jobs import (
    OVER,
    TRANSITIONS,
    Event,
    Job,
    JobError,
    JobId,
    Jobs,
    NewJob,
    Saved,
    Status,
    Terms,
    event_number,
)
from training.queue import CheckpointWith, Claimed, EndWith, Metrics, Order

TENANT = TenantId("ten_a")
OTHER = TenantId("ten_b")
BASE = "0" * 64
LEASE_S = queue.LEASE_S


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    @property
    def second(self) -> int:
        return int(self.now)


def new_job(tenant: TenantId = TENANT, **more: object) -> NewJob:
    new = NewJob(
        tenant_id=tenant,
        created_by="key_1",
        model="base",
        base_fingerprint=BASE,
        method="supervised",
        training_file="file-1",
        seed=7,
        recipe={"rank": 8},
        adapter="bot",
    )
    return replace(new, **more)  # type: ignore[arg-type]


def saved(step: int) -> Saved:
    return Saved(step, f"step-{step}", f"{step:02x}" * 32, 10)


def metrics(step: int) -> Metrics:
    return Metrics(step, train_loss=2.0 / step, train_accuracy=0.5, tokens=10)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(engine: AsyncEngine, clock: Clock) -> Jobs:
    return Jobs(engine, clock=clock)


@dataclass
class Worker:
    """One that does what it is told by the test."""

    engine: AsyncEngine
    clock: Clock
    name: str = "w1"
    held: list[Claimed] = field(default_factory=list)

    async def claim(self, most: int = 1, *, held_back: queue.HeldBack | None = None, **more: int) -> list[Claimed]:
        found = await queue.claim(
            self.engine,
            self.name,
            base_fingerprint=BASE,
            now=self.clock.second,
            most=most,
            held_back=held_back,
            **more,
        )
        self.held += found
        return found

    async def report(self, claimed: Claimed, *steps: int, save: int | None = None, total: int | None = 10) -> None:
        await queue.report(
            self.engine,
            claimed,
            now=self.clock.second,
            metrics=[metrics(step) for step in steps],
            total_steps=total,
        )
        if save is not None:
            await self.save(claimed, save)

    async def save(self, claimed: Claimed, step: int) -> None:
        async with writing(self.engine) as connection:
            await queue.note_saved(connection, claimed, saved(step))

    async def publish(self, claimed: Claimed, together: Together[Version], digest: str) -> Version:
        """What the store does in its transaction, without the files."""
        async with writing(self.engine) as connection:
            await take_turn(connection)
            await together.before(connection)
            made = await put_version(connection, claimed.job.tenant_id, claimed.job.adapter, digest)
            await together.after(connection, made)
        return made

    async def checkpoint(self, claimed: Claimed, step: int) -> Version:
        together = CheckpointWith(
            claimed, step, {"train_loss": 0.5, "valid_loss": float("nan")}, now=self.clock, name_of=fine_tuned_name
        )
        return await self.publish(claimed, together, f"{claimed.job.id}-{step}")

    async def end(self, claimed: Claimed) -> Version:
        async def also(_: AsyncConnection, __: Version) -> Sequence[str]:
            return ["file-result"]

        together = EndWith(claimed, now=self.clock, name_of=fine_tuned_name, also=also)
        return await self.publish(claimed, together, f"{claimed.job.id}-end-{random.random()}")

    async def orders(self, *claimed: Claimed) -> list[Order]:
        found = await queue.renew(self.engine, claimed, now=self.clock.second)
        return [found[one.job.id] for one in claimed]


def fine_tuned_name(version: Version) -> str:
    return f"ft:base::{version.adapter_name}:{version.id.removeprefix('ver_')}"


async def put_version(connection: AsyncConnection, tenant: TenantId, name: str, digest: str) -> Version:
    found = await catalog.find_by_digest(connection, tenant, name, digest)
    if found is not None:
        return found
    adapter_id = await catalog.ensure_adapter(connection, tenant, name, 1)
    number = await catalog.take_number(connection, adapter_id)
    made = Version(
        new_version_id(), adapter_id, tenant, name, number, digest, bytes(64), 1, 1, 8, ("q_proj",), BASE,
        Provenance.JOB, 1,
    )  # fmt: skip
    await catalog.insert_version(connection, made)
    return made


@pytest.fixture
def worker(engine: AsyncEngine, clock: Clock) -> Worker:
    return Worker(engine, clock)


async def story(jobs: Jobs, job: Job) -> list[str]:
    found: Sequence[Event] = await jobs.events(job.tenant_id, job.id, after=0, limit=1_000)
    return [event.told.message for event in found]


async def test_a_job_from_queue_to_model(jobs: Jobs, worker: Worker) -> None:
    """Created, claimed, reported, saved, a checkpoint on the way, and its end with version and files at once."""
    made = await jobs.create(new_job(suffix="bot", metadata={"team": "red"}, hyperparameters={"n_epochs": 3}))
    assert (made.status, made.metadata, made.hyperparameters) == (Status.QUEUED, {"team": "red"}, {"n_epochs": 3})
    (claimed,) = await worker.claim()
    assert claimed.job.status is Status.RUNNING
    assert claimed.job.epoch == 1
    assert await worker.claim() == []
    worker.clock.now += 10
    await worker.report(claimed, 1, 2, save=2)
    running = await jobs.find(TENANT, made.id)
    assert (running.step, running.total_steps, running.trained_tokens) == (2, 10, 20)
    assert running.saved == saved(2)
    assert running.estimated_finish == worker.clock.second + 40
    checkpoint = await worker.checkpoint(claimed, 2)
    assert (await worker.checkpoint(claimed, 2)).id == checkpoint.id
    version = await worker.end(claimed)
    over = await jobs.find(TENANT, made.id)
    assert over.status is Status.SUCCEEDED
    assert over.version_id == version.id
    assert over.fine_tuned_model == fine_tuned_name(version)
    assert over.result_files == ["file-result"]
    assert over.finished_at == worker.clock.second
    assert over.estimated_finish is None
    (point,) = await jobs.checkpoints(TENANT, made.id)
    assert point.model == f"{fine_tuned_name(checkpoint)}:ckpt-step-2"
    assert point.step == 2
    assert point.metrics == {"step": 2, "train_loss": 0.5}  # what is no number is left out
    assert await story(jobs, made) == [
        f"Created fine-tuning job: {made.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/10: training loss=2.00",
        "Step 2/10: training loss=1.00",
        "Checkpoint created at step 2",
        f"New fine-tuned model created: {fine_tuned_name(version)}",
        "The job has successfully completed",
    ]


async def test_another_tenants_job_is_a_missing_one(jobs: Jobs) -> None:
    """Every call with another tenant's id ends like one with an id that there is not."""
    made = await jobs.create(new_job())
    calls = (jobs.find, jobs.cancel, jobs.pause, jobs.resume, jobs.events, jobs.checkpoints)
    for call in calls:
        for asker, job_id in ((OTHER, made.id), (TENANT, JobId("ftjob-none"))):
            with pytest.raises(JobNotFound):
                await call(asker, job_id)
    assert await jobs.page(OTHER) == []
    assert (await jobs.find(TENANT, made.id)).status is Status.QUEUED


async def test_pages_of_jobs_and_events(jobs: Jobs, clock: Clock, worker: Worker) -> None:
    """The newest first, page after page; jobs by their metadata; events in both directions."""
    made = []
    for number in range(5):
        clock.now += 1
        made.append(await jobs.create(new_job(metadata={"n": str(number), "all": "yes"} if number else {})))
    first = await jobs.page(TENANT, limit=2)
    then = await jobs.page(TENANT, after=first[-1].id, limit=9)
    assert [job.id for job in (*first, *then)] == [job.id for job in reversed(made)]
    assert [job.id for job in await jobs.page(TENANT, metadata={"all": "yes", "n": "3"})] == [made[3].id]
    assert [job.id for job in await jobs.page(TENANT, metadata={})] == [made[0].id]
    assert await jobs.page(TENANT, metadata={"n": "yes"}) == []
    (claimed,) = await worker.claim()
    await worker.report(claimed, *range(1, 8))
    newest = await jobs.events(TENANT, claimed.job.id, limit=3)
    assert [event.number for event in newest] == [10, 9, 8]
    assert event_number(claimed.job.id, newest[-1].id) == 8
    assert event_number(made[4].id, newest[-1].id) is None
    assert [event.number for event in await jobs.events(TENANT, claimed.job.id, before=8, limit=2)] == [7, 6]
    assert [event.number for event in await jobs.events(TENANT, claimed.job.id, after=8)] == [9, 10]


async def test_a_worker_that_fell_silent_writes_nothing_more(jobs: Jobs, worker: Worker) -> None:
    """Its lease ends, another goes on from what was saved; nothing more is taken of the first."""
    made = await jobs.create(new_job())
    (old,) = await worker.claim()
    await worker.report(old, 1, 2, 3, save=2)
    worker.clock.now += LEASE_S - 1
    assert await worker.claim() == []
    assert await worker.orders(old) == [Order.GO_ON]
    worker.clock.now += LEASE_S
    other = Worker(worker.engine, worker.clock, "w2")
    (new,) = await other.claim()
    assert new.job.id == made.id
    assert new.job.epoch == 2
    assert new.job.saved == saved(2)
    for late in (
        worker.report(old, 4),
        worker.end(old),
        worker.checkpoint(old, 3),
        worker.save(old, 3),
        queue.fail(worker.engine, old, JobError("x", "x"), now=worker.clock.second),
        queue.release(worker.engine, old, now=worker.clock.second),
    ):
        with pytest.raises(LeaseLost):
            await late
    assert await worker.orders(
        old,
    ) == [Order.LOST]
    await other.report(new, 3, 4)
    found = await jobs.find(TENANT, made.id)
    assert (found.step, found.trained_tokens) == (4, 40)
    assert [text for text in await story(jobs, made) if text.startswith("Step")] == [
        f"Step {step}/10: training loss={2 / step:.2f}" for step in (1, 2, 3, 4)
    ]
    async with reading(worker.engine) as connection:
        table = (await queue.result_csv(connection, made.id)).decode()
    assert table.splitlines()[:2] == [",".join(queue.COLUMNS), "1,2.0,0.5,,"]


async def test_a_job_that_ends_its_workers_fails(jobs: Jobs, worker: Worker) -> None:
    """After so many leases that ended by themselves without a step further, and not before; a step starts the count."""
    made = await jobs.create(new_job())
    for lost in range(4):
        (claimed,) = await worker.claim(most_losses=2)
        if lost == 1:
            await worker.report(claimed, 1)
        worker.clock.now += LEASE_S
    assert await worker.claim(most_losses=2) == []
    found = await jobs.find(TENANT, made.id)
    assert found.status is Status.FAILED
    assert found.error is not None
    assert found.error.code == "worker_lost"
    assert "3 times at step 1" in found.error.message


async def test_pause_and_resume(jobs: Jobs, worker: Worker) -> None:
    """A waiting job is paused at once, a running one by its worker; it goes on from where it was."""
    made = await jobs.create(new_job())
    assert (await jobs.pause(TENANT, made.id)).status is Status.PAUSED
    assert await worker.claim() == []
    assert (await jobs.pause(TENANT, made.id)).status is Status.PAUSED
    assert (await jobs.resume(TENANT, made.id)).status is Status.QUEUED
    assert (await jobs.resume(TENANT, made.id)).status is Status.QUEUED
    (claimed,) = await worker.claim()
    assert (await jobs.pause(TENANT, made.id)).status is Status.RUNNING
    assert await worker.orders(claimed) == [Order.PAUSE]
    await worker.save(claimed, 5)
    await queue.release(worker.engine, claimed, now=worker.clock.second)
    assert await worker.orders(claimed) == [Order.LOST]
    held = await jobs.find(TENANT, made.id)
    assert held.status is Status.PAUSED
    assert held.saved == saved(5)
    assert held.wish is None
    await jobs.resume(TENANT, made.id)
    (again,) = await worker.claim()
    assert again.job.saved == saved(5)
    assert again.job.epoch == 2


async def test_a_pause_that_is_called_off(jobs: Jobs, worker: Worker) -> None:
    """Resumed before its worker has paused it, a job goes on; one that was already given back waits for the next."""
    made = await jobs.create(new_job())
    (claimed,) = await worker.claim()
    await jobs.pause(TENANT, made.id)
    await jobs.resume(TENANT, made.id)
    assert await worker.orders(claimed) == [Order.GO_ON]
    await queue.release(worker.engine, claimed, now=worker.clock.second)
    assert (await jobs.find(TENANT, made.id)).status is Status.QUEUED


async def test_a_pause_without_a_worker(jobs: Jobs, worker: Worker) -> None:
    """A job whose worker is gone is paused all the same: by the client at once, or by whoever claims next."""
    first, second = await jobs.create(new_job()), await jobs.create(new_job())
    await worker.claim(2)
    await jobs.pause(TENANT, first.id)
    worker.clock.now += LEASE_S
    assert (await jobs.pause(TENANT, second.id)).status is Status.PAUSED
    assert await worker.claim(2) == []
    assert (await jobs.find(TENANT, first.id)).status is Status.PAUSED


async def test_cancel_is_at_once(jobs: Jobs, worker: Worker) -> None:
    """Waiting, paused or running: it is over when this returns, and its worker is told to drop it."""
    made = [await jobs.create(new_job()) for _ in range(3)]
    await jobs.pause(TENANT, made[1].id)
    (claimed, _) = await worker.claim(2)
    for job in made:
        assert (await jobs.cancel(TENANT, job.id)).status is Status.CANCELLED
    assert await worker.orders(claimed) == [Order.CANCEL]
    with pytest.raises(LeaseLost):
        await worker.end(claimed)
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(StateConflict, match="is cancelled and cannot be"):
            await call(TENANT, claimed.job.id)
    assert await worker.claim(3) == []


async def test_tenants_take_turns(jobs: Jobs, worker: Worker, clock: Clock) -> None:
    """A flood of one tenant's jobs delays another's by one place; slots go by weight, then the least served is next."""
    for _ in range(6):
        clock.now += 1
        await jobs.create(new_job())
    for _ in range(2):
        await jobs.create(new_job(OTHER))
    assert [one.job.tenant_id for one in await worker.claim(3)] == [TENANT, OTHER, TENANT]
    for claimed in list(worker.held):
        await worker.report(claimed, *range(1, 5 if claimed.job.tenant_id == TENANT else 2))
        await worker.end(claimed)
    assert [one.job.tenant_id for one in await worker.claim(1)] == [OTHER]


async def test_weights_and_limits_of_plans(jobs: Jobs, worker: Worker) -> None:
    """Twice the weight, twice the places; no more run or wait than the plan lets."""
    for _ in range(6):
        await jobs.create(new_job(terms=Terms(weight=2.0)))
        await jobs.create(new_job(OTHER, terms=Terms(weight=1.0)))
    tenants = [one.job.tenant_id for one in await worker.claim(6)]
    assert (tenants.count(TENANT), tenants.count(OTHER)) == (4, 2)
    third = TenantId("ten_c")
    for _ in range(3):
        await jobs.create(new_job(third, terms=Terms(most_queued=3, most_running=1)))
    with pytest.raises(TooManyQueued):
        await jobs.create(new_job(third, terms=Terms(most_queued=3, most_running=1)))
    assert [one.job.tenant_id for one in await worker.claim(12)].count(third) == 1


async def test_one_who_comes_back_is_not_ahead_for_the_time_away(jobs: Jobs, worker: Worker) -> None:
    """Whoever had nothing to do is lifted to the least served of those who had, not served alone until even."""
    await jobs.create(new_job())
    (claimed,) = await worker.claim()
    await worker.report(claimed, *range(1, 100), total=1_000)
    await jobs.create(new_job(OTHER))
    (other,) = [one for one in await worker.claim() if one.job.tenant_id == OTHER]
    await worker.report(other, 1)
    for claimed in list(worker.held):
        await worker.end(claimed)
    await jobs.create(new_job(OTHER))
    await jobs.create(new_job())
    assert [one.job.tenant_id for one in await worker.claim(1)] == [TENANT]


async def test_jobs_of_a_suspended_tenant_wait(engine: AsyncEngine, jobs: Jobs, worker: Worker) -> None:
    """None of its is begun, others' are; one that runs goes on to its end; let go on, its turn comes as before."""
    tenants = Tenants(engine)
    mine, other = [(await tenants.create(name)).id for name in ("acme", "globex")]
    await jobs.create(new_job(mine))
    (running,) = await worker.claim(held_back=SUSPENDED)
    queued = {(await jobs.create(new_job(mine))).id for _ in range(2)}
    await tenants.change("acme", suspended=True)
    assert not await queue.is_work(engine, BASE, worker.clock.second, held_back=SUSPENDED)
    assert await worker.claim(3, held_back=SUSPENDED) == []
    await jobs.create(new_job(other))
    assert [one.job.tenant_id for one in await worker.claim(3, held_back=SUSPENDED)] == [other]
    assert await worker.orders(running) == [Order.GO_ON]
    await worker.end(running)
    assert (await jobs.find(mine, running.job.id)).status is Status.SUCCEEDED
    await tenants.change("acme", suspended=False)
    assert {one.job.id for one in await worker.claim(3, held_back=SUSPENDED)} == queued


async def test_jobs_of_another_base_are_left(jobs: Jobs, worker: Worker) -> None:
    """A worker is given jobs of its own base model only."""
    await jobs.create(new_job(base_fingerprint="1" * 64))
    assert await worker.claim() == []


async def test_what_is_created_together(jobs: Jobs) -> None:
    """What raises beside the job undoes it."""

    class Refuse(Together[Job]):
        async def after(self, connection: AsyncConnection, made: Job) -> None:
            raise ValueError(made.id)

    with pytest.raises(ValueError, match="ftjob-"):
        await jobs.create(new_job(), Refuse())
    assert await jobs.page(TENANT) == []


async def test_figures(jobs: Jobs, worker: Worker, clock: Clock) -> None:
    """How many wait and run, and since when the oldest waits."""
    assert await jobs.figures() == (0, 0, None)
    await jobs.create(new_job())
    clock.now += 5
    await jobs.create(new_job())
    await worker.claim()
    assert await jobs.figures() == (1, 1, clock.second)


# whatever happens

CLIENT = ("create", "cancel", "pause", "resume")
WORKER = ("claim", "claim", "renew", "report", "report", "save", "checkpoint", "end", "fail", "release", "paused")


@dataclass
class Chaos:
    """Two workers and a client, at random; workers use every lease they ever had."""

    jobs: Jobs
    workers: tuple[Worker, Worker]
    dice: random.Random
    tenant: TenantId
    one_at_a_time: bool
    made: list[JobId] = field(default_factory=list)

    async def act(self, who: int) -> None:
        """One action of the client (0), or of a worker."""
        if who == 0:
            await self._client(self.dice.choice(CLIENT))
        else:
            worker = self.workers[who - 1]
            action = self.dice.choice(WORKER)
            if action == "claim":
                await worker.claim(self.dice.randint(1, 2))
            elif worker.held:
                await self._work(worker, self.dice.choice(worker.held[-6:]), action)

    async def _client(self, action: str) -> None:
        if action == "create" or not self.made:
            if len(self.made) < 4:
                self.made.append((await self.jobs.create(new_job(self.tenant, adapter=None))).id)
        elif self.dice.random() < (0.3 if action == "cancel" else 1):
            call = {"cancel": self.jobs.cancel, "pause": self.jobs.pause, "resume": self.jobs.resume}[action]
            await call(self.tenant, self.dice.choice(self.made))

    async def _work(self, worker: Worker, claimed: Claimed, action: str) -> None:
        """Whoever holds the lease can do it, and nobody else."""
        now = await self.jobs.find(claimed.job.tenant_id, claimed.job.id)
        holds = now.status is Status.RUNNING and now.epoch == claimed.job.epoch
        try:
            await self._try(worker, claimed, action)
        except LeaseLost:
            assert not (holds and self.one_at_a_time)
            raise
        assert holds or action == "renew" or not self.one_at_a_time

    async def _try(self, worker: Worker, claimed: Claimed, action: str) -> None:
        now, engine, step = worker.clock.second, worker.engine, self.dice.randint(1, 9)
        match action:
            case "renew":
                await worker.orders(claimed)
            case "report":
                await worker.report(claimed, step)
            case "save":
                await worker.save(claimed, step)
            case "checkpoint":
                await worker.checkpoint(claimed, step)
            case "end":
                await worker.end(claimed)
            case "fail":
                await queue.fail(engine, claimed, JobError("nan", "loss is NaN"), now=now)
            case _:
                await queue.release(engine, claimed, now=now)

    async def states(self) -> dict[JobId, Status]:
        return {job.id: job.status for job in await self.jobs.page(self.tenant, limit=100)}

    async def check(self) -> None:
        """Whatever happened: a job has its version if and only if it has succeeded, once, and its story has no gaps."""
        for job in await self.jobs.page(self.tenant, limit=100):
            events = await self.jobs.events(self.tenant, job.id, after=0, limit=10_000)
            assert [event.number for event in events] == list(range(1, job.last_event + 1))
            texts = [event.told.message for event in events]
            steps = [event.told.data["step"] for event in events if event.told.data is not None]
            assert steps == sorted(set(steps))
            assert job.trained_tokens == 10 * len(steps)
            assert texts.count("The job has successfully completed") == (job.status is Status.SUCCEEDED)
            assert (job.finished_at is not None) == (job.status in OVER)
            assert (job.lease_until is not None) == (job.status is Status.RUNNING)
            points = {point.version_id for point in await self.jobs.checkpoints(self.tenant, job.id, limit=100)}
            async with reading(self.workers[0].engine) as connection:
                mine = await catalog.list_versions(connection, self.tenant, job.adapter)
            ends = [version for version in mine if version.id not in points]
            assert [version.id for version in ends] == [job.version_id] * (job.status is Status.SUCCEEDED)


def chaos(engine: AsyncEngine, clock: Clock, seed: int, *, one_at_a_time: bool) -> Chaos:
    workers = Worker(engine, clock, "w1"), Worker(engine, clock, "w2")
    return Chaos(Jobs(engine, clock=clock), workers, random.Random(seed), TenantId(f"ten_{seed}"), one_at_a_time)


def within_two(before: Status, after: Status) -> bool:
    """A claim may take over an abandoned job, which is two steps."""
    steps = {before} | TRANSITIONS[before]
    return after in steps or any(after in TRANSITIONS[step] for step in steps if step is Status.QUEUED)


async def in_turn(engine: AsyncEngine, seed: int, actions: int) -> None:
    clock = Clock()
    one = chaos(engine, clock, seed, one_at_a_time=True)
    before: dict[JobId, Status] = {}
    for _ in range(actions):
        clock.now += one.dice.choice((0, 1, 20, 50))
        try:
            await one.act(one.dice.randint(0, 2))
        except (LeaseLost, StateConflict):
            refused = await one.states()
            assert {job_id: refused[job_id] for job_id in before} == before  # what is refused changes nothing
        after = await one.states()
        assert all(within_two(status, after[job_id]) for job_id, status in before.items())
        before = after
    await one.check()


async def at_once(engine: AsyncEngine, seed: int, actions: int) -> None:
    clock = Clock()
    one = chaos(engine, clock, seed, one_at_a_time=False)

    async def go(who: int) -> None:
        for _ in range(actions):
            clock.now += one.dice.choice((0, 0, 5, 30))
            try:
                await one.act(who)
            except (LeaseLost, StateConflict):
                await asyncio.sleep(0)

    await asyncio.gather(go(0), go(1), go(2))
    await one.check()


async def test_any_order_of_actions_has_one_effect(engine: AsyncEngine) -> None:
    """Two workers with leases old and new, and a client: only legal states, one version a job, no story told twice."""
    for seed in range(3):
        await in_turn(engine, seed, 50)


async def test_actions_at_once_have_one_effect(engine: AsyncEngine) -> None:
    """The same with all three at the same time."""
    for seed in range(100, 102):
        await at_once(engine, seed, 40)


@pytest.mark.full
async def test_any_order_of_actions_has_one_effect_at_length(engine: AsyncEngine) -> None:
    """The same, 10,000 actions in turn and 12,000 at once."""
    for seed in range(1_000, 1_100):
        await in_turn(engine, seed, 100)
    for seed in range(2_000, 2_040):
        await at_once(engine, seed, 100)
