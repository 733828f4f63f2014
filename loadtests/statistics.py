"""The arithmetic of the figures: percentiles, fairness, caches, intervals. Knows arrays, no runs."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES: Final = 300


def percentile(values: npt.NDArray[Any], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed, itself one of them; nan of nothing."""
    if not len(values):
        return math.nan
    place = max(0, math.ceil(round(share * len(values), 9)) - 1)
    return float(np.partition(values, place)[place])


def jain(shares: npt.NDArray[Any]) -> float:
    """Jain, Chiu and Hawe's index: 1 where all have the same, 1/n where one has all; nan of nothing."""
    squares = float(np.square(shares, dtype=float).sum()) * len(shares)
    return float(shares.sum(dtype=float)) ** 2 / squares if squares else math.nan


def fair_shares(demands: npt.NDArray[Any], total: float) -> Floats:
    """What each would have of `total` by max-min fairness: nobody more than he asks for, the rest equal parts."""
    shares = np.zeros(len(demands))
    left, waiting = min(total, float(demands.sum())), len(demands)
    for place in np.argsort(demands, kind="stable"):
        shares[place] = min(float(demands[place]), left / waiting)
        left, waiting = left - shares[place], waiting - 1
    return shares


def che_hit_ratio(rates: npt.NDArray[Any], slots: int) -> float:
    """The share of hits of an LRU cache of `slots` whose items are asked independently at these rates, long after
    its start (Che, Tung and Wang 2002): an item is there if it was asked within the time that fills the cache.
    """
    rates = rates[rates > 0].astype(float)
    if not len(rates):
        return math.nan
    if len(rates) <= slots:
        return 1.0
    rates = rates / rates.sum()
    low, high = 0.0, 1.0
    while (1 - np.exp(-rates * high)).sum() < slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-rates * middle)).sum() < slots else (low, middle)
    return float((rates * (1 - np.exp(-rates * high))).sum())


def lru_hits(items: Iterable[int], slots: int) -> npt.NDArray[np.bool_]:
    """Which of these references an LRU cache of `slots`, empty at first, answers."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for item in items:
        hits.append(item in held)
        held[item] = None
        held.move_to_end(item)
        if len(held) > slots:
            held.popitem(last=False)
    return np.array(hits, bool)


def block_resamples(blocks: Sequence[npt.NDArray[Any]], seed: int = 1) -> Iterable[npt.NDArray[Any]]:
    """Rows, or what is told of them, as another run might have had them: as many blocks, drawn with replacement.

    Neighbours in time share a queue, so that single requests are not independent, but stretches of time nearly are.
    """
    random = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.concatenate([blocks[place] for place in random.integers(len(blocks), size=len(blocks))])


def interval(values: Sequence[float], covered: float = 0.95) -> tuple[float, float]:
    """Between which the middle `covered` of the values lie; nan of nothing."""
    known = np.array([one for one in values if not math.isnan(one)])
    return percentile(known, (1 - covered) / 2), percentile(known, (1 + covered) / 2)


def ratio_interval(ours: Iterable[float], theirs: Iterable[float]) -> tuple[float, float]:
    """The interval of the ratio of one figure in two runs, from the figure in resamples of both."""
    return interval([ratio(one, other) for one, other in zip(ours, theirs, strict=True)])


def ratio(value: float, to: float) -> float:
    """Their ratio; of two zeros 1, of something to zero infinite."""
    if to:
        return value / to
    return math.nan if math.isnan(value) else 1.0 if value == 0 else math.inf


def recovery_bins(kept: Floats, asked: Floats, event: int, *, onset: int, level: float = 0.9, calm: int = 3) -> float:
    """How many bins after `event` the share kept is back at `level` of what it was before, for `calm` bins on end.

    0 where nothing was seen of it in the first `onset` bins; infinite where it never comes back. A bin in which
    nobody asked says nothing: a closed loop that stands still has not recovered.
    """
    told = np.flatnonzero(asked > 0)
    share = kept[told] / asked[told]
    before, after = share[told < event], share[told >= event]
    wanted = level * (float(before.mean()) if len(before) else 1.0)
    bins = told[told >= event] - event
    below = np.flatnonzero(after < wanted)
    if not len(below) or bins[below[0]] >= onset:
        return 0.0
    for start in below + 1:
        if start < len(after) and not (after[start : start + calm] < wanted).any():
            return float(bins[start])
    return math.inf
