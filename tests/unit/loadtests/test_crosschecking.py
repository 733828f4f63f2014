"""The comparison with another tool: the same load for both, and figures counted alike."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtests.crosschecking import Check, Load, row, seen
from loadtests.playing import CannotPlay, Server
from loadtests.recording import ABSENT, SAMPLE, Outcome, Samples

MS = 1_000_000


@pytest.fixture
def check(tmp_path: Path) -> Check:
    server = Server("http://127.0.0.1:1", "base", tokens_per_word=2.0)
    return Check(server, "sk-1", "tokenizer", Load(requests=30, callers=4, prompt_tokens=20), tmp_path)


def test_both_loads_have_exactly_as_many_requests(check: Check) -> None:
    """Callers who wait share them evenly."""
    paced, waiting = (check.load.schedule(check.load.scenario(paced=paced, seed=1)) for paced in (True, False))
    assert len(paced.planned) == len(waiting.planned) == 30
    assert np.diff(paced.planned["at"]).tolist() == pytest.approx([100 * MS] * 29)
    assert np.bincount(waiting.planned["caller"]).tolist() == [8, 8, 7, 7]


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


def test_figures_are_counted_as_the_other_tool_counts_them() -> None:
    """TTFT from sending, requests over the time from the first sending to the last end."""
    rows = np.zeros(4, SAMPLE)
    rows["scheduled"] = 0
    rows["sent"] = np.arange(4) * 100 * MS
    rows["token"] = rows["sent"] + np.array([10, 20, 30, 0]) * MS
    rows["first"] = rows["token"] + 5 * MS  # half a letter is a token
    rows["done"] = rows["sent"] + 100 * MS
    rows["outcome"][3], rows["first"][3] = Outcome.TIMEOUT, ABSENT
    told = seen(Samples(rows, np.zeros(4, np.uint64), np.zeros(0, np.uint32), ("",)))
    assert (told.ttft_p50_ms, told.requests_per_s, told.failed) == (20, 10, 1)
    with pytest.raises(CannotPlay):
        seen(Samples(rows[3:], np.zeros(1, np.uint64), np.zeros(0, np.uint32), ("",)))


def test_six_percent_off_is_too_much_on_either_side() -> None:
    """Of the medians."""
    assert row("ttft_p50_off", [94.0, 10.0, 900.0], [100.0]).value == pytest.approx(0.06)
    assert not row("requests_per_s_off", [106.0], [100.0]).ok
    assert row("ttft_p50_off", [96.0], [100.0]).ok


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
