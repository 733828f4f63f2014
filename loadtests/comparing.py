"""Two runs beside each other: each figure of both, their ratio, and whether the difference can be chance."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from loadtests import gates, metrics, statistics
from loadtests.recording import Run
from loadtests.selection import Selected, select

COMPARED: Final = (
    *("ttft_ms.p50", "ttft_ms.p99", "response_ms.p50", "response_ms.p99", "service_ms.p99"),
    *("itl_ms.p50", "itl_ms.p99", "tpot_ms.p50", "queue_ms.p99", "load_ms.p50"),
    *("rate", "goodput", "goodput_share", "tokens_per_s", "error_share", "refused_share"),
    *("wrong_adapter", "hit_ratio", "cached_share", "fairness.jain", "fairness.least_share", "recovery_s"),
)
MORE_IS_BETTER: Final = frozenset(
    {"rate", "goodput", "goodput_share", "tokens_per_s", "prompt_tokens_per_s", "hit_ratio", "cached_share"}
    | {"fairness.jain", "fairness.least_share"}
)


class Change(StrEnum):
    """What became of a figure."""

    BETTER = "better"
    WORSE = "worse"
    CHANCE = "may be chance"
    SAME = "same"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure in two runs; `interval` is the 95 % one of `ratio`, None where no bootstrap tells it."""

    phase: str  # "" is all that are measured
    metric: str
    before: float
    after: float
    ratio: float
    interval: tuple[float, float] | None
    change: Change


def compare(before: Run, after: Run, *, names: Iterable[str] = COMPARED, tolerance: float = 0.05) -> Iterator[Compared]:
    """Each figure that one of the runs tells, of all that is measured and then of each phase that both have.

    A difference within `tolerance` of the figure is none.
    """
    wanted = tuple(names)
    ours = [one["name"] for one in before.scenario["phases"] if one.get("measured", True)]
    theirs = {one["name"] for one in after.scenario["phases"] if one.get("measured", True)}
    both = [name for name in ours if name in theirs]
    for phase in (None, *(both if len(ours) > 1 else [])):
        first, second = select(before, phase=phase), select(after, phase=phase)
        for name in wanted:
            found = _compared(phase or "", name, first, second, tolerance)
            if not (math.isnan(found.before) and math.isnan(found.after)):
                yield found


def differences(before: Run, after: Run) -> list[str]:
    """What was not the same in the two runs, so that their figures may differ for that alone."""
    told = _flat("scenario", before.scenario), _flat("scenario", after.scenario)
    of = {**told[0], **_flat("target", before.target), **_flat("machine", before.machine)}
    to = {**told[1], **_flat("target", after.target), **_flat("machine", after.machine)}
    names = sorted(name for name in of.keys() | to.keys() if of.get(name) != to.get(name))
    return [f"{name}: {of.get(name, 'absent')} → {to.get(name, 'absent')}" for name in names if name not in _IGNORED]


_IGNORED: Final = frozenset({"target.url"})


def _compared(phase: str, name: str, before: Selected, after: Selected, tolerance: float) -> Compared:
    first, second = metrics.of(before, name).value, metrics.of(after, name).value
    ratio = statistics.ratio(second, first)
    interval = None if math.isnan(ratio) or first == second else gates.ratio_interval(name, after, before)
    return Compared(phase, name, first, second, ratio, interval, _change(name, ratio, interval, tolerance))


def _change(name: str, ratio: float, interval: tuple[float, float] | None, tolerance: float) -> Change:
    if math.isnan(ratio):
        return Change.UNKNOWN
    if abs(ratio - 1) <= tolerance:
        return Change.SAME
    if interval is not None and not (interval[0] > 1 or interval[1] < 1):
        return Change.CHANCE
    return Change.BETTER if (ratio > 1) == (name in MORE_IS_BETTER) else Change.WORSE


def _flat(name: str, told: Any) -> dict[str, Any]:
    if isinstance(told, dict):
        return {key: value for part, one in told.items() for key, value in _flat(f"{name}.{part}", one).items()}
    if isinstance(told, list) and any(isinstance(one, dict) for one in told):
        return {key: value for place, one in enumerate(told) for key, value in _flat(f"{name}.{place}", one).items()}
    return {name: told}
