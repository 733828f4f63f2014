"""A base that takes a second to build: real files and a real tokenizer, hardly any training."""

from typing import Final

from training.tiny_base import Recipe

SMALL: Final = Recipe(
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
