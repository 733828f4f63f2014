"""The agent's HTTP routes and its guard; the contract is `docs/agent-contract.md`. Nothing here is for tenants."""

import asyncio
import hmac
import logging
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from msgspec import to_builtins
from pydantic import BaseModel as Schema
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter_store.agent.alarm import Alarms
from adapter_store.agent.counts import Counts
from adapter_store.agent.engine import Engine, EngineRefusedError
from adapter_store.agent.residency import (
    NAME,
    AdapterUnknownError,
    LoadQueueFullError,
    NameTakenError,
    Residency,
)
from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE, bundle_digest
from adapter_store.cache import DigestPinned
from adapter_store.catalog import BlobFile
from adapter_store.errors import AdapterStoreError

log = logging.getLogger("tailor.agent")
ADAPTER_HEADER = b"x-tailor-adapter"
ID_HEADER = b"x-request-id"


@dataclass(slots=True)
class Agent:
    """What the routes work with; put on the vLLM app's state once the engine runs."""

    engine: Engine
    residency: Residency
    alarms: Alarms
    counts: Counts
    facts: dict[str, object]
    null_adapter: str | None
    in_flight: int = 0
    """Generation requests of every gateway, the base model's too."""


class File(Schema, extra="forbid"):
    name: Literal["adapter_config.json", "adapter_model.safetensors"]
    key: Annotated[str, Field(max_length=512)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1)]


class Load(Schema, extra="forbid"):
    owner: Annotated[str, Field(max_length=128)] = ""
    files: Annotated[list[File], Field(min_length=2, max_length=2)]
    tier: Literal["gpu", "disk"] = "gpu"


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Digests(Schema, extra="forbid"):
    digests: Annotated[list[Digest], Field(max_length=1_024)]


class Pinned(Schema, extra="forbid"):
    owner: Annotated[str, Field(max_length=128)]
    digest: Digest


class Pins(Schema, extra="forbid"):
    adapters: Annotated[list[Pinned], Field(max_length=65_536)]


class Asked(Schema, extra="forbid"):
    requests: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=1_024)]


class Recycle(Schema, extra="forbid"):
    generation: Annotated[str, Field(max_length=64)]


class Probe(Schema, extra="forbid"):
    deadline_s: Annotated[float, Field(gt=0, le=60)] = 2


router = APIRouter(prefix="/tailor")


def _agent(request: Request) -> Agent:
    agent: Agent = request.app.state.tailor_agent
    return agent


