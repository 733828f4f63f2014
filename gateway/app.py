"""Assembly of the gateway: the parts, how they hang together, and what starts and stops with the process."""

import asyncio
import gc
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.bundle import Staging
from adapter_store.errors import AdapterStoreError, StorageError
from adapter_store.faults import Bounds
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from gateway.api import adapters, admin, health
from gateway.api import keys as keys_api
from gateway.api import models as models_api
from gateway.api.body import receive_in_time
from gateway.api.generation import Generation
from gateway.auth import Auth
from gateway.change_feed import ChangeFeed
from gateway.database import migrate, open_engine
from gateway.dependencies import Parts
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    MethodNotAllowed,
    RequestInvalid,
    RouteUnknown,
    answer,
    authorization_of,
    send_error,
)
from gateway.freshness import Freshness
from gateway.home import Home
from gateway.housekeeping import tidy
from gateway.keys import Keys, new_secret
from gateway.models import Models
from gateway.plans import Plans
from gateway.replicas.client import ReplicaClient
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.replica import ReplicaOptions
from gateway.replicas.roster import Roster
from gateway.replicas.upstream import Upstream
from gateway.request_policy import ChatRequest, CompletionRequest, RequestPolicy
from gateway.settings import Settings
from gateway.tenants import Scope as KeyScope
from gateway.tenants import Tenants

log = logging.getLogger("tailor.gateway")


def create_app(settings: Settings) -> "Front":
    """The gateway as one ASGI application.

    Raises:
        ConfigurationError, BaseModelInvalid: a setting is missing or names something unusable.
    """
    home = Home(settings.home)
    parts = _build(settings, home)
    hot = _generation(settings, parts, _salts(home.secret_key(settings.secret_key)))
    app = FastAPI(
        title="Tailor",
        version="0.1.0",
        openapi_url=None,  # it would tell strangers the operators' routes
        redirect_slashes=False,  # it would answer with whatever Host the client sent
        lifespan=_lifespan(parts, home, hot.values()),
    )
    app.state.parts = parts
    for router in (health.router, models_api.router, adapters.router, keys_api.router, admin.router):
        app.include_router(router)
    _install_error_handlers(app)
    return Front(app, parts.auth, hot)


OPEN_PATHS = ("/health", "/ready")
UPLOAD_PATH = "/v1/adapters"
SMALL_BODY_BYTES = 65_536


class Front:
    """Sends generation requests down the hot path and everything else, once the key is good, to FastAPI.

    FastAPI reads a body before it asks who sends it: without a key nothing of a body is read here, and with one no more
    than 64 KiB, but for uploads, which are streamed.
    """

    def __init__(self, app: FastAPI, auth: Auth, hot: dict[str, Generation]) -> None:
        self.app = app
        self._auth = auth
        self.hot = {path.encode(): generation for path, generation in hot.items()}  # gateway/protocol.py serves them
        self._hot_paths = frozenset(hot)

    def drain(self) -> None:
        """This process is about to end: `/ready` says so from now on."""
        parts: Parts = self.app.state.parts
        parts.draining.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path: str = scope["path"]
        if path not in OPEN_PATHS:
            try:
                await self._auth.live_key(authorization_of(scope))
                if path in self._hot_paths:
                    raise MethodNotAllowed("This path takes POST only.")
            except (GatewayError, AdapterStoreError) as error:
                return await send_error(send, error)
            if path != UPLOAD_PATH:
                receive = _bounded(receive)
        return await self.app(scope, receive, send)


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive_in_time(receive)
        size += len(message.get("body", b""))
        if size > SMALL_BODY_BYTES:
            raise HTTPException(413)  # the one kind that FastAPI lets through from under its own reading
        return message

    return bounded


