"""Aliases and rollouts on a real database: who moved what, the way back, and who decides."""

import asyncio
from pathlib import Path

import pytest

from adapter_store.aliases import Aliases, MoveKind, Split
from adapter_store.base_model import BaseModel
from adapter_store.catalog import Fallback, Version
from adapter_store.changes import changes_since
from adapter_store.engine import AsyncEngine
from adapter_store.errors import (
    AdapterNotFound,
    AdapterStoreError,
    AliasInvalid,
    AliasKept,
    AliasNotFound,
    NothingToRollBack,
    RolloutInvalid,
    RolloutNotFound,
    RolloutOver,
    RolloutRunning,
    TooManyAliases,
    VersionInUse,
)
from adapter_store.rollouts import Policy, Rollout, Rollouts, Status, Tally
from adapter_store.store import AdapterStore
from adapter_store.transactions import reading
from tests.bad_adapters import write_good
from tests.integration.store.conftest import OTHER, TENANT, Publish

BY = "key_1"


@pytest.fixture
def aliases(engine: AsyncEngine, base: BaseModel) -> Aliases:
    return Aliases(engine, base)


@pytest.fixture
async def three(publish: Publish, tmp_path: Path) -> list[Version]:
    """Versions 1 to 3 of `bot`; the name stands for the third."""
    return [await publish(write_good(tmp_path / f"v{seed}", seed=seed)) for seed in (11, 12, 13)]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rollouts(engine: AsyncEngine, base: BaseModel, clock: Clock) -> Rollouts:
    return Rollouts(engine, base.fingerprint, clock=clock)


async def stands_for(store: AdapterStore, model: str) -> list[tuple[int, int]]:
    found = await store.resolve(TENANT, model)
    if isinstance(found, Split):
        return [(share.version.number, share.weight) for share in found.shares]
    return [(found.number, 1)]


async def test_a_model_names_an_alias_a_version_or_its_id(
    aliases: Aliases, store: AdapterStore, three: list[Version]
) -> None:
    """`name`, `name:alias`, `name@3` and `ft:` names; all else does not exist."""
    await aliases.move(TENANT, "bot", "staging", [(2, 1)], moved_by=BY)
    assert await stands_for(store, "bot") == await stands_for(store, "bot:default") == [(3, 1)]
    assert await stands_for(store, "bot:staging") == [(2, 1)]
    assert await stands_for(store, "bot@1") == [(1, 1)]
    fine_tuned = store.fine_tuned_name(three[0])
    assert fine_tuned.startswith("ft:base::bot:")
    assert await store.resolve(TENANT, fine_tuned) == await store.resolve(TENANT, fine_tuned.replace("::", ":acme:"))
    assert await stands_for(store, fine_tuned) == [(1, 1)]
    for model in (
        "bot:none",
        "bot:",
        "bot:staging@1",
        "bot@1:staging",
        "bot:Staging",
        "ft:base::bot:",
        "ft:other" + fine_tuned[7:],
        "ft:base::tob" + fine_tuned[12:],
        fine_tuned + "0",
        "ft:base",
        "bot:%",
        "bot:staging\n",
    ):
        with pytest.raises(AdapterNotFound):
            await store.resolve(TENANT, model)
    for model in ("bot:staging", fine_tuned):
        with pytest.raises(AdapterNotFound):
            await store.resolve(OTHER, model)


async def test_every_move_is_in_the_history_and_can_be_taken_back(
    aliases: Aliases, store: AdapterStore, engine: AsyncEngine, three: list[Version]
) -> None:
    """Rolling back twice goes back two moves; who, why and when stay written down."""
    async with reading(engine) as connection:
        seen = (await changes_since(connection, 0))[-1].seq
    await aliases.move(TENANT, "bot", "default", [(1, 1)], moved_by=BY, reason="better")
    await aliases.move(TENANT, "bot", "default", [(2, 90), (3, 10)], moved_by="key_2")
    assert await stands_for(store, "bot") == [(2, 90), (3, 10)]
    back = await aliases.roll_back(TENANT, "bot", "default", moved_by=BY)
    assert back.shares == ((1, 1),)
    back = await aliases.roll_back(TENANT, "bot", "default", moved_by=BY, reason="all wrong")
    assert back.shares == ((3, 1),)
    assert await stands_for(store, "bot") == [(3, 1)]
    moves = await aliases.history(TENANT, "bot")
    assert [(move.kind, move.moved_by, move.before, move.after) for move in moves[:4]] == [
        (MoveKind.ROLLBACK, BY, ((1, 1),), ((3, 1),)),
        (MoveKind.ROLLBACK, BY, ((2, 90), (3, 10)), ((1, 1),)),
        (MoveKind.MOVE, "key_2", ((1, 1),), ((2, 90), (3, 10))),
        (MoveKind.MOVE, BY, ((3, 1),), ((1, 1),)),
    ]
    assert [move.reason for move in moves[:4]] == ["all wrong", "rolled back move 5", "", "better"]
    assert [move.kind for move in moves[4:]] == [MoveKind.PUBLISH] * 3
    assert await aliases.history(TENANT, "bot", before=moves[0].number, limit=2) == moves[1:3]
    assert await aliases.history(TENANT, "bot", alias="none") == ()
    async with reading(engine) as connection:
        assert len(await changes_since(connection, seen)) == 4
    await aliases.roll_back(TENANT, "bot", "default", moved_by=BY)
    await aliases.roll_back(TENANT, "bot", "default", moved_by=BY)
    with pytest.raises(NothingToRollBack):
        await aliases.roll_back(TENANT, "bot", "default", moved_by=BY)
    assert await stands_for(store, "bot") == [(1, 1)]


