"""Proof of effect, run: golden prompts through a replica, beside the base's answers; later loads are held to them.

Proofs wait in the database (`adapter_store/proofs.py`); one runs at a time in each gateway, the tenants in turn. They
are no tenant's requests: no limit, no ledger, an account of their own at the gates, with the least share, and prompt by
prompt they let tenants' requests go first. After each load a version's answers are compared with its fingerprint before
any request uses it.
"""

import asyncio
import logging
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from typing import Final

from adapter_store import aliases, catalog, comparison, examples, proofs
from adapter_store.aliases import NOUN, MoveKind, NewMove, main_of
from adapter_store.catalog import DEFAULT_ALIAS, Version
from adapter_store.changes import Change, record_change, take_turn
from adapter_store.comparison import Finding
from adapter_store.engine import AsyncEngine
from adapter_store.errors import AdapterNotFound, StorageError
from adapter_store.examples import Example, Score
from adapter_store.ids import TenantId, VersionId
from adapter_store.proofs import (
    ANSWER_TOKENS,
    DRIFT,
    PROMPTS,
    TOLERANCE,
    TOP,
    Answer,
    Claim,
    Expectation,
    Fingerprint,
    Proof,
    Reason,
    Reference,
    Status,
)
from adapter_store.rollouts import Rollout, has_running
from adapter_store.transactions import reading, writing
from gateway.errors import GatewayError, ProofFailed, ProofMissing, ReplicaFailed
from gateway.fairness import PRIORITY_EPOCH_S
from gateway.plans import Plan
from gateway.replicas.client import CONTROL_ERRORS, AgentRefusedError
from gateway.replicas.pool import Place, ReplicaPool
from gateway.replicas.replica import Replica, ReplicaState
from gateway.replicas.residency import LoadFailed

log = logging.getLogger("tailor.proofs")
ACCOUNT: Final = TenantId("proof")
PLAN: Final = Plan(name="proof", weight=0.05)
UNSETTLED: Final = "unsettled"
"""The verdict of a proof that is tried again."""
REFUSALS: Final = (400, 413, 422)
"""The engine's answers to an example that asking again does not mend. One replica speaks for all of them."""
JUDGED: Final = (Status.PROVED, Status.NO_EFFECT, Status.FAILED)
LOOK_EVERY_S: Final = 5.0  # for what other gateways published, and what dead ones left
LEASE_S: Final = 30.0  # past a proof's own deadline
FIRST_PAUSE_S: Final = 1
MOST_PAUSE_S: Final = 300
CHECK_S: Final = 10.0  # requests wait for it
DATABASE_S: Final = 1.0  # likewise
MOST_MISMATCHES: Final = 3  # then it is the version, though all were on one replica
BASE_ANSWERS: Final = 256  # kept, by replica and prompt
GIVES_WAY_S: Final = 5
YIELDS: Final = 0.25  # of a proof's time, to tenants' requests


class Policy(StrEnum):
    """What is done: nothing; every version proved and flagged; an alias moved only to what is proved."""

    OFF = "off"
    FLAG = "flag"
    REQUIRE = "require"


class LoadVerdict(StrEnum):
    """How the comparison of a load with its fingerprint ended."""

    SAME = "same"
    MISMATCH = "mismatch"
    UNCHECKED = "unchecked"  # no answer to compare, or the database is away


