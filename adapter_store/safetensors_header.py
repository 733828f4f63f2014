"""The header of a safetensors file, read with bounds before anything is allocated.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON,
then the tensors' bytes with no gap. Duplicate names, gaps, overlaps and trailing bytes are refused.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from adapter_store.bounded_json import JsonInvalid, parse
from adapter_store.faults import FaultCode

LENGTH_BYTES = 8
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
MOST_DIMENSIONS = 8
# One tensor takes about six members: name, dtype, shape, two extents, two offsets.
MEMBERS_PER_BYTE = 1 / 4


class HeaderInvalid(ValueError):
    """The file is not a safetensors file as the format has it; `code` says in which way."""

    def __init__(self, code: FaultCode, found: str, expected: str, tensor: str = "") -> None:
        super().__init__(f"{tensor + ': ' if tensor else ''}found {found}, expected {expected}")
        self.code = code
        self.tensor = tensor
        self.found = found
        self.expected = expected


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path, *, limit_bytes: int) -> Header:
    """Reads and checks the header of `path`, at most `limit_bytes` of it. Raises HeaderInvalid, OSError."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(LENGTH_BYTES), file_bytes, limit_bytes)
        raw = file.read(length)
    try:
        members = parse(raw, max_depth=3, max_items=max(64, int(limit_bytes * MEMBERS_PER_BYTE)))
    except JsonInvalid as error:
        raise HeaderInvalid(FaultCode.HEADER_INVALID, str(error), "a JSON header") from None
    if not isinstance(members, dict) or not raw.startswith(b"{"):
        raise HeaderInvalid(FaultCode.HEADER_INVALID, "no JSON object", "a JSON object that starts at byte 8")
    metadata = _metadata(members.pop("__metadata__", {}))
    start = LENGTH_BYTES + length
    tensors = {name: _entry(name, entry, start) for name, entry in members.items()}
    _check_offsets(tensors, start, file_bytes)
    return Header(tensors, metadata)


def _header_length(prefix: bytes, file_bytes: int, limit_bytes: int) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise HeaderInvalid(FaultCode.FILE_TRUNCATED, f"{len(prefix)} bytes", "a header of 8 bytes and more")
    length = int.from_bytes(prefix, "little")
    if length > limit_bytes:
        raise HeaderInvalid(FaultCode.NOT_SAFETENSORS, f"a header length of {length}", f"at most {limit_bytes}")
    if LENGTH_BYTES + length > file_bytes:
        found = f"{file_bytes} bytes"
        raise HeaderInvalid(FaultCode.FILE_TRUNCATED, found, f"a header that ends at byte {LENGTH_BYTES + length}")
    if length < 2:
        raise HeaderInvalid(FaultCode.NOT_SAFETENSORS, f"a header length of {length}", "2 or more")
    return length


def _metadata(value: object) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise HeaderInvalid(FaultCode.HEADER_INVALID, "other values", "an object of strings", "__metadata__")


def _entry(name: str, entry: object, start: int) -> TensorEntry:
    """`start` is where the tensors' bytes begin in the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderInvalid(FaultCode.HEADER_INVALID, "other members", "dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderInvalid(FaultCode.DTYPE_UNSUPPORTED, f"dtype {str(dtype)[:32]!r}", "F32, F16 or BF16", name)
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS:
        raise HeaderInvalid(FaultCode.HEADER_INVALID, "another shape", "a list of whole numbers", name)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderInvalid(FaultCode.OFFSETS_INVALID, "other data_offsets", "[begin, end]", name)
    size = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BYTES[dtype] != size:
        expected = f"{math.prod(shape) * DTYPE_BYTES[dtype]} bytes for {dtype} {list(shape)}"
        raise HeaderInvalid(FaultCode.OFFSETS_INVALID, f"{size} bytes", expected, name)
    return TensorEntry(dtype, tuple(shape), start + offsets[0], size)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_offsets(tensors: Mapping[str, TensorEntry], start: int, file_bytes: int) -> None:
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != end:
            found = f"bytes from {entry.offset}"
            raise HeaderInvalid(FaultCode.OFFSETS_INVALID, found, f"from {end}: no gap, no overlap", name)
        end += entry.size_bytes
    if end > file_bytes:
        raise HeaderInvalid(FaultCode.FILE_TRUNCATED, f"{file_bytes} bytes", f"{end} bytes")
    if end < file_bytes:
        raise HeaderInvalid(FaultCode.OFFSETS_INVALID, f"{file_bytes} bytes", f"{end}: nothing after the tensors")
