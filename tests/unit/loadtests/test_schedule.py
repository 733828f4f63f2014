"""A run's schedule: arrivals, popularity and lengths follow the laws asked for, and the seed decides every byte."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from loadtests import traces
from loadtests.arrivals import NS, Open, arrivals, expected_until
from loadtests.lengths import lengths
from loadtests.popularity import drifted, ranks, shares
from loadtests.recording import ABSENT, Schedule
from loadtests.scenario import (
    Constant,
    Distinct,
    Diurnal,
    Gamma,
    Identical,
    Lognormal,
    Poisson,
    Popularity,
    PowerLaw,
    Ramp,
    Scenario,
    ScenarioInvalid,
    Steps,
    Trace,
    Uniform,
    Zipf,
)
from loadtests.scheduling import schedule_of, shard_of

SURE = 0.001
"""A right law is refused in one of a thousand seeds; the seeds are fixed, so a test that passed stays so."""


def scenario(**members: Any) -> Scenario:
    """Two groups under two loads, then one alone; `members` replace what it has."""
    load = [
        {"tenants": "small", "workload": "short", "arrivals": {"law": "poisson", "rate": 200}},
        {"tenants": "big", "workload": "talk", "arrivals": {"law": "gamma", "rate": 40, "cv": 3}},
    ]
    told: dict[str, Any] = {
        "name": "two-groups",
        "question": "Does a schedule hold what its scenario says?",
        "seed": 7,
        "tenants": [{"name": "small", "count": 5, "adapters": 3}, {"name": "big", "adapters": 4}],
        "workloads": {
            "short": {"popularity": {"law": "zipf", "exponent": 1}, "base_share": 0.2, "abort_share": 0.1},
            "talk": {
                "conversation": {"turns": {"law": "lognormal", "median": 3, "sigma": 0.5, "most": 9}, "think_s": 1},
                "prompt_tokens": {"law": "lognormal", "median": 50, "sigma": 0.7, "most": 400},
                "shared_prefix_tokens": 100,
            },
        },
        "phases": [
            {"name": "both", "duration_s": 20, "load": load, "settle_s": 2},
            {"name": "one", "duration_s": 10, "load": load[:1]},
        ],
        "gates": [{"metric": "error_share", "at_most": 0}],
    }
    return Scenario.model_validate(told | members)


def closed(callers: int) -> Scenario:
    """One group in a closed loop."""
    load = {"tenants": "small", "workload": "short", "arrivals": {"law": "closed", "callers": callers}}
    return scenario(phases=[{"name": "closed", "duration_s": 2, "load": [load]}])


@pytest.mark.parametrize("law", [Poisson(law="poisson", rate=300), Gamma(law="gamma", rate=300, cv=1.6)])
def test_gaps_follow_the_law(law: Poisson | Gamma) -> None:
    """Kolmogorov-Smirnov finds no difference from the law asked for, and finds it from one a tenth faster.

    Times are whole ns: of a gamma law with a CV of 2.5, 6 % of the gaps would be 0.
    """
    gaps = np.diff(arrivals(law, 60, np.random.default_rng(1))) / NS
    shape = law.cv**-2 if isinstance(law, Gamma) else 1.0
    assert stats.kstest(gaps, stats.gamma(shape, scale=1 / law.rate / shape).cdf).pvalue > SURE
    assert stats.kstest(gaps, stats.gamma(shape, scale=0.9 / law.rate / shape).cdf).pvalue < SURE


@pytest.mark.parametrize(
    "law",
    [
        Steps(law="steps", rates=(100, 400, 200)),
        Ramp(law="ramp", from_rate=0, to_rate=500),
        Diurnal(law="diurnal", mean_rate=250, swing=0.8, period_s=25),
    ],
)
def test_a_changing_rate_is_kept_at_every_time(law: Steps | Ramp | Diurnal) -> None:
    """Seen through the requests expected until each time, gaps are exponential with mean 1, and not as they are."""
    times = arrivals(law, 60, np.random.default_rng(2)) / NS
    gaps = np.diff(np.interp(times, *expected_until(law, 60)))
    assert stats.kstest(gaps, "expon").pvalue > SURE
    assert stats.kstest(np.diff(times) * len(times) / 60, "expon").pvalue < SURE


def test_expected_requests_are_those_of_the_rates() -> None:
    """The laws' own words, by hand: steps equally long, a straight ramp, a sine of one period."""
    assert expected_until(Steps(law="steps", rates=(10, 30)), 10)[1][-1] == pytest.approx(200)
    assert expected_until(Ramp(law="ramp", from_rate=10, to_rate=30), 10)[1][2_048] == pytest.approx(75)
    day = Diurnal(law="diurnal", mean_rate=10, swing=1, period_s=20)
    assert expected_until(day, 20)[1][2_048] == pytest.approx(100 + 200 / np.pi)
    assert expected_until(day, 20)[1][-1] == pytest.approx(200)


