"""Adapters that PEFT itself saves, with random weights: each answers a fixed prompt in its own way.

Weights from N(0, 0.2) turn the tiny base's greedy answer upside down, so that the wrong tenant's adapter is seen
exactly, not guessed.
"""

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_random_adapter(
    base: Path, out: Path, *, seed: int, rank: int = 8, scale: float = 0.2, targets: tuple[str, ...] = LINEARS
) -> Path:
    """Save an adapter for the model in `base` to `out`; equal seeds give equal weights."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if re.search(r"lora_[AB]", name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    return out
