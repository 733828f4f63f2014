"""Labels and losses held against TRL 1.16: what it trains on, token by token, and what it loses, step by step."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training import dataset, dpo, tiny_text
from training.dataset import IGNORED, Row
from training.determinism import reproducible

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


def sft_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: Path, **arguments: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    arguments = {"output_dir": str(out), "assistant_only_loss": True} | TRL_ARGUMENTS | arguments
    given = Dataset.from_list([as_trl_takes_it(row) for row in rows])
    return InOrder(model=model, args=SFTConfig(**arguments), train_dataset=given, processing_class=tokenizer)


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


def dpo_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: Path, **arguments: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    arguments = {"output_dir": str(out)} | TRL_ARGUMENTS | arguments
    chats = [as_trl_takes_it(row["input"]) for row in rows]
    given = Dataset.from_list(
        [
            {
                "prompt": chat["messages"],
                "chosen": row["preferred_output"],
                "rejected": row["non_preferred_output"],
                "tools": chat["tools"],
            }
            for chat, row in zip(chats, rows, strict=True)
        ]
    )
    return InOrder(model=model, args=DPOConfig(**arguments), train_dataset=given, processing_class=tokenizer)


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
    assert ours == pytest.approx(theirs, abs=EXACT)
    assert all(abs(loss - math.log(2)) > 100 * EXACT for loss in theirs)


def told(model: Any, rows: list[Row]) -> Tensor:
    input_ids, labels = dataset.as_tensors(rows)
    return dpo.log_probabilities(model(input_ids=input_ids, use_cache=False).logits, labels)
