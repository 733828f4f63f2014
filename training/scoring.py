"""What answers are measured by, chosen from what is expected of them: labels, JSON objects or words. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from training import metrics
from training.metrics import Classification, JsonFields, Regression

Kind = Literal["classification", "json", "text"]
MOST_CLASSES = 50
LONGEST_LABEL = 40  # characters
LEAST_PER_CLASS = 2
"""Examples of a class, on average: names or sums repeat by chance only."""


@dataclass(frozen=True, slots=True)
class Scored:
    """`kind` says what was measured beside exact match: of `classification` and `json_fields` one at most is there."""

    kind: Kind
    examples: int
    exact_match: float
    classification: Classification | None = None
    json_fields: JsonFields | None = None

    @property
    def headline(self) -> tuple[str, float]:
        """The figure to look at first, and its name."""
        if self.classification is not None:
            return "macro F1", self.classification.macro.f1
        if self.json_fields is not None:
            return "field F1", self.json_fields.micro.f1
        return "exact match", self.exact_match


def kind_of(expected: Sequence[str]) -> Kind:
    """JSON where each is an object; classes where they are few, short, of one line, and each comes more than once."""
    if all(metrics.is_object(text) for text in expected):
        return "json"
    labels = {text.strip() for text in expected}
    few = 2 <= len(labels) <= min(MOST_CLASSES, len(expected) // LEAST_PER_CLASS)
    return "classification" if few and all(_is_label(label) for label in labels) else "text"


def _is_label(text: str) -> bool:
    return 0 < len(text) <= LONGEST_LABEL and "\n" not in text


def scored(expected: Sequence[str], answers: Sequence[str], kind: Kind | None = None) -> Scored:
    """Raises ValueError: no examples, not as many answers, or what is expected is not of this kind."""
    kind = kind or (kind_of(expected) if expected else "text")
    return Scored(
        kind,
        len(expected),
        metrics.exact_match(expected, answers),
        metrics.classification(expected, answers) if kind == "classification" else None,
        metrics.json_fields(expected, answers) if kind == "json" else None,
    )


def compared(expected: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Regression:
    """Whether the answers `after` are worse than those `before`."""
    return metrics.regression_of_rights(metrics.rights(expected, before), metrics.rights(expected, after))


def regression_json(found: Regression | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "is_regression": found.is_regression}


def finite(found: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(found, dict):
        return {name: finite(value) for name, value in found.items()}
    if isinstance(found, float) and not math.isfinite(found):
        return None
    return found
