"""uvicorn's HTTP/1.1 protocol, with bounds that it lacks and a short way for generation requests.

A generation request makes no ASGI scope, messages or events: its `Exchange` takes the body from the parser and writes
the answer to the transport. That halves the CPU of a request (docs/benchmarks.md). Everything else goes through ASGI as
uvicorn does it: an `Exchange` stands where uvicorn's own request cycle would, and keeps that one's contract (checked
with uvicorn 0.54: `response_complete`, `disconnected`, `keep_alive`, `body`, `more_body`, `message_event`).
"""

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.api.body import LIMIT_BYTES, PATIENCE_S, STALL_S
from gateway.batches import Wait
from gateway.errors import BodyTooLarge, BodyTooSlow, GatewayError, ReplicaUnavailable

HEAD_LIMIT_BYTES: Final = 65_536
HEAD_PATIENCE_S: Final = 10.0
MOST_PIPELINED: Final = 16
BODY_S: Final = 300.0
PIECE_BYTES: Final = 65_536
LOOK_S: Final = 5.0
NO_HTTP: Final = "Invalid HTTP request received."
OFFERS: Final = frozenset((b"upgrade", b"connection", b"http2-settings"))
LAST_CALL_S: Final = 5  # an int, as uvicorn declares the limit that it becomes: compiled code takes no other


class ClientGone(Exception):
    """The client closed the connection before its request was whole, or before its answer was."""


class Served(Protocol):
    """Who works on an exchange, and is told what becomes of its client."""

    def leave(self) -> None:
        """The client has gone."""

    def stop(self, reason: GatewayError) -> None:
        """It has taken too long: answer with this, or end the stream with it."""

    def cancel(self, msg: object = None) -> None:
        """The process ends now; called as a task's would be."""


class HotPath(Protocol):
    """What serves one path without ASGI."""

    def begin(self, exchange: "Exchange") -> Served:
        """Work on it from the loop's next turn on, until `Exchange.over`; raises nothing."""
        ...


class Out(Protocol):
    """Writes to transports, in order, once this turn's work is done."""

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None: ...
    def after(self, then: Callable[[], None]) -> None: ...


