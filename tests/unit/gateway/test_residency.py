"""What a gateway knows of one replica's adapters, with an agent that is a plain class."""

import asyncio
from typing import Any, cast

import pytest

from adapter_store.catalog import Provenance, Version
from adapter_store.ids import AdapterId, TenantId, VersionId
from gateway.errors import AdapterNotLoadable
from gateway.replicas.client import AgentRefusedError, LoadReport, ReplicaClient, ResidentAdapter
from gateway.replicas.residency import Residency, Resident


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


async def test_every_name_of_a_deleted_version_leaves_the_engine(residency: Residency, agent: Agent) -> None:
    """Two gateways may have loaded it at the same time under two names."""
    mine = await residency.hold(version())
    reported = [
        ResidentAdapter(name=name, tier="gpu", bytes=1, last_used=0, owner="t", digest="d")
        for name in (mine.name, "a-0000")
    ]
    residency.adopt(reported, asked_at=0)
    await residency.unload(TenantId("t"), ["d"])
    assert sorted(agent.unloaded) == sorted([mine.name, "a-0000"])
    assert residency.held(version()) is None


async def test_a_load_newer_than_the_report_is_kept(residency: Residency, agent: Agent) -> None:
    """A report that was asked for before the load ended does not know it yet."""
    await residency.hold(version())
    residency.adopt([], asked_at=0)
    assert residency.held(version()) is not None
    residency.adopt([], asked_at=1e12)
    assert residency.held(version()) is None
