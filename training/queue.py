"""The workers' side of jobs: lease one, keep it, tell of it, end it. Each effect is had once.

A lease has a number, the job's `epoch`, which counts up with every claim. Whatever a worker writes is written where the
job is still running under the worker's own number, in the same transaction; one that fell silent for longer than its
lease can write nothing more, and drops what it has. Workers' clocks may differ by less than a lease.

Who is next: the tenant with the fewest running jobs by weight, among those the least served one (trained tokens by
weight), and of its jobs the one that has waited longest. Never so a tenant that is held back (`HeldBack`); a
job of its own that runs already goes on.
"""

import csv
import io
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from json import dumps, loads
from secrets import token_hex
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, Select, func, insert, or_, select, update

from adapter_store.catalog import Version
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from training.errors import LeaseLost
from training.jobs import (
    PAUSE,
    PAUSED,
    UNLEASED,
    Job,
    JobError,
    JobId,
    Level,
    Saved,
    Status,
    Told,
    ended,
    find_in,
    job_checkpoints,
    job_events,
    job_of,
    jobs,
    move,
    tell,
    training_accounts,
)

HeldBack = Select[tuple[str]]
"""A query for the ids of tenants whose jobs wait; who a tenant is, and why it is held back, is the caller's matter."""
LEASE_S: Final = 60
MOST_LOSSES: Final = 10
"""Leases that end by themselves while the job gets no further: then it is the job that ends its workers."""
COLUMNS: Final = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class Order(StrEnum):
    """What a worker is told when it renews a lease."""

    GO_ON = "go_on"
    PAUSE = "pause"  # save, then `release`
    CANCEL = "cancel"  # drop it: the job is over
    LOST = "lost"  # drop it: another worker has it, or nobody


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job as it was when this worker was given it, under the lease number `job.epoch`."""

    job: Job
    at: int

    @property
    def is_held(self) -> ColumnElement[bool]:
        return (jobs.c.id == self.job.id) & (jobs.c.epoch == self.job.epoch) & (jobs.c.status == Status.RUNNING.value)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of one step; the first is 1. Losses in nats per token; None where nothing was measured."""

    step: int
    train_loss: float
    train_accuracy: float
    tokens: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    more: Mapping[str, float] | None = None

    def told(self, total_steps: int | None) -> Told:
        """As OpenAI's events have them."""
        data: dict[str, Any] = {
            "step": self.step,
            "train_loss": self.train_loss,
            "train_mean_token_accuracy": self.train_accuracy,
            "total_steps": total_steps,
            "valid_loss": self.valid_loss,
            "valid_mean_token_accuracy": self.valid_accuracy,
            **(self.more or {}),
        }
        told = {name: value for name, value in data.items() if _is_told(value)}
        of = "" if total_steps is None else f"/{total_steps}"
        validation = "" if self.valid_loss is None else f", validation loss={self.valid_loss:.2f}"
        return Told(f"Step {self.step}{of}: training loss={self.train_loss:.2f}{validation}", data=told)


def _is_told(value: Any) -> bool:
    return value is not None and math.isfinite(value)


async def claim(
    engine: AsyncEngine,
    worker: str,
    *,
    base_fingerprint: str,
    now: int,
    most: int,
    lease_s: int = LEASE_S,
    most_losses: int = MOST_LOSSES,
    held_back: HeldBack | None = None,
) -> list[Claimed]:
    """Leases up to `most` jobs for that base model; jobs whose workers fell silent are dealt with first.

    A job that has been saved goes on from `job.saved`. Raises StorageError.
    """
    if not await is_work(engine, base_fingerprint, now, held_back=held_back):
        return []  # as mostly: nobody's turn is taken for it
    found: list[Claimed] = []
    async with writing(engine) as connection:
        await take_turn(connection)
        await _deal_with_abandoned(connection, now, most_losses)
        while len(found) < most:
            job = await _next(connection, base_fingerprint, held_back)
            if job is None:
                break
            found.append(await _lease(connection, job, worker, now, lease_s))
    return found


