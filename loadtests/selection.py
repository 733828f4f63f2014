"""Some of a run's requests: of a phase, of a group of tenants, and how each ended."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtests import isolation
from loadtests.recording import ABSENT, FAILED, Event, Outcome, Run

Array = npt.NDArray[Any]
MS: Final = 1e6
S: Final = 1e9


@dataclass(frozen=True)
class Selected:
    """Some of a run's requests."""

    run: Run
    at: npt.NDArray[np.intp]  # places in `samples.rows`, in order; a resample has some more than once
    wanted: tuple[int, ...] = ()  # the phases that were asked for, though they have no request
    part: tuple[float, float] | None = None  # begin and end, ns, where they are of a part of their only phase

    @cached_property
    def rows(self) -> Array:
        """Their samples."""
        return np.asarray(self.run.samples.rows[self.at])

    @cached_property
    def planned(self) -> Array:
        """What was planned of them."""
        return np.asarray(self.run.schedule.planned[self.rows["index"]])

    @cached_property
    def phases(self) -> list[int]:
        """The phases they are of."""
        return [int(phase) for phase in np.unique(self.planned["phase"])]

    @cached_property
    def whole(self) -> Array:
        """Which came whole."""
        return np.asarray(self.rows["outcome"] == Outcome.WHOLE)

    @cached_property
    def gone(self) -> Array:
        """Which were answered 404 rightly, for their adapter had been deleted."""
        return isolation.gone(self.run, self.at)

    @cached_property
    def failed(self) -> Array:
        """Which failed."""
        return np.asarray(np.isin(self.rows["outcome"], FAILED) & ~self.gone)

    @cached_property
    def counted(self) -> Array:
        """Those of which an answer was wanted: neither left by our own client nor unsent, nor rightly a 404."""
        own = np.isin(self.rows["outcome"], (Outcome.ABORTED, Outcome.UNSENT))
        return np.asarray(~own & ~self.gone)

    @cached_property
    def kept(self) -> Array:
        """Which kept the scenario's objective."""
        objective = self.run.scenario.get("objective") or {"ttft_ms": 1_000.0}
        rows = self.rows
        kept = np.asarray(self.whole & (rows["first"] != ABSENT))
        for name, values in (
            ("ttft_ms", (rows["first"] - rows["scheduled"]) / MS),
            ("response_ms", (rows["done"] - rows["scheduled"]) / MS),
            ("tpot_ms", np.nan_to_num(each_tpot(self), nan=0.0)),
        ):
            if objective.get(name) is not None:
                kept &= values <= objective[name]
        return kept

    def _span(self, phase: int) -> tuple[float, float]:
        return self.part or self.run.schedule.phases[phase]

    @property
    def planned_s(self) -> float:
        """How long their phases, or their part of one, were to last."""
        return float(sum(end - begin for begin, end in map(self._span, self.phases))) / S

    @property
    def lasted_s(self) -> float:
        """How long their phases, or their part of one, lasted, each until its last whole answer where that came later.

        So what an overloaded server works off after a phase does not count as if it had been done within it. A request
        that waits for its time limit is no work, and does not make a phase longer.
        """
        total = 0.0
        for phase in self.phases:
            begin, end = self._span(phase)
            answered = self.whole & (self.planned["phase"] == phase)
            total += max(end, int(self.rows["done"][answered].max(initial=0))) - begin
        return total / S


def select(run: Run, *, phase: str | None = None, tenants: str | None = None) -> Selected:
    """The requests of a phase (None: of all that are measured) and a group of tenants (None: of all)."""
    planned = run.schedule.planned[run.samples.rows["index"]]
    wanted = [
        number
        for number, one in enumerate(run.scenario["phases"])
        if (one.get("measured", True) if phase is None else one["name"] == phase)
    ]
    found = np.isin(planned["phase"], wanted)
    if tenants is not None:
        found &= np.isin(planned["tenant"], [n for n, group in enumerate(run.schedule.groups) if group == tenants])
    return Selected(run, np.flatnonzero(found & offered(run)), tuple(wanted))


def offered(run: Run) -> Array:
    """Which samples are of requests that had a time or were sent.

    The rest is what a closed loop's callers had ready and no time for: nobody meant to ask all of it.
    """
    timed = run.schedule.planned["at"][run.samples.rows["index"]] != ABSENT
    return np.asarray(timed | (run.samples.rows["outcome"] != Outcome.UNSENT))


def output_tokens(rows: Array) -> Array:
    """Of each: what `usage` told, or the number of its pieces."""
    return np.where(rows["completion_tokens"] > 0, rows["completion_tokens"], rows["chunks"].astype(np.int64))


def each_tpot(chosen: Selected) -> Array:
    """The mean time between a request's output tokens, ms; nan where it has none."""
    rows = chosen.rows
    tokens = output_tokens(rows) - 1
    there = chosen.whole & (tokens > 0) & (rows["last"] > rows["first"])
    return np.where(there, (rows["last"] - rows["first"]) / MS / np.maximum(tokens, 1), np.nan)


def events_of(chosen: Selected, kinds: tuple[str, ...] | None = None) -> list[Event]:
    """The events of their phases."""
    spans = [chosen.run.schedule.phases[phase] for phase in chosen.wanted or chosen.phases]
    return [
        one
        for one in chosen.run.events
        if (kinds is None or one.kind in kinds) and any(begin <= one.at <= end for begin, end in spans)
    ]


def time_blocks(chosen: Selected, most: int = 40) -> list[npt.NDArray[np.intp]]:
    """Their places by stretches of time, each phase in equally long ones of five requests in the mean or more."""
    blocks = []
    for phase in chosen.phases:
        places = np.flatnonzero(chosen.planned["phase"] == phase)
        begin, end = chosen.run.schedule.phases[phase]
        count = max(1, min(most, len(places) // 5))
        edges = begin + np.arange(1, count) * (end - begin) / count
        stretch = np.searchsorted(edges, chosen.rows["scheduled"][places], side="right")
        blocks += [chosen.at[places[stretch == number]] for number in range(count)]
    return blocks
