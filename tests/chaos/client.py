"""A client that mends nothing: one keep-alive connection, every byte of an answer kept, every ending judged.

It costs little, so that the gateway is what a test with thousands of requests waits for.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

HUNG_S: Final = 30.0
PATHS: Final = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
DIALECTS: Final = tuple(PATHS)
BREAKS: Final = (
    "die_after_events",
    "truncated_after",
    "reset_after",
    "half_close_after",
    "error_event_after",
    "garble_after",
)
"""Faults of a replica that end a stream after so many events."""
END_MARKS: Final = {"responses": ("response.completed",), "messages": ("message_stop",)}


class Hung(AssertionError):
    """No end within the time in which anything must end."""


@dataclass
class Event:
    name: str
    data: Any


@dataclass
class Answer:
    """What has come; `framed` says whether HTTP itself was brought to its end."""

    dialect: str
    streamed: bool
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    framed: bool = False

    @property
    def events(self) -> list[Event]:
        """Whole events; what stands behind the last one is no event and fails."""
        *parts, rest = bytes(self.body).split(b"\n\n")
        assert rest == b"", f"half an event: {rest[:80]!r}"
        return [_event(part) for part in parts]

    @property
    def ending(self) -> str:
        """`whole`, `error event` (a stream that broke) or `refused` (no byte of an answer); anything else fails."""
        assert self.framed, f"cut off after {len(self.body)} bytes of an answer with status {self.status}"
        if self.status != 200:
            assert json.loads(self.body)["error"]["message"]
            return "refused"
        if not self.streamed:
            json.loads(self.body)
            return "whole"
        events = self.events
        errors = [number for number, event in enumerate(events) if _is_error(event)]
        ends = [number for number, event in enumerate(events) if _is_end(self.dialect, event)]
        last = [len(events) - 1]
        assert (errors, ends) in (([], last), (last, [])), f"{len(events)} events, errors {errors}, end marks {ends}"
        assert not errors or len(events) > 1, "an error event where a status would have told it"
        return "error event" if errors else "whole"

    @property
    def said(self) -> str:
        """Its text, as far as it came."""
        if not self.streamed:
            return _text_in(self.dialect, json.loads(self.body))
        return "".join(_piece(self.dialect, event) for event in self.events if not _is_error(event))

    @property
    def digest(self) -> str:
        """Whose answer it is, as the fake replica says it; the base model has none."""
        said = self.said.rstrip(".")
        assert said.startswith("I am "), said[:80]
        return said.removeprefix("I am ")


def _event(part: bytes) -> Event:
    name, data = "", ""
    for line in part.decode().split("\n"):
        kind, _, value = line.partition(": ")
        assert kind in ("event", "data"), line
        name, data = (value, data) if kind == "event" else (name, value)
    return Event(name, data if data == "[DONE]" else json.loads(data))


def _is_error(event: Event) -> bool:
    return event.name == "error" or (isinstance(event.data, dict) and event.data.get("error") is not None)


def _is_end(dialect: str, event: Event) -> bool:
    return event.name in END_MARKS[dialect] if dialect in END_MARKS else event.data == "[DONE]"


def _piece(dialect: str, event: Event) -> str:
    if event.data == "[DONE]":
        return ""
    if dialect == "responses":
        return str(event.data["delta"]) if event.name == "response.output_text.delta" else ""
    if dialect == "messages":
        return str(event.data["delta"]["text"]) if event.name == "content_block_delta" else ""
    return "".join(
        str(choice["delta"].get("content", "") if dialect == "chat" else choice["text"])
        for choice in event.data["choices"]
    )


def _text_in(dialect: str, answer: dict[str, Any]) -> str:
    if dialect == "responses":
        return str(answer["output"][0]["content"][0]["text"])
    if dialect == "messages":
        return str(answer["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if dialect == "chat" else choice["text"])


def request(
    key: str, model: str, *, dialect: str = "chat", stream: bool = False, tokens: int | None = None, **more: Any
) -> bytes:
    """Head and body of one request, ready to be written."""
    prompt = {"completions": "prompt", "responses": "input"}.get(dialect, "messages")
    words: Any = "who are you?" if prompt != "messages" else [{"role": "user", "content": "who are you?"}]
    fields: dict[str, Any] = {"model": model, prompt: words, **more}
    if stream:
        fields["stream"] = True
    if dialect == "messages" or tokens is not None:
        fields["max_output_tokens" if dialect == "responses" else "max_tokens"] = tokens or 64
    body = json.dumps(fields).encode()
    return (
        b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b"
    ) % (PATHS[dialect].encode(), key.encode(), len(body), body)


class Client(asyncio.Protocol):
    """One connection, opened when it is needed; one request at a time."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = str(address.hostname), int(address.port or 80)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._parser: Any = None
        self._news = asyncio.Event()

    async def send(self, data: bytes, *, dialect: str = "chat", stream: bool = False) -> Answer:
        """Begin a request; the answer fills as it comes."""
        answer = self._answer = Answer(dialect, stream)
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is None:
            await asyncio.get_running_loop().create_connection(lambda: self, self._host, self._port)
        assert self._transport is not None
        self._transport.write(data)
        return answer

    async def until(self, answer: Answer, *, events: int | None = None, patience_s: float = HUNG_S) -> Answer:
        """Return at the answer's end, or once so many events have come."""
        try:
            async with asyncio.timeout(patience_s):
                while not self._is_over(answer) and (events is None or answer.body.count(b"\n\n") < events):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise Hung(f"no end after {patience_s} s: status {answer.status}, {len(answer.body)} bytes") from None
        return answer

    async def ask(
        self, key: str, model: str, *, dialect: str = "chat", stream: bool = False, patience_s: float = HUNG_S,
        **more: Any,
    ) -> Answer:  # fmt: skip
        """One request and its answer, to the end."""
        data = request(key, model, dialect=dialect, stream=stream, **more)
        return await self.until(await self.send(data, dialect=dialect, stream=stream), patience_s=patience_s)

    def leave(self) -> None:
        """Go away in the middle, without a word."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def pause(self) -> None:
        """Read nothing more."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def _is_over(self, answer: Answer) -> bool:
        return answer.framed or self._transport is None

    # callbacks of the transport and the parser

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        with suppress(httptools.HttpParserError):  # what is no HTTP never becomes `framed`
            self._parser.feed_data(data)
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._news.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._answer is not None
        self._answer.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        assert self._answer is not None
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        assert self._answer is not None
        self._answer.body += data

    def on_message_complete(self) -> None:
        assert self._answer is not None
        self._answer.framed = True
