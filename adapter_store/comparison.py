"""What a rollout is told of its two versions' proofs: a finding on the new one, once both are scored on the examples.

A version's score is of the examples that there were when its proof began. Where it is of others, or of none, the proof
is to be run again before anything is said: a proof that a rollout finds running, or that ended before the tenant set
its examples, says nothing of them.
"""

from dataclasses import dataclass

from adapter_store import examples, proofs
from adapter_store.catalog import Version
from adapter_store.engine import AsyncConnection
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
    `to_prove`: what is proved again before there is more.
    """

    proof: str | None = None
    not_compared: str = ""
    to_prove: tuple[Version, ...] = ()


@dataclass(frozen=True, slots=True)
class _Side:
    """What is known of one of the two; `version` None: it is erased, `proof` None: it was never asked about."""

    version: Version | None
    proof: Proof | None
    score: float | None  # on the examples as they are

    @property
    def is_judged(self) -> bool:
        return self.proof is not None and self.proof.status is not Status.PENDING


async def compare(connection: AsyncConnection, rollout: Rollout) -> Finding:
    """What is found of a rollout as it stands in the rows."""
    wanted = await examples.of(connection, rollout.adapter_id)
    digest = examples.digest_of(wanted)
    candidate = await _side(connection, rollout.candidate_id, digest)
    baseline = await _side(connection, rollout.baseline_id, digest)
    return _finding(candidate, baseline, rollout, has_examples=bool(wanted))


async def _side(connection: AsyncConnection, version_id: VersionId, digest: str) -> _Side:
    badges = await proofs.find_all(connection, [version_id])
    found = await examples.score_of(connection, version_id)
    score = found[1] if found is not None and found[0] == digest else None
    return _Side(await proofs.find_version(connection, version_id), badges.get(version_id), score)


def _finding(candidate: _Side, baseline: _Side, rollout: Rollout, *, has_examples: bool) -> Finding:
    proof = candidate.proof
    if proof is not None and proof.status not in (Status.PENDING, Status.PROVED):
        return Finding(_spelled(proof))
    not_compared = _not_compared(candidate, baseline, rollout) if has_examples else "there are none"
    sides = (candidate,) if not_compared else (candidate, baseline)
    scores = [side.score for side in sides if side.score is not None]
    unscored = [] if not_compared else [side for side in sides if side.score is None]
    to_prove = [side for side in sides if side.proof is None or (side in unscored and side.is_judged)]
    if unscored or to_prove or not candidate.is_judged:
        return Finding(to_prove=tuple(side.version for side in to_prove if side.version is not None))
    worse = None if not_compared else examples.worse(*scores)
    return Finding(worse or Status.PROVED, not_compared)


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
