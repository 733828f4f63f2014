"""Adapters that must be refused, each by name, with the codes that its refusal must name; and good ones to spoil.

Every entry of BAD takes a good adapter as PEFT saves it (any base, float32) and spoils one thing. No torch: safetensors
files are written by hand, because the library refuses to write most of these.
"""

import json
import math
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.inspection import FINGERPRINT_KEY, FaultCode

PREFIX = "base_model.model."

HIDDEN, KEY_VALUE, INNER, LAYERS = 64, 32, 128, 2
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


@dataclass
class Tensor:
    """A tensor of a file being written: `data` is little-endian, row by row."""

    dtype: str
    shape: list[int]
    data: bytes


Tensors = dict[str, Tensor]


@dataclass
class Files:
    """A good adapter in pieces, for one entry of BAD to spoil; `raw_*` replace a whole file."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    raw_config: bytes | None = None
    raw_weights: bytes | None = None

    @property
    def first(self) -> str:
        """The name of a lora_A tensor."""
        return next(name for name in self.tensors if name.endswith("lora_A.weight"))

    @property
    def second(self) -> str:
        """The name of the lora_B tensor of the same module."""
        return self.first.replace("lora_A", "lora_B")

    @property
    def module(self) -> str:
        return self.first.removeprefix(PREFIX).removesuffix(".lora_A.weight")

    def numbers(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        tensor = self.tensors[name]
        return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).copy()

    def write(self) -> None:
        config = json.dumps(self.config).encode() if self.raw_config is None else self.raw_config
        weights = pack(self.tensors, self.metadata) if self.raw_weights is None else self.raw_weights
        (self.folder / CONFIG_FILE).write_bytes(config)
        (self.folder / WEIGHTS_FILE).write_bytes(weights)


@dataclass(frozen=True)
class BadAdapter:
    """`codes` must all be among the faults. `served_as`: the base's dtype that makes it bad, where one does."""

    name: str
    codes: frozenset[FaultCode]
    spoil: Callable[[Files], None]
    served_as: str | None = None

    def make(self, good: Path, folder: Path) -> Path:
        """Copies the good adapter to `folder` (new) and spoils it there."""
        folder.mkdir(parents=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy(good / name, folder / name)
        self.spoil(read(folder))
        return folder


BAD: list[BadAdapter] = []


def bad(*codes: FaultCode, served_as: str | None = None) -> Callable[[Callable[[Files], None]], None]:
    """Registers a function that changes the pieces; they are written afterwards."""

    def register(change: Callable[[Files], None]) -> None:
        def spoil(files: Files) -> None:
            change(files)
            files.write()

        BAD.append(BadAdapter(change.__name__, frozenset(codes), spoil, served_as))

    return register


def bad_config(name: str, code: FaultCode, **members: object) -> None:
    """Registers an adapter whose config has other members."""

    def spoil(files: Files) -> None:
        files.config |= members
        files.write()

    BAD.append(BadAdapter(name, frozenset({code}), spoil))


def read(folder: Path) -> Files:
    return Files(folder, json.loads((folder / CONFIG_FILE).read_text()), read_tensors(folder / WEIGHTS_FILE))


def read_tensors(path: Path) -> Tensors:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    body = raw[8 + length :]
    return {
        name: Tensor(entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end = offsets[1]
    return pack_raw(json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors.values()))


def pack_raw(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def header_of(files: Files) -> dict[str, Any]:
    raw = pack(files.tensors)
    (length,) = struct.unpack("<Q", raw[:8])
    members: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return members


def body_of(files: Files) -> bytes:
    return b"".join(tensor.data for tensor in files.tensors.values())


def floats(shape: list[int], seed: int, scale: float = 0.05) -> Tensor:
    values = np.random.default_rng(seed).normal(0, scale, shape).astype("<f4")
    return Tensor("F32", shape, values.tobytes())


def write_base(folder: Path, seed: int = 0, hidden: int = HIDDEN) -> Path:
    """A base model's folder, Llama-like, of two layers."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": hidden, "num_hidden_layers": LAYERS, "vocab_size": 96}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": floats([96, hidden], seed), "model.norm.weight": floats([hidden], seed)}
    for layer in range(LAYERS):
        for number, (module, (width_in, width_out)) in enumerate(WIDTHS.items()):
            shape = [width_out, hidden if width_in == HIDDEN else width_in]
            tensors[f"model.layers.{layer}.{module}.weight"] = floats(shape, seed + 10 * layer + number)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = floats([hidden], seed)
    (folder / "model.safetensors").write_bytes(pack(tensors))
    return folder


def write_good(folder: Path, seed: int = 1, rank: int = 8, base_name: str = "base") -> Path:
    """An adapter for `write_base` on all attention projections; another seed, other weights."""
    folder.mkdir(parents=True)
    names = [name for name in WIDTHS if name.startswith("self_attn")]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"/models/{base_name}",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in names],
    }
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in names:
            path = f"{PREFIX}model.layers.{layer}.{name}"
            width_in, width_out = WIDTHS[name]
            tensors[f"{path}.lora_A.weight"] = floats([rank, width_in], seed + layer)
            tensors[f"{path}.lora_B.weight"] = floats([width_out, rank], seed + layer + 100)
    Files(folder, config, tensors).write()
    return folder


# Numbers


def put_number(files: Files, name: str, value: float) -> None:
    numbers = files.numbers(name)
    numbers[-1, -1] = value
    files.tensors[name].data = numbers.tobytes()


@bad(FaultCode.NOT_FINITE)
def one_nan(files: Files) -> None:
    put_number(files, files.first, math.nan)


@bad(FaultCode.NOT_FINITE)
def one_infinity(files: Files) -> None:
    put_number(files, files.second, math.inf)


@bad(FaultCode.NOT_FINITE)
def one_negative_infinity(files: Files) -> None:
    put_number(files, files.second, -math.inf)


@bad(FaultCode.NOT_FINITE)
def one_half_precision_nan(files: Files) -> None:
    numbers = files.numbers(files.first).astype("<f2")
    numbers[0, 0] = math.nan
    files.tensors[files.first] = Tensor("F16", list(numbers.shape), numbers.tobytes())


@bad(FaultCode.NOT_FINITE)
def one_bfloat16_infinity(files: Files) -> None:
    tensor = files.tensors[files.second]
    halves = (np.frombuffer(tensor.data, "<u4") >> 16).astype("<u2")
    halves[-1] = 0x7F80
    files.tensors[files.second] = Tensor("BF16", tensor.shape, halves.tobytes())


@bad(FaultCode.TOO_LARGE)
def one_1e30(files: Files) -> None:
    put_number(files, files.first, 1e30)


@bad(FaultCode.TOO_LARGE)
def one_value_past_the_bound(files: Files) -> None:
    put_number(files, files.second, -1_001.0)


@bad(FaultCode.DTYPE_OVERFLOW, served_as="float16")
def overflow_after_the_cast_to_half(files: Files) -> None:
    put_number(files, files.second, 70_000.0)


@bad(FaultCode.DTYPE_OVERFLOW, served_as="bfloat16")
def overflow_after_the_cast_to_bfloat16(files: Files) -> None:
    put_number(files, files.second, 3.4e38)


@bad(FaultCode.TOO_LARGE)
def too_large_by_scaling(files: Files) -> None:
    files.config["lora_alpha"] = 65_536
    put_number(files, files.second, 500.0)


@bad(FaultCode.TOO_LARGE)
def too_large_by_an_alpha_pattern(files: Files) -> None:
    files.config["alpha_pattern"] = {files.module: 65_536}
    put_number(files, files.second, 500.0)


@bad(FaultCode.TOO_LARGE, served_as="float16")
def amplification_past_what_half_holds(files: Files) -> None:
    for name in (files.first, files.second):
        tensor = files.tensors[name]
        tensor.data = np.full(tensor.shape, 4.0, "<f4").tobytes()


# lora_alpha and r


def raw_member(name: str, text: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files.config[name] = "PLACE"
        files.raw_config = json.dumps(files.config).replace('"PLACE"', text).encode()
        files.write()

    return change


for literal in ("NaN", "Infinity", "-Infinity", "1e400", "1" * 40):
    spoiled = raw_member("lora_alpha", literal)
    BAD.append(BadAdapter(f"alpha_{literal[:9]}", frozenset({FaultCode.CONFIG_NOT_JSON}), spoiled))
for number, alpha in enumerate((1e308, 0, -16, "16", True, None, [16])):
    bad_config(f"alpha_invalid_{number}", FaultCode.ALPHA_INVALID, lora_alpha=alpha)
for number, rank in enumerate((0, -8, 8.5, "8", True, None)):
    bad_config(f"rank_invalid_{number}", FaultCode.RANK_INVALID, r=rank)
bad_config("rank_huge", FaultCode.RANK_TOO_HIGH, r=1 << 60)
bad_config("rank_over_the_maximum", FaultCode.RANK_TOO_HIGH, r=65)


@bad(FaultCode.SHAPE_MISMATCH)
def rank_other_than_the_file_s(files: Files) -> None:
    files.config["r"] += 1


@bad(FaultCode.RANK_TOO_HIGH)
def rank_pattern_over_the_maximum(files: Files) -> None:
    files.config["rank_pattern"] = {files.module: 1_000}


@bad(FaultCode.SHAPE_MISMATCH)
def rank_pattern_other_than_the_file_s(files: Files) -> None:
    files.config["rank_pattern"] = {files.module: files.config["r"] - 1 or 2}


# What kind of adapter it is

bad_config("ia3", FaultCode.NOT_LORA, peft_type="IA3")
bad_config("adalora", FaultCode.NOT_LORA, peft_type="ADALORA")
bad_config("no_type", FaultCode.NOT_LORA, peft_type=None)
bad_config("type_is_a_list", FaultCode.NOT_LORA, peft_type=["LORA"])
bad_config("sequence_classification", FaultCode.TASK_UNSUPPORTED, task_type="SEQ_CLS")
bad_config("dora", FaultCode.DORA_UNSUPPORTED, use_dora=True)
bad_config("bias_all", FaultCode.BIAS_UNSUPPORTED, bias="all")
bad_config("bias_lora_only", FaultCode.BIAS_UNSUPPORTED, bias="lora_only")
bad_config("lora_bias", FaultCode.BIAS_UNSUPPORTED, lora_bias=True)
for init in ("pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq"):
    bad_config(f"init_{init}", FaultCode.INIT_UNSUPPORTED, init_lora_weights=init)
bad_config("init_is_an_object", FaultCode.INIT_UNSUPPORTED, init_lora_weights={"pissa": 1})
bad_config("loftq_config", FaultCode.INIT_UNSUPPORTED, loftq_config={"loftq_bits": 4})
bad_config("alora", FaultCode.ALORA_UNSUPPORTED, alora_invocation_tokens=[1, 2])
bad_config("layer_replication", FaultCode.LAYER_REPLICATION_UNSUPPORTED, layer_replication=[[0, 1], [0, 2]])
bad_config("layers_to_transform", FaultCode.LAYER_SELECTION_UNSUPPORTED, layers_to_transform=[0])
bad_config("layers_to_transform_zero", FaultCode.LAYER_SELECTION_UNSUPPORTED, layers_to_transform=0)
bad_config("layers_pattern", FaultCode.LAYER_SELECTION_UNSUPPORTED, layers_pattern="layers")
bad_config("exclude_modules", FaultCode.LAYER_SELECTION_UNSUPPORTED, exclude_modules=["k_proj"])
bad_config("modules_to_save", FaultCode.MODULES_TO_SAVE_UNSUPPORTED, modules_to_save=["lm_head"])
bad_config("classifier_to_save", FaultCode.MODULES_TO_SAVE_UNSUPPORTED, modules_to_save=["classifier"])
bad_config("trainable_tokens", FaultCode.TOKENS_UNSUPPORTED, trainable_token_indices=[5])
bad_config("target_parameters", FaultCode.TARGET_PARAMETERS_UNSUPPORTED, target_parameters=["experts.down_proj"])
bad_config("fan_in_fan_out", FaultCode.VARIANT_UNSUPPORTED, fan_in_fan_out=True)
bad_config("megatron", FaultCode.VARIANT_UNSUPPORTED, megatron_config={"tensor_parallel": 2})
bad_config("qalora", FaultCode.VARIANT_UNSUPPORTED, use_qalora=True)
bad_config("block_diagonal", FaultCode.VARIANT_UNSUPPORTED, use_bdlora={"nblocks": 2})
bad_config("unknown_field", FaultCode.FIELD_UNKNOWN, vllm_lora_scaling_factor=1e9)
bad_config("unknown_field_of_tomorrow", FaultCode.FIELD_UNKNOWN, use_betterlora=True)
bad_config("rslora_is_a_string", FaultCode.FIELD_INVALID, use_rslora="yes")
bad_config("base_is_a_number", FaultCode.FIELD_INVALID, base_model_name_or_path=7)

# target_modules and patterns

bad_config("targets_by_regex", FaultCode.TARGET_MODULES_INVALID, target_modules=".*_proj")
bad_config("targets_by_catastrophic_regex", FaultCode.TARGET_MODULES_INVALID, target_modules="(a+)+$")
bad_config("no_targets", FaultCode.TARGET_MODULES_INVALID, target_modules=[])
bad_config("targets_absent", FaultCode.TARGET_MODULES_INVALID, target_modules=None)
bad_config("targets_are_numbers", FaultCode.TARGET_MODULES_INVALID, target_modules=[1])
bad_config("target_unknown", FaultCode.TARGET_MODULE_UNKNOWN, target_modules=["query_key_value"])
bad_config("target_embedding", FaultCode.TARGET_MODULE_UNKNOWN, target_modules=["embed_tokens"])
bad_config("target_half_a_name", FaultCode.TARGET_MODULE_UNKNOWN, target_modules=["proj"])
bad_config("target_with_nul", FaultCode.TARGET_MODULE_UNKNOWN, target_modules=["q_proj\0"])
bad_config("rank_pattern_by_regex", FaultCode.PATTERN_INVALID, rank_pattern={".*": 8})
bad_config("rank_pattern_catastrophic", FaultCode.PATTERN_INVALID, rank_pattern={"(([a-z._0-9])+)+!": 8})
bad_config("alpha_pattern_by_regex", FaultCode.PATTERN_INVALID, alpha_pattern={"q_proj|v_proj": 8})
bad_config("alpha_pattern_unbalanced", FaultCode.PATTERN_INVALID, alpha_pattern={"q_proj(": 8})
bad_config("rank_pattern_is_a_list", FaultCode.PATTERN_INVALID, rank_pattern=["q_proj"])
bad_config("rank_pattern_huge", FaultCode.PATTERN_INVALID, rank_pattern={f"x{n}": 1 for n in range(300)})
bad_config("rank_pattern_zero", FaultCode.RANK_INVALID, rank_pattern={"q_proj": 0})
bad_config("alpha_pattern_is_text", FaultCode.ALPHA_INVALID, alpha_pattern={"q_proj": "8"})

# Another base model

bad_config("other_base_by_name", FaultCode.BASE_MISMATCH, base_model_name_or_path="org/another-model")


@bad(FaultCode.BASE_MISMATCH)
def other_base_by_fingerprint(files: Files) -> None:
    files.metadata[FINGERPRINT_KEY] = "0" * 64


@bad(FaultCode.SHAPE_MISMATCH)
def other_base_by_width(files: Files) -> None:
    for number, (name, tensor) in enumerate(files.tensors.items()):
        wide = name.endswith("lora_A.weight")
        files.tensors[name] = floats(
            [tensor.shape[0] * (1 if wide else 2), tensor.shape[1] * (2 if wide else 1)], number
        )


@bad(FaultCode.MODULE_UNKNOWN)
def other_base_by_depth(files: Files) -> None:
    for name in (files.first, files.second):
        files.tensors[name.replace("layers.0", "layers.99")] = files.tensors[name]


# Tensors


@bad(FaultCode.SHAPE_MISMATCH)
def wrong_width_of_a(files: Files) -> None:
    shape = files.tensors[files.first].shape
    files.tensors[files.first] = floats([shape[0], shape[1] + 1], 0)


@bad(FaultCode.SHAPE_MISMATCH)
def wrong_width_of_b(files: Files) -> None:
    shape = files.tensors[files.second].shape
    files.tensors[files.second] = floats([shape[0] - 1, shape[1]], 0)


@bad(FaultCode.SHAPE_MISMATCH)
def transposed(files: Files) -> None:
    tensor = files.tensors[files.first]
    tensor.shape = tensor.shape[::-1]


@bad(FaultCode.SHAPE_MISMATCH)
def flat(files: Files) -> None:
    tensor = files.tensors[files.first]
    tensor.shape = [math.prod(tensor.shape)]


@bad(FaultCode.SHAPE_MISMATCH)
def empty_tensor(files: Files) -> None:
    files.tensors[files.first] = Tensor("F32", [0, files.tensors[files.first].shape[1]], b"")


@bad(FaultCode.SHAPE_MISMATCH)
def one_number(files: Files) -> None:
    files.tensors[files.first] = Tensor("F32", [], b"\0" * 4)


@bad(FaultCode.TENSOR_MISSING)
def pair_without_b(files: Files) -> None:
    del files.tensors[files.second]


@bad(FaultCode.TENSOR_MISSING)
def module_without_tensors(files: Files) -> None:
    first, second = files.first, files.second
    del files.tensors[first], files.tensors[second]


@bad(FaultCode.TENSOR_MISSING)
def no_tensors(files: Files) -> None:
    files.tensors.clear()


@bad(FaultCode.TENSOR_UNEXPECTED)
def module_not_among_the_targets(files: Files) -> None:
    files.config["target_modules"] = [files.module]


def extra(name: str, ending: str, code: FaultCode) -> None:
    """Registers an adapter with one tensor more."""

    def spoil(files: Files) -> None:
        files.tensors[ending] = floats([8, 8], 3)
        files.write()

    BAD.append(BadAdapter(name, frozenset({code}), spoil))


LAYER = f"{PREFIX}model.layers.0.self_attn"
extra("extra_tensor", "something.weight", FaultCode.TENSOR_UNEXPECTED)
extra("name_climbs", "../../etc/passwd", FaultCode.TENSOR_UNEXPECTED)
extra("name_climbs_inside", f"{PREFIX}../q_proj.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("name_with_nul", f"{LAYER}.q_proj\0.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("name_empty", "", FaultCode.TENSOR_UNEXPECTED)
extra("name_only_prefix", f"{PREFIX}.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("name_long", "x" * 100_000, FaultCode.TENSOR_UNEXPECTED)
extra("name_of_an_adapter", f"{LAYER}.q_proj.lora_A.default.weight", FaultCode.TENSOR_UNEXPECTED)
extra("unknown_layer", f"{LAYER}.z_proj.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("norm", f"{PREFIX}model.norm.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("embedding", f"{PREFIX}model.embed_tokens.lora_embedding_A", FaultCode.TENSOR_UNEXPECTED)
extra("whole_embedding", f"{PREFIX}model.embed_tokens.base_layer.weight", FaultCode.TENSOR_UNEXPECTED)
extra("head", f"{PREFIX}lm_head.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("magnitude_vector", f"{LAYER}.q_proj.lora_magnitude_vector", FaultCode.TENSOR_UNEXPECTED)
extra("bias_tensor", f"{LAYER}.q_proj.lora_B.bias", FaultCode.TENSOR_UNEXPECTED)
extra("prefix_twice", f"{PREFIX}{LAYER}.q_proj.lora_A.weight", FaultCode.MODULE_UNKNOWN)
extra("prefix_missing", "model.layers.0.self_attn.q_proj.lora_A.weight", FaultCode.TENSOR_UNEXPECTED)


@bad(FaultCode.DTYPE_UNSUPPORTED)
def stored_as_int8(files: Files) -> None:
    tensor = files.tensors[files.first]
    tensor.dtype, tensor.data = "I8", bytes(math.prod(tensor.shape))


@bad(FaultCode.DTYPE_UNSUPPORTED)
def stored_as_double(files: Files) -> None:
    tensor = files.tensors[files.first]
    tensor.dtype, tensor.data = "F64", files.numbers(files.first).astype("<f8").tobytes()


@bad(FaultCode.DTYPE_UNSUPPORTED)
def stored_as_float8(files: Files) -> None:
    tensor = files.tensors[files.first]
    tensor.dtype, tensor.data = "F8_E4M3", bytes(math.prod(tensor.shape))


@bad(FaultCode.DTYPE_UNSUPPORTED)
def stored_as_an_unknown_dtype(files: Files) -> None:
    files.tensors[files.first].dtype = "F31"


# The safetensors file


@bad(FaultCode.NOT_SAFETENSORS)
def pickle_file(files: Files) -> None:
    files.raw_weights = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94."


@bad(FaultCode.NOT_SAFETENSORS)
def zip_file(files: Files) -> None:
    path = files.folder / WEIGHTS_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000)
    files.raw_weights = path.read_bytes()


@bad(FaultCode.NOT_SAFETENSORS)
def html_page(files: Files) -> None:
    files.raw_weights = b"<!DOCTYPE html><html><title>404</title></html>"


@bad(FaultCode.NOT_SAFETENSORS)
def zeros(files: Files) -> None:
    files.raw_weights = bytes(1_000)


@bad(FaultCode.FILE_MISSING)
def empty_weights(files: Files) -> None:
    files.raw_weights = b""


@bad(FaultCode.FILE_MISSING)
def empty_config(files: Files) -> None:
    files.raw_config = b""


def truncated(name: str, kept: Callable[[bytes], int]) -> None:
    """Registers a file cut off after `kept` bytes."""

    def spoil(files: Files) -> None:
        whole = pack(files.tensors)
        files.raw_weights = whole[: kept(whole)]
        files.write()

    BAD.append(BadAdapter(name, frozenset({FaultCode.FILE_TRUNCATED}), spoil))


truncated("cut_inside_the_length", lambda whole: 5)
truncated("cut_after_the_length", lambda whole: 8)
truncated("cut_inside_the_header", lambda whole: 100)
truncated("cut_after_the_header", lambda whole: 8 + struct.unpack("<Q", whole[:8])[0])
truncated("cut_inside_the_tensors", lambda whole: len(whole) // 2 + 3000)
truncated("cut_before_the_last_byte", lambda whole: len(whole) - 1)


@bad(FaultCode.OFFSETS_INVALID)
def trailing_byte(files: Files) -> None:
    files.raw_weights = pack(files.tensors) + b"\0"


def length_lies(name: str, code: FaultCode, length: int) -> None:
    """Registers a header that gives another length than it has."""

    def spoil(files: Files) -> None:
        files.raw_weights = struct.pack("<Q", length) + pack(files.tensors)[8:]
        files.write()

    BAD.append(BadAdapter(name, frozenset({code}), spoil))


length_lies("length_zero", FaultCode.NOT_SAFETENSORS, 0)
length_lies("length_of_all_ones", FaultCode.NOT_SAFETENSORS, (1 << 64) - 1)
length_lies("length_past_the_limit", FaultCode.NOT_SAFETENSORS, 3 << 20)
length_lies("length_short", FaultCode.HEADER_INVALID, 50)


def raw_header(name: str, code: FaultCode, header: Callable[[Files], bytes]) -> None:
    """Registers a file with another header over the same bytes."""

    def spoil(files: Files) -> None:
        files.raw_weights = pack_raw(header(files), body_of(files))
        files.write()

    BAD.append(BadAdapter(name, frozenset({code}), spoil))


def offsets(shift: Callable[[list[int], int], list[int]]) -> Callable[[Files], bytes]:
    """Header with the second tensor's extents changed by `shift(extents, size)`."""

    def header(files: Files) -> bytes:
        members = header_of(files)
        entry = members[list(members)[1]]
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = shift([begin, end], end - begin)
        return json.dumps(members).encode()

    return header


def member(name: str, value: object) -> Callable[[Files], bytes]:
    """Header with one member of the first tensor replaced."""

    def header(files: Files) -> bytes:
        members = header_of(files)
        members[files.first][name] = value
        return json.dumps(members).encode()

    return header


raw_header("tensors_overlap", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [at[0] - 4, at[1] - 4]))
raw_header("tensors_leave_a_hole", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [at[0] + 4, at[1] + 4]))
raw_header("tensors_share_bytes", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [0, size]))
raw_header("offsets_backwards", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: at[::-1]))
raw_header("offsets_negative", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [-size, 0]))
raw_header("offsets_past_64_bits", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [1 << 62, (1 << 62) + size]))
raw_header("offsets_other_than_the_shape", FaultCode.OFFSETS_INVALID, offsets(lambda at, size: [at[0], at[1] - 4]))
raw_header("shape_overflows", FaultCode.OFFSETS_INVALID, member("shape", [1 << 40, 1 << 40]))
raw_header("shape_negative", FaultCode.HEADER_INVALID, member("shape", [-8, -64]))
raw_header("shape_of_booleans", FaultCode.HEADER_INVALID, member("shape", [True, True]))
raw_header("shape_of_a_thousand", FaultCode.HEADER_INVALID, member("shape", [1] * 1_000))
raw_header("shape_is_text", FaultCode.HEADER_INVALID, member("shape", "8x64"))
raw_header("dtype_is_a_list", FaultCode.DTYPE_UNSUPPORTED, member("dtype", ["F32"]))
raw_header("entry_with_more", FaultCode.HEADER_INVALID, member("file", "/etc/passwd"))
raw_header("header_is_a_list", FaultCode.HEADER_INVALID, lambda files: b"[1, 2]")
raw_header("header_is_text", FaultCode.HEADER_INVALID, lambda files: b'"text"')
raw_header("header_not_json", FaultCode.HEADER_INVALID, lambda files: b"{" * 64)
raw_header("header_deep", FaultCode.HEADER_INVALID, lambda files: b'{"a":' + b"[" * 100_000)
raw_header("header_in_utf16", FaultCode.HEADER_INVALID, lambda files: json.dumps(header_of(files)).encode("utf-16"))
raw_header(
    "header_starts_with_space", FaultCode.HEADER_INVALID, lambda files: b" " + json.dumps(header_of(files)).encode()
)
raw_header("header_metadata_is_a_number", FaultCode.HEADER_INVALID, lambda files: b'{"__metadata__": 7}')
raw_header("header_metadata_nested", FaultCode.HEADER_INVALID, lambda files: b'{"__metadata__": {"a": {}}}')


