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

    answered: int
    compared: int
    of_base: int  # of these, the base model's
    adapters: int  # versions that may have answered
    known: int  # of these, whose answer is known
    distinct: int


def canaries(run: Run) -> Canaries:
    """Those of the whole run, warm-ups too."""
    (answered, compared), (of_base, compared_of_base) = _answered(run, of_base=False), _answered(run, of_base=True)
    adapters, known = len({one.digest for one in run.versions}), _Known(run).answers
    distinct = len(set(known.values()))
    return Canaries(answered + of_base, compared + compared_of_base, compared_of_base, adapters, len(known), distinct)


def _answered(run: Run, *, of_base: bool) -> tuple[int, int]:
    """How many canaries an adapter, or the base model, answered, and how many of them were compared."""
    rows, texts, known = run.samples.rows, run.samples.texts, _Known(run)
    told = Counter(texts[place] for place in rows["version"][rows["answer"] != ABSENT])
    counts = [
        (count, known.to(version) is not None) for version, count in told.items() if is_of_base(version) == of_base
    ]
    return sum(count for count, _ in counts), sum(count for count, compared in counts if compared)


def blind(run: Run) -> str:
    """Why a server that mixes adapters up, or ignores them, would not have been noticed; empty where it would.

    A scenario that asks no canaries has chosen to believe the headers.
    """
    planned, known, told = run.schedule.planned, _Known(run), canaries(run)
    if (planned["canary"] & (planned["model"] != ABSENT)).any():
        if told.adapters > 1 and told.distinct < 2:
            return f"The answers known of {told.known} of {told.adapters} adapters are not two different ones."
        if told.known == told.adapters == 1 and set(known.answers.values()) == {run.base_answer}:
            return "The answer known of the adapter is the base model's."
    for of_base in (False, True):
        answered, compared = _answered(run, of_base=of_base)
        if answered and not compared:
            return f"None of {answered} canaries was answered by a version whose answer is known."
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
    of_base = np.array([is_of_base(text) for text in texts], bool)
    right = np.ones(len(at), bool)
    for lives, places in _by_model(run, at):
        told = rows["version"][places]
        right[places] = of_base[told] if lives is None else _lived(lives, digests[told], rows[places])
    return checked(run, at) & ~(right & _answered_as_known(run, rows))


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


def _answered_as_known(run: Run, rows: npt.NDArray[Any]) -> Mask:
    """What did not come whole must be how the known answer begins."""
    known, texts, right = _Known(run), run.samples.texts, np.ones(len(rows), bool)
    for place in np.flatnonzero(rows["answer"] != ABSENT):
        row = rows[place]
        answer, wanted = texts[row["answer"]], known.to(texts[row["version"]])
        if wanted is not None:
            right[place] = answer == wanted if row["outcome"] == Outcome.WHOLE else wanted.startswith(answer)
    return right


class _Known:
    """The answers that are known to the canary prompt."""

    def __init__(self, run: Run) -> None:
        self.answers = {_digest(one.digest): one.answer for one in run.versions if one.answer is not None}
        self._of_base = run.base_answer

    def to(self, version: str) -> str | None:
        """That of the version as an answer's headers tell it."""
        return self._of_base if is_of_base(version) else self.answers.get(_digest(version))


def is_of_base(version: str) -> bool:
    """Whether an answer's headers say that the base model gave it."""
    return version.startswith("base")


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
