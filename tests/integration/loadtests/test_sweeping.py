"""The knee of a stack of fakes, found by `tailor loadtest sweep`, and what `tailor loadtest plan` makes of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import cli
from loadtests import gates, results
from loadtests.fitting import Room
from loadtests.planning import Model
from loadtests.points import knee_of, points_of
from loadtests.scenario import Objective
from tests.integration.loadtests.tools import tool

Tailor = Callable[..., tuple[int, str]]


@pytest.fixture
def tailor(capsys: pytest.CaptureFixture[str]) -> Tailor:
    """Runs `tailor loadtest` with words: its exit code and all it said."""

    def run(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(["loadtest", *map(str, words)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def written(folder: Path, *, replicas: int, tenants: int = 4, max_num_seqs: int = 8) -> Path:
    """A scenario with an engine that is slow enough for a busy machine to keep up with."""
    told: dict[str, Any] = {
        "name": "knee",
        "question": "Where is the knee of these replicas?",
        "stack": {
            "replicas": replicas,
            "slots": 4,
            "host_adapters": 16,
            "max_num_seqs": max_num_seqs,
            "step_ms": 25,
            "per_sequence_us": 1_000,
            "per_prompt_token_us": 100,
            "load_ms": 60,
            "activate_ms": 10,
        },
        "objective": {"ttft_ms": 1_000},
        "late_ms": 500,
        "tenants": [{"name": "t", "count": tenants, "adapters": 2}],
        "workloads": {
            "w": {
                "prompt_tokens": {"law": "lognormal", "median": 40, "sigma": 0.5, "most": 200},
                "output_tokens": {"law": "fixed", "value": 16},
                "popularity": {"law": "zipf", "exponent": 1},
            }
        },
        "phases": [
            {
                "name": "main",
                "duration_s": 12,
                "load": [{"tenants": "t", "workload": "w", "arrivals": {"law": "poisson", "rate": 1}}],
            }
        ],
        "gates": [{"metric": "error_share", "at_most": 0}],
    }
    path = folder / f"knee-{replicas}.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def test_a_sweep_finds_a_knee_and_a_plan_comes_of_it(tailor: Tailor, tmp_path: Path) -> None:
    """One run with a phase for each rate, its knee between them, and the replicas of a peak with what is assumed."""
    words = ("--from", 3, "--within", 1, "--goal", 0.7, "--duration-s", 5, "--warm-up-s", 0, "--stack", "fake")
    scenario = written(tmp_path, replicas=1, tenants=1, max_num_seqs=4)
    code, told = tailor("sweep", scenario, *words, "--out", tmp_path / "out")
    assert (code, "knee: " in told) == (0, True), told
    run = results.load(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [phase["name"] for phase in run.scenario["phases"] if phase["measured"]][:2] == ["rate-3", "rate-6"]
    assert found["points"][0]["kept_share"] >= 0.7 > found["points"][-1]["kept_share"]
    assert found["points"][0]["offered"] < found["knee"]["rate"] < found["points"][-1]["offered"]
    code, told = tailor(
        "plan", tmp_path / "out", "--goal", 0.7, "--peak", 4 * found["knee"]["rate"], "--json", tmp_path / "plan.json"
    )
    assert (code, "This assumes:" in told, "1 measured" in told) == (0, True, True), told
    made = json.loads((tmp_path / "plan.json").read_text())
    assert 3 <= made["options"][-1]["replicas"] <= 6
    step_ms = re.search(r"step takes ([\d.]+) ms", " ".join(made["assumptions"]))
    assert step_ms is not None
    assert 20 <= float(step_ms[1]) <= 40
    code, told = tailor("sweep", written(tmp_path, replicas=1), "--from", 3)
    assert (code, "--stack fake" in told) == (2, True)


def test_a_sweep_that_is_interrupted_keeps_what_it_measured(tmp_path: Path) -> None:
    """SIGTERM after the first rate: a run with that one, never green, and no process is left."""
    words = ("--from", 3, "--duration-s", 3, "--warm-up-s", 0, "--stack", "fake", "--out", tmp_path / "out")
    with tool("sweep", written(tmp_path, replicas=1, tenants=1), *words) as sweep:
        assert sweep.says("requests/s offered")
        sweep.process.terminate()
        said = sweep.last_words()
        assert sweep.left() == []
    assert sweep.process.returncode == gates.INCONCLUSIVE, said
    assert "the knee was not found: it was interrupted" in said
    run = results.load(tmp_path / "out")
    assert run.unfinished
    assert [phase["name"] for phase in run.scenario["phases"]] == ["rate-3"]
    assert "<testsuite" in (tmp_path / "out" / "junit.xml").read_text()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_knee_of_two_replicas_is_foretold_by_one(tailor: Tailor, tmp_path: Path) -> None:
    """Within 15 % of what is then measured."""
    for replicas in (1, 2):
        words = ("--from", 4 * replicas, "--duration-s", 40, "--stack", "fake", "--out", tmp_path / str(replicas))
        code, told = tailor("sweep", written(tmp_path, replicas=replicas), *words)
        assert code == 0, told
    model = Model(results.load(tmp_path / "1"), Room(4, 16, 8), Objective(ttft_ms=1_000))
    measured = knee_of(points_of(results.load(tmp_path / "2")))
    assert model.knee(2) == pytest.approx(measured.rate, rel=0.15)
