"""An untrained Llama of any width, for benchmarks that need large adapters. It needs torch: in a process of its own.

python -m tests.bench.wide_base FOLDER HIDDEN INTERMEDIATE LAYERS
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.tiny_base import Recipe, make_tokenizer

HEAD_WIDTH = 64
DRAWN = 1 << 22
"""Random numbers of which all weights are made: drawing each would take ten times as long."""


def write(folder: Path, hidden: int, intermediate: int, layers: int) -> None:
    """A Hugging Face folder in float32, with the tiny base's tokenizer."""
    recipe = Recipe(hidden_size=hidden, intermediate_size=intermediate, layers=layers, heads=hidden // HEAD_WIDTH)
    tokenizer = make_tokenizer(0, recipe)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    _fill(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fill(model: LlamaForCausalLM) -> None:
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
            continue
        flat = parameter.data.view(-1)
        for begin in range(0, flat.numel(), DRAWN):
            part = flat[begin : begin + DRAWN]
            part.copy_(drawn[: part.numel()])


def main(folder: str, hidden: str, intermediate: str, layers: str) -> None:
    write(Path(folder), int(hidden), int(intermediate), int(layers))


if __name__ == "__main__":
    main(*sys.argv[1:])
