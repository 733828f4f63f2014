"""The header of a safetensors file, read with bounds before anything is allocated.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, that many bytes of JSON,
then the tensors' bytes with no gap. Duplicate names, gaps, overlaps and trailing bytes are refused.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from adapter_store.bounded_json import JsonInvalid, parse
from adapter_store.faults import FaultCode, brief

LENGTH_BYTES = 8
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
MOST_DIMENSIONS = 8
# One tensor takes five commas or six, in 60 bytes or more.
MEMBERS_PER_BYTE = 1 / 10
# Past so many the rest is not looked at.
MOST_HEADER_FAULTS = 10_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself; `broken` names the tensors whose entries cannot be used."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    broken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HeaderFault:
    """In which way the file is not as the format has it; `tensor` is None where it is the file as a whole."""

    code: FaultCode
    found: str
    expected: str
    tensor: str | None = None


class HeaderInvalid(ValueError):
    """The file is not a safetensors file as the format has it: `faults` says in which ways, all of them.

    `header` is what could be read all the same: names and shapes hold, where the bytes lie does not.
    """

    def __init__(self, *faults: HeaderFault, header: Header | None = None) -> None:
        first = faults[0]
        named = f"{first.tensor}: " if first.tensor is not None else ""
        super().__init__(f"{named}found {first.found}, expected {first.expected}")
        self.faults = faults
        self.header = header


def read_header(path: Path, *, limit_bytes: int) -> Header:
    """Reads and checks the header of `path`, at most `limit_bytes` of it. Raises HeaderInvalid, OSError."""
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(LENGTH_BYTES), file_bytes, limit_bytes)
        raw = file.read(length)
    members = _members(raw, limit_bytes)
    faults: list[HeaderFault] = []
    metadata = _metadata(members.pop("__metadata__", {}), faults)
    start = LENGTH_BYTES + length
    tensors: dict[str, TensorEntry] = {}
    for name, value in members.items():
        entry = _entry(name, value, start, faults)
        if entry is not None:
            tensors[name] = entry
        elif len(faults) >= MOST_HEADER_FAULTS:
            raise HeaderInvalid(*faults)
    broken = frozenset(members.keys() - tensors.keys())
    if not broken:  # a broken entry is a hole in any case
        faults += _layout_faults(tensors, start, file_bytes)
    header = Header(tensors, metadata, broken)
    if faults:
        raise HeaderInvalid(*faults, header=header)
    return header


def _header_length(prefix: bytes, file_bytes: int, limit_bytes: int) -> int:
    length = int.from_bytes(prefix, "little")
    end = LENGTH_BYTES + length
    if len(prefix) < LENGTH_BYTES:
        fault = HeaderFault(FaultCode.FILE_TRUNCATED, f"{len(prefix)} bytes", "a header of 8 bytes and more")
    elif length > limit_bytes:
        fault = HeaderFault(FaultCode.NOT_SAFETENSORS, f"a header length of {length}", f"at most {limit_bytes}")
    elif end > file_bytes:
        fault = HeaderFault(FaultCode.FILE_TRUNCATED, f"{file_bytes} bytes", f"a header that ends at byte {end}")
    elif length < 2:
        fault = HeaderFault(FaultCode.NOT_SAFETENSORS, f"a header length of {length}", "2 or more")
    else:
        return length
    raise HeaderInvalid(fault)


def _members(raw: bytes, limit_bytes: int) -> dict[str, object]:
    try:
        members = parse(raw, max_depth=3, max_items=max(64, int(limit_bytes * MEMBERS_PER_BYTE)))
    except JsonInvalid as error:
        raise HeaderInvalid(HeaderFault(FaultCode.HEADER_INVALID, str(error), "a JSON header")) from None
    if not isinstance(members, dict) or not raw.startswith(b"{"):
        expected = "a JSON object that starts at byte 8"
        raise HeaderInvalid(HeaderFault(FaultCode.HEADER_INVALID, "no JSON object", expected))
    return members


def _metadata(value: object, faults: list[HeaderFault]) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    faults.append(HeaderFault(FaultCode.HEADER_INVALID, "other values in __metadata__", "an object of strings"))
    return {}


def _entry(name: str, entry: object, start: int, faults: list[HeaderFault]) -> TensorEntry | None:
    """`start` is where the tensors' bytes begin in the file. None, and a fault, where the entry cannot be used."""

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        broken = HeaderFault(FaultCode.HEADER_INVALID, "other members", "dtype, shape and data_offsets", name)
    elif not isinstance(dtype := entry["dtype"], str) or dtype not in DTYPE_BYTES:
        broken = HeaderFault(FaultCode.DTYPE_UNSUPPORTED, f"dtype {brief(dtype)}", "F32, F16 or BF16", name)
    elif not _naturals(shape := entry["shape"]) or len(shape) > MOST_DIMENSIONS:
        broken = HeaderFault(FaultCode.HEADER_INVALID, "another shape", "a list of whole numbers", name)
    elif not _naturals(offsets := entry["data_offsets"]) or len(offsets) != 2 or offsets[0] > offsets[1]:
        broken = HeaderFault(FaultCode.OFFSETS_INVALID, "other data_offsets", "[begin, end]", name)
    elif (needed := math.prod(shape) * DTYPE_BYTES[dtype]) != offsets[1] - offsets[0]:
        found = f"{offsets[1] - offsets[0]} bytes"
        broken = HeaderFault(FaultCode.OFFSETS_INVALID, found, f"{needed} bytes for {dtype} {shape}", name)
    else:
        return TensorEntry(dtype, tuple(shape), start + offsets[0], needed)
    faults.append(broken)
    return None


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _layout_faults(tensors: Mapping[str, TensorEntry], start: int, file_bytes: int) -> Iterator[HeaderFault]:
    """The tensors' bytes follow each other to the end of the file, without gap or overlap."""
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != end:
            found, expected = f"bytes from {entry.offset - start}", f"from {end - start}: no gap, no overlap"
            yield HeaderFault(FaultCode.OFFSETS_INVALID, found, expected, name)
        end = entry.offset + entry.size_bytes
    if end > file_bytes:
        yield HeaderFault(FaultCode.FILE_TRUNCATED, f"{file_bytes} bytes", f"{end} bytes")
    if end < file_bytes:
        expected = f"{end}: nothing after the tensors"
        yield HeaderFault(FaultCode.OFFSETS_INVALID, f"{file_bytes} bytes", expected)
