"""What a handler may ask for."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from adapter_store.aliases import Aliases
from adapter_store.base_model import BaseModel
from adapter_store.bundle import Staging
from adapter_store.engine import AsyncEngine
from adapter_store.erasure import Erasures
from adapter_store.ids import TenantId
from adapter_store.imports import Imports
from adapter_store.inspector import Inspector
from adapter_store.rollouts import Rollouts
from adapter_store.scrub import Scrubber
from adapter_store.signing import Signer
from adapter_store.store import AdapterStore
from adapter_store.uploads import Uploads
from gateway.api_key import ApiKey
from gateway.arrivals import Arrivals
from gateway.auth import Auth
from gateway.change_feed import ChangeFeed
from gateway.erasing import Eraser
from gateway.errors import ScopeMissing, authorization_of
from gateway.freshness import Freshness
from gateway.idempotency import Answers
from gateway.job_figures import JobFigures
from gateway.keys import Keys
from gateway.limits import Limits
from gateway.models import Models
from gateway.pins import Pins
from gateway.plans import Plans
from gateway.proofs import Proofs
from gateway.quarantine import Quarantine
from gateway.replicas.pool import ReplicaPool
from gateway.rollouts import RolloutWatch
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing
from gateway.tenants import Scope, Tenants
from gateway.usage import Ledger
from training.file_check import FileCheck
from training.file_uploads import FileUploads
from training.files import Files
from training.job_erasure import JobErasures
from training.jobs import Jobs


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Of one training file: its size, and when it goes where its sender does not say; None: never."""

    most_bytes: int
    expiry_s: int | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The gateway's parts, built once by `create_app`."""

    engine: AsyncEngine
    base: BaseModel
    tenants: Tenants
    plans: Plans
    keys: Keys
    auth: Auth
    limits: Limits
    ledger: Ledger
    store: AdapterStore
    aliases: Aliases
    rollouts: Rollouts
    rollout_watch: RolloutWatch
    scrubber: Scrubber
    signer: Signer
    erasures: Erasures
    eraser: Eraser
    inspector: Inspector
    staging: Staging
    arrivals: Arrivals
    uploads: Uploads
    imports: Imports
    files: Files
    jobs: Jobs
    job_erasures: JobErasures
    job_figures: JobFigures
    file_uploads: FileUploads
    sweep_saved_runs: Callable[[], Awaitable[int]]
    file_check: FileCheck
    file_limits: FileLimits
    answers: Answers
    stall_s: float
    models: Models
    pool: ReplicaPool
    quarantine: Quarantine
    pins: Pins
    proofs: Proofs
    metrics: Metrics
    tracing: Tracing
    freshness: Freshness
    changes: ChangeFeed
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    event_streams: Counter[TenantId] = field(default_factory=Counter)
    """Streams of jobs' events that are open, by tenant."""
    connections: set[Any] = field(default_factory=set)
    """Clients' connections that are open."""


@dataclass(frozen=True, slots=True)
class TenantKey:
    """A live key, and the tenant that it stands for."""

    key: ApiKey
    tenant_id: TenantId


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


AppParts = Annotated[Parts, Depends(_parts)]


async def _operator(request: Request, parts: AppParts) -> ApiKey:
    return await parts.auth.caller(authorization_of(request.scope), Scope.OPERATOR)


async def _tenant_admin(request: Request, parts: AppParts) -> TenantKey:
    key = await parts.auth.caller(authorization_of(request.scope), Scope.ADMIN)
    if key.tenant_id is None:
        raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant, or /admin/v1.")
    return TenantKey(key, key.tenant_id)


async def _reader(request: Request, parts: AppParts) -> TenantId:
    return await parts.auth.tenant(authorization_of(request.scope), Scope.INFERENCE)


async def publisher(request: Request, parts: AppParts) -> TenantKey:
    """The key that may publish adapters, as of now."""
    key = await parts.auth.caller(authorization_of(request.scope), Scope.ADAPTERS)
    if key.tenant_id is None:
        raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
    return TenantKey(key, key.tenant_id)


async def trainer(request: Request, parts: AppParts) -> TenantKey:
    """The key that may keep training files and run jobs, as of now."""
    key = await parts.auth.caller(authorization_of(request.scope), Scope.TRAINING)
    if key.tenant_id is None:
        raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
    return TenantKey(key, key.tenant_id)


async def _adapter_tenant(request: Request, parts: AppParts) -> TenantId:
    return (await publisher(request, parts)).tenant_id


Operator = Annotated[ApiKey, Depends(_operator)]
KeyAdmin = Annotated[TenantKey, Depends(_tenant_admin)]
InferenceTenant = Annotated[TenantId, Depends(_reader)]
AdapterTenant = Annotated[TenantId, Depends(_adapter_tenant)]
TrainingKey = Annotated[TenantKey, Depends(trainer)]
AdapterKey = Annotated[TenantKey, Depends(publisher)]
