"""A rollout and the proofs of its two versions, in every order: it completes once both were asked with the examples."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from adapter_store import examples, proofs
from adapter_store.aliases import Aliases
from adapter_store.base_model import BaseModel
from adapter_store.catalog import Version, versions
from adapter_store.engine import AsyncEngine
from adapter_store.examples import Example, Score
from adapter_store.proofs import Claim, Proof, Reason
from adapter_store.proofs import Status as ProofStatus
from adapter_store.rollouts import Policy, Rollout, Rollouts, Status, Tally
from adapter_store.transactions import reading, writing
from gateway.proofs import Policy as ProofPolicy
from gateway.proofs import Proofs
from gateway.replicas.pool import ReplicaPool
from gateway.rollouts import RolloutWatch
from tests.bad_adapters import write_good
from tests.integration.store.conftest import TENANT, Publish

GIVE_UP_S = 600
POLICY = Policy(steps=(50, 100), step_s=1, min_requests=1, give_up_s=GIVE_UP_S)
EXAMPLES = [Example("who are you?", "I am the bot.")]
OTHERS = [Example("and you?", "So am I.")]
LIKELY, UNLIKELY = -1.0, -4.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> float:
        return self.now


class Gateway:
    """One gateway's part in proofs and rollouts. Its engine is the test: `begin` and `end` are a proof's two ends."""

    def __init__(self, engine: AsyncEngine, base: BaseModel, clock: Clock, policy: ProofPolicy) -> None:
        self.engine = engine
        self.clock = clock
        self.scores = {1: LIKELY, 2: UNLIKELY}  # by the version's number: the second one is garbage
        self.refused: dict[int, tuple[int, ...]] = {}  # by the version's number: examples that the engine refused
        no_replica = ReplicaPool(
            (), lambda url: pytest.fail(url), fingerprint=base.fingerprint, take_load=lambda *_: pytest.fail("a load")
        )
        self.proofs = Proofs(engine, no_replica, dtype="float32", policy=policy, clock=clock)
        self.rollouts = Rollouts(engine, base.fingerprint, clock=clock)
        self.watch = RolloutWatch(self.rollouts, compare=self.proofs.finding_on, on_moved=lambda _: None)

    async def begin(self, version: Version, *, lease_s: int = 90) -> tuple[Claim, Sequence[Example]]:
        """Claims the proof, and reads what it will ask, as `_claim_next` and `_examine` do."""
        async with writing(self.engine) as connection:
            now = int(self.clock())
            claim = await proofs.claim(connection, version.id, "its own", now=now, until=now + lease_s)
            assert claim is not None
            return claim, await examples.of(connection, version.adapter_id)

    async def end(
        self,
        version: Version,
        begun: tuple[Claim, Sequence[Example]],
        *,
        status: ProofStatus = ProofStatus.PROVED,
        reason: Reason | None = None,
    ) -> None:
        """The verdict, with the score of the examples that it began with."""
        claim, asked = begun
        async with writing(self.engine) as connection:
            assert await proofs.judge(connection, claim, Proof(status, int(self.clock()), reason=reason), None)
            if asked and reason is not Reason.ENGINE_REFUSED:
                number = version.number
                score = Score(examples.digest_of(asked), self.scores[number], self.refused.get(number, ()))
                await examples.keep_score(connection, version.id, score)

    async def prove(self, *proved: Version) -> None:
        for version in proved:
            await self.end(version, await self.begin(version))

    async def roll_out(self, policy: Policy = POLICY) -> Rollout:
        """`default` goes from version 1 to version 2."""
        return await self.rollouts.start(TENANT, "bot", "default", 2, policy, started_by="key_1")

    async def look(self, begun: Rollout, *, times: int = 3) -> Rollout:
        """Where the rollout is after some looks, with all the requests and time that it needs."""
        for _ in range(times):
            self.clock.now += 1
            tally = Tally(requests=self.clock.now)  # more each time
            await self.rollouts.keep("gateway", {(begun.id, begun.candidate_id): tally})
            await self.watch.look()
        return (await self.rollouts.show(TENANT, "bot", begun.id))[0]

    async def sees_garbage(self, begun: Rollout, *waiting: Version) -> None:
        """It waits for these proofs, whatever comes, and then goes back."""
        assert (await self.look(begun)).status is Status.RUNNING
        await self.prove(*waiting)
        ended = await self.look(begun)
        assert ended.status is Status.ROLLED_BACK
        assert "-4.00 a token, and -1.00 by the version before" in ended.reason


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gateway(engine: AsyncEngine, base: BaseModel, clock: Clock) -> Gateway:
    return Gateway(engine, base, clock, ProofPolicy.FLAG)


@pytest.fixture
async def two(publish: Publish, tmp_path: Path, engine: AsyncEngine, base: BaseModel) -> list[Version]:
    """Versions 1 and 2 of `bot`, not proved yet; its name stands for the first."""
    made = [await publish(write_good(tmp_path / f"v{seed}", seed=seed)) for seed in (11, 12)]
    await Aliases(engine, base).move(TENANT, "bot", "default", [(1, 1)], moved_by="key_1")
    async with writing(engine) as connection:
        await connection.execute(update(proofs.proofs).values(due_at=0))
    return made


async def set_examples(gateway: Gateway, given: Sequence[Example] = EXAMPLES) -> None:
    await gateway.proofs.set_examples(TENANT, "bot", given)


async def test_the_old_versions_proof_that_waits_is_waited_for(gateway: Gateway, two: list[Version]) -> None:
    """Behind others, after its delay, or after a try that failed."""
    await set_examples(gateway)
    await gateway.prove(two[1])
    await gateway.sees_garbage(await gateway.roll_out(), two[0])


@pytest.mark.parametrize("running", [1, 2])
async def test_a_proof_that_runs_while_the_examples_come_is_run_again(
    gateway: Gateway, two: list[Version], running: int
) -> None:
    """Of either version: it ends without them, before the rollout or in it."""
    one, other = two if running == 1 else reversed(two)
    late = await gateway.begin(one)
    await set_examples(gateway)
    await gateway.prove(other)
    begun = await gateway.roll_out()
    assert (await gateway.look(begun)).status is Status.RUNNING
    await gateway.end(one, late)
    await gateway.sees_garbage(begun, one)


@pytest.mark.parametrize("running", [1, 2])
async def test_a_proof_whose_examples_change_meanwhile_is_run_again(
    gateway: Gateway, two: list[Version], running: int
) -> None:
    """Its score is of the old ones, which the other version was never asked."""
    await set_examples(gateway, OTHERS)
    one, other = two if running == 1 else reversed(two)
    late = await gateway.begin(one)
    await set_examples(gateway)
    await gateway.end(one, late)
    await gateway.prove(other)
    await gateway.sees_garbage(await gateway.roll_out(), one)


async def test_examples_that_change_in_a_rollout_are_what_it_goes_by(gateway: Gateway, two: list[Version]) -> None:
    """Between the two new proofs neither the old scores count nor one of each."""
    await set_examples(gateway, OTHERS)
    begun = await gateway.roll_out()
    await set_examples(gateway)
    await gateway.prove(two[1])
    await gateway.sees_garbage(begun, two[0])


async def test_scores_of_examples_that_are_gone_say_nothing(gateway: Gateway, two: list[Version]) -> None:
    await set_examples(gateway)
    await gateway.prove(*two)
    await set_examples(gateway, [])
    await gateway.prove(*two)
    ended = await gateway.look(await gateway.roll_out())
    assert (ended.status, ended.reason) == (Status.COMPLETED, "not compared on the examples: there are none")


async def test_what_was_proved_before_the_examples_came_is_proved_again(gateway: Gateway, two: list[Version]) -> None:
    """Where they did not see to it themselves: an old version, or one from before there were examples."""
    await gateway.prove(*two)
    async with writing(gateway.engine) as connection:
        await examples.keep(connection, two[0].adapter_id, EXAMPLES, 0)
    await gateway.sees_garbage(await gateway.roll_out(), *two)


async def test_what_was_never_to_be_proved_is_proved(gateway: Gateway, two: list[Version]) -> None:
    """Versions of a database from before there were proofs."""
    await set_examples(gateway)
    async with writing(gateway.engine) as connection:
        await connection.execute(delete(proofs.proofs))
    await gateway.sees_garbage(await gateway.roll_out(), *two)


@pytest.mark.parametrize("killed", [1, 2])
async def test_a_gateway_that_dies_in_a_proof_costs_its_lease(
    gateway: Gateway, two: list[Version], clock: Clock, killed: int
) -> None:
    """Another one takes the proof over, with the examples that came in between."""
    one, other = two if killed == 1 else reversed(two)
    await gateway.begin(one, lease_s=90)
    await set_examples(gateway)
    await gateway.prove(other)
    begun = await gateway.roll_out()
    assert (await gateway.look(begun)).status is Status.RUNNING
    clock.now += 90
    await gateway.sees_garbage(begun, one)


async def test_good_work_completes_once_it_was_compared(gateway: Gateway, two: list[Version]) -> None:
    """And there is nothing to add."""
    gateway.scores[2] = LIKELY
    await set_examples(gateway)
    await gateway.prove(*two)
    ended = await gateway.look(await gateway.roll_out())
    assert (ended.status, ended.reason) == (Status.COMPLETED, "")


async def test_what_cannot_be_compared_completes_and_its_history_says_why(
    gateway: Gateway, engine: AsyncEngine, base: BaseModel, clock: Clock, two: list[Version], subtests: pytest.Subtests
) -> None:
    """No examples, an old version that no engine takes or of another base model, no proofs, none asked for."""
    aliases = Aliases(engine, base)
    off = Gateway(engine, base, clock, ProofPolicy.OFF)
    unproved = Policy(steps=(100,), step_s=1, min_requests=1, needs_proof=False)

    async def completed(of: Gateway, policy: Policy = POLICY) -> str:
        ended = await of.look(await of.roll_out(policy))
        assert ended.status is Status.COMPLETED
        last = (await aliases.history(TENANT, "bot"))[0]
        assert last.reason == f"rollout completed: {ended.reason}"
        await aliases.move(TENANT, "bot", "default", [(1, 1)], moved_by="key_1")
        return ended.reason.removeprefix("not compared on the examples: ")

    with subtests.test("no examples"):
        await gateway.prove(two[1])
        assert await completed(gateway) == "there are none"
    await set_examples(gateway)
    with subtests.test("no proofs"):
        assert await completed(off) == "proofs are off (TAILOR_PROOF)"
    with subtests.test("none asked for"):
        assert await completed(gateway, unproved) == "needs_proof is false"
    await gateway.prove(two[1])
    for reason in (Reason.ENGINE_REFUSED, Reason.FINGERPRINT_DIFFERS):
        with subtests.test(reason.value):
            async with writing(engine) as connection:
                here = proofs.proofs.c.version_id == two[0].id
                await connection.execute(update(proofs.proofs).where(here).values(status="failed", reason=reason))
            assert await completed(gateway) == f"the proof of version 1 says: failed ({reason.value})"
    with subtests.test("another base model"):
        async with writing(engine) as connection:
            here = versions.c.id == two[0].id
            await connection.execute(update(versions).where(here).values(base_fingerprint="another's"))
        begun = await gateway.roll_out()
        assert "version 1 was made for another base model" in (await gateway.look(begun)).reason


async def test_an_old_version_that_fails_when_it_is_asked_again_is_no_measure(
    gateway: Gateway, two: list[Version]
) -> None:
    """It is asked once, not over and over."""
    await gateway.prove(*two)
    async with writing(gateway.engine) as connection:
        await examples.keep(connection, two[0].adapter_id, EXAMPLES, 0)
    begun = await gateway.roll_out()
    assert (await gateway.look(begun)).status is Status.RUNNING
    await gateway.prove(two[1])
    again = await gateway.begin(two[0])
    await gateway.end(two[0], again, status=ProofStatus.FAILED, reason=Reason.ENGINE_REFUSED)
    ended = await gateway.look(begun)
    assert ended.status is Status.COMPLETED
    assert "the proof of version 1 says: failed (engine_refused)" in ended.reason
    async with reading(gateway.engine) as connection:
        assert (await proofs.find(connection, two[0].id)).status is ProofStatus.FAILED


@pytest.mark.parametrize(
    ("refused", "scores", "status", "reason"),
    [
        ({1: (1,), 2: (1,)}, {1: LIKELY, 2: LIKELY}, Status.COMPLETED, "compared without examples[1]"),
        ({1: (1,), 2: (1,)}, {1: LIKELY, 2: UNLIKELY}, Status.ROLLED_BACK, "(compared without examples[1]"),
        ({1: (0, 1), 2: (0, 1)}, {1: 0, 2: 0}, Status.COMPLETED, "not compared on the examples: the engine refuses"),
        ({1: (1,)}, {1: UNLIKELY, 2: LIKELY}, Status.COMPLETED, "refused none of version 2 and examples[1] of version"),
        ({2: (0, 1)}, {1: LIKELY, 2: 0}, Status.COMPLETED, "refused examples[0], examples[1] of version 2 and none"),
    ],
)
async def test_examples_that_the_engine_refuses_are_compared_by_nobody(
    gateway: Gateway,
    two: list[Version],
    refused: dict[int, tuple[int, ...]],
    scores: dict[int, float],
    status: Status,
    reason: str,
) -> None:
    """Where it refuses the same of both versions, the others are; a rollout waits for none, and says so."""
    gateway.refused, gateway.scores = refused, scores
    await set_examples(gateway, [*EXAMPLES, *OTHERS])
    await gateway.prove(*two)
    ended = await gateway.look(await gateway.roll_out())
    assert ended.status is status
    assert reason in ended.reason


async def test_a_refusal_of_other_examples_is_asked_again(gateway: Gateway, two: list[Version]) -> None:
    """What was refused of those that there were before says nothing of those that there are."""
    gateway.refused = {1: (0,), 2: (0,)}
    await set_examples(gateway, OTHERS)
    await gateway.prove(*two)
    gateway.refused = {}
    await set_examples(gateway)
    await gateway.sees_garbage(await gateway.roll_out(), *two)


@pytest.mark.parametrize("missing", [1, 2])
async def test_a_proof_that_never_comes_is_not_waited_for_for_ever(
    gateway: Gateway, two: list[Version], clock: Clock, missing: int
) -> None:
    """As with requests that never come: what was not tried out is not trusted."""
    await set_examples(gateway)
    await gateway.prove(two[2 - missing])
    begun = await gateway.roll_out()
    assert (await gateway.look(begun)).status is Status.RUNNING
    clock.now += GIVE_UP_S
    ended = await gateway.look(begun)
    assert ended.status is Status.ROLLED_BACK
    assert "no proof, or no comparison" in ended.reason
