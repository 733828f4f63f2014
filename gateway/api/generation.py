"""`POST /v1/chat/completions` and `/v1/completions`: the hot path, a plain ASGI callable in front of FastAPI.

One function reads top to bottom: who, what, which version, where, relay. Everything a request holds hangs on one
ExitStack and is given back in its end, however that comes. No database, no framework, no span, no parsed chunk on it.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.types import Message, Receive, Scope, Send

from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.api.body import discard_body, receive_in_time
from gateway.auth import Auth
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    ReplicaFailed,
    ReplicaUnavailable,
    answer,
    authorization_of,
    send_error,
)
from gateway.models import BASE, Models
from gateway.relay import StreamTranslation, Translation, error_event, refusal
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.replica import Replica
from gateway.replicas.upstream import Connection, OutOfDescriptorsError, UpstreamError
from gateway.request_policy import Checked, RequestPolicy
from gateway.tenants import Scope as KeyScope

log = logging.getLogger("tailor.generation")
PIECE_BYTES = 65_536
Salts = Callable[[str], str]


class ClientGone(Exception):
    """The client closed the connection before its answer began."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A request on its way: the replica, the connection its answer comes on, the name it goes by there."""

    replica: Replica
    connection: Connection
    engine_name: str


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
        self._max_body_bytes = max_body_bytes
        self._first_byte_timeout_s = first_byte_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = secrets.token_hex(16)
        sender = _Sender(send, request_id)
        client = _Client()
        try:
            await self._serve(scope, receive, sender, request_id, client)
        except asyncio.CancelledError:
            if not client.has_left():
                raise

    async def _serve(
        self, scope: Scope, receive: Receive, sender: "_Sender", request_id: str, client: "_Client"
    ) -> None:
        with ExitStack() as held:
            try:
                tenant_id = await self._auth.tenant(authorization_of(scope), KeyScope.INFERENCE)
                body = await _read_body(scope, receive, self._max_body_bytes)
                held.callback(client.watch(receive, sender).cancel)
                await self._answer(tenant_id, body, sender, request_id, held)
            except ClientGone:
                return
            except Exception as error:  # the edge: whatever it is, the client gets one envelope
                if not isinstance(error, GatewayError) and answer(error).status == 500:
                    log.exception("request %s failed", request_id)
                await sender.error(error)

    async def _answer(
        self, tenant_id: TenantId, body: bytes, sender: "_Sender", request_id: str, held: ExitStack
    ) -> None:
        asked = self._policy.check(body)
        version = await self._models.resolve(tenant_id, asked.model)
        salt = self._salt_of(tenant_id)
        routed = await self._route(asked, version, salt, request_id, held)
        if routed.connection.status != 200:
            raise await self._refused(routed)
        if asked.stream:
            await self._relay_stream(routed, asked, sender)
        else:
            await _relay_whole(routed, asked, sender)

    async def _route(
        self, asked: Checked, version: Version | None, salt: str, request_id: str, held: ExitStack
    ) -> Routed:
        """Send the request to a replica that holds the version, a second one if the first is gone unheard."""
        tried: list[Replica] = []
        forgotten = False
        while True:
            replica = self._pool.choose(version.digest if version else BASE, tried=tried)
            resident = await replica.residency.hold(version) if version is not None else None
            adapter = resident.name if resident else replica.null_adapter
            name = adapter or replica.base_name
            body = asked.upstream_body(
                model=name, cache_salt=salt, request_id=request_id, context_length=replica.context_length
            )
            connection = await self._send(replica, adapter, body, tried)
            if connection is None:
                continue
            held.callback(replica.client.upstream.release, connection)
            if connection.status != 404:
                return Routed(replica, connection, name)
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
            async with asyncio.timeout(self._first_byte_timeout_s):
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
        except TimeoutError as error:
            raise ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5) from error

    async def _relay_stream(self, routed: Routed, asked: Checked, sender: "_Sender") -> None:
        translation = StreamTranslation(routed.engine_name, asked.model, wants_usage=asked.wants_usage)
        try:
            async with asyncio.timeout(self._first_byte_timeout_s):  # the head comes before the engine has begun
                data = await routed.connection.read()
            while data:
                if events := translation.feed(data):
                    await sender.stream(events)
                data = await routed.connection.read()
            if not translation.finished:
                raise UpstreamError("the stream ended early", answered=True)
        except UpstreamError as error:
            raise ReplicaFailed("The engine broke the answer off; try again.") from error
        except TimeoutError as error:
            raise ReplicaUnavailable("The engine did not answer in time; try again.", retry_after_s=5) from error
        await sender.end()

    async def _refused(self, routed: Routed) -> GatewayError:
        status = routed.connection.status
        if status in (429, 503):
            return ReplicaUnavailable("The engine is full just now; try again shortly.", retry_after_s=1)
        if status >= 500:  # this request's fault or the engine's end: the next look at the replica tells
            routed.replica.look_soon()
            return ReplicaUnavailable("The engine failed on this request; try again shortly.", retry_after_s=5)
        try:
            body = await routed.connection.read_all()
        except UpstreamError:
            return ReplicaFailed("The engine broke the answer off; try again.")
        # the engine's text may quote the prompt: it is neither logged nor passed on
        log.warning("replica %s answered %d to an adapter %s", routed.replica.id, status, routed.engine_name)
        return refusal(status, body, self._prompt_param)


