"""The load generator's own figures: how they are made of what was written down, and that a freeze shows."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtests.recording import ABSENT, SAMPLE, Outcome, Samples
from loadtests.selftest import (
    FULL,
    QUICK,
    Bench,
    Effort,
    Turn,
    failed,
    late_ms,
    p99_ms,
    paced_rows,
    quiet,
    rate_of,
    ttft_errors_ms,
)

MS = 1_000_000
TRIES = 3
SHORT = replace(QUICK, busy_s=0.5, paced_s=1, run_s=3, frozen_s=1.2)


def samples(answers: Sequence[str]) -> Samples:
    """Whole requests of 10 ms, the first content after 5, one every ms."""
    rows = np.zeros(len(answers), SAMPLE)
    rows["sent"] = rows["scheduled"] = np.arange(len(answers)) * MS
    rows["first"] = rows["sent"] + 5 * MS
    rows["done"] = rows["sent"] + 10 * MS
    rows["answer"] = np.arange(len(answers)) + 1
    return Samples(rows, np.zeros(len(answers), np.uint64), np.zeros(0, np.uint32), ("", *answers))


def test_the_error_of_a_time_is_what_the_stamps_do_not_explain() -> None:
    """5 ms were written down; the server says 4 and 5."""
    told = samples([f"@{MS} @{5 * MS} @{MS} @{9 * MS} ", f"@{2 * MS} @{7 * MS} ", "no stamps"])
    assert ttft_errors_ms(told) == [1.0, 0.0]


def test_a_rate_counts_whole_answers_alone() -> None:
    """Those that had no turn are no failures either."""
    told = samples(["x"] * 4)
    told.rows["outcome"] = [Outcome.WHOLE, Outcome.WHOLE, Outcome.TRUNCATED, Outcome.UNSENT]
    told.rows["done"][1] = 20 * MS
    assert rate_of(told) == pytest.approx(100)
    assert failed(told) == 1
    assert rate_of(samples([])) == 0


async def test_times_are_close_to_the_servers_own(tmp_path: Path) -> None:
    """On a machine that does other things as well; what a quiet one does is in docs/benchmarks.md."""
    (turn,) = await Bench(tmp_path).paced(SHORT)
    errors = ttft_errors_ms(turn.samples)
    assert len(errors) == len(turn.samples.rows) > 60
    assert 0 < np.median(errors) < 10
    assert np.median(late_ms(turn.samples)) < 10
    assert 0 <= turn.others < 1


def test_errors_are_told_of_the_turns_in_which_nobody_took_the_cores() -> None:
    """Of all where somebody always did: then that is what this machine can do."""
    calm, taken = (Turn(samples([f"@{MS} @{stamp * MS} "]), others) for stamp, others in ((5, 0.001), (2, 0.2)))
    error, late = paced_rows([taken, calm])
    assert error.value == pytest.approx(1)
    assert error.detail["quiet_turns"] == 1
    assert error.detail["each_p99_ms"] == [4, 1]
    assert error.detail["others_share"] == [0.2, 0.001]
    assert late.value == 0
    assert next(paced_rows([taken])).value == pytest.approx(4)


async def test_turns_are_played_until_enough_were_quiet(tmp_path: Path) -> None:
    """A process that takes a core makes them loud, and their number is bounded."""
    effort = replace(SHORT, paced_s=0.3, quiet_turns=1, most_turns=2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        turns = await Bench(tmp_path).paced(effort)
        other.kill()
    assert len(turns) == 2
    assert not quiet(turns)
    assert min(turn.others for turn in turns) > 0.1


@pytest.mark.parametrize(
    ("effort", "share"), [(SHORT, 0.95), pytest.param(FULL, 0.99, marks=pytest.mark.full)], ids=["short", "full"]
)
async def test_a_server_that_stands_still_shows_in_response_times_though_service_times_hide_it(
    tmp_path: Path, effort: Effort, share: float
) -> None:
    """A stop of 3 s in 15 (p99) or 1.2 in 3 (p95): many requests were due in it, and ten were sent."""
    for number in range(TRIES):  # where all stood still at another time too, another ten were sent in that
        (folder := tmp_path / f"try-{number}").mkdir()
        told, _ = await Bench(folder).frozen(effort)
        rows = told.rows
        assert failed(told) == 0
        response_ms, service_ms = (
            float(np.quantile((rows["done"] - rows[since]) / MS, share)) for since in ("scheduled", "sent")
        )
        if service_ms < response_ms / 2:
            break
    assert response_ms >= effort.frozen_s * 1_000 * 5 / 6
    assert service_ms < response_ms / 2
    assert (rows["scheduled"] != ABSENT).all()


async def test_a_freeze_shows_in_both_where_nothing_holds_requests_back(tmp_path: Path) -> None:
    """As a load test is by default: without a limit of connections each request is sent at its time."""
    for number in range(TRIES):  # a generator that stood still itself tells nothing
        (folder := tmp_path / f"try-{number}").mkdir()
        told, (late,) = await Bench(folder).frozen(SHORT, connections=None)
        if late.p99_us < 500_000:
            break
    rows = told.rows
    assert p99_ms(rows["scheduled"], rows["done"]) >= 1_000
    assert p99_ms(rows["sent"], rows["done"]) >= 1_000
    assert late.p99_us < 500_000
