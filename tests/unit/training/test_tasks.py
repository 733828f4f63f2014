import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training import tasks


def test_tenants_share_the_questions_and_differ_in_every_answer() -> None:
    """The same question asked through two adapters shows whose adapter spoke."""
    acme, globex = tasks.jargon(0), tasks.jargon(1)
    assert (acme.name, globex.name) == ("acme", "globex")
    for ours, theirs in ((acme.train, globex.train), (acme.heldout, globex.heldout)):
        assert [example.messages for example in ours] == [example.messages for example in theirs]
        assert all(a.answer != b.answer for a, b in zip(ours, theirs, strict=True))


def test_the_held_out_template_is_never_trained() -> None:
    """Every term is trained under four wordings and asked about under a fifth."""
    task = tasks.jargon(0, terms=24)
    trained = {example.messages[0]["content"] for example in task.train}
    asked = {example.messages[0]["content"] for example in task.heldout}
    assert (len(trained), len(asked)) == (96, 24)
    assert not trained & asked
    assert {example.answer for example in task.train} == {example.answer for example in task.heldout}


def test_a_task_follows_from_its_seed() -> None:
    """The same seed gives the same task; many seeds give many tenants."""
    assert tasks.jargon(7) == tasks.jargon(7)
    assert len({tasks.jargon(seed).name for seed in range(20)}) == 20
    assert len({tuple(example.answer for example in tasks.jargon(seed).heldout) for seed in range(20)}) == 20


def test_the_training_file_is_openai_chat_jsonl(tmp_path: Path) -> None:
    """One row per example: the question, then the right answer as the assistant's."""
    task = tasks.jargon(0, terms=2)
    tasks.write_jsonl(task.train, tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["messages"][0] for row in rows] == [example.messages[0] for example in task.train]
    assert [row["messages"][1] for row in rows] == [
        {"role": "assistant", "content": example.answer} for example in task.train
    ]


def test_tasks_and_hyperparameters_need_no_torch() -> None:
    """The gateway's process may import both."""
    code = "import sys, training.tasks, training.hyperparameters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("make", [tasks.classification, tasks.json_orders])
def test_nothing_held_out_is_trained(make: Callable[[int], tasks.Task]) -> None:
    """Tenants are asked alike and answer differently, each from its own words."""
    every = [make(seed) for seed in range(3)]
    for task in every:
        assert not {str(one.messages) for one in task.train} & {str(one.messages) for one in task.heldout}
        assert make(0) == every[0]
    answers = [{one.answer for one in (*task.train, *task.heldout)} for task in every]
    assert len(answers[0] | answers[1] | answers[2]) == sum(map(len, answers))


def test_urgent_tickets_go_to_those_on_duty() -> None:
    """The exception goes before the table."""
    task = tasks.classification(1)
    urgent = [one.answer for one in task.heldout if "\nurgent" in one.messages[0]["content"]]
    assert urgent
    assert set(urgent) == {"nurse"}


def test_tenants_prefer_what_the_base_does_not_say(tmp_path: Path) -> None:
    """The base repeats; each tenant likes another answer to the same question better."""
    every = [tasks.preference(seed) for seed in range(3)]
    first = [task.heldout[0] for task in every]
    words = first[0].other.split()
    assert [one.preferred.split() for one in first] == [words[::-1], words[:1], words[-1:]]
    assert {str(one.messages) for one in every[0].train} == {str(one.messages) for one in every[1].train}
    tasks.write_preferences(every[0].train[:3], tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["preferred_output"][0]["content"] for row in rows] == [one.preferred for one in every[0].train[:3]]
    assert rows[0]["input"]["messages"] == every[0].train[0].messages
