"""The numbers behind the metrics: plain integers and lists, changed by one thread, read by the page.

A counter of `prometheus_client` takes a lock, and a family a lookup of labels, on each change; these take neither.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from gateway.telemetry.exposition import sample
from gateway.telemetry.observation import Observation

OUTCOMES: Final = ("ok", "refused", "limited", "gone", "failed")
TOKEN_KINDS: Final = ("prompt", "cached", "completion")
OTHER: Final = "other"
RETIRED: Final = "retired"


def outcome_of(status: int) -> int:
    """Index in OUTCOMES: 429 is limited, 499 a client that left, other 4xx refused, 5xx failed."""
    if status < 400:
        return 0
    if status < 500:
        return 2 if status == 429 else 3 if status == 499 else 1
    return 4


class Histogram:
    """Counts by upper bound, the bound included."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> str:
        before = f"{labels}," if labels else ""
        total, written = 0, []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            written.append(f'{name}_bucket{{{before}le="{bound}"}} {total}\n')
        written += sample(f"{name}_sum", labels, self._sum), sample(f"{name}_count", labels, total)
        return "".join(written)


class Tokens:
    """Tokens by kind; cached ones are a part of the prompt's."""

    __slots__ = ("cached", "completion", "prompt")

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = 0

    def by_kind(self) -> Iterator[tuple[str, int]]:
        return zip(TOKEN_KINDS, (self.prompt, self.cached, self.completion), strict=True)


class Usage(Tokens):
    """What one tenant, or one adapter, has had."""

    __slots__ = ("first_tokens", "first_tokens_s", "outcomes", "owner", "seen_at")

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.outcomes = [0] * len(OUTCOMES)
        self.first_tokens = 0
        self.first_tokens_s = 0.0
        self.seen_at = 0.0

    def count(self, seen: Observation, outcome: int, ttft_s: float | None) -> None:
        self.seen_at = seen.ended
        self.outcomes[outcome] += 1
        self.prompt += seen.prompt_tokens
        self.cached += seen.cached_tokens
        self.completion += seen.completion_tokens
        if ttft_s is not None:
            self.first_tokens += 1
            self.first_tokens_s += ttft_s

    def copy(self) -> "Usage":
        """Its numbers as of now."""
        taken = Usage(self.owner)
        taken.take_over(self)
        return taken

    def take_over(self, gone: "Usage") -> None:
        """Add what another has had, so that sums over all labels stay what they were."""
        self.outcomes = [mine + its for mine, its in zip(self.outcomes, gone.outcomes, strict=True)]
        self.prompt += gone.prompt
        self.cached += gone.cached
        self.completion += gone.completion
        self.first_tokens += gone.first_tokens
        self.first_tokens_s += gone.first_tokens_s


class Capped:
    """Usage by id, for at most `limit` ids at a time: the rest is counted under `other`.

    An id keeps its label while it is in use. Once all labels are taken, those idle for `idle_s` are given up: what they
    had moves to `retired`, not to `other`, whose rate would jump by it. A sum over all labels is exact at any time.
    """

    def __init__(self, limit: int, *, idle_s: float = 3_600, look_every_s: float = 60) -> None:
        self._limit = limit
        self._idle_s = idle_s
        self._look_every_s = look_every_s
        self._looked_at = 0.0
        self._kept: dict[str, Usage] = {}
        self._other = Usage(OTHER)
        self._retired = Usage(RETIRED)

    def of(self, key: str, owner: str, now: float) -> Usage:
        """Where an id's usage is counted."""
        return self._kept.get(key) or self._admit(key, owner, now)

    def items(self) -> list[tuple[str, Usage]]:
        """All of it as of now: an id that is given up later is not seen a second time among the retired."""
        return [*self._kept.items(), (OTHER, self._other), (RETIRED, self._retired.copy())]

    def _admit(self, key: str, owner: str, now: float) -> Usage:
        if len(self._kept) >= self._limit and now - self._looked_at >= self._look_every_s:
            self._looked_at = now
            self._retire(now - self._idle_s)
        if len(self._kept) >= self._limit:
            return self._other
        usage = self._kept[key] = Usage(owner)
        return usage

    def _retire(self, idle_since: float) -> None:
        for key, usage in list(self._kept.items()):
            if usage.seen_at < idle_since:
                self._retired.take_over(self._kept.pop(key))
