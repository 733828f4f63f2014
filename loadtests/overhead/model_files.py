"""A base model and an adapter for it, as small as they can be: files that are checked and never computed with."""

import json
import struct
from pathlib import Path
from typing import Final

HIDDEN: Final = 64
RANK: Final = 8
BASE_NAME: Final = "mock"
PROJECTION: Final = "model.layers.0.self_attn.q_proj"


def write_base(folder: Path) -> Path:
    """A Llama-like folder of one layer."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 32}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [32, HIDDEN], f"{PROJECTION}.weight": [HIDDEN, HIDDEN]}
    (folder / "model.safetensors").write_bytes(safetensors(shapes))
    return folder


def adapter_files() -> dict[str, bytes]:
    """File name → content, as PEFT saves a LoRA adapter of `write_base`."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    module = f"base_model.model.{PROJECTION}"
    weights = {f"{module}.lora_A.weight": [RANK, HIDDEN], f"{module}.lora_B.weight": [HIDDEN, RANK]}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": safetensors(weights)}


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file of float32 tensors whose values count up in hundredths."""
    header: dict[str, object] = {}
    body = b""
    for name, shape in shapes.items():
        count = shape[0] * shape[1]
        data = struct.pack(f"<{count}f", *(at % 7 / 100 for at in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
