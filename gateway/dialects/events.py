"""Streams of named server-sent events (`event: …`, `data: …`), as the Responses and the Messages API have them."""

from typing import ClassVar, Final

import msgspec

from gateway.errors import ReplicaFailed
from gateway.relay import BROKE_OFF, Unfinished, told
from gateway.tokens import PromptDetails, Usage

NAME: Final = b"event: "


class NamedEvents:
    """Passes events on by name: most untouched, some rewritten, an unknown one not at all."""

    passed: ClassVar[frozenset[bytes]] = frozenset()
    deltas: ClassVar[frozenset[bytes]] = frozenset()
    openings: ClassVar[frozenset[bytes]] = frozenset()
    """Those that come before the engine has given anything."""

    def __init__(self, engine_name: str, shown_name: str, prompt_bytes: int) -> None:
        self.engine_name = engine_name
        self.shown_name = shown_name
        self.finished = False
        self.opening = b""
        self.is_counted = False
        """Whether the engine has said what it all came to."""
        self.events = 0
        """Deltas that have passed: each is a token or a few, and some tokens have none."""
        self._prompt_bytes = prompt_bytes
        self._counted: Usage | None = None
        self._unfinished = Unfinished()

    @property
    def usage(self) -> Usage | None:
        """What the engine counted; before it has, an estimate from what has passed."""
        counted = self._counted
        if counted is None:
            return Usage(max(1, self._prompt_bytes // 4), self.events) if self.events else None
        if counted.completion_tokens is None or self.events > counted.completion_tokens:
            return Usage(counted.prompt_tokens, self.events, counted.prompt_tokens_details)
        return counted

    def feed(self, data: bytes) -> bytes:
        whole = self._unfinished.whole_events(data)
        return told(whole.split(b"\n\n")[:-1], self._event)

    def _event(self, event: bytes) -> bytes:
        head, _, data = event.partition(b"\ndata: ")
        name = head[len(NAME) :]
        if name in self.deltas:
            self.events += 1
            return event + b"\n\n"
        if name in self.passed:
            return event + b"\n\n"
        if not head.startswith(NAME):
            if event.startswith(b'data: {"error"'):
                raise ReplicaFailed(BROKE_OFF)
            return b""
        try:
            words = self.rewritten(name, data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplicaFailed("The engine's answer cannot be read; try again.") from error
        if not words:
            return b""
        rewritten = NAME + name + b"\ndata: " + words + b"\n\n"
        if name in self.openings:
            self.opening += rewritten
            return b""
        return rewritten

    def rewritten(self, name: bytes, data: bytes) -> bytes:
        """An event's data in the client's words; b"" drops it.

        Raises:
            ReplicaFailed: it tells of the engine's failure.
        """
        raise NotImplementedError

    def count(self, prompt_tokens: int, cached_tokens: int | None, completion_tokens: int) -> None:
        self._counted = usage(prompt_tokens, cached_tokens, completion_tokens)


def usage(prompt_tokens: int, cached_tokens: int | None, completion_tokens: int) -> Usage:
    return Usage(prompt_tokens, completion_tokens, PromptDetails(cached_tokens))
