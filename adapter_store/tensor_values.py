"""The numbers in an adapter's tensors: peaks and row sums. Imports numpy: not for the gateway."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_store.safetensors_header import TensorEntry

if TYPE_CHECKING:
    import numpy.typing as npt  # 20 ms of the inspection's start

CHUNK_BYTES = 2 << 20
# The smallest magnitude that a cast to the dtype rounds to infinity.
OVERFLOWS_FROM = {"float32": float("inf"), "bfloat16": 3.3961775e38, "float16": 65_520.0}
STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, slots=True)
class Values:
    """`peak`: the largest magnitude; `row_sum`: the largest sum of a row's magnitudes; maybe infinite."""

    peak: float
    row_sum: float
    not_finite_at: tuple[int, int] | None = None


def read_values(descriptor: int, entry: TensorEntry) -> Values:
    """Reads a 2-D tensor in chunks of rows, about 2 MiB each, up to the first value that is not finite."""
    dtype = STORED[entry.dtype]
    rows, columns = entry.shape
    step = max(1, CHUNK_BYTES // (columns * dtype.itemsize))
    peak = row_sum = 0.0
    with np.errstate(all="ignore"):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = _pread(descriptor, count * columns * dtype.itemsize, entry.offset + first * columns * dtype.itemsize)
            magnitudes = _magnitudes(np.frombuffer(raw, dtype)).reshape(count, columns)
            chunk_peak = float(magnitudes.max())
            if not np.isfinite(chunk_peak):
                row, column = divmod(int(np.argmin(np.isfinite(magnitudes))), columns)
                return Values(float("inf"), float("inf"), (first + row, column))
            peak = max(peak, chunk_peak)
            row_sum = max(row_sum, float(magnitudes.sum(axis=1).max()))
    return Values(peak, row_sum)


def _magnitudes(stored: "npt.NDArray[np.generic]") -> "npt.NDArray[np.float32]":
    """Any stored dtype → |x| as float32, exactly."""
    if stored.dtype == STORED["BF16"]:
        values = ((stored.astype(np.uint32) & 0x7FFF) << 16).view(np.float32)  # bfloat16 is float32's upper half
    else:
        values = np.abs(stored.astype(np.float32))
    return values


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    raw = os.pread(descriptor, size, offset)
    if len(raw) != size:
        raise OSError(f"read {len(raw)} of {size} bytes at {offset}")
    return raw
