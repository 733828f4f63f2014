import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.random_adapters import save_random_adapter
from training import dataset, recipe, tasks
from training.engine import Engine, Spec
from training.evaluation import Answerer, as_run, evaluate_adapter
from training.hyperparameters import Hyperparameters

HP = Hyperparameters(rank=8, batch_size=8, max_length=64)
QUESTION = [{"role": "user", "content": "What is zorbix?"}]


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
    assert Answerer(base, tmp_path / "adapter")(example.messages) == example.answer
    assert Answerer(base, max_new_tokens=8)(example.messages) != example.answer


def test_the_engine_answers_as_transformers_does(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Token by token, base and adapter, though prompts of several lengths go in one batch and it keeps no cache."""
    folder = save_random_adapter(base, tmp_path / "adapter", seed=3, scale=0.1)
    engine = Engine(base, threads=1)
    texts = ["What is zorbix?", "Repeat: a b c", "Hello", "What is the capital of France, and of Italy?"]
    asked = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in asked]
    row = dataset.Row(prompts[0], [dataset.IGNORED, *prompts[0][1:]])
    for place in (None, folder):
        run = engine.begin(Spec("supervised", HP, [row])) if place is None else as_run(engine, place, row)
        reference = Answerer(base, place, max_new_tokens=6)
        end = reference.tokenizer.eos_token_id
        found = engine.answer(run, prompts, ends={end}, most_tokens=6)
        assert found == [[token for token in reference.generate(chat).token_ids if token != end] for chat in asked]


def test_an_adapter_is_judged_beside_base_and_predecessor(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """It has learned what the base does not know; a random one in its place is a regression, it in the random's not."""
    engine = Engine(base, threads=1)
    examples = [tasks.Example([{"role": "user", "content": f"Say {word}"}], word) for word in ("red", "blue") * 3]
    tasks.write_jsonl(examples, tmp_path / "train.jsonl")
    rows = dataset.load(tmp_path / "train.jsonl", tokenizer, max_length=64)
    hp = HP.model_copy(update={"epochs": 30, "learning_rate": 2e-2})
    run = engine.begin(Spec("supervised", hp, rows))
    while not run.done:
        engine.step([run])
    good, bad = tmp_path / "good", save_random_adapter(base, tmp_path / "bad", seed=1)
    good.mkdir()
    run.write_adapter(good)
    report = evaluate_adapter(engine, tokenizer, run, rows, previous=bad)
    assert (report.examples, report.adapter.scored.kind) == (6, "classification")
    assert report.adapter.scored.exact_match == 1.0 > report.base.scored.exact_match == 0.0
    assert report.adapter.loss < report.base.loss
    assert not report.is_regression
    assert report.adapter.loss == pytest.approx(engine.evaluate(run, rows).loss, rel=1e-5)
    worse = evaluate_adapter(engine, tokenizer, bad, rows, previous=good)
    assert worse.is_regression
    assert worse.previous is not None
    assert worse.previous.loss == pytest.approx(report.adapter.loss, rel=1e-5)
    told = json.loads(json.dumps(worse.as_json(), allow_nan=False))
    assert (told["is_regression"], told["answer_regression"]["after"]) == (True, 0.0)
    assert "worse" in worse.summary()
