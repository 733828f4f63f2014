"""Supervised LoRA training, from a data file to the two files of an adapter. Read `train` top to bottom.

Only the loop lives here: what a row is, is `dataset`; what may be chosen, is `hyperparameters`.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training import dataset
from training.dataset import IGNORED, Row
from training.determinism import reproducible
from training.hyperparameters import Hyperparameters
from training.output_folder import new_folder
from training.progress import OnProgress, Progress, no_library_bars

FINGERPRINT_KEY = "tailor.base_fingerprint"  # in the metadata of the safetensors file


class TrainingFailed(Exception):
    """Training cannot give a usable adapter; the message says at which step and why."""


class LossNotFinite(TrainingFailed):
    """The loss became NaN or infinite, at `step` (the first is 1)."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss is {loss} at step {step}: lower the learning rate or look at the data")
        self.step = step


@dataclass(frozen=True, slots=True)
class TrainResult:
    """`losses` holds each step's mean per trained token, in nats; `trained_tokens` counts every epoch again."""

    out: Path
    losses: list[float]
    steps: int
    trained_tokens: int
    seconds: float


def train(
    data: Path,
    *,
    base: Path,
    out: Path,
    hyperparameters: Hyperparameters,
    base_fingerprint: str | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train a LoRA adapter for the model in `base` on the chats in `data`; write it to the new folder `out`.

    The same inputs give the same bytes on one machine with the same number of CPU `threads` (torch's own choice
    if not given; one is best for a tiny base, whose matrices are too small to share). `base_fingerprint` is kept
    in the file, so that the adapter can be refused where another base is served.

    Raises:
        OutputExists, DatasetInvalid, NoGenerationMask: before any training; nothing is written.
        TrainingFailed: nothing is left behind.
    """
    started = time.perf_counter()
    hp = hyperparameters
    with new_folder(out) as folder, reproducible(hp.seed, threads=threads):
        tokenizer = AutoTokenizer.from_pretrained(base)
        base_model = load_base(base)
        longest = min(hp.max_length, base_model.config.max_position_embeddings)
        rows = dataset.load(data, tokenizer, max_length=longest)
        model = with_adapter(base_model, hp)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay, fused=True)
        total = step_count(len(rows), hp)

        losses: list[float] = []
        trained_tokens = 0
        for step, micro_batches in enumerate(_steps(rows, hp, total), start=1):
            # The whole step is one mean over its tokens, however the rows are cut into micro-batches: a mean of
            # micro-batch means would weigh a token by how few others share its micro-batch.
            step_tokens = sum(row.trained_tokens for batch in micro_batches for row in batch)
            loss = 0.0
            for batch in micro_batches:
                batch_loss = loss_sum(model, batch) / step_tokens
                batch_loss.backward()
                loss += batch_loss.item()
            if not math.isfinite(loss):
                raise LossNotFinite(step, loss)
            torch.nn.utils.clip_grad_norm_(parameters, hp.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = hp.learning_rate * rate_factor(step, total, hp)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            trained_tokens += step_tokens
            if on_progress is not None:
                on_progress(Progress(step, total, loss))

        _write_adapter(model, folder, base, base_fingerprint)
    return TrainResult(out, losses, total, trained_tokens, time.perf_counter() - started)


def load_base(base: Path) -> PreTrainedModel:
    """The model in the folder `base`, on the GPU in its own precision if there is one, else in float32."""
    on_gpu = torch.cuda.is_available()
    with no_library_bars():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto" if on_gpu else torch.float32)
    return model.to("cuda" if on_gpu else "cpu")


def with_adapter(base_model: PreTrainedModel, hp: Hyperparameters) -> PeftModel:
    """The frozen base with fresh LoRA weights in float32; its output is still the base's."""
    _check_targets(base_model, hp)
    config = LoraConfig(
        r=hp.rank, lora_alpha=hp.lora_alpha, target_modules=list(hp.target_modules), task_type="CAUSAL_LM"
    )
    return get_peft_model(base_model, config).train()


def _check_targets(model: PreTrainedModel, hp: Hyperparameters) -> None:
    linears = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    linears.discard("lm_head")  # engines do not serve an adapted output layer
    if missing := set(hp.target_modules) - linears:
        raise TrainingFailed(
            f"the base has no linear layers named {', '.join(sorted(missing))}; it has {', '.join(sorted(linears))}"
        )


def step_count(rows: int, hp: Hyperparameters) -> int:
    """Steps of a whole run; the last step of an epoch takes the rows that are left."""
    per_epoch = math.ceil(rows / (hp.batch_size * hp.gradient_accumulation_steps))
    steps = hp.epochs * per_epoch
    return steps if hp.max_steps is None else min(steps, hp.max_steps)


def _steps(rows: list[Row], hp: Hyperparameters, total: int) -> Iterator[list[list[Row]]]:
    """The micro-batches of each step; every epoch has its own order of rows, drawn from the seed."""
    order = torch.Generator().manual_seed(hp.seed)
    per_step = hp.batch_size * hp.gradient_accumulation_steps
    step = 0
    while True:
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        for start in range(0, len(rows), per_step):
            taken = shuffled[start : start + per_step]
            yield [taken[i : i + hp.batch_size] for i in range(0, len(taken), hp.batch_size)]
            step += 1
            if step == total:
                return


def loss_sum(model: PeftModel, batch: list[Row]) -> Tensor:
    """Cross entropy summed, not averaged, over the trained tokens of `batch`; a scalar."""
    input_ids, labels = dataset.as_tensors(batch)
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits[:, :-1]  # (batch, seq - 1, vocabulary)
    targets = labels[:, 1:].to(model.device)  # the token after each position
    trained = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[trained].float(), targets[trained], reduction="sum")


def rate_factor(step: int, total: int, hp: Hyperparameters) -> float:
    """Share of the learning rate that step `step` of `total` (the first is 1) uses."""
    warmup = math.ceil(hp.warmup_ratio * total)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup + 1)  # below 1, so that the last step still learns
    match hp.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2


def _write_adapter(model: PeftModel, folder: Path, base: Path, base_fingerprint: str | None) -> None:
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise TrainingFailed(f"weights are not finite after the last step, {broken[0]} among them")
    metadata = {"format": "pt"}
    if base_fingerprint is not None:
        metadata[FINGERPRINT_KEY] = base_fingerprint
    save_file(weights, folder / "adapter_model.safetensors", metadata)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.resolve().name
    config.inference_mode = True
    config.save_pretrained(folder)
