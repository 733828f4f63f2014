"""What "auto" stands for: epochs, batch size and learning rate from what is known before training. No torch here.

The rules and their reasons are in docs/training.md; each is a line of `choose`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from training.rows import Method

REFERENCE_WIDTH: Final = 2_000
REFERENCE_RATE: Final = 5e-4  # for a base of that width
WIDTH_POWER: Final = 0.78
MOST_RATE: Final = 5e-3
DPO_SHARE: Final = 0.25  # of the supervised rate
MOST_BATCH: Final = 32
STEP_TOKENS: Final = 32_768
LEAST_STEPS: Final = 200
EPOCHS: Final = 3
MOST_EPOCHS: Final = 25
MOST_ROWS: Final = 25_000  # read in all
DPO_EPOCHS: Final = 10
BETA: Final = 0.1


@dataclass(frozen=True, slots=True)
class Auto:
    """`learning_rate` is what a multiplier of 1 stands for on this base, times the multiplier."""

    n_epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_multiplier: float
    beta: float


def choose(method: Method, *, examples: int, tokens: int | None, hidden_size: int) -> Auto:
    """For a file of so many rows and, where they were counted, tokens, on a base of the width `hidden_size`."""
    examples = max(1, examples)
    by_rows = 1 << (math.isqrt(examples).bit_length() - 1)  # the power of two at or below the square root
    by_tokens = max(1, STEP_TOKENS * examples // tokens) if tokens else MOST_BATCH
    batch_size = min(MOST_BATCH, by_rows, by_tokens)
    steps = math.ceil(examples / batch_size)
    fewest = max(EPOCHS, math.ceil(LEAST_STEPS / steps))
    most = min(MOST_EPOCHS if method == "supervised" else DPO_EPOCHS, max(1, MOST_ROWS // examples))
    return Auto(
        n_epochs=min(fewest, most),
        batch_size=batch_size,
        learning_rate=rate(method, hidden_size),
        learning_rate_multiplier=1.0,
        beta=BETA,
    )


def rate(method: Method, hidden_size: int) -> float:
    """The learning rate that a multiplier of 1 stands for: lower for wider bases, and for preferences."""
    supervised = min(MOST_RATE, REFERENCE_RATE * (REFERENCE_WIDTH / hidden_size) ** WIDTH_POWER)
    return supervised if method == "supervised" else DPO_SHARE * supervised


def width(modules: Mapping[str, tuple[int, int]]) -> int:
    """The hidden size of a base, given its linear layers' widths: what most of them read."""
    read = Counter(width_in for width_in, _ in modules.values())
    return read.most_common(1)[0][0]
