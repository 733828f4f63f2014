"""What a run leaves: its schedule, a record a request, what happened meanwhile; arrays, so that millions fit.

All times are ns of the monotonic clock since the run's begin, which all its processes share.
"""

import json
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ABSENT: Final = -1
"""Of a time that never came and of a number that nobody told."""

PLANNED: Final = np.dtype(
    [
        ("at", "i8"),  # when it is to be sent; ABSENT in a closed loop
        ("caller", "i4"),  # of a closed loop: who asks; ABSENT in an open one
        ("tenant", "i4"),  # index of `Schedule.tenants`
        ("model", "i4"),  # index of `Schedule.models`; ABSENT: the base model
        ("phase", "i2"),  # index of the scenario's phases
        ("workload", "i2"),  # index of `Schedule.workloads`
        ("prompt_tokens", "i4"),  # of the whole prompt: its tenant's shared prefix and earlier turns are in it
        ("output_tokens", "i4"),  # at least 1
        ("conversation", "i4"),  # ABSENT where it stands alone; its turns have one seed: each prompt begins the next
        ("turn", "i2"),
        ("abort_after", "i8"),  # ABSENT: it is not
        ("parameters", "i2"),  # index of the workload's parameters; ABSENT: none
        ("canary", "?"),  # the fixed prompt, greedy, of lengths of its own; never aborted
        ("seed", "u4"),  # of the prompt's text
    ]
)


class Outcome(IntEnum):
    """How a request ended."""

    WHOLE = 0  # 200, with something generated, and a stream ended with [DONE]
    ABORTED = 1  # our own client left, as planned
    REFUSED = 2  # 429, or 503 with retry-after
    STATUS = 3  # any other status than 200
    ERROR_EVENT = 4  # `event: error` or an error object in the stream
    TRUNCATED = 5  # the stream ended without [DONE] or brought nothing, or the body ended early
    BROKEN = 6  # the connection failed
    TIMEOUT = 7
    UNSENT = 8  # the run ended before its turn


FAILED: Final = (Outcome.STATUS, Outcome.ERROR_EVENT, Outcome.TRUNCATED, Outcome.BROKEN, Outcome.TIMEOUT)
TIERS: Final = ("", "base", "gpu", "host", "cold")
"""Where the adapter was, as `server-timing` says; the index is what a sample has."""

SAMPLE: Final = np.dtype(
    [
        ("index", "u4"),  # of the schedule
        ("scheduled", "i8"),  # in a closed loop the same as sent
        ("sent", "i8"),
        ("headers", "i8"),
        ("first", "i8"),  # the first piece with content
        ("token", "i8"),  # the first piece of an answer; half a letter is a token, and no text yet
        ("last", "i8"),  # the last piece with content
        ("done", "i8"),
        ("status", "i2"),  # HTTP; ABSENT where none came
        ("outcome", "u1"),
        ("tier", "u1"),  # index of TIERS
        ("chunks", "u4"),  # pieces with content
        ("prompt_tokens", "i4"),  # from `usage`
        ("completion_tokens", "i4"),
        ("cached_tokens", "i4"),
        ("queue_us", "i4"),  # from `server-timing`
        ("load_us", "i4"),
        ("version", "i4"),  # index of `Samples.texts`: `x-tailor-version`
        ("replica", "i4"),  # index of `Samples.texts`
        ("answer", "i4"),  # index of `Samples.texts`: a canary's answer
        ("error", "i4"),  # index of `Samples.texts`: the error's code, or what broke
    ]
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every request of a run, in order of time, decided by the scenario and its seed alone."""

    planned: Array  # of PLANNED
    tenants: tuple[str, ...]  # `group-0`, `group-1`, …
    groups: tuple[str, ...]  # of each tenant
    models: tuple[str, ...]  # each adapter of each tenant once, by its name there: tenants have the same names
    workloads: tuple[str, ...]
    phases: tuple[tuple[int, int], ...]  # begin and end, ns

    @property
    def end(self) -> int:
        """When its last phase ends, ns."""
        return self.phases[-1][1]


@dataclass(frozen=True, slots=True)
class Samples:
    """What became of the requests: a row each, in order of their index."""

    rows: Array  # of SAMPLE
    chunk_ends: Array  # u8: of row i the chunks are chunk_at[chunk_ends[i - 1] : chunk_ends[i]]
    chunk_at: Array  # u4: µs since the request was sent
    texts: tuple[str, ...]  # 0 is ""

    def save(self, path: Path) -> None:
        """As one npz file; texts are JSON in it, nothing is pickled."""
        texts = np.frombuffer(json.dumps(self.texts).encode(), np.uint8)
        np.savez(path, rows=self.rows, chunk_ends=self.chunk_ends, chunk_at=self.chunk_at, texts=texts)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            texts = tuple(json.loads(found["texts"].tobytes()))
            return cls(found["rows"], found["chunk_ends"], found["chunk_at"], texts)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done to the server, or that it was seen to do."""

    at: int
    kind: str  # an ActionKind's value, or `replica-state`, `job`
    target: str
    took: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class VersionLife:
    """A version of an adapter may answer requests to `model` that run at any time between `since` and `until`."""

    tenant: str
    model: str
    digest: str
    since: int
    until: int  # ABSENT: to the end
    answer: str | None  # to the canary prompt; None: not known
    leaving: int = ABSENT  # when its deletion began, which may have been done any time before `until`


@dataclass(frozen=True, slots=True)
class Lateness:
    """How a generator process kept its time."""

    process: int
    p50_us: float  # sent after scheduled
    p99_us: float
    most_us: float
    cpu_share: float
    idle_callers: int = 0  # of closed loops: who had nothing left to ask before their phase ended


@dataclass(frozen=True, slots=True)
class Run:
    """A run whole, as gates, figures, report, comparison and plan read it."""

    scenario: dict[str, Any]  # as pydantic dumps it, profile merged in
    target: dict[str, Any]  # kind (url, fake, cpu), url, replicas, slots, model, versions of server and tool
    machine: dict[str, Any]
    started_at: str  # ISO 8601, UTC
    schedule: Schedule
    samples: Samples
    events: tuple[Event, ...] = ()
    versions: tuple[VersionLife, ...] = ()
    lateness: tuple[Lateness, ...] = ()
    unfinished: str = ""  # why the schedule was not played to its end
    readings: dict[str, Any] = field(default_factory=dict)  # what was read at the server before and after
    base_answer: str | None = None  # the base model's, to the canary prompt; None: not known
    shard: tuple[int, int] = (0, 1)  # which of how many hosts' parts of the schedule