async def test_moving_to_where_it_stands_is_no_move(aliases: Aliases, three: list[Version]) -> None:
    """A call that is repeated leaves one trace."""
    for _ in range(2):
        await aliases.move(TENANT, "bot", "default", [(1, 3), (2, 1)], moved_by=BY)
    assert len(await aliases.history(TENANT, "bot")) == 4


WRONG_TARGETS: list[tuple[str, list[tuple[int, int]], type[AdapterStoreError]]] = [
    ("Upper", [(1, 1)], AliasInvalid),
    ("a/b", [(1, 1)], AliasInvalid),
    ("", [(1, 1)], AliasInvalid),
    ("x" * 65, [(1, 1)], AliasInvalid),
    ("ok", [], AliasInvalid),
    ("ok", [(1, 1), (1, 1)], AliasInvalid),
    ("ok", [(1, 0)], AliasInvalid),
    ("ok", [(1, 10_001)], AliasInvalid),
    ("ok", [(number, 1) for number in range(1, 10)], AliasInvalid),
    ("ok", [(4, 1)], AdapterNotFound),
]


async def test_a_wrong_target_moves_nothing(aliases: Aliases, three: list[Version], subtests: pytest.Subtests) -> None:
    """The error says what is wrong, and the history stays as it is."""
    for alias, shares, error in WRONG_TARGETS:
        with subtests.test(alias=alias, shares=shares), pytest.raises(error):
            await aliases.move(TENANT, "bot", alias, shares, moved_by=BY)
    assert len(await aliases.history(TENANT, "bot")) == 3
    assert [found.name for found in await aliases.list(TENANT, "bot")] == ["default"]


async def test_an_alias_can_be_removed_and_the_default_one_cannot(
    aliases: Aliases, store: AdapterStore, three: list[Version]
) -> None:
    """Its shares go with it; the history keeps it."""
    await aliases.move(TENANT, "bot", "staging", [(1, 1), (2, 1)], moved_by=BY, fallback=Fallback.BASE)
    assert (await aliases.show(TENANT, "bot", "staging")).fallback is Fallback.BASE
    await aliases.remove(TENANT, "bot", "staging", moved_by=BY)
    with pytest.raises(AdapterNotFound):
        await store.resolve(TENANT, "bot:staging")
    with pytest.raises(AliasNotFound):
        await aliases.remove(TENANT, "bot", "staging", moved_by=BY)
    with pytest.raises(AliasKept):
        await aliases.remove(TENANT, "bot", "default", moved_by=BY)
    assert (await aliases.history(TENANT, "bot"))[0].kind is MoveKind.REMOVE
    await store.delete(TENANT, "bot")
    with pytest.raises(AdapterNotFound):
        await aliases.list(TENANT, "bot")


async def test_an_adapter_has_a_bounded_number_of_aliases(aliases: Aliases, three: list[Version]) -> None:
    """64, the default one included."""
    for number in range(63):
        await aliases.move(TENANT, "bot", f"alias-{number}", [(1, 1)], moved_by=BY)
    with pytest.raises(TooManyAliases):
        await aliases.move(TENANT, "bot", "one-more", [(1, 1)], moved_by=BY)


async def test_another_tenants_adapter_looks_like_a_missing_one(
    aliases: Aliases, rollouts: Rollouts, three: list[Version]
) -> None:
    """To every call."""
    begun = await rollouts.start(TENANT, "bot", "default", 1, Policy(), started_by=BY)
    for call in (
        aliases.list(OTHER, "bot"),
        aliases.show(OTHER, "bot", "default"),
        aliases.move(OTHER, "bot", "default", [(1, 1)], moved_by=BY),
        aliases.roll_back(OTHER, "bot", "default", moved_by=BY),
        aliases.remove(OTHER, "bot", "x", moved_by=BY),
        aliases.set_fallback(OTHER, "bot", "default", Fallback.BASE),
        aliases.history(OTHER, "bot"),
        rollouts.start(OTHER, "bot", "default", 1, Policy(), started_by=BY),
        rollouts.list(OTHER, "bot"),
        rollouts.show(OTHER, "bot", begun.id),
        rollouts.cancel(OTHER, "bot", begun.id, by=BY),
    ):
        with pytest.raises(AdapterNotFound):
            await call


