"""The figures of `training.metrics`, held to scikit-learn's and SciPy's."""

import json
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from training import metrics
from training.metrics import Scores, classification, exact_match, json_fields

EXACT = 1e-12
Average = str | None

labels = st.sampled_from(["refund", "delay", "praise", "other", "no such class"])
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=60)
objects = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0, 1, 2.5, "x", True, None]), max_size=4)


@given(pairs)
def test_classification_is_scikit_learns(found: list[tuple[str, str]]) -> None:
    """Accuracy, and precision, recall and F1 of each class, macro and micro, to the twelfth place."""
    expected, answers = [right for right, _ in found], [answer for _, answer in found]
    ours = classification(expected, answers)
    assert ours.accuracy == pytest.approx(accuracy_score(expected, answers), abs=EXACT)
    wanted = sorted(set(expected))
    for average, scores in (("macro", ours.macro), ("micro", ours.micro)):
        assert _three(scores) == pytest.approx(_sklearn(expected, answers, wanted, average), abs=EXACT)
    for label in wanted:
        assert _three(ours.by_class[label]) == pytest.approx(_sklearn(expected, answers, [label], "micro"), abs=EXACT)


def test_an_answer_outside_the_classes_is_wrong_but_no_class() -> None:
    """A model that talks instead of classifying must not dilute the macro average with classes nobody asked for."""
    found = classification(["a", "b"], ["a", "I think it is b"])
    assert set(found.by_class) == {"a", "b"}
    assert (found.accuracy, found.macro.f1, found.micro.precision) == (0.5, 0.5, 1.0)


@given(st.lists(st.tuples(objects, objects), min_size=1, max_size=30))
def test_the_f1_of_json_fields_is_scikit_learns(found: list[tuple[dict[str, object], dict[str, object]]]) -> None:
    """Over the set of (field, value) pairs of each answer, as a multi-label problem."""
    expected, answers = ([json.dumps(one) for one in side] for side in zip(*found, strict=True))
    ours = json_fields(expected, answers)
    sets = [
        [{(name, json.dumps(value)) for name, value in one.items()} for one in side]
        for side in zip(*found, strict=True)
    ]
    two_more = [[("", ""), ("", "-")]]  # columns without a hit or a miss: a single column would be read as two classes
    every = MultiLabelBinarizer().fit([*sets[0], *sets[1], *two_more])
    theirs = f1_score(every.transform(sets[0]), every.transform(sets[1]), average="micro", zero_division=0)
    assert ours.micro.f1 == pytest.approx(theirs, abs=EXACT)
    assert ours.exact == sum(right == answer for right, answer in zip(*sets, strict=True)) / len(found)


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        ('{"a": 1, "b": {"c": [1, 2]}}', 1.0),
        ('```json\n{"a": 1.0, "b": {"c": [1, 2]}}\n```', 1.0),  # the same number, and a fence
        ('{"a": true, "b": {"c": [1, 2]}}', 2 / 3),  # true is no 1
        ('{"a": 1, "b": {"c": [2, 1]}}', 1 / 3),  # a list has an order
        ('{"a": 1, "b": {}}', 2 / 5),
        ("[1]", 0.0),
        ("no JSON at all", 0.0),
        ("[" * 100_000, 0.0),  # deeper than the parser goes
    ],
)
def test_json_is_compared_by_its_leaves(answer: str, f1: float) -> None:
    """Each leaf counts once, by path and value, however the answer is written."""
    found = json_fields(['{"a": 1, "b": {"c": [1, 2]}}'], [answer])
    assert found.micro.f1 == pytest.approx(f1)
    assert found.exact == (f1 == 1.0)


def test_json_fields_are_told_apart_and_faults_are_counted() -> None:
    """Which field a model gets wrong is what its user wants to know."""
    found = json_fields(['{"name": "x", "age": 3}'] * 2, ['{"name": "x", "age": 4}', "sorry"])
    assert found.by_field["name"] == Scores(precision=1.0, recall=0.5, f1=2 / 3, support=2)
    assert found.by_field["age"].f1 == 0
    assert found.invalid == 0.5


def test_perplexity_is_the_exponent_of_the_mean_loss() -> None:
    """Of a fair die it is 6; a loss that no float holds the exponent of is infinite, not an error."""
    assert metrics.perplexity(60 * math.log(6), 60) == pytest.approx(6, abs=EXACT)
    assert metrics.perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="no tokens"):
        metrics.perplexity(0, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_the_test_of_right_answers_is_scipys(found: list[tuple[bool, bool]]) -> None:
    """McNemar's exact test is a binomial one on the examples where the two differ."""
    before, after = [old for old, _ in found], [new for _, new in found]
    lost = sum(old and not new for old, new in found)
    differ = sum(old != new for old, new in found)
    theirs = binomtest(lost, differ, alternative="greater").pvalue if differ else 1.0
    assert metrics.regression_of_rights(before, after).p_value == pytest.approx(theirs, abs=EXACT)


def test_a_regression_is_more_than_chance() -> None:
    """Four of forty lost is one; one lost and one won is none, nor is the better of two."""
    right = [True] * 40
    assert not metrics.regression_of_rights(right, [False, *right[1:]]).is_regression
    assert metrics.regression_of_rights(right, [False] * 5 + right[5:]).is_regression
    assert not metrics.regression_of_rights([False] * 5 + right[5:], right).is_regression

    chosen = random.Random(0)
    losses = [chosen.gauss(2, 0.5) for _ in range(50)]
    shaken = [loss + chosen.gauss(0, 0.1) for loss in losses]
    assert not metrics.regression_of_losses(losses, shaken).is_regression
    assert metrics.regression_of_losses(losses, [loss + 0.1 for loss in shaken]).is_regression
    assert metrics.regression_of_losses(losses, [loss + 1e-9 for loss in losses]).is_regression
    assert not metrics.regression_of_losses(losses, losses).is_regression


def test_nothing_to_score_is_an_error() -> None:
    """No examples must not read as 0 or 100 %, nor may answers be paired with others' questions."""
    for score in (exact_match, classification, json_fields):
        with pytest.raises(ValueError, match="no examples"):
            score([], [])
        with pytest.raises(ValueError, match="do not pair"):
            score(["{}"], [])
    with pytest.raises(ValueError, match="no JSON object"):
        json_fields(["[]"], ["{}"])


def _three(scores: Scores) -> tuple[float, float, float]:
    return scores.precision, scores.recall, scores.f1


def _sklearn(expected: Sequence[str], answers: Sequence[str], wanted: list[str], average: Average) -> tuple[float, ...]:
    found = precision_recall_fscore_support(expected, answers, labels=wanted, average=average, zero_division=0)
    return tuple(float(value) for value in found[:3])
