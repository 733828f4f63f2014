"""Gates can fail: for every metric and every kind of gate a run that must be red is, beside one that is green."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pytest
from pydantic import ValidationError

from loadtests import gates, metrics, points, report, results
from loadtests.gates import Judgement
from loadtests.recording import ABSENT, TIERS, Array, Event, Outcome, Run, VersionLife
from loadtests.scenario import Gate
from tests.unit.loadtests.runs import MS, S, Shape, run_of, with_gates

Change = Callable[[Array, Array], None]


@dataclass(frozen=True)
class Red:
    """What makes a gate red that is green on the run as it is."""

    gate: Mapping[str, Any]
    change: Change
    members: Mapping[str, Any] | None = None  # of both runs
    shape: Shape = field(default_factory=Shape)
    red_members: Mapping[str, Any] | None = None


def _slower(name: str, begin: str, ms: float) -> Change:
    def change(_planned: Array, rows: Array) -> None:
        rows[name][::10] = rows[begin][::10] + int(ms * MS)

    return change


def _end(outcome: Outcome, every: int = 4, status: int = 200) -> Change:
    def change(_planned: Array, rows: Array) -> None:
        rows["outcome"][::every], rows["status"][::every] = outcome, status
        rows["completion_tokens"][::every] = 0

    return change


def _set(name: str, value: int, every: int = 2) -> Change:
    def change(_planned: Array, rows: Array) -> None:
        rows[name][::every] = value

    return change


def _loads(_planned: Array, rows: Array) -> None:
    rows["tier"], rows["load_us"] = TIERS.index("cold"), 300_000


def _quick_loads(_planned: Array, rows: Array) -> None:
    rows["tier"], rows["load_us"] = TIERS.index("cold"), 30_000


def _starved(planned: Array, rows: Array) -> None:
    poor = planned["tenant"] == 0
    rows["outcome"][poor & (np.cumsum(poor) % 4 > 0)] = Outcome.REFUSED


def _out_for_5_s(_planned: Array, rows: Array) -> None:
    rows["outcome"][(rows["scheduled"] > 3 * S) & (rows["scheduled"] < 8 * S)] = Outcome.BROKEN


def _never_back(_planned: Array, rows: Array) -> None:
    rows["outcome"][rows["scheduled"] > 3 * S] = Outcome.BROKEN


def _none(_planned: Array, _rows: Array) -> None:
    pass


def _aborted(_planned: Array, rows: Array) -> None:
    rows["outcome"][::2] = Outcome.ABORTED


def _stretched(_planned: Array, rows: Array) -> None:
    rows["last"] = rows["done"] = rows["first"] + 4 * 100 * MS


def _cached(count: int) -> Change:
    return lambda planned, rows: _set("cached_tokens", count, 1)(planned, rows)


def _late_sends(planned: Array, rows: Array) -> None:
    for name in ("sent", "headers", "first", "last", "done"):
        rows[name] += 80 * MS


def _other_answer(_planned: Array, rows: Array) -> None:
    canaries = np.flatnonzero(rows["answer"] > 0)
    rows["answer"][canaries[0]] = rows["answer"][canaries[rows["answer"][canaries] != rows["answer"][canaries[0]]][0]]


def _one_adapter(planned: Array, rows: Array) -> None:
    planned["tenant"] = planned["model"] = 0
    rows["version"] = 2
    rows["answer"] = np.where(rows["answer"] > 0, rows["answer"].min(initial=9, where=rows["answer"] > 0), ABSENT)


KILL: Final = Event(3 * S, "kill-replica", "replica-0")
REDS: Final = {
    "ttft_ms.p95": Red({"at_most": 60}, _slower("first", "scheduled", 500)),
    "response_ms.p95": Red({"at_most": 100}, _slower("done", "scheduled", 500)),
    "service_ttft_ms.p95": Red({"at_most": 60}, _slower("first", "sent", 500)),
    "service_ms.max": Red({"at_most": 100}, _slower("done", "sent", 500)),
    "itl_ms.p50": Red({"at_most": 20}, _none, red_members={"itl_ms": 30.0}),
    "tpot_ms.mean": Red({"at_most": 20}, _stretched),
    "queue_ms.p90": Red({"at_most": 1}, _set("queue_us", 40_000)),
    "load_ms.p99": Red({"at_most": 100}, _loads, shape=Shape(adapters=1)),
    "lateness_ms.p99": Red({"at_most": 5}, _late_sends),
    "rate": Red({"at_least": 18}, _end(Outcome.TIMEOUT)),
    "offered_rate": Red({"at_least": 18}, _none, red_members={"rate": 10.0}),
    "goodput": Red({"at_least": 19}, _slower("first", "scheduled", 2_000)),
    "goodput_share": Red({"at_least": 0.95}, _slower("first", "scheduled", 2_000)),
    "tokens_per_s": Red({"at_least": 90}, _end(Outcome.ERROR_EVENT)),
    "prompt_tokens_per_s": Red({"at_least": 600}, _set("prompt_tokens", 0)),
    "error_share": Red({"at_most": 0.0}, _end(Outcome.TRUNCATED, every=150)),
    "refused_share": Red({"at_most": 0.1}, _end(Outcome.REFUSED, status=429)),
    "requests.sent": Red({"at_least": 200}, _end(Outcome.UNSENT)),
    "requests.whole": Red({"at_least": 200}, _end(Outcome.BROKEN)),
    "requests.failed": Red({"at_most": 0}, _end(Outcome.STATUS, every=150, status=500)),
    "requests.refused": Red({"at_most": 0}, _end(Outcome.REFUSED, every=150, status=503)),
    "requests.aborted": Red({"at_most": 0}, _aborted),
    "tokens.prompt": Red({"at_least": 6_400}, _set("prompt_tokens", 0)),
    "tokens.completion": Red({"at_least": 1_000}, _set("completion_tokens", 0)),
    "cached_share": Red({"at_least": 0.4}, _cached(2)),
    "wrong_adapter": Red({"at_most": 0}, _other_answer),
    "adapters": Red({"at_least": 4}, _one_adapter),
    "hit_ratio": Red({"at_least": 0.9}, _set("tier", TIERS.index("cold"))),
    "hit_ratio.predicted": Red({"at_least": 0.9}, _none, red_members={"adapters": 16}),
    "hit_ratio.lru": Red({"at_least": 0.9}, _none, red_members={"adapters": 16}),
    "hit_ratio.to_predicted": Red({"at_least": 0.9}, _set("tier", TIERS.index("host"))),
    "fairness.jain": Red({"at_least": 0.95}, _starved),
    "fairness.least_share": Red({"at_least": 0.8}, _starved),
    "recovery_s": Red({"at_most": 2}, _out_for_5_s, members={"events": (KILL,)}),
    "actions.failed": Red(
        {"at_most": 0},
        _none,
        members={"events": (KILL,)},
        red_members={"events": (replace(KILL, error="no such replica"),)},
    ),
}
GREEN_CHANGES: Final[Mapping[str, Change]] = {"cached_share": _cached(16), "load_ms.p99": _quick_loads}


def _run(red: Red, metric: str, *, broken: bool) -> Run:
    told = {**(red.members or {}), **((red.red_members or {}) if broken else {})}
    of_shape = {name: told.pop(name) for name in list(told) if name in Shape.__dataclass_fields__}
    change = red.change if broken else GREEN_CHANGES.get(metric, _none)
    gate = {"metric": metric, **red.gate}
    return run_of(replace(red.shape, **of_shape), gates=[gate], change=change, **told)


def _only(run: Run, baseline: Run | None = None) -> gates.Verdict:
    return gates.judge(run, baseline)[1]


@pytest.mark.parametrize("metric", REDS)
def test_every_metric_can_be_red(metric: str) -> None:
    """A run as it should be keeps the gate, and one with that fault alone does not."""
    green, red = (_run(REDS[metric], metric, broken=broken) for broken in (False, True))
    assert _only(green).judgement is Judgement.PASS, _only(green)
    assert gates.exit_code(gates.judge(green), green) == gates.PASSED
    assert _only(red).judgement is Judgement.FAIL, _only(red)
    assert gates.exit_code(gates.judge(red), red) == gates.FAILED


def test_no_metric_is_left_out() -> None:
    """Each has its run above that must be red."""
    assert {metrics.split(one)[0] or one for one in REDS} == {*metrics.SCALARS, *metrics.TIMES}


def test_a_ratio_to_a_phase_of_the_same_run_can_be_red() -> None:
    """The quiet tenants' wait during a flood over their wait before it."""

    def flood(planned: Array, rows: Array) -> None:
        rows["first"][(planned["phase"] == 1) & (planned["tenant"] > 0)] += 100 * MS

    gate = {"metric": "ttft_ms.p50", "phase": "flood", "tenants": "quiet", "ratio_to_phase": "calm", "at_most": 1.5}
    shape = Shape(phases=("calm", "flood"), groups={"loud": 1, "quiet": 2})
    assert _only(run_of(shape, gates=[gate])).judgement is Judgement.PASS
    verdict = _only(run_of(shape, gates=[gate], change=flood))
    assert verdict.judgement is Judgement.FAIL
    assert verdict.value == pytest.approx(3)
    assert verdict.gate == "ttft_ms.p50 in flood of quiet ≤ 1.5 × that of calm"
    loud = gate | {"tenants": "loud"}
    assert _only(run_of(shape, gates=[loud], change=flood)).judgement is Judgement.PASS


