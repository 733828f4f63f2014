"""What an engine's work costs, read off a run: least squares over how long requests decoded, and beside what.

A request that decodes n tokens beside b others while prompts of P tokens and L adapters come in takes
n · step + n · b · per_sequence + P · per_prompt_token + L · load. All of that but the costs is in the run's samples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.recording import ABSENT, TIERS, Array, Outcome, Run
from loadtests.selection import output_tokens
from loadtests.simulating import Engine, Floats, Load, simulate

_SAME_LOAD_NS = 500_000_000


class CannotFit(Exception):
    """A run that does not tell what an engine costs; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a replica has room for."""

    slots: int
    host_adapters: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Fit:
    """An engine's costs and how far they were seen to hold."""

    engine: Engine
    requests: int
    replicas: int
    most_running: int  # on one replica at a time
    most_prompt_tokens: int
    adapters: int
    loads: int
    error: float  # median of |fitted / measured - 1| of the decoding times


def fit(run: Run, room: Room) -> Fit:
    """The costs of the replicas of a run.

    Raises:
        CannotFit: too few whole streamed answers of two tokens and more.
    """
    rows = run.samples.rows
    planned = run.schedule.planned[rows["index"]]
    whole = (rows["outcome"] == Outcome.WHOLE) & (rows["last"] > rows["first"]) & (rows["first"] != ABSENT)
    rows, planned = rows[whole], planned[whole]
    tokens = output_tokens(rows)
    if (tokens > 1).sum() < 20:
        raise CannotFit("The run has fewer than 20 whole streamed answers: nothing tells what a step costs.")
    replicas = np.unique(rows["replica"])
    parts = [_columns(rows[own], planned[own], tokens[own]) for own in (rows["replica"] == one for one in replicas)]
    columns = np.concatenate([part[0] for part in parts])
    took = np.concatenate([part[1] for part in parts])
    costs = _not_negative(columns, took)
    step, per_sequence, per_prompt, load, activate = (float(cost) for cost in costs)
    adapters = planned["tenant"].astype(np.int64) << 32 | planned["model"].astype(np.int64)
    engine = Engine(step, per_sequence, per_prompt, load, activate, room.slots, room.host_adapters, room.max_num_seqs)
    return Fit(
        engine=engine,
        requests=len(took),
        replicas=len(replicas),
        most_running=max(part[2] for part in parts),
        most_prompt_tokens=int(rows["prompt_tokens"].max()),
        adapters=len(np.unique(adapters[planned["model"] != ABSENT])),
        loads=sum(part[3] for part in parts),
        error=float(np.median(np.abs(columns @ costs / took - 1))),
    )


def load_of(run: Run, *, phase: int | None = None) -> Load:
    """What was sent in a run or a phase of it, as a simulation takes it; times since the first."""
    rows, planned = _sent(run, phase)
    _, adapter = np.unique(planned["tenant"].astype(np.int64) << 32 | planned["model"], return_inverse=True)
    at = (rows["sent"] - rows["sent"].min()) / 1e9 if len(rows) else np.empty(0)
    prompts = np.where(rows["prompt_tokens"] > 0, rows["prompt_tokens"], planned["prompt_tokens"])
    outputs = np.where(rows["completion_tokens"] > 0, rows["completion_tokens"], planned["output_tokens"])
    return Load(at, planned["tenant"], np.where(planned["model"] == ABSENT, ABSENT, adapter), prompts, outputs)


def overhead_s(run: Run, engine: Engine, replicas: int, *, phase: int | None = None) -> float:
    """What first tokens took beyond the model's time for the same load, at the median."""
    rows, _ = _sent(run, phase)
    load = load_of(run, phase=phase)
    modelled = simulate(load, engine, replicas=replicas).first_s - load.at_s
    measured = np.where(rows["first"] != ABSENT, (rows["first"] - rows["sent"]) / 1e9, np.nan)
    return max(0.0, float(np.nanmedian(measured - modelled)))


def _sent(run: Run, phase: int | None) -> tuple[Array, Array]:
    """Samples of what was sent in a run or a phase of it, and what was planned of them, in order of sending."""
    rows = run.samples.rows
    planned = run.schedule.planned[rows["index"]]
    chosen = np.flatnonzero((rows["sent"] != ABSENT) & ((planned["phase"] == phase) if phase is not None else True))
    order = chosen[np.argsort(rows["sent"][chosen], kind="stable")]
    return rows[order], planned[order]


def _columns(rows: Array, planned: Array, tokens: npt.NDArray[Any]) -> tuple[Floats, Floats, int, int]:
    """What each request decoded beside, how long it took in s; the most that ran; how many adapters came in."""
    first, last = rows["first"].astype(np.float64), rows["last"].astype(np.float64)
    starts, ends = np.sort(first), np.sort(last)
    running = _running_until(starts, ends)
    mean = (running(last) - running(first)) / (last - first)
    prompt_order = np.argsort(first, kind="stable")
    prompts = np.concatenate(([0], np.cumsum(np.maximum(rows["prompt_tokens"], 0)[prompt_order])))
    came = _between(starts, first, last)
    cold, warm = (_loads(rows, planned, tier) for tier in ("cold", "host"))
    steps = tokens - 1.0
    columns = np.stack(
        [
            steps,
            steps * mean,
            prompts[came[1]] - prompts[came[0]],
            np.subtract(*_between(cold, first, last)[::-1]),
            np.subtract(*_between(warm, first, last)[::-1]),
        ],
        axis=1,
    )[tokens > 1]
    events = np.concatenate((np.ones(len(starts)), -np.ones(len(ends))))
    most = int(np.cumsum(events[np.argsort(np.concatenate((starts, ends)), kind="stable")]).max())
    return columns, ((last - first) / 1e9)[tokens > 1], most, len(cold) + len(warm)


def _running_until(starts: Floats, ends: Floats) -> Any:
    """The integral of how many run, up to a time."""
    begun, over = np.concatenate(([0.0], np.cumsum(starts))), np.concatenate(([0.0], np.cumsum(ends)))

    def until(time: Floats) -> Floats:
        started, ended = np.searchsorted(starts, time, side="right"), np.searchsorted(ends, time, side="right")
        value: Floats = started * time - begun[started] - (ended * time - over[ended])
        return value

    return until


def _between(times: Floats, begin: Floats, end: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.searchsorted(times, begin, side="right"), np.searchsorted(times, end, side="right")


def _loads(rows: Array, planned: Array, tier: str) -> Floats:
    """When adapters came in: of requests that waited for the same load, the first."""
    own = rows["tier"] == TIERS.index(tier)
    at, adapter = rows["first"][own], planned["tenant"][own].astype(np.int64) << 32 | planned["model"][own]
    order = np.lexsort((at, adapter))
    again = (np.diff(adapter[order]) == 0) & (np.diff(at[order]) < _SAME_LOAD_NS)
    return np.sort(at[order][np.concatenate(([True], ~again))[: len(order)]]).astype(np.float64)


def _not_negative(columns: Floats, took: Floats) -> Floats:
    """Least squares of relative errors with no cost below nothing: what would be is left out."""
    kept = [place for place in range(columns.shape[1]) if columns[:, place].any()]
    costs = np.zeros(columns.shape[1])
    while kept:
        found = np.linalg.lstsq(columns[:, kept] / took[:, None], np.ones(len(took)), rcond=None)[0]
        if (found >= 0).all():
            costs[kept] = found
            break
        kept.pop(int(np.argmin(found * columns[:, kept].mean(axis=0))))
    return costs
