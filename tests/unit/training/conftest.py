"""One very small base for the whole folder: real files and a real tokenizer, hardly any training."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training import tiny_base
from training.tiny_base import Recipe

SMALL = Recipe(
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=2,
    vocabulary=400,
    steps=3,
    repeat_only_steps=1,
    batch_size=8,
    warmup_steps=1,
    heldout_per_task=2,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build(tmp_path_factory.mktemp("models") / "small-base", recipe=SMALL).path


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base)
