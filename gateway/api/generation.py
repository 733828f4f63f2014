"""Generation requests: the hot path, one task per request in front of FastAPI, whatever dialect they come in.

`Generation._answer` reads top to bottom: who, what, which version, may they, where, relay. `_settle` gives back what a
request holds and counts it, once, however it ends. No database, no framework and no span stands on that path, and no
chunk wakes a task: `_Pipe` moves them from the replica's connection to the client's.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Final

from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.auth import Auth
from gateway.dialects import Checked, Dialect, Stream
from gateway.errors import (
    AdapterNotLoadable,
    BodyTooLarge,
    GatewayError,
    ReplicaFailed,
    ReplicaUnavailable,
    ScopeMissing,
)
from gateway.limits import Admission, Limits
from gateway.logs import ids
from gateway.models import Models
from gateway.plans import Plan
from gateway.protocol import ClientGone, Exchange
from gateway.relay import BrokenOff
from gateway.replicas.pool import Place, ReplicaPool
from gateway.replicas.replica import Replica
from gateway.replicas.upstream import Connection, OutOfDescriptorsError, UpstreamError
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.observation import Observation
from gateway.telemetry.tracing import Trace, Tracing
from gateway.tenants import Scope as KeyScope
from gateway.tokens import Usage
from gateway.usage import Ledger

log = logging.getLogger("tailor.generation")
LOOK_S: Final = 0.25
HEAR_OUT_S: Final = 2.0
SLOW_READER_S: Final = 60.0
"""How long a client may keep an answer waiting, all its pauses together: it holds a place in an engine meanwhile."""
CLIENT_GONE: Final = 499
FULL: Final = 503
BYTES_PER_TOKEN: Final = 4
SAFE_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
JSON: Final = b"content-type: application/json\r\n"
EVENTS: Final = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
WHOLE_LIMIT_BYTES: Final = 64 << 20


class Patience:
    """Ends requests whose engine has not answered in time; one look at all of them costs less than a timer each."""

    def __init__(self) -> None:
        self.running: set[_Request] = set()

    async def watch(self) -> None:
        """For ever; meant to run as one task."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for request in [request for request in self.running if 0.0 < request.deadline < now]:
                request.expire()


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What every generation endpoint works with."""

    auth: Auth
    models: Models
    limits: Limits
    pool: ReplicaPool
    ledger: Ledger
    metrics: Metrics
    tracing: Tracing
    patience: Patience
    salt_of: Callable[[str], str]
    base_fingerprint: str


class _Request:
    """What one request has found out and holds so far."""

    __slots__ = (
        "admission", "asked", "at_work", "connection", "cost", "deadline", "exchange", "fallback", "id", "pipe",
        "place", "plan", "seen", "tenant_id", "trace", "trace_lines", "tried", "usage", "version",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, route: str) -> None:
        self.exchange = exchange
        given = exchange.header(b"x-request-id")
        self.id = given if given is not None and SAFE_ID.fullmatch(given) else b"%032x" % getrandbits(128)
        self.seen = Observation(route, exchange.began_at)
        self.deadline = 0.0
        self.trace: Trace | None = None
        self.trace_lines = b""
        self.tenant_id = TenantId("")
        self.plan: Plan
        self.asked: Checked
        self.cost = 0
        self.version: Version | None = None
        self.fallback = b""
        self.admission: Admission | None = None
        self.tried: list[Replica] = []
        self.place: Place | None = None
        self.connection: Connection | None = None
        self.at_work = False
        self.pipe: _Pipe | None = None
        self.usage: Usage | None = None

    def expire(self) -> None:
        """Its time is over: for the first byte of an answer, or for hearing an engine out whose client has left."""
        self.deadline = 0.0
        if self.pipe is None:
            self.exchange.expire(_late())
        else:
            self.pipe.expire()


class Generation:
    """One endpoint; the hot path of its dialect."""

    def __init__(
        self, dialect: Dialect, services: Services, *, max_body_bytes: int, first_byte_timeout_s: float
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self._dialect = dialect
        self._first_byte_timeout_s = first_byte_timeout_s
        self._services = services
        self._auth = services.auth
        self._models = services.models
        self._limits = services.limits
        self._pool = services.pool
        self._running = services.patience.running

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request; whatever happens, the client gets one envelope and what was held is given back."""
        request = _Request(exchange, self._dialect.path)
        self._running.add(request)
        header = exchange.header
        request.trace, request.trace_lines = self._services.tracing.begin(header(b"traceparent"), header(b"tracestate"))
        try:
            await self._answer(request)
        except ClientGone:
            request.seen.status = CLIENT_GONE
        except asyncio.CancelledError:
            if exchange.expired is not None:
                await self._fail(request, exchange.expired)
            elif exchange.disconnected:
                request.seen.status = CLIENT_GONE
            else:
                raise
        except Exception as error:  # noqa: BLE001  the edge: whatever it is, the client gets one envelope
            await self._fail(request, error)
        finally:
            self._running.discard(request)
            self._settle(request)

    async def _answer(self, request: _Request) -> None:
        await self._know_sender(request)
        asked = request.asked = self._dialect.check(await self._body_of(request))
        self._hold_to_plan(request, asked, request.plan)
        request.admission = await self._limits.admit(request.tenant_id, request.plan, request.cost)
        request.version = await self._version_of(request, asked.model)
        request.deadline = time.monotonic() + self._first_byte_timeout_s
        connection = await self._route(request)
        if connection.status != 200:
            raise await self._refused(request, connection)
        if asked.stream:
            await self._relay_stream(request, connection)
        else:
            await self._relay_whole(request, connection)

    # who, what, may they

    async def _know_sender(self, request: _Request) -> None:
        header = request.exchange.header
        authorization = header(b"authorization")
        if authorization is None:  # as Anthropic's clients send it
            key_alone = header(b"x-api-key")
            authorization = None if key_alone is None else b"Bearer " + key_alone
        key = self._auth.known(authorization) or await self._auth.live_key(authorization)
        if KeyScope.INFERENCE not in key.scopes:
            raise ScopeMissing(f"This key may not be used here: it lacks the scope '{KeyScope.INFERENCE}'.")
        if key.tenant_id is None:
            raise ScopeMissing("An operator's key stands for no tenant: use a key of the tenant.")
        request.tenant_id = key.tenant_id
        request.plan = key.plan

    async def _body_of(self, request: _Request) -> bytes:
        """The body; where it came slowly, the sender is asked for again: the key may be over by now."""
        exchange, most = request.exchange, request.plan.max_prompt_bytes
        waits = exchange.more_body
        body = await exchange.read_body(self.max_body_bytes if most is None else min(most, self.max_body_bytes))
        if waits:
            await self._know_sender(request)
        return body

    def _hold_to_plan(self, request: _Request, asked: Checked, plan: Plan) -> None:
        """What one request may be on the plan, and what it is counted as until the engine says what it used."""
        if plan.max_prompt_bytes is not None and asked.prompt_bytes > plan.max_prompt_bytes:
            raise BodyTooLarge(f"The request is larger than the {plan.max_prompt_bytes} bytes that your plan allows.")
        if not self._dialect.generates:
            return
        asked.limit_output(plan.max_output_tokens)
        prompt_tokens = asked.prompt_bytes // BYTES_PER_TOKEN
        if plan.tokens_per_minute is not None and not asked.own_length:  # an unset length never asks for the impossible
            asked.limit_output(max(1, (plan.tokens_per_minute - prompt_tokens) // asked.choices))
        request.cost = prompt_tokens + asked.max_tokens

    async def _version_of(self, request: _Request, model: str) -> Version | None:
        """The version that is meant; None for the base model."""
        models = self._models
        if model == models.base_name:
            return None
        return models.known(request.tenant_id, model) or await models.resolve(request.tenant_id, model)

    # where

    async def _route(self, request: _Request) -> Connection:
        """Send the request to a replica that has the version, or to who stands in for it, until the answer's head."""
        if not self._dialect.generates:
            return await self._ask_tokenizer(request)
        version = request.version
        try:
            return await self._place_and_send(request)
        except AdapterNotLoadable:
            if version is None or version.fallback == "fail":
                raise
            await self._stand_in(request, version)
            return await self._place_and_send(request)

    async def _stand_in(self, request: _Request, version: Version) -> None:
        """The alias's declared fallback takes the version's place, and the answer says so."""
        previous = await self._models.previous(version) if version.fallback == "previous" else None
        if previous is None and version.fallback == "previous":
            raise ReplicaUnavailable(
                "The adapter cannot be loaded, and there is no version before it.", retry_after_s=5
            )
        request.version = previous
        request.fallback = b"x-tailor-fallback: %b\r\n" % version.fallback.encode()

    async def _place_and_send(self, request: _Request) -> Connection:
        """A second replica is asked, once and within the retry budget, if the first is gone before its first byte."""
        tried = request.tried
        forgotten = False
        while True:
            request.seen.placing_at = time.monotonic()
            place = request.place = await self._pool.place(
                request.version,
                request.tenant_id,
                request.plan,
                cost=request.cost,
                choices=request.asked.choices,
                tried=tried,
            )
            try:
                connection = request.connection = await self._send(request, place)
            except UpstreamError as error:
                self._lost(request, place, error, may_retry=not tried)
                tried.append(place.replica)
                continue
            if connection.status == 404:
                place.forget_adapter()
                self._give_back(request, 0)
                if forgotten:
                    raise ReplicaUnavailable("The adapter waits for a free place; try again shortly.", retry_after_s=1)
                forgotten = True
            elif connection.status >= 500 and not tried and self._pool.has_other(place.replica):
                if connection.status != FULL:
                    place.replica.failed(request.tenant_id)
                if not self._pool.retry_allowed():
                    return connection
                tried.append(place.replica)
                self._give_back(request, 0)
            else:
                return connection

    async def _send(self, request: _Request, place: Place) -> Connection:
        client = place.replica.client
        body = request.asked.upstream_body(
            model=place.name,
            cache_salt=self._services.salt_of(request.tenant_id),
            context_length=place.replica.context_length,
        )
        lines = b"x-request-id: %032x\r\nx-vllm-priority: %d\r\n%b" % (  # never the client's id: it may come twice
            getrandbits(128), place.priority, request.trace_lines,
        )  # fmt: skip
        request.at_work = True
        request.seen.sent_at = time.monotonic()
        return await client.upstream.send(
            client.generation_request(self._dialect.upstream_path, place.adapter, lines, body)
        )

    async def _ask_tokenizer(self, request: _Request) -> Connection:
        """Counting waits its turn like the base model's requests do; any replica's tokenizer does, under its name."""
        place = request.place = await self._pool.place(
            None, request.tenant_id, request.plan, cost=request.asked.prompt_bytes // BYTES_PER_TOKEN
        )
        client = place.replica.client
        body = request.asked.upstream_body(model=place.replica.base_name, cache_salt="", context_length=1)
        try:
            connection = await client.upstream.send(
                client.generation_request(self._dialect.upstream_path, None, request.trace_lines, body)
            )
        except UpstreamError as error:
            raise ReplicaUnavailable("The engine did not answer; try again shortly.", retry_after_s=1) from error
        request.connection = connection
        return connection

    def _lost(self, request: _Request, place: Place, error: UpstreamError, *, may_retry: bool) -> None:
        """The replica is gone, or this process is at its end.

        Raises:
            ReplicaUnavailable: no other may be asked.
        """
        if not isinstance(error, OutOfDescriptorsError):
            place.replica.suspect()
        self._give_back(request, 0)
        if error.answered or not may_retry or not self._pool.retry_allowed():
            raise ReplicaUnavailable(
                "The engine went away before it answered; try again shortly.", retry_after_s=5
            ) from error

    # relay

    async def _relay_stream(self, request: _Request, connection: Connection) -> None:
        """To its end; one that breaks off before its client has heard anything is asked for once more, elsewhere."""
        if not await self._pipe(request, connection):
            connection = await self._place_and_send(request)
            if connection.status != 200:
                raise await self._refused(request, connection)
            await self._pipe(request, connection)
        request.seen.status = 200
        request.exchange.end()

    async def _pipe(self, request: _Request, connection: Connection) -> bool:
        """False where another replica may be asked."""
        asked, place = request.asked, request.place
        assert place is not None
        stream = self._dialect.stream(place.name, asked)
        pipe = request.pipe = _Pipe(request, connection, stream, self._head(request, EVENTS))
        try:
            await pipe.run()
        except ReplicaFailed:
            place.replica.failed(request.tenant_id)
            if request.exchange.begun or request.tried or not self._pool.has_other(place.replica):
                raise
            if not self._pool.retry_allowed():
                raise
            request.tried.append(place.replica)
            request.pipe = None
            self._give_back(request, 0)
            return False
        except ReplicaUnavailable:
            place.replica.failed(request.tenant_id)
            raise
        finally:
            request.usage = stream.usage
        place.replica.succeeded(request.tenant_id)
        return True

    async def _relay_whole(self, request: _Request, connection: Connection) -> None:
        place = request.place
        assert place is not None
        try:
            body = await connection.read_all(WHOLE_LIMIT_BYTES)
        except UpstreamError as error:
            place.replica.failed(request.tenant_id)
            raise ReplicaFailed("The engine broke the answer off; try again.") from error
        body, usage = self._dialect.whole(place.name, request.asked, body)
        place.replica.succeeded(request.tenant_id)
        request.usage = usage
        head = self._head(request, JSON)
        self._give_back(request, usage.tokens)  # the engine is done
        request.deadline = time.monotonic() + SLOW_READER_S
        await request.exchange.answer(200, head, body)
        request.seen.status = 200

    async def _refused(self, request: _Request, connection: Connection) -> GatewayError:
        status = connection.status
        request.at_work = False
        replica = request.place.replica if request.place else None
        if status in (429, FULL):
            return ReplicaUnavailable("The engine is full just now; try again shortly.", retry_after_s=1)
        if status >= 500:  # this request's fault or the engine's end: the next look at the replica tells
            if replica is not None:
                replica.failed(request.tenant_id)
            return ReplicaUnavailable("The engine failed on this request; try again shortly.", retry_after_s=5)
        try:
            body = await connection.read_all()
        except UpstreamError:
            return ReplicaFailed("The engine broke the answer off; try again.")
        # the engine's text may quote the prompt: it is neither logged nor passed on
        log.warning("the engine answered %d to request %s", status, request.id.decode(), extra=_ids(request))
        return self._dialect.refusal(status, body)

    def _head(self, request: _Request, kind: bytes) -> bytes:
        """The answer's header lines, receipts among them."""
        place = request.place
        limits = request.admission.headers if request.admission is not None else b""
        if place is None or not self._dialect.generates:
            return b"%bx-request-id: %b\r\n%b" % (kind, request.id, limits)
        seen = request.seen
        seen.queue_s, seen.load_s, seen.tier, seen.replica = place.queue_s, place.load_s, place.tier, place.replica.id
        version = request.version
        name, number, digest = (
            (version.adapter_name, b"%d" % version.number, version.digest)
            if version is not None
            else ("-", b"base", self._services.base_fingerprint)
        )
        return (
            b"%bx-request-id: %b\r\nx-tailor-adapter: %b\r\nx-tailor-version: %b; sha256=%b\r\nx-tailor-replica: %b\r\n"
            b'server-timing: queue;dur=%.3f, load;dur=%.3f, adapter;desc="%b"\r\n%b%b'
        ) % (
            kind, request.id, name.encode(), number, digest.encode(), seen.replica.encode(),
            seen.queue_s * 1_000, seen.load_s * 1_000, seen.tier.encode(), request.fallback, limits,
        )  # fmt: skip

    # the end

    async def _fail(self, request: _Request, error: Exception) -> None:
        exchange = request.exchange
        told = self._dialect.error(error, request.id.decode())
        request.seen.status = told.status
        if told.status == 500:
            log.error("request %s failed", request.id.decode(), exc_info=error, extra=_ids(request))
        try:
            if exchange.streams:
                exchange.write(self._dialect.error_event(error, request.id.decode()))
                exchange.end()
            if exchange.begun:  # half of a whole answer is cut off with its connection
                return
            lines = b"".join([b"%b: %b\r\n" % line for line in told.headers if line[0] != b"content-length"])
            await exchange.answer(told.status, self._head(request, lines), told.body)
        except ClientGone:
            pass

    def _give_back(self, request: _Request, tokens: int | None) -> None:
        """Connection and place; whoever goes on may take others."""
        request.at_work = False
        if request.connection is not None:
            request.connection.upstream.release(request.connection)
            request.connection = None
        if request.place is not None:
            request.place.release(tokens)
            request.place = None

    def _settle(self, request: _Request) -> None:
        seen, usage, version = request.seen, request.usage, request.version
        seen.ended = time.monotonic()
        tokens: int | None = 0
        if usage is not None:
            seen.prompt_tokens = usage.prompt_tokens
            seen.completion_tokens = usage.completion_tokens or 0
            details = usage.prompt_tokens_details
            seen.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
            tokens = usage.tokens
        elif request.at_work:
            tokens = None  # the engine never said how much it has done
        self._give_back(request, tokens)
        if request.admission is not None:
            request.admission.settle(tokens)
            if self._dialect.generates and seen.placing_at:  # what no engine was asked for is no use of it
                self._services.ledger.record(
                    request.tenant_id,
                    version.adapter_name if version is not None else "",
                    version.number if version is not None else 0,
                    failed=seen.status >= 400 and seen.status != CLIENT_GONE,
                    prompt_tokens=seen.prompt_tokens,
                    cached_tokens=seen.cached_tokens,
                    completion_tokens=seen.completion_tokens,
                )
        seen.tenant_id = request.tenant_id
        if version is not None:
            seen.adapter_id, seen.version = version.adapter_id, version.number
        if request.pipe is not None:
            seen.streamed, seen.first_at = True, request.pipe.first_at
        self._services.metrics.later(seen)
        if request.trace is not None:
            seen.request_id = request.id.decode()
            request.trace.finish(seen)


def _late() -> ReplicaUnavailable:
    return ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5)


def _ids(request: _Request) -> dict[str, str]:
    version, place = request.version, request.place
    return ids(
        request_id=request.id.decode(),
        trace_id=request.trace.id if request.trace is not None else "",
        tenant_id=request.tenant_id,
        adapter_id=version.adapter_id if version is not None else "",
        replica=place.replica.id if place is not None else "",
    )


class _Pipe:
    """An engine's stream on its way to a client: no task wakes per chunk.

    A client that reads slower than the engine writes holds the engine's connection, not a pile of bytes here.
    """

    __slots__ = (
        "_connection", "_done", "_exchange", "_head", "_left", "_patience_s", "_paused_at", "_request", "_stream",
        "first_at",
    )  # fmt: skip

    def __init__(self, request: _Request, connection: Connection, stream: Stream, head: bytes) -> None:
        self._request = request
        self._exchange = request.exchange
        self._connection = connection
        self._stream = stream
        self._head = head
        self._left = False
        self._paused_at = 0.0
        self._patience_s = SLOW_READER_S
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_at = 0.0

    async def run(self) -> None:
        """Until the stream has ended.

        Raises:
            ReplicaFailed: it broke off. ReplicaUnavailable: its first event did not come in time.
            ClientGone: nobody read to its end.
        """
        self._exchange.flow = self
        try:
            self._connection.pipe_to(self)
            await self._done
        finally:
            self._exchange.flow = None
        if self._left:
            raise ClientGone
        if not self._stream.finished:
            raise ReplicaFailed("The engine broke the answer off; try again.")

    # what comes from the replica

    def feed(self, data: bytes) -> None:
        failure: Exception | None = None
        try:
            events = self._stream.feed(data)
        except Exception as error:  # noqa: BLE001  raised again in `run`, where every failure of a request is told
            self._connection.unpipe()
            events = error.passed if isinstance(error, BrokenOff) else b""
            failure = error
        if events and not self._left:
            if not self.first_at:
                self.first_at = time.monotonic()
                self._request.deadline = 0.0
                self._exchange.begin(self._head)
            self._exchange.write(events)
        if failure is not None and not self._done.done():
            self._done.set_exception(ClientGone() if self._left else failure)

    def end(self, error: UpstreamError | None) -> None:
        if not self._done.done():
            self._done.set_result(None)

    # what comes from the client

    def pause(self) -> None:
        if not self._left:
            self._paused_at = time.monotonic()
            self._request.deadline = self._paused_at + self._patience_s
            self._connection.pause()

    def resume(self) -> None:
        if self._paused_at:
            self._patience_s -= time.monotonic() - self._paused_at
            self._paused_at = 0.0
            self._request.deadline = 0.0
        self._connection.resume()

    def leave(self) -> None:
        """The client has gone: the engine stops, and is heard out for what it had counted."""
        self._left = True
        self._paused_at = 0.0
        self._request.deadline = time.monotonic() + HEAR_OUT_S
        self._connection.hang_up()

    def expire(self) -> None:
        if not self._done.done():
            gone = self._left or self._paused_at  # who reads no further is as good as gone
            self._done.set_exception(ClientGone() if gone else _late())
