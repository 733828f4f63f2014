"""What can be wrong with an adapter, in words and in codes, and what an inspection returns. Types only."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MOST_FAULTS = 50
MOST_CHARACTERS = 160


class FaultCode(StrEnum):
    """Stable: clients may branch on them."""

    FILE_MISSING = "file_missing"
    FILE_TOO_LARGE = "file_too_large"
    INSPECTION_FAILED = "inspection_failed"

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
    """One thing that is wrong. `where`: `<file>` or `<file>:<field or tensor>`.

    All text is printable and short.
    """

    code: FaultCode
    where: str
    found: str
    expected: str
    hint: str = ""


class Faults:
    """Collects faults up to a cap, so that a hostile file cannot make a huge answer."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, code: FaultCode, where: str, found: object, expected: object, hint: str = "") -> None:
        if len(self._faults) < MOST_FAULTS:
            self._faults.append(Fault(code, printable(where), printable(found), printable(expected), hint))

    def __len__(self) -> int:
        return len(self._faults)

    def as_tuple(self) -> tuple[Fault, ...]:
        return tuple(self._faults)


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
