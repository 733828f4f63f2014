"""When a run takes which rows, at what rate: all that follows from its numbers alone, step by step."""

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from training.hyperparameters import Hyperparameters


def step_count(items: int, hp: Hyperparameters) -> int:
    """Steps of a whole run; the last step of an epoch takes the items (rows, packs, pairs) that are left."""
    steps = hp.epochs * steps_per_epoch(items, hp)
    return steps if hp.max_steps is None else min(steps, hp.max_steps)


def items_of_step(step: int, items: int, hp: Hyperparameters) -> list[list[int]]:
    """Which items the `step` (the first is 1) takes, a list a micro-batch.

    Nothing is carried from step to step, so a run goes on at any step without its past.
    """
    per_epoch = steps_per_epoch(items, hp)
    epoch, position = divmod(step - 1, per_epoch)
    order = epoch_order(items, hp.seed, epoch)
    per_step = hp.batch_size * hp.gradient_accumulation_steps
    taken = order[position * per_step : (position + 1) * per_step]
    return [list(taken[i : i + hp.batch_size]) for i in range(0, len(taken), hp.batch_size)]


@lru_cache(maxsize=64)  # each step asks for its epoch's
def epoch_order(items: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Every epoch has an order of its own, drawn from the seed."""
    generator = torch.Generator().manual_seed((seed + epoch * 0x9E3779B97F4A7C15) % (1 << 63))
    return tuple(torch.randperm(items, generator=generator).tolist())


def rate_factor(step: int, total: int, hp: Hyperparameters) -> float:
    """Share of the learning rate that step `step` of `total` (the first is 1) uses."""
    warmup = math.ceil(hp.warmup_ratio * total)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup + 1)  # below 1, so that the last step still learns
    match hp.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2


def packed(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of these lengths, put together so that no pack exceeds `limit` tokens: the longest first, each where it
    leaves the least room. A row longer than that is a pack of its own."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = bisect.bisect_left(rooms, (lengths[row], 0))
        if at == len(rooms):
            packs.append([row])
            left, pack = limit - lengths[row], len(packs) - 1
        else:
            room, pack = rooms.pop(at)
            packs[pack].append(row)
            left = room - lengths[row]
        bisect.insort(rooms, (left, pack))
    return packs


def steps_per_epoch(items: int, hp: Hyperparameters) -> int:
    """Of which the last takes the items that are left."""
    return math.ceil(items / (hp.batch_size * hp.gradient_accumulation_steps))
