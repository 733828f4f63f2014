"""One adapter in the making: what it is, what it takes next, how it is kept and written. Who steps it is `engine`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from training import adapter_weights, checkpoints, schedule
from training.adapter_weights import Plan
from training.checkpoints import Checkpoint
from training.dataset import Pair, Row
from training.failures import TrainingFailed
from training.hyperparameters import Hyperparameters
from training.layout import Item, item


@dataclass(frozen=True, slots=True)
class Spec:
    """What a run is: everything that decides its bytes. `rows` and `validation` are pairs where the method is dpo."""

    method: Literal["supervised", "dpo"]
    hyperparameters: Hyperparameters
    rows: Sequence[Row] | Sequence[Pair]
    validation: Sequence[Row] | Sequence[Pair] = ()
    warm_start: Path | None = None


@dataclass(frozen=True, slots=True)
class Best:
    """The weights that validated best, and when."""

    step: int
    loss: float
    weights: Tensor


class Run:
    """Weights, moments, position. Between steps a run is at rest."""

    def __init__(self, spec: Spec, layout: Plan, weights: Tensor, *, longest: int, base: str) -> None:
        self.spec = spec
        self.layout = layout
        self._base = base
        self._drawn = drawn(spec.rows, spec.hyperparameters, longest)
        self.total_steps = schedule.step_count(len(self._drawn), spec.hyperparameters)
        self.step = 0
        self.weights = weights
        self.reference: Tensor | None = None  # dpo: the adapter that it goes on from, as the layers take it
        self.moments = (torch.zeros_like(weights), torch.zeros_like(weights))
        self.pieces = [layout.pieces_of(vector) for vector in (weights, *self.moments)]
        """Of weights and moments, which only ever change in place."""
        self.best: Best | None = None
        self.worse = 0  # validations in a row that were not better
        self.stopped = False
        self.failed: TrainingFailed | None = None

    @property
    def done(self) -> bool:
        return self.stopped or self.failed is not None or self.step >= self.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return schedule.steps_per_epoch(len(self._drawn), self.spec.hyperparameters)

    def micro_batches(self) -> list[list[Item]]:
        """What the next step takes; of pairs the better answers first, then the worse."""
        taken = schedule.items_of_step(self.step + 1, len(self._drawn), self.spec.hyperparameters)
        return [side_by_side([self._drawn[i] for i in batch]) for batch in taken]

    def save(self, folder: Path) -> Path:
        """Write a checkpoint, whole or not at all, and tell its file; the last two are kept.

        There is no random state in it: rows are drawn by seed and step alone, and nothing else is random.

        Raises:
            OSError: what was there before is whole.
        """
        tensors = {"weights": self.weights, "first": self.moments[0], "second": self.moments[1]}
        facts: dict[str, Any] = {"run": self.digest, "worse": self.worse, "stopped": self.stopped}
        if self.best is not None:
            tensors["best"] = self.best.weights
            facts["best"] = {"step": self.best.step, "loss": self.best.loss}
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        return checkpoints.write(folder, Checkpoint(self.step, on_cpu, facts))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was made.

        Raises:
            TrainingFailed: it is another run's.
        """
        facts, tensors = checkpoint.facts, checkpoint.tensors
        if facts["run"] != self.digest:
            raise TrainingFailed("the checkpoint is of another run: base, data or hyperparameters are not the same")
        self.step, self.worse, self.stopped = checkpoint.step, facts["worse"], facts["stopped"]
        self.weights.copy_(tensors["weights"])
        for moment, name in zip(self.moments, ("first", "second"), strict=True):
            moment.copy_(tensors[name])
        if "best" in facts:
            self.best = Best(**facts["best"], weights=tensors["best"])

    def write_adapter(self, folder: Path, *, base_fingerprint: str | None = None) -> None:
        """Write PEFT's two files: the weights that validated best where the run keeps them, else the last.

        Raises:
            TrainingFailed: a weight is not finite.
        """
        hp = self.spec.hyperparameters
        weights = self.best.weights if self.best is not None and hp.keep_best else self.weights.cpu()
        adapter_weights.write(self.layout, weights, folder, hp, self._base, base_fingerprint)

    @cached_property
    def digest(self) -> str:
        """Of all that decides the bytes but the base's own weights."""
        spec = self.spec
        parts = [adapter_weights.LAYOUT, self._base, spec.method, spec.hyperparameters.model_dump_json()]
        parts += [json.dumps([asdict(row) for row in rows]) for rows in (spec.rows, spec.validation)]
        if spec.warm_start is not None:
            parts.append(hashlib.sha256((spec.warm_start / adapter_weights.WEIGHTS).read_bytes()).hexdigest())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def drawn(rows: Sequence[Row] | Sequence[Pair], hp: Hyperparameters, longest: int) -> list[tuple[Item, ...]]:
    """What an epoch draws from: rows or packs of them, each one item; or pairs, each two.

    Raises:
        TrainingFailed: there are none, or one is longer than the base can read.
    """
    if not rows:
        raise TrainingFailed("there is nothing to train on")
    single = [row for row in rows if isinstance(row, Row)]
    if hp.packing and single:
        lengths = [len(row.input_ids) for row in single]
        packs = schedule.packed(lengths, min(hp.max_length, longest))
        items: list[tuple[Item, ...]] = [(item([single[i] for i in pack]),) for pack in packs]
    else:
        items = [halves(row) for row in rows]
    if too_long := [len(half.input_ids) for pair in items for half in pair if half.positions.max() >= longest]:
        raise TrainingFailed(f"a row has {max(too_long)} tokens, but the base reads at most {longest}")
    return items


def halves(row: Row | Pair) -> tuple[Item, ...]:
    """A row as an item, or a pair as two."""
    return (item([row]),) if isinstance(row, Row) else (item([row.chosen]), item([row.rejected]))


def side_by_side(items: Sequence[tuple[Item, ...]]) -> list[Item]:
    """All first halves, then all second ones where there are."""
    return [half for side in zip(*items, strict=True) for half in side]
