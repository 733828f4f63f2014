"""Assembly of the gateway: the parts, how they hang together, and what starts and stops with the process."""

import asyncio
import gc
import hashlib
import hmac
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_store.aliases import Aliases
from adapter_store.blobs import Blobs
from adapter_store.bundle import Staging
from adapter_store.errors import AdapterStoreError, StorageError
from adapter_store.imports import Imports
from adapter_store.rollouts import Rollouts
from adapter_store.scrub import Scrubber
from adapter_store.uploads import Uploads
from gateway.api import (
    adapters,
    admin,
    aliases,
    base_model,
    checkpoint_permissions,
    erasures,
    evaluations,
    file_uploads,
    files,
    fine_tuning,
    health,
    imports,
    keys,
    models,
    proofs,
    quarantine,
    replicas,
    residency,
    scaling,
    storage,
    uploads,
    usage,
)
from gateway.api.generation import Generation, KeyWatch, Patience, Services, new_batches
from gateway.arrivals import Arrivals
from gateway.auth import Auth
from gateway.body_room import BodyRoom
from gateway.change_feed import ChangeFeed
from gateway.database import migrate, open_engine
from gateway.dependencies import FileLimits, Parts
from gateway.dialects import Bounds, all_dialects
from gateway.erasing import Eraser
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    MethodNotAllowed,
    RequestInvalid,
    RouteUnknown,
    answer,
)
from gateway.freshness import Freshness
from gateway.front import SMALL_BODY_BYTES, Front
from gateway.home import Home
from gateway.housekeeping import scrub, tidy
from gateway.idempotency import Answers
from gateway.job_figures import JobFigures
from gateway.keys import Keys
from gateway.limits import open_limits
from gateway.logs import ids
from gateway.models import Models
from gateway.operator_port import OperatorPort
from gateway.pins import Pins
from gateway.plans import Plans
from gateway.proofs import Policy, Proofs
from gateway.quarantine import Quarantine
from gateway.readings import watch_parts
from gateway.replicas.client import ReplicaClient
from gateway.replicas.pool import ReplicaPool, TakeLoad
from gateway.replicas.replica import ReplicaOptions
from gateway.replicas.roster import Roster
from gateway.request_ids import request_id_of
from gateway.rollouts import RolloutWatch
from gateway.settings import Settings
from gateway.store_opening import open_store
from gateway.telemetry.asgi import Counted, template_of
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import open_tracing
from gateway.tenants import Tenants
from gateway.usage import Ledger
from training import jobs, saved_runs
from training.errors import TrainingError
from training.file_check import FileCheck
from training.file_uploads import FileUploads
from training.files import Files
from training.job_erasure import JobErasures
from training.jobs import Jobs

log = logging.getLogger("tailor.gateway")
ROUTERS = (
    health,
    models,
    adapters,
    scaling,
    evaluations,
    uploads,
    aliases,
    residency,
    proofs,
    base_model,
    imports,
    erasures,
    files,
    file_uploads,
    checkpoint_permissions,
    fine_tuning,
    keys,
    usage,
    admin,
    replicas,
    quarantine,
    storage,
)


def create_app(settings: Settings, *, operators: socket.socket | None = None) -> Front:
    """The gateway as one ASGI application. `operators`: the operator port, where it is bound already.

    Raises:
        ConfigurationError, BaseModelInvalid: a setting is missing or names something unusable.
    """
    home = Home(settings.home)
    parts = _build(settings, home)
    services = _services(parts, _salts(home.secret_key(settings.secret_key)))
    hot = {
        path: Generation(
            dialect,
            services,
            max_body_bytes=settings.max_body_bytes,
            first_byte_timeout_s=settings.first_byte_timeout_s,
            hear_out_s=settings.hear_out_s,
        )
        for path, dialect in all_dialects(_bounds(settings)).items()
    }
    watch_parts(parts, services.patience)
    app = FastAPI(
        title="Tailor",
        version="0.1.0",
        openapi_url=None,  # it would tell strangers the operators' routes
        redirect_slashes=False,  # it would answer with whatever Host the client sent
        lifespan=_lifespan(parts, services, home, _operator_port(settings, parts, operators)),
    )
    app.state.parts = parts
    for part in ROUTERS:
        app.router.routes.extend(part.router.routes)  # include_router would make each a second time
    _install_error_handlers(app)
    return Front(Counted(app, parts.metrics), parts, hot, services.batches)


