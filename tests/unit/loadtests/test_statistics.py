"""The arithmetic of the figures, each against a value known otherwise."""

import math

import numpy as np
import pytest

from loadtests import statistics


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_one_of_the_values(share: float, value: float) -> None:
    """It is the smallest that the share of all do not exceed."""
    assert statistics.percentile(np.arange(100, 0, -1), share) == value


def test_jain_is_one_for_equal_shares_and_one_over_n_for_one_who_has_all() -> None:
    """The index's two ends."""
    assert statistics.jain(np.array([3.0, 3, 3])) == pytest.approx(1)
    assert statistics.jain(np.array([9.0, 0, 0, 0])) == pytest.approx(0.25)


def test_a_fair_share_is_at_most_what_was_asked_for() -> None:
    """Max-min: who asks little has it all, the rest have equal parts."""
    assert statistics.fair_shares(np.array([1.0, 100, 50]), 21).tolist() == [1, 10, 10]
    assert statistics.fair_shares(np.array([1.0, 2]), 21).tolist() == [1, 2]


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
def test_che_says_what_an_lru_cache_does(exponent: float) -> None:
    """The approximation is within two points of a simulated cache under independent references."""
    rates = 1 / np.arange(1, 65) ** exponent
    asked = np.random.default_rng(3).choice(64, 40_000, p=rates / rates.sum())
    hits = statistics.lru_hits(asked.tolist(), 16)[5_000:].mean()
    assert statistics.che_hit_ratio(rates, 16) == pytest.approx(hits, abs=0.02)
    assert statistics.che_hit_ratio(rates, 64) == 1


def test_an_lru_cache_forgets_what_was_used_longest_ago() -> None:
    """Not what came first."""
    assert statistics.lru_hits([1, 2, 1, 3, 1, 2], 2).tolist() == [False, False, True, False, True, False]


def test_recovery_is_counted_until_the_share_is_back_for_good() -> None:
    """A single good bin between bad ones is no recovery, a bin without requests tells nothing."""
    asked = np.full(20, 10.0)
    kept = asked.copy()
    assert statistics.recovery_bins(kept, asked, 5, onset=10) == 0
    kept[6:11] = [0, 10, 0, 10, 0]
    assert statistics.recovery_bins(kept, asked, 5, onset=10) == 6
    asked[11:14] = kept[11:14] = 0
    assert statistics.recovery_bins(kept, asked, 5, onset=10) == 9
    assert statistics.recovery_bins(kept, asked, 5, onset=1) == 0
    kept[6:] = 0
    assert statistics.recovery_bins(kept, asked, 5, onset=10) == math.inf


def test_an_interval_of_resamples_covers_the_truth() -> None:
    """Of a mean, in about 95 of 100 experiments; at least 85 here."""
    random = np.random.default_rng(5)
    covered = 0
    for seed in range(100):
        values = random.exponential(1.0, 200)
        blocks = np.array_split(np.arange(200), 40)
        low, high = statistics.interval([values[at].mean() for at in statistics.block_resamples(blocks, seed)])
        covered += low <= 1 <= high
    assert covered >= 85
