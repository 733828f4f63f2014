"""What can be wrong with an adapter, in words and in codes, and what an inspection returns. Types only."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

# Every tensor of a large adapter may be at fault: 64 layers of 7 modules are 896.
MOST_FAULTS = 1_000
MOST_TEXT = 512 << 10
MOST_CHARACTERS = 160


class FaultCode(StrEnum):
    """Stable: clients may branch on them."""

    FILE_MISSING = "file_missing"
    FILE_TOO_LARGE = "file_too_large"
    INSPECTION_FAILED = "inspection_failed"
    MORE_FAULTS = "more_faults"

    CONFIG_NOT_JSON = "config_not_json"
    FIELD_INVALID = "field_invalid"
    FIELD_UNKNOWN = "field_unknown"
    NOT_LORA = "not_lora"
    TASK_UNSUPPORTED = "task_unsupported"
    RANK_INVALID = "rank_invalid"
    RANK_TOO_HIGH = "rank_too_high"
    ALPHA_INVALID = "alpha_invalid"
    TARGET_MODULES_INVALID = "target_modules_invalid"
    TARGET_MODULE_UNKNOWN = "target_module_unknown"
    PATTERN_INVALID = "pattern_invalid"
    DORA_UNSUPPORTED = "dora_unsupported"
    BIAS_UNSUPPORTED = "bias_unsupported"
    INIT_UNSUPPORTED = "init_unsupported"
    ALORA_UNSUPPORTED = "alora_unsupported"
    MODULES_TO_SAVE_UNSUPPORTED = "modules_to_save_unsupported"
    TOKENS_UNSUPPORTED = "trainable_tokens_unsupported"
    LAYER_REPLICATION_UNSUPPORTED = "layer_replication_unsupported"
    LAYER_SELECTION_UNSUPPORTED = "layer_selection_unsupported"
    TARGET_PARAMETERS_UNSUPPORTED = "target_parameters_unsupported"
    VARIANT_UNSUPPORTED = "variant_unsupported"
    BASE_MISMATCH = "base_mismatch"

    NOT_SAFETENSORS = "not_safetensors"
    FILE_TRUNCATED = "file_truncated"
    HEADER_INVALID = "header_invalid"
    OFFSETS_INVALID = "offsets_invalid"
    DTYPE_UNSUPPORTED = "dtype_unsupported"
    TENSOR_UNEXPECTED = "tensor_unexpected"
    TENSOR_MISSING = "tensor_missing"
    MODULE_UNKNOWN = "module_unknown"
    SHAPE_MISMATCH = "shape_mismatch"
    NOT_FINITE = "not_finite"
    DTYPE_OVERFLOW = "dtype_overflow"
    TOO_LARGE = "value_too_large"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: with a `tensor`, with a `field` of the config, or with a whole file.

    `where` is `<file>` or `<file>:<field or tensor>`, for people. All text is printable and short.
    """

    code: FaultCode
    where: str
    tensor: str | None
    field: str | None
    found: str
    expected: str
    hint: str


class Faults:
    """Collects all faults; past a thousand, or half a MiB of text, they are only counted."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._count = 0
        self._text = 0

    def add(
        self,
        code: FaultCode,
        file: str,
        found: object,
        expected: object,
        hint: str = "",
        *,
        tensor: str | None = None,
        field: str | None = None,
    ) -> None:
        self._count += 1
        if len(self._faults) >= MOST_FAULTS or self._text >= MOST_TEXT:
            return
        item = next((printable(name) for name in (tensor, field) if name is not None), None)
        fault = Fault(
            code,
            file if item is None else f"{file}:{item}",
            None if tensor is None else item,
            None if field is None else item,
            printable(found),
            printable(expected),
            hint,
        )
        self._text += len(fault.where) + len(item or "") + len(fault.found) + len(fault.expected) + len(hint)
        self._faults.append(fault)

    def __len__(self) -> int:
        return self._count

    def as_tuple(self) -> tuple[Fault, ...]:
        left_out = self._count - len(self._faults)
        if not left_out:
            return tuple(self._faults)
        hint = "mend those that are listed and check again"
        more = Fault(FaultCode.MORE_FAULTS, "adapter", None, None, f"{left_out} faults more", "none", hint)
        return (*self._faults, more)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an adapter may be at most, here and on this engine."""

    max_rank: int = 64
    weights_bytes: int = 2 << 30
    config_bytes: int = 256 << 10
    header_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Inspection:
    """The verdict: `faults` is empty when the adapter may be served, and only then is the rest filled."""

    faults: tuple[Fault, ...]
    config: bytes = b""
    rank: int = 0
    modules: tuple[str, ...] = ()


def printable(value: object) -> str:
    """A tenant's text made fit for a log line or an answer: escaped, and cut to 160 characters."""
    text = value if isinstance(value, str) else brief(value)
    cut = text[:MOST_CHARACTERS]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in cut)
    return safe[:MOST_CHARACTERS] + ("…" if len(text) > MOST_CHARACTERS or len(safe) > MOST_CHARACTERS else "")


def brief(value: object) -> str:
    """A JSON value in a few words; containers by their size, so that nothing deep or long is walked."""
    if isinstance(value, str):
        return f"'{value[:MOST_CHARACTERS]}'"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)[:MOST_CHARACTERS]


def listing(names: Iterable[str], most: int = 8) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
