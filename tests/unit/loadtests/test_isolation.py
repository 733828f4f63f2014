"""What is seen of wrong adapters, and where it is said that nothing could be seen."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from loadtests import gates, isolation, metrics, report, results
from loadtests.gates import Judgement
from loadtests.recording import ABSENT, Array, Outcome, Run
from tests.unit.loadtests.runs import Shape, run_of

GATE = {"metric": "wrong_adapter", "at_most": 0}
SEVERAL = Shape(adapters=2)


def _alike(run: Run) -> Run:
    """As a server that ignores adapters answers: every version alike, before the run and in it."""
    answers = run.samples.rows["answer"]
    answers[answers != ABSENT] = answers.max()
    text = run.samples.texts[answers.max()]
    return replace(run, versions=tuple(replace(one, answer=text) for one in run.versions))


def _verdict(run: Run) -> gates.Verdict:
    return gates.judge(run)[1]


def test_a_server_that_ignores_adapters_is_not_green() -> None:
    """Its headers are right and all its canaries are as they were learned."""
    run = run_of(SEVERAL, gates=[GATE])
    assert _verdict(run).judgement is Judgement.PASS
    verdict = _verdict(_alike(run))
    assert verdict.judgement is Judgement.INCONCLUSIVE
    assert verdict.reason == "The answers known of 4 of 4 adapters are not two different ones."


def test_answers_nobody_learned_are_not_green() -> None:
    """A canary that is compared with nothing proves nothing, also where there is one adapter."""
    for shape, reason in (
        (SEVERAL, "The answers known of 0 of 4 adapters are not two different ones."),
        (Shape(groups={"all": 1}, adapters=1), "None of 40 canaries was answered by a version whose answer is known."),
    ):
        run = run_of(shape, gates=[GATE])
        unknown = replace(run, versions=tuple(replace(one, answer=None) for one in run.versions))
        assert _verdict(run).judgement is Judgement.PASS
        assert (_verdict(unknown).judgement, _verdict(unknown).reason) == (Judgement.INCONCLUSIVE, reason)


def test_a_mix_up_that_is_seen_fails_though_not_all_could_be() -> None:
    """What one witness saw does not need the other."""
    run = _alike(run_of(SEVERAL, gates=[GATE]))
    run.samples.rows["version"][:] = 2
    assert _verdict(run).judgement is Judgement.FAIL


def test_a_scenario_without_canaries_believes_the_headers() -> None:
    """As it has chosen."""

    def change(planned: Array, rows: Array) -> None:
        planned["canary"], rows["answer"] = False, ABSENT

    run = run_of(SEVERAL, gates=[GATE], change=change)
    assert _verdict(run).judgement is Judgement.PASS
    assert "in headers alone" in report.page(run, gates.judge(run), "")


@pytest.mark.parametrize("adapters", [0, 2], ids=["base", "adapters"])
def test_an_answer_without_a_version_is_wrong(adapters: int) -> None:
    """It says nothing of who gave it."""

    def change(_planned: Array, rows: Array) -> None:
        rows["version"][:3] = 0

    assert metrics.figure(run_of(Shape(adapters=adapters), change=change), "wrong_adapter").value == 3


def _cut_short(text: Callable[[str], str]) -> tuple[Run, int]:
    run = run_of(SEVERAL)
    rows, texts = run.samples.rows, run.samples.texts
    cut = np.flatnonzero(rows["answer"] != ABSENT)[::2]
    rows["outcome"][cut] = np.resize(
        [Outcome.TRUNCATED, Outcome.ERROR_EVENT, Outcome.TIMEOUT, Outcome.ABORTED], len(cut)
    )
    shorter = tuple(text(one) for one in texts)
    rows["answer"][cut] += len(texts)
    return replace(run, samples=replace(run.samples, texts=texts + shorter)), len(cut)


def test_what_came_of_an_answer_that_broke_off_is_judged() -> None:
    """It is how the known one begins, or another's."""
    right, _ = _cut_short(lambda text: text[:9])
    assert metrics.figure(right, "wrong_adapter").value == 0
    wrong, count = _cut_short(lambda text: f"{text[:9]} another")
    assert metrics.figure(wrong, "wrong_adapter").value == count


def test_an_answer_that_broke_off_is_of_a_version_that_lived() -> None:
    """However it ended."""

    def change(_planned: Array, rows: Array) -> None:
        rows["outcome"], rows["version"] = Outcome.ERROR_EVENT, 1
        rows["answer"] = ABSENT

    run = run_of(SEVERAL, change=change)
    assert metrics.figure(run, "wrong_adapter").value == len(run.samples.rows)


def test_it_is_told_how_many_canaries_were_compared() -> None:
    """In the report and the summary."""
    run = run_of(SEVERAL)
    some = replace(run, versions=(replace(run.versions[0], answer=None), *run.versions[1:]))
    told = isolation.canaries(some)
    first = int(((run.samples.rows["answer"] != ABSENT) & (run.samples.rows["version"] == 2)).sum())
    assert first > 0
    assert told == isolation.Canaries(40, 40 - first, of_base=0, adapters=4, known=3, distinct=3)
    assert results.summary(some, gates.judge(some))["canaries"]["compared"] == 40 - first
    assert f"{40 - first} were compared" in report.page(some, gates.judge(some), "")


def _base_asked(run: Run, answers: tuple[str, ...], base_answer: str | None) -> Run:
    """Every fifth request is a canary, whose answers are these in turn."""
    rows, texts = run.samples.rows, run.samples.texts
    asked = np.flatnonzero(run.schedule.planned["canary"])
    rows["answer"][asked] = len(texts) + np.arange(len(asked)) % len(answers)
    return replace(run, samples=replace(run.samples, texts=texts + answers), base_answer=base_answer)


def test_another_answer_than_the_base_models_is_wrong() -> None:
    """Though the headers say that it is the base model's; and where that is not known, nothing was seen."""
    run = run_of(Shape(adapters=0), gates=[GATE])
    right = _base_asked(run, ("violet", "violet"), "violet")
    assert _verdict(right).judgement is Judgement.PASS
    assert "40 of them with the base model&#x27;s" in report.page(right, gates.judge(right), "")
    mixed = _base_asked(run, ("violet", "I am 616c6c"), "violet")
    assert metrics.figure(mixed, "wrong_adapter").value == 20
    assert _verdict(mixed).judgement is Judgement.FAIL
    unknown = _base_asked(run, ("violet", "I am 616c6c"), None)
    assert _verdict(unknown).reason == "None of 40 canaries was answered by a version whose answer is known."


def test_an_only_adapter_that_answers_as_the_base_model_shows_nothing() -> None:
    """A server that ignores adapters answers so."""
    run = run_of(Shape(groups={"all": 1}, adapters=1), gates=[GATE])
    assert _verdict(replace(run, base_answer="another")).judgement is Judgement.PASS
    alike = replace(run, base_answer=run.versions[0].answer)
    assert _verdict(alike).reason == "The answer known of the adapter is the base model's."
