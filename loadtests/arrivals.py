"""When requests are sent, by each law a scenario may name: ns since the phase's begin, decided before the run.

A rate that changes over time is a Poisson process of rate 1 seen through the inverse of the requests expected so far
(Çınlar 1975, §4.7), so that one test of even arrivals holds all of these laws.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtests import traces
from loadtests.scenario import Constant, Diurnal, Gamma, Poisson, Ramp, Steps, Trace

Times = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Open = Constant | Poisson | Gamma | Steps | Ramp | Diurnal | Trace
NS: Final = 1_000_000_000
_GRID_PER_PERIOD: Final = 4_096


def arrivals(law: Open, duration_s: float, random: np.random.Generator) -> Times:
    """The times of a law in a phase, in order, all before its end.

    Raises:
        ScenarioInvalid: the law's trace cannot be read.
    """
    if isinstance(law, Trace):
        times = traces.read(law.file).at_s / law.speed
    elif isinstance(law, Constant):
        times = np.arange(np.ceil(duration_s * law.rate)) / law.rate
    elif isinstance(law, Poisson):
        times = _renewals(lambda count: random.exponential(1 / law.rate, count), law.rate, duration_s)
    elif isinstance(law, Gamma):
        shape, scale = law.cv**-2, law.cv**2 / law.rate
        times = _renewals(lambda count: random.gamma(shape, scale, count), law.rate, duration_s)
    else:
        at, expected = expected_until(law, duration_s)
        even = _renewals(lambda count: random.exponential(1.0, count), 1.0, float(expected[-1]))
        times = np.interp(even, expected, at)
    return as_ns(times[times < duration_s])


def expected_until(law: Steps | Ramp | Diurnal, duration_s: float) -> tuple[Seconds, Seconds]:
    """Times from 0 to `duration_s`, and how many requests are expected until each; straight lines between them."""
    if isinstance(law, Steps):
        at = np.linspace(0, duration_s, len(law.rates) + 1)
        return at, np.concatenate(([0.0], np.cumsum(np.diff(at) * np.array(law.rates))))
    if isinstance(law, Ramp):
        at = np.linspace(0, duration_s, _GRID_PER_PERIOD + 1)
        return at, law.from_rate * at + (law.to_rate - law.from_rate) * at**2 / (2 * duration_s)
    at = np.linspace(0, duration_s, int(_GRID_PER_PERIOD * max(1.0, duration_s / law.period_s)) + 1)
    turn = 2 * np.pi / law.period_s
    return at, law.mean_rate * (at + law.swing * (1 - np.cos(turn * at)) / turn)


def as_ns(seconds: Seconds) -> Times:
    """Seconds as whole ns."""
    return np.rint(seconds * NS).astype(np.int64)


def _renewals(gaps: Callable[[int], Seconds], rate: float, duration_s: float) -> Seconds:
    """Sums of independent gaps up to `duration_s`."""
    times = np.cumsum(gaps(int(rate * duration_s * 1.1) + 16))
    while times[-1] < duration_s:
        times = np.concatenate((times, times[-1] + np.cumsum(gaps(len(times)))))
    return times[times < duration_s]
