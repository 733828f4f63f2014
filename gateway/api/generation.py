"""Generation requests: the hot path, one task per request in front of FastAPI.

`Generation._answer` reads top to bottom: who, what, which version, may they, where, relay; `_settle` gives back what a
request holds, once, however it ends. No database, no framework and no span stands on that path, and no chunk wakes a task:
`_Pipe` moves them from the replica's connection to the client's.
"""

import asyncio
import logging
from collections.abc import Callable
from random import getrandbits
from typing import Final

from adapter_store.catalog import Version
from gateway.auth import Auth
from gateway.errors import (
    GatewayError,
    ReplicaFailed,
    ReplicaUnavailable,
    answer,
)
from gateway.models import BASE, Models
from gateway.protocol import ClientGone, Exchange
from gateway.relay import StreamTranslation, Translation, error_event, refusal
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.replica import Replica
from gateway.replicas.upstream import Connection, OutOfDescriptorsError, UpstreamError
from gateway.request_policy import Checked, RequestPolicy
from gateway.tenants import Scope as KeyScope

log = logging.getLogger("tailor.generation")
LOOK_S: Final = 0.25
HEAR_OUT_S: Final = 2.0
Salts = Callable[[str], str]
JSON: Final = b"content-type: application/json\r\n"
EVENTS: Final = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"


class _Request:
    """What one request has found out and holds so far."""

    __slots__ = ("adapter", "asked", "connection", "deadline", "exchange", "id", "name", "pipe", "replica", "version")

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.id = b"%032x" % getrandbits(128)
        self.deadline = 0.0
        self.asked: Checked
        self.version: Version | None = None
        self.replica: Replica
        self.adapter: str | None = None
        self.name = ""
        self.connection: Connection | None = None
        self.pipe: _Pipe | None = None

    def expire(self) -> None:
        """Its time is over: for the first byte of an answer, or for hearing an engine out whose client has left."""
        if self.pipe is None:
            self.exchange.expire()
        else:
            self.pipe.expire()


class Generation:
    """One generation endpoint."""

    def __init__(
        self,
        path: str,
        *,
        policy: RequestPolicy,
        auth: Auth,
        models: Models,
        pool: ReplicaPool,
        salt_of: Salts,
        max_body_bytes: int,
        first_byte_timeout_s: float,
    ) -> None:
        self._path = path
        self._prompt_param = "messages" if path.endswith("chat/completions") else "prompt"
        self._policy = policy
        self._auth = auth
        self._models = models
        self._pool = pool
        self._salt_of = salt_of
        self.max_body_bytes = max_body_bytes
        self._first_byte_timeout_s = first_byte_timeout_s
        self._running: set[_Request] = set()

    async def watch(self) -> None:
        """End requests whose engine has not answered in time, for ever; one look at all costs less than a timer each."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            now = loop.time()
            for request in [request for request in self._running if 0.0 < request.deadline < now]:
                request.expire()

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request; whatever happens, the client gets one envelope and what was held is given back."""
        request = _Request(exchange)
        self._running.add(request)
        try:
            await self._answer(request)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if exchange.expired:
                await self._fail(
                    request, ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5)
                )
            elif not exchange.disconnected:
                raise
        except Exception as error:
            if not isinstance(error, GatewayError) and answer(error).status == 500:
                log.exception("request %s failed", request.id.decode())
            await self._fail(request, error)
        finally:
            self._running.discard(request)
            self._settle(request)

    async def _answer(self, request: _Request) -> None:
        exchange = request.exchange
        tenant_id = await self._auth.tenant(exchange.header(b"authorization"), KeyScope.INFERENCE)
        asked = request.asked = self._policy.check(await exchange.read_body())
        request.version = await self._models.resolve(tenant_id, asked.model)
        request.deadline = exchange.began_at + self._first_byte_timeout_s
        await self._route(request, self._salt_of(tenant_id))
        assert request.connection is not None
        if request.connection.status != 200:
            raise await self._refused(request, request.connection)
        if asked.stream:
            await self._relay_stream(request, request.connection)
        else:
            await self._relay_whole(request, request.connection)

    async def _route(self, request: _Request, salt: str) -> None:
        """Send the request to a replica that holds the version, a second one if the first is gone unheard."""
        tried: list[Replica] = []
        forgotten = False
        asked, version = request.asked, request.version
        while True:
            replica = self._pool.choose(version.digest if version else BASE, tried=tried)
            resident = await replica.residency.hold(version) if version is not None else None
            adapter = resident.name if resident else replica.null_adapter
            name = adapter or replica.base_name
            body = asked.upstream_body(
                model=name, cache_salt=salt, request_id=request.id.decode(), context_length=replica.context_length
            )
            connection = await self._send(replica, adapter, body, tried)
            if connection is None:
                continue
            request.replica, request.name = replica, name
            request.connection = connection
            if connection.status != 404:
                return
            replica.client.upstream.release(connection)
            request.connection = None
            if resident is not None:  # the agent does not know the name (any more): load it afresh, once
                replica.residency.forget(resident)
            else:
                replica.suspect()
            if forgotten:
                raise ReplicaUnavailable("The adapter waits for a free place; try again shortly.", retry_after_s=1)
            forgotten = True

    async def _send(
        self, replica: Replica, adapter: str | None, body: bytes, tried: list[Replica]
    ) -> Connection | None:
        """The connection with the answer's head, or None where the replica is gone and another may be asked."""
        try:
            return await replica.client.upstream.send(replica.client.generation_request(self._path, adapter, body))
        except UpstreamError as error:
            if not isinstance(error, OutOfDescriptorsError):
                replica.suspect()
            if error.answered or tried:
                raise ReplicaUnavailable(
                    "The engine went away before it answered; try again shortly.", retry_after_s=5
                ) from error
            tried.append(replica)
            return None

    def _head(self, request: _Request, kind: bytes) -> bytes:
        return b"%bx-request-id: %b\r\n" % (kind, request.id)

    async def _relay_stream(self, request: _Request, connection: Connection) -> None:
        asked = request.asked
        translation = StreamTranslation(request.name, asked.model, wants_usage=asked.wants_usage)
        pipe = request.pipe = _Pipe(request, connection, translation, self._head(request, EVENTS))
        await pipe.run()
        request.exchange.end()

    async def _relay_whole(self, request: _Request, connection: Connection) -> None:
        try:
            body = await connection.read_all(64 << 20)
        except UpstreamError as error:
            raise ReplicaFailed("The engine broke the answer off; try again.") from error
        body = Translation(request.name, request.asked.model).whole(body)
        await request.exchange.answer(200, self._head(request, JSON), body)

    async def _refused(self, request: _Request, connection: Connection) -> GatewayError:
        status = connection.status
        if status in (429, 503):
            return ReplicaUnavailable("The engine is full just now; try again shortly.", retry_after_s=1)
        if status >= 500:  # this request's fault or the engine's end: the next look at the replica tells
            request.replica.look_soon()
            return ReplicaUnavailable("The engine failed on this request; try again shortly.", retry_after_s=5)
        try:
            body = await connection.read_all()
        except UpstreamError:
            return ReplicaFailed("The engine broke the answer off; try again.")
        # the engine's text may quote the prompt: it is neither logged nor passed on
        log.warning("replica %s answered %d to an adapter %s", request.replica.id, status, request.name)
        return refusal(status, body, self._prompt_param)

    async def _fail(self, request: _Request, error: Exception) -> None:
        exchange = request.exchange
        try:
            if exchange.begun:
                shown = error if isinstance(error, GatewayError) else ReplicaFailed("The server failed; try again.")
                exchange.write(error_event(shown))
                exchange.end()
                return
            told = answer(error)
            lines = b"".join([b"%b: %b\r\n" % line for line in told.headers if line[0] != b"content-length"])
            await exchange.answer(told.status, self._head(request, lines), told.body)
        except ClientGone:
            pass

    def _settle(self, request: _Request) -> None:
        if request.connection is not None:
            request.replica.client.upstream.release(request.connection)


