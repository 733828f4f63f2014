"""Recorded traffic as a file of our own: JSON objects with `at_s`, `prompt_tokens` and `output_tokens`, a line each."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests.scenario import ScenarioInvalid


@dataclass(frozen=True, slots=True)
class Recording:
    """When requests came and how long they were; three arrays of one length, times from 0 on and in order."""

    at_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]


def recording(rows: list[tuple[float, int, int]]) -> Recording:
    """Rows of time, prompt and answer, in any order, as a recording that begins at 0."""
    at = np.array([row[0] for row in rows], np.float64)
    order = np.argsort(at, kind="stable")
    prompts = np.array([row[1] for row in rows], np.int32)
    outputs = np.array([row[2] for row in rows], np.int32)
    return Recording(at[order] - at.min(), prompts[order], outputs[order])


def read(path: Path) -> Recording:
    """A trace file.

    Raises:
        ScenarioInvalid: it cannot be read, has no rows, or a row lacks something; the row is told.
    """
    rows: list[tuple[float, int, int]] = []
    try:
        with path.open() as lines:
            for told in map(json.loads, lines):
                rows.append((float(told["at_s"]), int(told["prompt_tokens"]), int(told["output_tokens"])))
    except OSError as error:
        raise ScenarioInvalid(f"{path}: {error}. `tailor loadtest trace import` writes such a file.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ScenarioInvalid(
            f"{path}:{len(rows) + 1}: {error!r}. A row is an object with at_s, prompt_tokens and output_tokens."
        ) from error
    if not rows:
        raise ScenarioInvalid(f"{path}: a trace without rows.")
    return recording(rows)
