"""Upstream bytes → client: the engine's name for an adapter replaced, usage read in passing, engine errors hidden.

A stream is handed on event by event: what is not yet a whole event waits, so that a break never leaves half of one.
JSON strings cannot hold an unescaped quote, so the byte patterns below match structure, never a tenant's text.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from gateway.errors import ReplicaFailed
from gateway.tokens import Usage

DONE: Final = b"data: [DONE]\n\n"
_ERROR_MARK: Final = b'data: {"error"'
_USAGE_MARK: Final = b',"usage":{'
_NO_CHOICES: Final = b'"choices":[]'
LONGEST_BYTES: Final = 32 << 20
"""Of one event: the last of a Responses stream repeats the whole answer, and a chat's has all that came while its
client read nothing, logprobs and all (`dialect.MOST_ENTRIES`)."""
BROKE_OFF: Final = "The engine broke the answer off; try again."


class BrokenOff(ReplicaFailed):
    """The engine reported an error in the middle of what it sent; `passed` is what came before, translated."""

    def __init__(self, error: ReplicaFailed, passed: bytes) -> None:
        super().__init__(error.message)
        self.passed = passed


class ErrorEvent(ReplicaFailed):
    """The engine streamed an error, `body`: its own failure, or its refusal of a request that it looked at so late."""

    def __init__(self, body: bytes) -> None:
        super().__init__(BROKE_OFF)
        self.body = body


class Translation:
    """One answer's way from the engine's words to the tenant's."""

    def __init__(self, engine_name: str, shown_name: str) -> None:
        self._engine_name = b'"model":"' + engine_name.encode() + b'"'
        self._shown_name = b'"model":' + msgspec.json.encode(shown_name)
        self._counted = b""

    def whole(self, body: bytes) -> bytes:
        """A complete JSON answer."""
        at = body.rfind(_USAGE_MARK)
        if at >= 0:
            begin, end = _usage_in(body, at)
            self._counted = body[begin:end]
        return body.replace(self._engine_name, self._shown_name, 1)

    @property
    def usage(self) -> Usage | None:
        """Tokens so far, as the engine counted them last."""
        return msgspec.json.decode(self._counted, type=Usage) if self._counted else None


def _usage_in(event: bytes, at: int) -> tuple[int, int]:
    """Where the usage object begins and ends whose mark stands at `at`."""
    begin = at + len(_USAGE_MARK) - 1
    end = event.find(b"}", begin) + 1
    while event.count(b"{", begin, end) > event.count(b"}", begin, end):  # its details are objects of their own
        end = event.find(b"}", end) + 1
    return begin, end


def told(events: list[bytes], translate: Callable[[bytes], bytes]) -> bytes:
    """Events that came together, translated.

    Raises:
        ReplicaFailed: the first of them tells of an error; BrokenOff: a later one does.
    """
    passed: list[bytes] = []
    try:
        for event in events:
            passed.append(translate(event))
    except ReplicaFailed as error:
        if not passed:
            raise
        raise BrokenOff(error, b"".join(passed)) from error
    return b"".join(passed)


class Unfinished:
    """The pieces of an event that is not whole yet, joined once: a long one would be copied with each of them."""

    __slots__ = ("_bytes", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._bytes = 0

    def whole_events(self, data: bytes) -> bytes:
        """What is whole now that these bytes have come; the rest is kept.

        Raises:
            ReplicaFailed: an event grew past all bounds.
        """
        pieces = self.pieces
        end = data.rfind(b"\n\n") + 2
        if end == 1 and not (pieces and pieces[-1][-1:] == data[:1] == b"\n"):
            self._keep(data)
            return b""
        if pieces:
            end = max(end, 1) + self._bytes
            data = b"".join([*pieces, data])
            self.pieces = []
            self._bytes = 0
        self._keep(data[end:])
        return data[:end]

    def _keep(self, piece: bytes) -> None:
        if piece:
            self.pieces.append(piece)
            self._bytes += len(piece)
            if self._bytes > LONGEST_BYTES:
                raise ReplicaFailed("The engine's answer broke off; try again.")


class StreamTranslation(Translation):
    """The same for a stream of server-sent events.

    Each event of the engine's carries the usage so far (`continuous_usage_stats`), so that a stream that is cut
    anywhere is counted to its last event; clients get the OpenAI form, with one last usage event if they asked for it.
    """

    def __init__(self, engine_name: str, shown_name: str, *, wants_usage: bool) -> None:
        super().__init__(engine_name, shown_name)
        self._wants_usage = wants_usage
        self._unfinished = Unfinished()
        self.opening = b""  # vLLM 0.32 writes none on these paths
        self.finished = False

    @property
    def is_counted(self) -> bool:
        """Before the end a token may be out that no event has told of: half a character, or one that was not sent."""
        return self.finished

    def feed(self, data: bytes) -> bytes:
        """Translate the whole events that are there now; a half one waits for the next call.

        Raises:
            ReplicaFailed: an event grew past all bounds. ErrorEvent: the engine reported an error inside the stream.
                BrokenOff: so it did, after events that go to the client all the same.
        """
        if self._unfinished.pieces or data[-2:] != b"\n\n":
            data = self._unfinished.whole_events(data)
        if data.find(b"\n\n") == len(data) - 2:  # one event: what an engine step gives
            return self._event(data)
        return told([event + b"\n\n" for event in data.split(b"\n\n")[:-1]], self._event)

    def _event(self, event: bytes) -> bytes:
        at = event.rfind(_USAGE_MARK)
        if at < 0:
            if event.startswith(_ERROR_MARK):
                raise ErrorEvent(event[len(b"data: ") :])
            if event == DONE:
                self.finished = True
            return event.replace(self._engine_name, self._shown_name, 1)
        begin, end = _usage_in(event, at)
        self._counted = event[begin:end]
        if not event.endswith(_NO_CHOICES, 0, at):
            event = event[:at] + event[end:]
        elif not self._wants_usage:
            return b""
        return event.replace(self._engine_name, self._shown_name, 1)
