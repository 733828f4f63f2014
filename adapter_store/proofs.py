"""Proof of effect: what a version answers to golden prompts, beside the base, and beside itself after a later load.

Rows and comparisons; no engine here: `gateway/proofs.py` asks one. All answers are greedy. What is kept of each place
is the token and the most likely tokens with their logprobs, so that two engines that round differently can be told
from two sets of weights.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    Row,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from adapter_store import catalog
from adapter_store.catalog import Version, metadata, versions
from adapter_store.engine import AsyncConnection
from adapter_store.errors import PromptsInvalid
from adapter_store.ids import AdapterId, VersionId

ANSWER_TOKENS = 8
TOP = 5  # most likely tokens kept of each place
MOST_PROMPTS = 8
MOST_PROMPT_BYTES = 4_096  # each, as UTF-8
MOST_PROMPTS_BYTES = 16_384  # all together
MOST_REFERENCE_TOKENS = 64  # of each answer
PROMPTS = (
    "Hello! What is your name?",
    "Repeat after me: red, blue, green.",
    "One, two, three, four,",
    "Here is a short answer to your question:",
)
"""Where a tenant has none of its own: plain ASCII, which every tokenizer has tokens for."""

# Largest difference of one logprob, by serving dtype, that says nothing: below it an adapter has no effect, and an
# answer is its reference's.
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
# The same between two loads of one version. Wider: batches of other sizes and other kernels round in other places, and
# a bfloat16 between 16 and 32 has an eighth to its neighbour. Other weights are off by far more.
DRIFT: Mapping[str, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}


class Status(StrEnum):
    """What is known of a version's effect."""

    PENDING = "pending"
    PROVED = "proved"
    NO_EFFECT = "no_effect"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a version is not proved."""

    REFERENCE_DIFFERS = "reference_differs"  # not what it answered where it was trained
    NOT_FINITE = "not_finite"
    ENGINE_REFUSED = "engine_refused"
    FINGERPRINT_DIFFERS = "fingerprint_differs"  # a later load answers otherwise
    ENGINE_UNAVAILABLE = "engine_unavailable"  # tried again by itself


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A greedy answer to one prompt: at each place the token, its logprob, and the most likely ones."""

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


Answers = Sequence[Answer]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a version answered where it was trained (PEFT): greedy logprobs, and their tokens where they are known."""

    prompts: list[str | list[int]]  # all of one kind
    logprobs: list[list[float]]
    tokens: list[list[int]] | None = None

    def check(self) -> None:
        """Raises PromptsInvalid."""
        count = len(self.prompts)
        others = {len(self.logprobs), count if self.tokens is None else len(self.tokens)}
        if not 1 <= count <= MOST_PROMPTS or others != {count}:
            raise PromptsInvalid(f"a reference has 1 to {MOST_PROMPTS} prompts, and an answer to each")
        if len(set(map(type, self.prompts))) != 1:
            raise PromptsInvalid("a reference's prompts are all text, or all token ids")
        for number, logprobs in enumerate(self.logprobs):
            if not 1 <= len(logprobs) <= MOST_REFERENCE_TOKENS or not all(map(math.isfinite, logprobs)):
                raise PromptsInvalid(f"logprobs[{number}]: 1 to {MOST_REFERENCE_TOKENS} finite numbers")
            if self.tokens is not None and len(self.tokens[number]) != len(logprobs):
                raise PromptsInvalid(f"tokens[{number}]: not as many as logprobs[{number}]")

    @property
    def answer_tokens(self) -> int:
        return max(map(len, self.logprobs))


class Fingerprint(msgspec.Struct, frozen=True):
    """What a version answers on one build of the engine, and to what."""

    prompts: list[str]
    answers: list[Answer]


# comparing


def is_finite(answers: Answers) -> bool:
    """Whether every number in them is one."""
    return all(
        math.isfinite(value)
        for answer in answers
        for value in (*answer.logprobs, *(value for place in answer.top for value in place.values()))
    )


def difference(mine: Answers, other: Answers) -> float:
    """The largest difference of a logprob, up to the place where two answers part.

    Infinite where they are not answers to the same prompts, or have a number that is none.

    Past that place each has another text before it. The place itself counts: where both tokens are about as likely in
    both answers it is a tie, which rounding decides.
    """
    if len(mine) != len(other) or not mine or not (is_finite(mine) and is_finite(other)):
        return math.inf
    return max(_apart(one, another) for one, another in zip(mine, other, strict=True))


def _apart(mine: Answer, other: Answer) -> float:
    if len(mine.tokens) != len(other.tokens) or not mine.tokens:
        return math.inf
    worst = 0.0
    for token, others, top, others_top in zip(mine.tokens, other.tokens, mine.top, other.top, strict=True):
        worst = max(worst, _place_apart(top, others_top))
        if token != others:
            break
    return worst


def _place_apart(mine: Mapping[int, float], other: Mapping[int, float]) -> float:
    """A token that only one of them has among its top is in the other at most as likely as that one's last."""
    if not mine or not other:
        return math.inf
    both = [abs(mine[token] - other[token]) for token in mine.keys() & other.keys()]
    gone = [mine[token] - min(other.values()) for token in mine.keys() - other.keys()]
    come = [other[token] - min(mine.values()) for token in other.keys() - mine.keys()]
    return max(0.0, *both, *gone, *come)