def test_a_ratio_to_other_tenants_can_be_red() -> None:
    """One group is served more slowly than another."""

    def slower(planned: Array, rows: Array) -> None:
        rows["first"][planned["tenant"] == 0] += 100 * MS

    gate = {"metric": "ttft_ms.p50", "tenants": "small", "ratio_to_tenants": "large", "at_most": 1.2}
    shape = Shape(groups={"small": 1, "large": 1})
    assert _only(run_of(shape, gates=[gate])).judgement is Judgement.PASS
    assert _only(run_of(shape, gates=[gate], change=slower)).judgement is Judgement.FAIL


def _spread(scale: float, seed: int) -> Change:
    def change(_planned: Array, rows: Array) -> None:
        waits = np.random.default_rng(seed).lognormal(math.log(50 * scale), 0.5, len(rows))
        for name in ("last", "done"):
            rows[name] += (waits * MS).astype("i8") - 50 * MS
        rows["first"] = rows["sent"] + (waits * MS).astype("i8")

    return change


def test_a_regression_is_red_only_where_it_is_not_chance() -> None:
    """Twice as slow as the baseline fails, the same passes, and a little more with few requests is inconclusive."""
    gate = {"metric": "ttft_ms.p90", "ratio_to_baseline": True, "at_most": 1.2}
    shape = Shape(rate=50)
    before = run_of(shape, change=_spread(1, 1))
    same, twice = (run_of(shape, gates=[gate], change=_spread(scale, 2)) for scale in (1, 2))
    assert _only(same, before).judgement is Judgement.PASS
    verdict = _only(twice, before)
    assert verdict.judgement is Judgement.FAIL
    assert verdict.interval is not None
    assert verdict.interval[0] > 1.2
    short = Shape(rate=6)
    unsure = _only(run_of(short, gates=[gate], change=_spread(1.2, 2)), run_of(short, change=_spread(1, 1)))
    assert unsure.judgement is Judgement.INCONCLUSIVE
    assert "chance" in unsure.reason


