"""Is this adapter fit to be served on this base? Pure: a folder in, faults or a canonical config out.

vLLM 0.32 loads adapters whose widths, rank or numbers are wrong, and one NaN then spoils the answers of every
tenant (it stays in freed KV blocks). So everything is checked here, before any engine sees a byte. Runs in a
child process (`inspector.py`), because the files come from strangers.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapter_store.adapter_config import (
    NEAREST,
    RETRAIN,
    SAVE_AGAIN,
    UNSUPPORTED_FIELDS,
    LoraConfig,
    check_base_name,
    check_config,
    read_members,
)
from adapter_store.base_model import BaseModel
from adapter_store.bundle_files import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.faults import Bounds, Fault, FaultCode, Faults, Inspection, listing
from adapter_store.safetensors_header import Header, HeaderInvalid, TensorEntry, read_header

__all__ = ["Bounds", "Fault", "FaultCode", "Inspection", "inspect"]

FINGERPRINT_KEY = "tailor.base_fingerprint"
PREFIX = "base_model.model."
SIDES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
HEADER_BYTES = 256 << 10
HEADER_BYTES_A_MODULE = 1_024
DTYPES = frozenset({"F32", "F16", "BF16"})
# Trained values are below 10: three orders of magnitude are left.
MAX_MAGNITUDE = 1e3
# ‖B·scaling‖∞·‖A‖∞, sums of magnitudes along rows, bounds every element of B·scaling·A, every partial sum on the way
# to it, and how much larger than its input an adapter's output can be. Trained ones are near 50 at rank 64 and
# width 4096. float16 ends at 65,504: a product below 1,000 is far from it, and an input that a norm made (below 64)
# stays so too. The others have room for 38 digits.
MAX_GAIN = {"float16": 1e3, "bfloat16": 1e6, "float32": 1e6}
TRAIN_SMALLER = "train with a lower learning rate or gradient clipping, or check lora_alpha"
# Parts of names that PEFT gives to what is no plain LoRA.
HINTS_BY_NAME = {
    "lora_magnitude_vector": UNSUPPORTED_FIELDS["use_dora"][1],
    "lora_embedding_": "embeddings stay the base's: train again with target_modules of linear layers",
    "lora_B.bias": UNSUPPORTED_FIELDS["lora_bias"][1],
    "base_layer.": "model.save_pretrained(OUT, save_embedding_layers=False) leaves the base's own weights out",
    "embed_tokens.": "model.save_pretrained(OUT, save_embedding_layers=False) leaves the base's own weights out",
    "lm_head.": UNSUPPORTED_FIELDS["modules_to_save"][1],
    "token_adapter.": UNSUPPORTED_FIELDS["trainable_token_indices"][1],
    "ia3_": RETRAIN,
    "oft_": RETRAIN,
    "lora_E": RETRAIN,
    "hada_": NEAREST,
    "lokr_": NEAREST,
    "vera_": NEAREST,
}


def inspect(folder: Path, base: BaseModel, bounds: Bounds) -> Inspection:
    """Checks the two files of `folder` against `base`; never raises for what is in them. Takes 16 MiB.

    All that can be told is told at once: a faulty config leaves the tensors to be looked at, and the other way round.
    """
    faults = Faults()
    members = _read_config(folder / CONFIG_FILE, bounds, faults)
    config = check_config(members, base, bounds, faults) if members is not None else None
    header, sound = _read_weights_header(folder / WEIGHTS_FILE, _header_limit(base, bounds), bounds, faults)
    if members is not None:
        _check_base(members, header, base, faults)
    if header is not None:
        pairs = _check_tensors(header, base, config, faults)
        if sound:
            _check_values(folder / WEIGHTS_FILE, pairs, config, base, faults)
    if faults or config is None:
        return Inspection(faults.as_tuple())
    rank = max(config.rank(module) for module in config.modules)
    return Inspection((), config.to_json(base.name), rank, _leaves(config.modules))


def _read_config(path: Path, bounds: Bounds, faults: Faults) -> dict[str, object] | None:
    if not _has_size(path, bounds.config_bytes, faults):
        return None
    return read_members(path.read_bytes(), faults)


def _header_limit(base: BaseModel, bounds: Bounds) -> int:
    """In bytes. Two tensors of a module take about 300: a base with few modules needs no megabytes read."""
    return min(bounds.header_bytes, HEADER_BYTES + HEADER_BYTES_A_MODULE * len(base.modules))


def _read_weights_header(path: Path, header_bytes: int, bounds: Bounds, faults: Faults) -> tuple[Header | None, bool]:
    """The header, and whether the tensors lie where it says."""
    if not _has_size(path, bounds.weights_bytes, faults):
        return None, False
    try:
        return read_header(path, limit_bytes=header_bytes), True
    except HeaderInvalid as error:
        for fault in error.faults:
            faults.add(fault.code, path.name, fault.found, fault.expected, SAVE_AGAIN, tensor=fault.tensor)
        return error.header, False


def _has_size(path: Path, limit_bytes: int, faults: Faults) -> bool:
    size = path.stat().st_size if path.is_file() else 0
    if size == 0:
        expected = "the file that PEFT's save_pretrained writes"
        faults.add(FaultCode.FILE_MISSING, path.name, "no bytes", expected, SAVE_AGAIN)
    elif size > limit_bytes:
        hint = "train fewer modules or a lower rank, or ask the operator for a higher limit"
        faults.add(FaultCode.FILE_TOO_LARGE, path.name, f"{size} bytes", f"at most {limit_bytes}", hint)
    return 0 < size <= limit_bytes


def _check_base(members: dict[str, object], header: Header | None, base: BaseModel, faults: Faults) -> None:
    """The fingerprint that Tailor's training leaves in the weights decides; without one, the base's name."""
    fingerprint = header.metadata.get(FINGERPRINT_KEY) if header is not None else None
    if fingerprint is None or not base.fingerprint:
        check_base_name(members, base, faults)
    elif fingerprint != base.fingerprint:
        hint = f"it was trained on other weights than those of '{base.name}': train it again on this base"
        field = f"__metadata__.{FINGERPRINT_KEY}"
        faults.add(FaultCode.BASE_MISMATCH, WEIGHTS_FILE, fingerprint, base.fingerprint, hint, field=field)


Pairs = dict[str, dict[str, TensorEntry]]


def _check_tensors(header: Header, base: BaseModel, config: LoraConfig | None, faults: Faults) -> Pairs:
    """Module → side → entry, of the tensors that are right so far."""
    pairs: Pairs = {}
    for name, entry in header.tensors.items():
        module, side = _parse_name(name)
        if side is None:
            expected = f"{PREFIX}<module>.lora_A.weight or .lora_B.weight"
            _tensor_fault(faults, FaultCode.TENSOR_UNEXPECTED, name, "another name", expected, _hint_for(name))
        elif module not in base.modules:
            expected = "a linear layer of the base: " + listing(_leaves(base.modules))
            hint = "is it this base model's adapter? only these layers may be changed here"
            _tensor_fault(faults, FaultCode.MODULE_UNKNOWN, name, module, expected, hint)
        elif config is not None and module not in config.modules:
            hint = "name the module there, or leave its tensors out"
            _tensor_fault(faults, FaultCode.TENSOR_UNEXPECTED, name, module, "a module of target_modules", hint)
        elif _check_entry(name, entry, _shape(module, side, base, config, entry), faults):
            pairs.setdefault(module, {})[side] = entry
    if config is not None:
        _check_complete(header, config, faults)
    return pairs


def _hint_for(name: str) -> str:
    return next((hint for part, hint in HINTS_BY_NAME.items() if part in name), "leave it out, or save with PEFT")


def _parse_name(name: str) -> tuple[str, str | None]:
    for side, ending in SIDES.items():
        if name.startswith(PREFIX) and name.endswith(ending):
            return name[len(PREFIX) : -len(ending)], side
    return name, None


def _shape(module: str, side: str, base: BaseModel, config: LoraConfig | None, entry: TensorEntry) -> tuple[int, int]:
    """A is (rank, in), B is (out, rank).

    Without a config the file's own rank stands in, and widths are checked.
    """
    width_in, width_out = base.modules[module]
    own = entry.shape[0 if side == "lora_A" else -1] if entry.shape else 0
    rank = config.rank(module) if config is not None else own
    return (rank, width_in) if side == "lora_A" else (width_out, rank)


def _check_entry(name: str, entry: TensorEntry, shape: tuple[int, int], faults: Faults) -> bool:
    if entry.dtype not in DTYPES:
        hint = "model.to(torch.float32) before model.save_pretrained(OUT)"
        _tensor_fault(faults, FaultCode.DTYPE_UNSUPPORTED, name, entry.dtype, listing(DTYPES), hint)
    elif entry.shape != shape or 0 in shape:
        hint = "is it this base model's adapter, and r its rank?"
        _tensor_fault(faults, FaultCode.SHAPE_MISMATCH, name, str(list(entry.shape)), str(list(shape)), hint)
    else:
        return True
    return False


def _check_complete(header: Header, config: LoraConfig, faults: Faults) -> None:
    for module in config.modules:
        for ending in SIDES.values():
            name = f"{PREFIX}{module}{ending}"
            if name not in header.tensors and name not in header.broken:
                hint = "save the whole adapter, or take the module out of target_modules"
                _tensor_fault(faults, FaultCode.TENSOR_MISSING, name, "nothing", "a tensor", hint)


def _check_values(path: Path, pairs: Pairs, config: LoraConfig | None, base: BaseModel, faults: Faults) -> None:
    """Without a config the scaling is not known: values are looked at as they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for module, sides in pairs.items():
            scaling = config.scaling(module) if config is not None else 1.0
            gains = dict(_side_gains(descriptor, module, sides, scaling, base, faults))
            gain = gains.get("lora_A", 0.0) * gains.get("lora_B", 0.0)
            if config is not None and gain > MAX_GAIN[base.dtype]:
                name = f"{PREFIX}{module}{SIDES['lora_B']}"
                found = f"lora_B · scaling · lora_A amplifies up to {gain:.3g} times"
                expected = f"at most {MAX_GAIN[base.dtype]:g} times in {base.dtype}"
                _tensor_fault(faults, FaultCode.TOO_LARGE, name, found, expected, TRAIN_SMALLER)
    finally:
        os.close(descriptor)