async def test_moves_that_race_leave_a_chain_without_gaps(aliases: Aliases, three: list[Version]) -> None:
    """Each begins where the one before it ended."""
    targets = [1, 2, 3] * 4
    await asyncio.gather(*(aliases.move(TENANT, "bot", "default", [(number, 1)], moved_by=BY) for number in targets))
    moves = (await aliases.history(TENANT, "bot"))[::-1]
    assert [move.before for move in moves[1:]] == [move.after for move in moves[:-1]]
    assert [move.number for move in moves] == list(range(1, len(moves) + 1))


def seen(requests: int, errors: int = 0) -> Tally:
    tally = Tally()
    for number in range(requests):
        tally.note(failed=number < errors, latency_s=0.1)
    return tally


POLICY = Policy(steps=(10, 50, 100), step_s=60, min_requests=10, give_up_s=600)


@pytest.fixture
async def begun(rollouts: Rollouts, three: list[Version]) -> Rollout:
    """`bot` goes from version 3 to version 1."""
    return await rollouts.start(TENANT, "bot", "default", 1, POLICY, started_by=BY)


async def now(rollouts: Rollouts, begun: Rollout) -> Rollout:
    return (await rollouts.show(TENANT, "bot", begun.id))[0]


async def test_a_good_version_goes_all_the_way(
    rollouts: Rollouts, aliases: Aliases, store: AdapterStore, clock: Clock, begun: Rollout
) -> None:
    """Step by step, each with its time and its requests; then the alias stands for it alone."""
    assert await stands_for(store, "bot") == [(3, 90), (1, 10)]
    expected = {1: [(3, 50), (1, 50)], 2: [(1, 1)], 3: [(1, 1)]}
    for step, shares in expected.items():
        clock.now += 59
        await rollouts.keep("gateway", {(begun.id, begun.candidate_id): seen(10 * step)})
        assert await rollouts.advance(await now(rollouts, begun), proof="proved") is None  # not long enough
        clock.now += 1
        assert await rollouts.advance(await now(rollouts, begun)) is None  # not proved
        moved = await rollouts.advance(await now(rollouts, begun), proof="proved")
        assert moved is not None
        assert await stands_for(store, "bot") == shares
        clock.now += 60
        assert await rollouts.advance(moved, proof="proved") is None  # no requests in this step yet
        clock.now -= 60
    ended = await now(rollouts, begun)
    assert (ended.status, ended.percent) == (Status.COMPLETED, 100)
    found = await store.resolve(TENANT, "bot")
    assert isinstance(found, Version)
    assert found.rollout is None
    assert await rollouts.running() == ()
    assert {move.kind for move in (await aliases.history(TENANT, "bot"))[:4]} == {MoveKind.ROLLOUT}
    with pytest.raises(RolloutOver):
        await rollouts.cancel(TENANT, "bot", begun.id, by=BY)


async def test_a_bad_version_goes_back_with_the_reason_written_down(
    rollouts: Rollouts, aliases: Aliases, store: AdapterStore, begun: Rollout
) -> None:
    """At once, judged by what all gateways have seen together."""
    await rollouts.keep("one", {(begun.id, begun.candidate_id): seen(2, 2), (begun.id, begun.baseline_id): seen(50)})
    assert await rollouts.advance(begun, proof="proved") is None
    await rollouts.keep("two", {(begun.id, begun.candidate_id): seen(2, 2)})
    ended = await rollouts.advance(begun, proof="proved")
    assert ended is not None
    assert (ended.status, ended.percent) == (Status.ROLLED_BACK, 0)
    assert "4 of 4 requests failed" in ended.reason
    assert await stands_for(store, "bot") == [(3, 1)]
    last = (await aliases.history(TENANT, "bot"))[0]
    assert (last.kind, last.moved_by) == (MoveKind.ROLLBACK, "")
    assert ended.reason in last.reason


async def test_a_version_whose_proof_failed_goes_back(rollouts: Rollouts, store: AdapterStore, begun: Rollout) -> None:
    """Whatever its requests say."""
    ended = await rollouts.advance(begun, proof="no_effect")
    assert ended is not None
    assert ended.status is Status.ROLLED_BACK
    assert "no_effect" in ended.reason
    assert await stands_for(store, "bot") == [(3, 1)]


