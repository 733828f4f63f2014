"""A keep-alive HTTP/1.1 client that costs little and notes when each byte came: one request at a time on a connection.

It never asks again by itself: what a user would have seen is what is recorded.
"""

import asyncio
import json
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools

from loadtests.progress import Tally
from loadtests.recording import ABSENT, Outcome

now = time.monotonic_ns
NS: Final = 1_000_000_000
CONTENT: Final = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments)": ?"[^"]')
"""In a line that brings something; within a JSON string its quotes would be escaped."""
_CHAT: Final = b'"content":"'
"""What nearly all of them have; looking for it is eight times cheaper."""
_CHOICE: Final = b'"choices":[{'
_QUOTE: Final = ord('"')
_KEPT_HEADERS: Final = frozenset(
    {b"content-type", b"retry-after", b"server-timing", b"x-tailor-version", b"x-tailor-replica"}
)
IDLE_NS: Final = 4 * NS
"""A connection idle for longer is not used again: servers close theirs after 5 s (uvicorn), half way to our request."""


class Exchange:
    """One request and what has come of it so far; times in ns of the monotonic clock, ABSENT until they come."""

    __slots__ = (
        "abort_after", "answer", "chunk_at", "connection", "done", "error", "events", "first", "headers", "index",
        "keeps_answer", "kept", "last", "on_end", "outcome", "request", "rest", "scheduled", "sent", "status",
        "streams", "tally", "timer", "token", "usage", "whole",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        request: bytes,
        on_end: "Callable[[Exchange], None]",
        *,
        scheduled: int = ABSENT,
        tally: Tally | None = None,
        streams: bool = True,
        keeps_answer: bool = False,
        abort_after: int = ABSENT,
    ) -> None:
        self.index, self.request, self.on_end, self.scheduled = index, request, on_end, scheduled
        self.streams, self.keeps_answer, self.abort_after = streams, keeps_answer, abort_after
        self.tally = tally if tally is not None else Tally()
        self.sent = self.headers = self.first = self.token = self.last = self.done = self.status = ABSENT
        self.outcome = Outcome.UNSENT
        self.chunk_at: list[int] = []
        self.kept: dict[bytes, bytes] = {}
        self.usage: dict[str, Any] = {}
        self.answer: list[str] = []
        self.error = ""
        self.rest = b""
        self.events = self.whole = False
        self.connection: Connection | None = None
        self.timer: asyncio.TimerHandle | None = None

    # what comes

    def head_came(self, status: int, at: int) -> None:
        """Status and headers are whole."""
        self.status, self.headers = status, at
        self.events = status == 200 and self.kept.get(b"content-type", b"").startswith(b"text/event-stream")

    def body_came(self, piece: bytes, at: int) -> None:
        """A piece of the body, cut anywhere."""
        if not self.events:
            self.rest += piece
            return
        lines = (self.rest + piece if self.rest else piece).split(b"\n")
        self.rest = lines.pop()
        before = len(self.chunk_at)
        since_us = (at - self.sent) // 1_000
        for line in lines:
            if not line:
                continue
            found = line.find(_CHAT)
            if (found >= 0 and line[found + len(_CHAT)] != _QUOTE) or CONTENT.search(line) is not None:
                self.chunk_at.append(since_us)
                if self.keeps_answer:
                    self._read_content(line)
            else:
                self._read_other(line, at)
        came = len(self.chunk_at) - before
        if came:
            self.tally.tokens += came
            self.last = at
            if not before:
                self.first = at

    def _read_content(self, line: bytes) -> None:
        told = _json(line[5:])
        choice = (told.get("choices") or [{}])[0]
        self.answer.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")

    def _read_other(self, line: bytes, at: int) -> None:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if self.token == ABSENT and not self.chunk_at and _CHOICE in data:
                self.token = at
            if data == b"[DONE]":
                self.whole = True
            elif b'"usage"' in data or b'"error"' in data or not data.endswith(b"}"):
                self._read_told(_json(data))
        elif line.startswith(b"event:") and line[6:].strip() == b"error":
            self.error = self.error or "error"

    def _read_told(self, told: dict[str, Any]) -> None:
        self.usage = told.get("usage") or self.usage
        if told.get("error"):
            self.error = _error_code(told)

    def body_ended(self, at: int) -> None:
        """The answer is whole as HTTP; whether it is what was asked for is decided here."""
        if self.events:
            self._read_other(self.rest.strip(), at)
        else:
            self._read_whole(_json(self.rest), at)
        if self.status != 200:
            waits = self.status == 429 or (self.status == 503 and b"retry-after" in self.kept)
            self.end(Outcome.REFUSED if waits else Outcome.STATUS, at, self.error or f"http {self.status}")
        elif self.error:
            self.end(Outcome.ERROR_EVENT, at, self.error)
        else:
            self.end(Outcome.WHOLE if self.whole and self._brought() else Outcome.TRUNCATED, at)

    def _brought(self) -> bool:
        """Whether anything was generated: `usage` tells of tokens that are no text, such as the one that ends it."""
        return self.first != ABSENT or bool(self.usage.get("completion_tokens"))

    def _read_whole(self, told: dict[str, Any], at: int) -> None:
        self._read_told(told)
        choices = told.get("choices")
        if self.status != 200 or not choices or self.streams:
            return
        self.whole = True
        message = choices[0].get("message") or {}
        text = choices[0].get("text") or message.get("content") or ""
        if not (text or message.get("tool_calls") or self.usage.get("completion_tokens")):
            return
        self.first = self.last = at
        self.chunk_at.append((at - self.sent) // 1_000)
        self.tally.tokens += 1
        if self.keeps_answer:
            self.answer.append(text)

    # how it ends

    def begin(self, timeout_s: float) -> None:
        """It is being sent; it ends by its time limit, or when its client means to leave."""
        self.sent = now()
        self.outcome = Outcome.BROKEN
        aborts = 0 <= self.abort_after < timeout_s * NS
        limit_s = self.abort_after / NS if aborts else timeout_s
        self.timer = asyncio.get_running_loop().call_later(limit_s, self._leave, aborts)

    def _leave(self, aborts: bool) -> None:
        self.timer = None
        connection = self.connection
        self.end(Outcome.ABORTED if aborts else Outcome.TIMEOUT, now(), "" if aborts else "timeout")
        if connection is not None:
            connection.abort()

    def end(self, outcome: Outcome, at: int, error: str = "") -> None:
        """Once; what comes later is nobody's."""
        self.outcome, self.done, self.error = outcome, at, error
        self.connection = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.on_end(self)


def _json(text: bytes) -> dict[str, Any]:
    if not text:
        return {}
    try:
        told = json.loads(text)
    except ValueError:
        return {"error": {"code": "not JSON"}}
    return told if isinstance(told, dict) else {}


def _error_code(told: dict[str, Any]) -> str:
    error = told["error"]
    if not isinstance(error, dict):
        return "error"
    return str(error.get("code") or error.get("type") or "error")


class Connection(asyncio.Protocol):
    """One connection; httptools calls the `on_` methods."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._exchange: Exchange | None = None
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._at = 0
        self.idle_since = 0
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, exchange: Exchange) -> None:
        """Only while it has none."""
        self._exchange = exchange
        exchange.connection = self
        self._transport.write(exchange.request)

    def abort(self) -> None:
        """The server sees its client leave."""
        self._exchange = None
        self.closed = True
        self._transport.abort()

    def eof_received(self) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self._at = now()
        if self._exchange is None:
            self.abort()  # nothing was asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"not HTTP: {type(error).__name__}")
        else:
            self._read_body()

    def _read_body(self) -> None:
        """All pieces that one reading brought at once: their times are the same."""
        pieces = self._pieces
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            if self._exchange is not None:
                self._exchange.body_came(body, self._at)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _KEPT_HEADERS and self._exchange is not None:
            self._exchange.kept[name] = value

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.head_came(self._parser.get_status_code(), self._at)

    def on_message_complete(self) -> None:
        self._read_body()
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._parser.should_keep_alive():
            self.idle_since = self._at
            self._pool.give_back(self)
        else:
            self.abort()
        exchange.body_ended(self._at)

    def connection_lost(self, exc: Exception | None) -> None:
        self._at = now()
        self.closed = True
        self._break("closed" if exc is None else type(exc).__name__)
        self._pool.lost()
        del self._parser  # it holds us

    def _break(self, error: str) -> None:
        exchange = self._exchange
        if exchange is not None:
            self.abort()
            exchange.end(Outcome.BROKEN if exchange.headers == ABSENT else Outcome.TRUNCATED, self._at, error)


class Pool:
    """Connections to one server, kept alive between requests; the least rested is used first.

    `most`: so many at once, and what is over waits for one. Such a load is no longer open: its requests are sent late.
    """

    def __init__(self, url: str, *, timeout_s: float, most: int | None = None) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._timeout_s, self._most = timeout_s, most
        self._idle: list[Connection] = []
        self._waiting: deque[Exchange] = deque()
        self._open = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def warm(self, count: int) -> None:
        """Resolve the name and open connections.

        Raises:
            OSError: the server cannot be reached.
        """
        found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=1)
        self._address = str(found[0][4][0])
        for connection in await asyncio.gather(*(self._connect() for _ in range(count))):
            connection.idle_since = now()
            self._idle.append(connection)

    def send(self, exchange: Exchange) -> None:
        """Returns at once; the exchange's end is told to it."""
        connection = self._rested()
        if connection is not None:
            exchange.begin(self._timeout_s)
            connection.send(exchange)
        elif self._most is None or self._open < self._most:
            self._dial(exchange)
        else:
            self._waiting.append(exchange)

    def _rested(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                if now() - connection.idle_since < IDLE_NS:
                    return connection
                connection.abort()
        return None

    def _dial(self, exchange: Exchange) -> None:
        exchange.begin(self._timeout_s)
        task = asyncio.get_running_loop().create_task(self._send_on_new(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_on_new(self, exchange: Exchange) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            if exchange.done == ABSENT:
                exchange.end(Outcome.BROKEN, now(), f"connecting: {type(error).__name__}")
            self.lost()
            return
        if exchange.done == ABSENT:
            connection.send(exchange)
        else:
            connection.idle_since = now()
            self.give_back(connection)

    async def _connect(self) -> Connection:
        self._open += 1
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self),
            self._address,
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        return connection

    def give_back(self, connection: Connection) -> None:
        """It is free for the next."""
        self._idle.append(connection)
        if self._waiting:
            self.send(self._waiting.popleft())

    def lost(self) -> None:
        """One has gone or did not come; who waited for one may open another."""
        self._open -= 1
        if self._waiting:
            self.send(self._waiting.popleft())

    def close(self) -> None:
        """Of all that are idle."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
