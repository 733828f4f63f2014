"""A pooled HTTP/1.1 client for one upstream, made for relaying: bytes are handed on as they come.

Not a general client: no redirects, no proxies, no TLS. A request is one buffer, so that it costs one system call;
httptools parses the answer. `docs/benchmarks.md` has what that saves.
"""

import asyncio
import errno
import socket
import time
from typing import Final, Protocol, cast

import httptools

RECEIVE_BYTES: Final = 32_768  # the kernel takes it twice
PAUSE_BYTES: Final = 65_536  # stop reading from the replica while this much waits for the client
IDLE_LIMIT_S: Final = 60.0  # below the replica's own keep-alive (120 s), so that it never closes first


class UpstreamError(Exception):
    """The upstream could not be reached, or its answer broke off.

    `answered` tells whether any byte of the answer had come: if not, another replica may be asked.
    """

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered


class OutOfDescriptorsError(UpstreamError):
    """This process, not the replica, is at its end."""


class Sink(Protocol):
    """Where a connection's body goes while it is piped: called from the event loop, never awaited."""

    def feed(self, data: bytes) -> None: ...
    def end(self, error: UpstreamError | None) -> None: ...


class Listener(Protocol):
    """Who has asked and waits for no future."""

    def heard(self) -> None:
        """More of the answer has come, or the connection has broken."""


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time.

    Whoever asks waits as a task (`Upstream.send`, `read`, `read_all`), or listens (`begin`, `listen`): then the body is
    taken when it is whole (`take_whole`) or piped into a sink (`pipe_to`), and no task wakes per chunk.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.upstream: Upstream
        self.closed = False
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)  # takes one answer after the other
        self._reset()

    def _reset(self) -> None:
        self.heard_at = 0.0
        self.status = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self.answered = False  # any byte of the answer has come
        self._has_output = False
        self._complete = False
        self._kept_alive = False
        self._paused = False
        self._hung_up = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._listener: Listener | None = None

    # transport callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        connected = transport.get_extra_info("socket")
        if connected is not None:  # one read is passed on whole, and the event loop reads up to 256 KiB
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)

    def data_received(self, data: bytes) -> None:
        self.answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        if self._sink is not None:
            self._pour(self._sink)
        elif self._listener is not None:
            self._listener.heard()
        else:
            self._wake()

    # parser callbacks

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._has_output:
            self.heard_at = self._loop.time()
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > PAUSE_BYTES and self._sink is None and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self._complete = True
        self._kept_alive = self._parser.should_keep_alive()  # httptools 0.9 knows it only now

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    # one exchange

    def begin(self, listener: Listener) -> None:
        """A request begins, whose bytes the caller writes."""
        self._reset()
        self._listener = listener

    def listen(self, listener: Listener) -> None:
        """Tell the listener of what comes from now on."""
        self._listener = listener

    def stop_listening(self) -> None:
        """What comes from now on is read or piped."""
        self._listener = None

    def take_whole(self, limit_bytes: int) -> bytes | None:
        """The whole body if it is there; None: read it with `read_all`, or wait for more."""
        if not self._complete or self._buffered > limit_bytes:
            return None
        body = self._take()
        self.resume()  # for the next request
        return body

    @property
    def holds_back(self) -> bool:
        """Whether reading has stopped until somebody takes what has come."""
        return self._paused

    async def exchange(self, request: bytes) -> None:
        """Send one request and wait for the answer's head.

        Raises:
            UpstreamError: the connection broke before the head was complete.
        """
        self._reset()
        self.transport.write(request)
        while not self.status:
            if self.closed:
                raise UpstreamError("the replica closed the connection", answered=self.answered)
            await self._wait()

    async def read(self) -> bytes:
        """What has come of the body since the last call, or the next piece; b"" at its end.

        Raises:
            UpstreamError: the connection broke before the body was complete.
        """
        while not self._chunks:
            if self._complete:
                return b""
            if self.closed:
                raise UpstreamError("the replica broke the answer off", answered=True)
            await self._wait()
        data = self._take()
        self.resume()
        return data

    def _take(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        self._buffered = 0
        return data

    def pipe_to(self, sink: Sink) -> None:
        """Give the sink what has come and what comes, then its `end`, once, with the error if the answer broke off."""
        self._sink = sink
        self._listener = None
        self.resume()
        self._pour(sink)

    def _pour(self, sink: Sink) -> None:
        if self._chunks:
            sink.feed(self._take())
        if self._sink is not None and (self._complete or self.closed):  # feeding may have unpiped it
            self._sink = None
            sink.end(None if self._complete else UpstreamError("the replica broke the answer off", answered=True))

    def note_output(self) -> None:
        """The engine's own output has begun: it lives, and each byte that follows says so again.

        Heads, refusals, counts of tokens and what a stream opens with prove no more than that the API server lives.
        """
        self._has_output = True
        self.heard_at = self._loop.time()

    def unpipe(self) -> None:
        """Sink or listener want nothing more, not even an end."""
        self._sink = None
        self._listener = None

    def pause(self) -> None:
        """Take nothing more from the replica until `resume`: who reads the answer is slower than the engine."""
        if not self._paused and not self.closed:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Take on."""
        if self._paused:
            self._paused = False
            if not self.closed:
                self.transport.resume_reading()

    def hang_up(self) -> None:
        """Tell the replica that nobody wants the rest, and go on reading what it had sent before it hears so.

        vLLM's server (uvicorn) writes out what it has, closes, and aborts the request.
        """
        self.resume()
        self._hung_up = True
        if not self.closed:
            self.transport.write_eof()

    async def read_all(self, limit_bytes: int = 1 << 20) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: it broke off, or is longer than `limit_bytes`.
        """
        body = self.take_whole(limit_bytes)
        if body is not None:
            return body
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            size += len(data)
            if size > limit_bytes:
                raise UpstreamError("the replica's answer is too long", answered=True)
            parts.append(data)
        return b"".join(parts)

    @property
    def reusable(self) -> bool:
        return self._complete and self._kept_alive and not (self.closed or self._hung_up)

    def abort(self) -> None:
        """Close at once: vLLM takes a closed connection as the request's cancellation."""
        self.closed = True
        self.transport.abort()
        if self._listener is not None:
            self._listener.heard()
        self._wake()


class Upstream:
    """Connections to one address: `http://host:port` or `unix:/path`; `token` is what it knows us by."""

    def __init__(self, url: str, *, token: str = "", connect_timeout_s: float = 2.0) -> None:
        self.url = url
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._path: str | None = None
        self._host, self._port = "", 0
        if url.startswith("unix:"):
            self._path = url.removeprefix("unix:")
            self.host_header = "localhost"
        else:
            authority = url.removeprefix("http://").rstrip("/")
            host, _, port = authority.rpartition(":")
            self._host, self._port = host.strip("[]"), int(port)
            self.host_header = authority
        self._common = (
            f"host: {self.host_header}\r\nauthorization: Bearer {token}\r\n"
            "accept: */*\r\ncontent-type: application/json\r\n"
        ).encode()

    def written(self, what: bytes, lines: bytes, body: bytes, adapter: str | None = None) -> bytes:
        """Head and body of one request, as one buffer; `what` is its method and path, `lines` end in CRLF each."""
        named = b"x-tailor-adapter: %b\r\n" % adapter.encode() if adapter else b""
        return b"%b HTTP/1.1\r\n%b%b%bcontent-length: %d\r\n\r\n%b" % (
            what, self._common, named, lines, len(body), body,
        )  # fmt: skip

    async def send(self, request: bytes) -> Connection:
        """Send a request and return the connection on which its answer's head has come.

        The caller gives it back with `release`. A kept connection that the replica has closed meanwhile costs
        nothing: the request is sent again on a fresh one.

        Raises:
            UpstreamError: the replica cannot be reached or broke off before the head.
        """
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, request)
            except UpstreamError as error:
                if error.answered:
                    raise
                self._drop_idle()  # the replica has closed them all, or has gone: it is not asked once for each
        return await self._exchange(await self._connect(), request)

    async def _exchange(self, connection: Connection, request: bytes) -> Connection:
        self._busy.add(connection)
        try:
            await connection.exchange(request)
        except BaseException:
            connection.abort()
            self._busy.discard(connection)
            raise
        return connection

    def take(self) -> Connection | None:
        """A kept connection, for `begin`; given back with `release`."""
        connection = self._take_idle()
        if connection is not None:
            self._busy.add(connection)
        return connection

    async def send_again(self, connection: Connection, request: bytes) -> Connection:
        """As `send`, after a kept connection broke before any answer: the replica has closed all, or has gone."""
        self.release(connection)
        self._drop_idle()
        return await self._exchange(await self._connect(), request)

    def _take_idle(self) -> Connection | None:
        now = time.monotonic()  # asking asyncio for the running loop is a system call
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now - connection.idle_since < IDLE_LIMIT_S:
                return connection
            connection.abort()
        return None

    def _drop_idle(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._path is not None:
                    _, connection = await loop.create_unix_connection(Connection, self._path)
                else:
                    _, connection = await loop.create_connection(Connection, self._host, self._port)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfDescriptorsError("no descriptor is left here", answered=False) from error
            raise UpstreamError("the replica cannot be reached", answered=False) from error
        connection.upstream = self
        return connection

    async def refuses(self) -> bool:
        """Whether nobody listens there any more; a connection that comes about is kept."""
        try:
            connection = await self._connect()
        except OutOfDescriptorsError:
            return False
        except UpstreamError:
            return True
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        return False

    def heard_since(self, moment: float) -> bool:
        """Whether engine output of a request now in flight came after `moment` (the loop's clock, seconds)."""
        return any(connection.heard_at > moment for connection in self._busy)

    def release(self, connection: Connection) -> None:
        """Give a connection back: kept when its answer is complete, closed otherwise (which cancels the request)."""
        self._busy.discard(connection)
        connection.unpipe()
        if connection.reusable:
            connection.resume()  # where nobody took a long refusal's body
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        self._drop_idle()
        for connection in list(self._busy):
            connection.abort()
        self._busy.clear()
