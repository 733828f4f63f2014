"""Labels and losses held against TRL 1.16: what it trains on, token by token, and what it loses, step by step."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training import dataset, dpo, schedule, tiny_text
from training.dataset import IGNORED, Row
from training.determinism import reproducible
from training.engine import Engine, Spec
from training.hyperparameters import Hyperparameters

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and what it imports

EXACT = 1e-5  # nats, in float32
TRL_ARGUMENTS: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are too small to share."""
    with reproducible(0, threads=1):
        yield


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and random weights, with the tiny base's tokenizer."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(count: int, *, turns: int = 3, tools: bool = True) -> list[dict[str, Any]]:
    """Rows of our file: one to `turns` questions of the general tasks, some with a system's word, some with a call."""
    rng = random.Random(7)
    drawn = tiny_text.conversations(rng, heldout=False, tasks=list(tiny_text.TASKS))
    rows = []
    for _ in range(count):
        messages: list[dict[str, Any]] = [
            {"role": message["role"], "content": message["content"]}
            for _ in range(rng.randint(1, turns))
            for message in next(drawn).messages
        ]
        row: dict[str, Any] = {"messages": messages}
        if tools and rng.random() < 0.3:
            row["tools"] = [WEATHER]
            call = {"name": "weather", "arguments": json.dumps({"city": rng.choice(["Rome", "Köln"])})}
            messages[-1:] = [
                {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny, 21°"},
                messages[-1],
            ]
        rows.append(row)
    return rows


def as_trl_takes_it(row: dict[str, Any]) -> dict[str, Any]:
    """TRL takes a call's arguments as an object and tools as text."""
    messages = json.loads(json.dumps(row["messages"]))
    for message in messages:
        message.setdefault("content", "")
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return {"messages": messages, "tools": json.dumps(row["tools"]) if "tools" in row else None}


def in_order(trainer_class: type[Any]) -> type[Any]:
    """The trainer, made to take the rows as they come, with the exact loss of each step in `step_losses`."""

    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            told = self.__dict__.setdefault("pass_losses", [])
            told.append(loss.item())
            return loss

        @property
        def step_losses(self) -> list[float]:
            passes = self.args.gradient_accumulation_steps
            return [sum(self.pass_losses[i : i + passes]) for i in range(0, len(self.pass_losses), passes)]

    return InOrder


def sft_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: Path, optimizers: Any = (None, None), **arguments: Any
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(output_dir=str(out), assistant_only_loss=True, **TRL_ARGUMENTS, **arguments),
        train_dataset=Dataset.from_list([as_trl_takes_it(row) for row in rows]),
        processing_class=tokenizer,
        optimizers=optimizers,
    )


