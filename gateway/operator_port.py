"""The operators' port: `GET /metrics` and `GET /health`, one answer a connection, on loopback unless said otherwise.

It is apart from the public door, so that no tenant's key and no stranger reaches it, and shows ids and numbers only.
Its server is asyncio's own: a second uvicorn would cost each worker a lifespan and a set of tasks for one page.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from gateway.listening import bind
from gateway.telemetry.exposition import CONTENT_TYPE

log = logging.getLogger("tailor.operator_port")

HEAD_LIMIT_BYTES: Final = 8_192
PATIENCE_S: Final = 5.0
MAX_CONNECTIONS: Final = 16
_ENDED: Final = (TimeoutError, asyncio.IncompleteReadError, ConnectionError)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"

    def encode(self) -> bytes:
        body = self.body or f"{self.status.phrase}\n".encode()
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\ncontent-type: {self.content_type}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body


class OperatorPort:
    """Serves what `page` gives; a worker of several is given a port of its own.

    A peer has `patience_s` to ask and as long again to take its answer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        page: Callable[[], Awaitable[bytes]],
        *,
        listener: socket.socket | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._host = host
        self._port = port
        self._page = page
        self._patience_s = patience_s
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    def bind(self) -> None:
        """Take the port; before the event loop runs, so that a port that is taken ends the start with one sentence.

        Raises:
            ConfigurationError: it is taken, or not ours to take.
        """
        self._listener = bind(self._host, self._port, setting="TAILOR_OPERATOR_PORT")

    @property
    def port(self) -> int:
        """The port that is listened on; known once it is bound."""
        assert self._listener is not None
        bound: int = self._listener.getsockname()[1]
        return bound

    @property
    def open_connections(self) -> int:
        return len(self._open)

    async def start(self) -> None:
        """Answer from now on; the port is taken first where it has not been."""
        if self._listener is None:
            self.bind()
        self._server = await asyncio.start_server(self._serve, sock=self._listener, limit=HEAD_LIMIT_BYTES)

    async def stop(self) -> None:
        """Close the port and whatever is open on it."""
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._answer(reader)
            writer.transport.set_write_buffer_limits(high=0)  # `drain` ends when all is with the kernel
            writer.write(answer.encode())
            async with asyncio.timeout(self._patience_s):
                await writer.drain()
        except _ENDED:
            writer.transport.abort()
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> _Answer:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path not in (b"/metrics", b"/health"):
            return _Answer(HTTPStatus.NOT_FOUND)
        if method != b"GET":
            return _Answer(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == b"/health":
            return _Answer(HTTPStatus.OK, b'{"status":"ok"}', "application/json")
        return await self._metrics()

    async def _metrics(self) -> _Answer:
        try:
            return _Answer(HTTPStatus.OK, await self._page(), CONTENT_TYPE)
        except Exception:  # the edge of a scrape: the next one is asked for in seconds
            log.exception("the metrics cannot be written")
            return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR)
