"""One very small base for the whole folder: real files and a real tokenizer, hardly any training."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.small_base import SMALL
from training import tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build(tmp_path_factory.mktemp("models") / "small-base", recipe=SMALL).path


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base)
