"""A scenario's whole schedule, decided by the scenario and its seed before anything is sent.

A group's rate is shared among its tenants by popularity: it ranks all adapters of the group, its tenants in turn
(the most popular of tenant 0, that of tenant 1, …, then the second of tenant 0). With `uniform` all tenants get the
same.

What is drawn for one load never depends on another, nor its times on its lengths: a scenario in which one thing was
changed meets the same rest.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from loadtests import traces
from loadtests.arrivals import NS, Times, arrivals, as_ns
from loadtests.lengths import lengths
from loadtests.popularity import drifted, ranks
from loadtests.recording import ABSENT, PLANNED, Array, Schedule
from loadtests.scenario import Closed, Conversation, Load, Phase, Scenario, Tenants, Trace, Workload

_CLOSED_PER_CALLER_S: Final = 100
"""More requests than a caller can have answered in a second of a closed loop; what is over is never sent."""
_CLOSED_S: Final = 5_000
"""The same of all callers of a load."""
_AT, _POPULARITY, _BASE, _PROMPTS, _OUTPUTS, _ABORTS, _PARAMETERS, _CANARIES, _TEXTS, _TURNS = range(10)


def schedule_of(scenario: Scenario, *, shard: tuple[int, int] = (0, 1)) -> Schedule:
    """Every request of a run, or those of one of several hosts; equal scenarios give equal bytes.

    Raises:
        ScenarioInvalid: a trace that it names cannot be read.
    """
    groups = _Groups(scenario.tenants)
    workloads = tuple(scenario.workloads)
    phases = phase_times(scenario)
    planned, conversations = np.empty(0, PLANNED), 0
    for place, (begin, _) in enumerate(phases):
        for number in range(len(scenario.phases[place].load)):
            rows = _Drawing(scenario, place, number).rows(begin, groups, workloads)
            rows["conversation"][rows["conversation"] != ABSENT] += conversations
            conversations = max(conversations, rows["conversation"].max(initial=ABSENT) + 1)
            planned = np.concatenate((planned, rows))
    planned = planned[order_of(planned, phases)]
    return Schedule(
        planned[shard_of(planned, shard[1]) == shard[0]],
        tuple(f"{group.name}-{number}" for group in scenario.tenants for number in range(group.count)),
        tuple(group.name for group in scenario.tenants for _ in range(group.count)),
        tuple(f"adapter-{n}" for group in scenario.tenants for _ in range(group.count) for n in range(group.adapters)),
        workloads,
        phases,
    )


def phase_times(scenario: Scenario) -> tuple[tuple[int, int], ...]:
    """Begin and end of each phase, ns since the run's begin; the silence after it is not part of it."""
    times, begin = [], 0
    for phase in scenario.phases:
        end = begin + round(phase.duration_s * NS)
        times.append((begin, end))
        begin = end + round(phase.settle_s * NS)
    return tuple(times)


def order_of(planned: Array, phases: tuple[tuple[int, int], ...]) -> npt.NDArray[np.intp]:
    """The places of rows in order of time, of equal times by seed, so that parts put together have the whole's order.

    Those of a closed loop stand where their phase begins, as they are.
    """
    begins = np.array([begin for begin, _ in phases], np.int64)
    closed = planned["at"] == ABSENT
    at = np.where(closed, begins[planned["phase"]], planned["at"])
    order: npt.NDArray[np.intp] = np.lexsort((planned["turn"], np.where(closed, 0, planned["seed"]), at))
    return order


def shard_of(planned: Array, shards: int) -> npt.NDArray[np.int64]:
    """Which shard each row of a schedule is in: rows in turn, but all of a caller or a conversation in the same."""
    number = np.arange(len(planned))
    for together in ("conversation", "caller"):
        rank = np.unique(planned[together], return_inverse=True)[1]  # of a shard's rows not all numbers are there
        number = np.where(planned[together] == ABSENT, number, rank)
    return number % shards


class _Groups:
    """Where each group's tenants and adapters begin among all."""

    def __init__(self, tenants: tuple[Tenants, ...]) -> None:
        self._begins: dict[str, tuple[Tenants, int, int]] = {}
        tenant = model = 0
        for group in tenants:
            self._begins[group.name] = (group, tenant, model)
            tenant += group.count
            model += group.count * group.adapters

    def of(self, name: str) -> tuple[Tenants, int, int]:
        """The group, its first tenant, its first adapter."""
        return self._begins[name]


