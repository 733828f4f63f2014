"""Two runs compared: what is worse is told from what may be chance."""

from typing import Any

import numpy as np
import pytest

from loadtests.comparing import Change, Compared, compare, differences
from loadtests.recording import Outcome, Run
from tests.unit.loadtests.runs import MS, Shape, run_of


def noisy(seed: int, slower: float = 1.0) -> Run:
    """A run whose answers take some time that is not always the same."""
    random = np.random.default_rng(seed)

    def change(_planned: Any, rows: Any) -> None:
        longer = (random.exponential(40 * slower, len(rows)) * MS).astype(np.int64)
        for name in ("headers", "first", "last", "done"):
            rows[name] += longer

    return run_of(Shape(phases=("one", "two"), rate=40.0, ttft_ms=20.0 * slower, seed=seed), change=change)


def by_name(before: Run, after: Run) -> dict[tuple[str, str], Compared]:
    names = ("ttft_ms.p50", "ttft_ms.p99", "goodput", "error_share")
    return {(one.phase, one.metric): one for one in compare(before, after, names=names)}


def test_what_is_slower_is_worse() -> None:
    """Half as long again is found in every phase, with an interval that has the truth in it and one outside."""
    found = by_name(noisy(1), noisy(2, slower=1.5))
    for phase in ("", "one", "two"):
        one = found[phase, "ttft_ms.p50"]
        assert one.change is Change.WORSE
        assert one.interval is not None
        assert 1 < one.interval[0] < 1.5 < one.interval[1] < 2
    assert by_name(noisy(2, slower=1.5), noisy(1))["", "ttft_ms.p50"].change is Change.BETTER


def test_chance_is_told_as_such() -> None:
    """Five pairs of runs of one law: hardly a figure of them is called worse or better."""
    told = [
        one.change
        for seed in range(5)
        for one in compare(noisy(100 + seed), noisy(200 + seed), names=("ttft_ms.p50", "ttft_ms.p99"), tolerance=0.01)
    ]
    assert len(told) == 30
    assert sum(change in (Change.WORSE, Change.BETTER) for change in told) <= 3
    assert Change.CHANCE in told


def test_more_goodput_is_better() -> None:
    """The direction is the figure's own: fewer good answers are worse, though the number falls."""

    def fail_some(_planned: Any, rows: Any) -> None:
        rows["outcome"][::3] = Outcome.BROKEN

    found = by_name(run_of(), run_of(change=fail_some))
    assert found["", "goodput"].change is Change.WORSE
    assert found["", "goodput"].ratio == pytest.approx(2 / 3, rel=0.01)
    assert found["", "error_share"].change is Change.WORSE
    assert found["", "ttft_ms.p50"].change is Change.SAME


def test_what_differs_is_said() -> None:
    """Another rate, another number of slots: a reader has to know before he trusts the ratio."""
    told = differences(run_of(), run_of(Shape(rate=30.0, slots=8)))
    assert "target.slots: 4 → 8" in told
    assert "scenario.phases.0.load.0.arrivals.rate: 20.0 → 30.0" in told
    assert differences(run_of(), run_of()) == []