@bad(FaultCode.HEADER_INVALID)
def name_twice(files: Files) -> None:
    header = json.dumps(header_of(files))
    entry = json.dumps({files.first: header_of(files)[files.first]})[1:-1]
    files.raw_weights = pack_raw(f"{{{entry}, {header[1:]}".encode(), body_of(files))


@bad(FaultCode.NOT_SAFETENSORS)
def header_past_its_limit(files: Files) -> None:
    files.raw_weights = pack_raw(b"{" + b" " * (5 << 20) + b"}", b"")


@bad(FaultCode.HEADER_INVALID)
def header_of_many_members(files: Files) -> None:
    files.raw_weights = pack_raw(b'{"a":[' + b"1," * 100_000 + b"1]}", b"")


# The config file


def raw_config(name: str, raw: bytes, code: FaultCode = FaultCode.CONFIG_NOT_JSON) -> None:
    """Registers an adapter with these bytes as config."""

    def spoil(files: Files) -> None:
        files.raw_config = raw
        files.write()

    BAD.append(BadAdapter(name, frozenset({code}), spoil))


raw_config("config_is_a_list", b"[]")
raw_config("config_is_null", b"null")
raw_config("config_not_json", b"r: 8\nlora_alpha: 16\n")
raw_config("config_cut", b'{"peft_type": "LORA", "r": ')
raw_config("config_in_utf16", '{"peft_type": "LORA"}'.encode("utf-16"))
raw_config("config_in_latin1", b'{"peft_type": "LOR\xc4"}')
raw_config("config_with_byte_order_mark", b'\xef\xbb\xbf{"peft_type": "LORA"}')
raw_config("config_deep", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, FaultCode.FILE_TOO_LARGE)
raw_config("config_rather_deep", b'{"a":' * 20 + b"1" + b"}" * 20)
raw_config("config_huge", b'{"a": "' + b"x" * (1 << 20) + b'"}', FaultCode.FILE_TOO_LARGE)
raw_config("config_of_many_members", b"[" + b"1," * 60_000 + b"1]")
raw_config("config_unclosed_escape", b'{"a": "' + b'\\"' * 50_000 + b"\\")
raw_config("config_key_twice", b'{"r": 8, "peft_type": "LORA", "r": 9}')
raw_config("config_huge_integer", b'{"r": ' + b"9" * 10_000 + b"}")
raw_config("config_trailing", b'{"peft_type": "LORA"} {}')
raw_config("config_with_lone_surrogate", b'{"peft_type": "\\ud800"}', FaultCode.NOT_LORA)


def missing(name: str) -> None:
    """Registers an adapter without that file."""

    def spoil(files: Files) -> None:
        (files.folder / name).unlink()

    BAD.append(BadAdapter(f"without_{name}", frozenset({FaultCode.FILE_MISSING}), spoil))


missing(CONFIG_FILE)
missing(WEIGHTS_FILE)
