import json
import random
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.small_base import SMALL
from training import tiny_base, tiny_text
from training.output_folder import OutputExists
from training.progress import Progress

TASKS = list(tiny_text.TASKS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_rerun_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """A base built twice from one seed is the same in every file."""
    tiny_base.build(tmp_path / "again", recipe=SMALL)
    assert contents(tmp_path / "again") == contents(base)


def test_another_seed_gives_another_model(base: Path, tmp_path: Path) -> None:
    """The seed reaches the weights."""
    tiny_base.build(tmp_path / "other", seed=1, recipe=SMALL)
    assert contents(tmp_path / "other")["model.safetensors"] != contents(base)["model.safetensors"]


def test_progress_counts_every_step(tmp_path: Path) -> None:
    """The callback hears of each step once, in order."""
    heard: list[Progress] = []
    tiny_base.build(tmp_path / "base", recipe=SMALL, on_progress=heard.append)
    assert [(progress.step, progress.total) for progress in heard] == [(1, 3), (2, 3), (3, 3)]


def test_the_recipe_hash_follows_seed_and_recipe() -> None:
    """Whatever changes the bytes changes the name under which they are cached."""
    hashes = {
        tiny_base.recipe_hash(),
        tiny_base.recipe_hash(seed=1),
        tiny_base.recipe_hash(recipe=SMALL),
    }
    assert len(hashes) == 3
    assert tiny_base.recipe_hash() == tiny_base.recipe_hash(seed=0)


def test_the_rows_are_those_of_the_recipe_hash() -> None:
    """Template and labels are not hashed, so that they may grow; what the weights are made of may not change unseen."""
    assert tiny_base.rows_sha256() == tiny_base.ROWS_SHA256


def test_a_cached_base_gets_the_template_of_today(base: Path, tmp_path: Path) -> None:
    """The template is no part of the weights: a base of an older one is not made again."""
    for name in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("old")
    tiny_base.give_template(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_card_tells_what_was_measured(base: Path) -> None:
    """`tailor.json` holds the held-out accuracy and the hash of the recipe."""
    card = json.loads((base / "tailor.json").read_text())
    assert card["recipe_hash"] == tiny_base.recipe_hash(recipe=SMALL)
    assert set(card["heldout_accuracy_by_task"]) == set(tiny_text.TASKS)
    assert 0 <= card["heldout_accuracy"] <= 1


def test_the_shipped_recipe_fits_its_bounds() -> None:
    """Widths are multiples of 64 (bitsandbytes on CPU), heads of 32 (vLLM's CPU attention)."""
    recipe = tiny_base.DEFAULT
    assert recipe.hidden_size % 64 == 0
    assert recipe.intermediate_size % 64 == 0
    assert recipe.hidden_size // recipe.heads in (32, 64)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Byte-level tokens cover every script, and decoding gives the text back."""
    for text in ("plain words", "Grüße, 東京! 🦊\n\tend", "  two  spaces ", "\x00\x7f"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_chat_template_renders_roles_and_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat starts with one beginning-of-sequence token and each turn ends with the end token."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"


def test_generation_stops_at_the_end_of_turn(base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The end-of-turn token is the one at which engines stop."""
    stops = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.convert_tokens_to_ids("<|end|>") == AutoConfig.from_pretrained(base).eos_token_id


def test_nothing_is_built_over_an_existing_folder(base: Path) -> None:
    """A taken place is refused at once and left alone."""
    before = contents(base)
    with pytest.raises(OutputExists, match="already exists"):
        tiny_base.build(base, recipe=SMALL)
    assert contents(base) == before


def test_held_out_questions_never_reach_training() -> None:
    """The two streams share no question, in any task."""

    def questions(*, heldout: bool) -> set[str]:
        drawn = islice(tiny_text.conversations(random.Random(0), heldout=heldout, tasks=TASKS), 5_000)
        return {json.dumps([m["content"] for m in c.messages[:-1] if m["role"] != "system"]) for c in drawn}

    assert not questions(heldout=True) & questions(heldout=False)


def test_every_task_has_held_out_questions() -> None:
    """No task is so small that the held-out tenth of it is empty."""
    drawn = islice(tiny_text.conversations(random.Random(0), heldout=True, tasks=TASKS), 2_000)
    assert {conversation.task for conversation in drawn} == set(tiny_text.TASKS)
