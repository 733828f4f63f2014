"""How many replicas with how many adapter slots a peak needs, reckoned from a run: costs fitted, then simulated.

What the model says of the measured replicas is set right by what was measured (`Model.correction`); more replicas, more
slots, other adapters and other popularity are the model's word. Every assumption is told, and what lies outside of what
was measured is marked as extrapolated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from loadtests import statistics
from loadtests.fitting import CannotFit, Fit, Room, fit, load_of, overhead_s
from loadtests.points import Knee, knee_of, points_of
from loadtests.popularity import ranks, shares
from loadtests.recording import Run
from loadtests.scenario import Objective, Popularity
from loadtests.simulating import Engine, Load, simulate

MOST_REPLICAS: Final = 64
_SEEDS: Final = (1, 2)
_WARM_UP_S: Final = 5.0
_FINE: Final = 0.03


@dataclass(frozen=True, slots=True)
class Traffic:
    """Whose requests: so many adapters, by which popularity, and how many ask the base model; None: as measured."""

    adapters: int | None = None
    popularity: Popularity | None = None
    base_share: float | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """So many replicas with so many slots under the peak."""

    replicas: int
    slots: int
    kept_share: float
    knee: float  # requests per second of all replicas together
    hit_ratio: float  # Che's approximation
    enough: bool
    extrapolated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The options, what they rest on, and where they go beyond what was measured."""

    peak: float
    goal: float
    options: tuple[Option, ...]
    assumptions: tuple[str, ...]