def _build(settings: Settings, home: Home) -> Parts:
    opened = open_store(settings, home)
    base, engine, blobs, store = opened.base, opened.engine, opened.blobs, opened.store
    answers = Answers(engine)
    job_rows = Jobs(engine)
    rollouts = Rollouts(engine, base.fingerprint)
    freshness = Freshness(settings.max_staleness_s)
    key_rows = Keys(engine)
    staging = Staging(home.path / "staging", weights_limit_bytes=settings.max_adapter_bytes)
    auth = Auth(key_rows, freshness)
    known_models = Models(store, base.name, freshness)
    held_back = Quarantine(engine)
    ledger = Ledger(
        engine,
        home.path / "usage",
        flush_s=settings.usage_flush_s,
        journal_limit_bytes=settings.usage_journal_bytes,
        fsync=settings.usage_fsync,
    )
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url is not None else None
    limits = open_limits(redis_url, used_this_month=ledger.tokens_since, timeout_s=settings.limits_timeout_s)
    token = home.replica_token(settings.replica_token)
    pool = _pool(settings, Roster(engine), held_back, base.fingerprint, token, limits.take_load)
    proving = Proofs(engine, pool, dtype=base.dtype, policy=Policy(settings.proof), timeout_s=settings.proof_timeout_s)
    pins = Pins(engine, store, pool.set_pins)
    eraser = Eraser(store.erasures, pool)
    pool.on_state(eraser.wake)
    return Parts(
        engine=engine,
        base=base,
        tenants=Tenants(engine),
        plans=Plans(engine),
        keys=key_rows,
        auth=auth,
        limits=limits,
        ledger=ledger,
        store=store,
        aliases=Aliases(engine, base),
        rollouts=rollouts,
        rollout_watch=RolloutWatch(rollouts, compare=proving.finding_on, on_moved=known_models.forget_tenant),
        scrubber=Scrubber(
            engine,
            blobs,
            Blobs.open(settings.blobs_copy_url) if settings.blobs_copy_url is not None else None,
            bytes_per_s=settings.scrub_bytes_per_s,
            every_s=settings.scrub_every_s,
        ),
        signer=opened.signer,
        erasures=store.erasures,
        eraser=eraser,
        inspector=opened.inspector,
        staging=staging,
        arrivals=Arrivals(staging, most_at_once=settings.uploads_at_once),
        uploads=Uploads(engine, blobs, part_bytes=settings.upload_part_bytes, expiry_s=settings.upload_expiry_s),
        imports=Imports(blobs, settings.import_root),
        files=Files(engine, blobs, in_use=jobs.uses_of_file, on_erase=files.forgetting(answers)),
        jobs=job_rows,
        job_erasures=JobErasures(engine, on_erase=fine_tuning.forgetting(answers)),
        job_figures=JobFigures(job_rows),
        file_uploads=FileUploads(engine, blobs, expiry_s=settings.upload_expiry_s),
        sweep_saved_runs=partial(saved_runs.sweep, engine, blobs),
        file_check=FileCheck(
            opened.base_folder, max_length=settings.max_model_len, timeout_s=settings.file_check_timeout_s
        ),
        file_limits=FileLimits(settings.max_file_bytes, settings.file_expiry_s),
        answers=answers,
        stall_s=settings.upload_stall_s,
        models=known_models,
        pool=pool,
        quarantine=held_back,
        pins=pins,
        proofs=proving,
        metrics=Metrics(tenants=settings.metrics_tenants, adapters=settings.metrics_adapters),
        tracing=open_tracing(os.environ, base_model=base.name, trust_parent=settings.trace_trust_parent),
        freshness=freshness,
        changes=ChangeFeed(
            open_engine(settings.database),  # its own: see there
            [
                known_models.take_in,
                auth.take_in,
                pool.on_change,
                held_back.on_change,
                pins.on_change,
                proving.on_change,
                eraser.on_change,
            ],
            [
                known_models.clear,
                auth.clear,
                pool.on_reset,
                held_back.on_reset,
                pins.on_reset,
                proving.wake,
                eraser.wake,
            ],
            freshness,
        ),
    )


def _pool(
    settings: Settings, roster: Roster, held_back: Quarantine, fingerprint: str, token: str, take_load: TakeLoad
) -> ReplicaPool:
    options = ReplicaOptions(
        load_timeout_s=settings.load_timeout_s,
        probe_interval_s=settings.probe_interval_s,
        probe_deadline_s=settings.probe_deadline_s,
        concurrency=settings.replica_concurrency,
        quantum_s=settings.adapter_quantum_s,
        queue=settings.queue_limit,
        tenant_queue=settings.tenant_queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        fair=settings.fairness,
    )
    return ReplicaPool(
        settings.replicas,
        lambda url: ReplicaClient(url, token),
        fingerprint=fingerprint,
        take_load=take_load,
        options=options,
        spread_at=settings.spread_at,
        roster=roster,
        quarantine=held_back,
    )


def _bounds(settings: Settings) -> Bounds:
    return Bounds(
        max_messages=settings.max_messages,
        max_output_tokens=settings.max_output_tokens,
        max_choices=settings.max_choices,
        max_schema_bytes=settings.max_schema_bytes,
        calls_tools=settings.tool_call_parser is not None,
        allowed_fields=frozenset(settings.allowed_fields),
    )


