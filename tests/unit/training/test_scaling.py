"""A scaled adapter is the model whose weights lie between the base's and the adapted ones."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapter_store.scaling import PARTS, scaled_config
from tests.random_adapters import save_random_adapter


@pytest.mark.parametrize("factor", [1, 3_000, 7_000, 20_000])
def test_a_scaled_adapter_is_the_weights_between(base: Path, tmp_path: Path, factor: int) -> None:
    """Logits of base + f · (tuned - base), interpolated in full space, within 1e-5."""
    folder = save_random_adapter(base, tmp_path / "adapter", seed=1, scale=0.05)
    between = _model(base)
    tuned = PeftModel.from_pretrained(_model(base), folder).merge_and_unload()
    with torch.no_grad():
        for ours, theirs in zip(between.parameters(), tuned.parameters(), strict=True):
            ours.add_(theirs - ours, alpha=factor / PARTS)
    config = folder / "adapter_config.json"
    config.write_bytes(scaled_config(config.read_bytes(), factor))
    scaled = PeftModel.from_pretrained(_model(base), folder)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        plain, wanted, found = (model(tokens).logits for model in (_model(base), between, scaled))
    assert (found - wanted).abs().max() <= 1e-5
    if factor > 1_000:
        assert (wanted - plain).abs().max() > 1e-3  # or the comparison would say nothing


def _model(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval()
