"""What is measured, chosen from what is expected."""

import pytest

from training.scoring import Kind, kind_of, scored


@pytest.mark.parametrize(
    ("expected", "kind"),
    [
        (["dock", "fleet", "dock", "fleet"], "classification"),
        (["dock"] * 4, "text"),  # one class tells nothing
        (["dock", "fleet", "vault", "gate"], "text"),  # none comes twice
        (["a\nb", "c", "a\nb", "c"], "text"),
        (["x" * 41, "c", "x" * 41, "c"], "text"),
        (["", "c", "", "c"], "text"),
        (['{"a": 1}', '{"b": [2]}'], "json"),
        (['{"a": 1}', "[2]"], "text"),
        (['```json\n{"a": 1}\n```'], "json"),
    ],
)
def test_what_is_expected_says_what_is_measured(expected: list[str], kind: Kind) -> None:
    assert kind_of(expected) == kind


def test_each_kind_has_its_figures() -> None:
    """And the one to look at first."""
    found = scored(["a", "b", "a", "b"], ["a", "a", "a", "b"])
    assert found.headline[0] == "macro F1"
    assert found.headline[1] == pytest.approx((0.8 + 2 / 3) / 2)
    found = scored(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])
    assert found.headline == ("field F1", 0.5)
    assert scored(["one", "two"], ["one", "too"]).headline == ("exact match", 0.5)
    with pytest.raises(ValueError, match="no examples"):
        scored([], [])