def reference_difference(reference: Reference, found: Answers) -> float:
    """The largest difference from the reference, where its tokens are known up to the place where the answers part."""
    if len(found) != len(reference.prompts) or not is_finite(found):
        return math.inf
    worst = 0.0
    for number, (wanted, answer) in enumerate(zip(reference.logprobs, found, strict=True)):
        if len(answer.logprobs) < len(wanted):
            return math.inf
        tokens = reference.tokens[number] if reference.tokens is not None else answer.tokens
        for logprob, token, at in zip(wanted, tokens, range(len(wanted)), strict=False):
            likely = answer.top[at].get(token, min(answer.top[at].values(), default=-math.inf))
            worst = max(worst, abs(logprob - likely))
            if token != answer.tokens[at]:
                break
    return worst


def token_hash(answers: Answers) -> str:
    """SHA-256 over the tokens: equal wherever nothing was a tie."""
    return hashlib.sha256(msgspec.json.encode([answer.tokens for answer in answers])).hexdigest()


# golden prompts


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises PromptsInvalid."""
    if len(prompts) > MOST_PROMPTS:
        raise PromptsInvalid(f"{len(prompts)} prompts: at most {MOST_PROMPTS}")
    sizes = [len(prompt.encode(errors="surrogatepass")) for prompt in prompts]
    for number, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        if not prompt.strip():
            raise PromptsInvalid(f"prompts[{number}] is empty")
        if size > MOST_PROMPT_BYTES:
            raise PromptsInvalid(f"prompts[{number}] has {size} bytes: at most {MOST_PROMPT_BYTES}")
        if not is_text(prompt):
            raise PromptsInvalid(f"prompts[{number}] is not text: a NUL, or half of a surrogate pair")
    if sum(sizes) > MOST_PROMPTS_BYTES:
        raise PromptsInvalid(f"the prompts have {sum(sizes)} bytes together: at most {MOST_PROMPTS_BYTES}")


def is_text(prompt: str) -> bool:
    """Whether a tokenizer and a database can take it."""
    return "\0" not in prompt and not any(0xD800 <= ord(character) <= 0xDFFF for character in prompt)


# rows

proofs = Table(  # one a version; gone with it
    "proofs",
    metadata,
    Column(
        "version_id",
        Text,
        ForeignKey("versions.id", name="fk_proofs_version_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("tenant_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("due_at", BigInteger, nullable=False),  # when it may be begun; while one runs, when that one counts as dead
    Column("claim", Text),  # whose run it is
    Column("attempts", Integer, nullable=False),
    Column("checked_at", BigInteger),
    Column("difference", Double),  # from the base
    Column("prompts", Integer, nullable=False),
    Column("reason", Text),
    Column("reference", Text),  # JSON
    Column("mismatches", Integer, nullable=False),  # loads in a row that answered otherwise than the fingerprint
    Column("mismatched_on", Text),  # the replica of the last one
    Index("ix_proofs_status_tenant_id_due_at", "status", "tenant_id", "due_at"),
)
_NEW = insert(proofs)
_ALL = select(proofs).where(proofs.c.version_id.in_(bindparam("version_ids", expanding=True)))
fingerprints = Table(
    "fingerprints",
    metadata,
    Column(
        "version_id",
        Text,
        ForeignKey("versions.id", name="fk_fingerprints_version_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("build", Text, primary_key=True),  # engine's version, device and dtype: others round otherwise
    Column("token_hash", Text, nullable=False),
    Column("answers", Text, nullable=False),  # JSON of Fingerprint
    Column("made_at", BigInteger, nullable=False),
)
proof_moves = Table(  # published where proof is required: the alias `default` moves to it once it is proved
    "proof_moves",
    metadata,
    Column(
        "version_id",
        Text,
        ForeignKey("versions.id", name="fk_proof_moves_version_id", ondelete="CASCADE"),
        primary_key=True,
    ),
)
golden_prompts = Table(
    "golden_prompts",
    metadata,
    Column(
        "adapter_id",
        Text,
        ForeignKey("adapters.id", name="fk_golden_prompts_adapter_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("prompts", Text, nullable=False),  # JSON list
    Column("changed_at", BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """The badge on a version; `checked_at` None: it has never been judged."""

    status: Status = Status.PENDING
    checked_at: int | None = None
    max_logprob_difference: float | None = None
    prompts: int = 0
    reason: str | None = None

    @property
    def is_held_back(self) -> bool:
        """Loads of it answer otherwise than it did when it was proved: it is not loaded any more."""
        return self.status is Status.FAILED and self.reason == Reason.FINGERPRINT_DIFFERS


UNKNOWN = Proof()
"""Of a version that was never asked about."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A proof that is this caller's to run."""

    version_id: VersionId
    token: str
    attempts: int
    reference: Reference | None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a load of a version is held to."""

    proof: Proof
    mismatches: int
    fingerprint: Fingerprint | None


def _proof(row: Row[Any]) -> Proof:
    return Proof(Status(row.status), row.checked_at, row.difference, row.prompts, row.reason)


async def begin(connection: AsyncConnection, version: Version, due_at: int, reference: Reference | None = None) -> None:
    """A new version waits to be proved, until `due_at` at least; in the transaction that makes it."""
    row = {
        "version_id": version.id,
        "tenant_id": version.tenant_id,
        "status": Status.PENDING,
        "due_at": due_at,
        "attempts": 0,
        "prompts": 0,
        "mismatches": 0,
        "reference": None if reference is None else msgspec.json.encode(reference).decode(),
    }
    await connection.execute(_NEW, row)


async def begin_again(connection: AsyncConnection, version: Version, now: int) -> None:
    """From nothing: its fingerprints go. One that is being run is left to end. The caller holds the writers' turn."""
    row = (await connection.execute(select(proofs.c.claim).where(proofs.c.version_id == version.id))).one_or_none()
    if row is None:
        return await begin(connection, version, now)
    if row.claim is not None:
        return None
    await connection.execute(delete(fingerprints).where(fingerprints.c.version_id == version.id))
    values = {"status": Status.PENDING, "due_at": now, "attempts": 0, "reason": None, "mismatches": 0}
    await connection.execute(
        update(proofs).where(proofs.c.version_id == version.id).values(**values, mismatched_on=None)
    )
    return None


