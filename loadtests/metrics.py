"""A run's figures by name, for the requests of one phase and one group of tenants, or of all that is measured.

Two clocks, always both: a response time runs from when the request was *scheduled*, as its user felt it, and a
service time from when it was *sent*. Times are of answers that came whole; one that timed out counts with the time
it had waited, which is the least it can have been.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from loadtests import isolation, statistics
from loadtests.recording import ABSENT, FAILED, TIERS, Outcome, Run
from loadtests.selection import MS, Array, S, Selected, each_tpot, events_of, select

DISTURBANCES: Final = ("kill-replica", "stop-replica", "slow-replica", "rolling-restart", "command")
_PERCENTILE: Final = r"p(?:0[1-9]|[1-9]\d|[5-9]\d{1,2}[1-9])"
"""`p50`, `p999`; but not `p100`, which would be the tenth."""
ONSET_S: Final = 10.0
"""A dip that begins later than this after an event is not its doing."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure; nan where the run says nothing about it. `samples`: how many requests it is made of."""

    value: float
    samples: int


def figure(run: Run, metric: str, *, phase: str | None = None, tenants: str | None = None) -> Figure:
    """A figure of a run.

    Raises:
        KeyError: no metric has this name; `fault` says so beforehand.
    """
    return of(select(run, phase=phase, tenants=tenants), metric)


def of(chosen: Selected, metric: str) -> Figure:
    """A figure of these requests."""
    if metric in SCALARS:
        return SCALARS[metric](chosen)
    name, statistic = split(metric)
    values = TIMES[name](chosen)
    return Figure(reduced(values, statistic), len(values))


def reduced(values: Array, statistic: str) -> float:
    """The mean or a percentile; nan of nothing."""
    if statistic == "mean":
        return float(values.mean()) if len(values) else math.nan
    return statistics.percentile(values, share_of(statistic))


def share_of(statistic: str) -> float:
    """0.99 of `p99`, 1 of `max`."""
    return 1.0 if statistic == "max" else int(statistic[1:]) / 10 ** (len(statistic) - 1)


def untold(run: Run, metric: str) -> str:
    """Why a figure is nan, as a sentence."""
    return (isolation.blind(run) if metric == "wrong_adapter" else "") or "Nothing in the run tells it."


def fault(metric: str) -> str | None:
    """What is wrong with a metric's name; None: it is known."""
    if metric in SCALARS or split(metric)[0] in TIMES:
        return None
    times = ", ".join(TIMES)
    return (
        f"{metric}: no such metric; known are {', '.join(SCALARS)}, and one of {times} with .p50 to .p999, .max, .mean"
    )


def split(metric: str) -> tuple[str, str]:
    """`ttft_ms` and `p99` of `ttft_ms.p99`; of anything else nothing."""
    found = re.fullmatch(rf"(\w+)\.({_PERCENTILE}|max|mean)", metric)
    return (found[1], found[2]) if found else ("", "")


# times, one for each request that has it


def _until(begin: str, end: str) -> Callable[[Selected], Array]:
    def values(chosen: Selected) -> Array:
        rows = chosen.rows
        came = (rows[end] != ABSENT) & (chosen.whole if end == "done" else ~np.isin(rows["outcome"], FAILED))
        lost = (rows["outcome"] == Outcome.TIMEOUT) & (rows["done"] != ABSENT)
        ends = np.where(rows[end] == ABSENT, rows["done"], rows[end])  # what came before the time was out, came
        return np.asarray(((ends - rows[begin]) / MS)[came | lost])

    return values


def _tpot(chosen: Selected) -> Array:
    values = each_tpot(chosen)
    return np.asarray(values[~np.isnan(values)])


def gaps(chosen: Selected) -> tuple[Array, Array]:
    """Between all neighbouring chunks: when the second came, ns since the run's begin, and ms since the first."""
    samples, at = chosen.run.samples, chosen.at[chosen.rows["chunks"] > 1]
    ends = samples.chunk_ends[at].astype(np.int64)
    starts = np.where(at > 0, samples.chunk_ends[np.maximum(at, 1) - 1].astype(np.int64), 0)
    counts = np.maximum(ends - starts - 1, 0)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    second = np.repeat(starts, counts) + within + 1
    chunks = samples.chunk_at.astype(np.int64)
    times = np.repeat(samples.rows["sent"][at], counts) + chunks[second] * 1_000
    return times, (chunks[second] - chunks[second - 1]) / 1e3


def _told(name: str, tiers: tuple[str, ...] = TIERS) -> Callable[[Selected], Array]:
    def values(chosen: Selected) -> Array:
        there = (chosen.rows[name] != ABSENT) & _of_tiers(chosen, *tiers)
        return np.asarray(chosen.rows[name][there] / 1e3)

    return values


def _lateness(chosen: Selected) -> Array:
    sent = (chosen.planned["at"] != ABSENT) & (chosen.rows["sent"] != ABSENT)
    return np.asarray(((chosen.rows["sent"] - chosen.rows["scheduled"]) / MS)[sent])


