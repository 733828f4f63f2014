"""How good answers are: exact match, classification, JSON fields, perplexity, and whether the newer is worse.

From the answers alone, so there is no torch here. Each figure is defined as scikit-learn defines it (1.9,
`zero_division=0`), and tests hold it to that.
"""

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

Path = tuple[str | int, ...]
Field = tuple[Path, Hashable]

SIGNIFICANCE = 0.05  # how often a difference that is chance alone may be called a regression


@dataclass(frozen=True, slots=True)
class Scores:
    """`support`: how many of them were expected."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Classification:
    """One label an answer. `macro` weighs classes equally, `micro` answers."""

    accuracy: float
    macro: Scores
    micro: Scores
    by_class: Mapping[str, Scores]


@dataclass(frozen=True, slots=True)
class JsonFields:
    """An object an answer, taken as its leaves. `invalid`: share of the answers that are no JSON object.

    `by_field` is by the leaf's path, its list positions left out.
    """

    micro: Scores
    exact: float
    invalid: float
    by_field: Mapping[str, Scores]


@dataclass(frozen=True, slots=True)
class Regression:
    """The newer one beside the older on the same examples; `p_value` of the newer being no worse."""

    before: float
    after: float
    p_value: float

    @property
    def is_regression(self) -> bool:
        """Worse by more than chance explains."""
        return self.p_value < SIGNIFICANCE


def exact_match(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Share of the answers that are right word for word; white space around them is forgiven.

    Raises ValueError: no examples, or not as many answers.
    """
    return _share(rights(expected, answers))


def rights(expected: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Which answers are right word for word. Raises ValueError as above."""
    _check(expected, answers)
    return [answer.strip() == right.strip() for right, answer in zip(expected, answers, strict=True)]


def classification(
    expected: Sequence[str], answers: Sequence[str], classes: Sequence[str] | None = None
) -> Classification:
    """Over `classes`, or those that are expected: any other answer is wrong, and no class of its own.

    Raises ValueError: no examples, or not as many answers.
    """
    _check(expected, answers)
    pairs = [(right.strip(), answer.strip()) for right, answer in zip(expected, answers, strict=True)]
    wanted, given = Counter(right for right, _ in pairs), Counter(answer for _, answer in pairs)
    hits = Counter(right for right, answer in pairs if right == answer)
    labels = sorted(wanted) if classes is None else list(dict.fromkeys(classes))
    by_class = {label: _scores(hits[label], given[label], wanted[label]) for label in labels}
    totals = (sum(counts[label] for label in labels) for counts in (hits, given, wanted))
    return Classification(hits.total() / len(pairs), _macro(by_class), _scores(*totals), by_class)


def json_fields(expected: Sequence[str], answers: Sequence[str]) -> JsonFields:
    """F1 over the leaves of objects: a leaf is hit where path and value are the same. An answer may be in a code fence.

    Raises ValueError: no examples, not as many answers, or what is expected is no JSON object.
    """
    _check(expected, answers)
    found = [_object(answer) for answer in answers]
    wants = [_leaves(_expected_object(right)) for right in expected]
    gives = [Counter[Field]() if answer is None else _leaves(answer) for answer in found]
    hits = [want & give for want, give in zip(wants, gives, strict=True)]
    counts = [_by_name(some) for some in (hits, gives, wants)]
    names = sorted(counts[1].keys() | counts[2].keys())
    return JsonFields(
        micro=_scores(*(count.total() for count in counts)),
        exact=_share([want == give for want, give in zip(wants, gives, strict=True)]),
        invalid=_share([answer is None for answer in found]),
        by_field={name: _scores(*(count[name] for count in counts)) for name in names},
    )


def is_object(text: str) -> bool:
    """Whether this is one JSON object, in a code fence or not."""
    return _object(text) is not None


def perplexity(loss_sum: float, tokens: int) -> float:
    """Of so many tokens whose cross entropy, in nats, adds up to `loss_sum`; infinite where no float holds it.

    Raises ValueError: no tokens.
    """
    if tokens <= 0:
        raise ValueError("no tokens to score")
    try:
        return math.exp(loss_sum / tokens)
    except OverflowError:
        return math.inf


def regression_of_rights(before: Sequence[bool], after: Sequence[bool]) -> Regression:
    """McNemar's exact one-sided test on the examples that only one of the two gets right.

    Raises ValueError: no examples, or not the same number.
    """
    _check(before, after)
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    return Regression(_share(before), _share(after), _binomial_tail(lost, lost + won))


def regression_of_losses(before: Sequence[float], after: Sequence[float]) -> Regression:
    """A paired z-test on each example's mean loss: higher is worse.

    Raises ValueError: fewer than two examples, or not the same number.
    """
    _check(before, after)
    if len(before) < 2:
        raise ValueError("two examples are the least that tell a difference from chance")
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    p_value = 1 - NormalDist().cdf(mean / error) if error > 0 else float(mean <= 0)
    return Regression(math.fsum(before) / len(before), math.fsum(after) / len(after), p_value)


def _check(one: Sequence[object], other: Sequence[object]) -> None:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} examples and {len(other)} answers do not pair")
    if not one:
        raise ValueError("no examples to score")


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def _scores(hits: int, given: int, wanted: int) -> Scores:
    return Scores(
        precision=hits / given if given else 0.0,
        recall=hits / wanted if wanted else 0.0,
        f1=2 * hits / (given + wanted) if given + wanted else 0.0,
        support=wanted,
    )


def _macro(by_class: Mapping[str, Scores]) -> Scores:
    every = list(by_class.values())

    def mean(values: Iterator[float]) -> float:
        return math.fsum(values) / len(every) if every else 0.0

    return Scores(
        precision=mean(one.precision for one in every),
        recall=mean(one.recall for one in every),
        f1=mean(one.f1 for one in every),
        support=sum(one.support for one in every),
    )


def _expected_object(text: str) -> dict[str, object]:
    found = _object(text)
    if found is None:
        raise ValueError(f"what is expected is no JSON object: {text[:80]!r}")
    return found


def _object(text: str) -> dict[str, object] | None:
    try:
        found = json.loads(_unfenced(text))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unfenced(text: str) -> str:
    """Without a Markdown fence around all of it, which many models write though they are not asked to."""
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text


def _leaves(found: dict[str, object]) -> Counter[Field]:
    """Empty objects and lists are leaves too: leaving one out must count."""
    leaves: Counter[Field] = Counter()
    stack: list[tuple[Path, object]] = [((), found)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict) and (value or not path):
            stack.extend(((*path, name), part) for name, part in value.items())
        elif isinstance(value, list) and value:
            stack.extend(((*path, place), part) for place, part in enumerate(value))
        else:
            leaves[path, _comparable(value)] += 1
    return leaves


def _comparable(value: object) -> Hashable:
    """1 and 1.0 are the same number, `true` is none."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float | str) or value is None:
        return value
    return ("empty", type(value).__name__)


def _by_name(leaves: Sequence[Counter[Field]]) -> Counter[str]:
    names: Counter[str] = Counter()
    for some in leaves:
        for (path, _), count in some.items():
            names[".".join(part for part in path if isinstance(part, str))] += count
    return names


def _binomial_tail(least: int, tries: int) -> float:
    """Chance of at least so many heads of a fair coin."""
    if tries == 0:
        return 1.0
    return sum(math.comb(tries, heads) for heads in range(least, tries + 1)) / (1 << tries)
