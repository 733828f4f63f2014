"""Where the weights of one adapter lie in one flat vector, and how they come from and go to PEFT's two files.

All of a run's weights are one vector, as are their gradients and moments: what is done to each weight (decay, clipping,
AdamW) is one call a run, and the adapters of several runs are stacked by one copy.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from training.failures import TrainingFailed
from training.hyperparameters import Hyperparameters, first_match

FINGERPRINT_KEY = "tailor.base_fingerprint"  # in the metadata of the safetensors file
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYOUT = "lora_B turned, times its scale"  # of the vector: a checkpoint of another is not read
LANES = 8
"""Ranks are padded with zeros to a multiple of this, so that runs of ranks 5 and 8 share one multiplication. Zeros
stay zero: neither half of a padded lane gets a gradient while the other is zero."""


@dataclass(frozen=True, slots=True)
class Place:
    """One adapted linear layer: `lora_A` is (width, fan_in) from `a` on, `lora_B` from `b` on.

    `lora_B` lies there turned, as (width, fan_out): a product whose rows are as short as a rank takes up to five times
    as long on a CPU. And times `scale`, as the layers take it, so that no step has to multiply all of them.
    """

    module: str
    fan_in: int
    fan_out: int
    rank: int
    scale: float
    a: int
    b: int

    @property
    def width(self) -> int:
        return -(-self.rank // LANES) * LANES

    def halves(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """`lora_A` and the turned and scaled `lora_B` of (size,), as views."""
        return (
            flat[self.a : self.a + self.width * self.fan_in].view(self.width, self.fan_in),
            flat[self.b : self.b + self.width * self.fan_out].view(self.width, self.fan_out),
        )


@dataclass(frozen=True)
class Plan:
    """All places of one adapter: every `lora_A`, then from `inner` on every `lora_B`; `size` floats."""

    places: tuple[Place, ...]
    inner: int
    size: int

    @cached_property
    def signature(self) -> tuple[tuple[str, int], ...]:
        """Adapters of equal signatures can be stacked."""
        return tuple((place.module, place.width) for place in self.places)

    @cached_property
    def sizes(self) -> list[int]:
        """Floats of each half, in their order."""
        return [p.width * p.fan_in for p in self.places] + [p.width * p.fan_out for p in self.places]

    def halves(self, stack: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Every `lora_A` and every turned `lora_B` of several adapters (slots, size), as views."""
        slots, count = len(stack), len(self.places)
        pieces = stack.split(self.sizes, dim=1)
        return (
            [piece.view(slots, place.width, -1) for piece, place in zip(pieces[:count], self.places, strict=True)],
            [piece.view(slots, place.width, -1) for piece, place in zip(pieces[count:], self.places, strict=True)],
        )

    @cached_property
    def pieces(self) -> list[tuple[int, float]]:
        """(floats, how many times their weights they are), from the start on: inner halves, then outer ones."""
        outer = groupby(self.places, lambda place: place.scale)
        return [(self.inner, 1.0)] + [(sum(p.width * p.fan_out for p in places), scale) for scale, places in outer]

    def pieces_of(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Of (size,), as views."""
        return vector.split_with_sizes([floats for floats, _ in self.pieces])


def plan(linears: Mapping[str, tuple[int, int]], hp: Hyperparameters) -> Plan:
    """Lay out an adapter for those of the base's `linears`, (fan_in, fan_out) by path, that are its targets.

    Raises:
        TrainingFailed: a target is none of the base's linear layers, or a pattern names none of the targets.
    """
    targets = [module for module in linears if module.rpartition(".")[2] in hp.target_modules]
    leaves = {module.rpartition(".")[2] for module in linears}
    if missing := set(hp.target_modules) - leaves:
        raise TrainingFailed(
            f"the base has no linear layers named {', '.join(sorted(missing))}; it has {', '.join(sorted(leaves))}"
        )
    for key in (*hp.rank_pattern, *hp.alpha_pattern):
        if not any(first_match({key: True}, module, False) for module in targets):
            raise TrainingFailed(f"rank_pattern or alpha_pattern names {key}, which is no adapted layer of the base")
    places, at = [], 0
    for module in targets:
        fan_in, fan_out = linears[module]
        place = Place(module, fan_in, fan_out, hp.rank_of(module), hp.scale_of(module), at, 0)
        places.append(place)
        at += place.width * fan_in
    inner = at
    for index, place in enumerate(places):
        places[index] = Place(place.module, place.fan_in, place.fan_out, place.rank, place.scale, place.a, at)
        at += place.fan_out * place.width
    return Plan(tuple(places), inner, at)


def fresh(layout: Plan, seed: int) -> Tensor:
    """First weights as PEFT draws them: `lora_A` uniform within 1 / sqrt(fan_in), `lora_B` zero. On the CPU."""
    flat = torch.zeros(layout.size)
    generator = torch.Generator().manual_seed(seed)
    for place in layout.places:
        bound = 1 / math.sqrt(place.fan_in)
        place.halves(flat)[0][: place.rank].uniform_(-bound, bound, generator=generator)
    return flat


def warm(layout: Plan, seed: int, folder: Path) -> Tensor:
    """First weights that make the adapter in `folder` over again, whatever its alpha; its ranks may be smaller.

    Raises:
        TrainingFailed: it cannot be read, or does not fit into this adapter.
    """
    flat = fresh(layout, seed)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingFailed(f"the adapter to start from cannot be read: {error}") from error
    for place in layout.places:
        a = tensors.pop(f"{PREFIX}{place.module}.lora_A.weight", None)
        b = tensors.pop(f"{PREFIX}{place.module}.lora_B.weight", None)
        if a is None or b is None:
            continue  # it did not adapt this layer, so lora_B starts at zero
        rank = a.shape[0]
        if rank > place.rank or a.shape != (rank, place.fan_in) or b.shape != (place.fan_out, rank):
            raise TrainingFailed(
                f"the adapter to start from has rank {rank} at {place.module}, shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)}; this run has rank {place.rank} there: choose at least that"
            )
        own_a, own_b = place.halves(flat)
        own_a[:rank] = a.float()
        own_b[:rank] = b.float().t() * _scale_of(config, place.module, rank)
    if tensors:
        raise TrainingFailed(
            f"the adapter to start from also adapts {next(iter(tensors))}, which this run does not: add it to "
            "target_modules"
        )
    return flat


def write(layout: Plan, flat: Tensor, folder: Path, hp: Hyperparameters, base: str, fingerprint: str | None) -> None:
    """Write PEFT's two files.

    Raises:
        TrainingFailed: a weight is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for place in layout.places:
        a, b = place.halves(flat)
        tensors[f"{PREFIX}{place.module}.lora_A.weight"] = a[: place.rank].clone()
        tensors[f"{PREFIX}{place.module}.lora_B.weight"] = (b[: place.rank].t() / place.scale).contiguous()
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise TrainingFailed(f"weights are not finite after the last step, {broken[0]} among them")
    metadata = {"format": "pt"}
    if fingerprint is not None:
        metadata[FINGERPRINT_KEY] = fingerprint
    (folder / WEIGHTS).write_bytes(_canonical(save(tensors, metadata)))
    from peft import LoraConfig  # takes a second to import

    config = LoraConfig(
        r=hp.rank,
        lora_alpha=hp.lora_alpha,
        use_rslora=hp.rslora,
        rank_pattern=dict(hp.rank_pattern),
        alpha_pattern=dict(hp.alpha_pattern),
        target_modules=list(hp.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted) + "\n")


def _canonical(content: bytes) -> bytes:
    """The same file with its metadata in order: safetensors 0.8 writes that of a hash table, another with each call."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]


def _scale_of(config: Mapping[str, object], module: str, rank: int) -> float:
    """What PEFT multiplies the layer's adapter by, from its configuration."""
    patterns = config.get("alpha_pattern")
    alpha = first_match(patterns if isinstance(patterns, dict) else {}, module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise TrainingFailed(f"the adapter to start from has the lora_alpha {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
