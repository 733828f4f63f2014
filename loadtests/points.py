"""The loads that a run offered one after the other, a point each: a phase, or a step of one."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from loadtests import metrics, statistics
from loadtests.recording import Run
from loadtests.selection import S, Selected, select

_RAMP_PARTS: Final = 8


@dataclass(frozen=True, slots=True)
class Point:
    """What a server made of one load."""

    name: str
    offered: float  # requests/s
    rate: float  # whole answers/s
    goodput: float
    kept_share: float  # of the requests that wanted an answer, those that kept the objective
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    adapters: int
    hit_ratio: float


def points_of(run: Run) -> list[Point]:
    """In order of time; of all phases that are measured."""
    return [_point(*part) for part in _parts(run) if len(part[1].at)]


def knee_of(points: list[Point]) -> float:
    """The highest offered rate at which nine of ten requests still keep the objective; nan where none does."""
    return statistics.knee([one.offered for one in points], [one.kept_share for one in points])


def _parts(run: Run) -> Iterator[tuple[str, Selected, float, float]]:
    for number, phase in enumerate(run.scenario["phases"]):
        if not phase.get("measured", True):
            continue
        chosen, (begin, end) = select(run, phase=phase["name"]), run.schedule.phases[number]
        count = max((_steps(load["arrivals"]) for load in phase["load"]), default=1)
        edges = np.linspace(begin, end, count + 1)
        for part, (low, high) in enumerate(pairwise(edges)):
            scheduled = chosen.rows["scheduled"]
            within = chosen.at[(scheduled >= low) & (scheduled < high)] if count > 1 else chosen.at
            name = phase["name"] if count == 1 else f"{phase['name']} {part + 1}"
            yield name, Selected(run, within), low, high


def _steps(arrivals: dict[str, Any]) -> int:
    if arrivals["law"] == "steps":
        return len(arrivals["rates"])
    return _RAMP_PARTS if arrivals["law"] == "ramp" else 1


def _point(name: str, chosen: Selected, begin: float, end: float) -> Point:
    seconds = (end - begin) / S
    lasted = (max(end, float(chosen.rows["done"].max())) - begin) / S
    told = {one: metrics.of(chosen, one).value for one in ("ttft_ms.p50", "ttft_ms.p99", "goodput_share", "hit_ratio")}
    return Point(
        name,
        offered=len(chosen.at) / seconds,
        rate=float(chosen.whole.sum()) / lasted,
        goodput=float(chosen.kept.sum()) / lasted,
        kept_share=told["goodput_share"],
        tokens_per_s=float(np.maximum(chosen.rows["completion_tokens"], 0).sum()) / lasted,
        ttft_p50_ms=told["ttft_ms.p50"],
        ttft_p99_ms=told["ttft_ms.p99"],
        adapters=int(metrics.adapters_asked(chosen).value),
        hit_ratio=told["hit_ratio"],
    )
