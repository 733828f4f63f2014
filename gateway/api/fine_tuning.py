"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning API, whose jobs end as versions that are served at once.

Shapes are OpenAI's; what is Tailor's own stands under `tailor`, in what is asked and in what is told.
"""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, field_validator
from pydantic_core import CoreSchema, core_schema

from adapter_store.aliases import check_alias, main_of
from adapter_store.catalog import DEFAULT_ALIAS, Version
from adapter_store.engine import AsyncConnection
from adapter_store.errors import AdapterNotFound, NameInvalid, NameReserved, OtherBaseModel, StorageError
from adapter_store.quota import kept_by
from adapter_store.together import Together
from gateway.api.erasures import Erased, requests_on
from gateway.api.lazy import LazyRouter
from gateway.api.publishing import as_response, check_published_alias, once
from gateway.dependencies import AppParts, Parts, TenantKey, TrainingKey, trainer
from gateway.erasing import REQUEST_WAIT_S
from gateway.errors import GatewayError, ModelUnknown, RequestInvalid, TooManyStreams, envelope
from gateway.idempotency import Answers, Kept, Once, Repeated, fingerprint
from gateway.plans import Plan
from training import auto
from training import files as training_files
from training.contract import AUTO, Choices, Limits, Options, check_model, settle
from training.errors import FileNotKnown, FileUnfit, JobNotFound, NotServable
from training.files import File, Purpose
from training.hyperparameters import Quantization
from training.job_erasure import OnErase
from training.jobs import OVER, Checkpoint, Event, Job, Method, NewJob, Status, Terms, event_number

log = logging.getLogger("tailor.fine_tuning")
router = LazyRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"])
MOST_SEED: Final = 2**31 - 1
MOST_PAIRS: Final = 16
MOST_STREAMS: Final = 16
"""Of one tenant's events, at one gateway."""
LOOK_EVERY_S: Final = 0.5
SAY_SOMETHING_EVERY_S: Final = 15.0
NOT_PLAIN: Final = re.compile(r"[^a-z0-9._-]+")

Limit = Annotated[int, Query(ge=1, le=1_000)]
After = Annotated[str | None, Query(max_length=64, pattern=r"^[!-~]*$")]
FileName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[!-~]*$")]
NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
"""What neither JSON's readers nor PostgreSQL take: NUL, and halves of surrogate pairs."""


def _is_text(value: str) -> str:
    if NO_TEXT.search(value):
        raise ValueError("not text: a NUL, or half of a surrogate pair")
    return value


Text = Annotated[str, AfterValidator(_is_text)]


# what is asked


@dataclass(frozen=True, slots=True)
class Within:
    """A number within bounds, or "auto"; `above`: the least itself is out of them. `whole`: without a fraction."""

    least: float
    most: float
    whole: bool = False
    above: bool = False

    def check(self, value: object) -> object:
        """Raises ValueError, with the bounds."""
        if value == AUTO:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._holds(value):
            what = "a whole number" if self.whole else "a number"
            least = f"above {self.least:g}, up to" if self.above else f"from {self.least:g} to"
            raise ValueError(f"{what} {least} {self.most:g}, or 'auto'")
        return int(value) if self.whole else float(value)

    def _holds(self, value: float) -> bool:
        is_enough = self.least < value if self.above else self.least <= value
        return is_enough and value <= self.most and (not self.whole or value == int(value))

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: object, _handler: object) -> dict[str, Any]:
        kind = "integer" if self.whole else "number"
        bound = "exclusiveMinimum" if self.above else "minimum"
        return {"anyOf": [{"const": AUTO}, {"type": kind, bound: self.least, "maximum": self.most}]}


Epochs = Annotated[int | Literal["auto"], Within(1, 50, whole=True)]
BatchSize = Annotated[int | Literal["auto"], Within(1, 256, whole=True)]
Multiplier = Annotated[float | Literal["auto"], Within(0, 1_000, above=True)]
Beta = Annotated[float | Literal["auto"], Within(0, 2, above=True)]


class Hyperparameters(BaseModel, extra="forbid"):
    """OpenAI's; each a number or "auto"."""

    n_epochs: Epochs = AUTO
    batch_size: BatchSize = AUTO
    learning_rate_multiplier: Multiplier = AUTO