def _services(parts: Parts, salt_of: Callable[[str], str]) -> Services:
    return Services(
        auth=parts.auth,
        models=parts.models,
        limits=parts.limits,
        pool=parts.pool,
        journal=parts.ledger.journal,
        counts=parts.metrics.generation,
        body_room=BodyRoom(),
        tracing=parts.tracing,
        rollouts=parts.rollout_watch,
        patience=Patience(),
        batches=new_batches(),
        salt_of=salt_of,
        base_fingerprint=parts.base.fingerprint,
    )


def _salts(secret: bytes) -> Callable[[str], str]:
    """Tenant → the salt of its prefix cache: tenants share none, and none can guess another's."""
    return lambda tenant_id: hmac.new(secret, tenant_id.encode(), hashlib.sha256).hexdigest()


def _operator_port(settings: Settings, parts: Parts, bound: socket.socket | None) -> OperatorPort | None:
    if not settings.operator_port and bound is None:
        return None
    return OperatorPort(settings.operator_host, settings.operator_port, parts.metrics.page, listener=bound)


def _lifespan(
    parts: Parts, services: Services, home: Home, operators: OperatorPort | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await migrate(parts.engine)
        parts.staging.sweep()
        await parts.keys.ensure_operator(home.keep_operator_key)
        await parts.changes.start()
        await parts.quarantine.read()  # before a replica is given its adapters back
        await parts.ledger.start()
        await parts.limits.start()
        if operators is not None:
            await operators.start()
        works = (
            parts.changes.follow(),
            parts.auth.uses.follow(),
            parts.metrics.sample_lag(),
            services.patience.watch(),
            KeyWatch(parts.auth, services.patience.running).watch(),
            parts.quarantine.follow(),
            parts.quarantine.write(),
            parts.rollout_watch.follow(),
            parts.pins.follow(),
            tidy(
                parts.store,
                parts.uploads,
                parts.files,
                parts.file_uploads,
                parts.sweep_saved_runs,
                parts.answers,
            ),
            scrub(parts.scrubber),
            parts.proofs.follow(),
            parts.eraser.follow(),
            parts.job_figures.follow(),
        )
        tasks = [asyncio.create_task(work) for work in works]
        for task in tasks:
            task.add_done_callback(_tell_of_its_end)
        if operators is not None:
            tasks.append(asyncio.create_task(_stop_with_the_drain(operators, parts.draining)))
        parts.pool.start()
        gc.collect()
        gc.freeze()  # what lives as long as the process is never walked by the collector again
        gc.enable()  # `gateway/server.py` has turned it off
        yield
        if operators is not None:
            await operators.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await parts.pool.stop()
        await parts.limits.close()
        await parts.ledger.close()
        await parts.tracing.close()
        await parts.inspector.close()
        with suppress(StorageError):
            await parts.auth.uses.flush()
        await parts.changes.close()
        await parts.engine.dispose()

    return lifespan


def _tell_of_its_end(task: "asyncio.Task[None]") -> None:
    """Work that was to go on for ever; nobody else would see that it did not."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s has ended, and goes on with a restart alone", task.get_coro(), exc_info=error)


async def _stop_with_the_drain(operators: OperatorPort, draining: asyncio.Event) -> None:
    """The next worker has the same socket: figures of both in turn would look like counters that fall."""
    await draining.wait()
    await operators.stop()


def _install_error_handlers(app: FastAPI) -> None:
    async def respond(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            error = MethodNotAllowed("This path does not take that method.", allow=_methods(app, request.scope))
        told = answer(_as_ours(error))
        if told.status == 500:
            request_id = request_id_of(request.scope)
            log.error(
                "request %s failed: %s %s",
                request_id,
                request.method,
                template_of(request.scope),
                exc_info=error,
                extra=ids(request_id=request_id),
            )
        return Response(told.body, told.status, {name.decode(): value.decode() for name, value in told.headers})

    for kind in (GatewayError, AdapterStoreError, TrainingError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, respond)
    app.add_middleware(_Unforeseen, respond=respond)


def _methods(app: FastAPI, scope: Scope) -> str:
    """Of all routes that a path has: Starlette names those of the first."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


class _Unforeseen:
    """Answers what nothing else has caught; Starlette would answer it too, then raise it again, which costs the client
    its connection and the log a second traceback."""

    def __init__(self, app: ASGIApp, respond: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if begun:
                raise
            response = await self._respond(Request(scope), error)
            await response(scope, receive, send)


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return RequestInvalid("The body is not JSON.", code="invalid_json")
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        return RequestInvalid(f"{field or 'The body'}: {first['msg']}.", param=field)
    if isinstance(error, HTTPException) and error.status_code == 404:
        return RouteUnknown()
    if isinstance(error, HTTPException) and error.status_code == 413:
        return BodyTooLarge(f"The body is larger than {SMALL_BODY_BYTES} bytes.")
    if isinstance(error, HTTPException):
        return RequestInvalid(str(error.detail))
    return error
