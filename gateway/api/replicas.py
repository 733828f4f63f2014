"""`/admin/v1/replicas`: the engines behind this gateway, for operators."""

from typing import Annotated

from pydantic import BaseModel, Field

from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts, Operator
from gateway.errors import RequestInvalid
from gateway.replicas.pool import Member
from gateway.replicas.replica import ReplicaState
from gateway.settings import ADDRESS

router = LazyRouter(prefix="/admin/v1/replicas", tags=["replicas"])


class NewReplica(BaseModel, extra="forbid"):
    url: Annotated[str, Field(max_length=512)]


class ReplicaObject(BaseModel):
    """`state` is one of `gateway/replicas/replica.py`, or `drained`: no gateway has a request there any more.

    `in_flight` and `waiting` count this gateway's requests; times in Unix seconds, null for a replica of the settings.
    """

    id: str
    object: str = "replica"
    url: str
    source: str
    state: str
    in_flight: int
    waiting: int
    adapters: int
    generation: str | None
    max_loras: int | None
    max_num_seqs: int | None
    created_at: int | None
    drained_at: int | None


class ReplicaList(BaseModel):
    object: str = "list"
    data: list[ReplicaObject]


@router.get("")
async def list_replicas(_: Operator, parts: AppParts) -> ReplicaList:
    """Every replica, those of the settings first."""
    return ReplicaList(data=[_object(member) for member in parts.pool.members()])


@router.post("", status_code=201)
async def add_replica(body: NewReplica, _: Operator, parts: AppParts) -> ReplicaObject:
    """A further replica: it takes requests once its engine has given a token."""
    if not ADDRESS.fullmatch(body.url):
        raise RequestInvalid("A replica's url is http://host:port or unix:/path.", param="url")
    return _object(await parts.pool.add(body.url))


@router.get("/{replica}")
async def show_replica(replica: str, _: Operator, parts: AppParts) -> ReplicaObject:
    """One replica."""
    return _object(parts.pool.member(replica))


@router.post("/{replica}/drain")
async def drain_replica(replica: str, _: Operator, parts: AppParts) -> ReplicaObject:
    """Keep requests away, here at once and at every gateway within a second; those that run end in their own time."""
    return _object(await parts.pool.drain(replica))


@router.post("/{replica}/resume")
async def resume_replica(replica: str, _: Operator, parts: AppParts) -> ReplicaObject:
    """Let requests come again."""
    return _object(await parts.pool.resume(replica))


@router.delete("/{replica}", status_code=204)
async def remove_replica(replica: str, _: Operator, parts: AppParts) -> None:
    """Take it out of the pool; requests that run there end in their own time."""
    await parts.pool.remove(replica)


def _object(member: Member) -> ReplicaObject:
    replica = member.replica
    report = replica.report
    drained = replica.state is ReplicaState.DRAINING and replica.is_drained
    return ReplicaObject(
        id=replica.id,
        url=replica.url,
        source="settings" if member.in_settings else "database",
        state="drained" if drained else replica.state.value,
        in_flight=replica.gate.in_flight,
        waiting=replica.gate.waiting,
        adapters=len(report.adapters) if report is not None else 0,
        generation=report.generation if report is not None else None,
        max_loras=report.engine.max_loras if report is not None else None,
        max_num_seqs=report.engine.max_num_seqs if report is not None else None,
        created_at=member.created_at,
        drained_at=member.drained_at,
    )