def _build(settings: Settings, home: Home) -> Parts:
    folder, name = home.base_model(settings.base_model, settings.base_model_name)
    base = BaseModel.read(folder, name=name, dtype=settings.dtype)
    engine = open_engine(settings.database)
    inspector = Inspector(base, Bounds(settings.max_lora_rank, settings.max_adapter_bytes))
    store = AdapterStore(engine, Blobs.open(settings.blobs), inspector)
    freshness = Freshness(settings.max_staleness_s)
    keys = Keys(engine)
    auth = Auth(keys, freshness)
    models = Models(store, base.name, freshness)
    token = home.replica_token(settings.replica_token)
    pool = ReplicaPool(
        settings.replicas,
        lambda url: ReplicaClient(Upstream(url), token),
        fingerprint=base.fingerprint,
        options=_replica_options(settings),
        spread_at=settings.spread_at,
        roster=Roster(engine),
    )
    return Parts(
        engine=engine,
        tenants=Tenants(engine),
        plans=Plans(engine),
        keys=keys,
        auth=auth,
        store=store,
        inspector=inspector,
        staging=Staging(home.path / "staging", weights_limit_bytes=settings.max_adapter_bytes),
        models=models,
        pool=pool,
        changes=ChangeFeed(
            open_engine(settings.database),  # its own: see there
            [models.take_in, auth.take_in, pool.on_change],
            [models.clear, auth.clear, pool.on_reset],
            freshness,
        ),
    )


def _replica_options(settings: Settings) -> ReplicaOptions:
    return ReplicaOptions(
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


def _generation(settings: Settings, parts: Parts, salt_of: Callable[[str], str]) -> dict[str, Generation]:
    def endpoint(path: str, kind: type[ChatRequest] | type[CompletionRequest]) -> Generation:
        policy = RequestPolicy(
            kind,
            max_messages=settings.max_messages,
            max_output_tokens=settings.max_output_tokens,
            max_choices=settings.max_choices,
            max_schema_bytes=settings.max_schema_bytes,
        )
        return Generation(
            path,
            policy=policy,
            auth=parts.auth,
            models=parts.models,
            pool=parts.pool,
            salt_of=salt_of,
            max_body_bytes=settings.max_body_bytes,
            first_byte_timeout_s=settings.first_byte_timeout_s,
        )

    return {
        path: endpoint(path, kind)
        for path, kind in (("/v1/chat/completions", ChatRequest), ("/v1/completions", CompletionRequest))
    }


def _salts(secret: bytes) -> Callable[[str], str]:
    """Tenant → the salt of its prefix cache: tenants share none, and none can guess another's."""
    known: dict[str, str] = {}

    def salt_of(tenant_id: str) -> str:
        salt = known.get(tenant_id)
        if salt is None:
            salt = known[tenant_id] = hmac.new(secret, tenant_id.encode(), hashlib.sha256).hexdigest()
        return salt

    return salt_of


def _lifespan(
    parts: Parts, home: Home, hot: Collection[Generation]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await migrate(parts.engine)
        parts.staging.sweep()
        if not await parts.keys.has_operator():
            secret = new_secret()
            home.keep_operator_key(secret)  # first the file: a key that nobody has ever seen would lock everybody out
            await parts.keys.create(None, [KeyScope.OPERATOR], maker=None, label="first operator key", secret=secret)
        await parts.changes.start()
        tasks = [asyncio.create_task(work) for work in (parts.changes.follow(), tidy(parts.store))]
        tasks += [asyncio.create_task(generation.watch()) for generation in hot]
        tasks.append(asyncio.create_task(parts.auth.uses.follow()))
        parts.pool.start()
        gc.collect()
        gc.freeze()  # what lives as long as the process is never walked by the collector again
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await parts.pool.stop()
        await parts.inspector.close()
        with suppress(StorageError):
            await parts.auth.uses.flush()
        await parts.changes.close()
        await parts.engine.dispose()

    return lifespan


def _install_error_handlers(app: FastAPI) -> None:
    async def respond(request: Request, error: Exception) -> Response:
        told = answer(_as_ours(error))
        if told.status == 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Response(told.body, told.status, {name.decode(): value.decode() for name, value in told.headers})

    for kind in (GatewayError, AdapterStoreError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return RequestInvalid("The body is not JSON.", code="invalid_json")
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        return RequestInvalid(f"{field or 'The body'}: {first['msg']}.", param=field)
    if isinstance(error, HTTPException) and error.status_code == 404:
        return RouteUnknown("There is no such path; docs/api.md lists those that exist.")
    if isinstance(error, HTTPException) and error.status_code == 405:
        return MethodNotAllowed("This path does not take that method.")
    if isinstance(error, HTTPException) and error.status_code == 413:
        return BodyTooLarge(f"The body is larger than {SMALL_BODY_BYTES} bytes.")
    if isinstance(error, HTTPException):
        return RequestInvalid(str(error.detail))
    return error