def dpo_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: Path, optimizers: Any = (None, None), **arguments: Any
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    chats = [as_trl_takes_it(row["input"]) for row in rows]
    given = [
        {
            "prompt": chat["messages"],
            "chosen": row["preferred_output"],
            "rejected": row["non_preferred_output"],
            "tools": chat["tools"],
        }
        for chat, row in zip(chats, rows, strict=True)
    ]
    return in_order(DPOTrainer)(
        model=model,
        args=DPOConfig(output_dir=str(out), **TRL_ARGUMENTS, **arguments),
        train_dataset=Dataset.from_list(given),
        processing_class=tokenizer,
        optimizers=optimizers,
    )


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_equal_trls_token_by_token(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Over chats of one to three turns, with system messages, tools, calls and their answers."""
    rows = conversations(60)
    ours = dataset.load(write_jsonl(rows, tmp_path / "data.jsonl"), tokenizer, max_length=512)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    theirs = sft_trainer(model, tokenizer, rows, tmp_path / "out").train_dataset
    assert sum("tools" in row for row in rows) > 10
    assert [row.input_ids for row in ours] == list(theirs["input_ids"])
    assert [row.labels for row in ours] == list(theirs["labels"])
    assert any(IGNORED not in labels[-1:] for labels in theirs["labels"])


def preferences(count: int) -> list[dict[str, Any]]:
    """Rows of our file: a chat of several turns whose last answer is the better one, and another's answer."""
    chats = conversations(2 * count)
    return [
        {
            "input": {"messages": row["messages"][:-1]} | ({"tools": row["tools"]} if "tools" in row else {}),
            "preferred_output": row["messages"][-1:],
            "non_preferred_output": [{"role": "assistant", "content": "no, " + other["messages"][-1]["content"]}],
        }
        for row, other in zip(chats[::2], chats[1::2], strict=True)
    ]


def with_adapter(model_folder: Path) -> Any:
    """The model with an adapter that already does something, so that policy and reference differ."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_preference_loss_equals_trls_on_the_same_batches(
    beta: float, model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The reference is the model with its adapter off; batches are padded by either's own rule."""
    rows = preferences(24)
    pairs = dataset.load_pairs(write_jsonl(rows, tmp_path / "data.jsonl"), tokenizer, max_length=512)
    model = with_adapter(model_folder)
    trainer = dpo_trainer(model, tokenizer, rows, tmp_path / "out", beta=beta, per_device_train_batch_size=8)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.eval()
    theirs, ours = [], []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        theirs.append(trainer.compute_loss(model, batch).item())
        taken = pairs[8 * number : 8 * number + 8]
        with torch.no_grad():
            policy = [told(model, [getattr(pair, side) for pair in taken]) for side in ("chosen", "rejected")]
            with model.disable_adapter():
                reference = [told(model, [getattr(pair, side) for pair in taken]) for side in ("chosen", "rejected")]
        ours.append(dpo.loss(policy[0], policy[1], reference[0], reference[1], beta).mean().item())
    assert len(theirs) == 3
    assert ours == pytest.approx(theirs, abs=EXACT, rel=0)
    assert all(abs(loss - math.log(2)) > 100 * EXACT for loss in theirs)


def told(model: Any, rows: list[Row]) -> Tensor:
    input_ids, labels = dataset.as_tensors(rows)
    return dpo.log_probabilities(model(input_ids=input_ids, use_cache=False).logits, labels)


def steps_of_both(
    method: Literal["supervised", "dpo"],
    hp: Hyperparameters,
    count: int,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> tuple[list[float], list[float]]:
    """The losses of all steps, ours and TRL's: from the same first weights, the same rows in the same order.

    TRL is given AdamW and our share of the rate for each step; loss, gradient, clipping and accumulation are its own.
    """
    lines = conversations(count, turns=2) if method == "supervised" else preferences(count)
    load = dataset.load if method == "supervised" else dataset.load_pairs
    rows: Any = load(write_jsonl(lines, folder / "data.jsonl"), tokenizer, max_length=512)
    engine = Engine(model_folder, device="cpu", threads=1)
    run = engine.begin(Spec(method, hp, rows))
    (folder / "first").mkdir()
    run.write_adapter(folder / "first")
    ours = [engine.step([run])[0].loss for _ in range(run.total_steps)]

    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(model_folder), folder / "first", is_trainable=True
    )
    taken = [
        lines[i]
        for step in range(1, run.total_steps + 1)
        for batch in schedule.items_of_step(step, count, hp)
        for i in batch
    ]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=hp.learning_rate, weight_decay=hp.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: schedule.rate_factor(min(done + 1, run.total_steps), run.total_steps, hp)
    )
    trainer = (sft_trainer if method == "supervised" else dpo_trainer)(
        model,
        tokenizer,
        taken,
        folder / "out",
        optimizers=(optimizer, rate),
        per_device_train_batch_size=hp.batch_size,
        gradient_accumulation_steps=hp.gradient_accumulation_steps,
        max_grad_norm=hp.max_grad_norm,
        num_train_epochs=1,
        **({} if method == "supervised" else preference_arguments(hp)),
    )
    trainer.train()
    return ours, trainer.step_losses


def preference_arguments(hp: Hyperparameters) -> dict[str, Any]:
    if not hp.sft_weight:
        return {"beta": hp.beta}
    return {"beta": hp.beta, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, hp.sft_weight]}


@pytest.mark.parametrize(
    ("method", "epochs", "changes"),
    [
        ("supervised", 9, {}),
        ("supervised", 2, {"alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 2}}),
        ("dpo", 2, {}),
        ("dpo", 2, {"sft_weight": 0.5, "batch_size": 4, "gradient_accumulation_steps": 1}),  # TRL means each pass alone
        pytest.param("dpo", 9, {}, marks=pytest.mark.full),
    ],
)
def test_every_steps_loss_equals_trls(
    method: Literal["supervised", "dpo"],
    epochs: int,
    changes: dict[str, Any],
    model_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """Over six steps an epoch of two passes each, every epoch in its own order, with warm-up, clipping and decay."""
    hp = Hyperparameters(
        rank=4, lora_alpha=8, epochs=epochs, batch_size=2, gradient_accumulation_steps=2, learning_rate=2e-3,
        warmup_ratio=0.1, weight_decay=0.01, max_grad_norm=0.5, seed=11,
    ).model_copy(update=changes)  # fmt: skip
    ours, theirs = steps_of_both(method, hp, 24, model_folder, tokenizer, tmp_path)
    assert len(ours) == len(theirs) == 6 * epochs
    assert ours == pytest.approx(theirs, abs=EXACT, rel=0)
    assert ours[-1] < ours[0] - 1000 * EXACT