class Model:
    """What a measured run tells of more replicas."""

    def __init__(
        self, run: Run, room: Room, objective: Objective, *, goal: float = 0.9, traffic: Traffic = Traffic()
    ) -> None:
        """Raises CannotFit: the run does not tell what its engines cost, or none of its rates kept the objective."""
        run = replace(run, scenario={**run.scenario, "objective": objective.model_dump()})
        self.run, self._objective, self._goal, self.traffic = run, objective, goal, traffic
        self.fit: Fit = fit(run, room)
        self.replicas = self.fit.replicas
        lightest = _lightest(run)
        overhead = overhead_s(run, self.fit.engine, self.replicas, phase=lightest)
        self.engine: Engine = replace(self.fit.engine, overhead_s=overhead)
        self.measured: Knee = knee_of(points_of(run), goal)
        if math.isnan(self.measured.rate):
            raise CannotFit(f"At none of the run's rates did {goal:.0%} of the requests keep the objective.")
        spans = [span for span, one in zip(run.schedule.phases, run.scenario["phases"], strict=True) if one["measured"]]
        self.duration_s = sorted((end - begin) / 1e9 for begin, end in spans)[len(spans) // 2]
        self._sent = load_of(run)
        self.modelled = self._knee(self.engine, self.replicas, Traffic())
        self.correction = self.measured.rate / self.modelled if self.measured.reached else 1.0

    def knee(self, replicas: int, slots: int | None = None) -> float:
        """The rate up to which the goal is kept, requests per second of all replicas together."""
        return self._knee(self._with(slots), replicas, self.traffic) * self.correction

    def kept_share(self, rate: float, replicas: int, slots: int | None = None) -> float:
        """The share of the requests that keep the objective at a rate."""
        return self._kept(self._with(slots), rate / self.correction, replicas, self.traffic)

    def hit_ratio(self, replicas: int, slots: int | None = None) -> float:
        """Che's approximation, each adapter on one replica: how often one is in a slot when it is asked."""
        rates = self._shares(self.traffic)
        of = np.random.default_rng(0).permutation(len(rates)) % replicas
        parts = [rates[of == one] for one in range(replicas)]
        room = self._with(slots).slots
        hits = [statistics.che_hit_ratio(part, room) * part.sum() for part in parts if len(part)]
        return float(sum(hits) / rates.sum()) if len(rates) else math.nan

    @property
    def adapters(self) -> int:
        """How many are asked."""
        return len(self._shares(self.traffic))

    def load(self, rate: float, traffic: Traffic, seed: int) -> Load:
        """Poisson arrivals with the lengths that were measured, for the warm-up and a phase's time."""
        random = np.random.default_rng(seed)
        count = max(50, int(rate * (self.duration_s + _WARM_UP_S)))
        at = np.cumsum(random.exponential(1.0, count)) / rate
        like = random.integers(0, len(self._sent.at_s), count)
        adapter, tenant = self._sent.adapter[like], self._sent.tenant[like]
        if traffic.popularity is not None:
            ranked = ranks(traffic.popularity, self._count(traffic), count, random)
            tenant = ranked % len(np.unique(self._sent.tenant))
            adapter = np.where(random.random(count) < self._base_share(traffic), -1, ranked)
        return Load(at, tenant, adapter, self._sent.prompt_tokens[like], self._sent.output_tokens[like])

    def _with(self, slots: int | None) -> Engine:
        if slots is None:
            return self.engine
        return replace(self.engine, slots=slots, host_adapters=max(slots, self.engine.host_adapters))

    def _knee(self, engine: Engine, replicas: int, traffic: Traffic) -> float:
        low = high = self.measured.rate * replicas / self.replicas
        if self._kept(engine, low, replicas, traffic) >= self._goal:
            while self._kept(engine, high, replicas, traffic) >= self._goal:
                low, high = high, 1.2 * high
        else:
            while low > _FINE and self._kept(engine, low, replicas, traffic) < self._goal:
                low, high = low / 1.2, low
        while high - low > _FINE * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self._kept(engine, middle, replicas, traffic) >= self._goal else (low, middle)
        return (low + high) / 2

    def _kept(self, engine: Engine, rate: float, replicas: int, traffic: Traffic) -> float:
        kept = []
        for seed in _SEEDS:
            load = self.load(rate, traffic, seed)
            answered = simulate(load, engine, replicas=replicas)
            ttft, response = answered.first_s - load.at_s, answered.done_s - load.at_s
            tpot = (answered.done_s - answered.first_s) / np.maximum(load.output_tokens - 1, 1)
            good = np.ones(len(ttft), bool)
            for bound, times in (
                (self._objective.ttft_ms, ttft),
                (self._objective.tpot_ms, tpot),
                (self._objective.response_ms, response),
            ):
                good &= times * 1e3 <= (math.inf if bound is None else bound)
            kept.append(
                float(good[load.at_s >= _WARM_UP_S].mean()) if load.at_s[-1] >= _WARM_UP_S else float(good.mean())
            )
        return float(np.mean(kept))

    def _shares(self, traffic: Traffic) -> Any:
        if traffic.popularity is not None:
            return shares(traffic.popularity, self._count(traffic))
        return np.unique(self._sent.adapter[self._sent.adapter >= 0], return_counts=True)[1].astype(np.float64)

    def _count(self, traffic: Traffic) -> int:
        return traffic.adapters if traffic.adapters is not None else max(1, self.fit.adapters)

    def _base_share(self, traffic: Traffic) -> float:
        return float(np.mean(self._sent.adapter < 0)) if traffic.base_share is None else traffic.base_share


def plan(model: Model, peak: float, *, goal: float, slots: Sequence[int]) -> Plan:
    """For each number of slots the fewest replicas that keep the goal at the peak, and one fewer beside it."""
    options = []
    for room in slots:
        knee_alone = model.knee(1, room)
        count = max(1, min(MOST_REPLICAS, round(peak / knee_alone)))
        while count > 1 and model.kept_share(peak, count - 1, room) >= goal:
            count -= 1
        while count < MOST_REPLICAS and model.kept_share(peak, count, room) < goal:
            count += 1
        options += [_option(model, one, room, peak, goal) for one in (count - 1, count) if one]
    return Plan(peak, goal, tuple(options), tuple(assumptions(model)))


def _option(model: Model, replicas: int, slots: int, peak: float, goal: float) -> Option:
    kept = model.kept_share(peak, replicas, slots)
    return Option(
        replicas,
        slots,
        kept,
        model.knee(replicas, slots),
        model.hit_ratio(replicas, slots),
        kept >= goal,
        tuple(extrapolated(model, replicas, slots, peak)),
    )


def extrapolated(model: Model, replicas: int, slots: int, peak: float) -> list[str]:
    """What of an option lies outside of what the run has seen."""
    fitted, engine = model.fit, model.engine
    hit = model.hit_ratio(replicas, slots)
    measured_per_replica = max(point.offered for point in points_of(model.run)) / model.replicas
    return [
        *([f"{replicas} replicas, {model.replicas} measured"] if replicas != model.replicas else []),
        *([f"{slots} slots, {engine.slots} measured"] if slots != engine.slots else []),
        *([f"{model.adapters} adapters, {fitted.adapters} measured"] if model.adapters > fitted.adapters else []),
        *(
            [f"{peak / replicas:.3g} requests/s a replica, up to {measured_per_replica:.3g} measured"]
            if peak / replicas > 1.1 * measured_per_replica
            else []
        ),
        *(["no load of an adapter was seen, and its cost is taken as nothing"] if hit < 1 and not fitted.loads else []),
    ]


def assumptions(model: Model) -> list[str]:
    """What the figures rest on, a sentence or two each."""
    engine, fitted, whose = model.engine, model.fit, model.traffic.popularity
    popularity = "as measured" if whose is None else ", ".join(f"{k} {v}" for k, v in whose.model_dump().items())
    decoding = (
        f"A step takes {engine.step_s * 1e3:.3g} ms, {engine.per_sequence_s * 1e6:.3g} µs more for each sequence that "
        f"runs and {engine.per_prompt_token_s * 1e6:.3g} µs for each token of a prompt that comes in: fitted to "
        f"{fitted.requests} answers, half of them within {fitted.error:.1%}, with up to {fitted.most_running} at once."
    )
    loads = (
        f"An adapter that is loaded stalls its replica for {engine.load_s * 1e3:.3g} ms, one that is brought from host "
        f"memory for {engine.activate_s * 1e3:.3g} ms: {fitted.loads} were seen."
    )
    room = (
        f"A replica runs up to {engine.max_num_seqs} sequences and holds {engine.host_adapters} adapters in memory. "
        "More slots cost no speed and no room for KV cache, which on a GPU they do."
    )
    beside = (
        f"Everything beside the engine takes {engine.overhead_s * 1e3:.3g} ms a request, however many there are: "
        "gateways, network and store are never what is short."
    )
    judged = (
        f"A rate is judged over {model.duration_s:.3g} s, as the run's were: what overload adds up in a longer time is "
        "not in it. Hit ratios are Che's approximation for LRU, requests independent of each other."
    )
    return [
        _calibration(model),
        decoding,
        loads,
        room,
        beside,
        f"Poisson arrivals, lengths as measured, {model.adapters} adapters, popularity {popularity}. Bursts need more.",
        "Replicas are all like the measured and none is missing: for one that fails or restarts, plan one more.",
        "Tenants share a replica in equal parts, and nobody is refused: weights and plans' limits are left out.",
        judged,
    ]


def _calibration(model: Model) -> str:
    measured = model.measured
    if measured.reached:
        return (
            f"Measured knee: {measured.rate:.3g} requests/s on {model.replicas} replica(s). The model says "
            f"{model.modelled:.3g} for it, and all its rates are multiplied by {model.correction:.3g}."
        )
    return (
        f"The run's highest rate, {measured.rate:.3g} requests/s, still kept the goal: its knee is not known, and "
        f"nothing sets the model's {model.modelled:.3g} right. Measure higher rates: tailor loadtest sweep."
    )


def _lightest(run: Run) -> int:
    """The measured phase with the fewest requests per second."""
    rates = [
        (float((run.schedule.planned["phase"] == number).sum()) / (end - begin), number)
        for number, (begin, end) in enumerate(run.schedule.phases)
        if run.scenario["phases"][number]["measured"]
    ]
    return min(rate for rate in rates if rate[0])[1]