class Flow(Protocol):
    """What is told how fast the client reads."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Exchange:
    """One request on the short way, and its answer."""

    def __init__(self, protocol: "FrontProtocol", hot: HotPath, headers: list[tuple[bytes, bytes]]) -> None:
        self.header = dict(reversed(headers)).get
        """The first header of a (lower-case) name, None where there is none."""
        self.began_at = time.monotonic()
        # what uvicorn's protocol reads and writes
        self.body: bytearray | _Overflow = bytearray()
        self.more_body = True
        self.response_complete = False
        self.keep_alive = True
        # ours
        self.knows_chunks = True
        """Whether the client speaks HTTP/1.1."""
        self.begun = False
        self.streams = False
        self.flow: Flow | None = None
        self._served: Served | None = None
        self.is_whole = False
        """Whether the whole answer is on its way."""
        self._protocol = protocol
        self._out: Out = protocol.app.out
        self._hot = hot
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None

    # the request

    def take(self, piece: bytes) -> int:
        """A piece of the body has come; how many bytes wait now."""
        body = self.body
        if isinstance(body, _Overflow):
            body.size += len(piece)
            return 0
        body += piece
        return len(body)

    @property
    def declared_bytes(self) -> int:
        """What the body's head says that it has; more than any where it says nothing."""
        declared = self.header(b"content-length")
        if declared is None or len(declared) > 20:
            return sys.maxsize
        return int(declared)  # digits alone: the parser has seen to that

    async def receive(self, limit_bytes: int) -> bytes:
        """The body, once it is whole. Call it once the sender is known: only what came with the head is read before.

        Raises:
            BodyTooLarge: it passes the limit. BodyTooSlow: it stalls. ClientGone: it never came.
        """
        if self.more_body:
            await self._receive(limit_bytes)
        return self.whole_body(limit_bytes)

    def whole_body(self, limit_bytes: int) -> bytes:
        """The body, of which nothing is missing.

        Raises:
            BodyTooLarge: it passes the limit.
        """
        if isinstance(self.body, _Overflow) or len(self.body) > limit_bytes:
            raise BodyTooLarge(f"The body is larger than {limit_bytes} bytes.")
        return bytes(self.body)

    async def _receive(self, limit_bytes: int) -> None:
        self._protocol.continue_if_expected()
        until = time.monotonic() + BODY_S
        while self.more_body:
            self._protocol.flow.resume_reading()
            if len(self.body) > limit_bytes:
                await self._discard()
                return
            await self._bytes_come(min(STALL_S, until - time.monotonic()))

    async def _bytes_come(self, patience_s: float) -> None:
        self._waiter = self._protocol.loop.create_future()
        try:
            async with asyncio.timeout(patience_s):
                await self._waiter
        except TimeoutError as error:
            self.keep_alive = False
            raise BodyTooSlow(f"The body stalled for {patience_s:.0f} s; send it again.") from error
        finally:
            self._waiter = None
        if self._gone:
            raise ClientGone

    async def _discard(self) -> None:
        """Read the rest of a refused body off, within limits, so that the client gets to read why."""
        overflow = self.body = _Overflow(len(self.body))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.more_body and overflow.size < LIMIT_BYTES:
                    self._protocol.flow.resume_reading()
                    await self._bytes_come(PATIENCE_S)
        except (TimeoutError, BodyTooSlow):
            pass
        self.keep_alive = self.keep_alive and not self.more_body

    @property
    def message_event(self) -> "Exchange":
        """Itself: an event of its own would refer back to it, and each request be garbage that only a search finds."""
        return self

    def set(self) -> None:
        """Bytes have come, or the client has gone: uvicorn's event is told."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def disconnected(self) -> bool:
        return self._gone

    @disconnected.setter
    def disconnected(self, gone: bool) -> None:
        """The client has left: whoever works on its answer learns it, wherever that waits."""
        self._gone = gone
        if self._waiter is None and self._served is not None:  # who waits for bytes is woken next
            self._served.leave()

    # the answer

    def answer(self, status: int, headers: bytes, body: bytes) -> Wait | None:
        """A whole answer; `headers` are lines, each with its end.

        What it returns is to be waited for: a slow reader of a long answer holds this request, not many bytes.
        """
        head = b"%bcontent-length: %d\r\n%b" % (self._head(status), len(body), headers)
        self.begun = True
        if self._gone:
            return None
        if self.more_body:
            self.keep_alive = False  # a refusal before the body was read: what follows is no request
        close = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        if len(body) > PIECE_BYTES:
            return self._answer_in_pieces(head + close, body)
        self._out.write(self._protocol.transport, b"%b%b%b" % (head, close, body))
        self._finish()
        return None

    def answer_shortly(self, status: int, headers: bytes, body: bytes) -> None:
        """As `answer`, for what is short anyway: an error."""
        wait = self.answer(status, headers, body[:PIECE_BYTES])
        assert wait is None

    async def _answer_in_pieces(self, head: bytes, body: bytes) -> None:
        write = self._protocol.transport.write
        write(head)
        for start in range(0, len(body), PIECE_BYTES):
            write(body[start : start + PIECE_BYTES])
            if self._protocol.flow.write_paused:
                await self._protocol.flow.drain()
            if self._gone:
                raise ClientGone
        self._finish()

    def begin(self, headers: bytes, events: bytes) -> None:
        """The head of a stream of server-sent events, and the first of them."""
        self.begun = self.streams = True
        if self._gone:
            return
        close = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        if self.knows_chunks:
            told = b"%btransfer-encoding: chunked\r\n%b%b%x\r\n%b\r\n" % (
                self._head(200), headers, close, len(events), events,
            )  # fmt: skip
        else:  # its end is the connection's
            told = b"%b%b%b%b" % (self._head(200), headers, close, events)
        self._out.write(self._protocol.transport, told)

    def write(self, events: bytes) -> None:
        """Whole events of the stream; `flow` is told when the client cannot take more."""
        if not self._gone:
            told = b"%x\r\n%b\r\n" % (len(events), events) if self.knows_chunks else events
            self._out.write(self._protocol.transport, told)

    def end(self) -> None:
        """The end of the stream."""
        if not self._gone:
            if self.knows_chunks:
                self._out.write(self._protocol.transport, b"0\r\n\r\n")
            self._finish()

    def stop(self, reason: GatewayError) -> None:
        """It has taken too long: whoever works on it says so."""
        if self._served is not None:
            self._served.stop(reason)

    def _head(self, status: int) -> bytes:
        return STATUS_LINE[status] + self._protocol.default_head()

    def _finish(self) -> None:
        self.is_whole = True
        self._out.after(self._complete)

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._protocol.transport.close()
        self._protocol.on_response_complete()

    # being worked on

    def start(self) -> None:
        """Have it worked on from the loop's next turn on, together with what else comes in this one."""
        self._served = self._hot.begin(self)
        self._protocol.tasks.add(cast(Any, self._served))  # the server's end waits for these

    def over(self) -> None:
        """Nobody works on it any more: an answer that is not whole is cut off, so that none takes it for whole."""
        if self._served is not None:
            self._protocol.tasks.discard(cast(Any, self._served))
            self._served = None
        if not self.is_whole and not self._gone:
            self._protocol.transport.abort()