def test_a_gate_against_a_baseline_without_one_is_not_green() -> None:
    """Nobody said what to compare with."""
    run = run_of(gates=[{"metric": "goodput", "ratio_to_baseline": True, "at_least": 0.9}])
    assert gates.exit_code(gates.judge(run), run) == gates.INCONCLUSIVE


def test_a_baseline_that_proves_nothing_is_not_compared_with() -> None:
    """One that was late or broken off, and one of another load."""
    run = run_of(gates=[{"metric": "goodput", "ratio_to_baseline": True, "at_least": 0.1}])
    assert _only(run, run).judgement is Judgement.PASS
    for baseline, why in (
        (run_of(change=_late_sends), "late"),
        (run_of(unfinished="it was interrupted"), "interrupted"),
        (run_of(Shape(rate=30.0)), "another load: its phases"),
    ):
        verdict = _only(run, baseline)
        assert verdict.judgement is Judgement.INCONCLUSIVE
        assert why in verdict.reason


def test_a_late_generator_is_inconclusive_but_a_wrong_adapter_stays_a_failure() -> None:
    """Exit 3 where only times were judged; what the server did wrong it did."""
    timed, mixed = {"metric": "ttft_ms.p50", "at_most": 1}, {"metric": "wrong_adapter", "at_most": 0}

    def late_and_mixed(planned: Array, rows: Array) -> None:
        _late_sends(planned, rows)
        _other_answer(planned, rows)

    run = run_of(gates=[timed, mixed], change=_late_sends)
    verdicts = gates.judge(run)
    assert [one.judgement for one in verdicts] == ["inconclusive", "inconclusive", "pass"]
    assert verdicts[1].reason.startswith("The generator was late in only: it sent 80 ms after its time at p99")
    assert gates.exit_code(verdicts, run) == gates.INCONCLUSIVE
    red = run_of(gates=[timed, mixed], change=late_and_mixed)
    assert gates.exit_code(gates.judge(red), red) == gates.FAILED


