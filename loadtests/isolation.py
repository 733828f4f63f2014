"""Whether each request was answered by the adapter it asked for, seen from outside.

Two witnesses: the version that the answer's headers tell must be one that the model's alias had while the request
ran, and a canary's text must be the one known for that version. A server that mixes adapters up fails one of them,
and one that tells the version asked for while it computes with another's fails the second.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtests.recording import ABSENT, Outcome, Run, VersionLife

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
FOREVER: Final = 1 << 62
ANSWERED: Final = (Outcome.WHOLE, Outcome.ABORTED)


def checked(run: Run, at: Places) -> Mask:
    """Of which of these samples (places of rows) something was known to check them by."""
    rows = run.samples.rows[at]
    known = np.zeros(len(at), bool)
    for lives, places in _by_model(run, at):
        known[places] = lives is None or bool(lives)
    return known & np.isin(rows["outcome"], ANSWERED) & (rows["version"] > 0)


def wrong(run: Run, at: Places) -> Mask:
    """Which of these samples were answered by something else than what was asked for."""
    rows, texts = run.samples.rows[at], run.samples.texts
    digests = np.array([_digest(text) for text in texts], object)
    of_base = np.array([text.startswith("base") for text in texts], bool)
    right = np.ones(len(at), bool)
    for lives, places in _by_model(run, at):
        told = rows["version"][places]
        right[places] = of_base[told] if lives is None else _lived(lives, digests[told], rows[places])
    return checked(run, at) & ~(right & _answered_as_known(run, rows, digests))


def gone(run: Run, at: Places) -> Mask:
    """Which of these samples were answered 404 rightly: their model had no version for some of the time they ran."""
    found = np.zeros(len(at), bool)
    missed = np.flatnonzero(run.samples.rows["status"][at] == 404)
    for lives, places in _by_model(run, at[missed]):
        for place in missed[places] if lives else ():
            row = run.samples.rows[at[place]]
            found[place] = _missing(lives or (), int(row["sent"]), int(_ends(row)))
    return found


def _by_model(run: Run, at: Places) -> Iterator[tuple[Sequence[VersionLife] | None, Places]]:
    """For each model asked: its versions (None: the base model), and which of the samples asked it."""
    planned = run.schedule.planned[run.samples.rows["index"][at]]
    keys = planned["tenant"].astype(np.int64) * (len(run.schedule.models) + 1) + planned["model"] + 1
    order = np.argsort(keys, kind="stable")
    lives = defaultdict(list)
    for one in sorted(run.versions, key=lambda life: life.since):
        lives[one.tenant, one.model].append(one)
    for places in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(order) else ():
        first = planned[places[0]]
        if first["model"] == ABSENT:
            yield None, places
        else:
            tenant, model = run.schedule.tenants[first["tenant"]], run.schedule.models[first["model"]]
            yield lives.get((tenant, model), ()), places


def _lived(lives: Sequence[VersionLife], told: npt.NDArray[Any], rows: npt.NDArray[Any]) -> Mask:
    found, ends = np.zeros(len(rows), bool), _ends(rows)
    for one in lives:
        found |= (told == _digest(one.digest)) & (one.since <= ends) & (_until(one) >= rows["sent"])
    return found


def _answered_as_known(run: Run, rows: npt.NDArray[Any], digests: npt.NDArray[Any]) -> Mask:
    known = {_digest(one.digest): one.answer for one in run.versions if one.answer is not None}
    right = np.ones(len(rows), bool)
    for place in np.flatnonzero((rows["answer"] != ABSENT) & (rows["outcome"] == Outcome.WHOLE)):
        row = rows[place]
        answer = run.samples.texts[row["answer"]]
        right[place] = known.get(digests[row["version"]], answer) == answer
    return right


def _missing(lives: Sequence[VersionLife], sent: int, done: int) -> bool:
    reached = sent
    for one in lives:
        if one.since > reached:
            break
        reached = max(reached, _until(one))
    return reached < done


def _digest(version: str) -> str:
    return version.rpartition("sha256=")[2]


def _until(life: VersionLife) -> int:
    return FOREVER if life.until == ABSENT else life.until


def _ends(rows: Any) -> Any:
    return np.where(rows["done"] == ABSENT, FOREVER, rows["done"])
