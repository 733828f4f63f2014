"""Histograms: close enough, and the same however they were gathered."""

import json

import numpy as np
import pytest

from loadtests.histogram import Histogram


def test_a_quantile_is_within_a_hundredth_of_the_exact_one() -> None:
    """Over seven decades."""
    values = np.random.default_rng(1).lognormal(9, 2.5, 100_000).astype(np.int64) + 1
    histogram = Histogram()
    histogram.add(values)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert histogram.quantile(1) == pytest.approx(values.max(), rel=0.0101)


def test_parts_that_were_told_and_merged_are_the_whole() -> None:
    """Over JSON, as processes and hosts tell theirs."""
    values = np.arange(1, 5_000)
    whole, merged = Histogram(), Histogram()
    whole.add(values)
    for part in np.array_split(values, 7):
        one = Histogram()
        one.add(part)
        merged.merge(Histogram.of(json.loads(json.dumps(one.told()))))
    assert merged.told() == whole.told()
    assert merged.count == 4_999


def test_nothing_counted_has_no_quantile() -> None:
    """Not a zero, which would look like a fast one; and 0 counts as 1."""
    empty = Histogram()
    empty.add([])
    assert np.isnan(empty.quantile(0.5))
    empty.add([0, -3])
    assert empty.quantile(0.5) == 1
