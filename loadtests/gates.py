"""Verdicts: whether a run kept its scenario's gates, did not, or cannot say.

What cannot be said is never green: a generator that was late, a schedule not played to its end, or too few requests
for a percentile make a gate inconclusive.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np

from loadtests import metrics, statistics
from loadtests.metrics import Figure
from loadtests.recording import ABSENT, Outcome, Run
from loadtests.scenario import Gate
from loadtests.selection import Selected, select, time_blocks

PASSED: Final = 0
FAILED: Final = 1
UNUSABLE: Final = 2
"""The scenario is wrong or the server cannot be reached."""
INCONCLUSIVE: Final = 3

FACTS: Final = frozenset(
    {"error_share", "refused_share", "wrong_adapter", "actions.failed", "adapters", "cached_share"}
    | {name for name in metrics.SCALARS if name.startswith(("requests.", "tokens.", "hit_ratio"))}
)
"""What a late generator does not change."""
LATENESS: Final = "lateness_ms"
RESAMPLED: Final = frozenset({"rate", "goodput", "goodput_share", "error_share", "refused_share", "cached_share"}) | {
    "tokens_per_s",
    "prompt_tokens_per_s",
}


_LOAD: Final = ("name", "seed", "tenants", "workloads", "phases", "objective")
"""Of a scenario: what has to be the same for figures to be compared."""


class Judgement(StrEnum):
    """What a gate came to."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gate and what it came to."""

    gate: str  # in words
    judgement: Judgement
    reason: str
    metric: str = ""
    value: float = math.nan
    bound: float = math.nan
    samples: int = 0
    interval: tuple[float, float] | None = None  # of a ratio to a baseline, 95 %


def judge(run: Run, baseline: Run | None = None) -> list[Verdict]:
    """A verdict on the run itself, then one a gate, in the scenario's order."""
    doubts = doubts_of(run)
    soundness = Verdict(
        "the schedule was sent whole and on time",
        Judgement.INCONCLUSIVE if doubts else Judgement.PASS,
        " ".join(doubts) or "It was.",
        samples=len(run.samples.rows),
    )
    return [soundness, *(_verdict(run, Gate.model_validate(one), baseline) for one in run.scenario["gates"])]


def exit_code(verdicts: Sequence[Verdict], run: Run) -> int:
    """0 where all passed, 1 where one failed, 3 where none failed and one could not be told."""
    told = {one.judgement for one in verdicts}
    if Judgement.FAIL in told:
        return FAILED
    return PASSED if told == {Judgement.PASS} and not doubts_of(run) else INCONCLUSIVE


def doubts_of(run: Run) -> list[str]:
    """Why the run as a whole proves nothing, a sentence each."""
    return [*_missing(run), *_late(select(run))]


def _missing(run: Run) -> list[str]:
    rows = run.samples.rows
    timed = run.schedule.planned["at"][rows["index"]] != ABSENT  # a closed loop has more to ask than it can
    unsent = int(((rows["outcome"] == Outcome.UNSENT) & timed).sum())
    planned, told = len(run.schedule.planned), len(rows)
    return [
        *([f"The schedule was not played to its end: {run.unfinished}."] if run.unfinished else []),
        *([f"{unsent} requests were never sent."] if unsent else []),
        *([f"{planned - told} of {planned} planned requests left no sample."] if told < planned else []),
        *(["Nothing was planned."] if not planned else []),
    ]


def doubts_of_baseline(run: Run, baseline: Run) -> list[str]:
    """Why a comparison with that earlier run proves nothing, a sentence each."""
    return _doubts_of_baseline(run, baseline, _late(select(baseline)))


def _doubts_of_baseline(run: Run, baseline: Run, late: Sequence[str]) -> list[str]:
    other = sorted(name for name in _LOAD if run.scenario.get(name) != baseline.scenario.get(name))
    return [
        *(f"Of the baseline: {doubt}" for doubt in (*_missing(baseline), *late)),
        *([f"The baseline is of another load: its {', '.join(other)} differ."] if other else []),
    ]


def _late(chosen: Selected) -> list[str]:
    """Whether these requests were sent late in one of their phases, of its own: others do not make up for it.

    Those of a closed loop have no time to be late for.
    """
    run = chosen.run
    bound = float(run.scenario.get("late_ms") or 25.0)
    found = {}
    for phase in chosen.phases:
        at = chosen.at[chosen.planned["phase"] == phase]
        found[phase] = metrics.of(Selected(run, at), f"{LATENESS}.p99").value
    late = {phase: ms for phase, ms in found.items() if ms > bound}
    if not late:
        return []
    phase = max(late, key=late.__getitem__)
    name = run.scenario["phases"][phase]["name"]
    return [
        f"The generator was late in {name}: it sent {late[phase]:.3g} ms after its time at p99, more than {bound:g} ms."
    ]


def _verdict(run: Run, gate: Gate, baseline: Run | None) -> Verdict:
    ours, theirs, interval = _measured(run, gate, baseline)
    value = ours.value if theirs is None else statistics.ratio(ours.value, theirs.value)
    samples = min(ours.samples, ours.samples if theirs is None else theirs.samples)
    bound, needed = _bound(gate), _needed(gate)
    if gate.ratio_to_baseline and baseline is None:
        judgement, reason = Judgement.INCONCLUSIVE, "No baseline was given."
    elif gate.ratio_to_baseline and baseline is not None and (doubts := _doubts_of_ratio(run, baseline, gate)):
        judgement, reason = Judgement.INCONCLUSIVE, " ".join(doubts)
    elif math.isnan(value):
        judgement, reason = Judgement.INCONCLUSIVE, metrics.untold(run, gate.metric)
    elif gate.at_least is not None and theirs is not None and theirs.value == 0:
        judgement, reason = Judgement.INCONCLUSIVE, "What it is compared with is 0, which any value reaches."
    elif samples < needed:
        judgement, reason = Judgement.INCONCLUSIVE, f"{samples} samples are too few: it needs {needed}."
    elif late := _late_for(run, gate):
        judgement, reason = Judgement.INCONCLUSIVE, late[0]
    else:
        judgement, reason = _judgement(gate, value, interval)
    return Verdict(words(gate), judgement, reason, gate.metric, value, bound, samples, interval)


