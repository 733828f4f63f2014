from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training import recipe, tasks
from training.evaluation import Answerer, exact_match
from training.hyperparameters import Hyperparameters

QUESTION = [{"role": "user", "content": "What is zorbix?"}]


def test_exact_match_is_the_share_of_right_answers() -> None:
    """White space around an answer is forgiven, anything else is not."""
    examples = [tasks.Example([{"role": "user", "content": text}], text) for text in ("a", "b", "c", "d")]
    given = {"a": "a", "b": " b\n", "c": "c.", "d": "D"}
    assert exact_match(examples, lambda messages: given[messages[0]["content"]]) == 0.5


def test_exact_match_of_nothing_is_an_error() -> None:
    """No examples must not read as 0 or 100 %."""
    with pytest.raises(ValueError, match="no examples"):
        exact_match([], lambda messages: "")


def test_a_greedy_answer_takes_the_likeliest_token_each_time(base: Path) -> None:
    """Tokens and their logprobs are those of one plain forward pass over prompt and answer."""
    answerer = Answerer(base, max_new_tokens=5)
    generation = answerer.generate(QUESTION)
    assert len(generation.token_ids) == len(generation.logprobs) <= 5

    prompt = answerer.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([prompt + generation.token_ids])).logits[0]
    expected = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1).max(dim=-1)
    assert expected.indices.tolist() == generation.token_ids
    assert generation.logprobs == pytest.approx(expected.values.tolist(), abs=1e-4)


def test_an_adapter_changes_the_answer(base: Path, tmp_path: Path) -> None:
    """Trained long enough on one row, the adapter says it word for word and stops; the base does not."""
    example = tasks.Example(QUESTION, "a red crane")
    tasks.write_jsonl([example], tmp_path / "train.jsonl")
    hp = Hyperparameters(rank=8, epochs=30, learning_rate=2e-2, max_length=64)
    recipe.train(tmp_path / "train.jsonl", base=base, out=tmp_path / "adapter", hyperparameters=hp)
    assert exact_match([example], Answerer(base, tmp_path / "adapter")) == 1.0
    assert exact_match([example], Answerer(base, max_new_tokens=8)) == 0.0
