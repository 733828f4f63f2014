"""Whether each request was answered by the adapter it asked for, seen from outside.

Two witnesses: the version that the answer's headers tell must be one that the model's alias had while the request
ran, and a canary's text must be the one known for that version. A server that mixes adapters up fails one of them,
and one that tells the version asked for while it computes with another's fails the second. An answer that names no
version is wrong, and where the second witness could see nothing, the run does not say that nothing was wrong.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtests.recording import ABSENT, Outcome, Run, VersionLife

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
FOREVER: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Canaries:
    """How well the second witness sees: answers that are not known, or all alike, tell no adapter from another."""

    answered: int  # of adapters
    compared: int
    adapters: int  # versions that may have answered
    known: int  # of these, whose answer is known
    distinct: int


def canaries(run: Run) -> Canaries:
    """Those of the whole run, warm-ups too."""
    rows = run.samples.rows
    told = (rows["answer"] != ABSENT) & (run.schedule.planned["model"][rows["index"]] != ABSENT)
    known = _known(run)
    digests = Counter(_digest(run.samples.texts[place]) for place in rows["version"][told])
    compared = sum(count for digest, count in digests.items() if digest in known)
    adapters = len({one.digest for one in run.versions})
    return Canaries(int(told.sum()), compared, adapters, len(known), len(set(known.values())))


def blind(run: Run) -> str:
    """Why a server that mixes adapters up, or ignores them, would not have been noticed; empty where it would.

    A scenario that asks no canaries has chosen to believe the headers.
    """
    planned = run.schedule.planned
    if not (planned["canary"] & (planned["model"] != ABSENT)).any():
        return ""
    told = canaries(run)
    if told.adapters > 1 and told.distinct < 2:
        return f"The answers known of {told.known} of {told.adapters} adapters are not two different ones."
    if told.answered and not told.compared:
        return f"None of {told.answered} canaries was answered by a version whose answer is known."
    return ""


def checked(run: Run, at: Places) -> Mask:
    """Of which of these samples (places of rows) something was known to check them by, however they ended."""
    rows = run.samples.rows[at]
    known = np.zeros(len(at), bool)
    for lives, places in _by_model(run, at):
        known[places] = lives is None or bool(lives)
    return np.asarray(known & (rows["status"] == 200))


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
    """What did not come whole must be how the known answer begins."""
    known, right = _known(run), np.ones(len(rows), bool)
    for place in np.flatnonzero(rows["answer"] != ABSENT):
        row = rows[place]
        answer, wanted = run.samples.texts[row["answer"]], known.get(digests[row["version"]])
        if wanted is not None:
            right[place] = answer == wanted if row["outcome"] == Outcome.WHOLE else wanted.startswith(answer)
    return right


def _known(run: Run) -> dict[str, str]:
    return {_digest(one.digest): one.answer for one in run.versions if one.answer is not None}


def _missing(lives: Sequence[VersionLife], sent: int, done: int) -> bool:
    reached = sent
    for one in lives:
        if one.since > reached:
            break
        reached = max(reached, _until(one) if one.leaving == ABSENT else one.leaving)
    return reached < done


def _digest(version: str) -> str:
    return version.rpartition("sha256=")[2]


def _until(life: VersionLife) -> int:
    return FOREVER if life.until == ABSENT else life.until


def _ends(rows: Any) -> Any:
    return np.where(rows["done"] == ABSENT, FOREVER, rows["done"])
