"""The engine on a very small base. A run's gradient is read off its first moment: after one step that is a tenth."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.unit.training import killed
from training import dataset, tasks
from training.dataset import Pair, Row
from training.engine import Engine, Run, Spec, StepReport
from training.failures import LossNotFinite, TrainingFailed
from training.hyperparameters import Hyperparameters
from training.layout import Block, block, item, levelled, line
from training.slots import AdaptedLinear, adaptable

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
    short, long = [Row([7] * 9, [7] * 9)] * 4, [Row([*range(5, 35)], [*range(5, 35)])] * 4
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
    assert widths == [{4 * 24 + 4 * 32}, {8 * 32}]


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
        pairs(rows(6), learning_rate=1e-3, beta=0.3, sft_weight=0.5),
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


def test_stacked_adapters_keep_their_own_scales(engine: Engine, rows: Rows) -> None:
    """Same rows, so one stack; one scale for all of a run's layers, another, and one for each layer."""
    changes: list[dict[str, Any]] = [{}, {"lora_alpha": 3}, {"alpha_pattern": {"o_proj": 3}}]
    specs = [spec(rows(0), max_steps=3, gradient_accumulation_steps=2, batch_size=2, **change) for change in changes]
    runs = [engine.begin(spec) for spec in specs]
    while not runs[0].done:
        engine.step(runs)
    for run, spec_ in zip(runs, specs, strict=True):
        assert torch.equal(run.weights, trained(engine, spec_)[0].weights)
    assert not any(torch.equal(one.weights, other.weights) for one, other in combinations(runs, 2))


def test_one_runs_data_changes_no_other_run(engine: Engine, rows: Rows) -> None:
    """With another tenant's data replaced, every other run keeps its bits, and that one does not."""
    specs = mixture(rows)
    changed = [*specs[:2], spec(rows(8), rank=5, lora_alpha=7, batch_size=1, schedule="constant"), *specs[3:]]
    before, after = together(engine, specs), together(engine, changed)
    same = [torch.equal(one.weights, other.weights) for one, other in zip(before, after, strict=True)]
    assert same == [True, True, False, *[True] * 5]


def told(model: Any, rows: Sequence[Row], *, masked: bool = True) -> tuple[Tensor, Tensor]:
    """Logits of the rows as one pack, and what a sum over them sends back to the tokens' embeddings."""
    laid = line([block([item(rows)])], torch.device("cpu"))
    stretches = laid.stretches if masked else [replace(stretch, mask=None) for stretch in laid.stretches]
    embedded = model.get_input_embeddings()(laid.input_ids).requires_grad_()
    decoder = model.get_decoder()
    hidden = decoder(inputs_embeds=embedded, position_ids=laid.positions, use_cache=False, stretches=stretches)[0]
    tokens = sum(len(row.input_ids) for row in rows)
    logits = model.lm_head(hidden[0, :tokens])
    weights = torch.linspace(-1, 1, logits.shape[1])
    ((logits.log_softmax(-1) * weights).sum() / 1000).backward()
    return logits.detach(), embedded.grad[0, :tokens]


def test_packed_rows_do_not_see_each_other(base: Path, rows: Rows) -> None:
    """Logits and gradients are those of separate rows; positions that begin anew do not do it without the mask."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adaptable(model)
    packed = rows(0)[:5]
    apart = [torch.cat(parts) for parts in zip(*(told(model, [row]) for row in packed), strict=True)]
    assert all(difference(*pair) <= 1e-5 for pair in zip(told(model, packed), apart, strict=True))
    assert all(difference(*pair) > 1e-3 for pair in zip(told(model, packed, masked=False), apart, strict=True))


def test_packing_changes_no_gradient(engine: Engine, rows: Rows) -> None:
    """Sixteen rows in a few packs give the adapter the gradient that they give as rows."""
    whole = first_gradient(engine, rows(0), batch_size=16)
    packed = first_gradient(engine, rows(0), batch_size=16, packing=True, max_length=100)
    assert engine.begin(spec(rows(0), packing=True, max_length=100, batch_size=1)).total_steps < 10
    assert difference(packed, whole) <= 1e-5


def test_a_run_of_nan_is_told_so_and_others_go_on(engine: Engine, rows: Rows) -> None:
    """The broken run keeps its step and is over; its neighbours keep their bits."""
    healthy, broken = engine.begin(spec(rows(0))), engine.begin(spec(rows(1)))
    broken.weights.fill_(math.nan)
    fine, failed = engine.step([healthy, broken])
    assert isinstance(failed.error, LossNotFinite)
    assert "step 1" in str(failed.error)
    assert fine.error is None
    assert (broken.done, broken.step, healthy.step) == (True, 0, 1)
    with pytest.raises(ValueError, match="steps left"):
        engine.step([healthy, broken])
    while not healthy.done:
        engine.step([healthy])
    assert torch.equal(healthy.weights, trained(engine, spec(rows(0)))[0].weights)


@pytest.mark.parametrize(
    "changes", [{}, {"rslora": True, "rank_pattern": {"q_proj": 12, "mlp.up_proj": 2}, "alpha_pattern": {"o_proj": 3}}]
)
def test_peft_says_what_the_engine_says(
    engine: Engine, base: Path, rows: Rows, tmp_path: Path, changes: dict[str, object]
) -> None:
    """The written adapter, loaded by PEFT, loses on a row what the run itself loses on it."""
    run, _ = trained(engine, spec(rows(0), **changes))
    run.write_adapter(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    row = rows(0)[0]
    theirs = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
    assert engine.evaluate(run, [row]).loss == pytest.approx(theirs, abs=1e-5)
    assert engine.evaluate(engine.begin(run.spec), [row]).loss != pytest.approx(theirs, abs=1e-2)


def test_a_warm_start_begins_where_the_other_ended(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    """Also at another alpha and a higher rank; a lower rank or fewer layers are refused."""
    run, _ = trained(engine, spec(rows(0)))
    run.write_adapter(tmp_path)
    ended = engine.evaluate(run, rows(0)).loss
    again = engine.begin(replace(spec(rows(0), rank=11, lora_alpha=5, rslora=True), warm_start=tmp_path))
    assert engine.evaluate(again, rows(0)).loss == pytest.approx(ended, abs=1e-5)
    for changes, reason in (({"rank": 2}, "choose at least that"), ({"target_modules": ["q_proj"]}, "also adapts")):
        with pytest.raises(TrainingFailed, match=reason):
            engine.begin(replace(spec(rows(0), **changes), warm_start=tmp_path))


def test_training_stops_when_validation_gets_worse_and_the_best_is_kept(
    engine: Engine, rows: Rows, tmp_path: Path
) -> None:
    """On another tenant's answers the loss soon rises; what is written is what validated best."""
    changes = {"learning_rate": 0.1, "epochs": 20, "eval_steps": 1, "early_stopping_patience": 2}
    early = replace(spec(rows(0), **changes), validation=rows(1))
    run, reports = trained(engine, early)
    losses = [report.validation.loss for report in reports if report.validation is not None]
    assert len(losses) == len(reports) < run.total_steps
    assert run.best is not None
    assert losses[run.best.step - 1] == min(losses) == run.best.loss
    assert len(losses) == run.best.step + 2
    run.write_adapter(tmp_path)
    kept = engine.begin(replace(early, warm_start=tmp_path))
    assert engine.evaluate(kept, rows(1)).loss == pytest.approx(min(losses), abs=1e-6)


