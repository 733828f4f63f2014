"""What a rollout is told of its two versions' proofs: a finding on the new one, once both are scored on the examples.

A version's score is of the examples that there were when its proof began. Where it is of others, or of none, the proof
is to be run again before anything is said: a proof that a rollout finds running, or that ended before the tenant set
its examples, says nothing of them.

What the engine refuses of the examples is in no score. Two versions of which it refused the same are compared on the
others; where it refused others of each, as after it was replaced, nothing is compared: asking again would not end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapter_store import examples, proofs
from adapter_store.catalog import Version
from adapter_store.engine import AsyncConnection
from adapter_store.examples import Example, Score
from adapter_store.ids import VersionId
from adapter_store.proofs import Proof, Reason, Status
from adapter_store.rollouts import Rollout

LEFT_AS_IT_IS = (Reason.ENGINE_REFUSED, Reason.FINGERPRINT_DIFFERS)
"""Verdicts on the version before that are not asked again: no engine takes it, or proving it anew would lift what holds
it back."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`proof`: "proved", another word where the rollout goes back, None for nothing yet.

    `not_compared`: why a version that is proved is not compared with the one before; empty: it is.
    `left_out`: examples, by place, without which it is: the engine refuses them.
    `to_prove`: what is proved again before there is more.
    """

    proof: str | None = None
    not_compared: str = ""
    left_out: tuple[int, ...] = ()
    to_prove: tuple[Version, ...] = ()

    @property
    def remark(self) -> str:
        """What the history is to say of a comparison that was not made, or not of all examples; mostly empty."""
        if self.not_compared:
            return f"not compared on the examples: {self.not_compared}"
        return _without(self.left_out) if self.left_out else ""


@dataclass(frozen=True, slots=True)
class _Side:
    """What is known of one of the two; `version` None: it is erased, `proof` None: it was never asked about."""

    version: Version | None
    proof: Proof | None
    score: Score | None  # on the examples as they are

    @property
    def is_judged(self) -> bool:
        return self.proof is not None and self.proof.status is not Status.PENDING


async def compare(connection: AsyncConnection, rollout: Rollout) -> Finding:
    """What is found of a rollout as it stands in the rows."""
    wanted = await examples.of(connection, rollout.adapter_id)
    digest = examples.digest_of(wanted)
    candidate = await _side(connection, rollout.candidate_id, digest)
    baseline = await _side(connection, rollout.baseline_id, digest)
    return _finding(candidate, baseline, rollout, wanted)


async def _side(connection: AsyncConnection, version_id: VersionId, digest: str) -> _Side:
    badges = await proofs.find_all(connection, [version_id])
    found = await examples.score_of(connection, version_id)
    score = found if found is not None and found.digest == digest else None
    return _Side(await proofs.find_version(connection, version_id), badges.get(version_id), score)


def _finding(candidate: _Side, baseline: _Side, rollout: Rollout, wanted: Sequence[Example]) -> Finding:
    proof = candidate.proof
    if proof is not None and proof.status not in (Status.PENDING, Status.PROVED):
        return Finding(_spelled(proof))
    not_compared = _not_compared(candidate, baseline, rollout) if wanted else "there are none"
    sides = (candidate,) if not_compared else (candidate, baseline)
    unscored = [] if not_compared else [side for side in sides if side.score is None]
    to_prove = [side for side in sides if side.proof is None or (side in unscored and side.is_judged)]
    if unscored or to_prove or not candidate.is_judged:
        return Finding(to_prove=tuple(side.version for side in to_prove if side.version is not None))
    if not_compared or candidate.score is None or baseline.score is None:
        return Finding(Status.PROVED, not_compared)
    return _compared(candidate.score, baseline.score, rollout, len(wanted))


def _compared(candidate: Score, baseline: Score, rollout: Rollout, count: int) -> Finding:
    """Two scores of the same `count` examples."""
    left_out = candidate.refused
    if left_out != baseline.refused:
        by_side = ((rollout.candidate, candidate), (rollout.baseline, baseline))
        told = " and ".join(
            f"{examples.spelled(score.refused) or 'none'} of version {number}" for number, score in by_side
        )
        return Finding(Status.PROVED, f"the engine refused {told}")
    if len(left_out) == count:
        return Finding(Status.PROVED, "the engine refuses them all")
    worse = examples.worse(candidate.mean, baseline.mean)
    if worse and left_out:
        worse += f" ({_without(left_out)})"
    return Finding(worse or Status.PROVED, left_out=left_out)


def _without(left_out: Sequence[int]) -> str:
    return f"compared without {examples.spelled(left_out)}: refused by the engine"


def _not_compared(candidate: _Side, baseline: _Side, rollout: Rollout) -> str:
    """Why nothing will be compared, however long one waits; empty: it will."""
    if baseline.version is None:
        return f"version {rollout.baseline} was erased"
    if candidate.version is not None and candidate.version.base_fingerprint != baseline.version.base_fingerprint:
        return f"version {rollout.baseline} was made for another base model"
    proof = baseline.proof
    if proof is not None and proof.reason in LEFT_AS_IT_IS and baseline.score is None:
        return f"the proof of version {rollout.baseline} says: {_spelled(proof)}"
    return ""


def _spelled(proof: Proof) -> str:
    return proof.status if proof.reason is None else f"{proof.status.value} ({proof.reason})"
