"""The conversions that faults' hints name: done as they say, the adapter is accepted and answers as before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from adapter_store.base_model import BaseModel
from adapter_store.bundle import CONFIG_FILE
from adapter_store.faults import Bounds, FaultCode
from adapter_store.inspection import inspect

TARGETS = ["q_proj", "v_proj"]
# A layer of 32 × 64: no update of it has a higher rank.
NARROW, FULL_RANK = ["v_proj"], 32
Make = Callable[..., Any]


@pytest.fixture
def make(base_folder: Path) -> Make:
    def made(config: peft.PeftConfig) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), config).eval()

    return made


def train(model: Any) -> None:
    """As a step of training would: every weight that is trained is moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


def assert_refused(folder: Path, base: BaseModel, code: FaultCode, hint: str) -> None:
    faults = inspect(folder, base, Bounds()).faults
    assert any(fault.code is code and hint in fault.hint for fault in faults), faults


def assert_same(folder: Path, base: BaseModel, base_folder: Path, wanted: Any) -> None:
    assert inspect(folder, base, Bounds()).faults == ()
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), folder).eval()
    assert torch.allclose(logits(model), wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changes_the_base_is_converted(
    init: str, make: Make, base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    """By the first weights, saved before training: a plain LoRA for the unchanged base."""
    model = make(peft.LoraConfig(init_lora_weights=init, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "init")
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "raw")
    assert_refused(
        tmp_path / "raw", base, FaultCode.INIT_UNSUPPORTED, "path_initial_model_for_weight_conversion='init'"
    )
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert_same(tmp_path / "out", base, base_folder, wanted)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (peft.LoHaConfig(target_modules=NARROW, task_type="CAUSAL_LM"), FaultCode.NOT_LORA),
        (peft.LoraConfig(r=4 * FULL_RANK, target_modules=NARROW, task_type="CAUSAL_LM"), FaultCode.RANK_TOO_HIGH),
    ],
    ids=["LoHa", "a higher rank"],
)
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA")
def test_save_as_lora_writes_the_nearest(
    config: peft.PeftConfig, code: FaultCode, make: Make, base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    """At full rank it is the same adapter."""
    model = make(config)
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "raw")
    assert_refused(tmp_path / "raw", base, code, "peft.save_as_lora(OUT, model, rank=")
    peft.save_as_lora(tmp_path / "out", model, rank=FULL_RANK)
    assert_same(tmp_path / "out", base, base_folder, wanted)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA")
def test_dora_has_no_conversion(make: Make, base: BaseModel, base_folder: Path, tmp_path: Path) -> None:
    """PEFT 0.21 writes one that is taken and answers otherwise, so the hint is to train again."""
    model = make(peft.LoraConfig(use_dora=True, target_modules=NARROW, task_type="CAUSAL_LM"))
    train(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "raw")
    assert_refused(tmp_path / "raw", base, FaultCode.DORA_UNSUPPORTED, "peft.LoraConfig(use_dora=False)")
    peft.save_as_lora(tmp_path / "out", model, rank=FULL_RANK)
    assert inspect(tmp_path / "out", base, Bounds()).faults == ()
    converted = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), tmp_path / "out").eval()
    assert not torch.allclose(logits(converted), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target_modules": ".*_proj"}, FaultCode.TARGET_MODULES_INVALID),
        ({"target_modules": TARGETS, "layers_to_transform": [1]}, FaultCode.LAYER_SELECTION_UNSUPPORTED),
        ({"target_modules": "all-linear", "exclude_modules": TARGETS}, FaultCode.LAYER_SELECTION_UNSUPPORTED),
    ],
    ids=["a regular expression", "layers_to_transform", "exclude_modules"],
)
def test_modules_by_their_paths_need_no_retraining(
    options: dict[str, Any], code: FaultCode, make: Make, base: BaseModel, base_folder: Path, tmp_path: Path
) -> None:
    """`target_modules` written as `targeted_module_names` is the same adapter."""
    model = make(peft.LoraConfig(task_type="CAUSAL_LM", **options))
    train(model)
    model.save_pretrained(tmp_path)
    assert_refused(tmp_path, base, code, "model.targeted_module_names")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config |= {"target_modules": model.targeted_module_names, "layers_to_transform": None, "exclude_modules": None}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert_same(tmp_path, base, base_folder, logits(model))