async def is_work(engine: AsyncEngine, base_fingerprint: str, now: int, *, held_back: HeldBack | None = None) -> bool:
    """Whether a job of that base model waits, or a worker fell silent. Raises StorageUnavailable."""
    waits = _waits(base_fingerprint, held_back)
    silent = (jobs.c.status == Status.RUNNING.value) & (jobs.c.lease_until <= now)
    async with reading(engine) as connection:
        return (await connection.execute(select(jobs.c.id).where(or_(waits, silent)).limit(1))).first() is not None


async def renew(
    engine: AsyncEngine, claimed: Sequence[Claimed], *, now: int, lease_s: int = LEASE_S
) -> dict[JobId, Order]:
    """Keeps the leases for so long from now; what is to become of each job. Raises StorageError."""
    orders = {}
    async with writing(engine) as connection:
        for one in sorted(claimed, key=lambda one: one.job.id):
            kept = await connection.execute(
                update(jobs).where(one.is_held).values(lease_until=now + lease_s).returning(jobs.c.wish)
            )
            row = kept.one_or_none()
            if row is not None:
                orders[one.job.id] = Order.PAUSE if row.wish == PAUSE else Order.GO_ON
            else:
                orders[one.job.id] = await _why_not(connection, one)
    return orders


async def report(
    engine: AsyncEngine,
    claimed: Claimed,
    *,
    now: int,
    metrics: Sequence[Metrics] = (),
    told: Sequence[Told] = (),
    total_steps: int | None = None,
) -> None:
    """Writes down how far the job is.

    Steps that were reported before, by a worker that got further than it had saved, are not told twice.
    Raises LeaseLost, StorageError; nothing is written then.
    """
    async with writing(engine) as connection:
        row = await _held(connection, claimed)
        total = total_steps if total_steps is not None else row.total_steps
        new = [one for one in metrics if one.step > row.step]
        values: dict[str, Any] = {"total_steps": total}
        if new:
            values |= {
                "step": new[-1].step,
                "trained_tokens": row.trained_tokens + sum(one.tokens for one in new),
                "losses": 0,
                "estimated_finish": _estimate(claimed, new[-1].step, total, now),
            }
        story = [*(one.told(total) for one in new), *told]
        await _tell_held(connection, claimed, now, story, **values)
        await _charge(connection, claimed, sum(one.tokens for one in new))


async def note_saved(connection: AsyncConnection, claimed: Claimed, saved: Saved) -> str | None:
    """From here any worker goes on; the caller sees to its blob. The digest of what was noted before it.

    Raises LeaseLost.
    """
    row = await _held(connection, claimed)
    await connection.execute(update(jobs).where(claimed.is_held).values(saved.columns()))
    return None if row.saved_sha256 is None else str(row.saved_sha256)


async def release(engine: AsyncEngine, claimed: Claimed, *, now: int) -> None:
    """Gives a job back: a worker that stops, and the answer to `Order.PAUSE`.

    It is paused if that is still wished for, else it waits for another worker. Raises LeaseLost, StorageError.
    """
    async with writing(engine) as connection:
        row = await _held(connection, claimed)
        after = Status.PAUSED if row.wish == PAUSE else Status.QUEUED
        told = Told(PAUSED if row.wish == PAUSE else "Its worker stops: the job waits for another")
        await move(connection, claimed.job, after, now, told, **UNLEASED)


async def fail(engine: AsyncEngine, claimed: Claimed, error: JobError, *, now: int) -> None:
    """Ends the job as failed. Raises LeaseLost, StorageError."""
    async with writing(engine) as connection:
        await _held(connection, claimed)
        await _fail(connection, claimed.job, error, now)


