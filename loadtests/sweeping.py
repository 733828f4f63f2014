"""Looks for the knee: the same load at one rate after another, up to where answers no longer keep the objective."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from loadtests import gates
from loadtests.points import GOAL, Knee, Point, points_of
from loadtests.recording import ABSENT, Array, Run, Samples
from loadtests.records import merged
from loadtests.running import INTERRUPTED
from loadtests.scenario import (
    Arrivals,
    Closed,
    Constant,
    Diurnal,
    Gamma,
    Gate,
    Load,
    Phase,
    Poisson,
    Ramp,
    Scenario,
    ScenarioInvalid,
    Steps,
    Trace,
)
from loadtests.traces import read

_TIMES: Final = ("scheduled", "sent", "headers", "first", "last", "done")
Measure = Callable[[Scenario], Awaitable[Run]]


class SweepInconclusive(Exception):
    """A point that proves nothing; the text says why."""


class SweepInterrupted(SweepInconclusive):
    """A point that was not sent to its end, for it was interrupted."""


async def sweep(
    measure: Measure,
    scenario: Scenario,
    *,
    first: float,
    most: float,
    level: float = GOAL,
    within: float = 0.1,
    phase: str | None = None,
    duration_s: float | None = None,
    warm_up_s: float = 3.0,
) -> AsyncIterator[Run]:
    """Runs at rates doubled from `first` to the knee or `most`, then between the last two until it is known `within`.

    Raises:
        SweepInconclusive: a generator was late, and again, or nothing was sent. SweepInterrupted. ScenarioInvalid: its
        load has no rate.
    """
    kept, broken, rate = 0.0, math.inf, first
    while True:
        made = at_rate(scenario, rate, phase=phase, duration_s=duration_s, warm_up_s=warm_up_s)
        run = await _measured(measure, made, rate)
        yield replace(run, readings={**run.readings, "goal": level})
        if points_of(run)[0].kept_share >= level:
            kept = rate
        else:
            broken = rate
        if broken == math.inf and rate < most:
            rate = min(2 * rate, most)
        elif broken < math.inf and kept and broken / kept > 1 + within:
            rate = math.sqrt(kept * broken)
        else:
            return


async def _measured(measure: Measure, made: Scenario, rate: float) -> Run:
    """A run that tells something: a generator that was late has a second chance."""
    run = await _to_the_end(measure, made)
    if gates.doubts_of(run):
        run = await _to_the_end(measure, made)
    if doubts := gates.doubts_of(run):
        raise SweepInconclusive(f"At {rate:g} requests a second, twice: {' '.join(doubts)}")
    if not points_of(run):
        raise SweepInconclusive(f"At {rate:g} requests a second nothing was sent.")
    return run


async def _to_the_end(measure: Measure, made: Scenario) -> Run:
    run = await measure(made)
    if run.unfinished == INTERRUPTED:
        raise SweepInterrupted(f"{INTERRUPTED} at {made.phases[-1].name}")
    return run


def at_rate(
    scenario: Scenario,
    rate: float,
    *,
    phase: str | None = None,
    duration_s: float | None = None,
    warm_up_s: float = 0.0,
) -> Scenario:
    """The scenario with one phase's loads, in their shares, at `rate` requests per second together, and no actions.

    Its gates are on wrong adapters and errors: that the highest rates break the objective is what they are for.

    Raises:
        ScenarioInvalid: no such phase, or a closed loop, which has no rate.
    """
    found = next((one for one in scenario.phases if (one.name == phase if phase else one.measured and one.load)), None)
    if found is None:
        raise ScenarioInvalid(f"{scenario.name}: no phase {phase or 'with a load'} to sweep.")
    rates = [mean_rate(load.arrivals, found.duration_s) for load in found.load]
    loads = tuple(
        Load(
            tenants=load.tenants, workload=load.workload, arrivals=_scaled(load.arrivals, own * rate / sum(rates), own)
        )
        for load, own in zip(found.load, rates, strict=True)
    )
    name = f"rate-{rate:.4g}".replace(".", "-")
    measured = Phase(name=name, duration_s=duration_s or found.duration_s, load=loads)
    warm = [Phase(name=f"warm-up-{name}", duration_s=warm_up_s, load=loads, measured=False)] if warm_up_s else []
    return scenario.model_copy(update={"phases": (*warm, measured), "gates": _gates(scenario)})


def _gates(scenario: Scenario) -> tuple[Gate, ...]:
    """Those of any rate."""
    said = [gate for gate in scenario.gates if gate.metric == "error_share" and gate.at_most is not None]
    errors = [gate for gate in said if not (gate.phase or gate.ratio_to_phase or gate.ratio_to_baseline)]
    errors = errors or [Gate(metric="error_share", at_most=0, samples=1)]
    if not any(group.adapters for group in scenario.tenants):
        return tuple(errors)
    return (Gate(metric="wrong_adapter", at_most=0, samples=1), *errors)


def mean_rate(law: Arrivals, duration_s: float) -> float:
    """Requests per second in the mean of a phase.

    Raises:
        ScenarioInvalid: of a closed loop it is the server's doing.
    """
    if isinstance(law, Closed):
        raise ScenarioInvalid("A closed loop has no rate that could be swept.")
    if isinstance(law, Steps):
        return sum(law.rates) / len(law.rates)
    if isinstance(law, Ramp):
        return (law.from_rate + law.to_rate) / 2
    if isinstance(law, Diurnal):
        return law.mean_rate
    if isinstance(law, Trace):
        at = read(law.file).at_s / law.speed
        return float((at < duration_s).sum() / duration_s)
    return law.rate


def _scaled(law: Arrivals, rate: float, was: float) -> Arrivals:
    """The law at another mean rate; what changes over time becomes even."""
    if isinstance(law, Constant):
        return Constant(law="constant", rate=rate)
    if isinstance(law, Gamma):
        return Gamma(law="gamma", rate=rate, cv=law.cv)
    if isinstance(law, Trace):
        return Trace(law="trace", file=law.file, speed=law.speed * rate / was)
    return Poisson(law="poisson", rate=rate)


def joined(runs: Sequence[Run]) -> Run:
    """Runs of one scenario's tenants one after the other as one run with all their phases, lowest rate first."""
    ordered = sorted(runs, key=lambda run: points_of(run)[0].offered)
    first = ordered[0]
    planned: list[Array] = []
    samples, phases, events, versions = [], [], [], []
    shown: list[dict[str, Any]] = []
    begin = rows = 0
    for run in ordered:
        planned.append(_later(run.schedule.planned, begin, len(shown)))
        samples.append(_moved(run.samples, begin, rows))
        end = begin + max(run.schedule.end, int(run.samples.rows["done"].max(initial=0)))
        phases += [(since + begin, until + begin) for since, until in run.schedule.phases]
        shown += run.scenario["phases"]
        events += [replace(one, at=one.at + begin) for one in run.events]
        versions += [
            replace(one, since=one.since + begin, until=end if one.until == ABSENT else one.until + begin)
            for one in run.versions
        ]
        begin, rows = end, rows + len(run.schedule.planned)
    return replace(
        first,
        scenario={**first.scenario, "phases": shown},
        schedule=replace(first.schedule, planned=np.concatenate(planned), phases=tuple(phases)),
        samples=merged(samples),
        events=tuple(events),
        versions=tuple(versions),
        lateness=tuple(one for run in ordered for one in run.lateness),
        readings={**first.readings, "runs": [run.readings for run in ordered]},
    )


def _later(planned: Array, begin: int, phase: int) -> Array:
    moved = planned.copy()
    moved["at"][moved["at"] != ABSENT] += begin
    moved["phase"] += phase
    return moved


def _moved(samples: Samples, begin: int, index: int) -> Samples:
    rows = samples.rows.copy()
    rows["index"] += index
    for name in _TIMES:
        rows[name][rows[name] != ABSENT] += begin
    return replace(samples, rows=rows)


def told(points: Sequence[Point], knee: Knee) -> dict[str, Any]:
    """As JSON."""
    names = Point.__dataclass_fields__
    return {
        "knee": {"rate": _number(knee.rate), "reached": knee.reached, "level": knee.level},
        "points": [{name: _number(getattr(point, name)) for name in names} for point in points],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
