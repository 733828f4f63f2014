"""What each generation request has used, told for a moment after its end: an answer that is cut never says it.

The request's id is the gateway's own (`x-request-id`). vLLM makes none of its ids of it in every dialect, so what a
request starts in the engine is found by the task that serves it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Protocol

import msgspec

KEPT_S: Final = 10.0
MOST_KEPT: Final = 8_192


class Sequence(Protocol):
    """One answer in the making; the numbers are those of now, and after its end the last ones."""

    @property
    def is_over(self) -> bool: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...


class Use(msgspec.Struct, frozen=True):
    """Tokens of one request; the prompt, which all its answers share, counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


_serving: ContextVar[list[Sequence] | None] = ContextVar("tailor_serving", default=None)


class Counts:
    """Requests that run, and those that have ended in the last `KEPT_S`, `MOST_KEPT` at most."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: set[str] = set()
        self._ended: dict[str, tuple[float, list[Sequence] | Use]] = {}

    @contextmanager
    def counting(self, request_id: str) -> Iterator[None]:
        """While the request is served; what `began` meanwhile, in this task or one that it has started, is its own."""
        sequences: list[Sequence] = []
        before = _serving.set(sequences)
        self._running.add(request_id)
        try:
            yield
        finally:
            _serving.reset(before)
            self._running.discard(request_id)
            if sequences:  # what never reached the engine has no count
                self._keep(request_id, sequences)

    @staticmethod
    def began(sequence: Sequence) -> None:
        """The engine has taken it up."""
        sequences = _serving.get()
        if sequences is not None:
            sequences.append(sequence)

    def is_running(self, request_id: str) -> bool:
        """Whether its count may still grow: it is served, or vLLM has not stopped what it started."""
        return request_id in self._running or (request_id in self._ended and self.use_of(request_id) is None)

    def use_of(self, request_id: str) -> Use | None:
        """What it has used; None while it runs, and of one that is not known (any more)."""
        kept = self._ended.get(request_id)
        if kept is None:
            return None
        ended_at, found = kept
        if isinstance(found, Use):
            return found
        use = _sum(found)
        if use is not None:
            self._ended[request_id] = (ended_at, use)  # without what vLLM holds of it
        return use

    def _keep(self, request_id: str, sequences: list[Sequence]) -> None:
        now = self._clock()
        while self._ended:
            oldest = next(iter(self._ended))
            if len(self._ended) < MOST_KEPT and now - self._ended[oldest][0] < KEPT_S:
                break
            del self._ended[oldest]
        self._ended[request_id] = (now, _sum(sequences) or sequences)


def _sum(sequences: list[Sequence]) -> Use | None:
    if not all(sequence.is_over for sequence in sequences):
        return None
    return Use(
        max(sequence.prompt_tokens for sequence in sequences),
        max(sequence.cached_tokens for sequence in sequences),
        sum(sequence.completion_tokens for sequence in sequences),
    )
