"""What a running load test tells twice a second: each group's counts and histograms, of all processes together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from loadtests.histogram import Histogram
from loadtests.recording import ABSENT, Array

PROGRESS_S: Final = 0.5


@dataclass(slots=True)
class Tally:
    """One group's counts since the run's begin."""

    sent: int = 0
    done: int = 0  # ended, however
    failed: int = 0  # one of recording.FAILED
    refused: int = 0
    tokens: int = 0  # pieces with content, which streams of vLLM bring a token each; those in flight too
    ttft_us: Histogram = field(default_factory=Histogram)  # from scheduled; of those that ended
    itl_us: Histogram = field(default_factory=Histogram)

    @property
    def in_flight(self) -> int:
        """Sent and not ended."""
        return self.sent - self.done

    def add(self, other: "Tally") -> None:
        """Count what the other has counted."""
        for name in ("sent", "done", "failed", "refused", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ttft_us.merge(other.ttft_us)
        self.itl_us.merge(other.itl_us)

    def count(self, rows: Array, chunk_at: Array) -> None:
        """Take the times of requests that ended (SAMPLE), with the times of all their chunks."""
        came = rows[rows["first"] != ABSENT]
        self.ttft_us.add((came["first"] - came["scheduled"]) // 1_000)
        begins = np.cumsum(rows["chunks"]) - rows["chunks"]
        later = np.ones(len(chunk_at), bool)
        later[begins[rows["chunks"] > 0]] = False
        self.itl_us.add(np.diff(chunk_at.astype(np.int64), prepend=0)[later])

    def told(self) -> list[Any]:
        """As JSON."""
        counts = [self.sent, self.done, self.failed, self.refused, self.tokens]
        return [counts, self.ttft_us.told(), self.itl_us.told()]

    @classmethod
    def of(cls, told: Sequence[Any]) -> "Tally":
        """What `told` wrote."""
        counts, ttft, itl = told
        sent, done, failed, refused, tokens = counts
        return cls(sent, done, failed, refused, tokens, Histogram.of(ttft), Histogram.of(itl))


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; `at` in ns since its begin."""

    at: int
    groups: dict[str, Tally]

    @classmethod
    def of(cls, at: int, told: Sequence[dict[str, list[Any]]]) -> "Progress":
        """From the last word of each process."""
        groups: dict[str, Tally] = {}
        for one in told:
            for name, tally in one.items():
                groups.setdefault(name, Tally()).add(Tally.of(tally))
        return cls(at, groups)
