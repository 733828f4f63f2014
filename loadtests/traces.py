"""Recorded traffic as a file of our own: JSON objects with `at_s`, `prompt_tokens` and `output_tokens`, a line each."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests.recording import ABSENT, Schedule
from loadtests.scenario import ScenarioInvalid

Row = tuple[float, int, int]
"""Seconds, tokens of the prompt, tokens of the answer."""


class TraceInvalid(ScenarioInvalid):
    """A file of recorded traffic that cannot be read; the text tells where."""


@dataclass(frozen=True, slots=True)
class Recording:
    """When requests came and how long they were; three arrays of one length, times from 0 on and in order."""

    at_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]


def recording(rows: list[Row]) -> Recording:
    """Rows in any order as a recording that begins at 0."""
    at = np.array([row[0] for row in rows], np.float64)
    order = np.argsort(at, kind="stable")
    prompts = np.array([row[1] for row in rows], np.int32)
    outputs = np.array([row[2] for row in rows], np.int32)
    return Recording(at[order] - at.min(), prompts[order], outputs[order])


def recorded(schedule: Schedule) -> Recording:
    """The requests of a schedule that have a time, as they would stand in a trace of them."""
    timed = schedule.planned[schedule.planned["at"] != ABSENT]
    return Recording(timed["at"] / 1e9, timed["prompt_tokens"].copy(), timed["output_tokens"].copy())


def read(path: Path) -> Recording:
    """A trace file.

    Raises:
        TraceInvalid: it cannot be read, has no rows, or a row lacks something; the line is told.
    """
    rows: list[Row] = []
    try:
        with path.open() as lines:
            for told in map(json.loads, lines):
                rows.append((float(told["at_s"]), int(told["prompt_tokens"]), int(told["output_tokens"])))
    except OSError as error:
        raise TraceInvalid(f"{path}: {error}. `tailor loadtest trace import` writes such a file.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TraceInvalid(
            f"{path}:{len(rows) + 1}: {error!r}. A row is an object with at_s, prompt_tokens and output_tokens."
        ) from error
    if not rows:
        raise TraceInvalid(f"{path}: a trace without rows.")
    return recording(rows)


def write(of: Recording, path: Path) -> None:
    """A trace file, which `read` gives back to the µs."""
    with path.open("w") as file:
        for at_s, prompt, output in zip(of.at_s, of.prompt_tokens.tolist(), of.output_tokens.tolist(), strict=True):
            told = {"at_s": round(float(at_s), 6), "prompt_tokens": prompt, "output_tokens": output}
            file.write(f"{json.dumps(told)}\n")
