"""A keep-alive HTTP/1.1 client that costs little and notes when each byte came."""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Final, cast

now = time.monotonic_ns
STAMP: Final = re.compile(rb"@(\d{6,}) ")
CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
STAMP_BYTES: Final = 24
END: Final = b"\r\n0\r\n\r\n"
UNKNOWN: Final = -1
UNTIL_LAST_CHUNK: Final = -2


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked, with the key and the model that it expects."""

    name: str
    port: int
    key: str = "sk-none"
    model: str = "mock"

    def request(self, **fields: object) -> bytes:
        """One chat completion, head and body."""
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Say something short about foxes."},
        ]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0.7, **fields}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-type: application/json\r\naccept: */*\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Reply:
    """One answer; times in ns of the monotonic clock. `lags`: how long after its sending each chunk was read."""

    done: "asyncio.Future[Reply]"
    begin: int = field(default_factory=now)
    first: int = 0
    end: int = 0
    ok: bool = False
    head: bytes = b""
    lags: list[int] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.broken = False
        self._reply: Reply | None = None
        self._stream = False
        self._head = b""
        self._need = UNKNOWN
        self._tail = b""
        self._cut = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, data: bytes, stream: bool) -> "asyncio.Future[Reply]":
        self._stream, self._head, self._need, self._tail = stream, b"", UNKNOWN, b""
        self._cut = b""  # the end of the last piece, which may hold half a stamp
        self._reply = Reply(asyncio.get_running_loop().create_future())
        self._transport.write(data)
        return self._reply.done

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        at, reply = now(), self._reply
        if reply is None:
            return
        if self._need == UNKNOWN:
            rest = self._read_head(data, reply)
            if rest is None:
                return
            data = rest
        if self._stream:
            self._read_stamps(data, at, reply)
        if self._need >= 0:
            self._need -= len(data)
            finished = self._need <= 0
        else:
            self._tail = (self._tail + data)[-32:]
            finished = self._tail.endswith(END)
        if finished:
            self._finish(at)

    def _read_head(self, data: bytes, reply: Reply) -> bytes | None:
        """What came after the head; None while that is not whole."""
        self._head += data
        cut = self._head.find(b"\r\n\r\n")
        if cut < 0:
            return None
        reply.head, rest = self._head[: cut + 2], self._head[cut + 4 :]
        reply.ok = reply.head[9:12] == b"200"
        found = CONTENT_LENGTH.search(reply.head)
        self._need = int(found[1]) if found else UNTIL_LAST_CHUNK
        return rest

    def _read_stamps(self, data: bytes, at: int, reply: Reply) -> None:
        text, end = self._cut + data, 0
        for found in STAMP.finditer(text):
            reply.lags.append(at - int(found[1]))
            end = found.end()
        self._cut = text[max(end, len(text) - STAMP_BYTES) :]
        if reply.lags and not reply.first:
            reply.first = at

    def _finish(self, at: int) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None
        reply.end = at
        if self._stream:  # a proxy may re-frame and split stamps: completeness is told by the end
            reply.ok = reply.ok and b"[DONE]" in self._tail
        if not reply.done.done():
            reply.done.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken = True
        if self._reply is not None:
            self._reply.ok = False
            self._finish(now())


class Pool:
    """Connections to one target, kept alive between requests."""

    def __init__(self, target: Target) -> None:
        self._port = target.port
        self._idle: list[Connection] = []

    async def __aenter__(self) -> "Pool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    async def warm(self, count: int) -> None:
        self._idle += await asyncio.gather(*(self._get() for _ in range(count)))

    async def ask(self, data: bytes, *, stream: bool = False) -> Reply:
        connection = await self._get()
        reply = await connection.send(data, stream)
        if not connection.broken:
            self._idle.append(connection)
        return reply

    async def _get(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.broken:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return connection