def _error(status: int, code: str, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


@router.get("/state")
async def state(request: Request) -> Response:
    """What this replica is and holds."""
    agent = _agent(request)
    return JSONResponse(
        {
            **agent.facts,
            "null_adapter": agent.null_adapter,
            "adapters": await _residents(agent),
            "disk": agent.residency.disk(),
            "loads": {"count": agent.residency.load_count, "seconds": agent.residency.load_seconds},
            "corrupted_requests": agent.engine.corrupted_requests(),
            "in_flight": agent.in_flight,
            "alarm": to_builtins(agent.alarms.now),
            "last_alarm": to_builtins(agent.alarms.before),
        }
    )


async def _residents(agent: Agent) -> list[dict[str, object]]:
    """An engine that has died says nothing, not even no."""
    asked = asyncio.ensure_future(agent.residency.report())
    if not await _before_an_alarm(agent, asked):
        return agent.residency.last_report()
    return asked.result()


async def _before_an_alarm(agent: Agent, work: "asyncio.Future[Any]") -> bool:
    """Whether the work was done, well or not, before an alarm; else it is left alone."""
    alarm = asyncio.ensure_future(agent.alarms.raised.wait())
    try:
        await asyncio.wait({work, alarm}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        alarm.cancel()
    if not work.done():
        work.add_done_callback(lambda late: late.cancelled() or late.exception())
    return work.done()


@router.put("/adapters/{name}")
async def load(request: Request, name: str, body: Load) -> Response:
    """Fetch by digest, verify, load; idempotent for equal digests."""
    if not NAME.fullmatch(name):
        return _error(422, "name_invalid", "an adapter is named a- and 8 to 64 hex digits")
    files = [BlobFile(file.name, file.key, file.sha256, file.bytes) for file in body.files]
    hashes = {file.name: file.sha256 for file in files}
    if len(hashes) != len(files):
        return _error(422, "files_invalid", "each of the two files is named once")
    residency = _agent(request).residency
    try:
        digest = bundle_digest(hashes[CONFIG_FILE], hashes[WEIGHTS_FILE])
        if body.tier == "disk":
            fetch_s = await residency.prefetch(digest, files)
            return JSONResponse({"name": name, "tier": "disk", "fetch_s": fetch_s, "load_s": 0.0})
        work = asyncio.ensure_future(residency.load(name, digest, files, owner=body.owner))
        if not await _before_an_alarm(_agent(request), work):
            return _ending()
        done = work.result()
    except NameTakenError:
        return _error(409, "name_taken", "the name was used before in this engine's life")
    except LoadQueueFullError as error:
        return _error(503, "load_queue_full", str(error), **{"retry-after": "1"})
    except EngineRefusedError as error:
        if _agent(request).engine.is_dead():
            return _ending()
        log.exception("the engine refused adapter %s", name)
        return _error(422, "engine_refused", str(error))
    except AdapterStoreError as error:
        log.exception("the files of adapter %s could not be fetched", name)
        return _error(502, type(error).__name__, str(error))
    return JSONResponse({"name": done.name, "tier": "gpu", "fetch_s": done.fetch_s, "load_s": done.load_s})


@router.delete("/adapters/{name}")
async def unload(request: Request, name: str) -> Response:
    """Drain, unload for real, forget the name, release the files."""
    try:
        await _agent(request).residency.unload(name)
    except AdapterUnknownError:
        return _error(404, "adapter_unknown", "no adapter of that name is resident")
    return Response(status_code=204)


def _ending() -> JSONResponse:
    return _error(503, "engine_ending", "the engine has died or computed NaN: it is started again")


@router.post("/disk")
async def on_disk(request: Request, body: Digests) -> Response:
    """Which of these are on this machine's disk."""
    return JSONResponse({"digests": _agent(request).residency.on_disk(body.digests)})


@router.delete("/disk/{digest}")
async def release(request: Request, digest: str) -> Response:
    """Remove an adapter's files from this machine's disk."""
    try:
        known = await _agent(request).residency.release(digest)
    except DigestPinned:
        return _error(409, "in_use", "the engine knows a name that uses these files: unload it first")
    except ValueError:
        return _error(422, "digest_invalid", "a digest is 64 hex digits")
    return Response(status_code=204) if known else _error(404, "not_on_disk", "these files are not here")


@router.put("/pins")
async def pin(request: Request, body: Pins) -> Response:
    """These adapters, and no others, leave host memory last."""
    _agent(request).residency.pin((adapter.owner, adapter.digest) for adapter in body.adapters)
    return Response(status_code=204)


@router.post("/usage")
async def usage(request: Request, body: Asked) -> Response:
    """What these requests have used, of which their answers did not say it."""
    counts = _agent(request).counts
    found = {name: use for name in body.requests if (use := counts.use_of(name)) is not None}
    running = [name for name in body.requests if counts.is_running(name)]
    return JSONResponse({"ended": to_builtins(found), "running": running})


@router.post("/recycle")
async def recycle(request: Request, body: Recycle) -> Response:
    """The gateway has taken note of this engine's alarm: the process ends, for its supervisor to start it again."""
    agent = _agent(request)
    if body.generation != agent.facts["generation"] or agent.alarms.now is None:
        return _error(409, "no_alarm", "this engine has raised no alarm")
    agent.alarms.heard.set()
    return Response(status_code=202)


@router.post("/probe")
async def probe(request: Request, body: Probe) -> Response:
    """One token through the engine: the only proof of health (`/health` lies while a step hangs)."""
    agent = _agent(request)
    if agent.alarms.now is not None:
        return _ending()
    try:
        async with asyncio.timeout(body.deadline_s):
            latency_s = await agent.engine.generate_one_token(agent.null_adapter)
    except TimeoutError:
        return _error(503, "probe_timeout", f"no token within {body.deadline_s} s")
    except Exception as error:  # whatever the engine raises, the answer is the same: it is not healthy
        if agent.engine.is_dead():
            return _error(503, "engine_dead", "the engine has died")
        log.exception("probe failed")
        return _error(503, "probe_failed", type(error).__name__)
    return JSONResponse({"latency_s": latency_s})


class Guard:
    """Asks the replica's token on every route but `GET /health`, and counts each adapter's requests and their tokens.

    A generation request names its adapter in `x-tailor-adapter`, so that an unload can wait for it from its first
    byte on, and an adapter that is gone is a 404 before vLLM sees the request.
    """

    def __init__(self, app: ASGIApp, *, token: str, owner: FastAPI) -> None:
        self._app = app
        self._owner = owner
        self._authorization = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["path"] == "/health" and scope.get("method") == "GET"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            refusal = _error(401, "token_invalid", "this route asks for the replica's token")
            return await refusal(scope, receive, send)
        name = headers.get(ADAPTER_HEADER, b"").decode("latin-1")
        agent: Agent | None = getattr(self._owner.state, "tailor_agent", None)
        if agent is None or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        if agent.alarms.now is not None:
            return await _ending()(scope, receive, send)
        agent.in_flight += 1
        try:
            with agent.counts.counting(headers.get(ID_HEADER, b"").decode("latin-1")):
                await self._generate(agent, name, scope, receive, send)
        finally:
            agent.in_flight -= 1

    async def _generate(self, agent: Agent, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not name or name == agent.null_adapter:  # the null adapter stays for the engine's life
            return await self._app(scope, receive, send)
        try:
            async with agent.residency.serving(name):
                return await self._app(scope, receive, send)
        except AdapterUnknownError:
            refusal = _error(404, "adapter_unknown", "no adapter of that name is resident")
            return await refusal(scope, receive, send)