async def test_a_version_that_nobody_asks_goes_back_in_the_end(
    rollouts: Rollouts, store: AdapterStore, clock: Clock, begun: Rollout
) -> None:
    """What was not tried out is not trusted."""
    clock.now += 600
    ended = await rollouts.advance(begun, proof="proved")
    assert ended is not None
    assert (ended.status, await stands_for(store, "bot")) == (Status.ROLLED_BACK, [(3, 1)])


async def test_one_of_many_gateways_takes_each_decision(
    rollouts: Rollouts, aliases: Aliases, clock: Clock, begun: Rollout
) -> None:
    """The others find it taken."""
    clock.now += 60
    await rollouts.keep("gateway", {(begun.id, begun.candidate_id): seen(10)})
    decided = await asyncio.gather(*(rollouts.advance(begun, proof="proved") for _ in range(5)))
    assert sum(found is not None for found in decided) == 1
    assert len(await aliases.history(TENANT, "bot")) == 5


async def test_whoever_moves_the_alias_ends_its_rollout(
    rollouts: Rollouts, aliases: Aliases, store: AdapterStore, publish: Publish, tmp_path: Path, begun: Rollout
) -> None:
    """By hand or by publishing; what the rollout would have done next is not done."""
    await publish(write_good(tmp_path / "v4", seed=14))
    assert (await now(rollouts, begun)).status is Status.SUPERSEDED
    assert await stands_for(store, "bot") == [(4, 1)]
    assert await rollouts.advance(begun, proof="failed") is None
    assert await stands_for(store, "bot") == [(4, 1)]
    again = await rollouts.start(TENANT, "bot", "default", 1, POLICY, started_by=BY)
    await aliases.move(TENANT, "bot", "default", [(2, 1)], moved_by=BY)
    assert (await now(rollouts, again)).status is Status.SUPERSEDED
    third = await rollouts.start(TENANT, "bot", "default", 1, POLICY, started_by=BY)
    await aliases.roll_back(TENANT, "bot", "default", moved_by=BY)
    assert (await now(rollouts, third)).status is Status.SUPERSEDED
    assert await stands_for(store, "bot") == [(2, 1)]


async def test_a_rollout_can_be_cancelled(rollouts: Rollouts, store: AdapterStore, begun: Rollout) -> None:
    """The alias stands for the version before, alone."""
    ended = await rollouts.cancel(TENANT, "bot", begun.id, by=BY, reason="second thoughts")
    assert (ended.status, ended.reason) == (Status.CANCELLED, "second thoughts")
    assert await stands_for(store, "bot") == [(3, 1)]


async def test_where_a_rollout_may_go_back_to_is_in_use(
    rollouts: Rollouts, store: AdapterStore, three: list[Version]
) -> None:
    """Also in its last step, where the alias has no share of it; by force it goes, and the rollout with it."""
    whole = Policy(steps=(100,))
    begun = await rollouts.start(TENANT, "bot", "default", 1, whole, started_by=BY)
    assert await stands_for(store, "bot") == [(1, 1)]
    with pytest.raises(VersionInUse, match="default"):
        await store.erasures.request(TENANT, "bot", 3)
    await store.erasures.request(TENANT, "bot", 3, force=True)
    assert (await now(rollouts, begun)).status is Status.SUPERSEDED
    assert await rollouts.advance(begun, proof="failed") is None  # there is nothing to go back to
    found = await store.resolve(TENANT, "bot")
    assert isinstance(found, Version)
    assert (found.number, found.rollout) == (1, None)


async def test_a_rollout_needs_somewhere_to_go(
    rollouts: Rollouts, aliases: Aliases, store: AdapterStore, begun: Rollout
) -> None:
    """One at a time, from one version to another that is there."""
    with pytest.raises(RolloutRunning):
        await rollouts.start(TENANT, "bot", "default", 2, POLICY, started_by=BY)
    await rollouts.cancel(TENANT, "bot", begun.id, by=BY)
    with pytest.raises(RolloutInvalid):
        await rollouts.start(TENANT, "bot", "default", 3, POLICY, started_by=BY)
    with pytest.raises(AdapterNotFound):
        await rollouts.start(TENANT, "bot", "default", 9, POLICY, started_by=BY)
    with pytest.raises(AliasNotFound):
        await rollouts.start(TENANT, "bot", "staging", 1, POLICY, started_by=BY)
    with pytest.raises(RolloutNotFound):
        await rollouts.show(TENANT, "bot", "rol_0")
    await aliases.move(TENANT, "bot", "default", [(1, 1), (2, 1)], moved_by=BY)
    with pytest.raises(RolloutRunning):
        await rollouts.start(TENANT, "bot", "default", 3, POLICY, started_by=BY)
    assert [found.id for found in await rollouts.list(TENANT, "bot")] == [begun.id]
    await store.delete(TENANT, "bot")
    assert await rollouts.running() == ()
