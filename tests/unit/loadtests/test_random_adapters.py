"""Adapters for load tests: whole as PEFT's are, and each another one."""

from pathlib import Path

from adapter_store.base_model import BaseModel
from loadtests.overhead.model_files import write_base
from loadtests.random_adapters import Base, adapter_files


def test_equal_seeds_give_equal_bytes_and_others_other_ones(tmp_path: Path) -> None:
    """What the fingerprint of an adapter hangs on."""
    base = described(tmp_path)
    assert adapter_files(base, seed=(1, 2)) == adapter_files(base, seed=(1, 2))
    weights = {adapter_files(base, seed=(1, number))["adapter_model.safetensors"] for number in range(4)}
    assert len(weights) == 4


def test_the_rank_and_the_bases_dtype_are_kept(tmp_path: Path) -> None:
    """Half the bytes where the base is served in half precision."""
    whole = adapter_files(described(tmp_path), seed=(1,), rank=4)["adapter_model.safetensors"]
    base = described(tmp_path)
    half = adapter_files(Base(base.name, base.fingerprint, "bfloat16", base.modules), seed=(1,), rank=4)
    assert len(whole) - len(half["adapter_model.safetensors"]) > 4 * 64 * 2
    assert b'"BF16","shape":[4,64]'.replace(b",", b", ").replace(b":", b": ") in half["adapter_model.safetensors"]


def described(folder: Path) -> Base:
    """The small base as a server would describe it."""
    model = BaseModel.read(folder / "base" if (folder / "base").exists() else write_base(folder / "base"))
    return Base(model.name, model.fingerprint, model.dtype, model.modules)
