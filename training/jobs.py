"""Fine-tuning jobs as rows: their states, what a client may do with them, and what they have told.

A job waits in the queue, is leased to a worker (`training/queue.py`), and ends once. Every change of a state goes
through `move`, which knows the legal ones. Times are whole seconds since 1970, UTC. Every call of a client's names the
tenant. Nothing here needs torch.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Literal, NewType

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    Row,
    Table,
    Text,
    exists,
    func,
    insert,
    select,
    update,
)

from adapter_store.blob_rows import NamedBlob
from adapter_store.blobs import names_blob
from adapter_store.catalog import metadata as tables
from adapter_store.changes import take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.ids import TenantId, VersionId
from adapter_store.quota import NO_QUOTA, Quota
from adapter_store.together import Together
from adapter_store.transactions import reading, writing
from training import evaluations
from training.errors import JobNotFound, LeaseLost, StateConflict, TooManyQueued

JobId = NewType("JobId", str)
Method = Literal["supervised", "dpo"]
MOST_MESSAGE: Final = 2_000
"""Characters of an event's or an error's text."""


class Status(StrEnum):
    """Where a job is, in OpenAI's words. A paused one keeps what it has reached."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Final = {
    Status.QUEUED: {Status.RUNNING, Status.PAUSED, Status.CANCELLED, Status.FAILED},
    Status.RUNNING: {
        Status.QUEUED,  # its worker gave it back, or fell silent
        Status.PAUSED,
        Status.SUCCEEDED,
        Status.FAILED,
        Status.CANCELLED,
    },
    Status.PAUSED: {Status.QUEUED, Status.CANCELLED},
    Status.SUCCEEDED: set[Status](),
    Status.FAILED: set[Status](),
    Status.CANCELLED: set[Status](),
}
OVER: Final = frozenset(status for status, after in TRANSITIONS.items() if not after)
ACTIVE: Final = frozenset({Status.QUEUED, Status.RUNNING})
PAUSE: Final = "pause"
PAUSED: Final = "The job was paused"
UNLEASED: Final[dict[str, Any]] = {"wish": None, "worker": None, "lease_until": None, "estimated_finish": None}

