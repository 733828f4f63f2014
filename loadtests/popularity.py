"""Which adapter a request asks: ranks drawn by a law, and how their order moves with time."""

import numpy as np
import numpy.typing as npt

from loadtests.scenario import Distinct, Identical, Popularity, PowerLaw, Zipf

Indices = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


def shares(law: Popularity, count: int) -> Shares:
    """The share of the requests that each of `count` adapters gets in the long run, by rank; their sum is 1."""
    rank: Shares = np.arange(1, count + 1, dtype=np.float64)
    if isinstance(law, Zipf):
        weights: Shares = np.power(rank, -law.exponent)
        return weights / float(weights.sum())
    if isinstance(law, PowerLaw):
        until: Shares = np.concatenate(([0.0], rank / count)) ** (1 / law.alpha)
        return until[1:] - until[:-1]
    if isinstance(law, Identical):
        return np.where(rank == 1, 1.0, 0.0)
    return np.full(count, 1 / count, np.float64)


def ranks(law: Popularity, count: int, requests: int, random: np.random.Generator) -> Indices:
    """The rank that each of so many requests asks, 0 … count - 1, independent of each other; `distinct` is in turn."""
    if isinstance(law, Distinct):
        return np.arange(requests) % count
    cumulative = np.cumsum(shares(law, count))
    return np.minimum(np.searchsorted(cumulative, random.random(requests), side="right"), count - 1)


def drifted(ranked: Indices, count: int, at_s: npt.NDArray[np.float64], every_s: float | None) -> Indices:
    """The adapter that has each rank at its time: every `every_s` the whole order moves on by one."""
    if every_s is None:
        return ranked
    return (ranked + np.floor_divide(at_s, every_s).astype(np.int64)) % count
