"""Comparing answers: what says nothing, what says that the weights are others."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import PromptsInvalid
from adapter_store.proofs import (
    MOST_PROMPT_BYTES,
    MOST_PROMPTS,
    PROMPTS,
    Answer,
    Reference,
    check_prompts,
    difference,
    is_finite,
    reference_difference,
    token_hash,
)


def answer(*places: dict[int, float]) -> Answer:
    """Greedy: the likeliest token of each place."""
    tokens = [max(place, key=lambda token: place[token]) for place in places]
    return Answer(tokens, [place[token] for place, token in zip(places, tokens, strict=True)], list(places))


FIRST = {1: -0.1, 2: -2.5, 3: -4.0}
SECOND = {4: -0.2, 5: -1.9, 6: -4.5}


def test_equal_answers_differ_by_nothing() -> None:
    """And have one hash."""
    mine, other = answer(FIRST, SECOND), answer(dict(FIRST), dict(SECOND))
    assert difference([mine, mine], [other, other]) == 0
    assert token_hash([mine]) == token_hash([other])


def test_the_largest_difference_of_any_likely_token_counts() -> None:
    """Not the chosen one's alone: a weak adapter moves the others first."""
    assert difference([answer(FIRST, SECOND)], [answer(FIRST, {**SECOND, 6: -4.8})]) == pytest.approx(0.3)
    assert difference([answer(FIRST), answer(SECOND)], [answer(FIRST), answer({**SECOND, 4: -0.7})]) == pytest.approx(
        0.5
    )


def test_a_tie_that_rounding_decides_is_no_difference() -> None:
    """Past it the answers have other texts before them, and are not compared."""
    mine = answer({1: -0.7000, 2: -0.7001, 3: -4.0}, {4: -0.1, 5: -3.0})
    other = answer({1: -0.7001, 2: -0.7000, 3: -4.0}, {7: -0.1, 8: -9.0})
    assert mine.tokens[0] != other.tokens[0]
    assert difference([mine], [other]) == pytest.approx(1e-4, rel=1e-3)
    assert token_hash([mine]) != token_hash([other])


def test_another_token_is_as_far_off_as_it_is_unlikely_in_the_other() -> None:
    """Where the place has no common token, from the least likely one that is known there."""
    assert difference([answer({1: -0.1, 2: -3.0})], [answer({7: -0.1, 8: -5.0})]) == pytest.approx(4.9)


def test_what_does_not_pair_is_infinitely_far() -> None:
    """Fewer answers, shorter ones, none at all, or a number that is none."""
    mine = answer(FIRST, SECOND)
    nan = answer(FIRST, {4: math.nan})
    for other in ([], [mine, mine], [answer(FIRST)], [Answer([], [], [])], [nan]):
        assert difference([mine], other) == math.inf
        assert difference(other, [mine]) == math.inf
    assert difference([], []) == math.inf
    assert difference([nan], [nan]) == math.inf
    assert not is_finite([nan])


@given(
    st.lists(st.dictionaries(st.integers(0, 50), st.floats(-30, 0), min_size=2, max_size=5), min_size=1, max_size=4),
    st.floats(-1e-4, 1e-4),
)
def test_noise_is_never_more_than_itself(places: list[dict[int, float]], noise: float) -> None:
    """Whatever the answers: moved by so little they are so far apart, in both directions."""
    mine, moved = answer(*places), answer(*({token: value + noise for token, value in p.items()} for p in places))
    assert difference([mine], [moved]) == pytest.approx(abs(noise), abs=1e-9)
    assert difference([mine], [moved]) == difference([moved], [mine])


def test_a_reference_is_compared_up_to_where_the_answers_part() -> None:
    """Where its tokens are known; else place by place."""
    found = [answer({1: -0.5, 2: -0.5001}, SECOND)]
    assert reference_difference(Reference(["a"], [[-0.5, -0.2]]), found) == 0
    assert reference_difference(Reference(["a"], [[-0.5, -0.9]]), found) == pytest.approx(0.7)
    parted = Reference(["a"], [[-0.5001, -7.0]], [[2, 9]])
    assert reference_difference(parted, found) == 0
    assert reference_difference(Reference(["a"], [[-0.1, -7.0]], [[9, 9]]), found) == pytest.approx(0.4001)
    assert reference_difference(Reference(["a"], [[-0.5, -0.2, -0.1]]), found) == math.inf
    assert reference_difference(Reference(["a"], [[-0.5]]), [answer({1: math.nan})]) == math.inf


@pytest.mark.parametrize(
    "reference",
    [
        Reference([], []),
        Reference(["a"], []),
        Reference(["a"], [[]]),
        Reference(["a"], [[math.nan]]),
        Reference(["a"], [[-0.1] * 65]),
        Reference(["a"], [[-0.1]], [[]]),
        Reference(["a"], [[-0.1]], [[1], [2]]),
        Reference(["a"] * 9, [[-0.1]] * 9),
        Reference(["a", [1]], [[-0.1]] * 2),
    ],
)
def test_a_reference_out_of_bounds_is_refused(reference: Reference) -> None:
    with pytest.raises(PromptsInvalid):
        reference.check()


@pytest.mark.parametrize(
    "prompts",
    [
        ["a"] * (MOST_PROMPTS + 1),
        [""],
        [" \n"],
        ["a" * (MOST_PROMPT_BYTES + 1)],
        ["ä" * (MOST_PROMPT_BYTES // 2 + 1)],
        ["a" * MOST_PROMPT_BYTES] * 5,
        ["half \ud800"],
        ["a\0b"],
    ],
)
def test_prompts_out_of_bounds_are_refused(prompts: list[str]) -> None:
    with pytest.raises(PromptsInvalid):
        check_prompts(prompts)


def test_prompts_within_bounds_are_taken() -> None:
    """As many and as long as may be; and the generated ones keep to the same."""
    check_prompts(["a" * MOST_PROMPT_BYTES] * 4)
    check_prompts([])
    check_prompts(PROMPTS)
    assert all(prompt.isascii() for prompt in PROMPTS)
