"""The comparison with another tool: the same load for both, and figures counted alike."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtests.crosschecking import (
    CannotCompare,
    Check,
    Load,
    Requests,
    Together,
    answered,
    answered_by_bench,
    row,
    together,
)
from loadtests.playing import CannotPlay, Server
from loadtests.recording import SAMPLE, Outcome, Samples
from loadtests.scheduling import schedule_of
from loadtests.statistics import Floats

MS = 1_000_000
NS = 1_000_000_000


@pytest.fixture
def check(tmp_path: Path) -> Check:
    server = Server("http://127.0.0.1:1", "base", tokens_per_word=2.0)
    return Check(server, "sk-1", "tokenizer", Load(requests=30, callers=4, prompt_tokens=20), tmp_path)


def test_ours_slides_past_theirs_by_one_gap(check: Check) -> None:
    """So that neither is always the one that asks a little after the other."""
    gap_ns = NS / check.load.rate
    at = schedule_of(check.load.scenario(paced=True, seed=1)).planned["at"]
    behind = at[: check.load.requests + 1] - np.arange(check.load.requests + 1) * gap_ns
    assert np.diff(behind).tolist() == pytest.approx([gap_ns / 30] * 30, abs=2)
    waiting = schedule_of(check.load.scenario(paced=False, seed=1)).planned
    assert set(waiting["caller"]) == set(range(4))


def test_the_other_tool_is_given_prompts_of_the_same_length_that_nobody_asked_before(check: Check) -> None:
    """20 tokens are ten words of two; another seed has other prompts."""
    written = []
    for seed in (1, 2):
        check.write_prompts(seed)
        lines = (check.folder / "prompts.jsonl").read_text().splitlines()
        written.append([json.loads(line) for line in lines])
    prompts = [one["prompt"] for told in written for one in told]
    assert len(set(prompts)) == 60
    assert {len(prompt.split()) for prompt in prompts} == {10}
    assert {one["output_tokens"] for one in written[0]} == {16}


def test_times_of_both_are_of_one_clock() -> None:
    """TTFT from sending to the first piece of an answer; what was never sent is no failure."""
    rows = np.zeros(5, SAMPLE)
    rows["sent"] = np.arange(5) * 100 * MS
    rows["token"] = rows["sent"] + 10 * MS
    rows["first"] = rows["token"] + 5 * MS  # half a letter is a token
    rows["done"] = rows["sent"] + 100 * MS
    rows["outcome"][3:] = Outcome.TIMEOUT, Outcome.UNSENT
    ours = answered(Samples(rows, np.zeros(5, np.uint64), np.zeros(0, np.uint32), ("",)), begin_ns=7 * NS)
    told = {"start_times": [7.0, 7.1, 7.2, 7.3], "ttfts": [0.01, 0.01, 0.01, 0], "latencies": [0.1, 0.1, 0.1, 0]}
    theirs = answered_by_bench(told | {"errors": ["", "", "", "Wait"]})
    for one in (ours, theirs):
        assert one.sent.tolist() == pytest.approx([7.0, 7.1, 7.2])
        assert (one.token - one.sent).tolist() == pytest.approx([0.01] * 3)
        assert (one.done - one.sent).tolist() == pytest.approx([0.1] * 3)
        assert one.failed == 1
    with pytest.raises(CannotPlay):
        answered(Samples(rows[3:], np.zeros(2, np.uint64), np.zeros(0, np.uint32), ("",)), begin_ns=0)
    with pytest.raises(CannotCompare, match="Wait"):
        answered_by_bench({name: each[3:] for name, each in told.items()} | {"errors": ["Wait"]})


def requests(first: float, last: float, callers: int = 1) -> Requests:
    """Each 0.1 s, which is how long each takes."""
    sent: Floats = np.repeat(np.arange(first, last, 0.1), callers)
    return Requests(sent, sent + 0.01, sent + 0.1, 0)


def test_only_what_was_asked_while_both_did_is_compared() -> None:
    """Ours goes on for longer on either side, and of callers who wait a request on the edge counts in part."""
    ours = requests(0, 10)
    ours.token[:30] += 1
    paced = together(ours, requests(3, 6), paced=True)
    assert len(paced.rows) == 30
    assert (paced.ours, paced.theirs) == pytest.approx((10, 10))
    waiting = together(ours, requests(3.05, 6, callers=4), paced=False)
    assert (waiting.ours, waiting.theirs) == pytest.approx((10, 40))  # of ours halves at either end
    for gone in (requests(3.05, 10), requests(0, 5)):
        with pytest.raises(CannotCompare, match="at the same time"):
            together(gone, requests(3, 6), paced=True)


def test_requests_of_the_same_moment_are_compared() -> None:
    """At a server that is ten times as slow for half of the time, medians may be any; ours are 6 % quicker."""
    ours, theirs = requests(0, 20), requests(0.03, 19.9)
    for one, share in ((ours, 0.94), (theirs, 1.0)):
        one.token[:] = one.sent + share * np.where(one.sent % 4 < 2, 0.01, 0.1)
    told = row("ttft_p50_off", [together(ours, theirs, paced=True)])
    assert told.value == pytest.approx(0.06, abs=0.001)
    assert not told.ok


def seen(ours: Floats, theirs: Floats) -> Together:
    """For 20 s, in equal gaps."""
    rows = np.column_stack((np.linspace(0, 20, len(ours)), ours, theirs))
    return Together(float(np.median(ours)), float(np.median(theirs)), rows, 0)


def test_six_percent_off_is_too_much_on_either_side() -> None:
    """Of all rounds together, each of which is told; the interval says how much may be chance."""
    slow, quick = np.tile([90.0, 100.0, 110.0], 20), np.tile([30.0, 40.0, 50.0], 20)
    told = row("ttft_p50_off", [seen(slow * 0.94, slow), seen(quick * 0.94, quick)])
    assert told.value == pytest.approx(0.06)
    assert told.detail["ours"] == [94, 37.6]
    assert told.detail["theirs"] == [100, 40]
    assert not told.ok
    assert row("ttft_p50_off", [seen(slow * 0.96, slow)]).ok
    assert not row("requests_per_s_off", [seen(slow * 1.06, slow)]).ok
    assert row("requests_per_s_off", [seen(slow * 1.04, slow)]).ok
    random = np.random.default_rng(1)
    loose = row("ttft_p50_off", [seen(random.exponential(100, 60), random.exponential(100, 60))]).detail["interval"]
    assert isinstance(loose, list)
    assert loose[0] < 1 < loose[1]


async def test_the_other_tool_ends_with_the_check(check: Check) -> None:
    """Whoever it has started, too."""
    script = f"sleep 600 & echo $! > {check.folder}/new; mv {check.folder}/new {check.folder}/pid; wait"
    theirs = asyncio.create_task(replace(check, other=("sh", "-c", script)).theirs(paced=True, seed=1))
    while not (check.folder / "pid").exists():
        await asyncio.sleep(0.01)
    theirs.cancel()
    with pytest.raises(asyncio.CancelledError):
        await theirs
    state = Path("/proc") / (check.folder / "pid").read_text().strip() / "stat"
    while state.exists() and state.read_text().split()[2] != "Z":
        await asyncio.sleep(0.01)
