"""Adapters as PEFT saves them, of any size and all different, and a base model's folder that has no weights."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
DRAWN: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's decoder, and the rank of its adapters, which reach every linear layer."""

    hidden: int
    intermediate: int
    layers: int
    rank: int

    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Path → (in, out)."""
        wide = (self.hidden, self.intermediate)
        block = {f"self_attn.{side}_proj": (self.hidden, self.hidden) for side in "qkvo"}
        block |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
        return {f"model.layers.{at}.{name}": sizes for at in range(self.layers) for name, sizes in block.items()}

    def tensors(self) -> Mapping[str, tuple[int, int]]:
        """Name → shape of an adapter's tensors."""
        found = {}
        for module, (width_in, width_out) in self.modules().items():
            found[f"base_model.model.{module}.lora_A.weight"] = (self.rank, width_in)
            found[f"base_model.model.{module}.lora_B.weight"] = (width_out, self.rank)
        return found


SMALL: Final = Shape(hidden=64, intermediate=128, layers=2, rank=8)
WIDE: Final = Shape(hidden=2048, intermediate=5632, layers=5, rank=128)
"""101 MB an adapter, in float32."""


def write_base(folder: Path, shape: Shape) -> Path:
    """A base model as adapters see it: configuration and headers; the weights are a hole in the file."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    layers = {f"{name}.weight": sizes[::-1] for name, sizes in shape.modules().items()}
    with (folder / "model.safetensors").open("wb") as file:
        head, size = header(layers)
        file.write(head)
        file.truncate(len(head) + size)
    return folder


def write_adapter(folder: Path, shape: Shape, base_name: str, *, seed: int) -> dict[str, Path]:
    """File name → path; values from N(0, 0.02) by the seed, which repeat after a million."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": shape.rank,
        "lora_alpha": shape.rank,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in shape.modules()}),
    }
    (folder / CONFIG).write_text(json.dumps(config))
    head, size = header(shape.tensors())
    values = (np.random.default_rng(seed).standard_normal(DRAWN, np.float32) * np.float32(0.02)).tobytes()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(head)
        for begin in range(0, size, len(values)):
            file.write(values[: size - begin])
    return {name: folder / name for name in (CONFIG, WEIGHTS)}


def header(shapes: Mapping[str, tuple[int, int]]) -> tuple[bytes, int]:
    """A safetensors file's beginning, for float32 tensors, and how many bytes follow it."""
    members: dict[str, object] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        members[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(members).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end
