"""What is refused, with which code, and what is accepted."""

import importlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_store.base_model import BaseModel
from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.faults import MOST_CHARACTERS, MOST_FAULTS, Fault
from adapter_store.inspection import FINGERPRINT_KEY, Bounds, FaultCode, inspect
from tests.bad_adapters import (
    BAD,
    BadAdapter,
    Files,
    Tensor,
    body_of,
    floats,
    header_of,
    pack_raw,
    put_number,
    read,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
GOOD: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "target_modules": ATTENTION},
    "rank 64": {"r": 64, "target_modules": ATTENTION},
    "all-linear": {"r": 8, "target_modules": "all-linear"},
    "attention only": {"r": 8, "target_modules": ATTENTION},
    "one layer by path": {"r": 8, "target_modules": ["model.layers.0.mlp.down_proj"]},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True},
    "patterns": {"r": 8, "target_modules": ATTENTION, **PATTERNS},
    "gaussian": {"r": 8, "target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 8, "target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "dropout": {"r": 8, "target_modules": ATTENTION, "lora_dropout": 0.1},
    "half": {"r": 8, "target_modules": ATTENTION, "dtype": "float16"},
    "bfloat16": {"r": 8, "target_modules": ATTENTION, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_adapter_is_refused_with_its_code(bad: BadAdapter, good: Path, base: BaseModel, tmp_path: Path) -> None:
    """Every bad adapter is refused, and among the faults is the code that names what is wrong."""
    served = replace(base, dtype=bad.served_as or base.dtype)
    inspection = inspect(bad.make(good, tmp_path / "bad"), served, Bounds())
    assert bad.codes <= {fault.code for fault in inspection.faults}
    assert inspection.config == b""
    for fault in inspection.faults:
        assert fault.hint
        for text in (fault.where, fault.found, fault.expected, fault.hint):
            assert text.isprintable()
        for text in (fault.where, fault.found, fault.expected):
            assert len(text) <= MOST_CHARACTERS + 60
        told = fault.tensor if fault.tensor is not None else fault.field
        assert fault.where == (fault.where.partition(":")[0] if told is None else f"{file_of(fault)}:{told}")


def file_of(fault: Fault) -> str:
    """The file of a fault of a tensor or a field."""
    if fault.tensor is not None or (fault.field or "").startswith("__metadata__"):
        return WEIGHTS_FILE
    return CONFIG_FILE


def test_the_bad_adapters_have_names_of_their_own() -> None:
    """No entry of the collection hides another."""
    assert len({bad.name for bad in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize("served_as", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", GOOD.values(), ids=GOOD)
def test_what_peft_saves_is_accepted(
    options: dict[str, Any], served_as: str, save_adapter: Callable[..., Path], base: BaseModel
) -> None:
    """Plain LoRA and rsLoRA as PEFT 0.21 saves them pass, whatever the dtypes of file and engine."""
    inspection = inspect(save_adapter(**options), replace(base, dtype=served_as), Bounds())
    assert inspection.faults == ()
    assert inspection.rank == options["r"]


def test_the_canonical_config_means_the_same_to_peft(
    save_adapter: Callable[..., Path], base: BaseModel, base_folder: Path
) -> None:
    """PEFT loads the rewritten config and gives the same logits as with the tenant's own."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = save_adapter(r=8, target_modules=ATTENTION, use_rslora=True, lora_alpha=7, **PATTERNS)
    tokens = torch.arange(12).reshape(1, 12)

    def logits() -> Any:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), folder)
        with torch.no_grad():
            return model(tokens).logits

    before = logits()
    (folder / CONFIG_FILE).write_bytes(inspect(folder, base, Bounds()).config)
    assert torch.equal(logits(), before)


def test_the_canonical_config_means_the_same_to_vllm(save_adapter: Callable[..., Path], base: BaseModel) -> None:
    """Rank and scaling of every module are those that the inspection counted with."""
    peft_helper = importlib.import_module("vllm.lora.peft_helper")
    folder = save_adapter(r=8, target_modules=ATTENTION, use_rslora=True, lora_alpha=7, **PATTERNS)
    config = json.loads(inspect(folder, base, Bounds()).config)
    helper = peft_helper.PEFTHelper.from_dict(config)
    assert helper.get_rank_and_scaling("model.layers.1.self_attn.q_proj") == (4, 7 / 4**0.5)
    assert helper.get_rank_and_scaling("model.layers.1.self_attn.v_proj") == (8, 3 / 8**0.5)
    assert helper.get_rank_and_scaling("model.layers.0.self_attn.v_proj") == (8, 7 / 8**0.5)


def test_the_canonical_config_is_reproducible(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """The same adapter with another order of members and targets gives the same bytes."""
    files = read(good)
    first = inspect(good, base, Bounds()).config
    files.config = dict(reversed(files.config.items())) | {"target_modules": ATTENTION[::-1]}
    files.folder = tmp_path
    files.write()
    assert inspect(tmp_path, base, Bounds()).config == first
    assert json.loads(first)["base_model_name_or_path"] == base.name


def test_the_fingerprint_decides_over_the_name(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """An adapter that carries this base's fingerprint passes under any base name."""
    files = read(good)
    files.folder = tmp_path
    files.metadata[FINGERPRINT_KEY] = base.fingerprint
    files.config["base_model_name_or_path"] = "org/renamed"
    files.write()
    assert inspect(tmp_path, base, Bounds()).faults == ()


def test_all_faults_come_at_once(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """Faults of the config, of names, shapes, ranks and values are told together, each with its field or tensor."""
    files = read(good)
    files.folder = tmp_path
    first, second, *_ = (name for name in files.tensors if name.endswith("lora_A.weight"))
    files.config |= {"use_dora": True, "lora_alpha": -1, "base_model_name_or_path": "another"}
    files.tensors[first] = floats([3, 64], 0)
    put_number(files, second, np.nan)
    missing = second.replace("lora_A", "lora_B")
    del files.tensors[missing]
    files.tensors["odd"] = Tensor("F32", [1], b"\0" * 4)
    files.write()
    told = {(fault.code, fault.field, fault.tensor) for fault in inspect(tmp_path, base, Bounds()).faults}
    assert told == {
        (FaultCode.DORA_UNSUPPORTED, "use_dora", None),
        (FaultCode.ALPHA_INVALID, "lora_alpha", None),
        (FaultCode.BASE_MISMATCH, "base_model_name_or_path", None),
        (FaultCode.SHAPE_MISMATCH, None, first),
        (FaultCode.NOT_FINITE, None, second),
        (FaultCode.TENSOR_MISSING, None, missing),
        (FaultCode.TENSOR_UNEXPECTED, None, "odd"),
    }


def test_all_faults_of_a_header_come_at_once(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """Every entry that cannot be used is told, and beside it what the others are named and shaped like."""
    files = read(good)
    files.folder = tmp_path
    first, second, third, *_ = (name for name in files.tensors if name.endswith("lora_A.weight"))
    header = header_of(files)
    header[first]["dtype"] = "F31"
    header[second]["data_offsets"] = [8, 4]
    header[third]["shape"] = header[third]["shape"][::-1]
    header["odd"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    files.raw_weights = pack_raw(json.dumps(header).encode(), body_of(files))
    files.write()
    told = {(fault.code, fault.tensor) for fault in inspect(tmp_path, base, Bounds()).faults}
    assert told == {
        (FaultCode.DTYPE_UNSUPPORTED, first),
        (FaultCode.OFFSETS_INVALID, second),
        (FaultCode.SHAPE_MISMATCH, third),
        (FaultCode.TENSOR_UNEXPECTED, "odd"),
    }


def test_another_method_is_told_once(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """An IA3 adapter is no LoRA with a dozen faulty fields."""
    files = read(good)
    files.folder = tmp_path
    files.config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]}
    files.write()
    (fault,) = inspect(tmp_path, base, Bounds()).faults
    assert (fault.code, fault.field) == (FaultCode.NOT_LORA, "peft_type")
    assert "peft.LoraConfig" in fault.hint


def test_faults_past_the_cap_are_counted(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """A file with thousands of faults gives an answer of bounded length that says how many are left out."""
    files = read(good)
    files.folder = tmp_path
    files.tensors |= {f"odd{number}": Tensor("F32", [1], b"\0" * 4) for number in range(2_000)}
    files.write()
    *listed, more = inspect(tmp_path, base, Bounds()).faults
    assert len(listed) == MOST_FAULTS
    assert (more.code, more.found) == (FaultCode.MORE_FAULTS, "1000 faults more")
    long = {f"odd{number}" + "x" * 200: Tensor("F32", [1], b"\0" * 4) for number in range(4_000)}
    Files(tmp_path, files.config, long).write()
    inspection = inspect(tmp_path, base, Bounds())
    assert sum(len(fault.where + (fault.tensor or "")) for fault in inspection.faults) < 512 << 10


def test_a_nan_is_told_by_tensor_and_place(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """The fault names the tensor and the row and column of the number."""
    files = read(good)
    files.folder = tmp_path
    numbers = files.numbers(files.first)
    numbers[3, 17] = np.nan
    files.tensors[files.first].data = numbers.tobytes()
    files.write()
    (fault,) = inspect(tmp_path, base, Bounds()).faults
    assert fault.where == f"{WEIGHTS_FILE}:{files.first}"
    assert "[3, 17]" in fault.found


def test_large_tensors_are_read_in_chunks(tmp_path: Path) -> None:
    """A NaN in the last chunk of a tensor of many chunks is found at its place."""
    wide = BaseModel("wide", "f", "Llama", "float32", {"model.layers.0.mlp.up_proj": (4096, 4096)})
    module = "base_model.model.model.layers.0.mlp.up_proj"
    side_a, side_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    config = {"peft_type": "LORA", "r": 512, "lora_alpha": 512, "target_modules": ["up_proj"]}
    files = Files(tmp_path, config, {side_a: floats([512, 4096], 1), side_b: floats([4096, 512], 2)})
    numbers = files.numbers(side_a)
    numbers[511, 4095] = np.nan
    files.tensors[side_a].data = numbers.tobytes()
    files.write()
    (fault,) = inspect(tmp_path, wide, Bounds(max_rank=512)).faults
    assert "[511, 4095]" in fault.found


def mutate_weights(data: st.DataObject, good: Path, base: BaseModel, folder: Path) -> None:
    raw = bytearray((good / WEIGHTS_FILE).read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 8 + length))
        cut = data.draw(st.integers(0, 8))
        raw[at : at + cut] = data.draw(st.binary(max_size=8))
    (folder / CONFIG_FILE).write_bytes((good / CONFIG_FILE).read_bytes())
    (folder / WEIGHTS_FILE).write_bytes(raw)
    inspection = inspect(folder, base, Bounds())
    assert inspection.faults or inspection.rank == 8


def mutate_config(data: st.DataObject, good: Path, base: BaseModel, folder: Path) -> None:
    config = json.loads((good / CONFIG_FILE).read_text())
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v))
    for name in data.draw(st.lists(st.sampled_from(sorted(config)) | st.text(max_size=8), max_size=4)):
        config[name] = data.draw(values)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / WEIGHTS_FILE).write_bytes((good / WEIGHTS_FILE).read_bytes())
    inspection = inspect(folder, base, Bounds())
    assert inspection.faults or inspection.rank == 8


def examples(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(150)
@given(data=st.data())
def test_a_mutated_weights_file_never_breaks_the_inspection(
    data: st.DataObject, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    """Bytes changed, cut out or put in anywhere in the header give a verdict, never an exception (150)."""
    mutate_weights(data, good, base, tmp_path)


@examples(150)
@given(data=st.data())
def test_a_mutated_config_never_breaks_the_inspection(
    data: st.DataObject, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    """Any JSON value in any field gives a verdict, never an exception (150)."""
    mutate_config(data, good, base, tmp_path)


@pytest.mark.full
@examples(10_000)
@given(data=st.data())
def test_ten_thousand_mutated_weights_files(data: st.DataObject, good: Path, base: BaseModel, tmp_path: Path) -> None:
    """The full figure of the mutations above."""
    mutate_weights(data, good, base, tmp_path)


@pytest.mark.full
@examples(5_000)
@given(data=st.data())
def test_five_thousand_mutated_configs(data: st.DataObject, good: Path, base: BaseModel, tmp_path: Path) -> None:
    """The full figure of the mutations above."""
    mutate_config(data, good, base, tmp_path)