def _side_gains(
    descriptor: int, module: str, sides: Mapping[str, TensorEntry], scaling: float, base: BaseModel, faults: Faults
) -> Iterator[tuple[str, float]]:
    """(side, largest row sum after scaling) of the tensors that are finite and in bounds."""
    # here, because it imports numpy, which the gateway does without
    from adapter_store.tensor_values import OVERFLOWS_FROM, read_values

    for side, entry in sides.items():
        name = f"{PREFIX}{module}{SIDES[side]}"
        values = read_values(descriptor, entry)
        factor = scaling if side == "lora_B" else 1.0  # vLLM multiplies B, after the cast
        if values.not_finite_at is not None:
            found = f"NaN or infinity at {list(values.not_finite_at)}"
            _tensor_fault(faults, FaultCode.NOT_FINITE, name, found, "finite numbers", TRAIN_SMALLER)
        elif values.peak >= OVERFLOWS_FROM[base.dtype]:
            found = f"a magnitude of {values.peak:.3g}"
            expected = f"what {base.dtype} holds, the dtype it is served in"
            _tensor_fault(faults, FaultCode.DTYPE_OVERFLOW, name, found, expected, TRAIN_SMALLER)
        elif values.peak * max(factor, 1.0) > MAX_MAGNITUDE:
            found = f"a magnitude of {values.peak:.3g}, times a scaling of {factor:.3g}"
            _tensor_fault(faults, FaultCode.TOO_LARGE, name, found, f"at most {MAX_MAGNITUDE:g}", TRAIN_SMALLER)
        else:
            yield side, values.row_sum * factor


def _leaves(modules: Mapping[str, object] | tuple[str, ...]) -> tuple[str, ...]:
    """The distinct last parts of the paths: q_proj, v_proj, …"""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def _tensor_fault(faults: Faults, code: FaultCode, tensor: str, found: str, expected: str, hint: str) -> None:
    faults.add(code, WEIGHTS_FILE, found, expected, hint, tensor=tensor)
