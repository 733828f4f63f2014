"""The search for the knee: which rates are tried, and what is made of them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests import gates
from loadtests.points import goal_of, knee_of, points_of
from loadtests.recording import ABSENT, Event, Outcome, Run
from loadtests.scenario import Gamma, Poisson, Scenario, ScenarioInvalid, Trace
from loadtests.scheduling import schedule_of
from loadtests.sweeping import SweepInconclusive, at_rate, joined, mean_rate, sweep
from tests.unit.loadtests.runs import S, Shape, run_of


def scenario(*arrivals: dict[str, Any], **workload: Any) -> Scenario:
    """One phase with a load of each law."""
    loads = [{"tenants": "t", "workload": "w", "arrivals": one} for one in arrivals]
    return Scenario.model_validate(
        {
            "name": "one",
            "question": "Where does it bend over?",
            "tenants": [{"name": "t"}],
            "workloads": {"w": workload},
            "phases": [
                {"name": "warm-up", "duration_s": 1, "measured": False, "load": loads},
                {"name": "main", "duration_s": 10, "load": loads, "actions": [{"kind": "upload", "at_s": 1}]},
            ],
            "gates": [{"metric": "error_share", "phase": "main", "at_most": 0}],
        }
    )


class Server:
    """Keeps its objective up to a rate."""

    def __init__(self, knee: float, *, late: int = 0) -> None:
        self.knee, self.late = knee, late
        self.tried: list[float] = []

    async def measure(self, made: Scenario) -> Run:
        rate = mean_rate(made.phases[-1].load[0].arrivals, 10)
        self.tried.append(rate)

        def refuse(_planned: Any, rows: Any) -> None:
            if rate > self.knee:
                rows["outcome"][::4] = Outcome.REFUSED

            if self.late >= 0:
                rows["sent"] += 10**9

        self.late -= 1
        return run_of(Shape(phases=(made.phases[-1].name,), rate=rate), change=refuse)


POISSON = {"law": "poisson", "rate": 5.0}


async def test_rates_double_then_close_in_on_the_knee() -> None:
    """Up to the first that is too much, then between the last two until they are within what was asked."""
    server = Server(37.0)
    runs = [one async for one in sweep(server.measure, scenario(POISSON), first=5, most=1_000, within=0.05)]
    assert server.tried[:5] == [5, 10, 20, 40, pytest.approx(math.sqrt(800))]
    found = knee_of(points_of(joined(runs)))
    assert found.reached
    assert found.rate == pytest.approx(37, rel=0.05)


async def test_a_knee_beyond_the_highest_rate_is_not_reached() -> None:
    """The highest is tried, and what is known of the knee is that it lies above."""
    server = Server(1e9)
    runs = [one async for one in sweep(server.measure, scenario(POISSON), first=5, most=12)]
    assert server.tried == [5, 10, 12]
    found = knee_of(points_of(joined(runs)))
    assert not found.reached
    assert found.rate == pytest.approx(12, rel=0.1)


async def test_a_late_generator_is_given_a_second_chance_only() -> None:
    """A point of a generator that was late is measured again; late twice, there is no knee to tell."""
    once = Server(37.0, late=1)
    assert [one async for one in sweep(once.measure, scenario(POISSON), first=5, most=5)]
    assert once.tried == [5, 5]
    with pytest.raises(SweepInconclusive, match="twice: The generator was late"):
        [one async for one in sweep(Server(37.0, late=2).measure, scenario(POISSON), first=5, most=5)]


def test_the_knee_lies_between_two_rates() -> None:
    """On the line between the last that keeps the level and the first that does not; a later one does not count."""
    (one,) = points_of(run_of(Shape(phases=("main",))))
    points = [replace(one, offered=rate, kept_share=kept) for rate, kept in ((20, 0.95), (10, 1), (30, 0.85), (40, 1))]
    assert knee_of(points, 0.9).rate == pytest.approx(25)
    assert math.isnan(knee_of(points[2:3], 0.9).rate)


async def test_a_sweep_that_found_its_knee_fails_for_wrong_answers_and_errors_only() -> None:
    """That its highest rates break the objective is what they are for; one at which nothing is sent tells nothing."""
    server = Server(7.0)
    runs = [one async for one in sweep(server.measure, scenario(POISSON), first=5, most=20, level=0.8)]
    whole = joined(runs)
    assert goal_of(whole) == 0.8
    made = at_rate(scenario(POISSON), 5)
    assert [(gate.metric, gate.phase, gate.at_most) for gate in made.gates] == [
        ("wrong_adapter", None, 0),
        ("error_share", None, 0),
    ]
    judged = replace(whole, scenario={**whole.scenario, "gates": [gate.model_dump() for gate in made.gates]})
    assert gates.exit_code(gates.judge(judged), judged) == gates.PASSED

    async def silent(made: Scenario) -> Run:
        run = await server.measure(made)
        nothing = replace(run.samples, rows=run.samples.rows[:0], chunk_ends=run.samples.chunk_ends[:0])
        return replace(run, samples=nothing, schedule=replace(run.schedule, planned=run.schedule.planned[:0]))

    with pytest.raises(SweepInconclusive, match="othing was"):
        [one async for one in sweep(silent, scenario(POISSON), first=5, most=5)]


def test_a_phase_at_another_rate_keeps_its_shares(tmp_path: Path) -> None:
    """Each load its part of it, bursts as bursty, a trace faster; actions and other phases are left out."""
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(f'{{"at_s": {n}, "prompt_tokens": 9, "output_tokens": 9}}\n' for n in range(10)))
    laws: list[dict[str, Any]] = [
        {"law": "gamma", "rate": 2, "cv": 3},
        {"law": "ramp", "from_rate": 0, "to_rate": 4},
        {"law": "trace", "file": str(file)},
    ]
    made = at_rate(scenario(*laws), 50, duration_s=30, warm_up_s=2)
    assert [(one.duration_s, one.measured, one.actions) for one in made.phases] == [(2, False, ()), (30, True, ())]
    assert [load.arrivals for load in made.phases[1].load] == [
        Gamma(law="gamma", rate=20, cv=3),
        Poisson(law="poisson", rate=20),
        Trace(law="trace", file=file, speed=10),
    ]
    assert len(schedule_of(made).planned) > 0
    with pytest.raises(ScenarioInvalid, match="closed loop"):
        at_rate(scenario({"law": "closed", "callers": 3}), 5)
    with pytest.raises(ScenarioInvalid, match="no phase other"):
        at_rate(scenario(POISSON), 5, phase="other")


def test_runs_are_joined_with_all_their_times() -> None:
    """One after the other, the lowest rate first; every figure of a phase is what it was alone."""
    slow, fast = (
        run_of(Shape(phases=(f"rate-{rate}",), rate=rate, seed=rate), events=(Event(2 * S, "load", f"at {rate}"),))
        for rate in (4, 12)
    )
    whole = joined([fast, slow])
    assert [one["name"] for one in whole.scenario["phases"]] == ["rate-4", "rate-12"]
    assert [point for run in (slow, fast) for point in points_of(run)] == points_of(whole)
    assert whole.schedule.phases[0] == slow.schedule.phases[0]
    begin = whole.schedule.phases[1][0]
    assert begin >= slow.samples.rows["done"].max()
    assert [event.at for event in whole.events] == [2 * S, begin + 2 * S]
    assert (np.diff(whole.samples.rows["index"]) == 1).all()
    assert (whole.schedule.planned["at"][whole.samples.rows["index"]] == whole.samples.rows["scheduled"]).all()
    lives = {(life.tenant, life.model, life.since) for life in whole.versions}
    assert len(lives) == len(slow.versions) + len(fast.versions)
    assert all(life.until != ABSENT for life in whole.versions)
