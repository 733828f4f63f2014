"""The engine on a very small base. A run's gradient is read off its first moment: after one step that is a tenth."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedTokenizerFast

from training import dataset, tasks
from training.dataset import Pair, Row
from training.engine import Engine, Run, Spec, StepReport
from training.hyperparameters import Hyperparameters
from training.layout import Block, item, levelled
from training.slots import AdaptedLinear

QUICK: dict[str, Any] = {"rank": 4, "lora_alpha": 8, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2}
UNCLIPPED = 1000.0
NOTHING = item([Row([0], [0])])

Rows = Callable[[int], list[Row]]


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return Engine(base, threads=1)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A tenant's sixteen rows of unequal length."""

    def rows(tenant: int) -> list[Row]:
        path = tmp_path_factory.mktemp("rows") / "train.jsonl"
        tasks.write_jsonl(tasks.jargon(tenant, terms=4).train, path)
        return dataset.load(path, tokenizer, max_length=512)

    return rows


def spec(rows: Sequence[Row], **changes: object) -> Spec:
    return Spec("supervised", Hyperparameters.model_validate(QUICK | changes), rows)


def pairs(rows: Sequence[Row], **changes: object) -> Spec:
    made = [Pair(chosen, rejected) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
    return Spec("dpo", Hyperparameters.model_validate(QUICK | changes), made)


def trained(engine: Engine, spec: Spec) -> tuple[Run, list[StepReport]]:
    run = engine.begin(spec)
    reports = []
    while not run.done:
        reports += engine.step([run])
    return run, reports


def first_gradient(engine: Engine, rows: Sequence[Row], **changes: object) -> Tensor:
    run = engine.begin(spec(rows, max_steps=1, max_grad_norm=UNCLIPPED, **changes))
    assert engine.step([run])[0].error is None
    return run.moments[0] * 10


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_accumulated_gradients_equal_those_of_the_full_batch(engine: Engine, rows: Rows) -> None:
    """Every token of a step counts the same, however it is cut; a mean of the passes' means is caught."""
    unequal = sorted(rows(0), key=lambda row: row.trained_tokens)
    whole = first_gradient(engine, unequal, batch_size=16)
    ragged = first_gradient(engine, unequal, batch_size=5, gradient_accumulation_steps=4)
    means = [first_gradient(engine, part, batch_size=8) for part in (unequal[:8], unequal[8:])]
    mean_of_means = torch.stack(means).mean(0)
    assert difference(ragged, whole) < 1e-6
    assert difference(mean_of_means, whole) > 1e-4


def test_levelled_runs_learn_the_same_up_to_rounding(engine: Engine, base: Path) -> None:
    """Padding to one length, as on a GPU, makes fewer kernels of unequal runs, and changes no result."""
    level = Engine(base, threads=1, level=True)
    short, long = [Row([7] * 9, [7] * 9)] * 4, [Row([*range(5, 25)], [*range(5, 25)])] * 4
    specs = [spec(some, seed=seed, max_steps=3) for seed, some in enumerate((short, long))]
    ended, widths = [], []
    for one in (engine, level):
        runs = [one.begin(spec) for spec in specs]
        with watched_widths() as seen:
            while not runs[0].done:
                one.step(runs)
        ended.append(runs)
        widths.append(seen)
    assert all(difference(a.weights, b.weights) < 1e-5 for a, b in zip(*ended, strict=True))
    assert widths == [{4 * 16 + 4 * 24}, {8 * 24}]


@contextmanager
def watched_widths() -> Iterator[set[int]]:
    """How many tokens the adapted layers are given at once."""
    seen: set[int] = set()

    def note(layer: object, given: tuple[Tensor, ...], _: object) -> None:
        if isinstance(layer, AdaptedLinear):
            seen.add(given[0].shape[1])

    handle = register_module_forward_hook(note)
    yield seen
    handle.remove()


def test_blocks_are_levelled_among_their_kind() -> None:
    """A block may double, not more; other shapes of adapters or counts of rows are left alone."""
    lengths = [64, 120, 128, 200, 96, 72]
    blocks = [Block([NOTHING] * (2 if length == 72 else 1), length) for length in lengths]
    kinds = ["a", "a", "a", "a", "b", "a"]
    assert [block.length for block in levelled(blocks, kinds)] == [64, 200, 200, 200, 96, 72]
    assert levelled([], []) == []


def mixture(rows: Rows) -> list[Spec]:
    """Different ranks, alphas, rates, lengths, schedules, cuts and methods."""
    return [
        spec(rows(0), epochs=2, seed=1),
        spec(rows(1), rank=8, learning_rate=5e-3, batch_size=3, gradient_accumulation_steps=2, schedule="linear"),
        spec(rows(2), rank=5, lora_alpha=7, batch_size=1, schedule="constant", weight_decay=0.1),
        spec(rows(3), rank=16, rslora=True, loraplus_ratio=4, packing=True, max_length=64, batch_size=2),
        spec(rows(4), epochs=2, rank_pattern={"q_proj": 12}, alpha_pattern={"o_proj": 3}, max_grad_norm=0.1),
        spec(rows(5), epochs=2, target_modules=["q_proj", "v_proj"], gradient_checkpointing=True),
        pairs(rows(6), learning_rate=1e-3, beta=0.3),
        spec(rows(7), epochs=2),
    ]


def together(engine: Engine, specs: Sequence[Spec]) -> list[Run]:
    """Train all; one joins at each step, and each leaves when it is done."""
    runs = [engine.begin(spec) for spec in specs]
    steps = 0
    while not all(run.done for run in runs):
        steps += 1
        engine.step([run for run in runs[:steps] if not run.done] or runs[steps : steps + 1])
    return runs


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_side_by_side_are_what_they_are_alone(base: Path, rows: Rows, threads: int) -> None:
    """Bit for bit, while runs join and leave at every step."""
    engine = Engine(base, threads=threads)
    specs = mixture(rows)
    for run, spec in zip(together(engine, specs), specs, strict=True):
        alone, _ = trained(engine, spec)
        assert torch.equal(run.weights, alone.weights)
        assert all(torch.equal(*moments) for moments in zip(run.moments, alone.moments, strict=True))


def test_one_runs_data_changes_no_other_run(engine: Engine, rows: Rows) -> None:
    """With another tenant's data replaced, every other run keeps its bits, and that one does not."""
    specs = mixture(rows)
    changed = [*specs[:2], spec(rows(8), rank=5, lora_alpha=7, batch_size=1, schedule="constant"), *specs[3:]]
    before, after = together(engine, specs), together(engine, changed)
    same = [torch.equal(one.weights, other.weights) for one, other in zip(before, after, strict=True)]
    assert same == [True, True, False, *[True] * 5]