def _late_for(run: Run, gate: Gate) -> list[str]:
    """Whether what the gate is about, or what it is compared with in the run, was sent too late to tell."""
    if _is_fact(gate.metric):
        return []
    late = _late(select(run, phase=gate.phase, tenants=gate.tenants))
    return late or _late(_reference(run, gate))


def _doubts_of_ratio(run: Run, baseline: Run, gate: Gate) -> list[str]:
    late = [] if _is_fact(gate.metric) else _late(select(baseline, phase=gate.phase, tenants=gate.tenants))
    return _doubts_of_baseline(run, baseline, late)


def _is_fact(metric: str) -> bool:
    """How late requests were sent is one itself."""
    return metric in FACTS or metrics.split(metric)[0] == LATENESS


def _reference(run: Run, gate: Gate) -> Selected:
    """What a gate is compared with in the same run: its own requests where that is nothing."""
    phase, tenants = gate.ratio_to_phase or gate.phase, gate.ratio_to_tenants or gate.tenants
    return select(run, phase=phase, tenants=tenants)


def _measured(run: Run, gate: Gate, baseline: Run | None) -> tuple[Figure, Figure | None, tuple[float, float] | None]:
    chosen = select(run, phase=gate.phase, tenants=gate.tenants)
    ours = metrics.of(chosen, gate.metric)
    if gate.ratio_to_phase or gate.ratio_to_tenants:
        return ours, metrics.of(_reference(run, gate), gate.metric), None
    if gate.ratio_to_baseline and baseline is not None:
        other = select(baseline, phase=gate.phase, tenants=gate.tenants)
        return ours, metrics.of(other, gate.metric), ratio_interval(gate.metric, chosen, other)
    return ours, Figure(math.nan, 0) if gate.ratio_to_baseline else None, None


def ratio_interval(metric: str, ours: Selected, theirs: Selected) -> tuple[float, float] | None:
    """The 95 % interval of a figure's ratio in two runs, by bootstrap over stretches of time.

    None where a figure is not made of single requests, such as a recovery time.
    """
    if metric not in RESAMPLED and metrics.split(metric)[0] not in metrics.TIMES:
        return None
    if not len(ours.at) or not len(theirs.at):
        return None
    return statistics.ratio_interval(_resamples(metric, ours, 1), _resamples(metric, theirs, 2))


def _resamples(metric: str, chosen: Selected, seed: int) -> Iterable[float]:
    name, statistic = metrics.split(metric)
    if name in metrics.TIMES:  # of each stretch once, for they do not depend on the others
        parts = [metrics.TIMES[name](Selected(chosen.run, at)) for at in time_blocks(chosen)]
        yield from (metrics.reduced(values, statistic) for values in statistics.block_resamples(parts, seed))
        return
    for at in statistics.block_resamples(time_blocks(chosen), seed):
        yield metrics.of(Selected(chosen.run, np.sort(at)), metric).value


def _judgement(gate: Gate, value: float, interval: tuple[float, float] | None) -> tuple[Judgement, str]:
    bound = _bound(gate)
    if _keeps(gate, value):
        return Judgement.PASS, f"{value:.4g} keeps {bound:g}."
    side = "above" if gate.at_most is not None else "below"
    if interval is None:
        return Judgement.FAIL, f"{value:.4g} is {side} {bound:g}."
    spans = f"95 % interval {interval[0]:.4g} to {interval[1]:.4g}"
    if any(_keeps(gate, end) for end in interval):
        return Judgement.INCONCLUSIVE, f"{value:.4g} is {side} {bound:g}, but it may be chance ({spans})."
    return Judgement.FAIL, f"{value:.4g} is {side} {bound:g} ({spans})."


def _keeps(gate: Gate, value: float) -> bool:
    return value <= _bound(gate) if gate.at_most is not None else value >= _bound(gate)


def _bound(gate: Gate) -> float:
    bound: Any = gate.at_most if gate.at_most is not None else gate.at_least
    return float(bound)


def _needed(gate: Gate) -> int:
    """A percentile needs at least one request beyond it, else it is the longest there happened to be."""
    statistic = metrics.split(gate.metric)[1]
    if not statistic.startswith("p"):
        return gate.samples
    return max(gate.samples, math.ceil(round(1 / (1 - metrics.share_of(statistic)), 6)))


def words(gate: Gate) -> str:
    """A gate as one reads it."""
    sign = "≤" if gate.at_most is not None else "≥"
    where = "".join(
        f" {before} {name}" for before, name in (("in", gate.phase), ("of", gate.tenants)) if name is not None
    )
    to = gate.ratio_to_phase or gate.ratio_to_tenants
    parts = [one for one in (gate.ratio_to_phase, gate.ratio_to_tenants) if one]
    of = f" × that of {', '.join(parts)}" if to else " × the baseline's" if gate.ratio_to_baseline else ""
    return f"{gate.metric}{where} {sign} {_bound(gate):g}{of}"
