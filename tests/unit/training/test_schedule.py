from itertools import pairwise
from typing import Literal

import pytest

from training import schedule
from training.hyperparameters import Hyperparameters


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (16, {}, 4),
        (17, {}, 5),
        (1, {}, 1),
        (17, {"epochs": 3}, 15),
        (17, {"gradient_accumulation_steps": 2}, 3),
        (17, {"epochs": 3, "max_steps": 7}, 7),
        (17, {"max_steps": 100}, 5),
    ],
)
def test_steps_follow_from_rows_and_choices(rows: int, changes: dict[str, int], steps: int) -> None:
    """The last step of an epoch takes what is left, and `max_steps` only ever shortens."""
    assert schedule.step_count(rows, Hyperparameters.model_validate({"batch_size": 4, "epochs": 1} | changes)) == steps


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_rate_rises_then_follows_its_schedule(kind: Literal["constant", "linear", "cosine"]) -> None:
    """Warmup climbs to the full rate, no step is wasted at rate 0, and nothing exceeds the full rate."""
    hp = Hyperparameters(schedule=kind, warmup_ratio=0.2)
    factors = [schedule.rate_factor(step, 50, hp) for step in range(1, 51)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(0 < factor <= 1 for factor in factors)
    falls = all(later < earlier for earlier, later in pairwise(factors[9:]))
    assert falls is (kind != "constant")


def test_each_epoch_takes_every_item_once() -> None:
    """Steps of an epoch are a partition of the items, another order each epoch, the same whenever they are asked."""
    hp = Hyperparameters(batch_size=2, gradient_accumulation_steps=2, epochs=2, seed=5)
    steps = [schedule.items_of_step(step, 11, hp) for step in range(1, schedule.step_count(11, hp) + 1)]
    assert [len(step) for step in steps] == [2, 2, 2, 2, 2, 2]
    first, second = ([item for step in epoch for batch in step for item in batch] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert schedule.items_of_step(4, 11, hp) == steps[3]


def test_packs_hold_every_row_once_within_the_limit() -> None:
    """No row is lost or split, and no two packs could have been one."""
    lengths = [30, 7, 64, 12, 12, 50, 3, 41, 90]
    packs = schedule.packed(lengths, 64)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(tokens <= 64 for tokens, pack in zip(filled, packs, strict=True) if len(pack) > 1)
    assert min(one + other for at, one in enumerate(filled) for other in filled[:at]) > 64