def test_a_preference_run_starts_at_the_base_and_learns(engine: Engine, rows: Rows) -> None:
    """With the adapter still at nothing, policy is reference and each pair loses ln 2."""
    run, reports = trained(engine, pairs(rows(0), epochs=4))
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert reports[-1].loss < 0.5
    assert engine.evaluate(run, run.spec.rows).token_accuracy == 1.0


def test_a_preference_run_is_held_against_what_it_began_as(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    """An adapter that it goes on from is its reference, beside runs that have the base."""
    run, _ = trained(engine, spec(rows(0)))
    run.write_adapter(tmp_path)
    warm = replace(pairs(rows(0), epochs=2), warm_start=tmp_path)
    runs = [engine.begin(warm), engine.begin(pairs(rows(0), epochs=2))]
    for report in engine.step(runs):
        assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    while not runs[0].done:
        engine.step(runs)
    for beside, one in zip(runs, (warm, runs[1].spec), strict=True):
        assert torch.equal(beside.weights, trained(engine, one)[0].weights)


def test_better_answers_count_beside_the_preference(engine: Engine, rows: Rows) -> None:
    """By the mean loss of a token of the whole step, however it is cut."""
    unequal = sorted(rows(0), key=lambda row: row.trained_tokens)
    better = Spec("supervised", Hyperparameters.model_validate(QUICK), unequal[::2])
    told = engine.evaluate(engine.begin(better), better.rows).loss
    cuts = [{"batch_size": 8}, {"batch_size": 2, "gradient_accumulation_steps": 4}]
    runs = [engine.begin(pairs(unequal, sft_weight=0.25, max_grad_norm=UNCLIPPED, max_steps=1, **cut)) for cut in cuts]
    for run in runs:
        assert engine.step([run])[0].loss == pytest.approx(math.log(2) + 0.25 * told, abs=1e-5)
    assert difference(*(run.moments[0] * 10 for run in runs)) < 1e-6


def test_a_checkpoint_is_its_runs_alone(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    """Other data or numbers are refused; without any checkpoint a run begins."""
    run = engine.begin(spec(rows(0)))
    engine.step([run])
    run.save(tmp_path)
    assert engine.resume(spec(rows(0)), tmp_path).step == 1
    assert engine.resume(spec(rows(0)), tmp_path / "none").step == 0
    for other in (spec(rows(1)), spec(rows(0), learning_rate=2e-2)):
        with pytest.raises(TrainingFailed, match="of another run"):
            engine.resume(other, tmp_path)


def test_the_last_two_checkpoints_are_kept(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    """What a crash left half written goes too."""
    (tmp_path / "step-00000000-half.partial").write_bytes(b"half")
    run = engine.begin(spec(rows(0)))
    while not run.done:
        engine.step([run])
        run.save(tmp_path)
    assert [path.name[:13] for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    engine: Engine, base: Path, rows: Rows, tmp_path: Path, kills: int
) -> None:
    """SIGKILL at random moments, the newest checkpoint torn after every second."""
    (tmp_path / "rows.json").write_text(json.dumps([asdict(row) for row in rows(0)]))
    never, _ = trained(engine, killed.spec(rows(0)))
    never.write_adapter(tmp_path)
    places = [str(base), str(tmp_path / "rows.json"), str(tmp_path / "often")]
    command = [sys.executable, "-m", "tests.unit.training.killed", *places]
    root = Path(__file__).parents[3]
    done = subprocess.run([*command, str(kills)], check=True, capture_output=True, text=True, cwd=root)
    often = json.loads(done.stdout.splitlines()[-1])
    assert (often["killed"], often["torn"]) == (kills, kills // 2)
    assert often["sha256"] == hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
