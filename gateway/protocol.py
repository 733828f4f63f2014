"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: how long and how large a request's head may be."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT_BYTES: Final = 65_536
HEAD_PATIENCE_S: Final = 10.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections that send no whole head in time, or one without end: they cost memory and descriptors."""

    _head_bytes = 0
    _in_head = True
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_whole()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_whole()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._in_head = True
        if self._late is None:
            self._late = self.loop.call_later(HEAD_PATIENCE_S, self.transport.abort)

    def _head_is_whole(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