jobs = Table(
    "jobs",
    tables,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),  # id of the key
    Column("status", Text, nullable=False),
    Column("wish", Text),  # what its worker is to do at its next word: pause
    Column("model", Text, nullable=False),  # as it was asked for
    Column("base_fingerprint", Text, nullable=False),
    Column("warm_start", Text),  # id of the version that it goes on from
    Column("method", Text, nullable=False),
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("adapter", Text, nullable=False),
    Column("alias", Text, nullable=False),
    Column("suffix", Text),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", Text, nullable=False),  # JSON, OpenAI's, in numbers
    Column("tailor", Text, nullable=False),  # JSON, ours, as they were asked for
    Column("recipe", Text, nullable=False),  # JSON, what the engine is given
    Column("quota", Text, nullable=False),  # JSON, what the tenant's plan lets it keep
    Column("epoch", Integer, nullable=False),  # of the lease: how often the job was claimed
    Column("worker", Text),
    Column("lease_until", BigInteger),
    Column("losses", Integer, nullable=False),  # leases that ended by themselves since the job last got further
    Column("queued_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger),
    Column("step", Integer, nullable=False),  # the last one whose metrics are kept
    Column("total_steps", Integer),
    Column("trained_tokens", BigInteger, nullable=False),
    Column("version_id", Text),  # no foreign key: the version may be erased, the job stays
    Column("fine_tuned_model", Text),
    Column("result_files", Text, nullable=False),  # JSON list of files' ids
    Column("error", Text),  # JSON
    Column("last_event", Integer, nullable=False),
    Column("saved_step", Integer),  # where a worker goes on; null: at the beginning
    Column("saved_name", Text),
    Column("saved_sha256", Text, info=names_blob("saved_bytes", fleeting=True)),
    Column("saved_bytes", BigInteger),
    Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
    Index("ix_jobs_status", "status"),
    Index("ix_jobs_tenant_id_saved_sha256", "tenant_id", "saved_sha256"),
)
job_metadata = Table(
    "job_metadata",
    tables,
    Column("job_id", Text, ForeignKey("jobs.id", name="fk_job_metadata_job_id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
job_events = Table(
    "job_events",
    tables,
    Column("job_id", Text, ForeignKey("jobs.id", name="fk_job_events_job_id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text),  # JSON
)
job_checkpoints = Table(
    "job_checkpoints",
    tables,
    Column("job_id", Text, ForeignKey("jobs.id", name="fk_job_checkpoints_job_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("version_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("metrics", Text, nullable=False),  # JSON
    Column("at", BigInteger, nullable=False),
    Index("ix_job_checkpoints_version_id", "version_id"),
)
training_accounts = Table(  # what tenants' jobs have been given, for the queue's fairness
    "training_accounts",
    tables,
    Column("tenant_id", Text, primary_key=True),
    Column("weight", Double, nullable=False),
    Column("most_running", BigInteger),  # null: no limit
    Column("served", Double, nullable=False),  # trained tokens by weight
)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, as OpenAI tells it; `param` names what of the request is to blame."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A run at rest after `step`, one blob of the tenant's: what a worker needs to go on with it to the same bytes."""

    step: int
    name: str
    sha256: str
    size_bytes: int

    def blob(self, tenant_id: TenantId) -> NamedBlob:
        return NamedBlob.of(tenant_id, self.sha256, self.size_bytes)

    def columns(self) -> dict[str, Any]:
        """As the job's row has it."""
        return {
            "saved_step": self.step,
            "saved_name": self.name,
            "saved_sha256": self.sha256,
            "saved_bytes": self.size_bytes,
        }


NOT_SAVED: Final = {"saved_step": None, "saved_name": None, "saved_sha256": None, "saved_bytes": None}


@dataclass(frozen=True, slots=True)
class Terms:
    """What the tenant's plan gives its jobs: a share of the workers, and limits; None is no limit."""

    weight: float = 1.0
    most_queued: int | None = None
    most_running: int | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that was checked. `recipe` is what the engine is given, `hyperparameters` and `tailor` what is shown.

    `adapter` None: named after the job. `alias`: what is to stand for the result.
    """

    tenant_id: TenantId
    created_by: str
    model: str
    base_fingerprint: str
    method: Method
    training_file: str
    seed: int
    recipe: Mapping[str, Any]
    validation_file: str | None = None
    adapter: str | None = None
    suffix: str | None = None
    alias: str = "default"
    warm_start: VersionId | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    tailor: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    terms: Terms = Terms()
    quota: Quota = NO_QUOTA


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is. `wish`: what its worker has been asked for and has not done yet."""

    id: JobId
    tenant_id: TenantId
    created_at: int
    created_by: str
    status: Status
    wish: str | None
    model: str
    base_fingerprint: str
    warm_start: VersionId | None
    method: Method
    training_file: str
    validation_file: str | None
    adapter: str
    alias: str
    suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    tailor: dict[str, Any]
    recipe: dict[str, Any]
    quota: Quota
    epoch: int
    worker: str | None
    lease_until: int | None
    losses: int
    queued_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    step: int
    total_steps: int | None
    trained_tokens: int
    saved: Saved | None
    version_id: VersionId | None
    fine_tuned_model: str | None
    result_files: list[str]
    error: JobError | None
    last_event: int
    metadata: dict[str, str] = field(default_factory=dict)

    def is_abandoned(self, now: int) -> bool:
        """Whether its worker has fallen silent."""
        return self.status is Status.RUNNING and (self.lease_until or 0) <= now


class Level(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of a job: a message, or with `data` the metrics of a step."""

    message: str
    level: Level = Level.INFO
    data: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        return "message" if self.data is None else "metrics"


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's story; numbers count up from 1 without gaps."""

    job_id: JobId
    number: int
    at: int
    told: Told

    @property
    def id(self) -> str:
        return f"ftevent-{self.job_id.removeprefix(PREFIX)}{self.number:08x}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version of the job's adapter, made on the way; `model` is the name that it is served by."""

    id: str
    job_id: JobId
    step: int
    version_id: VersionId
    model: str
    metrics: dict[str, float]
    at: int


PREFIX: Final = "ftjob-"
NAME_TAIL: Final = 24
"""Hex digits of a job's id: twelve of milliseconds, so that ids sort by the time at which they were made."""


def new_job_id(now: float) -> JobId:
    return JobId(f"{PREFIX}{int(now * 1_000):012x}{secrets.token_hex(6)}")


def event_number(job_id: str, event_id: str) -> int | None:
    """The number in an id of the job's events; None for what is none."""
    head = f"ftevent-{job_id.removeprefix(PREFIX)}"
    tail = event_id.removeprefix(head)
    if tail == event_id or len(tail) != 8:
        return None
    try:
        return int(tail, 16)
    except ValueError:
        return None


class Jobs:
    """The jobs of all tenants, for their owners. Every call names the tenant."""

    def __init__(self, engine: AsyncEngine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    async def create(self, new: NewJob, together: Together[Job] | None = None) -> Job:
        """A job in the queue. `together`: what is written in the same transaction, or nothing is.

        Raises TooManyQueued, StorageError, and what `together` raises.
        """
        more = together or Together()
        async with writing(self._engine) as connection:
            await take_turn(connection)
            await more.before(connection)
            await _check_queue(connection, new.tenant_id, new.terms)
            await _open_account(connection, new.tenant_id, new.terms)
            job = await _insert(connection, new, self._clock())
            await more.after(connection, job)
        return job

    async def find(self, tenant_id: TenantId, job_id: str) -> Job:
        """Raises JobNotFound."""
        async with reading(self._engine) as connection:
            return await find_in(connection, tenant_id, job_id)

    async def page(
        self,
        tenant_id: TenantId,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Sequence[Job]:
        """The newest first; the next page begins `after` the last id of this one.

        `metadata`: those that have all these pairs; an empty one: those that have none at all.
        """
        query = select(jobs).where(jobs.c.tenant_id == tenant_id).order_by(jobs.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(jobs.c.id < after)
        if metadata is not None and not metadata:
            query = query.where(~exists().where(job_metadata.c.job_id == jobs.c.id))
        for key, value in (metadata or {}).items():
            mine = (job_metadata.c.job_id == jobs.c.id) & (job_metadata.c.key == key) & (job_metadata.c.value == value)
            query = query.where(exists().where(mine))
        async with reading(self._engine) as connection:
            return await _with_metadata(connection, (await connection.execute(query)).all())

    async def cancel(self, tenant_id: TenantId, job_id: str) -> Job:
        """Ends the job at once: a worker that has it writes nothing of it any more.

        Raises JobNotFound, StateConflict where it is over.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            job = await find_in(connection, tenant_id, job_id)
            now = int(self._clock())
            if Status.CANCELLED not in TRANSITIONS[job.status]:
                raise StateConflict(job.id, job.status, "cancelled")
            await move(connection, job, Status.CANCELLED, now, Told("The job was cancelled"), **ended(now))
            return await find_in(connection, tenant_id, job_id)

    async def pause(self, tenant_id: TenantId, job_id: str) -> Job:
        """A waiting job is paused at once; a running one when its worker has saved what it has.

        Asked again, nothing changes. Raises JobNotFound, StateConflict.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            job = await find_in(connection, tenant_id, job_id)
            now = int(self._clock())
            if job.status is Status.RUNNING and not job.is_abandoned(now):
                if job.wish != PAUSE:
                    await tell(connection, job.id, now, [Told("Pausing: what is reached is saved first")], wish=PAUSE)
            elif job.status is not Status.PAUSED:
                if Status.PAUSED not in TRANSITIONS[job.status]:
                    raise StateConflict(job.id, job.status, "paused")
                await move(connection, job, Status.PAUSED, now, Told(PAUSED), **UNLEASED)
            return await find_in(connection, tenant_id, job_id)

    async def resume(self, tenant_id: TenantId, job_id: str, terms: Terms = Terms()) -> Job:
        """Back into the queue; where a pause was not done yet, it is called off.

        Asked again, nothing changes. Raises JobNotFound, StateConflict, TooManyQueued.
        """
        async with writing(self._engine) as connection:
            await take_turn(connection)
            job = await find_in(connection, tenant_id, job_id)
            now = int(self._clock())
            if job.status is Status.RUNNING and job.wish == PAUSE:
                await tell(connection, job.id, now, [Told("The pause was called off")], wish=None)
            elif job.status not in ACTIVE:
                if Status.QUEUED not in TRANSITIONS[job.status]:
                    raise StateConflict(job.id, job.status, "resumed")
                await _check_queue(connection, tenant_id, terms)
                await _open_account(connection, tenant_id, terms)
                await move(connection, job, Status.QUEUED, now, Told("The job was resumed"), queued_at=now)
            return await find_in(connection, tenant_id, job_id)

    async def events(
        self,
        tenant_id: TenantId,
        job_id: str,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 20,
    ) -> Sequence[Event]:
        """The newest first, those below number `before`; with `after` the oldest first, those above that number.

        Raises JobNotFound.
        """
        async with reading(self._engine) as connection:
            job = await find_in(connection, tenant_id, job_id)
            query = select(job_events).where(job_events.c.job_id == job.id).limit(limit)
            number = job_events.c.number
            if after is not None:
                query = query.where(number > after).order_by(number)
            else:
                query = query.order_by(number.desc())
            if before is not None:
                query = query.where(number < before)
            return [_event(row) for row in await connection.execute(query)]

    async def evaluation(self, version_id: VersionId) -> dict[str, Any] | None:
        """What was found of a job's result; the caller has found the version by its tenant."""
        async with reading(self._engine) as connection:
            return await evaluations.of(connection, version_id)

    async def checkpoints(
        self, tenant_id: TenantId, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Sequence[Checkpoint]:
        """The newest first; the next page begins `after` the last id of this one. Raises JobNotFound."""
        async with reading(self._engine) as connection:
            job = await find_in(connection, tenant_id, job_id)
            mine = job_checkpoints.c.job_id == job.id
            query = select(job_checkpoints).where(mine).order_by(job_checkpoints.c.step.desc()).limit(limit)
            if after is not None:
                last = select(job_checkpoints.c.step).where(mine, job_checkpoints.c.id == after).scalar_subquery()
                query = query.where(job_checkpoints.c.step < last)
            return [_checkpoint(row) for row in await connection.execute(query)]

    async def figures(self) -> tuple[int, int, int | None]:
        """How many wait, how many run, and since when the one waits that has waited longest."""
        query = select(jobs.c.status, func.count(), func.min(jobs.c.queued_at)).where(
            jobs.c.status.in_([status.value for status in ACTIVE])
        )
        async with reading(self._engine) as connection:
            found = {row[0]: (int(row[1]), row[2]) for row in await connection.execute(query.group_by(jobs.c.status))}
        queued, since = found.get(Status.QUEUED.value, (0, None))
        return queued, found.get(Status.RUNNING.value, (0, None))[0], since


async def find_in(connection: AsyncConnection, tenant_id: TenantId, job_id: str) -> Job:
    """The job as the caller's transaction sees it. Raises JobNotFound."""
    rows = (await connection.execute(select(jobs).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id))).all()
    if not rows:
        raise JobNotFound(job_id)
    return (await _with_metadata(connection, rows))[0]


def ended(now: int) -> dict[str, Any]:
    """What a job's row has, however it ends; what was saved of it is dropped later (`saved_runs.drop`)."""
    return {**UNLEASED, "finished_at": now}


async def uses_of_file(connection: AsyncConnection, tenant_id: TenantId, file_id: str) -> Sequence[JobId]:
    """The jobs that are not over and still need the file."""
    open_ones = jobs.c.status.in_([status.value for status in Status if status not in OVER])
    needs = (jobs.c.training_file == file_id) | (jobs.c.validation_file == file_id)
    query = select(jobs.c.id).where(jobs.c.tenant_id == tenant_id, open_ones, needs)
    return [JobId(found) for found in (await connection.execute(query)).scalars()]


async def is_checkpoint(connection: AsyncConnection, version_id: VersionId, step: int) -> bool:
    """Whether the version is a job's checkpoint at that step."""
    here = (job_checkpoints.c.version_id == version_id) & (job_checkpoints.c.step == step)
    return (await connection.execute(select(job_checkpoints.c.id).where(here).limit(1))).first() is not None


async def move(connection: AsyncConnection, job: Job, status: Status, now: int, *told: Told, **values: Any) -> None:
    """The job's next state, with what is told of it; the caller's transaction has read `job`.

    Raises LeaseLost where it is in another state, or leased anew, by now.
    """
    if status not in TRANSITIONS[job.status]:
        raise StateConflict(job.id, job.status, status.value)
    here = (jobs.c.status == job.status.value) & (jobs.c.epoch == job.epoch)
    if not await tell(connection, job.id, now, told, where=here, status=status.value, **values):
        raise LeaseLost(job.id)


async def tell(
    connection: AsyncConnection,
    job_id: JobId,
    now: int,
    told: Sequence[Told],
    *,
    where: Any = True,
    **values: Any,
) -> bool:
    """Changes the job's row and adds to its story, where it is as `where` says; False: it is not, nothing is done.

    The row is locked from here on, so that events are numbered in the order in which they are committed.
    """
    changed = await connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, where)
        .values(last_event=jobs.c.last_event + len(told), **values)
        .returning(jobs.c.last_event)
    )
    last = changed.scalar_one_or_none()
    if last is None:
        return False
    first = int(last) - len(told) + 1
    rows = [_event_row(job_id, first + place, now, one) for place, one in enumerate(told)]
    if rows:
        await connection.execute(insert(job_events), rows)
    return True


def _event_row(job_id: JobId, number: int, now: int, told: Told) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "number": number,
        "at": now,
        "level": told.level.value,
        "type": told.kind,
        "message": told.message[:MOST_MESSAGE],
        "data": None if told.data is None else json.dumps(dict(told.data)),
    }


async def _check_queue(connection: AsyncConnection, tenant_id: TenantId, terms: Terms) -> None:
    if terms.most_queued is None:
        return
    waiting = (jobs.c.tenant_id == tenant_id) & (jobs.c.status == Status.QUEUED.value)
    count = (await connection.execute(select(func.count()).select_from(jobs).where(waiting))).scalar_one()
    if count >= terms.most_queued:
        raise TooManyQueued(terms.most_queued)


async def _open_account(connection: AsyncConnection, tenant_id: TenantId, terms: Terms) -> None:
    """Notes the tenant's terms. One that had nothing to do is lifted to the least served of those that have.

    Else it would be ahead of everybody for all the time in which it did not ask (Sheng et al. 2024).
    """
    account = training_accounts.c
    busy = select(jobs.c.tenant_id).where(jobs.c.status.in_([status.value for status in ACTIVE]))
    is_busy = (await connection.execute(busy.where(jobs.c.tenant_id == tenant_id).limit(1))).first() is not None
    least = select(func.min(account.served)).where(account.tenant_id.in_(busy))
    floor = 0.0 if is_busy else float((await connection.execute(least)).scalar() or 0.0)
    values = {"weight": terms.weight, "most_running": terms.most_running}
    query = select(account.served).where(account.tenant_id == tenant_id)
    served = (await connection.execute(query)).scalar_one_or_none()
    if served is None:
        row = {"tenant_id": tenant_id, "served": floor, **values}
        await connection.execute(insert(training_accounts).values(row))
    else:
        values["served"] = max(float(served), floor)
        await connection.execute(update(training_accounts).where(account.tenant_id == tenant_id).values(**values))


async def _insert(connection: AsyncConnection, new: NewJob, now: float) -> Job:
    job_id = new_job_id(now)
    at = int(now)
    told = [
        Told(f"Created fine-tuning job: {job_id}"),
        Told("Files validated, moving job to queued state"),
    ]
    row = {
        "id": job_id,
        "tenant_id": new.tenant_id,
        "created_at": at,
        "created_by": new.created_by,
        "status": Status.QUEUED.value,
        "model": new.model,
        "base_fingerprint": new.base_fingerprint,
        "warm_start": new.warm_start,
        "method": new.method,
        "training_file": new.training_file,
        "validation_file": new.validation_file,
        "adapter": new.adapter or job_id,
        "alias": new.alias,
        "suffix": new.suffix,
        "seed": new.seed,
        "hyperparameters": json.dumps(dict(new.hyperparameters)),
        "tailor": json.dumps(dict(new.tailor)),
        "recipe": json.dumps(dict(new.recipe)),
        "quota": json.dumps(asdict(new.quota)),
        "epoch": 0,
        "losses": 0,
        "queued_at": at,
        "step": 0,
        "trained_tokens": 0,
        "result_files": "[]",
        "last_event": 0,
    }
    await connection.execute(insert(jobs).values(row))
    pairs = [{"job_id": job_id, "key": key, "value": value} for key, value in new.metadata.items()]
    if pairs:
        await connection.execute(insert(job_metadata), pairs)
    await tell(connection, job_id, at, told)
    return await find_in(connection, new.tenant_id, job_id)


async def _with_metadata(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Job]:
    found: dict[str, dict[str, str]] = {row.id: {} for row in rows}
    query = select(job_metadata).where(job_metadata.c.job_id.in_(list(found))).order_by(job_metadata.c.key)
    for pair in await connection.execute(query):
        found[pair.job_id][pair.key] = pair.value
    return [job_of(row, found[row.id]) for row in rows]


_PLAIN: Final = tuple(
    name
    for name in (part.name for part in fields(Job))
    if name not in {"status", "hyperparameters", "tailor", "recipe", "quota", "saved", "result_files", "error"}
    and name != "metadata"
)


def job_of(row: Row[Any], metadata: dict[str, str] | None = None) -> Job:
    """The job in a row of the table."""
    return Job(
        **{name: getattr(row, name) for name in _PLAIN},
        status=Status(row.status),
        hyperparameters=json.loads(row.hyperparameters),
        tailor=json.loads(row.tailor),
        recipe=json.loads(row.recipe),
        quota=Quota(**json.loads(row.quota)),
        saved=_saved(row),
        result_files=json.loads(row.result_files),
        error=None if row.error is None else JobError(**json.loads(row.error)),
        metadata=metadata or {},
    )


def _saved(row: Row[Any]) -> Saved | None:
    if row.saved_sha256 is None:
        return None
    return Saved(row.saved_step, row.saved_name, row.saved_sha256, row.saved_bytes)


def _event(row: Row[Any]) -> Event:
    data = None if row.data is None else json.loads(row.data)
    return Event(row.job_id, row.number, row.at, Told(row.message, Level(row.level), data))


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(row.id, row.job_id, row.step, row.version_id, row.model, json.loads(row.metrics), row.at)
