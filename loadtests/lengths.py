"""How long prompts and answers are, in tokens, by each law a scenario may name."""

from typing import assert_never

import numpy as np
import numpy.typing as npt

from loadtests.scenario import Fixed, Length, Lognormal, OfTrace

Tokens = npt.NDArray[np.int32]


def lengths(law: Length, count: int, random: np.random.Generator, recorded: Tokens | None = None) -> Tokens:
    """So many lengths; `recorded` has those of the phase's trace, which `law: trace` takes.

    Raises:
        ValueError: a trace's lengths are asked for where there is no trace.
    """
    if isinstance(law, Fixed):
        return np.full(count, law.value, np.int32)
    if isinstance(law, Lognormal):
        drawn = law.median * np.exp(law.sigma * random.standard_normal(count))
        return np.rint(np.clip(drawn, law.least, law.most)).astype(np.int32)
    if isinstance(law, OfTrace):
        if recorded is None:
            raise ValueError("lengths of a trace need arrivals of a trace")
        return recorded[:count]
    assert_never(law)