TIMES: Final[Mapping[str, Callable[[Selected], Array]]] = {
    "ttft_ms": _until("scheduled", "first"),
    "response_ms": _until("scheduled", "done"),
    "service_ttft_ms": _until("sent", "first"),
    "service_ms": _until("sent", "done"),
    "itl_ms": lambda chosen: gaps(chosen)[1],
    "tpot_ms": _tpot,
    "queue_ms": _told("queue_us"),
    "load_ms": _told("load_us", ("host", "cold")),
    "lateness_ms": _lateness,
}

# figures that are one number


def _of_tiers(chosen: Selected, *tiers: str) -> Array:
    return np.isin(chosen.rows["tier"], [TIERS.index(one) for one in tiers])


def _count(which: Callable[[Selected], Array]) -> Callable[[Selected], Figure]:
    return lambda chosen: Figure(float(which(chosen).sum()), len(chosen.at))


def _share(which: Callable[[Selected], Array], of_which: Callable[[Selected], Array]) -> Callable[[Selected], Figure]:
    def value(chosen: Selected) -> Figure:
        all_of = of_which(chosen)
        count = int(all_of.sum())
        return Figure(float((which(chosen) & all_of).sum()) / count if count else math.nan, count)

    return value


def _per_s(amount: Callable[[Selected], Array], seconds: Callable[[Selected], float]) -> Callable[[Selected], Figure]:
    def value(chosen: Selected) -> Figure:
        lasted = seconds(chosen)
        return Figure(float(amount(chosen).sum()) / lasted if lasted else math.nan, len(chosen.at))

    return value


def _tokens(name: str) -> Callable[[Selected], Array]:
    return lambda chosen: np.maximum(chosen.rows[name], 0)


def _cached_share(chosen: Selected) -> Figure:
    told = (chosen.rows["cached_tokens"] != ABSENT) & (chosen.rows["prompt_tokens"] > 0)
    of_all = int(chosen.rows["prompt_tokens"][told].sum())
    cached = int(chosen.rows["cached_tokens"][told].sum())
    return Figure(cached / of_all if of_all else math.nan, int(told.sum()))


def _wrong_adapter(chosen: Selected) -> Figure:
    checked = int(isolation.checked(chosen.run, chosen.at).sum())
    wrong = int(isolation.wrong(chosen.run, chosen.at).sum())
    told = wrong > 0 or (checked > 0 and not isolation.blind(chosen.run))
    return Figure(float(wrong) if told else math.nan, checked)


def _adapters(chosen: Selected) -> Array:
    """Which adapter each asks, as one number; ABSENT: none."""
    planned = chosen.planned
    numbers = planned["tenant"].astype(np.int64) * max(1, len(chosen.run.schedule.models)) + planned["model"]
    return np.where(planned["model"] == ABSENT, ABSENT, numbers)


def adapters_asked(chosen: Selected) -> Figure:
    """How many different adapters were asked."""
    asked = _adapters(chosen)
    return Figure(float(len(np.unique(asked[asked != ABSENT]))), len(chosen.at))


def all_slots(run: Run) -> int | None:
    """The slots of all replicas together."""
    slots = run.target.get("slots")
    return None if not slots else int(slots) * int(run.target.get("replicas") or 1)


def _hit_ratio_predicted(chosen: Selected) -> Figure:
    asked, slots = _adapters(chosen), all_slots(chosen.run)
    _, counts = np.unique(asked[asked != ABSENT], return_counts=True)
    value = math.nan if slots is None else statistics.che_hit_ratio(counts, slots)
    return Figure(value, int(counts.sum()))


def _hit_ratio_lru(chosen: Selected) -> Figure:
    """Simulated over all requests in order of sending, so that what an earlier phase left in the slots counts."""
    slots = all_slots(chosen.run)
    counted = chosen.at[(chosen.planned["model"] != ABSENT) & (chosen.rows["sent"] != ABSENT)]
    if slots is None or not len(counted):
        return Figure(math.nan, 0)
    return Figure(float(_simulated(_Same(chosen.run), slots)[counted].mean()), len(counted))


class _Same:
    """A run as a key: equal to itself alone."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __hash__(self) -> int:
        return id(self.run)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.run is other.run


@lru_cache(maxsize=1)  # a summary asks it for every phase and group
def _simulated(same: _Same, slots: int) -> Array:
    """Which of a run's samples an LRU cache would have had in a slot."""
    rows = same.run.samples.rows
    everything = Selected(same.run, np.argsort(rows["sent"], kind="stable"))
    asked = _adapters(everything)
    sent = (asked != ABSENT) & (everything.rows["sent"] != ABSENT)
    hits = np.zeros(len(rows), bool)
    hits[everything.at[sent]] = statistics.lru_hits(asked[sent].tolist(), slots)
    return hits


