"""The base model as adapters see it: its layers' widths and a fingerprint of its weights. Loads nothing."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from adapter_store.bounded_json import JsonInvalid, parse
from adapter_store.errors import BaseModelInvalid
from adapter_store.safetensors_header import Header, HeaderInvalid, TensorEntry, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100 << 20  # the library's own limit; an operator's folder, not a stranger's
JSON_LIMIT_BYTES = 100 << 20
SERVING_DTYPES = ("float32", "float16", "bfloat16")
# Whole numbers only: these survive a re-save by another version of transformers, which rewrites the rest.
FINGERPRINTED_FIELDS = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SAMPLE_BYTES = 1024
# Architectures whose layers are Llama's, so that config.json alone gives every width.
LLAMA_LAYERS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"}
    | {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"}
)
LINEAR = re.compile(r"(model\.layers\.\d+\.[A-Za-z0-9_.]+)\.weight")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """`modules`: path of every linear layer inside the decoder → (in_features, out_features)."""

    name: str
    fingerprint: str
    architecture: str
    dtype: str
    modules: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, path: Path, *, name: str | None = None, dtype: str = "auto") -> Self:
        """Reads config.json and the safetensors headers under `path`; `dtype` is the serving dtype.

        The fingerprint covers names, shapes, dtypes and 3 KiB of each tensor, whatever the sharding.
        Raises BaseModelInvalid, which names file and reason.
        """
        config = _read_object(path / CONFIG)
        tensors = _read_tensors(path)
        modules = {match[1]: _widths(entry) for key, (_, entry) in tensors.items() if (match := _linear(key, entry))}
        if not modules:
            raise BaseModelInvalid(f"{path}: no linear layers under model.layers.<n>; is this a decoder model?")
        return cls(
            name=name or path.resolve().name,
            fingerprint=_fingerprint(config, tensors),
            architecture=_architecture(path, config),
            dtype=_serving_dtype(path, config, dtype),
            modules=dict(sorted(modules.items())),
        )

    @classmethod
    def read_config(cls, path: Path, *, name: str | None = None, dtype: str = "auto") -> Self:
        """The same from config.json alone, for architectures with Llama's layers: for who has not the weights.

        The fingerprint is empty, for it covers the weights. Raises BaseModelInvalid.
        """
        config = _read_object(path / CONFIG)
        architecture = _architecture(path, config)
        if architecture not in LLAMA_LAYERS:
            raise BaseModelInvalid(
                f"{path}: no {WEIGHTS}, and the layers of {architecture} cannot be told from {CONFIG} alone: "
                "take the server's description (`tailor base show --json`)"
            )
        return cls(
            name=name or path.resolve().name,
            fingerprint="",
            architecture=architecture,
            dtype=_serving_dtype(path, config, dtype),
            modules=_llama_layers(path, config),
        )

    def to_json(self) -> str:
        members = {"name": self.name, "fingerprint": self.fingerprint, "architecture": self.architecture}
        return json.dumps({**members, "dtype": self.dtype, "modules": dict(self.modules)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        members = json.loads(text)
        modules = {path: (widths[0], widths[1]) for path, widths in members.pop("modules").items()}
        return cls(**members, modules=modules)


def _read_object(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > JSON_LIMIT_BYTES:
            raise BaseModelInvalid(f"{path}: larger than {JSON_LIMIT_BYTES} bytes")
        value = parse(path.read_bytes(), max_depth=32, max_items=4_000_000)
    except OSError as error:
        raise BaseModelInvalid(f"{path}: {error.strerror}") from error
    except JsonInvalid as error:
        raise BaseModelInvalid(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelInvalid(f"{path}: not a JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Tensor name → (file, entry), over all shards."""
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for file in _weight_files(path):
        for key, entry in _read_header(file).tensors.items():
            if key in tensors:
                raise BaseModelInvalid(f"{file}: tensor {key} is in {tensors[key][0].name} too")
            tensors[key] = (file, entry)
    return tensors


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        raise BaseModelInvalid(f"{path}: neither {WEIGHTS} nor {INDEX}; save the model with safetensors")
    weight_map = _read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BaseModelInvalid(f"{path / INDEX}: no weight_map")
    names = {str(name) for name in weight_map.values()}
    if bad := [name for name in names if Path(name).name != name]:
        raise BaseModelInvalid(f"{path / INDEX}: {bad[0]!r} is not a file name")
    return [path / name for name in sorted(names)]


def _read_header(file: Path) -> Header:
    try:
        return read_header(file, limit_bytes=HEADER_LIMIT_BYTES)
    except OSError as error:
        raise BaseModelInvalid(f"{file}: {error.strerror}") from error
    except HeaderInvalid as error:
        raise BaseModelInvalid(f"{file}: {error}") from error


def _linear(key: str, entry: TensorEntry) -> re.Match[str] | None:
    return LINEAR.fullmatch(key) if len(entry.shape) == 2 else None


def _widths(entry: TensorEntry) -> tuple[int, int]:
    """torch keeps a linear layer's weight as (out, in)."""
    return entry.shape[1], entry.shape[0]


def _architecture(path: Path, config: dict[str, object]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise BaseModelInvalid(f"{path / CONFIG}: architectures names no class")


def _llama_layers(path: Path, config: dict[str, object]) -> dict[str, tuple[int, int]]:
    hidden, inner, heads, layers = (
        _natural(path, config, field)
        for field in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    )
    key_values = _natural(path, {"num_key_value_heads": heads} | _given(config), "num_key_value_heads")
    width = _natural(path, {"head_dim": hidden // heads} | _given(config), "head_dim")
    widths = {
        "mlp.down_proj": (inner, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "self_attn.k_proj": (hidden, key_values * width),
        "self_attn.o_proj": (heads * width, hidden),
        "self_attn.q_proj": (hidden, heads * width),
        "self_attn.v_proj": (hidden, key_values * width),
    }
    return {f"model.layers.{layer}.{name}": found for layer in range(layers) for name, found in widths.items()}


def _given(config: dict[str, object]) -> dict[str, object]:
    return {field: value for field, value in config.items() if value is not None}


def _natural(path: Path, config: Mapping[str, object], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise BaseModelInvalid(f"{path / CONFIG}: {field} is no whole number above 0")
    return value


def _serving_dtype(path: Path, config: dict[str, object], dtype: str) -> str:
    """`auto` is the config's. vLLM 0.32's own makes bfloat16 of float32: start it with this dtype."""
    found = dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "float32"
    if found not in SERVING_DTYPES:
        raise BaseModelInvalid(f"{path / CONFIG}: dtype {found!r} is none of {', '.join(SERVING_DTYPES)}")
    return str(found)


def _fingerprint(config: dict[str, object], tensors: Mapping[str, tuple[Path, TensorEntry]]) -> str:
    digest = hashlib.sha256()
    digest.update(_canonical({field: config.get(field) for field in FINGERPRINTED_FIELDS}))
    files: dict[Path, int] = {}
    try:
        for key, (file, entry) in sorted(tensors.items()):
            if file not in files:
                files[file] = os.open(file, os.O_RDONLY)
            digest.update(_canonical([key, entry.dtype, entry.shape]))
            digest.update(_sample(files[file], entry))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()


def _sample(descriptor: int, entry: TensorEntry) -> bytes:
    """The first, middle and last KiB of the tensor."""
    last = max(0, entry.size_bytes - SAMPLE_BYTES)
    size = min(SAMPLE_BYTES, entry.size_bytes)
    return b"".join(os.pread(descriptor, size, entry.offset + at) for at in (0, last // 2, last))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
