"""Rows of several runs as one line of tokens, without padding between runs.

A run's rows of one forward pass are a block: `rows` lines of `length` tokens, padded among themselves only. How a block
looks follows from its own rows alone, and so does every bit that is computed of it, unless blocks are `levelled`.
Blocks of one shape lie side by side, so that attention and adapters take them at once.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.dataset import IGNORED, Row

ROUND_TO = 8
"""Lengths are rounded up to a multiple of this: runs whose rows differ by a word share a shape."""
LEAST_LENGTH = 24
"""And shorter ones to this: a few tokens more cost a third of what one more shape in each layer does."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Item:
    """What is drawn as one: a row, or several packed behind each other. `targets[i]` is what is to follow token i."""

    input_ids: Numbers
    targets: Numbers
    positions: Numbers
    segments: Numbers | None  # the row that each token is of, where there are several
    trained_tokens: int


def item(rows: Sequence[Row]) -> Item:
    """These rows as one; no row's last token is followed by the next row's first."""
    lengths = [len(row.input_ids) for row in rows]
    targets = np.concatenate([np.asarray([*row.labels[1:], IGNORED], np.int64) for row in rows])
    return Item(
        np.concatenate([np.asarray(row.input_ids, np.int64) for row in rows]),
        targets,
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat(np.arange(len(rows)), lengths) if len(rows) > 1 else None,
        int(np.count_nonzero(targets != IGNORED)),
    )


@dataclass(frozen=True, slots=True)
class Block:
    """One run's items of one pass."""

    items: Sequence[Item]
    length: int

    @property
    def tokens(self) -> int:
        return len(self.items) * self.length

    @property
    def packed(self) -> bool:
        return any(item.segments is not None for item in self.items)


def block(items: Sequence[Item]) -> Block:
    longest = max(len(item.input_ids) for item in items)
    return Block(items, max(LEAST_LENGTH, -(-longest // ROUND_TO) * ROUND_TO))


def levelled(blocks: Sequence[Block], kinds: Sequence[Hashable]) -> list[Block]:
    """The same blocks, those of one kind and as many rows made of one length, where that at most doubles one."""
    lengths: dict[Hashable, int] = {}
    changed = list(blocks)
    for at in sorted(range(len(blocks)), key=lambda at: -blocks[at].length):
        shape, own = (kinds[at], len(blocks[at].items)), blocks[at].length
        if lengths.get(shape, 0) > 2 * own or shape not in lengths:
            lengths[shape] = own
        changed[at] = Block(blocks[at].items, lengths[shape])
    return changed


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `start` to `stop` are `rows` lines of equal length; `mask` (rows, 1, length, length), where it is not
    plainly causal, is true where a token is seen."""

    start: int
    stop: int
    rows: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Line:
    """All blocks behind each other. `trained` are the positions that have a target, `counts` how many of them each
    block has."""

    starts: Sequence[int]
    input_ids: Tensor  # (1, tokens)
    positions: Tensor  # (1, tokens)
    trained: Tensor  # (trained tokens,)
    targets: Tensor  # (trained tokens,)
    counts: Sequence[int]
    stretches: Sequence[Stretch]


def line(blocks: Sequence[Block], device: torch.device, *, least: int = 0) -> Line:
    """Put blocks behind each other, in this order; nobody's tokens fill the line up to `least`."""
    total = max(least, sum(block.tokens for block in blocks))
    ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    targets = np.full(total, IGNORED, np.int64)
    starts, at = [], 0
    for block in blocks:
        starts.append(at)
        for item in block.items:
            stop = at + len(item.input_ids)
            ids[at:stop], positions[at:stop], targets[at:stop] = item.input_ids, item.positions, item.targets
            at += block.length
    trained = np.flatnonzero(targets != IGNORED)
    bounds = np.searchsorted(trained, [*starts, at])
    return Line(
        starts,
        torch.from_numpy(ids)[None].to(device),
        torch.from_numpy(positions)[None].to(device),
        torch.from_numpy(trained).to(device),
        torch.from_numpy(targets[trained]).to(device),
        np.diff(bounds).tolist(),
        [*_stretches(blocks, starts, device), *([Stretch(at, total, 1, None)] if at < total else [])],
    )


def _stretches(blocks: Sequence[Block], starts: Sequence[int], device: torch.device) -> list[Stretch]:
    """Neighbours of equal length are one stretch; packed blocks stand alone with their masks."""
    stretches: list[Stretch] = []
    lengths: list[int] = []
    for block, start in zip(blocks, starts, strict=True):
        stop = start + block.tokens
        if block.packed:
            stretches.append(Stretch(start, stop, len(block.items), _mask(block).to(device)))
            lengths.append(0)
        elif lengths and lengths[-1] == block.length:
            before = stretches.pop()
            stretches.append(Stretch(before.start, stop, before.rows + len(block.items), None))
        else:
            stretches.append(Stretch(start, stop, len(block.items), None))
            lengths.append(block.length)
    return stretches


def _mask(block: Block) -> Tensor:
    """(rows, 1, length, length): a token sees itself and those before it in its own row. The padding behind a line is
    a row of its own, so that no token sees nothing, which would be NaN."""
    segments = np.full((len(block.items), block.length), -1, np.int64)
    for at, item in enumerate(block.items):
        segments[at, : len(item.input_ids)] = 0 if item.segments is None else item.segments
    same = segments[:, :, None] == segments[:, None, :]
    return torch.from_numpy(np.tril(same))[:, None]
