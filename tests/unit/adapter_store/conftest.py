"""A tiny Llama and adapters that real PEFT saved for it; made once per run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store.base_model import BaseModel


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **widths)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    return BaseModel.read(base_folder)


@pytest.fixture(scope="session")
def save_adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a LoRA with random weights by PEFT: `save(dtype="float32", **LoraConfig)`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    def save(dtype: str = "float32", **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base_folder), LoraConfig(task_type="CAUSAL_LM", **config)
        )
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.05)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def good(save_adapter: Callable[..., Path]) -> Path:
    return save_adapter(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