@pytest.mark.parametrize(
    "law",
    [
        Constant(law="constant", rate=50),
        Poisson(law="poisson", rate=50),
        Gamma(law="gamma", rate=50, cv=8),
        Steps(law="steps", rates=(10, 90)),
    ],
)
def test_arrivals_are_in_their_phase_in_order(law: Open) -> None:
    """From 0 on, none at the phase's end or after it."""
    times = arrivals(law, 30, np.random.default_rng(3))
    assert times[0] >= 0
    assert times[-1] < 30 * NS
    assert (np.diff(times) >= 0).all()


def test_constant_arrivals_are_even() -> None:
    """Exactly the rate, with equal gaps."""
    times = arrivals(Constant(law="constant", rate=8), 2.5, np.random.default_rng(0))
    assert times.tolist() == [n * NS // 8 for n in range(20)]


@pytest.mark.parametrize(
    "law", [Zipf(law="zipf", exponent=1.1), Uniform(law="uniform"), PowerLaw(law="power", alpha=0.3)]
)
def test_adapters_are_asked_by_their_popularity(law: Popularity) -> None:
    """Chi-square finds no difference from the shares asked for, and finds it where a hundredth moved to the first."""
    asked = np.bincount(ranks(law, 40, 200_000, np.random.default_rng(4)), minlength=40)
    share = shares(law, 40)
    likely = share * 200_000 >= 5

    def same(expected: Any) -> float:
        rest = [expected[~likely].sum()] if (~likely).any() else []
        found = [*asked[likely], *([asked[~likely].sum()] if rest else [])]
        return float(stats.chisquare(found, np.array([*expected[likely], *rest]) * 200_000).pvalue)

    assert share.sum() == pytest.approx(1)
    assert same(share) > SURE
    moved = share * 0.99
    moved[0 if likely[0] else -1] += 0.01
    assert same(moved) < SURE


def test_shares_by_hand() -> None:
    """Zipf's exponent, and S-LoRA's alpha, which is no exponent of Zipf's: a small one favours the last."""
    assert shares(Zipf(law="zipf", exponent=2), 3) == pytest.approx(np.array([36, 9, 4]) / 49)
    assert shares(PowerLaw(law="power", alpha=0.5), 3) == pytest.approx(np.array([1, 3, 5]) / 9)
    assert shares(Identical(law="identical"), 3).tolist() == [1, 0, 0]
    assert ranks(Distinct(law="distinct"), 3, 7, np.random.default_rng(0)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_popularity_drifts() -> None:
    """After each `drift_every_s` every rank is the next adapter's, the last's the first's."""
    at = np.array([0.0, 4.9, 5.0, 14.0])
    assert drifted(np.array([0, 2, 0, 2]), 3, at, 5.0).tolist() == [0, 2, 1, 1]


def test_lengths_follow_the_law() -> None:
    """Lognormal between its cuts, at which what is beyond them lies."""
    drawn = lengths(Lognormal(law="lognormal", median=400, sigma=0.5, most=900), 50_000, np.random.default_rng(5))
    inside = drawn[drawn < 900]
    law = stats.lognorm(0.5, scale=400)
    assert stats.kstest(inside, lambda value: law.cdf(value) / law.cdf(900)).pvalue > SURE
    assert np.mean(drawn == 900) == pytest.approx(law.sf(900), abs=0.005)
    assert drawn.max() == 900


def test_equal_seeds_equal_bytes() -> None:
    """A scenario says its schedule whole; another seed has another one of the same kind."""
    first, again, other = (schedule_of(scenario(seed=seed)) for seed in (7, 7, 8))
    assert first.planned.tobytes() == again.planned.tobytes()
    assert (first.tenants, first.models, first.phases) == (again.tenants, again.models, again.phases)
    assert first.planned.tobytes() != other.planned.tobytes()
    assert len(first.planned) == pytest.approx(len(other.planned), rel=0.2)


@pytest.mark.parametrize("made", [scenario(), closed(5)], ids=["open", "closed"])
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_one_runs_schedule(made: Scenario, shards: int) -> None:
    """Each row is in exactly one shard, and together they are the schedule of one host.

    Those of a caller and those of a conversation stay together.
    """
    whole = schedule_of(made).planned
    parts = [schedule_of(made, shard=(number, shards)).planned for number in range(shards)]
    assert all(len(part) for part in parts)
    together = np.concatenate(parts)
    assert sorted(row.tobytes() for row in together) == sorted(row.tobytes() for row in whole)
    for name in ("caller", "conversation"):
        numbers = [set(part[name][part[name] != ABSENT].tolist()) for part in parts]
        assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_a_shards_conversations_are_divided_among_its_processes_again() -> None:
    """Though all their numbers are even."""
    half = schedule_of(scenario(), shard=(0, 2)).planned
    talk = half["conversation"] != ABSENT
    assert np.mean(shard_of(half, 2)[talk]) == pytest.approx(0.5, abs=0.1)


def test_a_name_is_that_of_one() -> None:
    """Of one phase, of one group of tenants: figures are asked for by it."""
    told = scenario().model_dump()
    for part, name in (("phases", "one"), ("tenants", "big")):
        with pytest.raises(ValidationError, match=f"{name}: the name of two"):
            Scenario.model_validate(told | {part: [*told[part], told[part][1]]})


def test_one_load_does_not_move_another() -> None:
    """What a group is sent stays the same, byte for byte, where another group's load is taken away or made longer."""
    both = schedule_of(scenario())
    changed = scenario().model_dump()
    changed["workloads"]["talk"]["prompt_tokens"] = {"law": "fixed", "value": 9}
    other = schedule_of(Scenario.model_validate(changed))
    assert _of(both, "small").tobytes() == _of(other, "small").tobytes()
    assert _of(both, "big")["at"].tolist() == _of(other, "big")["at"].tolist()


def _of(schedule: Schedule, group: str) -> Any:
    tenants = [number for number, name in enumerate(schedule.groups) if name == group]
    return schedule.planned[np.isin(schedule.planned["tenant"], tenants)]


def test_a_groups_tenants_are_asked_by_popularity() -> None:
    """Ranks go through the tenants in turn; every adapter belongs to the tenant that is said beside it."""
    schedule = schedule_of(scenario())
    small = _of(schedule, "small")
    asked = small[small["model"] != ABSENT]
    assert schedule.tenants == ("small-0", "small-1", "small-2", "small-3", "small-4", "big-0")
    assert schedule.models[:4] == ("adapter-0", "adapter-1", "adapter-2", "adapter-0")
    assert (asked["model"] // 3 == asked["tenant"]).all()
    order = np.argsort(-np.bincount(asked["model"], minlength=15), kind="stable")
    assert order[:6].tolist() == [0, 3, 6, 9, 12, 1]
    assert np.mean(small["model"] == ABSENT) == pytest.approx(0.2, abs=0.03)
    assert set(_of(schedule, "big")["model"].tolist()) == {15, 16, 17, 18}


def test_rows_lie_in_their_phases() -> None:
    """Phases follow each other with their silences; rows are in order of time."""
    schedule = schedule_of(scenario())
    assert schedule.phases == ((0, 20 * NS), (22 * NS, 32 * NS))
    at = schedule.planned["at"]
    assert (np.diff(at) >= 0).all()
    for number, (begin, end) in enumerate(schedule.phases):
        own = at[schedule.planned["phase"] == number]
        assert begin <= own.min()
        assert own.max() < end


def test_a_turn_has_the_earlier_ones_before_it() -> None:
    """Turns have one tenant, adapter and seed, each later and longer by the answer before and its own question."""
    talk = _of(schedule_of(scenario()), "big")
    numbers = np.unique(talk["conversation"])
    assert len(numbers) > 100
    for number in numbers[:50]:
        turns = talk[talk["conversation"] == number]
        assert turns["turn"].tolist() == list(range(len(turns)))
        assert len({(one["tenant"], one["model"], one["seed"]) for one in turns}) == 1
        assert (np.diff(turns["at"]) > 0).all()
        assert (np.diff(turns["prompt_tokens"]) > turns["output_tokens"][:-1]).all()
        assert turns["prompt_tokens"][0] > 100
    assert not talk["canary"].any()


def test_a_canary_has_an_answer_to_check() -> None:
    """The base model's has one too; none is aborted or has parameters of its own."""
    work = scenario().model_dump()["workloads"]
    work["short"]["parameters"] = [{"share": 0.5, "fields": {"temperature": 1}}]
    small = _of(schedule_of(scenario(workloads=work)), "small")
    canaries = small[small["canary"]]
    assert len(canaries) > 200
    assert set(canaries["model"] == ABSENT) == {False, True}
    assert (canaries["abort_after"] == ABSENT).all()
    assert (canaries["parameters"] == ABSENT).all()
    assert np.mean(small["parameters"] == 0) == pytest.approx(0.5, abs=0.05)
    assert np.mean(small["abort_after"] != ABSENT) == pytest.approx(0.1, abs=0.03)


def test_a_closed_loop_has_no_times() -> None:
    """Every caller has more requests than it can have answered."""
    planned = schedule_of(closed(4)).planned
    assert (planned["at"] == ABSENT).all()
    assert np.bincount(planned["caller"]).tolist() == [200] * 4


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    """Times and lengths of its rows, twice as fast where asked, up to the phase's end."""
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at_s": 3, "prompt_tokens": 30, "output_tokens": 3}\n'
        '{"at_s": 1, "prompt_tokens": 10, "output_tokens": 1}\n'
        '{"at_s": 9, "prompt_tokens": 90, "output_tokens": 9}\n'
    )
    law = {"law": "trace", "file": str(file), "speed": 2}
    of_trace = {"law": "trace"}
    replay = scenario(
        workloads={"replay": {"prompt_tokens": of_trace, "output_tokens": of_trace}},
        phases=[{"name": "a", "duration_s": 4, "load": [{"tenants": "big", "workload": "replay", "arrivals": law}]}],
    )
    planned = schedule_of(replay).planned
    assert planned["at"].tolist() == [0, NS]
    assert planned["prompt_tokens"].tolist() == [10, 30]
    assert planned["output_tokens"].tolist() == [1, 3]


def test_a_broken_trace_says_where(tmp_path: Path) -> None:
    """A row that lacks something is told by file and line; a file that is not there by its name."""
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 3, "prompt_tokens": 30, "output_tokens": 3}\n{"at_s": 4}\n')
    with pytest.raises(ScenarioInvalid, match=r"trace\.jsonl:2"):
        traces.read(file)
    with pytest.raises(ScenarioInvalid, match="absent"):
        arrivals(Trace(law="trace", file=tmp_path / "absent"), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("workload", "arrives", "fault"),
    [
        ({"prompt_tokens": {"law": "trace"}}, {"law": "poisson", "rate": 1}, "lengths of a trace"),
        (
            {"conversation": {"turns": {"law": "fixed", "value": 2}, "think_s": 1}},
            {"law": "closed", "callers": 1},
            "open loops",
        ),
        ({"parameters": [{"share": 0.6, "fields": {}}] * 2}, {"law": "poisson", "rate": 1}, "more than 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(workload: Any, arrives: Any, fault: str) -> None:
    """A scenario says so when it is read, not in the middle of a run."""
    load = {"tenants": "big", "workload": "w", "arrivals": arrives}
    with pytest.raises(ValueError, match=fault):
        scenario(workloads={"w": workload}, phases=[{"name": "a", "duration_s": 1, "load": [load]}])