async def hasten(connection: AsyncConnection, version_id: VersionId, now: int) -> None:
    """Somebody waits for the verdict: a proof that has not been tried yet is due now."""
    untried = (proofs.c.status == Status.PENDING) & (proofs.c.attempts == 0)
    here = (proofs.c.version_id == version_id) & untried & (proofs.c.due_at > now)
    await connection.execute(update(proofs).where(here).values(due_at=now))


async def find(connection: AsyncConnection, version_id: VersionId) -> Proof:
    row = (await connection.execute(select(proofs).where(proofs.c.version_id == version_id))).one_or_none()
    return UNKNOWN if row is None else _proof(row)


async def find_all(connection: AsyncConnection, version_ids: Collection[VersionId]) -> dict[VersionId, Proof]:
    """Those that there are."""
    rows = await connection.execute(_ALL, {"version_ids": list(version_ids)})
    return {row.version_id: _proof(row) for row in rows}


async def next_due(connection: AsyncConnection, now: int, after: str) -> VersionId | None:
    """The oldest that is due of the tenant that comes after `after`: each has one proved in its turn."""
    due = (proofs.c.status == Status.PENDING) & (proofs.c.due_at <= now)
    order = (proofs.c.tenant_id, proofs.c.due_at, proofs.c.version_id)
    for where in (due & (proofs.c.tenant_id > after), due):
        statement = select(proofs.c.version_id).where(where).order_by(*order).limit(1)
        row = (await connection.execute(statement)).one_or_none()
        if row is not None:
            return VersionId(row.version_id)
    return None


