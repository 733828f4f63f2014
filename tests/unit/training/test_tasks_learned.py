"""Three tenants' adapters, trained in one batch: each knows its own task, and nobody else's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gateway.local_training import cached_tiny_base
from gateway.progress_bar import progress_bar
from training import dataset, tasks
from training.dataset import Row
from training.engine import Engine, Run, Spec
from training.evaluation import Questions
from training.hyperparameters import Hyperparameters

CACHE = Path(__file__).parents[3] / ".tailor" / "cache"
OWN, OTHERS = 0.9, 0.05
Make = Callable[[int], tasks.Task]


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
    ],
)
def test_each_tenant_learns_its_own_task_and_no_other(
    tiny_base: Path, tmp_path: Path, make: Make, hyperparameters: Hyperparameters
) -> None:
    """At least 0.9 of what is held out by the tenant's own adapter, about nothing by the others' and by the base."""
    engine, tokenizer = Engine(tiny_base, threads=1), AutoTokenizer.from_pretrained(tiny_base)

    def rows(examples: list[tasks.Example]) -> list[Row]:
        tasks.write_jsonl(examples, tmp_path / "rows.jsonl")
        return dataset.load(tmp_path / "rows.jsonl", tokenizer, max_length=hyperparameters.max_length)

    every = [make(seed) for seed in range(3)]
    questions = [Questions(engine, tokenizer, rows(task.heldout)) for task in every]
    runs = [engine.begin(Spec("supervised", hyperparameters, rows(task.train))) for task in every]
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


def _train(engine: Engine, runs: list[Run]) -> None:
    while not all(run.done for run in runs):
        engine.step([run for run in runs if not run.done])