def test_lateness_is_judged_where_it_was() -> None:
    """One in 150 of a run, all in one phase and of one group: only gates on these, or held against them, are open."""

    def few_late(planned: Array, rows: Array) -> None:
        late = np.flatnonzero((planned["phase"] == 1) & (planned["tenant"] == 0))[:8]
        rows["sent"][late] += 80 * MS

    def gate(phase: str, tenants: str, **more: Any) -> Mapping[str, Any]:
        return {"metric": "ttft_ms.p50", "phase": phase, "tenants": tenants, "at_most": 60, **more}

    told = [
        gate("calm", "loud"),
        gate("busy", "quiet"),
        gate("busy", "loud"),
        gate("calm", "loud", ratio_to_phase="busy"),
        gate("busy", "quiet", ratio_to_tenants="loud"),
        {"metric": "ttft_ms.p50", "at_most": 60},
        {"metric": "lateness_ms.p99", "phase": "busy", "at_most": 20},
    ]
    shape = Shape(phases=("calm", "busy"), groups={"loud": 1, "quiet": 1}, rate=30)
    run = run_of(shape, gates=told, change=few_late)
    judged = ["pass", "pass", *["inconclusive"] * 4, "fail"]
    assert [one.judgement for one in gates.judge(run)] == ["inconclusive", *judged]


def test_a_closed_loop_dilutes_no_lateness() -> None:
    """Its requests have no time to be late for, however many they are."""

    def mostly_closed(planned: Array, rows: Array) -> None:
        planned["at"][5:], planned["caller"][5:] = ABSENT, 0
        rows["sent"][:5] += 80 * MS

    assert "was late in only" in gates.doubts_of(run_of(Shape(rate=100), change=mostly_closed))[0]


@pytest.mark.parametrize(
    ("members", "change"),
    [({"unfinished": "stopped by the operator"}, _none), ({}, _end(Outcome.UNSENT, every=50))],
    ids=["stopped", "unsent"],
)
def test_an_unfinished_schedule_is_inconclusive(members: Mapping[str, Any], change: Change) -> None:
    """However well what was played went."""
    run = run_of(change=change, **members)
    verdicts = gates.judge(run)
    assert verdicts[1].judgement is Judgement.PASS
    assert gates.exit_code(verdicts, run) == gates.INCONCLUSIVE


def test_what_a_closed_loop_had_no_time_for_is_no_doubt() -> None:
    """Its callers have more to ask than can be answered; the rest was neither offered nor left out."""

    def closed(planned: Array, rows: Array) -> None:
        planned["at"], planned["caller"] = ABSENT, 0
        _end(Outcome.UNSENT, every=2)(planned, rows)

    run = run_of(change=closed)
    assert gates.doubts_of(run) == []
    assert metrics.figure(run, "offered_rate").value == pytest.approx(10)
    assert metrics.figure(run, "offered_rate").samples == 100
    assert points.points_of(run)[0].offered == pytest.approx(10)
    assert results.errors(run) == {}
    assert "100 requests" in report.page(run, gates.judge(run), "")


def test_too_few_samples_are_inconclusive() -> None:
    """Fewer than the gate says, or than a percentile needs to have one beyond it."""
    few = run_of(Shape(rate=1.5), gates=[{"metric": "error_share", "at_most": 0}])
    assert _only(few).judgement is Judgement.INCONCLUSIVE
    enough = with_gates(few, {"metric": "error_share", "at_most": 0, "samples": 10})
    assert _only(enough).judgement is Judgement.PASS
    tail = run_of(Shape(rate=9), gates=[{"metric": "ttft_ms.p99", "at_most": 1_000}])
    assert _only(tail).reason == "90 samples are too few: it needs 100."