class CheckpointWith(Together[Version]):
    """For `store.publish(…, alias=None, provisional=True)`: a checkpoint of the job and its version, or neither.

    The same step again changes nothing. Raises LeaseLost.
    """

    def __init__(
        self,
        claimed: Claimed,
        step: int,
        metrics: Mapping[str, float | None],
        *,
        now: Callable[[], float],
        name_of: Callable[[Version], str],
    ) -> None:
        """`metrics`: OpenAI's names; `name_of`: `AdapterStore.fine_tuned_name`."""
        self._claimed = claimed
        self._step = step
        self._metrics = {name: value for name, value in metrics.items() if _is_told(value)}
        self._now = now
        self._name_of = name_of

    async def before(self, connection: AsyncConnection) -> None:
        await _held(connection, self._claimed)

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        job = self._claimed.job
        here = (job_checkpoints.c.job_id == job.id) & (job_checkpoints.c.step == self._step)
        if (await connection.execute(select(job_checkpoints.c.id).where(here))).first() is not None:
            return
        now = int(self._now())
        row = {
            "job_id": job.id,
            "step": self._step,
            "id": f"ftckpt_{token_hex(12)}",
            "version_id": made.id,
            "model": checkpoint_name(self._name_of(made), self._step),
            "metrics": dumps({"step": self._step, **self._metrics}),
            "at": now,
        }
        await connection.execute(insert(job_checkpoints).values(row))
        await _tell_held(connection, self._claimed, now, [Told(f"Checkpoint created at step {self._step}")])


class EndWith(Together[Version]):
    """For `store.publish(…, alias=job.alias)`: the job has succeeded and its version is there, or neither.

    `also` runs in the same transaction, and gives the ids of the job's result files. Raises LeaseLost.
    """

    def __init__(
        self,
        claimed: Claimed,
        *,
        now: Callable[[], float],
        name_of: Callable[[Version], str],
        told: Sequence[Told] = (),
        also: Callable[[AsyncConnection, Version], Awaitable[Sequence[str]]] | None = None,
    ) -> None:
        self._claimed = claimed
        self._now = now
        self._name_of = name_of
        self._told = told
        self._also = also

    async def before(self, connection: AsyncConnection) -> None:
        await _held(connection, self._claimed)

    async def after(self, connection: AsyncConnection, made: Version) -> None:
        now = int(self._now())
        files = [] if self._also is None else list(await self._also(connection, made))
        name = self._name_of(made)
        story = [
            *self._told,
            Told(f"New fine-tuned model created: {name}"),
            Told("The job has successfully completed"),
        ]
        values = {"version_id": made.id, "fine_tuned_model": name, "result_files": dumps(files), **ended(now)}
        await move(connection, self._claimed.job, Status.SUCCEEDED, now, *story, **values)


def checkpoint_name(fine_tuned_model: str, step: int) -> str:
    """What a checkpoint's version is served by."""
    return f"{fine_tuned_model}:ckpt-step-{step}"


