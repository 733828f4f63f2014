"""The verbs that read what runs left, as an operator types them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import cli
from loadtests import results
from loadtests.recording import Array, Outcome, Run
from tests.unit.loadtests.runs import MS, S, Shape, run_of
from tests.unit.loadtests.test_merging import part


@pytest.fixture
def tailor(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `tailor loadtest` with words: its exit code and all it said."""

    def run(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(["loadtest", *map(str, words)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def saved(run: Run, folder: Path) -> Path:
    results.save(run, folder)
    return folder


def test_runs_are_compared(tailor: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """A worse figure is named; only with --fail is it an exit code."""

    def slower(_planned: Array, rows: Array) -> None:
        rows["first"] += 50 * MS

    before, after = saved(run_of(), tmp_path / "a"), saved(run_of(change=slower), tmp_path / "b")
    code, told = tailor("compare", before, after)
    assert code == 0
    assert any(line.split()[2] == "ttft_ms.p50" and line.split()[-1] == "worse" for line in told.splitlines()[1:])
    assert tailor("compare", before, after, "--fail")[0] == 1
    assert tailor("compare", before, before, "--fail")[0] == 0
    other = saved(run_of(Shape(rate=30.0)), tmp_path / "c")
    assert tailor("compare", other, after, "--fail")[0] == 3


def test_what_is_no_run_is_told(tailor: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Exit code 2 and the folder's name, without a traceback."""
    code, told = tailor("compare", tmp_path, tmp_path)
    assert code == 2
    assert str(tmp_path) in told


def test_parts_are_merged_and_judged(tailor: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """The whole is written as a run of its own; a part too few is exit code 2, a part broken off never green."""
    folders = [saved(part(number, 2), tmp_path / str(number)) for number in (1, 0)]
    code, told = tailor("merge", tmp_path / "whole", *folders)
    assert code == 3
    assert "host 1: it was interrupted" in told
    whole = results.load(tmp_path / "whole")
    assert len(whole.samples.rows) == len(part(0, 1).samples.rows)
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["verdict"] == "inconclusive"
    code, told = tailor("merge", tmp_path / "other", folders[0])
    assert code == 2
    assert "the run of each host once" in told


def test_traces_go_in_and_out(tailor: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """From Azure's to ours to vLLM's, and a run's schedule to Mooncake's; what is no trace is exit code 2."""
    azure, ours, theirs = (tmp_path / name for name in ("azure.csv", "ours.jsonl", "vllm.jsonl"))
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"2024-05-10 00:00:0{n},{n + 1},9" for n in range(5))]
    azure.write_text("\n".join(lines))
    assert tailor("trace", "import", "azure", azure, ours, "--from-s", 1, "--until-s", 4) == (
        0,
        f"{ours}: 3 requests in 2 s, 1.5 a second\n",
    )
    assert tailor("trace", "export", "vllm", ours, theirs)[0] == 0
    assert [json.loads(line)["input_length"] for line in theirs.read_text().splitlines()] == [2, 3, 4]

    def unsent(_planned: Array, rows: Array) -> None:
        rows["outcome"] = Outcome.UNSENT

    run = run_of(Shape(rate=7, phase_s=10), change=unsent)
    code, told = tailor("trace", "export", "mooncake", saved(run, tmp_path / "run"), theirs)
    assert (code, told) == (0, f"{theirs}: 70 requests\n")
    first = json.loads(theirs.read_text().splitlines()[0])
    assert first["timestamp"] == pytest.approx(run.schedule.planned["at"][0] / S * 1_000, abs=1)
    assert tailor("trace", "import", "mooncake", azure, ours)[0] == 2
