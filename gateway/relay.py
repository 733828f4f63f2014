"""Upstream bytes → client: the engine's name for an adapter replaced, usage read in passing, engine errors hidden.

A stream is handed on event by event: what is not yet a whole event waits, so that a break never leaves half of one.
JSON strings cannot hold an unescaped quote, so the byte patterns below match structure, never a tenant's text.
"""

from typing import Final

import msgspec

from gateway.errors import ContextLengthExceeded, GatewayError, ReplicaFailed, RequestInvalid, envelope

DONE: Final = b"data: [DONE]\n\n"
_ERROR_MARK: Final = b'data: {"error"'
_USAGE_MARK: Final = b'"usage":{'
EVENT_LIMIT_BYTES: Final = 1 << 20


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class _Event(msgspec.Struct):
    usage: Usage | None = None
    choices: list[msgspec.Raw] = []


class Translation:
    """One answer's way from the engine's words to the tenant's."""

    def __init__(self, engine_name: str, shown_name: str) -> None:
        self._engine_name = b'"model":"' + engine_name.encode() + b'"'
        self._shown_name = b'"model":' + msgspec.json.encode(shown_name)
        self.usage: Usage | None = None

    def whole(self, body: bytes) -> bytes:
        """A complete JSON answer."""
        self._read_usage(body)
        return body.replace(self._engine_name, self._shown_name, 1)

    def _read_usage(self, event: bytes) -> _Event:
        decoded = msgspec.json.decode(event, type=_Event)
        if decoded.usage is not None:
            self.usage = decoded.usage
        return decoded


class StreamTranslation(Translation):
    """The same for a stream of server-sent events."""

    def __init__(self, engine_name: str, shown_name: str, *, wants_usage: bool) -> None:
        super().__init__(engine_name, shown_name)
        self._wants_usage = wants_usage
        self._rest = b""
        self.finished = False

    def feed(self, data: bytes) -> bytes:
        """Translate the whole events that are there now; a half one waits for the next call.

        Raises:
            ReplicaFailed: the engine reported an error inside the stream, or an event grew past all bounds.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if data[-2:] != b"\n\n":
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:
                cut = 0
            self._rest = data[cut:]
            if len(self._rest) > EVENT_LIMIT_BYTES:
                raise ReplicaFailed("The engine's answer broke off; try again.")
            data = data[:cut]
        if _USAGE_MARK in data or _ERROR_MARK in data:
            data = self._careful(data)
        if data[-len(DONE) :] == DONE:
            self.finished = True
        return data.replace(self._engine_name, self._shown_name)

    def _careful(self, data: bytes) -> bytes:
        kept = []
        for event in data.split(b"\n\n")[:-1]:
            if event.startswith(_ERROR_MARK):
                raise ReplicaFailed("The engine broke the answer off; try again.")
            if _USAGE_MARK in event and event.startswith(b"data: "):
                decoded = self._read_usage(event[6:])
                if not decoded.choices and not self._wants_usage:
                    continue
            kept.append(event + b"\n\n")
        return b"".join(kept)


def error_event(error: GatewayError) -> bytes:
    """The last event of a stream that failed; no `[DONE]` follows, so that no client takes it for whole."""
    return b"data: " + envelope(error) + b"\n\n"


class _UpstreamError(msgspec.Struct):
    message: str = ""
    param: str | None = None


class _UpstreamErrorBody(msgspec.Struct):
    error: _UpstreamError


def refusal(status: int, body: bytes, param: str) -> GatewayError:
    """The engine's refusal in our words: its own text may name paths and inner names, so none of it is passed on."""
    try:
        text = msgspec.json.decode(body, type=_UpstreamErrorBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = ""
    if status == 400 and "context length" in text:
        return ContextLengthExceeded(
            "The prompt is longer than the model's context (or leaves no room for max_tokens): shorten it.",
            param=param,
        )
    if status in (400, 422):
        return RequestInvalid(
            "The engine cannot do what was asked: check prompt, response_format and sampling parameters."
        )
    return ReplicaFailed("The engine failed on this request; try again.")
