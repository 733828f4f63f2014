"""QLoRA: the base's linear layers in four bits (NF4, the blocks' scales quantised too), as bitsandbytes packs them.

A weight is unpacked where a pass needs it and thrown away, so the products are those of an ordinary layer and a run's
bits follow from its own rows as they do there. bitsandbytes is an extra of this package, and imported here alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.failures import QuantizationMissing
from training.hyperparameters import Quantization

__all__ = ["Packed", "Quantization", "packer"]

BLOCK = 64
"""Weights that share a scale, as in the paper (Dettmers et al. 2023, arXiv:2305.14314)."""


def packer(device: torch.device) -> Callable[[Tensor], "Packed"]:
    """What packs a weight, wherever it lies, onto the device.

    Raises:
        QuantizationMissing: bitsandbytes is not installed, or does not work here.
    """
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as error:
        raise QuantizationMissing(str(error)) from error

    def pack(weight: Tensor) -> Packed:
        quantized, state = functional.quantize_4bit(
            weight.to(device).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return Packed(quantized, state, functional.dequantize_4bit)

    return pack


class Packed:
    """One weight in four bits; called, it is the tensor that those stand for, of the precision it was packed from."""

    def __init__(self, quantized: Tensor, state: Any, unpack: Callable[[Tensor, Any], Tensor]) -> None:
        self._quantized, self._state, self._unpack = quantized, state, unpack

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self._unpack(self._quantized, self._state)

    @property
    def bytes(self) -> int:
        """What is kept of it."""
        scales = [self._state.absmax, self._state.state2.absmax]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self._quantized, *scales))