def test_what_nothing_tells_is_inconclusive() -> None:
    """A recovery time without a disturbance, wrong answers without known versions."""
    run = run_of(gates=[{"metric": "recovery_s", "at_most": 9}, {"metric": "wrong_adapter", "at_most": 0}], versions=())
    assert [one.judgement for one in gates.judge(run)[1:]] == [Judgement.INCONCLUSIVE] * 2


def test_a_server_that_never_recovers_fails() -> None:
    """Its recovery time is infinite, not unknown."""
    run = run_of(gates=[{"metric": "recovery_s", "at_most": 9}], change=_never_back, events=(KILL,))
    verdict = _only(run)
    assert (verdict.judgement, verdict.value) == (Judgement.FAIL, math.inf)


def test_a_version_that_the_alias_had_left_is_wrong_only_after_it_had() -> None:
    """An answer of the old version is right while the publication ran, and wrong for a request sent after it."""
    run = run_of(gates=[{"metric": "wrong_adapter", "at_most": 0}])
    for until, wrong in ((ABSENT, 0), (5 * S, 1)):
        lives = tuple(replace(one, until=until) if one.model == "adapter-0" else one for one in run.versions)
        lives += tuple(
            VersionLife(one.tenant, "adapter-0", f"new-{one.digest}", 4 * S, ABSENT, None)
            for one in run.versions
            if one.model == "adapter-0"
        )
        found = metrics.figure(replace(run, versions=lives), "wrong_adapter").value
        after = (run.samples.rows["sent"] > 5 * S) & (run.schedule.planned["model"] == 0)
        assert found == wrong * after.sum()


def test_an_lru_cache_is_simulated_for_each_run_anew() -> None:
    """What one run had in its slots says nothing of another, and phases go on with what was there."""
    few, many = (run_of(Shape(adapters=count, phases=("first", "second"))) for count in (1, 16))
    for run, least, most in ((few, 0.98, 1.0), (many, 0.0, 0.3), (few, 0.98, 1.0)):
        assert least <= metrics.figure(run, "hit_ratio.lru").value <= most
    assert metrics.figure(few, "hit_ratio.lru", phase="second").value == 1


def test_a_404_of_a_deleted_adapter_is_no_error() -> None:
    """Before the deletion it would be one."""

    def change(planned: Array, rows: Array) -> None:
        at = (planned["model"] == 0) & (rows["sent"] > 6 * S)
        rows["outcome"][at], rows["status"][at], rows["version"][at] = Outcome.STATUS, 404, 0

    run = run_of(change=change)
    deleted = tuple(replace(one, until=5 * S) if one.model == "adapter-0" else one for one in run.versions)
    assert metrics.figure(run, "error_share").value > 0
    assert metrics.figure(replace(run, versions=deleted), "error_share").value == 0


def test_a_404_while_the_deletion_ran_is_no_error() -> None:
    """Nor is an answer of the version: the server may have done it at any time until it said so."""

    def change(planned: Array, rows: Array) -> None:
        at = (planned["model"] == 0) & (rows["sent"] > 6 * S)
        rows["outcome"][at], rows["status"][at], rows["version"][at] = Outcome.STATUS, 404, 0

    def left(leaving: int) -> Run:
        lives = (
            replace(one, until=8 * S, leaving=leaving) if one.model == "adapter-0" else one for one in run.versions
        )
        return replace(run, versions=tuple(lives))

    run = run_of(change=change)
    assert metrics.figure(left(ABSENT), "error_share").value > 0
    assert metrics.figure(left(3 * S), "error_share").value == 0
    assert metrics.figure(left(3 * S), "wrong_adapter").value == 0


def test_a_base_request_answered_by_an_adapter_is_wrong() -> None:
    """And one answered by the base model is not."""
    right = run_of(Shape(adapters=0))
    assert metrics.figure(right, "wrong_adapter").value == 0
    mixed = run_of(Shape(adapters=0), change=_set("version", 2))
    assert metrics.figure(mixed, "wrong_adapter").value == 100


