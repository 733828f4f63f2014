"""Three tenants' adapters, trained in one batch: each knows its own task, and nobody else's."""

import json
import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gateway.cli import app as command
from gateway.local_training import cached_tiny_base
from gateway.progress_bar import progress_bar
from training import dataset, tasks, tiny_text
from training.blend import blend
from training.dataset import Row
from training.engine import Engine, Run, Spec
from training.evaluation import Questions
from training.hyperparameters import Hyperparameters

CACHE = Path(__file__).parents[3] / ".tailor" / "cache"
OWN, OTHERS = 0.9, 0.05
Make = Callable[[int], tasks.Task | tasks.PreferenceTask]


@pytest.fixture(scope="module")
def tiny_base() -> Path:
    """Kept in the project's cache."""
    return cached_tiny_base(CACHE, progress_bar)


@pytest.mark.parametrize(
    ("make", "hyperparameters"),
    [
        pytest.param(partial(tasks.jargon, terms=8), tasks.JARGON_HYPERPARAMETERS, id="jargon-small"),
        pytest.param(tasks.jargon, tasks.JARGON_HYPERPARAMETERS, id="jargon", marks=pytest.mark.full),
        pytest.param(
            tasks.classification, tasks.CLASSIFICATION_HYPERPARAMETERS, id="classification", marks=pytest.mark.full
        ),
        pytest.param(tasks.json_orders, tasks.JSON_HYPERPARAMETERS, id="json", marks=pytest.mark.full),
        pytest.param(tasks.preference, tasks.PREFERENCE_HYPERPARAMETERS, id="preference", marks=pytest.mark.full),
    ],
)
def test_each_tenant_learns_its_own_task_and_no_other(
    tiny_base: Path, tmp_path: Path, make: Make, hyperparameters: Hyperparameters
) -> None:
    """At least 0.9 of what is held out by the tenant's own adapter, about nothing by the others' and by the base."""
    engine, tokenizer = Engine(tiny_base, threads=1), AutoTokenizer.from_pretrained(tiny_base)

    path, length = tmp_path / "rows.jsonl", hyperparameters.max_length

    def rows(examples: list[tasks.Example]) -> list[Row]:
        tasks.write_jsonl(examples, path)
        return dataset.load(path, tokenizer, max_length=length)

    def spec(task: tasks.Task | tasks.PreferenceTask) -> Spec:
        if isinstance(task, tasks.Task):
            return Spec("supervised", hyperparameters, rows(task.train))
        tasks.write_preferences(task.train, path)
        return Spec("dpo", hyperparameters, dataset.load_pairs(path, tokenizer, max_length=length))

    every = [make(seed) for seed in range(3)]
    questions = [Questions(engine, tokenizer, rows(asked_of(task))) for task in every]
    runs = [engine.begin(spec(task)) for task in every]
    assert [asked.scored(runs[0]).exact_match for asked in questions] == pytest.approx([0] * 3, abs=OTHERS)  # the base
    _train(engine, runs)
    for mine, run in enumerate(runs):
        for whose, asked in enumerate(questions):
            found = asked.scored(run)
            if whose == mine:
                assert found.exact_match >= OWN, (every[whose].name, found)
                assert found.headline[1] >= OWN, (every[whose].name, found)
            else:
                assert found.exact_match <= OTHERS, (every[mine].name, every[whose].name, found)


def asked_of(task: tasks.Task | tasks.PreferenceTask) -> list[tasks.Example]:
    if isinstance(task, tasks.Task):
        return task.heldout
    return [tasks.Example(one.messages, one.preferred) for one in task.heldout]


def _train(engine: Engine, runs: list[Run]) -> None:
    while not all(run.done for run in runs):
        engine.step([run for run in runs if not run.done])


def test_the_command_shows_the_curve_and_what_to_do_next(tiny_base: Path, tmp_path: Path) -> None:
    """`tailor adapter blend`: a line for each factor, the picked one marked, and a picture."""
    engine, tokenizer = Engine(tiny_base, threads=1), AutoTokenizer.from_pretrained(tiny_base)
    task = tasks.jargon(0, terms=2)
    tasks.write_jsonl(task.train, tmp_path / "train.jsonl")
    tasks.write_jsonl(task.heldout, tmp_path / "task.jsonl")
    _write(tmp_path / "general.jsonl", seed="general", heldout=True, count=4)
    rows = dataset.load(tmp_path / "train.jsonl", tokenizer, max_length=512)
    run = engine.begin(Spec("supervised", tasks.JARGON_HYPERPARAMETERS, rows))
    _train(engine, [run])
    (tmp_path / "adapter").mkdir()
    run.write_adapter(tmp_path / "adapter")

    where = ["adapter", "blend", str(tmp_path / "adapter"), "--base", str(tiny_base), "--threads", "1"]
    sets = ["--task", str(tmp_path / "task.jsonl"), "--general", str(tmp_path / "general.jsonl")]
    done = CliRunner().invoke(command, [*where, *sets, "--png", str(tmp_path / "curve.png")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    points = {cells[0]: cells for cells in (line.strip("│ ").split() for line in lines) if "│" in cells}
    assert {"0", "0.5", "1"} <= points.keys()
    (picked,) = [factor for factor, cells in points.items() if cells[-1] == "<"]
    assert lines[-1].endswith(f"next: tailor adapter scale NAME@N {picked}")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_factor_keeps_the_task_and_what_the_base_could_do(tiny_base: Path, tmp_path: Path) -> None:
    """At least 0.9 of both, where the adapter was trained on its task and some general rows, none of them asked."""
    engine, tokenizer = Engine(tiny_base, threads=1), AutoTokenizer.from_pretrained(tiny_base)
    task = tasks.jargon(0)
    train, general = tmp_path / "train.jsonl", tmp_path / "general.jsonl"
    tasks.write_jsonl(task.train, train)
    _write(general, seed="rehearsed", heldout=False, count=192)
    train.write_text(train.read_text() + general.read_text())
    tasks.write_jsonl(task.heldout, tmp_path / "task.jsonl")
    _write(general, seed="general", heldout=True, count=130)

    def rows(path: Path) -> list[Row]:
        return dataset.load(path, tokenizer, max_length=512)

    run = engine.begin(Spec("supervised", tasks.REHEARSED_HYPERPARAMETERS, rows(train)))
    _train(engine, [run])
    folder = tmp_path / "adapter"
    folder.mkdir()
    run.write_adapter(folder)
    found = blend(engine, tokenizer, folder, rows(tmp_path / "task.jsonl"), rows(general))
    assert 0 < found.picked.factor <= 1
    assert min(found.kept) >= OWN, found


def _write(path: Path, *, seed: str, heldout: bool, count: int) -> None:
    endless = tiny_text.conversations(random.Random(seed), heldout=heldout, tasks=list(tiny_text.TASKS))
    lines = [json.dumps({"messages": one.messages}) + "\n" for one in islice(endless, count)]
    path.write_text("".join(lines))
