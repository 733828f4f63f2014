"""What a gateway knows of one replica's adapters, with an agent that is a plain class."""

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from adapter_store.catalog import Provenance, Version
from adapter_store.ids import AdapterId, TenantId, VersionId
from gateway.errors import AdapterNotLoadable
from gateway.journal import Meter
from gateway.replicas.client import AgentRefusedError, LoadReport, ReplicaClient, ResidentAdapter
from gateway.replicas.holdings import Resident
from gateway.replicas.residency import LoadFailed, Residency, SlowLoad, TenantTurns


def version(digest: str = "d", tenant: str = "t") -> Version:
    return Version(
        id=VersionId("v"),
        adapter_id=AdapterId("a"),
        tenant_id=TenantId(tenant),
        adapter_name="bot",
        number=1,
        digest=digest,
        file_hashes=bytes(64),
        config_bytes=1,
        weights_bytes=1,
        rank=8,
        modules=(),
        base_fingerprint="f",
        provenance=Provenance.UPLOAD,
        created_at=0,
    )


def held(residency: Residency) -> Resident | None:
    """What a request for the version would use."""
    return residency.holdings.use((TenantId("t"), "d"), version())


class Agent:
    """Loads what it is told; a test may hook in before it answers."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.refusal: Exception | None = None
        self.before_answer: Any = lambda: None

    async def load(self, name: str, wanted: Version, timeout_s: float) -> LoadReport:
        self.loaded.append(name)
        self.before_answer()
        if self.refusal is not None:
            raise self.refusal
        return LoadReport(name, "gpu", 0.0, 0.0)

    async def unload(self, name: str, timeout_s: float) -> None:
        self.unloaded.append(name)


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def residency(agent: Agent) -> Residency:
    return Residency(cast(ReplicaClient, agent), load_timeout_s=1)


@pytest.mark.timeout(10)
async def test_a_request_between_a_loads_end_and_its_callbacks_is_answered(residency: Residency, agent: Agent) -> None:
    """It came in the one turn of the event loop in which the load was done and not yet written down."""
    late: list[asyncio.Task[Resident]] = []
    agent.before_answer = lambda: late.append(asyncio.ensure_future(residency.hold(version())))
    first = await residency.hold(version())
    assert await late[0] is first
    assert len(agent.loaded) == 1


async def test_tenants_with_equal_bytes_have_names_of_their_own(residency: Residency, agent: Agent) -> None:
    """A name in the engine belongs to one tenant."""
    one, other = await residency.hold(version(tenant="t1")), await residency.hold(version(tenant="t2"))
    assert one.name != other.name
    assert len(agent.loaded) == 2


async def test_a_refused_load_is_told_and_tried_again(residency: Residency, agent: Agent) -> None:
    """The next request starts afresh, under a new name."""
    agent.refusal = AgentRefusedError(503, "load_queue_full")
    with pytest.raises(AdapterNotLoadable):
        await residency.hold(version())
    agent.refusal = None
    await residency.hold(version())
    assert len(set(agent.loaded)) == 2


async def test_every_name_of_a_version_leaves_the_engine(residency: Residency, agent: Agent) -> None:
    """Two gateways may have loaded it at the same time under two names."""
    mine = await residency.hold(version())
    reported = [
        ResidentAdapter(name=name, tier="gpu", bytes=1, last_used=0, owner="t", digest="d")
        for name in (mine.name, "a-0000")
    ]
    residency.adopt(reported, asked_at=0)
    await residency.unload(TenantId("t"), ["d"])
    assert sorted(agent.unloaded) == sorted([mine.name, "a-0000"])
    assert held(residency) is None


async def test_another_version_of_the_same_bytes_is_told_and_counted_as_itself(residency: Residency) -> None:
    """What a resident keeps for its answers is that of one version; asked by the same one, it stays."""
    first, second = version(), replace(version(), number=2)
    resident = await residency.hold(first)
    resident.receipt, resident.meter = b"of the first", Meter("t", "bot", 1)
    assert residency.holdings.use(resident.key, first) is resident
    assert resident.receipt
    assert resident.meter is not None
    assert residency.holdings.use(resident.key, second) is resident
    assert resident.version == second
    assert not resident.receipt
    assert resident.meter is None


async def test_an_erased_version_is_not_restored(residency: Residency) -> None:
    """A new engine is given what was held, without it."""
    await residency.hold(version())
    await residency.hold(version("other"))
    residency.forget_adapters(TenantId("t"), ["d"])
    assert [held.digest for held in residency.start_over()] == ["other"]


async def test_a_load_newer_than_the_report_is_kept(residency: Residency, agent: Agent) -> None:
    """A report that was asked for before the load ended does not know it yet."""
    await residency.hold(version())
    residency.adopt([], asked_at=0)
    assert held(residency) is not None
    residency.adopt([], asked_at=1e12)
    assert held(residency) is None


class SlowAgent(Agent):
    """Answers loads only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()

    async def load(self, name: str, wanted: Version, timeout_s: float) -> LoadReport:
        self.loaded.append(f"{wanted.tenant_id} {wanted.digest}")
        await self.answer.wait()
        return LoadReport(name, "gpu", 0.0, 0.0)