def _hit_ratio_to_predicted(chosen: Selected) -> Figure:
    measured = SCALARS["hit_ratio"](chosen)
    return Figure(statistics.ratio(measured.value, _hit_ratio_predicted(chosen).value), measured.samples)


def fair_parts(chosen: Selected) -> tuple[Array, Array]:
    """Tenants (indices) that asked, and what each was served over its max-min fair part of all that was served.

    Counted in planned tokens of prompts and outputs: nobody's part is more than he asked for, so that one who asks
    too much and is held to his part is served fairly.
    """
    weight = chosen.planned["prompt_tokens"].astype(float) + chosen.planned["output_tokens"]
    tenants, place = np.unique(chosen.planned["tenant"], return_inverse=True)
    asked = np.bincount(place, weight * chosen.counted, len(tenants))
    served = np.bincount(place, weight * chosen.whole, len(tenants))
    fair = statistics.fair_shares(asked, float(served.sum()))
    there = asked > 0
    return tenants[there], np.where(fair > 0, served / np.where(fair > 0, fair, 1), 1.0)[there]


def _fairness(reduce: Callable[[Array], float]) -> Callable[[Selected], Figure]:
    def value(chosen: Selected) -> Figure:
        parts = fair_parts(chosen)[1]
        return Figure(reduce(parts) if len(parts) else math.nan, int(chosen.counted.sum()))

    return value


def _recovery(chosen: Selected) -> Figure:
    """The longest over all disturbances, from each one's begin; bins of at least five requests in the mean.

    What breaks off counts when it does, all else when it was scheduled.
    """
    events, wanted = events_of(chosen, DISTURBANCES), chosen.counted
    if not events or not wanted.any():
        return Figure(math.nan, 0)
    width = max(0.25, 5 * chosen.planned_s / int(wanted.sum()))
    broke = np.isin(chosen.rows["outcome"], (Outcome.BROKEN, Outcome.TRUNCATED, Outcome.ERROR_EVENT))
    when = np.where(broke, chosen.rows["done"], chosen.rows["scheduled"])[wanted]
    start = chosen.run.schedule.phases[chosen.phases[0]][0]
    places = np.maximum(when - start, 0) // int(width * S)
    asked = np.bincount(places).astype(float)
    kept = np.bincount(places, chosen.kept[wanted]).astype(float)
    longest = max(
        statistics.recovery_bins(kept, asked, int((one.at - start) // (width * S)), onset=math.ceil(ONSET_S / width))
        for one in events
    )
    return Figure(longest * width, int(wanted.sum()))


def _failed_actions(chosen: Selected) -> Figure:
    return Figure(float(sum(bool(one.error) for one in events_of(chosen))), len(chosen.at))


def _sent(chosen: Selected) -> Array:
    return np.asarray(chosen.rows["outcome"] != Outcome.UNSENT)


def _outcome(outcome: Outcome) -> Callable[[Selected], Array]:
    return lambda chosen: chosen.rows["outcome"] == outcome


SCALARS: Final[Mapping[str, Callable[[Selected], Figure]]] = {
    "rate": _per_s(lambda chosen: chosen.whole, lambda chosen: chosen.lasted_s),
    "offered_rate": _per_s(lambda chosen: np.ones(len(chosen.at)), lambda chosen: chosen.planned_s),
    "goodput": _per_s(lambda chosen: chosen.kept, lambda chosen: chosen.lasted_s),
    "goodput_share": _share(lambda chosen: chosen.kept, lambda chosen: chosen.counted),
    "tokens_per_s": _per_s(_tokens("completion_tokens"), lambda chosen: chosen.lasted_s),
    "prompt_tokens_per_s": _per_s(_tokens("prompt_tokens"), lambda chosen: chosen.lasted_s),
    "error_share": _share(lambda chosen: chosen.failed, _sent),
    "refused_share": _share(_outcome(Outcome.REFUSED), _sent),
    "requests.sent": _count(_sent),
    "requests.whole": _count(lambda chosen: chosen.whole),
    "requests.failed": _count(lambda chosen: chosen.failed),
    "requests.refused": _count(_outcome(Outcome.REFUSED)),
    "requests.aborted": _count(_outcome(Outcome.ABORTED)),
    "tokens.prompt": _count(_tokens("prompt_tokens")),
    "tokens.completion": _count(_tokens("completion_tokens")),
    "cached_share": _cached_share,
    "wrong_adapter": _wrong_adapter,
    "adapters": adapters_asked,
    "hit_ratio": _share(lambda one: _of_tiers(one, "gpu"), lambda one: _of_tiers(one, "gpu", "host", "cold")),
    "hit_ratio.predicted": _hit_ratio_predicted,
    "hit_ratio.lru": _hit_ratio_lru,
    "hit_ratio.to_predicted": _hit_ratio_to_predicted,
    "fairness.jain": _fairness(statistics.jain),
    "fairness.least_share": _fairness(lambda parts: float(parts.min())),
    "recovery_s": _recovery,
    "actions.failed": _failed_actions,
}
