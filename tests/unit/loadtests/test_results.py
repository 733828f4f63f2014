"""What a run leaves in its folder, for itself and for others."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from loadtests import gates, results
from loadtests.recording import Array, Event, Lateness, Outcome
from loadtests.scenario import read
from tests.unit.loadtests.runs import S, Shape, run_of

GATES = [{"metric": "error_share", "at_most": 0.0}, {"metric": "recovery_s", "at_most": 1}]


def _refuse(_planned: Array, rows: Array) -> None:
    rows["outcome"][:3], rows["status"][:3] = Outcome.REFUSED, 429
    rows["error"][:3] = rows["replica"][0] + 1
    rows["outcome"][3], rows["status"][3] = Outcome.STATUS, 500


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every member, and judged the same."""
    run = run_of(
        gates=GATES,
        change=_refuse,
        events=(Event(4 * S, "upload", "all-0/adapter-1", 5, "too large"),),
        lateness=(Lateness(0, 40.0, 300.0, 900.0, 0.3),),
        unfinished="stopped",
        readings={"before": {"loads": 3}},
        shard=(1, 3),
    )
    results.save(run, tmp_path / "run")
    found = results.load(tmp_path / "run")
    for name in (
        "scenario",
        "target",
        "machine",
        "started_at",
        "events",
        "versions",
        "lateness",
        "unfinished",
        "shard",
    ):
        assert getattr(found, name) == getattr(run, name)
    assert found.readings == run.readings
    assert np.array_equal(found.schedule.planned, run.schedule.planned)
    assert replace(found.schedule, planned=run.schedule.planned) == run.schedule
    assert np.array_equal(found.samples.rows, run.samples.rows)
    assert [one.judgement for one in gates.judge(found)] == [one.judgement for one in gates.judge(run)]
    assert read(tmp_path / "run" / "scenario.yaml").model_dump(mode="json") == run.scenario


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    """What is missing, and where."""
    with pytest.raises(results.ResultsUnreadable, match=r"scenario\.yaml"):
        results.load(tmp_path)
    run = run_of()
    results.save(run, tmp_path)
    (tmp_path / "samples.npz").write_bytes(b"not an archive")
    with pytest.raises(results.ResultsUnreadable, match=str(tmp_path)):
        results.load(tmp_path)


def test_a_summary_has_both_clocks_and_why_requests_failed(tmp_path: Path) -> None:
    """For each phase and group; what cannot be told is null."""
    run = run_of(Shape(phases=("calm", "flood"), groups={"loud": 1, "quiet": 1}), gates=GATES, change=_refuse)
    verdicts = gates.judge(run)
    results.write(run, verdicts, tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())
    assert (told["verdict"], told["exit_code"]) == ("fail", 1)
    assert told["errors"] == {"refused 429 overloaded": 3, "status 500": 1}
    quiet = told["phases"]["flood"]["quiet"]
    assert (quiet["response_ms.p50"], quiet["service_ms.p50"], quiet["recovery_s"]) == (90, 90, None)
    assert told["gates"][2]["judgement"] == "inconclusive"


def test_ci_sees_a_failure_and_an_inconclusive_gate_as_an_error(tmp_path: Path) -> None:
    """Nothing but a pass is without a child in its test case."""
    run = run_of(gates=GATES, change=_refuse)
    results.write(run, gates.judge(run), tmp_path)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["error"]]


def test_requests_are_a_line_each(tmp_path: Path) -> None:
    """With names instead of numbers, and nothing where a time never came."""
    run = run_of(change=_refuse)
    results.write(run, gates.judge(run), tmp_path)
    with (tmp_path / "requests.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run.samples.rows)
    assert (lines[0]["outcome"], lines[0]["error"]) == ("refused", "overloaded")
    assert (lines[9]["tenant"][:4], lines[9]["ttft_ms"], lines[9]["tier"], lines[9]["cached_tokens"]) == (
        "all-",
        "50",
        "gpu",
        "",
    )
