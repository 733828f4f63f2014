"""The work that benchmarks of training share: an untrained Llama, token rows, tenants' runs, others' trainers."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.dataset import IGNORED, Row
from training.engine import Engine, Run, Spec
from training.hyperparameters import Hyperparameters

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a base, and of what its tenants bring: rows of `lengths` tokens, the last `trained` share of them trained."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    lengths: tuple[int, int]
    rank: int
    trained: float = 0.5


def write_base(folder: Path, size: Size, *, dtype: torch.dtype, device: str) -> int:
    """A model folder with random weights; returns how many."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=2 * size.lengths[1],
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def rows(size: Size, count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(1, size.vocabulary) for _ in range(rng.randint(*size.lengths))]
        asked = round(len(ids) * (1 - size.trained))
        made.append(Row(ids, [IGNORED] * asked + ids[asked:]))
    return made


def hyperparameters(size: Size, batch_size: int, steps: int) -> Hyperparameters:
    return Hyperparameters(
        rank=size.rank, lora_alpha=2 * size.rank, batch_size=batch_size, epochs=1000, max_steps=steps,
        learning_rate=2e-4, max_length=size.lengths[1],
    )  # fmt: skip


def tenants(engine: Engine, size: Size, count: int, batch_size: int, steps: int) -> list[Run]:
    """Runs of as many tenants, each with rows and a seed of its own."""
    hp = hyperparameters(size, batch_size, steps)
    return [
        engine.begin(Spec("supervised", hp.model_copy(update={"seed": seed}), rows(size, 16 * batch_size, seed)))
        for seed in range(count)
    ]


def tokens_of(run: Run) -> int:
    """Of the next step, without padding."""
    return sum(len(item.input_ids) for items in run.micro_batches() for item in items)


def pace(engine: Engine, groups: Sequence[Sequence[Run]], *, warm_up: int, steps: int, clock: Clock) -> "Pace":
    """What a step of all groups takes, one group after the other: a group is one batch."""
    for _ in range(warm_up):
        for group in groups:
            engine.step(group)
    tokens, begin = 0, clock()
    for _ in range(steps):
        for group in groups:
            tokens += sum(tokens_of(run) for run in group)
            engine.step(group)
    return Pace(tokens, clock() - begin, steps)


@dataclass(frozen=True, slots=True)
class Pace:
    tokens: int
    seconds: float
    steps: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.steps


def peft_model(base: Path, size: Size, *, dtype: torch.dtype, device: str) -> Any:
    """The base with PEFT's adapter on the layers that ours adapts."""
    from peft import LoraConfig, get_peft_model

    hp = hyperparameters(size, 1, 1)
    config = LoraConfig(
        r=hp.rank, lora_alpha=hp.lora_alpha, target_modules=list(hp.target_modules), task_type="CAUSAL_LM"
    )
    return get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=dtype).to(device), config)


def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded to the longest row, as the trainers do by default."""
    longest = max(len(row["input_ids"]) for row in batch)
    padding = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])
        for name, value in padding.items()
    }


class Listed(torch.utils.data.Dataset):  # type: ignore[misc]
    """Rows as transformers' Trainer takes them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [
            {"input_ids": row.input_ids, "labels": row.labels, "attention_mask": [1] * len(row.input_ids)}
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        return self._rows[at]


def trainer_pace(
    model: Any, size: Size, out: Path, batch_size: int, *, warm_up: int, steps: int, clock: Clock, cpu: bool
) -> Pace:
    """What a step of transformers' Trainer takes, on rows like the first tenant's."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            times.append(clock())

    given = rows(size, (warm_up + steps) * batch_size, 0)
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=batch_size, max_steps=warm_up + steps, learning_rate=2e-4,
        optim="adamw_torch_fused", bf16=not cpu, use_cpu=cpu, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, train_sampling_strategy="sequential",
        dataloader_pin_memory=not cpu,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, Listed(given), callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tokens = sum(len(row.input_ids) for row in given[warm_up * batch_size :])
    return Pace(tokens, times[-1] - times[warm_up - 1], steps)


def synchronised() -> float:
    """The time at which the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