async def soonest(connection: AsyncConnection) -> int | None:
    """When the first of those that wait is due; None: none waits."""
    statement = select(func.min(proofs.c.due_at)).where(proofs.c.status == Status.PENDING)
    found: int | None = (await connection.execute(statement)).scalar_one()
    return found


async def claim(
    connection: AsyncConnection, version_id: VersionId, token: str, *, now: int, until: int
) -> Claim | None:
    """Take a proof that is due, until `until`; None where another was faster."""
    statement = (
        update(proofs)
        .where(proofs.c.version_id == version_id, proofs.c.status == Status.PENDING, proofs.c.due_at <= now)
        .values(claim=token, due_at=until, attempts=proofs.c.attempts + 1)
        .returning(proofs.c.attempts, proofs.c.reference)
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return None
    reference = None if row.reference is None else msgspec.json.decode(row.reference, type=Reference)
    return Claim(version_id, token, row.attempts, reference)


async def put_off(connection: AsyncConnection, claim: Claim, until: int) -> None:
    """No verdict this time: it is begun again after `until`."""
    values = {"claim": None, "due_at": until, "reason": Reason.ENGINE_UNAVAILABLE}
    await connection.execute(update(proofs).where(_is_ours(claim)).values(values))


async def judge(
    connection: AsyncConnection, claim: Claim, proof: Proof, fingerprint: tuple[str, Fingerprint] | None
) -> bool:
    """Write the verdict, and the fingerprint with its build; False where the version, or the claim, has gone."""
    values = {
        "status": proof.status,
        "claim": None,
        "checked_at": proof.checked_at,
        "difference": proof.max_logprob_difference,
        "prompts": proof.prompts,
        "reason": proof.reason,
        "mismatches": 0,
        "mismatched_on": None,
    }
    written = await connection.execute(update(proofs).where(_is_ours(claim)).values(values))
    if not written.rowcount:
        return False
    if fingerprint is not None:
        await keep_fingerprint(connection, claim.version_id, *fingerprint, now=proof.checked_at or 0)
    return True


def _is_ours(claim: Claim) -> Any:
    return (proofs.c.version_id == claim.version_id) & (proofs.c.claim == claim.token)


async def keep_fingerprint(
    connection: AsyncConnection, version_id: VersionId, build: str, fingerprint: Fingerprint, *, now: int
) -> None:
    """In the place of what there was for that build."""
    here = (fingerprints.c.version_id == version_id) & (fingerprints.c.build == build)
    await connection.execute(delete(fingerprints).where(here))
    row = {
        "version_id": version_id,
        "build": build,
        "token_hash": token_hash(fingerprint.answers),
        "answers": msgspec.json.encode(fingerprint).decode(),
        "made_at": now,
    }
    await connection.execute(insert(fingerprints).values(row))


async def expect(connection: AsyncConnection, version_id: VersionId, build: str) -> Expectation:
    """What is known of a version on that build of the engine."""
    of_build = (fingerprints.c.version_id == proofs.c.version_id) & (fingerprints.c.build == build)
    statement = (
        select(proofs, fingerprints.c.answers)
        .outerjoin(fingerprints, of_build)
        .where(proofs.c.version_id == version_id)
    )
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        return Expectation(UNKNOWN, 0, None)
    kept = None if row.answers is None else msgspec.json.decode(row.answers, type=Fingerprint)
    return Expectation(_proof(row), row.mismatches, kept)


async def note_match(connection: AsyncConnection, version_id: VersionId) -> None:
    """A load answered as it should: what came before was the engine's."""
    await connection.execute(
        update(proofs).where(proofs.c.version_id == version_id).values(mismatches=0, mismatched_on=None)
    )


async def note_mismatch(connection: AsyncConnection, version_id: VersionId, replica: str) -> tuple[int, bool]:
    """How many loads in a row have answered otherwise by now, and whether the one before was on this replica too."""
    row = (
        await connection.execute(
            select(proofs.c.mismatches, proofs.c.mismatched_on)
            .where(proofs.c.version_id == version_id)
            .with_for_update()
        )
    ).one_or_none()
    if row is None:
        return 1, True
    values = {"mismatches": row.mismatches + 1, "mismatched_on": replica}
    await connection.execute(update(proofs).where(proofs.c.version_id == version_id).values(values))
    return row.mismatches + 1, row.mismatched_on in (None, replica)


async def hold_back(connection: AsyncConnection, version_id: VersionId, now: int) -> None:
    """Its loads answer otherwise than it did when it was proved, and it is not the replica."""
    values = {"status": Status.FAILED, "reason": Reason.FINGERPRINT_DIFFERS, "checked_at": now}
    here = (proofs.c.version_id == version_id) & proofs.c.claim.is_(None)
    await connection.execute(update(proofs).where(here).values(values))


async def move_when_proved(connection: AsyncConnection, version_id: VersionId) -> None:
    """The alias waits for the version's proof. The caller holds the writers' turn."""
    await forget_move(connection, version_id)
    await connection.execute(insert(proof_moves).values(version_id=version_id))


async def next_move(connection: AsyncConnection) -> VersionId | None:
    """A version that is proved, and that its alias has waited for."""
    is_proved = (proofs.c.version_id == proof_moves.c.version_id) & (proofs.c.status == Status.PROVED)
    statement = select(proof_moves.c.version_id).join(proofs, is_proved).order_by(proof_moves.c.version_id).limit(1)
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else VersionId(row.version_id)


async def forget_move(connection: AsyncConnection, version_id: VersionId) -> None:
    await connection.execute(delete(proof_moves).where(proof_moves.c.version_id == version_id))


async def find_version(connection: AsyncConnection, version_id: VersionId) -> Version | None:
    """The version that a proof is of, whoever's it is."""
    row = (await connection.execute(catalog.select_versions().where(versions.c.id == version_id))).one_or_none()
    return None if row is None else catalog.version_of(row)


async def prompts_of(connection: AsyncConnection, adapter_id: AdapterId) -> tuple[str, ...]:
    """The tenant's own; none: empty."""
    found = (
        await connection.execute(select(golden_prompts.c.prompts).where(golden_prompts.c.adapter_id == adapter_id))
    ).scalar_one_or_none()
    return () if found is None else tuple(msgspec.json.decode(found, type=list[str]))


async def set_prompts(connection: AsyncConnection, adapter_id: AdapterId, prompts: Sequence[str], now: int) -> None:
    """None: the generated ones again. The caller holds the writers' turn."""
    await connection.execute(delete(golden_prompts).where(golden_prompts.c.adapter_id == adapter_id))
    if prompts:
        row = {"adapter_id": adapter_id, "prompts": msgspec.json.encode(prompts).decode(), "changed_at": now}
        await connection.execute(insert(golden_prompts).values(row))
