"""The gateway's front door: which requests go the short way, and what all others must show before FastAPI sees them."""

import re
from collections.abc import Mapping
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_store.errors import AdapterStoreError
from gateway.api.body import receive_in_time
from gateway.api.generation import Generation
from gateway.auth import Auth
from gateway.dependencies import Parts
from gateway.errors import GatewayError, MethodNotAllowed, RequestInvalid, RouteUnknown, authorization_of, send_error
from gateway.protocol import Out
from gateway.request_ids import HEADER, name_request

OPEN_PATHS: Final = ("/health", "/ready")
UPLOAD_PATH: Final = "/v1/adapters"
FILES_PATH: Final = "/v1/files"
UPLOADS: Final = re.compile(
    rf"{UPLOAD_PATH}(?:/[^/]+/versions|/[^/]+/uploads/[^/]+/[^/]+/[0-9]+)?|{FILES_PATH}|/v1/uploads/[^/]+/parts"
)
"""Paths whose handlers read the body themselves, as it comes."""
SMALL_BODY_BYTES: Final = 65_536


class Front:
    """Sends everything but generation requests to FastAPI, once the key is good.

    FastAPI reads a body before it asks who sends it: without a key nothing of a body is read here, and with one no more
    than 64 KiB, but for uploads, which are streamed. Generation requests (`hot`, by path) never come here:
    `protocol.FrontProtocol` gives them to their endpoint. Each answer carries its request's id.
    """

    def __init__(self, app: ASGIApp, parts: Parts, hot: Mapping[str, Generation], out: Out) -> None:
        self.hot = {path.encode(): endpoint for path, endpoint in hot.items()}
        self.parts = parts
        self.out = out
        self._app = app
        self._auth: Auth = parts.auth
        self._hot_paths = frozenset(hot)

    def drain(self) -> None:
        """From now on `/ready` says that this process is about to end."""
        self.parts.draining.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send = _named(send, name_request(scope))
        path: str = scope["path"]
        if path not in OPEN_PATHS:
            try:
                await self._auth.live_key(authorization_of(scope))
                if path in self._hot_paths:
                    if scope["method"] == "POST":  # with a fragment, which is no part of a path
                        raise RouteUnknown()
                    raise MethodNotAllowed("This path takes POST only.", allow="POST")
                if "\0" in path or b"%00" in scope["query_string"]:
                    raise RequestInvalid("Paths and queries have no NUL characters.")  # PostgreSQL cannot hold one
            except (GatewayError, AdapterStoreError) as error:
                return await send_error(send, error)
            if not UPLOADS.fullmatch(path):
                receive = _bounded(receive, self.parts.stall_s)
        return await self._app(scope, receive, send)


def _named(send: Send, request_id: bytes) -> Send:
    """Every answer says which request it is for."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id)]}
        await send(message)

    return named


def _bounded(receive: Receive, stall_s: float) -> Receive:
    """Of a body that comes in time and is small; once it has ended, its client may be silent while it is answered."""
    size, more = 0, True

    async def bounded() -> Message:
        nonlocal size, more
        if not more:
            return await receive()
        message = await receive_in_time(receive, stall_s)
        more = message.get("more_body", False)
        size += len(message.get("body", b""))
        if size > SMALL_BODY_BYTES:
            raise HTTPException(413)  # the one kind that FastAPI lets through from under its own reading
        return message

    return bounded