class _Pipe:
    """An engine's stream on its way to a client: no task wakes per chunk.

    A client that reads slower than the engine writes holds the engine's connection, not a pile of bytes here.
    """

    __slots__ = ("_connection", "_done", "_exchange", "_head", "_left", "_loop", "_request", "_translation", "first_at")

    def __init__(self, request: _Request, connection: Connection, translation: StreamTranslation, head: bytes) -> None:
        self._request = request
        self._exchange = request.exchange
        self._connection = connection
        self._translation = translation
        self._head = head
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self.first_at = 0.0

    async def run(self) -> None:
        """Until the stream has ended.

        Raises:
            ReplicaFailed: it broke off. ClientGone: nobody read to its end.
        """
        self._exchange.flow = self
        try:
            self._connection.pipe_to(self)
            await self._done
        finally:
            self._exchange.flow = None
        if self._left:
            raise ClientGone
        if not self._translation.finished:
            raise ReplicaFailed("The engine broke the answer off; try again.")

    # what comes from the replica

    def feed(self, data: bytes) -> None:
        try:
            events = self._translation.feed(data)
        except Exception as error:  # noqa: BLE001  raised again in `run`, where every failure of a request is told
            self._connection.unpipe()
            if not self._done.done():
                self._done.set_exception(error)
            return
        if events and not self._left:
            if not self.first_at:
                self.first_at = self._loop.time()
                self._request.deadline = 0.0
                self._exchange.begin(self._head)
            self._exchange.write(events)

    def end(self, error: UpstreamError | None) -> None:
        if not self._done.done():
            self._done.set_result(None)

    # what comes from the client

    def pause(self) -> None:
        if not self._left:
            self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()

    def leave(self) -> None:
        """The client has gone: the engine stops, and is heard out for what it had counted."""
        self._left = True
        self._request.deadline = self._loop.time() + HEAR_OUT_S
        self._connection.hang_up()

    def expire(self) -> None:
        if not self._done.done():
            late = ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5)
            self._done.set_exception(ClientGone() if self._left else late)
