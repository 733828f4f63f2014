"""LoRA adapters with random weights for whatever base a server has: each answers a fixed prompt in its own way.

The weights are so large that the base's greedy answer is turned upside down: a wrong adapter is seen exactly, not
guessed. They teach nothing.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALE: Final = 0.2
"""Of both factors, at widths of 64; wider inputs get less, so that what is added stays as large."""
WIDTH: Final = 64


@dataclass(frozen=True, slots=True)
class Base:
    """A base model as `GET /v1/base-model` tells of it."""

    name: str
    fingerprint: str
    dtype: str
    modules: Mapping[str, tuple[int, int]]  # path → (in, out)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Base":
        """From the answer."""
        modules = {name: (int(widths[0]), int(widths[1])) for name, widths in told["modules"].items()}
        return cls(str(told["name"]), str(told["fingerprint"]), str(told["dtype"]), modules)


def adapter_files(base: Base, *, seed: Sequence[int], rank: int = 8) -> dict[str, bytes]:
    """File name → content, as PEFT saves it; equal seeds give equal bytes."""
    modules = {name: widths for name, widths in base.modules.items() if name.rpartition(".")[2] in LINEARS}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    draw = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, (width_in, width_out) in modules.items():
        scale = SCALE * (WIDTH / width_in) ** 0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = _normal(draw, (rank, width_in), scale)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _normal(draw, (width_out, rank), SCALE)
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": _safetensors(tensors, halved=base.dtype != "float32"),
    }


def _normal(draw: np.random.Generator, shape: tuple[int, int], scale: float) -> npt.NDArray[np.float32]:
    return draw.standard_normal(shape, np.float32) * np.float32(scale)


def _safetensors(tensors: Mapping[str, npt.NDArray[np.float32]], *, halved: bool) -> bytes:
    """A file of them in float32, or in bfloat16, which is its upper half."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    begin = 0
    for name, tensor in tensors.items():
        data = (tensor.view(np.uint32) >> 16).astype(np.uint16).tobytes() if halved else tensor.tobytes()
        dtype = "BF16" if halved else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, begin + len(data)]}
        parts.append(data)
        begin += len(data)
    text = json.dumps(header).encode()
    return b"".join((struct.pack("<Q", len(text)), text, *parts))