@pytest.fixture
def slow() -> SlowAgent:
    return SlowAgent()


@pytest.fixture
def slowly(slow: SlowAgent) -> Residency:
    return Residency(cast(ReplicaClient, slow), load_timeout_s=10, patience_s=0.05)


async def test_a_slow_load_gives_its_turn_away_and_goes_on(slowly: Residency, slow: SlowAgent) -> None:
    """Who can go elsewhere is told; who is patient gets it when it comes; other loads go past it."""
    patient = asyncio.create_task(slowly.hold(version()))
    with pytest.raises(SlowLoad):
        await slowly.hold(version(), patient=False)
    other = asyncio.create_task(slowly.hold(version("other")))
    while len(slow.loaded) < 2:
        await asyncio.sleep(0)
    slow.answer.set()
    assert (await patient).key == ("t", "d")
    assert (await other).key == ("t", "other")
    assert held(slowly) is not None


async def test_a_load_that_may_not_be_is_not_made(slowly: Residency, slow: SlowAgent) -> None:
    """`allow` is asked by whoever would start a load, not by those who join one."""
    asked: list[str] = []

    async def note(who: str) -> None:
        asked.append(who)

    first = asyncio.create_task(slowly.hold(version(), allow=lambda: note("first")))
    second = asyncio.create_task(slowly.hold(version(), allow=lambda: note("second")))
    while not slow.loaded:
        await asyncio.sleep(0)
    slow.answer.set()
    assert await first is await second
    assert asked == ["first"]

    async def refuse() -> None:
        raise AdapterNotLoadable("no")

    with pytest.raises(AdapterNotLoadable):
        await slowly.hold(version("other"), allow=refuse)
    assert len(slow.loaded) == 1


async def test_who_may_have_a_load_is_asked_for_one_at_a_time(slowly: Residency, slow: SlowAgent) -> None:
    """Of those who come while it is being asked, the next is where the first is refused or leaves; the others join."""
    asked: list[str] = []
    answers = {name: asyncio.get_running_loop().create_future() for name in ("leaves", "refused", "allowed", "joins")}

    async def ask(name: str) -> None:
        asked.append(name)
        await answers[name]

    def hold(name: str) -> asyncio.Task[Resident]:
        return asyncio.create_task(slowly.hold(version(), allow=lambda: ask(name)))

    async def until_asked(name: str) -> None:
        while asked[-1:] != [name]:
            await asyncio.sleep(0)

    waiting = {name: hold(name) for name in answers}
    await until_asked("leaves")
    waiting["leaves"].cancel()
    await until_asked("refused")
    answers["refused"].set_exception(AdapterNotLoadable("no"))
    with pytest.raises(AdapterNotLoadable):
        await waiting["refused"]
    await until_asked("allowed")
    answers["allowed"].set_result(None)
    slow.answer.set()
    assert await waiting["allowed"] is await waiting["joins"]
    assert asked == ["leaves", "refused", "allowed"]
    assert len(slow.loaded) == 1


async def test_loads_that_wait_go_round_the_tenants(slow: SlowAgent) -> None:
    """A tenant with many cold adapters does not put all of them before another's one."""
    residency = Residency(cast(ReplicaClient, slow), load_timeout_s=10, patience_s=10)
    slow.answer.set()
    wanted = [version(f"d{number}", "many") for number in range(4)] + [version("d", "one")]
    await asyncio.gather(*(residency.hold(each) for each in wanted))
    assert slow.loaded == ["many d0", "many d1", "one d", "many d2", "many d3"]


async def test_when_the_replica_goes_all_who_wait_for_a_load_are_told(slowly: Residency, slow: SlowAgent) -> None:
    """At once, not when the load's time is over; the next load there starts afresh."""
    waiting = [asyncio.create_task(slowly.hold(version(digest))) for digest in ("d", "d", "other")]
    while not slow.loaded:
        await asyncio.sleep(0)
    slowly.abandon()
    for failed in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failed, LoadFailed)
        assert failed.again
    slow.answer.set()
    assert (await slowly.hold(version())).key == ("t", "d")


async def test_a_cancelled_wait_leaves_the_turn_to_the_next(slow: SlowAgent) -> None:
    """Also where the turn came in the very moment of the cancellation."""
    turns = TenantTurns()
    await turns.take(TenantId("a"))
    waiting = [asyncio.create_task(turns.take(TenantId(name))) for name in ("b", "c", "d")]
    await asyncio.sleep(0)
    waiting[0].cancel()
    turns.give()
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not waiting[2].cancelled()
    turns.give()
    await asyncio.wait_for(turns.take(TenantId("e")), 1)
