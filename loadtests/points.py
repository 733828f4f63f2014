"""The loads that a run offered one after the other, a point each: a phase, or a step of one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from loadtests import metrics
from loadtests.recording import Run
from loadtests.selection import Selected, select

GOAL: Final = 0.9
_RAMP_PARTS: Final = 8


@dataclass(frozen=True, slots=True)
class Point:
    """What a server made of one load."""

    offered: float  # requests/s
    rate: float  # whole answers/s
    goodput: float
    kept_share: float  # of the requests that wanted an answer, those that kept the objective
    ttft_p50_ms: float
    ttft_p99_ms: float
    adapters: int
    hit_ratio: float


@dataclass(frozen=True, slots=True)
class Knee:
    """The rate up to which `level` of the requests keep the objective; not reached: it is higher than `rate`.

    nan where it is below the lowest rate that was offered.
    """

    rate: float
    reached: bool
    level: float


def points_of(run: Run) -> list[Point]:
    """In order of time; of all phases that are measured."""
    return [_point(part) for part in _parts(run) if len(part.at)]


def goal_of(run: Run) -> float:
    """The share of the requests that is to keep the objective: what a sweep was told, or nine of ten."""
    return float(run.readings.get("goal", GOAL))


def knee_of(points: Sequence[Point], goal: float = GOAL) -> Knee:
    """Where the share kept goes through `goal`, in a straight line between the two points beside it."""
    points = sorted((one for one in points if not math.isnan(one.kept_share)), key=lambda one: one.offered)
    for before, after in zip((None, *points), points, strict=False):
        if after.kept_share >= goal:
            continue
        if before is None:
            return Knee(math.nan, True, goal)
        part = (before.kept_share - goal) / (before.kept_share - after.kept_share)
        return Knee(before.offered + part * (after.offered - before.offered), True, goal)
    return Knee(points[-1].offered if points else math.nan, False, goal)


def _parts(run: Run) -> Iterator[Selected]:
    for number, phase in enumerate(run.scenario["phases"]):
        if not phase.get("measured", True):
            continue
        chosen, (begin, end) = select(run, phase=phase["name"]), run.schedule.phases[number]
        count = max((_steps(load["arrivals"]) for load in phase["load"]), default=1)
        edges = np.linspace(begin, end, count + 1)
        for low, high in pairwise(edges):
            scheduled = chosen.rows["scheduled"]
            within = chosen.at[(scheduled >= low) & (scheduled < high)] if count > 1 else chosen.at
            yield Selected(run, within, part=(low, high))


def _steps(arrivals: dict[str, Any]) -> int:
    if arrivals["law"] == "steps":
        return len(arrivals["rates"])
    return _RAMP_PARTS if arrivals["law"] == "ramp" else 1


def _point(chosen: Selected) -> Point:
    def told(metric: str) -> float:
        return metrics.of(chosen, metric).value

    return Point(
        offered=told("offered_rate"),
        rate=told("rate"),
        goodput=told("goodput"),
        kept_share=told("goodput_share"),
        ttft_p50_ms=told("ttft_ms.p50"),
        ttft_p99_ms=told("ttft_ms.p99"),
        adapters=int(told("adapters")),
        hit_ratio=told("hit_ratio"),
    )
