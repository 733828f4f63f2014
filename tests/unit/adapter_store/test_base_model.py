"""What is read from a base model's folder."""

import json
import shutil
from pathlib import Path

import pytest

from adapter_store.base_model import BaseModel
from adapter_store.errors import BaseModelInvalid
from tests.bad_adapters import LAYERS, WIDTHS, pack, read_tensors, write_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_modules_are_the_linear_layers_of_the_decoder(folder: Path) -> None:
    """Neither norms nor embeddings are among the modules; widths are (in, out)."""
    base = BaseModel.read(folder)
    assert len(base.modules) == LAYERS * len(WIDTHS)
    assert base.modules["model.layers.1.mlp.down_proj"] == (128, 64)
    assert (base.name, base.architecture, base.dtype) == ("base", "LlamaForCausalLM", "float32")


def test_the_fingerprint_survives_sharding(folder: Path, tmp_path: Path) -> None:
    """The same tensors in one file or in two give the same fingerprint."""
    whole = BaseModel.read(folder)
    tensors = read_tensors(folder / "model.safetensors")
    half = len(tensors) // 2
    shards = {"model-1.safetensors": dict(list(tensors.items())[:half])}
    shards["model-2.safetensors"] = dict(list(tensors.items())[half:])
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(folder / "config.json", sharded)
    for name, part in shards.items():
        (sharded / name).write_bytes(pack(part))
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert BaseModel.read(sharded, name="base") == whole


def test_other_weights_of_the_same_shape_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    """A fine-tuned copy of a base is another base."""
    other = write_base(tmp_path / "other", seed=500)
    assert BaseModel.read(other).fingerprint != BaseModel.read(folder).fingerprint


def test_a_base_survives_the_way_to_the_worker(folder: Path) -> None:
    """from_json gives back what to_json took."""
    base = BaseModel.read(folder, name="org/name", dtype="bfloat16")
    assert BaseModel.from_json(base.to_json()) == base


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"architectures": []}'), "architectures"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(pack({})), "no linear layers"),
    ],
)
def test_an_unreadable_folder_is_told_by_file(spoil: object, named: str, folder: Path) -> None:
    """The error names the file and the reason."""
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(BaseModelInvalid, match=named):
        BaseModel.read(folder)


def test_an_unservable_dtype_is_told(folder: Path) -> None:
    """A dtype that vLLM cannot serve adapters in is refused at start."""
    with pytest.raises(BaseModelInvalid, match="int8"):
        BaseModel.read(folder, dtype="int8")