class _Drawing:
    """The rows of one load of one phase."""

    def __init__(self, scenario: Scenario, place: int, number: int) -> None:
        self._seed = (scenario.seed, place, number)
        self._phase: Phase = scenario.phases[place]
        self._place = place
        self._load: Load = self._phase.load[number]
        self._workload: Workload = scenario.workloads[self._load.workload]

    def rows(self, begin: int, groups: _Groups, workloads: tuple[str, ...]) -> Array:
        law = self._load.arrivals
        planned = self._closed(law) if isinstance(law, Closed) else self._open(begin)
        planned["phase"] = self._place
        planned["workload"] = workloads.index(self._load.workload)
        self._choose_models(planned, begin, *groups.of(self._load.tenants))
        self._choose_texts(planned)
        if self._workload.conversation is not None:
            planned = self._turns(planned, self._workload.conversation, begin)
        self._choose_what_else(planned)
        return planned

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng((*self._seed, purpose))

    def _open(self, begin: int) -> Array:
        law = self._load.arrivals
        assert not isinstance(law, Closed)
        at = arrivals(law, self._phase.duration_s, self._random(_AT))
        planned = np.zeros(len(at), PLANNED)
        planned["at"] = begin + at
        planned["caller"] = ABSENT
        return planned

    def _closed(self, law: Closed) -> Array:
        each = np.ceil(self._phase.duration_s * min(_CLOSED_PER_CALLER_S, _CLOSED_S / law.callers))
        planned = np.zeros(int(each) * law.callers, PLANNED)
        planned["at"] = ABSENT
        planned["caller"] = np.arange(len(planned)) % law.callers
        return planned

    def _choose_models(self, planned: Array, begin: int, group: Tenants, tenant: int, model: int) -> None:
        work, count = self._workload, len(planned)
        at_s = np.maximum(planned["at"] - begin, 0) / NS
        targets = group.count * max(group.adapters, 1)
        ranked = ranks(work.popularity, targets, count, self._random(_POPULARITY))
        target = drifted(ranked, targets, at_s, work.drift_every_s)
        planned["tenant"] = tenant + target % group.count
        planned["model"] = model + target % group.count * group.adapters + target // group.count
        to_base = self._random(_BASE).random(count) < work.base_share
        planned["model"][to_base | (group.adapters == 0)] = ABSENT

    def _choose_texts(self, planned: Array) -> None:
        law, work, count = self._load.arrivals, self._workload, len(planned)
        of_trace = traces.read(law.file) if isinstance(law, Trace) else None
        prompts, outputs = (of_trace.prompt_tokens, of_trace.output_tokens) if of_trace else (None, None)
        own = lengths(work.prompt_tokens, count, self._random(_PROMPTS), prompts)
        planned["prompt_tokens"] = np.maximum(work.shared_prefix_tokens + own, 1)
        output = lengths(work.output_tokens, count, self._random(_OUTPUTS), outputs)
        planned["output_tokens"] = np.maximum(output, 1)
        planned["conversation"] = ABSENT
        planned["seed"] = self._random(_TEXTS).integers(0, 2**32, count, np.uint32)

    def _turns(self, first: Array, law: Conversation, begin: int) -> Array:
        """Each row as the begin of a conversation, with its later turns; those after the phase's end are left out."""
        random = self._random(_TURNS)
        turns = np.maximum(lengths(law.turns, len(first), random), 1)
        planned = np.repeat(first, turns)
        starts = np.cumsum(turns) - turns
        number = np.arange(len(planned)) - np.repeat(starts, turns)
        think = np.where(number == 0, 0.0, random.exponential(law.think_s, len(planned)))
        planned["turn"] = number
        planned["conversation"] = np.repeat(np.arange(len(first)), turns)
        planned["at"] += _summed(as_ns(think), starts, turns)
        self._lengthen(planned, starts, turns)
        return planned[planned["at"] < begin + round(self._phase.duration_s * NS)]

    def _lengthen(self, planned: Array, starts: Times, turns: Times) -> None:
        """A turn's prompt is all that was said before, with the answers, and its own."""
        later, count, work = planned["turn"] > 0, len(planned), self._workload
        own = lengths(work.prompt_tokens, count, self._random(_PROMPTS + 100))
        output = np.maximum(lengths(work.output_tokens, count, self._random(_OUTPUTS + 100)), 1)
        planned["output_tokens"][later] = output[later]
        before = np.where(later, np.roll(planned["output_tokens"], 1), 0)
        said = np.where(later, own, planned["prompt_tokens"]) + before
        planned["prompt_tokens"] = _summed(said.astype(np.int64), starts, turns)

    def _choose_what_else(self, planned: Array) -> None:
        work, count = self._workload, len(planned)
        random = self._random(_ABORTS)
        leaves = random.random(count) < work.abort_share
        planned["abort_after"] = np.where(leaves, as_ns(random.exponential(work.abort_after_s, count)), ABSENT)
        bounds = np.cumsum([one.share for one in work.parameters])
        chosen = np.searchsorted(bounds, self._random(_PARAMETERS).random(count), side="right")
        planned["parameters"] = np.where(chosen < len(bounds), chosen, ABSENT)
        asked = self._random(_CANARIES).random(count) < work.canary_share
        alone = planned["conversation"] == ABSENT
        planned["canary"] = asked & alone & ~leaves
        planned["parameters"][planned["canary"]] = ABSENT


def _summed(values: Times, starts: Times, counts: Times) -> Times:
    """Running sums that begin anew at each of `starts`."""
    whole = np.cumsum(values)
    return whole - np.repeat(whole[starts] - values[starts], counts)