class Proofs:
    """Every version's proof, and what each load is held to. `dtype` is the serving one."""

    def __init__(
        self,
        engine: AsyncEngine,
        pool: ReplicaPool,
        *,
        dtype: str,
        policy: Policy = Policy.FLAG,
        timeout_s: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self.verdicts: Counter[str] = Counter({UNSETTLED: 0, **{status.value: 0 for status in JUDGED}})
        self.checks: Counter[tuple[str, str]] = Counter()
        self._engine = engine
        self._pool = pool
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._clock = clock
        self._wake = asyncio.Event()
        self._last_tenant = ""
        self._proving: tuple[TenantId, str, asyncio.Timeout] | None = None
        self._given_way = False
        self._base_answers: OrderedDict[tuple[str, str, str], Answer] = OrderedDict()
        if policy is not Policy.OFF:
            pool.check_loads(self._refuse_held_back, self._check_load)

    # what handlers ask

    async def status(self, version_id: VersionId) -> Proof:
        """The badge of a version."""
        async with reading(self._engine) as connection:
            return await proofs.find(connection, version_id)

    async def statuses(self, version_ids: Collection[VersionId]) -> dict[VersionId, Proof]:
        """The badges of many; one that was never asked about is missing."""
        async with reading(self._engine) as connection:
            return await proofs.find_all(connection, version_ids)

    async def allow_move(self, version: Version, *, required: bool | None = None) -> None:
        """Whether an alias may move to the version; `required` None: as the settings have it.

        Raises:
            ProofMissing, ProofFailed: it may not.
        """
        if not (self.policy is Policy.REQUIRE if required is None else required):
            return
        name = f"{version.adapter_name}@{version.number}"
        proof = await self.status(version.id)
        if proof.status is Status.PENDING:
            raise ProofMissing(
                f"'{name}' is not proved yet: move the alias once its proof is 'proved', or run it again."
            )
        if proof.status is not Status.PROVED:
            raise ProofFailed(f"The proof of '{name}' is '{proof.status.value}' ({proof.reason or 'as the base'}).")

    async def finding_on(self, rollout: Rollout) -> Finding:
        """What a rollout waits for; a version that was not asked with the examples as they are is proved again."""
        if self.policy is Policy.OFF:
            return Finding(Status.PROVED, "proofs are off (TAILOR_PROOF)")
        async with reading(self._engine) as connection:
            finding = await comparison.compare(connection, rollout)
        if finding.to_prove:
            async with writing(self._engine) as connection:
                await take_turn(connection)
                finding = await comparison.compare(connection, rollout)  # another gateway may have been faster
                for version in finding.to_prove:
                    await proofs.begin_again(connection, version, int(self._clock()))
            self.wake()
        return finding

    async def allow_moves(self, tenant_id: TenantId, name: str, numbers: Collection[int]) -> None:
        """As `allow_move`, of versions by number; what is missing, the move itself tells."""
        if self.policy is not Policy.REQUIRE:
            return
        for number in numbers:
            with suppress(AdapterNotFound):
                version, _ = await self.find(tenant_id, name, number)
                await self.allow_move(version)

    async def find(self, tenant_id: TenantId, name: str, number: int) -> tuple[Version, Proof]:
        """A tenant's version and its badge. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            version = await catalog.find_by_number(connection, tenant_id, name, number)
            if version is None:
                raise AdapterNotFound(f"{name}@{number}")
            return version, await proofs.find(connection, version.id)

    async def refused_examples(self, version: Version) -> tuple[int, ...]:
        """Those of the examples as they are, by place, that the engine refused when the version was last scored."""
        async with reading(self._engine) as connection:
            wanted = await examples.of(connection, version.adapter_id)
            score = await examples.score_of(connection, version.id)
        return score.refused if score is not None and score.digest == examples.digest_of(wanted) else ()

    async def ask_again(self, tenant_id: TenantId, name: str, number: int) -> tuple[Version, Proof]:
        """Prove a version from nothing; one that is being proved is left to end. Raises AdapterNotFound."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            version = await catalog.find_by_number(connection, tenant_id, name, number)
            if version is None:
                raise AdapterNotFound(f"{name}@{number}")
            await proofs.begin_again(connection, version, int(self._clock()))
            proof = await proofs.find(connection, version.id)
        self.wake()
        return version, proof

    async def prompts(self, tenant_id: TenantId, name: str) -> tuple[str, ...]:
        """An adapter's own golden prompts; none: empty. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            adapter = await catalog.find_adapter(connection, tenant_id, name)
            if adapter is None:
                raise AdapterNotFound(name)
            return await proofs.prompts_of(connection, adapter.id)

    async def set_prompts(self, tenant_id: TenantId, name: str, prompts: Sequence[str]) -> None:
        """What later proofs of an adapter ask; none: the generated ones. Raises AdapterNotFound, PromptsInvalid."""
        proofs.check_prompts(prompts)
        async with writing(self._engine) as connection:
            await take_turn(connection)
            adapter = await catalog.find_adapter(connection, tenant_id, name)
            if adapter is None:
                raise AdapterNotFound(name)
            await proofs.set_prompts(connection, adapter.id, prompts, int(self._clock()))

    async def examples(self, tenant_id: TenantId, name: str) -> tuple[Example, ...]:
        """An adapter's examples of good answers. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            adapter = await catalog.find_adapter(connection, tenant_id, name)
            if adapter is None:
                raise AdapterNotFound(name)
            return await examples.of(connection, adapter.id)

    async def set_examples(self, tenant_id: TenantId, name: str, given: Sequence[Example]) -> None:
        """Set them; the newest versions are proved, and so scored, again.

        One that is being proved just now ends without them, and an old one is as it was: where a rollout needs their
        scores, it has them proved again (`finding_on`).

        Raises AdapterNotFound, PromptsInvalid.
        """
        examples.check(given)
        now = int(self._clock())
        async with writing(self._engine) as connection:
            await take_turn(connection)
            adapter = await catalog.find_adapter(connection, tenant_id, name)
            if adapter is None:
                raise AdapterNotFound(name)
            before = await examples.of(connection, adapter.id)
            if before == tuple(given):
                return
            await examples.keep(connection, adapter.id, given, now)
            for version_id in await examples.newest(connection, adapter.id):
                version = await proofs.find_version(connection, version_id)
                if version is not None:
                    await proofs.begin_again(connection, version, now)
        self.wake()

    def on_change(self, change: Change) -> None:
        """A listener of the change feed."""
        if change.noun == NOUN:
            self.wake()

    def wake(self) -> None:
        """There may be something to prove."""
        self._wake.set()

    def give_way(self, tenant_id: TenantId, digests: Collection[str]) -> None:
        """Break off the proof that runs here, if it is of one of these: nobody is to wait for its requests."""
        if self._proving is not None:
            owner, digest, scope = self._proving
            if owner == tenant_id and digest in digests and not scope.expired():
                self._given_way = True
                scope.reschedule(asyncio.get_running_loop().time())

    async def prove(self, version: Version) -> Proof:
        """Wait for a version's verdict, whichever gateway gives it; it must have been asked for.

        Raises:
            TimeoutError: none came in the time of two proofs.
        """
        async with writing(self._engine) as connection:
            await proofs.hasten(connection, version.id, int(self._clock()))
        async with asyncio.timeout(2 * self._timeout_s):
            while (proof := await self.status(version.id)).status is Status.PENDING:
                self.wake()
                await asyncio.sleep(0.1)
        return proof

    # proving

    async def follow(self) -> None:
        """Prove what waits, for ever; meant to run as one task."""
        while self.policy is not Policy.OFF:
            self._wake.clear()
            pause_s = LOOK_EVERY_S
            try:
                if await self._prove_next():
                    continue
                pause_s = await self._pause_s()
            except StorageError as error:
                log.warning("proofs wait: %s", error)
            except Exception:  # proving must never end
                log.exception("a proof broke off")
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    async def _pause_s(self) -> float:
        """Until the next proof is due, where that is soon."""
        async with reading(self._engine) as connection:
            due_at = await proofs.soonest(connection)
        left_s = 0.0 if due_at is None else due_at - self._clock()
        return min(left_s, LOOK_EVERY_S) if left_s > 0 else LOOK_EVERY_S

    async def _prove_next(self) -> bool:
        """Prove the next version in turn; False where there is none, or no replica to ask."""
        if ReplicaState.READY not in self._pool.states().values():
            return False
        await self._move_next()
        found = await self._claim_next()
        if found is None:
            return False
        claim, version, prompts = found
        try:
            await self._prove(claim, version, prompts)
        except asyncio.CancelledError:
            with suppress(StorageError):
                await self._put_off(claim, 0)
            raise
        return True

    async def _move_next(self) -> None:
        """An alias that has waited for a proof moves, unless it stands for a newer version by now."""
        async with reading(self._engine) as connection:
            if await proofs.next_move(connection) is None:
                return
        async with writing(self._engine) as connection:
            await take_turn(connection)
            version_id = await proofs.next_move(connection)
            version = None if version_id is None else await proofs.find_version(connection, version_id)
            if version is None:
                return
            await proofs.forget_move(connection, version.id)
            current = await aliases.find(connection, version.tenant_id, version.adapter_name, DEFAULT_ALIAS)
            if current is None or main_of(current).number < version.number:
                move = NewMove(version.adapter_id, DEFAULT_ALIAS, MoveKind.PUBLISH, "", "proved", int(self._clock()))
                await aliases.point(connection, move, [(version.id, version.number, 1)])
                await record_change(connection, NOUN, version.tenant_id, version.adapter_name)
        self.wake()

    async def _claim_next(self) -> tuple[Claim, Version, Sequence[str]] | None:
        now = int(self._clock())
        async with reading(self._engine) as connection:
            if await proofs.next_due(connection, now, self._last_tenant) is None:
                return None  # as mostly: nobody's turn is taken for it
        async with writing(self._engine) as connection:
            version_id = await proofs.next_due(connection, now, self._last_tenant)
            version = None if version_id is None else await proofs.find_version(connection, version_id)
            if version is None:
                return None
            until = now + math.ceil(self._timeout_s + LEASE_S)
            claim = await proofs.claim(connection, version.id, secrets.token_hex(8), now=now, until=until)
            prompts = await proofs.prompts_of(connection, version.adapter_id)
        self._last_tenant = version.tenant_id
        return None if claim is None else (claim, version, prompts or PROMPTS)

    async def _prove(self, claim: Claim, version: Version, prompts: Sequence[str]) -> None:
        self._given_way = False
        try:
            async with asyncio.timeout(self._timeout_s) as scope:
                self._proving = (version.tenant_id, version.digest, scope)
                try:
                    proof, fingerprint, score = await self._examine(version, prompts, claim.reference)
                finally:
                    self._proving = None
        except (*CONTROL_ERRORS, GatewayError) as error:
            if not isinstance(error, LoadFailed) or error.again:
                log.warning("version %s not proved yet: %s", version.id, type(error).__name__)
                pause_s = GIVES_WAY_S if self._given_way else FIRST_PAUSE_S << min(claim.attempts - 1, 16)
                await self._put_off(claim, min(pause_s, MOST_PAUSE_S))
                self.verdicts[UNSETTLED] += 1
                return
            proof, fingerprint, score = self._verdict(Status.FAILED, prompts, Reason.ENGINE_REFUSED), None, None
        self.verdicts[proof.status.value] += 1
        log.info("version %s is %s: %s from the base", version.id, proof.status.value, proof.max_logprob_difference)
        async with writing(self._engine) as connection:
            written = await proofs.judge(connection, claim, proof, fingerprint)
            if written and score is not None:
                await examples.keep_score(connection, version.id, score)
        if not written and await self._is_gone(version):
            await self._pool.unload(version.tenant_id, [version.digest])  # the delete may have come before our load

    async def _put_off(self, claim: Claim, pause_s: int) -> None:
        async with writing(self._engine) as connection:
            await proofs.put_off(connection, claim, int(self._clock()) + pause_s)

    async def _is_gone(self, version: Version) -> bool:
        async with reading(self._engine) as connection:
            return await proofs.find_version(connection, version.id) is None

    async def _examine(
        self, version: Version, prompts: Sequence[str], reference: Reference | None
    ) -> tuple[Proof, tuple[str, Fingerprint] | None, Score | None]:
        """The verdict, the fingerprint with the build that it is of, and the score on the examples.

        A prompt's two answers are of one replica, and all of one build.
        """
        async with reading(self._engine) as connection:
            wanted = await examples.of(connection, version.adapter_id)
            is_awaited = self.policy is Policy.REQUIRE or await has_running(connection, version.id)
        yield_until = 0.0 if is_awaited else time.monotonic() + YIELDS * self._timeout_s
        found: list[Answer] = []
        base: list[Answer] = []
        trained: list[Answer] = []
        builds: set[str] = set()
        for prompt in prompts:
            async with self._placed(version, yield_until, _cost(prompt)) as place:
                found.append(await self._ask(place, prompt))
                base.append(await self._ask_base(place, prompt))
                builds.add(_build(place.replica, self._dtype))
        if reference is not None:
            for asked in reference.prompts:
                async with self._placed(version, yield_until, _cost(asked, reference.answer_tokens)) as place:
                    trained.append(await self._ask(place, asked, tokens=reference.answer_tokens))
        score = await self._score(version, wanted, yield_until) if wanted else None
        from_base = proofs.difference(found, base)
        if not proofs.is_finite(found):
            return self._verdict(Status.FAILED, prompts, Reason.NOT_FINITE), None, score
        if not math.isfinite(from_base):
            raise ReplicaFailed("The base gave no answers to compare with.")
        if len(builds) > 1:
            raise ReplicaFailed("The answers are of several builds of the engine.")
        fingerprint = builds.pop(), Fingerprint(list(prompts), found)
        tolerance = TOLERANCE[self._dtype]
        if reference is not None and proofs.reference_difference(reference, trained) > tolerance:
            return self._verdict(Status.FAILED, prompts, Reason.REFERENCE_DIFFERS, from_base), fingerprint, score
        status = Status.PROVED if from_base > tolerance else Status.NO_EFFECT
        return self._verdict(status, prompts, None, from_base), fingerprint, score

    @asynccontextmanager
    async def _placed(self, version: Version, yield_until: float, cost: int) -> AsyncIterator[Place]:
        """A place for one prompt, once no tenant's request runs or waits there, or `yield_until` is over.

        It is not held from one prompt to the next: the adapter's slot may be what a tenant's request waits for.
        """
        left_s = yield_until - time.monotonic()
        if left_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._pool.until_quiet(version)
        place = await self._pool.place(version, ACCOUNT, PLAN, cost=cost)
        try:
            yield place
        finally:
            place.release(cost)

    async def _score(self, version: Version, wanted: Sequence[Example], yield_until: float) -> Score:
        """Of the examples that the engine takes: one that it refuses, it would refuse for ever."""
        total, count = 0.0, 0
        refused: list[int] = []
        for number, example in enumerate(wanted):
            async with self._placed(version, yield_until, _cost(example.prompt)) as place:
                try:
                    found, tokens = await place.replica.client.likelihood(
                        place.name, place.adapter, example.prompt, example.answer,
                        base_name=place.replica.base_name, priority=place.priority,
                        context_length=place.replica.context_length,
                    )  # fmt: skip
                except AgentRefusedError as error:
                    if error.status not in REFUSALS:
                        raise
                    log.warning("version %s: the engine refuses examples[%d]: %s", version.id, number, error)
                    refused.append(number)
                    continue
            total += found
            count += tokens
        return Score(examples.digest_of(wanted), total / max(1, count), tuple(refused))

    def _verdict(
        self, status: Status, prompts: Sequence[str], reason: Reason | None, from_base: float | None = None
    ) -> Proof:
        return Proof(status, int(self._clock()), from_base, len(prompts), reason)

    async def _ask(self, place: Place, prompt: str | Sequence[int], *, tokens: int = ANSWER_TOKENS) -> Answer:
        try:
            return await _greedy_one(place, place.name, place.adapter, prompt, tokens)
        except AgentRefusedError as error:
            if error.status == 404:
                place.forget_adapter()
            raise

    async def _ask_base(self, place: Place, prompt: str) -> Answer:
        """What the base answers there; asked once in an engine's life."""
        replica = place.replica
        generation = replica.report.generation if replica.report is not None else ""
        key = (replica.id, generation, prompt)
        answer = self._base_answers.get(key)
        if answer is None:
            name = replica.null_adapter or replica.base_name
            answer = await _greedy_one(place, name, replica.null_adapter, prompt, ANSWER_TOKENS)
            if proofs.is_finite([answer]):
                self._base_answers[key] = answer
        while len(self._base_answers) > BASE_ANSWERS:
            self._base_answers.popitem(last=False)
        return answer

    # checking loads

    async def _refuse_held_back(self, version: Version) -> None:
        """Before a load."""
        expected = await self._expected(version, "")
        if expected is not None and expected.proof.is_held_back:
            raise LoadFailed(
                "The adapter does not answer as it did when it was proved: have it proved again, or ask the operator.",
                retry_after_s=60,
                again=False,
            )

    async def _check_load(self, replica: Replica, name: str, version: Version) -> None:
        """After a load, before any request uses it: it must answer as it did when it was proved."""
        build = _build(replica, self._dtype)
        expected = await self._expected(version, build)
        if expected is None:
            return self._count(replica, LoadVerdict.UNCHECKED)
        wanted = expected.fingerprint
        if wanted is None and expected.proof.checked_at is None:
            return None  # its proof is still to come
        prompts = PROMPTS if wanted is None else wanted.prompts
        try:
            async with asyncio.timeout(min(CHECK_S, self._timeout_s)):
                found = await _greedy(replica, name, name, prompts, _urgent(), ANSWER_TOKENS)
        except CONTROL_ERRORS as error:
            log.warning("version %s loaded on %s, and not looked at: %s", version.id, replica.id, type(error).__name__)
            return self._count(replica, LoadVerdict.UNCHECKED)
        if wanted is None:  # it was proved on another build of the engine
            return await self._keep(version, build, Fingerprint(list(prompts), found))
        apart = proofs.difference(found, wanted.answers)
        if apart > DRIFT[self._dtype]:
            return await self._drop(replica, name, version, apart)
        self._count(replica, LoadVerdict.SAME)
        if expected.mismatches:
            await self._note_match(version)
        return None

    async def _drop(self, replica: Replica, name: str, version: Version, apart: float) -> None:
        """Take what answers wrongly out of the engine, and judge whose fault it is. Raises LoadFailed."""
        self._count(replica, LoadVerdict.MISMATCH)
        log.error("version %s on %s answers otherwise than when it was proved: by %s", version.id, replica.id, apart)
        count, here_again = 1, True
        with suppress(StorageError):
            async with writing(self._engine) as connection:
                count, here_again = await proofs.note_mismatch(connection, version.id, replica.id)
        try:
            await replica.client.unload(name, self._timeout_s)
        except CONTROL_ERRORS as error:
            log.warning("adapter %s not unloaded: %r", name, error)
        if count >= MOST_MISMATCHES or not here_again:
            await self._hold_back(version)
        elif count > 1:
            log.error("replica %s is suspected: it has loaded a version wrongly twice", replica.id)
            replica.suspect()
        raise LoadFailed("The adapter was not loaded as it should be; try again.", retry_after_s=2)

    async def _hold_back(self, version: Version) -> None:
        log.error("version %s is held back: it is loaded no more until it has been proved again", version.id)
        with suppress(StorageError):
            async with writing(self._engine) as connection:
                await proofs.hold_back(connection, version.id, int(self._clock()))

    async def _keep(self, version: Version, build: str, fingerprint: Fingerprint) -> None:
        if not proofs.is_finite(fingerprint.answers):
            return
        with suppress(StorageError):
            async with writing(self._engine) as connection:
                now = int(self._clock())
                await proofs.keep_fingerprint(connection, version.id, build, fingerprint, now=now)

    async def _note_match(self, version: Version) -> None:
        with suppress(StorageError):
            async with writing(self._engine) as connection:
                await proofs.note_match(connection, version.id)

    async def _expected(self, version: Version, build: str) -> Expectation | None:
        """None where the database does not say in time."""
        try:
            async with asyncio.timeout(DATABASE_S), reading(self._engine) as connection:
                return await proofs.expect(connection, version.id, build)
        except (StorageError, TimeoutError):
            return None

    def _count(self, replica: Replica, verdict: LoadVerdict) -> None:
        self.checks[replica.id, verdict.value] += 1


async def _greedy_one(
    place: Place, model: str, adapter: str | None, prompt: str | Sequence[int], tokens: int
) -> Answer:
    answers = await _greedy(place.replica, model, adapter, [prompt], place.priority, tokens)
    if len(answers) != 1:
        raise ReplicaFailed(f"The engine gave {len(answers)} answers to one prompt.")
    return answers[0]


async def _greedy(
    replica: Replica,
    model: str,
    adapter: str | None,
    prompts: Sequence[str | Sequence[int]],
    priority: int,
    tokens: int,
) -> list[Answer]:
    context_length = replica.context_length
    return await replica.client.greedy(
        model, adapter, prompts, tokens=tokens, top=TOP, priority=priority, context_length=context_length
    )


def _build(replica: Replica, dtype: str) -> str:
    """What engines that round alike have in common."""
    facts = replica.report.engine if replica.report is not None else None
    return "" if facts is None else f"{facts.version} {facts.device} {dtype}"


def _urgent() -> int:
    """The priority of a request that has waited no time: those who wait for the load come with it."""
    return int((time.time() - PRIORITY_EPOCH_S) * 1_000)


def _cost(prompt: str | Sequence[int], tokens: int = ANSWER_TOKENS) -> int:
    """Tokens, by estimate, of both rounds."""
    return 2 * (len(prompt) // 4 + 1 + tokens)