async def _relay_whole(routed: Routed, asked: Checked, sender: "_Sender") -> None:
    try:
        body = await routed.connection.read_all(64 << 20)
    except UpstreamError as error:
        raise ReplicaFailed("The engine broke the answer off; try again.") from error
    await sender.whole(Translation(routed.engine_name, asked.model).whole(body))


class _Client:
    """Ends the request's task when the client leaves, wherever that task waits: the engine works for nobody then."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._left = False

    def watch(self, receive: Receive, sender: "_Sender") -> "asyncio.Future[Message]":
        """After the body nothing can come but the client's leaving; cancel what is returned when the answer is out."""

        def leave(done: "asyncio.Future[Message]") -> None:
            if not done.cancelled() and not sender.finished:
                self._left = True
                self._task.cancel()

        watching = asyncio.ensure_future(receive())
        watching.add_done_callback(leave)
        return watching

    def has_left(self) -> bool:
        """Whether the cancellation that is being handled is the client's doing; it is then taken back."""
        if self._left:
            self._task.uncancel()
        return self._left


class _Sender:
    """ASGI messages of one answer; knows whether it has begun and whether it is out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = (b"x-request-id", request_id.encode())
        self._begun = False
        self.finished = False

    async def whole(self, body: bytes) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), self._id]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(body), PIECE_BYTES):  # a slow reader holds this request, not a pile of bytes
            piece = body[start : start + PIECE_BYTES]
            self.finished = start + PIECE_BYTES >= len(body)
            await self._send({"type": "http.response.body", "body": piece, "more_body": not self.finished})

    async def stream(self, events: bytes) -> None:
        if not self._begun:
            self._begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                self._id,
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self) -> None:
        self.finished = True
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: Exception) -> None:
        if self._begun:
            shown = error if isinstance(error, GatewayError) else ReplicaFailed("The server failed; try again.")
            await self.stream(error_event(shown))
            await self.end()
            return
        self.finished = True
        await send_error(self._send, error, self._id)


async def _read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The request's body.

    Raises:
        BodyTooLarge: it passes the limit; what is over it is not kept.
        BodyTooSlow: it stalls. ClientGone: it never came.
    """
    message = await receive_in_time(receive)
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts, size = [body], len(body)
        while message.get("more_body"):
            message = await receive_in_time(receive)
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                if message.get("more_body"):
                    await discard_body(receive)
                break
        body = b"".join(parts)
    if len(body) > limit_bytes:
        raise BodyTooLarge(f"The body is larger than {limit_bytes} bytes.")
    return body