def test_a_request_that_timed_out_counts_with_the_time_it_waited() -> None:
    """Else a server that answers nobody would have the best percentiles."""

    def change(_planned: Array, rows: Array) -> None:
        rows["outcome"][::2], rows["first"][::2] = Outcome.TIMEOUT, ABSENT
        rows["done"][::2] = rows["sent"][::2] + 9 * S

    assert metrics.figure(run_of(change=change), "ttft_ms.p90").value == 9_000


def test_a_stream_that_timed_out_later_had_its_first_token_when_it_came() -> None:
    """Only its end is as late as its time limit."""

    def change(_planned: Array, rows: Array) -> None:
        rows["outcome"][::2], rows["done"][::2] = Outcome.TIMEOUT, rows["sent"][::2] + 9 * S

    run = run_of(change=change)
    told = metrics.figure(run, "ttft_ms.max")
    assert (told.value, told.samples) == (50, len(run.samples.rows))
    assert metrics.figure(run, "response_ms.max").value == 9_000


def test_a_request_that_waits_for_its_time_limit_makes_no_phase_longer() -> None:
    """Rates are of the time in which answers came."""

    def stuck(_planned: Array, rows: Array) -> None:
        rows["outcome"][0], rows["done"][0] = Outcome.TIMEOUT, 70 * S

    def worked_off(_planned: Array, rows: Array) -> None:
        rows["done"][0] = 20 * S

    assert metrics.figure(run_of(change=stuck), "rate").value == pytest.approx(19.9, rel=0.02)
    assert metrics.figure(run_of(change=worked_off), "rate").value == pytest.approx(10)
    for run in (run_of(change=stuck), run_of(change=worked_off)):
        (point,) = points.points_of(run)
        assert [point.rate, point.goodput] == [metrics.figure(run, name).value for name in ("rate", "goodput")]


def test_a_step_of_a_phase_lasts_until_its_own_last_answer() -> None:
    """What is worked off after it was not done within it, and does not make the other steps longer."""

    def worked_off(_planned: Array, rows: Array) -> None:
        rows["done"][np.flatnonzero(rows["scheduled"] < 5 * S)[0]] = 10 * S

    run = run_of(change=worked_off)
    steps = {"law": "steps", "rates": [20, 20]}
    run.scenario["phases"][0]["load"][0]["arrivals"] = steps
    first, second = points.points_of(run)
    assert first.offered == pytest.approx(2 * first.rate)
    assert second.offered == pytest.approx(second.rate, rel=0.02)


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": "ttft_ms", "at_most": 1},
        {"metric": "ttft_ms.p9", "at_most": 1},
        {"metric": "ttft_ms.p00", "at_most": 1},
        {"metric": "ttft_ms.p100", "at_most": 1},
        {"metric": "ttft_ms.p990", "at_most": 1},
        {"metric": "speed.p99", "at_most": 1},
        {"metric": "rate"},
        {"metric": "rate", "at_least": 1, "ratio_to_phase": "calm", "ratio_to_baseline": True},
    ],
)
def test_a_gate_that_means_nothing_is_refused(gate: Mapping[str, Any]) -> None:
    """When the scenario is read, not after the run."""
    with pytest.raises(ValidationError):
        Gate.model_validate(gate)


def test_a_ratio_to_nothing_is_inconclusive() -> None:
    """Any goodput is four fifths of none; errors where there were none before are still more."""

    def calm_fails(planned: Array, rows: Array) -> None:
        rows["outcome"][planned["phase"] == 0] = Outcome.STATUS

    def all_fail(_planned: Array, rows: Array) -> None:
        rows["outcome"] = Outcome.STATUS

    def busy_fails(planned: Array, rows: Array) -> None:
        rows["outcome"][planned["phase"] == 1] = Outcome.STATUS

    shape = Shape(phases=("calm", "busy"))
    kept = {"metric": "goodput", "phase": "busy", "ratio_to_phase": "calm", "at_least": 0.8}
    for change in (calm_fails, all_fail):
        assert _only(run_of(shape, gates=[kept], change=change)).judgement is Judgement.INCONCLUSIVE
    more = {"metric": "error_share", "phase": "busy", "ratio_to_phase": "calm", "at_most": 1}
    assert _only(run_of(shape, gates=[more])).judgement is Judgement.PASS
    assert _only(run_of(shape, gates=[more], change=busy_fails)).judgement is Judgement.FAIL