def _restarting() -> GatewayError:
    return ReplicaUnavailable(
        "The server restarts, and this ran for longer than it could wait; send it again.",
        retry_after_s=1,
        code="server_restarting",
    )


class _Overflow:
    """A body that is only counted."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 0  # nothing waits: reading never pauses for it


class _AnyLength:
    """What is still to come of an answer whose end is its connection's, as uvicorn reckons with it: enough."""

    def __lt__(self, size: int) -> bool:
        return False

    def __sub__(self, size: int) -> "_AnyLength":
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class FrontProtocol(HttpToolsProtocol):
    """Generation requests take the short way. Connections with no whole head in time, or one without end, are cut."""

    _default: ClassVar[tuple[list[tuple[bytes, bytes]] | None, bytes]] = (None, b"")

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._hot: Mapping[bytes, HotPath] = self.app.hot  # the app is `front.Front`, unwrapped
        self._head_bytes = 0
        self._in_head = True
        self._head_is_new = True
        self._waits_since = 0.0
        self._look: asyncio.TimerHandle | None = None
        self._arriving: Exchange | None = None
        self._running: Exchange | None = None
        self._asgi: Any = None
        self._drains = False
        self._passes_over = False
        self._kept_alive = True
        self._in_trailers = False
        self._trailer_bytes = 0

    # connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app.parts.connections.add(self)
        self._waits_since = self.loop.time()
        self._look = self.loop.call_later(LOOK_S, self._look_after)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        self.app.parts.connections.discard(self)
        self._arriving = None
        self.pipeline.clear()
        newest: Any = self.cycle
        served: tuple[Any, ...] = (self._running, self._asgi)
        for cycle in served:  # uvicorn tells the newest of several pipelined requests only
            if cycle is not None and cycle is not newest and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def _look_after(self) -> None:
        """One timer per connection, not two per request: heads that take too long, connections idle for too long."""
        waited_s = self.loop.time() - self._waits_since
        if self._in_head and waited_s > HEAD_PATIENCE_S:
            self.transport.abort()
        elif waited_s > self.timeout_keep_alive and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self._look = self.loop.call_later(LOOK_S, self._look_after)

    def shutdown(self) -> None:
        """The server drains: what runs is answered, and one request more, with `connection: close`.

        An idle connection is closed once its client has been silent for `LAST_CALL_S`: closed sooner, it could meet the
        client's next request half way, and whether that was served nobody would know.
        """
        self._drains = True
        self.timeout_keep_alive = min(self.timeout_keep_alive, LAST_CALL_S)
        cycle: Any = self.cycle
        begun = cycle is not None and (cycle.begun if isinstance(cycle, Exchange) else cycle.response_started)
        if cycle is not None and not begun:  # else its head has promised to keep the connection
            cycle.keep_alive = False
        if self._look is not None:
            self._look.cancel()
        silent_s = self.loop.time() - self._waits_since
        self._look = self.loop.call_later(max(0.0, LAST_CALL_S - silent_s) + 0.01, self._look_after)

    def expire(self) -> None:
        """The time for draining is over: a stream ends in an error event, an idle connection at once."""
        if self._running is not None and not self._running.response_complete:
            self._running.keep_alive = False
            self._running.stop(_restarting())
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._running is not None and self._running.flow is not None:
            self._running.flow.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._running is not None and self._running.flow is not None:
            self._running.flow.resume()

    # parsing

    def data_received(self, data: bytes) -> None:
        self._head_is_new = False
        self._parse(data)
        if self._in_head and not self._head_is_new:  # what a body has brought along is no more than one read
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self.transport.abort()
        if self._arriving is not None:
            exchange, self._arriving = self._arriving, None
            if exchange.more_body:
                self.flow.pause_reading()  # not before it is known who sends
            self._running = exchange
            exchange.start()
        if self._in_trailers:
            self._trailer_bytes += len(data)
            if self._trailer_bytes > HEAD_LIMIT_BYTES:
                self.transport.abort()
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()

    def _parse(self, data: bytes) -> None:
        while len(self.pipeline) <= MOST_PIPELINED:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() != b"CONNECT":
                    data = self._without_offer(data[upgrade.args[0] :])
                    continue
                self.send_400_response(NO_HTTP)
            except httptools.HttpParserError:
                self.send_400_response(NO_HTTP)
            return

    def _without_offer(self, rest: bytes) -> bytes:
        """The request again, but for its offer of another protocol, and what follows its head.

        Java's client makes one, which a server may pass over (RFC 9110, 7.8); but the parser ends the message there,
        before its body.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version()
        kept = [line for line in self.headers if line[0] not in OFFERS]
        if not self._kept_alive:
            kept.append((b"connection", b"close"))
        lines = b"".join([b"%b: %b\r\n" % line for line in kept])
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version.encode(), lines)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return head + rest

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer, behind a chunked body, says nothing here
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_chunk_header(self) -> None:
        self._in_trailers, self._trailer_bytes = True, 0  # until a body says that it was not the last one

    def on_body(self, body: bytes) -> None:
        self._in_trailers = False
        exchange: Any = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
        elif not exchange.response_complete:
            if exchange.take(body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            exchange.set()

    def on_message_complete(self) -> None:
        self._in_trailers = False
        if self._passes_over:
            return
        exchange: Any = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
        elif not exchange.response_complete:
            exchange.more_body = False
            exchange.set()
            if not self.pipeline:  # paused for a large body; who does not read does not see the client leave
                self.flow.resume_reading()

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._in_head = self._head_is_new = True
        self._head_bytes = 0
        self._waits_since = self.loop.time()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._passes_over = self.parser.should_upgrade()
        if self._passes_over:
            self._kept_alive = self.parser.should_keep_alive()
            return
        hot = self._hot_path() if self.parser.get_method() == b"POST" else None
        if hot is None:
            self._begin_asgi()
            self.cycle.keep_alive = self.cycle.keep_alive and not self._drains
            return
        exchange = Exchange(self, hot, self.headers)
        exchange.knows_chunks = self.parser.get_http_version() != "1.0"
        exchange.keep_alive = exchange.knows_chunks and self.parser.should_keep_alive() and not self._drains
        before, self.cycle = self.cycle, exchange  # type: ignore[assignment]  # keeps the contract
        if before is None or before.response_complete:
            self._arriving = exchange
        else:  # pipelined: it waits its turn
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def _hot_path(self) -> HotPath | None:
        hot = self._hot.get(self.url.partition(b"?")[0])
        if hot is None and (b"%" in self.url or not self.url.startswith(b"/")):  # spelled in another way
            try:
                path = httptools.parse_url(self.url).path
            except httptools.HttpParserInvalidURLError:
                return None
            hot = self._hot.get(unquote_to_bytes(path or b""))
        return hot

    def _begin_asgi(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)  # the list is the scope's
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":  # it knows no chunks, which uvicorn sends all the same
            cycle: Any = self.cycle
            cycle.chunked_encoding, cycle.expected_content_length = False, _AnyLength()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            self._running = cycle
            cycle.start()
        else:
            self._asgi = cycle
            super()._start_asgi_task(cycle, app)

    # answering

    def continue_if_expected(self) -> None:
        if self.expect_100_continue:
            self.expect_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so, unless an answer is on its way: nothing may be written into that."""
        running = self._running
        if running is not None and running.is_whole and not running.response_complete:
            running.keep_alive = False  # its answer goes out first, and closes
        elif running is not None and running.begun and not running.response_complete:
            self.transport.abort()
        else:
            self._arriving = None  # what came before it in the same read has this for its answer
            super().send_400_response(msg)

    def default_head(self) -> bytes:
        """uvicorn's own headers (the date, renewed each second) as lines."""
        lines = self.server_state.default_headers
        known, head = FrontProtocol._default
        if known is not lines:
            head = b"".join([b"%b: %b\r\n" % line for line in lines])
            FrontProtocol._default = (lines, head)
        return head

    def on_response_complete(self) -> None:
        """As uvicorn's, without a timer per request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._waits_since = self.loop.time()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
