"""Histograms with logarithmic buckets: small, mergeable, and at most 1 % off at any quantile."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from loadtests.recording import Array

_GROWTH: Final = math.log(1.02)
"""Of a bucket's bounds; its geometric middle is at most 1 % from either."""
_BUCKETS: Final = 1_200  # to 2·10^10


class Histogram:
    """Counts of whole numbers from 1 on, such as microseconds; what is below counts as 1."""

    __slots__ = ("counts", "most")

    def __init__(self) -> None:
        self.counts: Array = np.zeros(_BUCKETS, np.int64)
        self.most = 0

    def add(self, values: Array | Sequence[int]) -> None:
        """Count them all."""
        taken = np.maximum(np.asarray(values, np.int64), 1)
        if not len(taken):
            return
        places = np.minimum(np.log(taken) / _GROWTH, _BUCKETS - 1).astype(np.int64)
        self.counts += np.bincount(places, minlength=_BUCKETS)
        self.most = max(self.most, int(taken.max()))

    def merge(self, other: "Histogram") -> None:
        """Count what the other has counted."""
        self.counts += other.counts
        self.most = max(self.most, other.most)

    @property
    def count(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value that `share` of all do not exceed, to within 1 %; nan where nothing was counted."""
        count = self.count
        if not count:
            return math.nan
        place = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * count))))
        return min(math.exp((place + 0.5) * _GROWTH), float(self.most))

    def told(self) -> list[int]:
        """As numbers for JSON: the most, then each bucket in use with its count."""
        used = np.flatnonzero(self.counts)
        return [self.most, *np.column_stack((used, self.counts[used])).ravel().tolist()]

    @classmethod
    def of(cls, told: Iterable[int]) -> "Histogram":
        """What `told` wrote."""
        most, *pairs = told
        made = cls()
        made.most = most
        made.counts[pairs[::2]] = pairs[1::2]
        return made