async def result_csv(connection: AsyncConnection, job_id: JobId) -> bytes:
    """The result file of a job: a line for each step, as OpenAI has it."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.type == "metrics")
    for row in await connection.execute(query.order_by(job_events.c.number)):
        data = _data_of(row)
        names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        lines.writerow([data.get(name, "") for name in names])
    return out.getvalue().encode()


async def _deal_with_abandoned(connection: AsyncConnection, now: int, most_losses: int) -> None:
    """Jobs whose workers fell silent are paused where that was asked for, failed, or wait for another."""
    query = select(jobs).where(jobs.c.status == Status.RUNNING.value, jobs.c.lease_until <= now)
    for row in (await connection.execute(query)).all():
        job = job_of(row)
        if job.wish == PAUSE:
            await move(connection, job, Status.PAUSED, now, Told(PAUSED), **UNLEASED)
        elif job.losses + 1 > most_losses:
            message = (
                f"its worker has stopped without a word {job.losses + 1} times at step {job.step}, mostly for want of "
                "memory: try a smaller batch or shorter rows"
            )
            await _fail(connection, job, JobError("worker_lost", message), now)
        else:
            told = Told(f"Its worker fell silent after step {job.step}: the job waits for another", Level.WARN)
            await move(connection, job, Status.QUEUED, now, told, **UNLEASED, losses=job.losses + 1)


def _waits(base_fingerprint: str, held_back: HeldBack | None) -> ColumnElement[bool]:
    waits = (jobs.c.status == Status.QUEUED.value) & (jobs.c.base_fingerprint == base_fingerprint)
    return waits if held_back is None else waits & jobs.c.tenant_id.not_in(held_back)


async def _next(connection: AsyncConnection, base_fingerprint: str, held_back: HeldBack | None) -> Job | None:
    account = training_accounts.c
    running = (
        select(jobs.c.tenant_id, func.count().label("count"))
        .where(jobs.c.status == Status.RUNNING.value)
        .group_by(jobs.c.tenant_id)
        .subquery()
    )
    waiting = (
        select(jobs.c.tenant_id, func.min(jobs.c.queued_at).label("since"))
        .where(_waits(base_fingerprint, held_back))
        .group_by(jobs.c.tenant_id)
        .subquery()
    )
    count = func.coalesce(running.c.count, 0)
    query = (
        select(waiting.c.tenant_id)
        .join(training_accounts, account.tenant_id == waiting.c.tenant_id)
        .outerjoin(running, running.c.tenant_id == waiting.c.tenant_id)
        .where(or_(account.most_running.is_(None), count < account.most_running))
        .order_by(count / account.weight, account.served, waiting.c.since, waiting.c.tenant_id)
        .limit(1)
    )
    tenant_id = (await connection.execute(query)).scalar_one_or_none()
    if tenant_id is None:
        return None
    mine = (jobs.c.tenant_id == tenant_id) & (jobs.c.base_fingerprint == base_fingerprint)
    oldest = select(jobs).where(mine, jobs.c.status == Status.QUEUED.value).order_by(jobs.c.queued_at, jobs.c.id)
    return job_of((await connection.execute(oldest.limit(1))).one())


async def _lease(connection: AsyncConnection, job: Job, worker: str, now: int, lease_s: int) -> Claimed:
    values: dict[str, Any] = {"epoch": job.epoch + 1, "worker": worker, "lease_until": now + lease_s}
    if job.started_at is None:
        values["started_at"] = now
        told = Told("Fine-tuning job started")
    else:
        told = Told(f"Fine-tuning job goes on from step {0 if job.saved is None else job.saved.step}")
    await move(connection, job, Status.RUNNING, now, told, **values)
    return Claimed(await find_in(connection, job.tenant_id, job.id), now)


async def _held(connection: AsyncConnection, claimed: Claimed) -> Row[Any]:
    """The job's row, locked until the transaction ends. Raises LeaseLost."""
    row = (await connection.execute(select(jobs).where(claimed.is_held).with_for_update())).one_or_none()
    if row is None:
        raise LeaseLost(claimed.job.id)
    return row


async def _tell_held(
    connection: AsyncConnection, claimed: Claimed, now: int, told: Sequence[Told], **values: Any
) -> None:
    if not await tell(connection, claimed.job.id, now, told, where=claimed.is_held, **values):
        raise LeaseLost(claimed.job.id)


async def _fail(connection: AsyncConnection, job: Job, error: JobError, now: int) -> None:
    told = Told(f"The job failed: {error.message}", Level.ERROR)
    await move(connection, job, Status.FAILED, now, told, error=dumps(asdict(error)), **ended(now))


async def _why_not(connection: AsyncConnection, claimed: Claimed) -> Order:
    query = select(jobs.c.status).where(jobs.c.id == claimed.job.id, jobs.c.epoch == claimed.job.epoch)
    status = (await connection.execute(query)).scalar_one_or_none()
    return Order.CANCEL if status == Status.CANCELLED.value else Order.LOST


async def _charge(connection: AsyncConnection, claimed: Claimed, tokens: int) -> None:
    if tokens:
        account = training_accounts.c
        await connection.execute(
            update(training_accounts)
            .where(account.tenant_id == claimed.job.tenant_id)
            .values(served=account.served + tokens / account.weight)
        )


def _estimate(claimed: Claimed, step: int, total_steps: int | None, now: int) -> int | None:
    """When the job will have ended, at the pace since this worker began; it began from what was saved."""
    begun = 0 if claimed.job.saved is None else claimed.job.saved.step
    if total_steps is None or step <= begun:
        return None
    return now + math.ceil((now - claimed.at) / (step - begun) * (total_steps - step))


def _data_of(row: Row[Any]) -> dict[str, Any]:
    return {} if row.data is None else dict(loads(row.data))
