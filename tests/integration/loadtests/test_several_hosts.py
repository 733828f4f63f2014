"""Two hosts' parts of one load, each sent by a process of its own, and the merging of what they bring home."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields

from gateway import cli
from loadtests import gates, metrics, results
from loadtests.fake_stack import FakeStack, fake_stack
from loadtests.recording import SAMPLE, Outcome, Run
from loadtests.running import Options, run
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of
from loadtests.stacks import UrlTarget

READY_S = 12
"""Until tenants, adapters and generators of both are there, also on a busy machine."""


def shared() -> Scenario:
    return Scenario.model_validate(
        {
            "name": "shared",
            "question": "Are the parts of two hosts one load?",
            "tenants": [{"name": "all", "count": 2, "adapters": 2}],
            "workloads": {"chat": {"output_tokens": {"law": "fixed", "value": 4}, "canary_share": 0.3}},
            "phases": [
                {
                    "name": "only",
                    "duration_s": 3,
                    "load": [
                        {"tenants": "all", "workload": "chat", "arrivals": {"law": "poisson", "rate": 20}},
                        {"tenants": "all", "workload": "chat", "arrivals": {"law": "closed", "callers": 2}},
                    ],
                }
            ],
            "gates": [{"metric": "error_share", "at_most": 0}, {"metric": "wrong_adapter", "at_most": 0}],
            "late_ms": 5_000,  # how late each was is not what is asked here
        }
    )


async def played(stack: FakeStack, folder: Path) -> list[Path]:
    """The folders of two hosts' runs, which begin at the same moment."""
    target, start_at = UrlTarget(stack.url, stack.operator_key), time.time() + READY_S
    found = [folder / f"part-{number}" for number in (0, 1)]
    for each in found:
        each.mkdir()
    await asyncio.gather(
        *(
            run(shared(), target, Options(each, shard=(number, len(found)), start_at=start_at))
            for number, each in enumerate(found)
        )
    )
    return found


async def test_two_hosts_parts_are_judged_as_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that was planned is there once, and what both have sent; a part of an older version is refused."""
    async with fake_stack(shared().stack, tmp_path / "stack") as stack:
        folders = await played(stack, tmp_path)
    whole = tmp_path / "whole"
    assert merging(whole, *folders) == 0
    merged, both = results.load(whole), [results.load(folder) for folder in folders]
    planned = schedule_of(shared()).planned
    assert sorted(merged.schedule.planned["seed"]) == sorted(planned["seed"])
    for outcome in Outcome:
        assert count(merged, outcome) == sum(count(one, outcome) for one in both)
    assert count(merged, Outcome.WHOLE) > (planned["at"] >= 0).sum()  # and what the callers asked
    for name in ("requests.sent", "requests.whole", "tokens.completion", "adapters"):
        assert metrics.figure(merged, name).value == sum(metrics.figure(one, name).value for one in both) > 0, name
    assert "host-1/all-0" in (whole / "report.html").read_text()
    write_as_of_before(folders[1])
    assert merging(whole, *folders) == gates.UNUSABLE
    assert "Part 1 was written by another version" in capsys.readouterr().err


def merging(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app(["loadtest", "merge", *map(str, words)])
    return int(ended.value.code or 0)


def count(of: Run, outcome: Outcome) -> int:
    return int((of.samples.rows["outcome"] == outcome).sum())


def write_as_of_before(folder: Path) -> None:
    """As a version wrote it that did not know when the first token came."""
    with np.load(folder / "samples.npz", allow_pickle=False) as found:
        told = dict(found)
    told["rows"] = repack_fields(told["rows"][[name for name in SAMPLE.names or () if name != "token"]])
    np.savez(folder / "samples.npz", **told)