class DpoHyperparameters(Hyperparameters, extra="forbid"):
    beta: Beta = AUTO


class Supervised(BaseModel, extra="forbid"):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(BaseModel, extra="forbid"):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class MethodAsked(BaseModel, extra="forbid"):
    """`reinforcement` is known, and refused."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None


Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]


class TailorOptions(BaseModel, extra="forbid"):
    """What OpenAI has no name for. `from`: a version to go on from, as a request's model names it.

    `alias`: what is to stand for the result, beside the adapter's name where that is new.
    """

    rank: Annotated[int, Field(strict=True, ge=1, le=512)] | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=4_096)] | None = None
    target_modules: Annotated[list[Module], Field(min_length=1, max_length=64)] | None = None
    rslora: bool = False
    packing: bool = False
    from_: Annotated[Text, Field(min_length=1, max_length=256)] | None = Field(default=None, alias="from")
    eval_steps: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    early_stopping_patience: Annotated[int, Field(strict=True, ge=1, le=1_000)] | None = None
    sft_weight: Annotated[float, Field(strict=True, ge=0, le=100)] | None = None
    quantization: Quantization | None = None
    alias: Annotated[Text, Field(min_length=1, max_length=64)] = DEFAULT_ALIAS


class JobAsked(BaseModel, extra="forbid"):
    """A job, as OpenAI's clients ask for it; `hyperparameters` is the older form of `method`."""

    model: Annotated[Text, Field(min_length=1, max_length=256)]
    training_file: FileName
    validation_file: FileName | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MOST_SEED)] | None = None
    method: MethodAsked | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None
    tailor: TailorOptions = TailorOptions()

    @field_validator("metadata")
    @classmethod
    def _pairs(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None:
            check_metadata(value)
        return value


def check_metadata(pairs: dict[str, str]) -> None:
    """Raises ValueError: OpenAI's bounds."""
    if len(pairs) > MOST_PAIRS:
        raise ValueError(f"{len(pairs)} pairs: at most {MOST_PAIRS}")
    for key, value in pairs.items():
        _is_text(key + value)
        if not 1 <= len(key) <= 64:
            raise ValueError(f"the key {key[:64]!r} has {len(key)} characters: 1 to 64")
        if len(value) > 512:
            raise ValueError(f"the value of {key!r} has {len(value)} characters: up to 512")


# what is told


class MethodTold(BaseModel):
    type: Method
    supervised: dict[str, Any] | None = None
    dpo: dict[str, Any] | None = None


class ErrorTold(BaseModel):
    code: str
    message: str
    param: str | None


class TailorTold(BaseModel):
    """What OpenAI has no name for: where the job is, the options it was asked with, and what answers to it.

    `version` is there once the job has succeeded; `pausing` while its worker is still to save what it has.
    """

    adapter: str
    alias: str
    version: str | None
    step: int
    total_steps: int | None
    pausing: bool
    worker_losses: int
    options: dict[str, Any]
    recipe: dict[str, Any]


class JobObject(BaseModel):
    """A job; times in Unix seconds."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: MethodTold
    integrations: list[Any]
    metadata: dict[str, str] | None
    error: ErrorTold | None
    tailor: TailorTold


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointObject(BaseModel):
    """A checkpoint is a version, served by the name in `fine_tuned_model_checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class JobDeleted(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    deleted: Literal[True] = True
    tailor: Erased


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


# jobs


class _Creation(Together[Job]):
    """A job and the answer to who asked for it are written together, once, while its files are there."""

    def __init__(self, parts: Parts, asker: TenantKey, new: NewJob, once: Once, request_sha256: str) -> None:
        self.answer: Kept | None = None
        self._parts = parts
        self._asker = asker
        self._new = new
        self._once = once
        self._request = request_sha256

    async def before(self, connection: AsyncConnection) -> None:
        await self._once.check_in(connection, self._request)
        for file_id in filter(None, (self._new.training_file, self._new.validation_file)):
            await training_files.find(connection, self._new.tenant_id, file_id)
        quota = self._asker.key.plan.quota
        if quota.counts:
            (await kept_by(connection, self._new.tenant_id, self._new.adapter or "")).check(quota, 0)

    async def after(self, connection: AsyncConnection, made: Job) -> None:
        self.answer = Kept(self._request, 200, _place(made), job_object(made).model_dump_json())
        await self._once.keep(connection, self.answer)


@router.post("/jobs", response_model=JobObject)
async def create(body: JobAsked, request: Request, asker: TrainingKey, parts: AppParts) -> Response:
    """Put a job into the queue. What could not be served once it is trained is refused here, with what could be."""
    repeat = once(request, parts, asker.tenant_id)
    asked = fingerprint("create job", body.model_dump_json())
    try:
        await repeat.check(asked)
        new = await _checked(body, asker, parts)
        creation = _Creation(parts, asker, new, repeat, asked)
        await parts.jobs.create(new, creation)
    except Repeated as repeated:
        return as_response(repeated.kept)
    assert creation.answer is not None
    return as_response(creation.answer)


@router.get("/jobs")
async def list_jobs(
    request: Request, asker: TrainingKey, parts: AppParts, after: After = None, limit: Limit = 20
) -> JobList:
    """The newest first; `?metadata[key]=value` those that have it, `?metadata=null` those that have none."""
    page = await parts.jobs.page(asker.tenant_id, after=after, limit=limit + 1, metadata=_wanted(request))
    return JobList(data=[job_object(job) for job in page[:limit]], has_more=len(page) > limit)


@router.get("/jobs/{job}")
async def show(job: str, asker: TrainingKey, parts: AppParts) -> JobObject:
    """One job."""
    return job_object(await parts.jobs.find(asker.tenant_id, job))


@router.post("/jobs/{job}/cancel")
async def cancel(job: str, asker: TrainingKey, parts: AppParts) -> JobObject:
    """End a job at once; its checkpoints stay."""
    return job_object(await parts.jobs.cancel(asker.tenant_id, job))


@router.post("/jobs/{job}/pause")
async def pause(job: str, asker: TrainingKey, parts: AppParts) -> JobObject:
    """A waiting job is paused at once, a running one when its worker has saved what it has reached."""
    return job_object(await parts.jobs.pause(asker.tenant_id, job))


@router.post("/jobs/{job}/resume")
async def resume(job: str, asker: TrainingKey, parts: AppParts) -> JobObject:
    """Let a paused job go on from where it was."""
    return job_object(await parts.jobs.resume(asker.tenant_id, job, terms_of(asker.key.plan)))


@router.delete("/jobs/{job}")
async def delete(
    job: str,
    asker: TrainingKey,
    parts: AppParts,
    response: Response,
    force: Annotated[bool, Query(description="Erase it though requests run on its checkpoints.")] = False,
) -> JobDeleted:
    """Erase a job that is over: its story, checkpoints and result files; the receipt is at `location`.

    What is the adapter's by now stays: its result, and a checkpoint that an alias stands for. 400 `invalid_job_state`
    while it is not over.
    """
    tenant_id = asker.tenant_id
    running = 0
    if not force:
        running = await requests_on(parts, tenant_id, await parts.job_erasures.leaving(tenant_id, job))
    erasure = await parts.job_erasures.erase(
        tenant_id,
        job,
        requested_by=asker.key.id,
        force=force,
        running=running,
        replicas=[member.replica.id for member in parts.pool.members()],
    )
    parts.models.forget_tenant(tenant_id)
    await parts.eraser.wait(erasure, REQUEST_WAIT_S)
    response.headers["location"] = f"/v1/erasures/{erasure.id}"
    return JobDeleted(id=job, tailor=Erased(erasure=erasure.id))


@router.get("/jobs/{job}/events", response_model=EventList)
async def list_events(
    job: str,
    request: Request,
    asker: TrainingKey,
    parts: AppParts,
    after: After = None,
    limit: Limit = 20,
    stream: bool = False,
) -> EventList | StreamingResponse:
    """The newest first. With `?stream=true` all of them, the oldest first, and each new one as it comes (SSE)."""
    number = None if after is None else event_number(job, after)
    if after is not None and number is None:
        await parts.jobs.find(asker.tenant_id, job)
        raise RequestInvalid(f"after: '{after}' is no event of this job.", param="after")
    if stream:
        await parts.jobs.find(asker.tenant_id, job)
        return _stream(request, parts, asker, job, number or 0)
    page = await parts.jobs.events(asker.tenant_id, job, before=number, limit=limit + 1)
    return EventList(data=[event_object(event) for event in page[:limit]], has_more=len(page) > limit)


@router.get("/jobs/{job}/checkpoints")
async def list_checkpoints(
    job: str, asker: TrainingKey, parts: AppParts, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """The newest first."""
    page = await parts.jobs.checkpoints(asker.tenant_id, job, after=after, limit=limit + 1)
    data = [checkpoint_object(point) for point in page[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, first_id=first, last_id=last, has_more=len(page) > limit)


def forgetting(answers: Answers) -> OnErase:
    """Takes a tenant's texts out of the answers that are kept for repeated requests."""

    async def forget(connection: AsyncConnection, job: Job) -> None:
        await answers.rewrite(connection, job.tenant_id, _place(job), _without_texts)

    return forget


def _place(job: Job) -> str:
    return f"/v1/fine_tuning/jobs/{job.id}"


def _without_texts(body: str) -> str:
    """A job's object without what its owner wrote."""
    told: dict[str, Any] = json.loads(body)
    told["metadata"] = {}
    told["tailor"] |= {"adapter": "", "alias": "", "options": {}}
    return json.dumps(told)


# checking


async def _checked(body: JobAsked, asker: TenantKey, parts: Parts) -> NewJob:
    """Raises RequestInvalid, NotServable, FileUnfit, ModelUnknown, and what names and aliases raise."""
    method, choices = _method(body)
    if body.integrations:
        raise RequestInvalid(
            "integrations: none are supported; a job's figures are in its events and its result file.",
            param="integrations",
        )
    options = body.tailor
    if options.early_stopping_patience is not None and body.validation_file is None:
        raise RequestInvalid(
            "tailor.early_stopping_patience: early stopping needs a validation_file.",
            param="tailor.early_stopping_patience",
        )
    limits = limits_of(parts, asker.key.plan)
    adapter = _adapter(body.suffix, parts)
    _check_alias(options.alias, parts)
    warm_start = await _warm_start(body, asker, parts, limits)
    statistics = await _check_files(body, method, asker, parts)
    seed = secrets.randbelow(MOST_SEED) if body.seed is None else body.seed
    settled = settle(
        method,
        choices,
        Options(
            rank=options.rank,
            lora_alpha=options.lora_alpha,
            target_modules=None if options.target_modules is None else tuple(options.target_modules),
            rslora=options.rslora,
            packing=options.packing,
            eval_steps=options.eval_steps,
            early_stopping_patience=options.early_stopping_patience,
            sft_weight=options.sft_weight,
            quantization=options.quantization,
        ),
        limits=limits,
        seed=seed,
        statistics=statistics,
        warm_start=warm_start,
    )
    return NewJob(
        tenant_id=asker.tenant_id,
        created_by=asker.key.id,
        model=body.model,
        base_fingerprint=parts.base.fingerprint,
        method=method,
        training_file=body.training_file,
        validation_file=body.validation_file,
        adapter=adapter,
        suffix=body.suffix,
        alias=options.alias,
        warm_start=None if warm_start is None else warm_start.id,
        seed=seed,
        hyperparameters=settled.hyperparameters,
        recipe=settled.recipe,
        tailor=options.model_dump(exclude_unset=True, by_alias=True),
        metadata=body.metadata or {},
        terms=terms_of(asker.key.plan),
        quota=asker.key.plan.quota,
    )


def _method(body: JobAsked) -> tuple[Method, Choices]:
    asked = body.method
    if asked is None:
        return "supervised", Choices(**(body.hyperparameters or Hyperparameters()).model_dump())
    if body.hyperparameters is not None:
        raise RequestInvalid("hyperparameters: the older form of method; send one of the two.", param="hyperparameters")
    if asked.type == "reinforcement":
        raise NotServable(
            "method.type", "reinforcement fine-tuning is not there yet: train with supervised or dpo", "supervised"
        )
    for other in {"supervised", "dpo", "reinforcement"} - {asked.type}:
        if getattr(asked, other) is not None:
            raise RequestInvalid(
                f"method.{other}: the method's type is '{asked.type}'; send method.{asked.type}.",
                param=f"method.{other}",
            )
    if asked.type == "dpo":
        return "dpo", Choices(**(asked.dpo or Dpo()).hyperparameters.model_dump())
    return "supervised", Choices(**(asked.supervised or Supervised()).hyperparameters.model_dump())


def limits_of(parts: Parts, plan: Plan) -> Limits:
    """What could be served of what is trained now: by the settings, by every replica that is there, by the plan."""
    ranks = [parts.inspector.bounds.max_rank]
    for member in parts.pool.members():
        if member.replica.report is not None:
            ranks.append(member.replica.report.engine.max_lora_rank)
    if plan.max_rank is not None:
        ranks.append(plan.max_rank)
    modules = frozenset(path.rpartition(".")[2] for path in parts.base.modules)
    return Limits(parts.base.name, min(ranks), modules, auto.width(parts.base.modules))


def terms_of(plan: Plan) -> Terms:
    """What the plan gives its tenants' jobs."""
    return Terms(plan.weight, plan.max_queued_jobs, plan.max_running_jobs)


def _adapter(suffix: str | None, parts: Parts) -> str | None:
    """The name of the adapter; None: the job's own. Raises RequestInvalid, with what would be right."""
    if suffix is None:
        return None
    try:
        parts.store.check_name(suffix)
    except (NameInvalid, NameReserved) as error:
        near = NOT_PLAIN.sub("-", suffix.lower()).strip("-._")[:64]
        hint = f"; '{near}' would be" if near and near != parts.base.name else ""
        raise RequestInvalid(f"suffix: it names the adapter, and {error}{hint}.", param="suffix") from None
    return suffix


def _check_alias(alias: str, parts: Parts) -> None:
    check_alias(alias)
    check_published_alias(parts, alias)


async def _warm_start(body: JobAsked, asker: TenantKey, parts: Parts, limits: Limits) -> Version | None:
    """The version to go on from: `tailor.from`, or as with OpenAI a fine-tuned model in the place of the base."""
    named = body.tailor.from_
    if named is None:
        if body.model == limits.base_name:
            return None
        return await _own_version(body.model, "model", asker, parts, limits)
    check_model(body.model, limits)
    return await _own_version(named, "tailor.from", asker, parts, limits)


async def _own_version(model: str, param: str, asker: TenantKey, parts: Parts, limits: Limits) -> Version:
    try:
        found = main_of(await parts.store.resolve(asker.tenant_id, model))
    except OtherBaseModel as error:
        raise NotServable(param, str(error), limits.base_name) from None
    except AdapterNotFound:
        if param == "model":
            check_model(model, limits)
        raise ModelUnknown(model, param=param) from None
    if found.tenant_id != asker.tenant_id:
        raise ModelUnknown(model, param=param)  # lent to answer with, not to be trained on
    return found


async def _check_files(body: JobAsked, method: Method, asker: TenantKey, parts: Parts) -> dict[str, Any]:
    """The training file's figures. Raises FileUnfit."""
    training = await _file(body.training_file, "training_file", method, asker, parts)
    if body.validation_file is not None:
        if body.validation_file == body.training_file:
            raise FileUnfit("validation_file", body.validation_file, "it is the training file: send another one")
        await _file(body.validation_file, "validation_file", method, asker, parts)
    return dict((training.report or {}).get("statistics") or {})


async def _file(file_id: str, param: str, method: Method, asker: TenantKey, parts: Parts) -> File:
    try:
        file = await parts.files.find(asker.tenant_id, file_id)
    except FileNotKnown:
        raise FileUnfit(param, file_id, "there is no such file: GET /v1/files lists what there is") from None
    if file.purpose is not Purpose.FINE_TUNE:
        raise FileUnfit(param, file_id, f"its purpose is '{file.purpose}': upload one for '{Purpose.FINE_TUNE}'")
    found = (file.report or {}).get("method")
    if found is not None and found != method:
        raise FileUnfit(param, file_id, f"its rows are for the method '{found}', not for '{method}'")
    return file


def _wanted(request: Request) -> dict[str, str] | None:
    """`metadata[key]=value` of the query. Raises RequestInvalid."""
    if request.query_params.get("metadata") == "null":
        return {}
    found = {}
    for name, value in request.query_params.items():
        key = re.fullmatch(r"metadata\[(.+)\]", name, re.DOTALL)
        if key is not None:
            found[key[1]] = value
    try:
        check_metadata(found)
    except ValueError as error:
        raise RequestInvalid(f"metadata: {error}.", param="metadata") from None
    return found or None


# telling


def job_object(job: Job) -> JobObject:
    """As OpenAI has it."""
    told = {"hyperparameters": job.hyperparameters}
    return JobObject(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        estimated_finish=job.estimated_finish,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.tenant_id,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=job.result_files,
        trained_tokens=job.trained_tokens if job.status in OVER else None,
        seed=job.seed,
        hyperparameters=job.hyperparameters,
        method=MethodTold(type=job.method, **{job.method: told}),
        integrations=[],
        metadata=job.metadata,
        error=None
        if job.error is None
        else ErrorTold(code=job.error.code, message=job.error.message, param=job.error.param),
        tailor=TailorTold(
            adapter=job.adapter,
            alias=job.alias,
            version=job.version_id,
            step=job.step,
            total_steps=job.total_steps,
            pausing=job.wish is not None,
            worker_losses=job.losses,
            options=job.tailor,
            recipe=job.recipe,
        ),
    )


def event_object(event: Event) -> EventObject:
    """As OpenAI has it."""
    return EventObject(
        id=event.id,
        created_at=event.at,
        level=event.told.level.value,
        message=event.told.message,
        type="message" if event.told.data is None else "metrics",
        data=dict(event.told.data or {}),
    )


def checkpoint_object(point: Checkpoint) -> CheckpointObject:
    """As OpenAI has it."""
    return CheckpointObject(
        id=point.id,
        created_at=point.at,
        fine_tuned_model_checkpoint=point.model,
        fine_tuning_job_id=point.job_id,
        step_number=point.step,
        metrics=point.metrics,
    )


def _stream(request: Request, parts: Parts, asker: TenantKey, job: str, after: int) -> StreamingResponse:
    """Raises TooManyStreams."""
    if parts.event_streams[asker.tenant_id] >= MOST_STREAMS:
        raise TooManyStreams(
            f"{MOST_STREAMS} streams of your jobs' events are open here: close one first.", retry_after_s=5
        )
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    events = _follow(request, parts, asker, job, after)
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _follow(request: Request, parts: Parts, asker: TenantKey, job: str, after: int) -> AsyncIterator[bytes]:
    """Every event after that number, until the job is over, the key good no more, or this gateway drains."""
    loop = asyncio.get_running_loop()
    parts.event_streams[asker.tenant_id] += 1
    try:
        spoken = loop.time()
        while not parts.draining.is_set():
            try:
                is_over, events = await _news(request, parts, asker, job, after)
            except GatewayError as refusal:
                yield b"data: " + envelope(refusal) + b"\n\n"
                return
            asked = loop.time()
            for event in events:
                if loop.time() - asked >= LOOK_EVERY_S:
                    break  # who reads slowly may have no key any more
                after = event.number
                yield b"data: " + event_object(event).model_dump_json().encode() + b"\n\n"
            else:
                if is_over and len(events) < 1_000:
                    yield b"data: [DONE]\n\n"
                    return
            if events:
                spoken = loop.time()
                continue
            if loop.time() - spoken >= SAY_SOMETHING_EVERY_S:
                spoken = loop.time()
                yield b": still there\n\n"
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        parts.event_streams[asker.tenant_id] -= 1
        if not parts.event_streams[asker.tenant_id]:
            del parts.event_streams[asker.tenant_id]


async def _news(request: Request, parts: Parts, asker: TenantKey, job: str, after: int) -> tuple[bool, Sequence[Event]]:
    """Whether the job is over or erased, and its next events, at most 1,000; none while the database is away.

    Raises KeyInvalid: the key may not ask any more.
    """
    try:
        await trainer(request, parts)
        is_over = (await parts.jobs.find(asker.tenant_id, job)).status in OVER  # before its last events are read
        return is_over, await parts.jobs.events(asker.tenant_id, job, after=after, limit=1_000)
    except JobNotFound:
        return True, ()
    except StorageError as error:
        log.warning("the events of job %s wait: %s", job, error)
        return False, ()
